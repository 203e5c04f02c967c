"""Plans as text: a table of layouts, memory as bars, a schedule as a Gantt chart, one layout explained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from megatron_omega import accounting
from megatron_omega.config.schema import RunConfig
from megatron_omega.planner.activations import FP32
from megatron_omega.planner.estimate import Estimate, Planner
from megatron_omega.planner.hardware import GIB, Hardware
from megatron_omega.planner.memory import Memory
from megatron_omega.planner.messages import data_bytes, tied_ranks
from megatron_omega.planner.operations import Assumptions, Operations, operations, starting, starting_line
from megatron_omega.planner.pipeline_schedule import Timeline
from megatron_omega.planner.ranking import Ranking
from megatron_omega.planner.stages import Stage
from megatron_omega.planner.work import pipeline_messages, table_parameters

MEMORY_SIGNS = {
    "weights": "W",
    "gradients": "G",
    "optimizer": "O",
    "activations": "a",
    "working": "w",
    "buffers": "b",
    "runtime": "r",
}


def headline(config: RunConfig, hardware: Hardware, world_size: int) -> Iterator[str]:
    """Yield what is planned."""
    parameters = sum(cost.parameters for cost in accounting.layer_costs(config))
    flops = accounting.training_flops_per_sample(config)
    lengths = f"{config.data.encoder_seq_length:,} + {config.data.decoder_seq_length:,} tokens"
    yield f"{parameters:,} parameters, {flops / 1e12:.2f} TFLOPs per sample of {lengths} (forward and backward)"
    machine = f"{hardware.name} ({hardware.facts.memory_gib:g} GiB), {hardware.network_name}"
    yield f"{world_size:,} x {machine}, {config.precision.dtype}"
    samples = config.batch.global_batch_size
    yield f"global batch {samples:,} samples = {samples * accounting.tokens_per_sample(config):,} tokens"


def table(estimates: Sequence[Estimate], *, first: int = 1) -> Iterator[str]:
    """Yield a row for each layout."""
    yield f"{'':>4} {'layout':<34} {'step s':>15} {'tokens/s':>11} {'MFU':>6} {'bubble':>7} {'GiB':>6}"
    for place, estimate in enumerate(estimates, start=first):
        low, high = estimate.interval
        seconds = f"{estimate.step_seconds:.2f} ({low:.2f}-{high:.2f})"
        yield (
            f"{place:>4} {estimate.candidate.label:<34} {seconds:>15} {estimate.tokens_per_second:>11,.0f} "
            f"{estimate.mfu:>6.1%} {estimate.bubble:>7.1%} {estimate.peak_memory / GIB:>6.1f}"
        )


def refusals(ranking: Ranking) -> Iterator[str]:
    """Yield why the other layouts are not in the table."""
    if ranking.too_large:
        nearest = ranking.too_large[0]
        yield (
            f"{len(ranking.too_large):>6} need more memory than there is; the nearest, {nearest.candidate.label}, "
            f"{nearest.peak_memory / GIB:.1f} GiB"
        )
    for refusal in sorted(ranking.refused.values(), key=lambda refusal: -refusal.count):
        yield f"{refusal.count:>6} such as {refusal.example}: {refusal.reason}"


def memory_bars(estimate: Estimate, *, width: int = 60) -> Iterator[str]:
    """Yield a bar for each distinct pipeline rank; a full bar is the accelerator's memory."""
    scale = width / max(estimate.hardware.memory_bytes, estimate.peak_memory)
    for ranks, memory in _distinct(estimate.ranks):
        bar, drawn, total = "", 0, 0.0
        for name, sign in MEMORY_SIGNS.items():
            total += getattr(memory, name) * scale
            bar += sign * (round(total) - drawn)
            drawn = round(total)
        yield f"rank {ranks:<9} |{bar:<{width}}| {memory.total / GIB:6.1f} GiB"
    yield "  ".join(f"{sign} {name}" for name, sign in MEMORY_SIGNS.items())


def _distinct(memories: Sequence[Memory]) -> Iterator[tuple[str, Memory]]:
    """Yield runs of ranks whose memory is the same to a percent, as "3" or "3-7"."""
    start = 0
    for index in range(1, len(memories) + 1):
        if index < len(memories) and abs(memories[index].total - memories[start].total) <= 0.01 * memories[start].total:
            continue
        yield (str(start) if index - 1 == start else f"{start}-{index - 1}"), memories[start]
        start = index


def gantt(timeline: Timeline, *, width: int = 100, ranks: int = 16) -> Iterator[str]:
    """Yield a line for each rank: digits go forward (last digit of the micro-batch), letters backward, dots wait."""
    for index, intervals in enumerate(timeline.ranks[:ranks]):
        line = ["."] * width
        for task, start, end in intervals:
            first = int(start / timeline.makespan * width)
            last = max(first + 1, int(end / timeline.makespan * width))
            sign = str(task.micro_batch % 10) if task.direction == "F" else "abcdefghij"[task.micro_batch % 10]
            line[first:last] = [sign] * len(line[first:last])
        yield f"{index:>4} {''.join(line)}"
    if len(timeline.ranks) > ranks:
        yield f"     ... and {len(timeline.ranks) - ranks} more ranks"
    yield f"     {timeline.makespan:.3f} s, {timeline.idle_fraction:.1%} idle; 0-9 forward, a-j backward, . waiting"


def explain(estimate: Estimate, planner: Planner, assumptions: Assumptions) -> Iterator[str]:
    """Yield one layout in detail: time, stages, messages, memory, and what the whole run takes."""
    c, b = estimate.candidate, estimate.breakdown
    low, high = estimate.interval
    yield f"{c.label}: {estimate.micro_batches} micro-batches of {c.micro_batch} on each of {c.data} replicas"
    yield f"step {estimate.step_seconds:.3f} s (between {low:.3f} and {high:.3f}), MFU {estimate.mfu:.1%}"
    for name, seconds in (
        ("kernels", b.compute), ("tensor-parallel messages", b.tensor_communication), ("pipeline", b.bubble),
        ("data-parallel messages", b.data_communication), ("optimizer", b.optimizer),
    ):  # fmt: skip
        yield f"  {name:<26} {seconds:8.3f} s {seconds / estimate.step_seconds:6.1%}"
    yield f"  {estimate.launches:,} kernel launches on the busiest rank"
    works = planner.works(c)
    yield ""
    yield "stages (per micro-batch and rank)"
    previous = None
    for index, (stage, seconds) in enumerate(zip(estimate.stages, estimate.seconds, strict=True)):
        if stage.signature != previous or index == len(estimate.stages) - 1:
            millions = stage.parameters(estimate.config, works) / 1e6
            yield (
                f"  {index:>3} {stage.describe():<44} {millions:8.1f} M parameters "
                f"{stage.total_flops(works) / 1e12:7.2f} TFLOPs  "
                f"{1e3 * seconds.forward:7.2f} + {1e3 * seconds.backward:7.2f} ms"
            )
        previous = stage.signature
    yield ""
    yield "messages of each rank in a step"
    yield from (f"  {line}" for line in (*_message_lines(estimate, planner), *_data_message_lines(estimate, planner)))
    yield ""
    yield from memory_bars(estimate)
    yield ""
    yield from operation_lines(operations(estimate, assumptions), assumptions)
    yield starting_line(starting(estimate, planner))


def _message_lines(estimate: Estimate, planner: Planner) -> Iterator[str]:
    c, works = estimate.candidate, planner.works(estimate.candidate)
    rank = c.pipeline // 2
    tensor = sum(
        (estimate.stages[s].messages(estimate.config, works) for s in c.stages_of(rank)),
        start=type(estimate.stages[0].messages(estimate.config, works))(),
    )
    for message, count in sorted(tensor.items(), key=lambda item: -item[0].num_bytes * item[1]):
        total = count * estimate.micro_batches
        yield f"tensor    {message.kind:<15} {total:>9,} x {message.num_bytes / 2**20:9.3f} MiB (rank {rank})"
    for index, stage in enumerate(estimate.stages[:-1]):
        ends = _ends(stage, estimate.stages[index + 1])
        if index and _ends(estimate.stages[index - 1], stage) == ends:
            continue
        forward, backward = pipeline_messages(estimate.config, *ends)
        yield (
            f"pipeline  {ends[0]} to {ends[1]}: {len(forward)} tensors, {sum(forward) / 2**20:.3f} MiB forward, "
            f"{sum(backward) / 2**20:.3f} MiB back, {estimate.micro_batches} times"
        )


def _ends(before: Stage, after: Stage) -> tuple[str, str]:
    """Return the stacks of the layers on both sides of a cut."""
    return accounting.stack_of(before.kinds[-1]), accounting.stack_of(after.kinds[0])


def _data_message_lines(estimate: Estimate, planner: Planner) -> Iterator[str]:
    """Yield what replicas exchange in a step, and the tied table's gradient."""
    c, works = estimate.candidate, planner.works(estimate.candidate)
    rank = c.pipeline // 2
    stages = [estimate.stages[index] for index in c.stages_of(rank)]
    table = table_parameters(estimate.config) if any(stage.has_table for stage in stages) else 0
    parameters = table + sum(stage.parameters(estimate.config, works) for stage in stages)
    if c.data > 1:
        for kind, sent in data_bytes(estimate.config, c, parameters, estimate.micro_batches).items():
            what = "weights" if kind == "all_gather" else "gradients"
            yield f"data      {kind:<15} {sent / 2**20:9.1f} MiB of {what} (rank {rank})"
    tied = tied_ranks(c, estimate.stages)
    if len(tied) > 1:
        ranks = ", ".join(map(str, tied))
        mebibytes = table_parameters(estimate.config) * FP32 / 2**20
        yield f"tied      all_reduce      {mebibytes:9.1f} MiB: the token table's gradient, between ranks {ranks}"


def operation_lines(run: Operations, assumptions: Assumptions) -> Iterator[str]:
    """Yield what the whole run takes."""
    yield (
        f"{assumptions.tokens / 1e9:,.4g} billion tokens: {run.steps:,} steps, {run.days:,.1f} days, "
        f"{run.megawatt_hours:,.3g} MWh"
    )
    yield (
        f"checkpoint {run.checkpoint_bytes / 1e9:,.1f} GB: {run.checkpoint_seconds:.3g} s to write, "
        f"{run.stall_seconds:.2g} s stall"
    )
    if run.failures:
        often = f"{run.checkpoint_interval_seconds / 60:,.3g} minutes ({run.checkpoint_interval_steps:,} steps)"
        yield (
            f"{run.failures:.2g} failures expected: save every {often}; goodput {run.goodput:.2%} "
            f"(saving {run.saving:.2%}, lost work {run.lost_work:.2%}, restarts {run.restarting:.2%})"
        )
    else:
        yield f"no failures expected: goodput {run.goodput:.2%}"


def as_data(estimate: Estimate, assumptions: Assumptions) -> dict[str, Any]:
    """Return one estimate as plain data for --json."""
    c, run = estimate.candidate, operations(estimate, assumptions)
    low, high = estimate.interval
    return {
        "layout": c.label,
        "tensor_parallel_size": c.tensor,
        "pipeline_parallel_size": c.pipeline,
        "data_parallel_size": c.data,
        "sequence_parallel": c.sequence_parallel,
        "pipeline_schedule": c.schedule,
        "virtual_stages": c.virtual_stages,
        "micro_batch_size": c.micro_batch,
        "micro_batches": estimate.micro_batches,
        "recompute": c.recompute,
        "zero_stage": c.zero_stage,
        "step_seconds": estimate.step_seconds,
        "step_seconds_low": low,
        "step_seconds_high": high,
        "tokens_per_second": estimate.tokens_per_second,
        "mfu": estimate.mfu,
        "bubble": estimate.bubble,
        "peak_memory_bytes": estimate.peak_memory,
        "fits": estimate.fits,
        "kernel_launches": estimate.launches,
        "stage_boundaries": [stage.first for stage in estimate.stages[1:]],
        "memory": [rank._asdict() for rank in estimate.ranks],
        "breakdown_seconds": {
            field.name: getattr(estimate.breakdown, field.name) for field in fields(estimate.breakdown)
        },
        "run": {field.name: _finite(getattr(run, field.name)) for field in fields(run)},
    }


def _finite(value: float) -> float | None:
    """Return `value`, or None for what JSON has no word for: a run that never ends, a save that is never due."""
    return value if math.isfinite(value) else None
