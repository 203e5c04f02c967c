"""Megatron-Omega: pretraining of encoder-decoder language models in tensor, pipeline and data parallelism."""

__version__ = "0.1.0"
