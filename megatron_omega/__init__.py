"""Megatron-Omega: pretraining of encoder-decoder language models in tensor, pipeline and data parallelism.

What Python programs use: `load`, `Model`, `Tokenizer`, `open_shard`, `train`, `Hook`, `register_transformers`;
docs/python.md shows each. They are imported when they are first asked for: the package itself costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_omega.interface import Hook, Model, Tokenizer, load, open_shard, register_transformers, train

__version__ = "0.2.0"
__all__ = ["Hook", "Model", "Tokenizer", "__version__", "load", "open_shard", "register_transformers", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron_omega import interface

    return getattr(interface, name)
