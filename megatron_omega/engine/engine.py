"""The distributed engine: DeepSpeed behind two calls, `train_step` and `evaluate`. Knows tensors, not data or model.

A micro-batch holds flat tuples of integer tensors, as the model takes them. Its labels are (LM, MLM); the engine adds
two factors that divide each loss by its token count over the whole global batch, so that losses and gradients do not
depend on micro-batching or layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from megatron_omega.config.labels import IGNORED_LABEL
from megatron_omega.config.schema import OptimizerConfig
from megatron_omega.engine.early_sums import sum_early
from megatron_omega.engine.internals import engine_parts, loss_scaler_state, set_loss_scaler_state
from megatron_omega.engine.muon import Muon
from megatron_omega.engine.optimizer import Clipper, build_optimizer, set_learning_rate
from megatron_omega.engine.pipeline import initialize
from megatron_omega.engine.repairs import (
    agree_on_norm_groups,
    clear_gradients_once_taken,
    stop_timers,
    sum_nothing_over_one_replica,
    sum_with_fewer_copies,
)
from megatron_omega.engine.results import Accept, EvaluationResult, MicroBatch, StepResult
from megatron_omega.engine.start import accelerator
from megatron_omega.parallel.mpu import ModelParallelUnit
from megatron_omega.parallel.topology import Topology

Weighted = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
LOSS_PARTS = ("lm_loss", "mlm_loss")


def gather_whole(model: nn.Module, classes: Sequence[type[nn.Module]]) -> None:
    """Let ZeRO-3 gather all weights of each module of `classes` before its call, since a compiled one has no inside."""
    present = [kind for kind in classes if any(isinstance(module, kind) for module in model.modules())]
    if present:
        set_z3_leaf_modules(model, present)


def trained(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that are trained; frozen ones cost no optimizer memory."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            yield parameter
        else:
            # DeepSpeed's pipeline asks every tied weight for the gradient its bf16 optimizer keeps.
            parameter._hp_grad = None  # pyright: ignore[reportAttributeAccessIssue]


class Engine:
    """A model, its optimizer and its layout, ready to train.

    Batches are read by ranks of the first and the last pipeline stage only (`reads_data`); others pass nothing.
    """

    def __init__(
        self, model: nn.Module, values: Mapping[str, Any], optimizer: OptimizerConfig, topology: Topology
    ) -> None:
        device_type = "cpu" if _is_offloaded(values) else accelerator().device_name()
        stage = values["zero_optimization"]["stage"]
        clips = stage == 0 and not values.get("fp16", {}).get("enabled", False)
        self._own_clipping = Clipper(topology, optimizer.gradient_clipping) if clips else None
        inner, self.optimizer_choice = build_optimizer(
            trained(model), optimizer, topology, device_type=device_type, clipper=self._own_clipping
        )
        self.topology = topology
        is_pipeline = isinstance(model, PipelineModule)
        mpu = None if is_pipeline else ModelParallelUnit(topology)
        values = sum_with_fewer_copies(values, is_cpu=accelerator().device_name() == "cpu")
        self.deepspeed: Any = initialize(model, inner, values, mpu, topology.timeout)
        if isinstance(inner, Muon):
            inner.bind(engine_parts(self.deepspeed), is_partitioned=stage > 0)
        stop_timers(self.deepspeed)
        sum_nothing_over_one_replica(self.deepspeed)
        if is_pipeline:
            agree_on_norm_groups(self.deepspeed.optimizer, topology)
            clear_gradients_once_taken(self.deepspeed.optimizer)
        self._sums = self.deepspeed.early_sums = sum_early(self.deepspeed)

    @property
    def is_pipeline(self) -> bool:
        return isinstance(self.deepspeed, PipelineEngine)

    @property
    def module(self) -> Any:
        return self.deepspeed.module

    @property
    def device(self) -> torch.device:
        return self.deepspeed.device

    @property
    def reads_data(self) -> bool:
        """Whether this rank needs batches: the first stage takes the inputs, the loss stage the labels."""
        return not self.is_pipeline or self.topology.pipeline.rank in (0, self._loss_stage)

    @property
    def _loss_stage(self) -> int:
        """Pipeline rank that computes the loss: the V of DualPipeV ends where it begins."""
        return 0 if isinstance(self.module, DualPipeVModule) else self.topology.pipeline.size - 1

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches per step and replica, at the present global batch size."""
        return self.deepspeed.gradient_accumulation_steps()

    def set_global_batch_size(self, global_batch_size: int) -> None:
        """Change the number of micro-batches of a step."""
        if self.deepspeed.train_batch_size() != global_batch_size:
            self.deepspeed.set_train_batch_size(global_batch_size)
            self.deepspeed.micro_steps = 0  # a step ends where this is a multiple of the accumulation, the new one too

    def train_step(
        self, batches: Iterator[MicroBatch], *, learning_rate: float, accept: Accept | None = None
    ) -> StepResult:
        """Run one optimizer step over the next `num_micro_batches` of `batches`. Collective.

        Where `accept` refuses the loss, the step is skipped by the engine as one whose gradient is not finite.
        """
        set_learning_rate(self.deepspeed.optimizer, learning_rate)
        taken = self._take(batches, self.num_micro_batches)
        lm_tokens, mlm_tokens, num_tokens = self._global_counts(taken)
        weighted = self._staged(self._weighted(taken, torch.tensor([lm_tokens, mlm_tokens])))
        skipped_before, self._refused = self.deepspeed.skipped_steps, False
        scale = loss_scaler_state(self.deepspeed.optimizer) if accept is not None else {}
        if scale:  # a refused step is none that the loss scale is to blame for
            self.deepspeed.optimizer.loss_scaler.raise_error_at_min_scale = False
        loss, parts = (
            self._train_pipeline(weighted, accept) if self.is_pipeline else self._train_plain(weighted, accept)
        )
        skipped = self.deepspeed.skipped_steps > skipped_before
        if skipped and scale and self._was_refused():
            set_loss_scaler_state(self.deepspeed.optimizer, scale)
        norm = self.deepspeed.get_global_grad_norm()
        if self._own_clipping is not None:
            skipped, norm = self._own_clipping.skipped, self._own_clipping.global_norm
        norm = math.nan if norm is None else float(norm)
        if mlm_tokens == 0 and self.reads_data:
            parts = (parts[0], math.nan)
        return StepResult(loss, *parts, norm, skipped, int(num_tokens))

    def evaluate(self, batches: Iterator[MicroBatch], num_micro_batches: int) -> EvaluationResult:
        """Return the mean losses over the next `num_micro_batches` of `batches` on every replica. Collective."""
        taken = self._take(batches, num_micro_batches)
        counts = self._global_counts(taken)
        ones = torch.ones(2)
        summed = self._staged([(batch.inputs, (*batch.labels, ones, batch.masked_rows)) for batch in taken])
        with torch.no_grad():
            sums = (
                self._evaluate_pipeline(summed, num_micro_batches) if self.is_pipeline else self._evaluate_plain(summed)
            )
        sums = self._total(sums, self.topology.data.handle).tolist()
        means = [total / count if count else math.nan for total, count in zip(sums, counts[:2], strict=True)]
        means = self._from_loss_stage(torch.tensor([*means, *counts[:2]], dtype=torch.float64)).tolist()
        return EvaluationResult(means[0], means[1], int(means[2]), int(means[3]))

    def _take(self, batches: Iterator[MicroBatch], count: int) -> list[MicroBatch]:
        return [next(batches) for _ in range(count)] if self.reads_data else []

    def _global_counts(self, batches: Sequence[MicroBatch]) -> list[float]:
        """Return LM labels, MLM labels and tokens of the global batch; zeros on ranks that read no data."""
        if not self.reads_data:
            return [0.0, 0.0, 0.0]
        labels = [sum(int((batch.labels[part] != IGNORED_LABEL).sum()) for batch in batches) for part in range(2)]
        counts = torch.tensor([*labels, sum(batch.num_tokens for batch in batches)], dtype=torch.float64)
        return self._total(counts, self.topology.data.handle).tolist()

    def _weighted(self, batches: Sequence[MicroBatch], counts: Tensor) -> list[Weighted]:
        """Add to the labels the factors that turn summed losses into means over the global batch."""
        scale = len(batches) * self.topology.data.size  # the engine averages over micro-batches and replicas
        factors = torch.where(counts > 0, scale / counts, 0.0).float()
        return [(batch.inputs, (*batch.labels, factors, batch.masked_rows)) for batch in batches]

    def _staged(self, batches: Sequence[Weighted]) -> list[Weighted]:
        """Start to copy all micro-batches of a step to the device: the few integers they are, nothing waits for."""
        return [(self._to_device(inputs), self._to_device(labels)) for inputs, labels in batches]

    def _total(self, values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        if group is None:
            return values
        values = values.to(self.device)
        dist.all_reduce(values, group=group)
        return values.cpu()

    def _train_plain(self, batches: Sequence[Weighted], accept: Accept | None) -> tuple[float, tuple[float, float]]:
        totals = torch.zeros(3, dtype=torch.float32, device=self.device)
        for number, (inputs, labels) in enumerate(batches, start=1):
            loss = self.deepspeed(inputs, labels)
            totals += torch.cat((loss.detach().float().reshape(1), self._parts()))
            if accept is not None and number == len(batches):
                loss = self._judged(loss, totals[1], accept)
            if self._sums is not None:
                self._sums.is_last_pass = number == len(batches)
            self.deepspeed.backward(loss)
            self.deepspeed.step()
        means = self._total(totals / (len(batches) * self.topology.data.size), self.topology.data.handle).tolist()
        return means[0], (means[1], means[2])

    def _train_pipeline(self, batches: Sequence[Weighted], accept: Accept | None) -> tuple[float, tuple[float, float]]:
        loss_function = self.module.loss_fn
        losses: list[Tensor] = []

        def judging(outputs: tuple[Tensor, ...], labels: tuple[Tensor, ...]) -> Tensor:
            loss = loss_function(outputs, labels)  # pyright: ignore[reportCallIssue]
            losses.append(self._parts()[0])
            if accept is None or len(losses) < len(batches):
                return loss
            return self._judged(loss, torch.stack(losses).sum(), accept)

        self.module.loss_fn = judging
        try:
            loss = self.deepspeed.train_batch(iter(batches))
        finally:
            self.module.loss_fn = loss_function
        parts = cast(Mapping[str, Tensor], self.deepspeed.get_additional_losses())
        total, lm, mlm = torch.stack([loss, *(parts[name] for name in LOSS_PARTS)]).tolist()
        return total, (lm, mlm)

    def _judged(self, loss: Tensor, total: Tensor, accept: Accept) -> Tensor:
        """Return the last micro-batch's `loss`; one whose gradient is not a number where the step is refused.

        `total` is this replica's sum of LM losses. The loss of the whole batch is known here, before the last backward
        pass. A gradient that is not finite reaches every rank, and every engine skips such a step as a whole: refusing
        needs nothing of the engine but that.
        """
        mean = self._total(total / (self.num_micro_batches * self.topology.data.size), self.topology.data.handle)
        self._refused = not accept(mean.item())
        return cast(Tensor, _Refused.apply(loss)) if self._refused else loss

    def _was_refused(self) -> bool:
        """Whether the ranks that know the loss refused this step. Collective."""
        return bool(self._from_loss_stage(torch.tensor([float(self._refused)])).item())

    def _evaluate_plain(self, batches: Iterable[Weighted]) -> Tensor:
        """Return the summed losses of this rank's replica: [LM, MLM]."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.deepspeed.eval()
        for inputs, labels in batches:
            self.deepspeed(inputs, labels)
            sums += self._parts()
        self.deepspeed.train()
        return sums.cpu()

    def _evaluate_pipeline(self, batches: Sequence[Weighted], count: int) -> Tensor:
        """The same; zeros on ranks that are not the loss stage."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        loss_function = self.module.loss_fn

        def add_parts(outputs: tuple[Tensor, ...], labels: tuple[Tensor, ...]) -> Tensor:
            loss = loss_function(outputs, labels)  # pyright: ignore[reportCallIssue]
            sums.add_(self._parts())
            return loss

        self.module.loss_fn = add_parts
        try:
            self.deepspeed.eval_batch(iter(batches), reduce_output=None, bcast_loss=False, num_micro_batches=count)
        finally:
            self.module.loss_fn = loss_function
        return sums.cpu()

    def _parts(self) -> Tensor:
        parts = cast(Mapping[str, Tensor], self.module.loss_parts)
        return torch.stack([parts[name].detach().float() for name in LOSS_PARTS])

    def _from_loss_stage(self, values: Tensor) -> Tensor:
        """Carry `values` from the pipeline stage that computed the loss to the others."""
        if not self.is_pipeline:
            return values
        group = self.topology.pipeline
        values = values.to(self.device)
        dist.broadcast(values, src=group.ranks[self._loss_stage], group=group.handle)
        return values.cpu()

    def _to_device(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Copy from pinned memory, behind what the device computes."""
        if self.device.type == "cuda":
            tensors = tuple(tensor.pin_memory() for tensor in tensors)
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)


def _is_offloaded(values: Mapping[str, Any]) -> bool:
    """Whether the optimizer works on tensors of the host, which a CUDA library's cannot."""
    offload = values["zero_optimization"].get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


class _Refused(torch.autograd.Function):
    """The identity, with a gradient that is not a number."""

    @staticmethod
    def forward(context: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return torch.full_like(gradient, math.nan)
