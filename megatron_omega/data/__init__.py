"""The corpus path: text -> shards -> samples -> examples -> batches. Knows nothing of models, groups or torch."""
