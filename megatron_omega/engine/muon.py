"""Muon: the momentum of a matrix, made orthogonal, is its update; everything else takes AdamW. Knows no model.

Orthogonal is the canonical matrix (q, k, v of a branch, gate, up, ...: `ParameterInfo.rows` and `columns`), whole,
whatever ranks hold of it, so that all layouts take the same step. Momentum stays where the weights' masters are:

    every rank   moves its part of the momentum                           nothing is sent
    replicas     add their parts up at one of them, another one for each parameter     reduce    (ZeRO-1 to 3)
    that one     joins the slices of the tensor-parallel ranks, makes them orthogonal  all-reduce
    replicas     take their part of the result                                         broadcast

Parts are disjoint, so adding zeros joins them exactly. Muon: Jordan et al. 2024; at scale: arXiv 2502.16982.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_omega.engine.internals import EngineHolding
from megatron_omega.parallel.parameters import ParameterInfo
from megatron_omega.parallel.topology import Topology

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
_EPSILON = 1e-7


def is_matrix(info: ParameterInfo) -> bool:
    """Return whether Muon moves a parameter."""
    return bool(info.columns)


def orthogonal(matrices: Tensor) -> Tensor:
    """Return the nearest semi-orthogonal matrices of [n, rows, columns], singular values within about 0.7 to 1.2.

    Five steps of a quintic Newton-Schulz iteration, with the coefficients of the reference and of `torch.optim.Muon`.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    found = matrices.mT if is_tall else matrices
    found = found / (found.norm(dim=(1, 2), keepdim=True) + _EPSILON)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = found @ found.mT
        found = a * found + (b * gram + c * gram @ gram) @ found
    return found.mT if is_tall else found


def orthogonal_update(info: ParameterInfo, momentum: Tensor) -> Tensor:
    """Return the update for the whole parameter's momentum: each of its matrices orthogonal, times
    sqrt(max(1, rows / columns)), so that what it changes of an output does not depend on the shape."""
    order = [axis for axis in range(momentum.dim()) if axis not in (*info.rows, *info.columns)]
    order += [*info.rows, *info.columns]
    arranged = momentum.permute(order)
    rows, columns = (math.prod(momentum.shape[axis] for axis in axes) for axes in (info.rows, info.columns))
    update = orthogonal(arranged.reshape(-1, rows, columns)) * math.sqrt(max(1.0, rows / columns))
    back = sorted(range(len(order)), key=order.__getitem__)
    return update.reshape(arranged.shape).permute(back)


class Muon(torch.optim.AdamW):
    """AdamW whose groups with `is_matrix` take Muon's step (Nesterov momentum, decoupled weight decay).

    `exp_avg` is the momentum of those; they have no `exp_avg_sq`. Before the first step `bind` says what each tensor of
    a group is made of. A step is collective within a stage: every rank has the same groups of the same parameters.
    """

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float, topology: Topology, **settings: Any) -> None:
        super().__init__(groups, fused=True, **settings)
        self._momentum = momentum
        self._topology = topology
        self._parts: dict[Tensor, list[EngineHolding]] = {}
        self._is_partitioned = False

    def bind(self, parts: Sequence[EngineHolding], *, is_partitioned: bool) -> None:
        """Take what this rank holds of every parameter, also nothing, in an order that all ranks share."""
        self._is_partitioned = is_partitioned
        for part in parts:
            if is_matrix(part.info):
                self._parts.setdefault(part.flat, []).append(part)
        for flat in self._parts:
            self.state[flat] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(flat, requires_grad=False)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["is_matrix"]]
        super().step()
        self.param_groups = groups
        for group in groups:
            if group["is_matrix"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        flats = [flat for flat in group["params"] if flat.grad is not None]
        for flat in flats:
            state = self.state[flat]
            state["step"] += 1
            state["exp_avg"].lerp_(flat.grad, 1 - self._momentum)
            flat.grad.lerp_(state["exp_avg"], self._momentum)
        parts = [part for flat in flats for part in self._parts[flat]]
        replicas = self._topology.data.size
        for first in range(0, len(parts), replicas):
            self._orthogonalise(parts[first : first + replicas])
        for flat in flats:
            flat.mul_(1 - group["lr"] * group["weight_decay"]).add_(flat.grad, alpha=-group["lr"])

    def _orthogonalise(self, parts: Sequence[EngineHolding]) -> None:
        """Put the update of at most one parameter for each replica in the place of its gradient."""
        data, update = self._topology.data, None
        for owner, local in self._collected(parts):
            if owner == data.rank:
                update = self._slice_of_update(parts[owner].info, local)
        for owner, part in enumerate(parts):
            local = update if owner == data.rank and update is not None else _empty(part)
            if data.size > 1:
                dist.broadcast(local, data.ranks[owner], group=data.handle)
            gradient = part.flat.grad
            assert gradient is not None
            part.part(gradient).copy_(local.view(-1)[part.first : part.first + part.count])

    def _collected(self, parts: Sequence[EngineHolding]) -> Iterator[tuple[int, Tensor]]:
        """Yield for each parameter the replica that computes it, and its tensor-parallel slice: whole on that one."""
        data = self._topology.data
        for owner, part in enumerate(parts):
            gradient = part.flat.grad
            assert gradient is not None
            local = _empty(part).zero_()
            local.view(-1)[part.first : part.first + part.count] = part.part(gradient)
            if self._is_partitioned and data.size > 1:
                dist.reduce(local, data.ranks[owner], group=data.handle)
            yield owner, local

    def _slice_of_update(self, info: ParameterInfo, local: Tensor) -> Tensor:
        tensor = self._topology.tensor
        if info.axis is None or tensor.size == 1:
            return orthogonal_update(info, local).contiguous()
        whole = local.new_zeros(info.shape)
        info.local_slice(whole).copy_(local)
        dist.all_reduce(whole, group=tensor.handle)
        return info.local_slice(orthogonal_update(info, whole)).contiguous()


def _empty(part: EngineHolding) -> Tensor:
    return torch.empty(part.info.local_shape, dtype=torch.float32, device=part.parameter.device)
