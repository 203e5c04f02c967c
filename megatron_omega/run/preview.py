"""What `pretrain_omega.py --dry-run` prints: the run as it would start, and what it would cost. Imports no torch.

The estimate is the planner's, for this machine first: a calculation, not a measurement. `megatron-omega plan` does it
for others, and compares layouts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from megatron_omega import accounting
from megatron_omega.config.layout import num_stages, ranks_per_replica
from megatron_omega.config.load import ResolvedRun, dump_config
from megatron_omega.config.schema import RunConfig
from megatron_omega.data.sources import open_sources
from megatron_omega.health.preflight import disk_findings, gather_findings
from megatron_omega.host.environment import has_gpu
from megatron_omega.host.redaction import redact, redacted
from megatron_omega.planner import report
from megatron_omega.planner.candidates import Candidate, of_config
from megatron_omega.planner.estimate import Estimate, Planner
from megatron_omega.planner.forecast import RunForecast, crowded, forecast_lines
from megatron_omega.planner.hardware import Hardware, find_hardware, read_hardware
from megatron_omega.planner.machine import this_machine
from megatron_omega.planner.operations import Assumptions

GPU = "h100-80g"
"""What a 16-bit run is usually meant for."""


@dataclass(frozen=True)
class StageLayers:
    """One piece of the layer list."""

    rank: int
    """Pipeline rank that holds it."""
    first: int
    last: int
    layers: str
    """In words: `embedding, encoder 0-11`."""
    parameters: int


@dataclass(frozen=True)
class Preview:
    """A run that has not started."""

    resolved: ResolvedRun

    @property
    def config(self) -> RunConfig:
        return self.resolved.config

    @property
    def candidate(self) -> Candidate:
        """The layout; as many replicas as DeepSpeed was told of."""
        settings, batch = self.resolved.deepspeed, self.config.batch
        accumulation = settings.values["gradient_accumulation_steps"]
        replicas = batch.global_batch_size // (batch.micro_batch_size * accumulation)
        return of_config(self.config, replicas * ranks_per_replica(self.config), settings.zero_stage)

    @cached_property
    def here(self) -> RunForecast | None:
        """What the run would take on this machine; None if that has a GPU, which only torch could name."""
        machine = None if has_gpu() else this_machine()
        if machine is None or not machine.hardware.supports(self.config.precision.dtype):
            return None
        return RunForecast(self._estimate(crowded(machine.hardware, self.candidate.world_size)), machine)

    @cached_property
    def estimate(self) -> Estimate:
        """What the layout costs: on this machine if it would run here, else on a common GPU."""
        if self.here is not None and self.config.precision.dtype == "fp32":
            return self.here.estimate
        return self._estimate(find_hardware(GPU, file=read_hardware()))

    def _estimate(self, hardware: Hardware) -> Estimate:
        return Planner(self.config, hardware).estimate(self.candidate, exact=True)

    @property
    def assumptions(self) -> Assumptions:
        """The length of this very run."""
        samples = self.config.training.train_steps * self.config.batch.global_batch_size
        return Assumptions(tokens=samples * accounting.tokens_per_sample(self.config))

    @property
    def parameters(self) -> int:
        data = self.config.data
        return accounting.parameter_count(
            self.config.model,
            encoder_seq_length=data.encoder_seq_length,
            decoder_seq_length=data.decoder_seq_length,
        )

    @cached_property
    def findings(self) -> list[str]:
        """What would keep the run from starting on this machine."""
        return gather_findings(
            {"corpus": lambda: open_sources(self.config) and None, "disk": lambda: disk_findings(self.config)}
        )[0]

    @property
    def stages(self) -> Iterator[StageLayers]:
        """Yield the pieces of the layer list, in its order."""
        costs = accounting.layer_costs(self.config)
        cuts = self.config.parallel.stage_boundaries or accounting.stage_boundaries(costs, num_stages(self.config))
        rank_of = {stage: rank for rank in range(self.candidate.pipeline) for stage in self.candidate.stages_of(rank)}
        for index, (first, end) in enumerate(pairwise((0, *cuts, len(costs)))):
            mine = costs[first:end]
            words = ", ".join(_runs([cost.name for cost in mine]))
            yield StageLayers(rank_of[index], first, end - 1, words, sum(cost.parameters for cost in mine))


def describe(resolved: ResolvedRun, *, as_json: bool = False) -> str:
    """Return what would run, as text or as one JSON object."""
    preview = Preview(resolved)
    return json.dumps(_data(preview)) if as_json else "\n".join(_text(preview))


def _runs(names: Sequence[str]) -> Iterator[str]:
    """Shorten layer names: encoder.layers.0, encoder.layers.1 -> `encoder 0-1`."""
    start = 0
    for index, name in enumerate(names):
        kind, _, number = name.partition(".layers.")
        if index + 1 < len(names) and number and names[index + 1].startswith(f"{kind}.layers."):
            continue
        first = names[start].rpartition(".")[2]
        yield kind if not number else f"{kind} {number}" if first == number else f"{kind} {first}-{number}"
        start = index + 1


def _text(preview: Preview) -> Iterator[str]:
    yield "# configuration"
    yield redact(dump_config(preview.config))
    if preview.resolved.derived:
        yield "# derived (not given; each follows from what is)"
        yield from (f"- {one}" for one in preview.resolved.derived)
        yield ""
    yield "# DeepSpeed"
    yield json.dumps(redacted(preview.resolved.deepspeed.values), indent=2)
    yield ""
    yield from _layout_lines(preview)
    yield ""
    yield from _cost_lines(preview)
    yield ""
    yield "# preflight"
    yield from (f"- {finding}" for finding in preview.findings or ["nothing would keep it from starting here"])
    if preview.resolved.notices:
        yield ""
        yield "# notices"
        yield from (f"- {notice}" for notice in preview.resolved.notices)


def _layout_lines(preview: Preview) -> Iterator[str]:
    c, estimate = preview.candidate, preview.estimate
    yield "# layout"
    replicas = "1 replica" if c.data == 1 else f"{c.data} replicas"
    yield (
        f"TP {c.tensor} x PP {c.pipeline} x DP {c.data} = {c.world_size} ranks ({replicas}), {c.schedule}, "
        f"ZeRO-{c.zero_stage}, {estimate.micro_batches} micro-batches of {c.micro_batch} on each replica"
    )
    for stage in preview.stages:
        span = f"{stage.first}-{stage.last}" if stage.last > stage.first else str(stage.first)
        yield f"  pipeline rank {stage.rank:<3} layers {span:<8} {stage.layers:<36} {stage.parameters:>14,} parameters"


def _cost_lines(preview: Preview) -> Iterator[str]:
    config, estimate = preview.config, preview.estimate
    low, high = estimate.interval
    yield "# cost"
    yield f"{preview.parameters:,} parameters"
    yield (
        f"{accounting.training_flops_per_token(config) / 1e9:,.3f} GFLOPs per token, forward and backward; "
        f"{config.batch.global_batch_size * accounting.tokens_per_sample(config):,} tokens per step, "
        f"{preview.assumptions.tokens:,.0f} in {config.training.train_steps:,} steps"
    )
    if preview.here is not None:
        yield from forecast_lines(preview.here)
    if estimate.hardware.facts.is_cpu:
        yield "calculated, not measured; for other machines: megatron-omega plan"
    else:
        yield f"calculated for {preview.candidate.world_size} x {estimate.hardware.name} (others: megatron-omega plan):"
    yield (
        f"  step {estimate.step_seconds:.3g} s ({low:.3g} to {high:.3g}), {estimate.tokens_per_second:,.0f} tokens/s, "
        f"MFU {estimate.mfu:.1%}, bubble {estimate.bubble:.1%}"
    )
    yield from (f"  {line}" for line in report.memory_bars(estimate))
    if not estimate.fits:
        yield f"  this does not fit: {estimate.hardware.name} has {estimate.hardware.facts.memory_gib:g} GiB"


def _data(preview: Preview) -> dict[str, Any]:
    c = preview.candidate
    return {
        "config": redacted(preview.config.model_dump(mode="json")),
        "deepspeed": redacted(preview.resolved.deepspeed.values),
        "layout": {
            "tensor_parallel_size": c.tensor,
            "pipeline_parallel_size": c.pipeline,
            "data_parallel_size": c.data,
            "world_size": c.world_size,
            "zero_stage": c.zero_stage,
            "stages": [vars(stage) for stage in preview.stages],
        },
        "parameters": preview.parameters,
        "training_flops_per_token": accounting.training_flops_per_token(preview.config),
        "hardware": preview.estimate.hardware.name,
        "estimate": report.as_data(preview.estimate, preview.assumptions),
        "preflight": preview.findings,
        "notices": list(preview.resolved.notices),
        "derived": {one.name: one.reason for one in preview.resolved.derived},
    }
