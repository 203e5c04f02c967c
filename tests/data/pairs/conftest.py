"""The tokenizer, the text and the shards that these tests share."""

from corpora import long_prefix, make_config, model_path, prefix, texts, tokenizer

__all__ = ["long_prefix", "make_config", "model_path", "prefix", "texts", "tokenizer"]
