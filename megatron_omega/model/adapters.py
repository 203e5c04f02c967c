"""Low-rank adapters beside the products of a layer (LoRA, arXiv 2106.09685): y + (alpha / rank) B A x.

An adapter is made from the declaration of the weight that it stands beside, and is split as that one is:

    column-parallel   A [r, in] on every rank, B split by rows as W is        z = A x is made outside and enters
    row-parallel      A split by columns as W is, B [out, r] on every rank    a partial sum, as W's own product

So both have the gradients of one process: what is held by every rank sums its gradient over the ranks that compute
parts of it. B starts at zero: a new adapter changes nothing. Everything else is frozen, but for what `lora.also` names.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_omega.config.schema import AdapterTarget, LoraConfig, TrainedWhole
from megatron_omega.errors import ConfigError
from megatron_omega.model.context import ModelContext
from megatron_omega.parallel.layers import ColumnParallelLinear, EnteringLinear, RowParallelLinear, TokenTable
from megatron_omega.parallel.parameters import ParameterInfo, declare_parameter, declared_parameters, describe
from megatron_omega.parallel.tensor_parallel import TensorParallel

SUFFIX = ".weight"
LORA_A, LORA_B = "lora_a", "lora_b"
TABLE = "token_table.weight"


def target_of(name: str) -> AdapterTarget | None:
    """Return which target a weight belongs to; None if no adapter can stand beside it.

    >>> target_of("decoder.layers.3.cross.kv.weight"), target_of("decoder.layers.3.attention.dynamic.weight")
    ('cross', None)
    """
    *_, block, product, _ = f"..{name}".split(".")
    if block == "cross" and product in ("q", "kv", "out"):
        return "cross"
    known: dict[tuple[str, str], AdapterTarget] = {
        ("attention", "qkv"): "qkv",
        ("attention", "out"): "out",
        ("feed_forward", "gate_up"): "gate_up",
        ("feed_forward", "down"): "down",
    }
    return known.get((block, product))


def adapter_shapes(shape: tuple[int, ...], *, is_column: bool, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of A and B beside a weight of `shape`: its last axis, or all but its first, are the input."""
    if is_column:
        return (rank, shape[-1]), (*shape[:-1], rank)
    return (rank, *shape[1:]), (shape[0], rank)


def initial_deviation(shape: tuple[int, ...]) -> float:
    """Return the standard deviation of a new A of `shape`: its results have the variance of its inputs."""
    deviation = 1.0
    for size in shape[1:]:
        deviation *= size**-0.5
    return deviation


class Adapter(nn.Module):
    """A and B of one product."""

    def __init__(self, info: ParameterInfo, lora: LoraConfig, parallel: TensorParallel, seed: int) -> None:
        super().__init__()
        name = info.name.removesuffix(SUFFIX)
        first, second = adapter_shapes(info.shape, is_column=is_column(info), rank=lora.rank)
        build = {"parallel": parallel, "seed": seed}
        axes = (None, info.axis) if is_column(info) else (info.axis, None)
        self.scale = lora.scale
        self.parallel = parallel
        self.a = declare_parameter(
            f"{name}.{LORA_A}{SUFFIX}", first, axis=axes[0], std=initial_deviation(first), **build
        )
        self.b = declare_parameter(f"{name}.{LORA_B}{SUFFIX}", second, axis=axes[1], **build)

    def product(self, hidden: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return (alpha / rank) B A x of what is there: [..., in] -> [..., out]."""
        return self.up(F.linear(hidden, a.reshape(a.shape[0], -1)), b)

    def up(self, low: Tensor, b: Tensor) -> Tensor:
        """[..., r] -> [..., out]."""
        return F.linear(low, b.reshape(-1, b.shape[-1])) * self.scale


class EnteringAdapter(Adapter):
    """Beside a product whose input comes from outside the region: A's small result enters instead of x."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, s or s/tp, in] outside -> [b, s, out / tp]."""
        a = self.parallel.copy(self.a) if self.parallel.sequence_parallel else self.a
        return self.up(self.parallel.enter(F.linear(hidden, a)), self.b)


class ColumnAdapter(Adapter):
    """Beside a column-parallel product of what is inside the region, whose gradient stays a part there."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, s, in] inside -> [b, s, out / tp]."""
        return self.product(hidden, self.parallel.copy(self.a), self.b)


class RowAdapter(Adapter):
    """Beside a row-parallel product: a part of the sum, as that is."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, s, in / tp] -> this rank's partial sum [b, s, out]."""
        return self.product(hidden, self.a, self.parallel.copy(self.b))


def is_column(info: ParameterInfo) -> bool:
    """Tell whether a weight is split by rows: its last axis is its whole input."""
    return info.axis in info.rows


def with_adapters(layer: nn.Module, context: ModelContext) -> nn.Module:
    """Put an adapter beside every product of `layer` that is a target; return the layer."""
    lora = context.lora
    if not lora.is_on:
        return layer
    for module in list(layer.modules()):
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            info = describe(module.weight)
            if target_of(info.name) in lora.targets:
                module.adapter = _kind(module)(info, lora, context.parallel, context.seed)
    return layer


def _kind(module: nn.Module) -> type[EnteringAdapter | ColumnAdapter | RowAdapter]:
    if isinstance(module, EnteringLinear):
        return EnteringAdapter
    return ColumnAdapter if isinstance(module, ColumnParallelLinear) else RowAdapter


def is_adapter(name: str) -> bool:
    """Tell whether a canonical name is an adapter's."""
    return name.endswith((f".{LORA_A}{SUFFIX}", f".{LORA_B}{SUFFIX}"))


def trained_whole_as(info: ParameterInfo) -> TrainedWhole | None:
    """Return what `lora.also` calls a parameter that can be trained whole beside adapters; None if it has no name."""
    if info.name == TABLE:
        return "table"
    is_of_a_stack = info.name.startswith(("encoder.layers.", "decoder.layers.", "encoder.norm.", "decoder.norm."))
    return "vectors" if is_of_a_stack and not info.columns and not is_adapter(info.name) else None


def freeze_all_but_adapters(model: nn.Module, *, is_pipeline: bool, also: Collection[TrainedWhole] = ()) -> None:
    """Let nothing but adapters and what `also` names be trained.

    A pipeline sends gradients back to its first stage, whatever is trained there: its embeddings take them.

    Raises:
        ConfigError: nothing here would be trained.
    """
    for info, parameter in declared_parameters(model):
        parameter.requires_grad_(is_adapter(info.name) or trained_whole_as(info) in also)
    if not any(is_adapter(info.name) for info, _ in declared_parameters(model)):
        raise ConfigError(
            "a pipeline stage has no adapter (lora.targets); name a target that the layers of every stage have, or use "
            "fewer stages"
        )
    for module in model.modules() if is_pipeline else ():
        if isinstance(module, TokenTable):
            module.register_forward_hook(_open_graph)


def _open_graph(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return the weight that does what weight and adapter do together; whole tensors, in the shape of the weight."""
    update = b.reshape(-1, b.shape[-1]) @ a.reshape(a.shape[0], -1)
    return weight + scale * update.reshape(weight.shape)


def adapter_names(name: str) -> tuple[str, str]:
    """Return the names of A and B beside a weight."""
    stem = name.removesuffix(SUFFIX)
    return f"{stem}.{LORA_A}{SUFFIX}", f"{stem}.{LORA_B}{SUFFIX}"
