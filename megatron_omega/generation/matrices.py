"""The matrices that a decoder multiplies with, as they are or with int8 weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_omega.errors import ConfigError
from megatron_omega.parallel import products
from megatron_omega.parallel.products import by_onednn, onednn_takes, pack

SMALLEST_PACKED = 2**18
"""Elements of a weight from which even one row is multiplied faster by oneDNN."""


class Matrix(Protocol):
    """A product with a weight [out, in]."""

    inputs: int

    def __call__(self, inputs: Tensor, out: Tensor | None = None) -> Tensor:
        """[rows, in] -> [rows, out], in the memory of `out` if it is given."""
        ...

    def add_to(self, total: Tensor, inputs: Tensor, scale: float) -> None:
        """Add scale times the product to `total` [rows, out]."""
        ...


Weigh = Callable[[Tensor, int], Matrix]
"""From a weight of any shape, and where its output axes end: before the last axis (-1), or after the first (1)."""


class Plain:
    """A product with a weight as it is."""

    def __init__(self, weight: Tensor) -> None:
        self._transposed, self.inputs = weight.t(), weight.shape[1]

    def __call__(self, inputs: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.mm(inputs, self._transposed, out=out)

    def add_to(self, total: Tensor, inputs: Tensor, scale: float) -> None:
        total.addmm_(inputs, self._transposed, alpha=scale)


class Packed:
    """A product with a copy of a weight in oneDNN's own layout, which is read faster than rows or columns."""

    def __init__(self, weight: Tensor) -> None:
        self._packed, self.inputs = pack(weight), weight.shape[1]

    def __call__(self, inputs: Tensor, out: Tensor | None = None) -> Tensor:
        found = by_onednn(inputs, self._packed)
        return found if out is None else out.copy_(found)

    def add_to(self, total: Tensor, inputs: Tensor, scale: float) -> None:
        total.add_(by_onednn(inputs, self._packed), alpha=scale)


class Quantised:
    """A product with a weight that torchao keeps in int8, with a scale for each output."""

    def __init__(self, weight: Tensor) -> None:
        self._linear, self.inputs = quantised_linear(weight), weight.shape[1]

    def __call__(self, inputs: Tensor, out: Tensor | None = None) -> Tensor:
        found = F.linear(inputs, self._linear.weight)
        return found if out is None else out.copy_(found)

    def add_to(self, total: Tensor, inputs: Tensor, scale: float) -> None:
        total.add_(self(inputs), alpha=scale)


def plain(weight: Tensor, axis: int) -> Matrix:
    """Take a weight in its own format; on a CPU a copy, packed, where that is faster: later changes do not reach it.

    Where MKL trains, that is every weight: its product of few rows depends on how many there are.
    """
    matrix = flat(weight, axis)
    is_packed = onednn_takes(weight) and (products.MKL_IS_FASTER or weight.numel() >= SMALLEST_PACKED)
    return Packed(matrix) if is_packed else Plain(matrix)


def as_it_is(weight: Tensor, axis: int) -> Matrix:
    """Take a weight as it is."""
    return Plain(flat(weight, axis))


def int8(weight: Tensor, axis: int) -> Matrix:
    """Keep a weight in int8; raise ConfigError if torchao is not installed."""
    return Quantised(flat(weight, axis))


def flat(weight: Tensor, axis: int) -> Tensor:
    """Return a view [out, in] of a weight of any shape."""
    return weight.flatten(0, -2) if axis == -1 else weight.flatten(1)


def quantised_linear(weight: Tensor) -> nn.Linear:
    """Return a linear layer of which the weight is kept in int8."""
    try:
        quantisation = importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise ConfigError(
            f"int8 weights need torchao, which cannot be imported ({error}); pip install torchao, or use fp32 or bf16"
        ) from None
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    quantisation.quantize_(layer, quantisation.Int8WeightOnlyConfig())
    return layer
