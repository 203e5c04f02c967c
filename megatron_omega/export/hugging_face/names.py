"""Canonical parameters and the tensors of a Transformers folder: the same bytes under other names and shapes.

There every matrix is that of a plain `nn.Linear`: outputs before inputs, in two dimensions.
"""

from __future__ import annotations

import math

_HEAD = "head.mlm."
_STORED_HEAD = "mlm."
_STORED_MODEL = "model."


def stored_name(name: str) -> str:
    """Return what the parameter `name` is called there.

    >>> stored_name("head.mlm.dense.weight"), stored_name("token_table.weight")
    ('mlm.dense.weight', 'model.token_table.weight')
    """
    return _STORED_HEAD + name.removeprefix(_HEAD) if name.startswith(_HEAD) else _STORED_MODEL + name


def stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that a parameter of `shape` has there.

    >>> stored_shape("decoder.layers.0.attention.qkv.weight", (3, 3, 4, 8, 32))
    (288, 32)
    >>> stored_shape("decoder.layers.0.attention.out.weight", (32, 3, 4, 8))
    (32, 96)
    """
    if name.endswith("out.weight"):
        return shape[0], math.prod(shape[1:])
    if name.endswith(".weight") and len(shape) > 2:
        return math.prod(shape[:-1]), shape[-1]
    return (math.prod(shape),) if name.endswith(".bias") else shape
