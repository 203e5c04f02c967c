"""GPT-Omega: attention branches, layers, the layer list and its two executions (in order, and as a pipeline)."""
