"""Exports as Transformers reads them, and back: names, configuration, tokenizer, and the model's own code, `model/`."""
