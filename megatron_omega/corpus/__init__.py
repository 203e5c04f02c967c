"""Text files -> indexed shards: plan the parts, make them in parallel, join them. Resumable at any moment."""
