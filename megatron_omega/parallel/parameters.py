"""Parameters that declare themselves: canonical name, global shape, the slice this rank holds, how they are optimised.

Checkpoint, optimizer and export read this declaration and need no model code. Values depend on (seed,
canonical name, place in the whole parameter) alone, so every layout starts from the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_omega.parallel.drawing import normal_slice
from megatron_omega.parallel.tensor_parallel import TensorParallel

_ATTRIBUTE = "omega"


@dataclass(frozen=True, order=True)
class Scales:
    """Factors on the settings of the optimizer, for one parameter."""

    learning_rate: float = 1.0
    weight_decay: float = 1.0
    """0: the parameter does not decay."""
    epsilon: float = 1.0


UNSCALED = Scales()


@dataclass(frozen=True)
class ParameterInfo:
    """The declaration of one parameter."""

    name: str
    """Canonical name, the same under every layout."""
    shape: tuple[int, ...]
    """Global shape."""
    axis: int | None = None
    """The one axis that is sharded over tensor-parallel ranks; None: replicated."""
    start: int = 0
    """First index of this rank's slice along `axis`."""
    stop: int = 0
    """End (exclusive) of this rank's slice along `axis`."""
    scales: Scales = UNSCALED
    """How it is optimised."""
    rows: tuple[int, ...] = ()
    """Axes that are the outputs of the matrices it consists of. Axes in neither this nor `columns` tell those apart."""
    columns: tuple[int, ...] = ()
    """Axes that are their inputs; empty for what is no matrix of a hidden layer: norms, gains, gates, tables."""

    @property
    def local_shape(self) -> tuple[int, ...]:
        if self.axis is None:
            return self.shape
        return (*self.shape[: self.axis], self.stop - self.start, *self.shape[self.axis + 1 :])

    def local_slice(self, full: Tensor) -> Tensor:
        """Return this rank's view of the full tensor."""
        return full if self.axis is None else full.narrow(self.axis, self.start, self.stop - self.start)


def describe(parameter: nn.Parameter) -> ParameterInfo:
    """Return the declaration of `parameter`. Every parameter of the model has one."""
    info = getattr(parameter, _ATTRIBUTE, None)
    assert isinstance(info, ParameterInfo), "a parameter was created without declaring itself: use declare_parameter"
    return info


def declared_parameters(module: nn.Module) -> Iterator[tuple[ParameterInfo, nn.Parameter]]:
    """Yield every distinct parameter of `module` with its declaration, in construction order."""
    for parameter in module.parameters():
        yield describe(parameter), parameter


def declare_parameter(
    name: str,
    shape: tuple[int, ...],
    *,
    parallel: TensorParallel,
    seed: int,
    axis: int | None = None,
    std: float | None = None,
    fill: float = 0.0,
    scales: Scales = UNSCALED,
    rows: tuple[int, ...] = (),
    columns: tuple[int, ...] = (),
) -> nn.Parameter:
    """Create this rank's slice of the parameter `name` of global `shape`.

    `std` draws from N(0, std^2); without it every element is `fill`.
    """
    start, stop = (0, 0) if axis is None else parallel.shard(shape[axis])
    info = ParameterInfo(name, shape, axis, start, stop, scales, rows, columns)
    parameter = nn.Parameter(_initial_value(info, std, fill, seed))
    setattr(parameter, _ATTRIBUTE, info)
    # DeepSpeed counts an unmarked parameter once per model-parallel group in the gradient norm.
    parameter.tensor_model_parallel = axis is not None  # pyright: ignore[reportAttributeAccessIssue]
    return parameter


def replacement(parameter: nn.Parameter, values: Tensor) -> nn.Parameter:
    """Return a parameter with the declaration of `parameter` and other values, without gradient."""
    new = nn.Parameter(values, requires_grad=False)
    setattr(new, _ATTRIBUTE, describe(parameter))
    return new


def _initial_value(info: ParameterInfo, std: float | None, fill: float, seed: int) -> Tensor:
    if std is None or torch.get_default_device().type == "meta":
        return torch.full(info.local_shape, fill)
    # Inside ZeRO-3's construction context new tensors get the working dtype: draw in fp32 all the same, then follow it.
    working = torch.empty(0)
    drawn = normal_slice(seed, info.name, info.shape, info.axis, info.start, info.stop, device=working.device)
    return drawn.mul_(std).to(working.dtype)
