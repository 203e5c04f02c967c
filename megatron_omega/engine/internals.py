"""Where a DeepSpeed engine keeps masters, moments and counters. The only file that touches its private state.

Under every ZeRO stage what a rank owns of a parameter is a run of the flattened tensor-parallel shard, lying at an
offset of one fp32 tensor that is also the key of the optimizer's state. `EngineHolding` says which; everything else is
the same for all stages. The engine's own table of that mapping is not used: it is wrong with round-robin gradients,
and a wrong table makes round trips that look perfect. `check_masters` is the proof.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_omega.parallel.parameters import ParameterInfo, declared_parameters, describe
from megatron_omega.parallel.regions import Holding, Region

Engine = Any  # deepspeed.DeepSpeedEngine or PipelineEngine: their types do not describe what is needed here

_CHECKED_ELEMENTS = 4096
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class EngineHolding:
    """What this rank's optimizer owns of one parameter."""

    info: ParameterInfo
    parameter: nn.Parameter
    flat: Tensor
    """The fp32 tensor the optimizer updates, of which the holding is a part; the key of the optimizer's state."""
    offset: int
    """Position of the holding in the flattened `flat`."""
    first: int
    """Position of its first element in the flattened local parameter."""
    count: int
    """Number of elements."""
    copy: int
    """How many parameters of the same name came before it on this rank."""

    @property
    def holding(self) -> Holding:
        info = self.info
        bounds = (0, 0) if info.axis is None else (info.start, info.stop)
        return Holding(info.name, Region(info.shape, info.axis, *bounds, self.first, self.count), self.copy)

    def part(self, flat: Tensor) -> Tensor:
        """Return this holding's elements of the optimizer's tensor or of a moment shaped like it, as a 1-D view."""
        return flat.detach().view(-1)[self.offset : self.offset + self.count]

    def working(self) -> Tensor:
        """Return the same elements of the working weight."""
        shard = getattr(self.parameter, "ds_tensor", None)  # ZeRO-3 keeps this rank's partition there
        if shard is not None:
            return shard.detach().view(-1)[: self.count]
        return self.parameter.detach().view(-1)[self.first : self.first + self.count]


def engine_holdings(engine: Engine) -> list[EngineHolding]:
    """Return what this rank's optimizer owns, in the order of the optimizer's groups."""
    return [part for part in engine_parts(engine) if part.count > 0]


def engine_parts(engine: Engine) -> list[EngineHolding]:
    """Return what this rank's optimizer owns of every parameter it optimises, also nothing, in an order that the ranks
    of a stage share."""
    found: list[EngineHolding] = []
    seen: dict[str, int] = {}
    for parameter, flat, offset, first, count in _optimizer_parts(engine.optimizer):
        info = describe(parameter)
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        assert shape == info.local_shape, f"{info.name}: holds {shape}, declared {info.local_shape}"
        copy = seen[info.name] = seen.get(info.name, -1) + 1
        found.append(EngineHolding(info, parameter, flat, offset, first, count, copy))
    declared = {info.name for info, parameter in declared_parameters(engine.module) if parameter.requires_grad}
    assert declared == seen.keys(), f"not optimised: {declared - seen.keys()}; unknown: {seen.keys() - declared}"
    return found


@dataclass(frozen=True)
class FrozenHolding:
    """What this rank holds of a parameter that is not trained: working weights, no master."""

    info: ParameterInfo
    parameter: nn.Parameter
    first: int
    """Position of its first element in the flattened local parameter."""
    count: int

    @property
    def region(self) -> Region:
        """Which elements of the whole parameter these are."""
        info = self.info
        bounds = (0, 0) if info.axis is None else (info.start, info.stop)
        return Region(info.shape, info.axis, *bounds, self.first, self.count)

    def working(self) -> Tensor:
        """Return them, as a 1-D view."""
        shard = getattr(self.parameter, "ds_tensor", None)
        return (self.parameter if shard is None else shard).detach().view(-1)[: self.count]


def frozen_holdings(engine: Engine) -> Iterator[FrozenHolding]:
    """Yield what this rank holds of every parameter that is not trained; under ZeRO-3 a part of each."""
    for info, parameter in declared_parameters(engine.module):
        if parameter.requires_grad:
            continue
        shard, first, count = getattr(parameter, "ds_tensor", None), 0, parameter.numel()
        if shard is not None:
            whole = parameter.ds_numel  # pyright: ignore[reportAttributeAccessIssue]
            first = min(dist.get_rank(engine.optimizer.dp_process_group) * shard.numel(), whole)
            count = min(shard.numel(), whole - first)
        if count:
            yield FrozenHolding(info, parameter, first, count)


@contextmanager
def placing_frozen(engine: Engine) -> Iterator[None]:
    """Surround the filling of frozen weights: under ZeRO-3 small ones stay gathered, and would be the old."""
    partitions = hasattr(engine.optimizer, "fp32_partitioned_groups_flat")
    if partitions:
        engine.optimizer.checkpoint_event_prologue()
    with torch.no_grad():
        yield
    if partitions:
        engine.optimizer.checkpoint_event_epilogue()


_Part = tuple[nn.Parameter, Tensor, int, int, int]  # parameter, flat, offset in flat, first, count


def _optimizer_parts(optimizer: Any) -> Iterator[_Part]:
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return _zero3_parts(optimizer)
    if hasattr(optimizer, "bit16_groups_flat"):
        masters = optimizer.single_partition_of_fp32_groups
        return _zero12_parts(optimizer, optimizer.bit16_groups, optimizer.bit16_groups_flat, masters)
    if hasattr(optimizer, "bf16_groups_flat"):
        masters = optimizer.fp32_groups_flat_partition
        return _zero12_parts(optimizer, optimizer.bf16_groups, optimizer.bf16_groups_flat, masters)
    assert isinstance(optimizer, torch.optim.Optimizer), f"cannot read the state of a {type(optimizer).__name__}"
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return ((parameter, parameter, 0, 0, parameter.numel()) for parameter in parameters)


def _zero12_parts(
    optimizer: Any, groups: Sequence[Sequence[nn.Parameter]], flats: Sequence[Tensor], masters: Sequence[Tensor]
) -> Iterator[_Part]:
    """Locate each parameter by its address in the group's flat buffer: true whatever order put it there."""
    for index, (parameters, flat, master) in enumerate(zip(groups, flats, masters, strict=True)):
        begin = dist.get_rank(optimizer.real_dp_process_group[index]) * master.numel()
        for parameter in parameters:
            position = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
            assert 0 <= position <= flat.numel() - parameter.numel(), "a parameter left its group's flat buffer"
            first = max(begin - position, 0)
            end = min(begin + master.numel() - position, parameter.numel())
            yield parameter, master, position + first - begin, first, max(end - first, 0)


def _zero3_parts(optimizer: Any) -> Iterator[_Part]:
    rank = dist.get_rank(optimizer.dp_process_group)
    for parameters in optimizer.fp16_groups:
        for parameter in parameters:
            group, offset, partition = optimizer.grad_position[optimizer.get_param_id(parameter)]
            first = min(rank * partition, parameter.ds_numel)
            count = min(partition, parameter.ds_numel - first)
            yield parameter, optimizer.fp32_partitioned_groups_flat[group], offset, first, count


@dataclass(frozen=True)
class WeightCopies:
    """The working weights a rank holds, by the data-parallel rank that owns them, and its own masters."""

    owner: int
    """Whose part `own` and the masters are."""
    owners: int
    rows: Sequence[Tensor] = ()
    """ZeRO-1 and 2: flat buffers [owners, elements]; a row holds the weights of an owner."""
    own: Sequence[Tensor] = ()
    """The working weights in other engines: all of them without partitions, the own shards under ZeRO-3."""
    masters: Sequence[tuple[Tensor, Tensor]] = ()
    """(master, working weights that are its cast) of the own part; empty where the working weights are the masters."""
    is_sharded: bool = False


def weight_copies(engine: Engine) -> WeightCopies:
    """Return views of the weights that this rank computes with, before its optimizer has moved them."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        rank, size = dist.get_rank(optimizer.dp_process_group), dist.get_world_size(optimizer.dp_process_group)
        pairs = [(mine.part(mine.flat), mine.working()) for mine in engine_holdings(engine)]
        return WeightCopies(rank, size, own=[working for _, working in pairs], masters=pairs, is_sharded=True)
    prefix = next((name for name in ("bit16", "bf16") if hasattr(optimizer, f"{name}_groups_flat")), None)
    if prefix is None:
        return WeightCopies(0, 1, own=[parameter for _, parameter in declared_parameters(engine.module)])
    flats = getattr(optimizer, f"{prefix}_groups_flat")
    masters = optimizer.single_partition_of_fp32_groups if prefix == "bit16" else optimizer.fp32_groups_flat_partition
    groups = optimizer.real_dp_process_group
    rank, size = dist.get_rank(groups[0]), dist.get_world_size(groups[0])
    rows = [
        flat.narrow(0, 0, size * master.numel()).view(size, -1) for flat, master in zip(flats, masters, strict=True)
    ]
    return WeightCopies(
        rank, size, rows=rows, masters=[(master, mine[rank]) for master, mine in zip(masters, rows, strict=True)]
    )


def replicated_weights(engine: Engine) -> Iterator[Tensor]:
    """Yield what this rank holds of the parameters that tensor-parallel ranks hold alike."""
    for info, parameter in declared_parameters(engine.module):
        if info.axis is None:
            yield getattr(parameter, "ds_tensor", parameter)


def base_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """Return the torch optimizer inside the engine."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def adam_step(optimizer: torch.optim.Optimizer, flat: Tensor) -> float:
    """Return how often `flat` has been updated. Some implementations (apex) count in the group, not for each tensor."""
    if isinstance(optimizer, torch.optim.Adam):
        return float(optimizer.state[flat]["step"]) if optimizer.state.get(flat) else 0.0
    return float(optimizer.param_groups[0].get("step", 0))


def set_adam_step(optimizer: torch.optim.Optimizer, flat: Tensor, step: float) -> None:
    """Set how often `flat` has been updated."""
    if isinstance(optimizer, torch.optim.Adam):
        optimizer.state[flat]["step"].fill_(step)
    else:
        for group in optimizer.param_groups:
            group["step"] = int(step)


def prefill_adam(optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, Tensor]:
    """Return the Adam state of `flat`, created as the first step would where there is none yet."""
    state = optimizer.state[flat]
    if "exp_avg" not in state:
        if isinstance(optimizer, torch.optim.Adam):
            on_device = any(optimizer.param_groups[0].get(flag) for flag in ("fused", "capturable"))
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device if on_device else "cpu")
        state["exp_avg"] = torch.zeros_like(flat, requires_grad=False)
        state["exp_avg_sq"] = torch.zeros_like(flat, requires_grad=False)
    return state


def refresh_working_weights(optimizer: Any) -> None:
    """Cast the masters into the working weights. Collective within each data-parallel group."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.checkpoint_event_prologue()  # small parameters stay gathered between steps: theirs would be the old
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        optimizer.checkpoint_event_epilogue()
    elif hasattr(optimizer, "update_lp_params"):
        with torch.no_grad():
            optimizer.update_lp_params()


def loss_scaler_state(optimizer: Any) -> dict[str, float]:
    """Return the counters of a dynamic loss scaler; nothing where there is none."""
    scaler = getattr(optimizer, "loss_scaler", None)
    if not getattr(scaler, "dynamic", False):
        return {}
    return {key: float(getattr(scaler, key)) for key in _SCALER_FIELDS if hasattr(scaler, key)}


def set_loss_scaler_state(optimizer: Any, saved: Mapping[str, float]) -> None:
    """Set the counters of a dynamic loss scaler; do nothing where there is none."""
    scaler = getattr(optimizer, "loss_scaler", None)
    if getattr(scaler, "dynamic", False):
        for key in saved.keys() & set(_SCALER_FIELDS):  # a file names no attribute that is not the scaler's
            value = saved[key]
            setattr(scaler, key, (float if key == "cur_scale" else int)(value))


def check_masters(holdings: Sequence[EngineHolding]) -> None:
    """Check that working weights are casts of their masters, at the beginning of each: that all are where we think."""
    for mine in holdings:
        working = mine.working()[:_CHECKED_ELEMENTS]
        master = mine.part(mine.flat)[:_CHECKED_ELEMENTS]
        same = torch.equal(working, master.to(working.device, working.dtype))
        assert same, f"{mine.info.name}: the working weight is not the cast of what is taken for its master"
