"""Training: state, optimizer, schedule, engine, loop and its hooks. Knows batches of tensors, not models or corpora."""
