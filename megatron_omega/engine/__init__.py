"""The distributed engine: DeepSpeed behind two calls, its optimizer, and where it keeps its state."""
