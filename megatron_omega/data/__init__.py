"""The corpus path: text -> shards -> samples -> examples -> batches. Knows nothing of models, ranks' groups or torch."""
