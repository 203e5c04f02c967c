"""Gradients summed over replicas in buckets, while the last micro-batch still runs backward (ZeRO-1 in bf16).

DeepSpeed's bf16 optimizer adds gradients up in one fp32 buffer for each parameter group. Its engine rounds all of that
to bf16 and sums it when every backward pass is over. Here a bucket is a run of such a buffer: as soon as the last
micro-batch has given the last gradient of it, its sum is started where it lies, in fp32 and without a copy, and nobody
waits before the end of the step. All ranks start all buckets in one order, whichever gradients came first, or at all.
Weights that pipeline stages share are left to the end: the stages sum them first. Norms, tables and matrices lie in
buffers of their own, so that buckets of small weights reach through many layers and come last.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn

BUCKET_ELEMENTS = 40_000_000
"""Elements at which a bucket is full: long enough for a large group's bandwidth, and a few for each micro-batch."""


@dataclass
class Bucket:
    """A run of an optimizer's gradients that is summed by one message."""

    gradients: Tensor
    """One-dimensional, fp32."""
    members: frozenset[int]
    """Ids of the parameters."""
    first: int
    """The place of the earliest of them in the model: its gradient comes last."""
    missing: set[int] = field(default_factory=set)
    """Those whose last gradient has not come."""


class EarlySums:
    """Starts a bucket's sum when its last gradient is there, and waits for all at the end."""

    def __init__(self, buckets: Sequence[Bucket], late: Sequence[Bucket], group: dist.ProcessGroup) -> None:
        """`buckets` are started in their order; `late` ones only by `finish`."""
        self.is_last_pass = False
        """Whether the gradients that come now are the last of their parameters in this step."""
        self._buckets, self._late, self._group = [*buckets], [*late], group
        self._of = {member: bucket for bucket in buckets for member in bucket.members}
        self._works: list[Any] = []
        self._reset()

    def take(self, parameter: nn.Parameter) -> None:
        """Note that a gradient of `parameter` has been added."""
        bucket = self._of.get(id(parameter))
        if not self.is_last_pass or bucket is None:
            return
        assert id(parameter) in bucket.missing, "a gradient came after its last one"
        bucket.missing.discard(id(parameter))
        while self._started < len(self._buckets) and not self._buckets[self._started].missing:
            self._start(self._buckets[self._started])
            self._started += 1

    def finish(self, *_: object, **__: object) -> None:
        """Start what is left, and wait for all; stands in for the engine's own sum, and needs none of its arguments."""
        for bucket in (*self._buckets[self._started :], *self._late):
            self._start(bucket)
        for work in self._works:
            work.wait()
        self._reset()

    def _start(self, bucket: Bucket) -> None:
        bucket.gradients.mul_(1.0 / dist.get_world_size(self._group))
        self._works.append(dist.all_reduce(bucket.gradients, group=self._group, async_op=True))

    def _reset(self) -> None:
        self._works.clear()
        self._started = 0
        for bucket in self._buckets:
            bucket.missing = {*bucket.members}


def sum_early(engine: Any, *, bucket_elements: int = BUCKET_ELEMENTS) -> EarlySums | None:
    """Let a DeepSpeed engine sum gradients early; return what has to be told which pass is the last.

    None if the optimizer is not the bf16 one, or if the JSON says how gradients are to travel.
    """
    optimizer, settings = engine.optimizer, engine._config
    if not isinstance(optimizer, BF16_Optimizer) or not optimizer.immediate_grad_update:
        return None
    if settings.communication_data_type or settings.prescale_gradients or settings.gradient_predivide_factor != 1.0:
        return None
    group: Any = optimizer.dp_process_group
    shared = {
        id(weight) for module in getattr(engine.module, "tied_modules", {}).values() for weight in module.parameters()
    }
    places = {id(parameter): place for place, parameter in enumerate(engine.module.parameters())}
    runs = [*_runs(optimizer, shared, places, bucket_elements)] if dist.get_world_size(group) > 1 else []
    early = sorted((run for run in runs if not run.members & shared), key=lambda run: -run.first)
    sums = EarlySums(early, [run for run in runs if run.members & shared], group)
    for parameters in optimizer.bf16_groups:
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(sums.take)  # behind the optimizer's own, which adds it up
    engine.buffered_allreduce_fallback = sums.finish
    return sums


def _runs(
    optimizer: BF16_Optimizer, shared: Collection[int], places: dict[int, int], bucket_elements: int
) -> Iterator[Bucket]:
    """Yield neighbours in the optimizer's buffers, up to `bucket_elements` together; each of `shared` apart."""
    for parameters, flat in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients_flat, strict=True):
        begin, run = 0, list[nn.Parameter]()
        for parameter in parameters:
            size = sum(member.numel() for member in run)
            is_apart = id(parameter) in shared or any(id(member) in shared for member in run)
            if run and (is_apart or size + parameter.numel() > bucket_elements):
                yield _bucket(run, flat.narrow(0, begin, size), places)
                begin, run = begin + size, []
            run.append(parameter)
        if run:
            yield _bucket(run, flat.narrow(0, begin, sum(member.numel() for member in run)), places)


def _bucket(run: Sequence[nn.Parameter], gradients: Tensor, places: dict[int, int]) -> Bucket:
    members = frozenset(id(parameter) for parameter in run)
    return Bucket(gradients, members, min(places[member] for member in members))
