"""DeepSpeed's pipeline engine in an order of our own: 1F1B, and interleaved stages. Knows no model and no data.

The module says how many stages it holds (`chunks`) and shows one at a time (`activate_chunk`); everything a pass does
is DeepSpeed's own. What differs is the order, and that messages do not block: the message for the next pass is
received while this one computes, and only a message that a pass takes in is waited for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any, Protocol, cast

import deepspeed
import torch
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from megatron_omega.config.interleaving import Interleaving, Pass
from megatron_omega.engine.channels import Channels, Tensors, form_of
from megatron_omega.engine.early_sums import EarlySums
from megatron_omega.engine.schedules import RankSchedule, kind_of, rank_schedule


class ChunkedModule(Protocol):
    """A pipeline module that holds one or several stages of the layer list and shows one at a time."""

    chunks: int

    def activate_chunk(self, chunk: int) -> None:
        """Let the module's forward pass be that of its stage number `chunk`."""
        ...


def initialize(
    module: Any, optimizer: torch.optim.Optimizer, values: Mapping[str, Any], mpu: Any, timeout: timedelta | None = None
) -> Any:
    """Build DeepSpeed's engine for `module`; ours if it holds stages that are run in turns. Collective.

    `timeout` is how long a message between stages may take.
    """
    config = dict(values)
    if not hasattr(module, "activate_chunk"):
        return deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, mpu=mpu, dist_init_required=False
        )[0]
    parsed = deepspeed.DeepSpeedConfig(config, module.mpu())
    deepspeed.set_optimizer_flags(parsed, module)
    return StagesInTurns(
        timeout, args=None, model=module, optimizer=optimizer, model_parameters=None, training_data=None,
        lr_scheduler=None, mpu=module.mpu(), dist_init_required=False, collate_fn=None, config=config,
        config_class=parsed,
    )  # fmt: skip


class StagesInTurns(PipelineEngine):
    """Runs a `ChunkedModule` in the order of config/interleaving.py."""

    _chunk: int | None = None
    """The stage whose pass runs; between passes None."""
    early_sums: EarlySums | None = None
    """Told when gradients are the last ones."""

    def __init__(self, timeout: timedelta | None, **options: Any) -> None:
        super().__init__(**options)
        assert not (self.is_pipe_partitioned or self.is_grad_partitioned or self.dynamic_shape)
        self._shape = Interleaving(self.num_stages, cast(ChunkedModule, self.module).chunks, self.micro_batches)
        pipelines = self.grid._topo.get_axis_comm_lists("pipe")
        self._channels = Channels(
            pipelines, cast(torch.device, self.device), is_ring=self._shape.chunks > 1, timeout=timeout
        )
        self._losses: dict[int, Tensor] = {}

    def is_last_stage(self) -> bool:
        """Whether this rank holds the last stage and, during a pass, whether it is that one's."""
        last = cast(ChunkedModule, self.module).chunks - 1
        return super().is_last_stage() and self._chunk in (None, last)

    def _train_schedule(self) -> RankSchedule:
        return _scheduled(self._shape._replace(micro_batches=self.micro_batches), self.stage_id, is_training=True)

    def _inference_schedule(self, micro_batches: int) -> RankSchedule:
        return _scheduled(self._shape._replace(micro_batches=micro_batches), self.stage_id, is_training=False)

    def _exec_schedule(self, pipe_schedule: RankSchedule) -> None:
        self._reserve_pipe_buffers(pipe_schedule.num_buffers)
        self.fwd_outputs = []
        for sender in pipe_schedule.senders:
            self._channels.expect(sender, [(task, kind_of(task)) for task in pipe_schedule.expected(sender)])
        for task, after in zip(pipe_schedule.passes, (*pipe_schedule.passes[1:], None), strict=True):
            received = self._received(pipe_schedule, task)
            if after is not None and after in pipe_schedule.arrivals:
                self._channels.post(pipe_schedule.arrivals[after].rank, after)
            result = (
                self._forward(pipe_schedule, task, received)
                if task.direction == "F"
                else self._backward(pipe_schedule, task, received)
            )
            self._give(pipe_schedule, task, result)
        self._channels.finish()
        if pipe_schedule.is_training:
            self._exec_reduce_tied_grads()
            self._exec_reduce_grads()
            self._exec_optimizer_step()

    def _received(self, schedule: RankSchedule, task: Pass) -> Tensors | None:
        """Wait for what `task` takes in; what its sender had taken in by then has arrived there."""
        if task not in schedule.arrivals:
            return None
        delivery = schedule.arrivals[task]
        tensors = self._channels.take(delivery.rank, task)
        if schedule.is_training:
            self._channels.release(delivery.rank, delivery.place)
        return tensors

    def _give(self, schedule: RankSchedule, task: Pass, result: Tensors | None) -> None:
        if result is None:
            return
        delivery = schedule.departures[task]
        self._channels.send(delivery.rank, kind_of(delivery.task), result, delivery.place)
        if not schedule.is_training:
            self._channels.keep_at_most(delivery.rank, schedule.most_on_their_way)

    def _forward(self, schedule: RankSchedule, task: Pass, received: Tensors | None) -> Tensors | None:
        """Run a forward pass; return what the next stage takes in, None after the last."""
        buffer, buffers = schedule.buffer(task), self.pipe_buffers
        with self._showing(schedule.chunk(task)):
            if received is None or self.is_last_stage():
                self._exec_load_micro_batch(buffer)
            if received is not None:
                buffers["inputs"][buffer] = tuple(part.requires_grad_(part.is_floating_point()) for part in received)
            self._exec_forward_pass(buffer)
            is_last = self.is_last_stage()
        outputs = buffers["outputs"][buffer]
        if schedule.is_training and is_last:
            self._losses[buffer] = self.loss
        if schedule.is_training and not is_last:
            gradients = task._replace(direction="B")
            self._channels.know(kind_of(gradients), form_of(_floats(outputs)))
        if not schedule.is_training:
            buffers["inputs"][buffer] = buffers["outputs"][buffer] = buffers["labels"][buffer] = None
        return None if is_last else tuple(part.detach() for part in outputs)

    def _backward(self, schedule: RankSchedule, task: Pass, received: Tensors | None) -> Tensors | None:
        """Run a backward pass; return the gradients the stage before takes in, None after the first."""
        buffer, buffers = schedule.buffer(task), self.pipe_buffers
        if received is None:
            self.loss = self._losses.pop(buffer)
        self.grad_layer = received
        if self.early_sums is not None:
            self.early_sums.is_last_pass = task.micro_batch == schedule.shape.micro_batches - 1
        with self._showing(schedule.chunk(task)):
            self._exec_backward_pass(buffer)
        inputs = buffers["inputs"][buffer]
        for kept in buffers.values():
            kept[buffer] = None
        self.grad_layer = None
        if task not in schedule.departures:
            return None
        gradients = tuple(cast(Tensor, part.grad) for part in _floats(inputs))
        self._channels.know(kind_of(schedule.departures[task].task), form_of(gradients))
        return gradients

    @contextmanager
    def _showing(self, chunk: int) -> Iterator[None]:
        self._chunk = chunk
        cast(ChunkedModule, self.module).activate_chunk(chunk)
        try:
            yield
        finally:
            self._chunk = None


@lru_cache(maxsize=16)
def _scheduled(shape: Interleaving, rank: int, *, is_training: bool) -> RankSchedule:
    return rank_schedule(shape, rank, is_training=is_training)


def _floats(tensors: Tensors) -> Tensors:
    return tuple(tensor for tensor in tensors if tensor.is_floating_point())
