"""Layouts to choose from: every combination that divides the machines, and for each that cannot run the reason."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, cast

from megatron_omega.config import check
from megatron_omega.config.layout import ranks_per_replica
from megatron_omega.config.schema import RunConfig
from megatron_omega.errors import ConfigError

Recompute = Literal["none", "swiglu", "ffn", "full"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "swiglu", "ffn", "full")
PipelineSchedule = Literal["1f1b", "interleaved", "dualpipev"]
SCHEDULES: tuple[tuple[PipelineSchedule, int], ...] = (
    ("1f1b", 1), ("dualpipev", 1), ("interleaved", 2), ("interleaved", 4), ("interleaved", 8),
)  # fmt: skip
"""Schedules that are tried, with the stages of each rank where that is a choice."""
MICRO_BATCHES = (1, 2, 4, 8)
"""Sizes that are tried if none are named."""
_LABEL = re.compile(
    r"tp(?P<tp>\d+)(?P<sp>sp)?-pp(?P<pp>\d+)(?:(?P<dual>v)|i(?P<chunks>\d+))?-dp(?P<dp>\d+)-mb(?P<mb>\d+)-(?P<recompute>\w+)-zero(?P<zero>[0-3])"
)


@dataclass(frozen=True)
class Candidate:
    """One way to run a configuration on a number of ranks."""

    tensor: int
    pipeline: int
    data: int
    sequence_parallel: bool = False
    schedule: PipelineSchedule = "1f1b"
    micro_batch: int = 1
    recompute: Recompute = "full"
    zero_stage: int = 1
    virtual_stages: int = 1
    """Stages of a rank where the schedule is interleaved."""

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def num_stages(self) -> int:
        """Pieces of the layer list."""
        return self.pipeline * (2 if self.schedule == "dualpipev" else self.virtual_stages)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Return the stages that pipeline rank `rank` holds."""
        if self.schedule == "dualpipev":
            return rank, 2 * self.pipeline - 1 - rank
        return tuple(range(rank, self.num_stages, self.pipeline))

    @property
    def label(self) -> str:
        """Name on the command line: tp2sp-pp16v-dp8-mb1-full-zero1 (sp: sequence-parallel; v: DualPipeV, i4:
        interleaved, 4 stages a rank)."""
        tensor = f"tp{self.tensor}{'sp' if self.sequence_parallel else ''}"
        schedule = {"1f1b": "", "dualpipev": "v", "interleaved": f"i{self.virtual_stages}"}[self.schedule]
        pipeline = f"pp{self.pipeline}{schedule}"
        return f"{tensor}-{pipeline}-dp{self.data}-mb{self.micro_batch}-{self.recompute}-zero{self.zero_stage}"

    def apply(self, config: RunConfig) -> RunConfig:
        """Return `config` with this layout; its explicit cuts stay where the pipeline is the configured one."""
        given = config.parallel
        configured = given.pipeline_parallel_size, given.pipeline_schedule, given.virtual_stages
        same_pipeline = configured == (self.pipeline, self.schedule, self.virtual_stages)
        parallel = config.parallel.model_copy(
            update={
                "tensor_parallel_size": self.tensor,
                "pipeline_parallel_size": self.pipeline,
                "sequence_parallel": self.sequence_parallel,
                "pipeline_schedule": self.schedule,
                "virtual_stages": self.virtual_stages,
                "recompute": self.recompute,
                "stage_boundaries": given.stage_boundaries if same_pipeline else None,
            }
        )
        batch = config.batch.model_copy(update={"micro_batch_size": self.micro_batch})
        return config.model_copy(update={"parallel": parallel, "batch": batch})


def parse_label(label: str) -> Candidate:
    """Return the candidate called `label`.

    Raises:
        ConfigError: it has another form.
    """
    match = _LABEL.fullmatch(label)
    if match is None or match["recompute"] not in RECOMPUTE:
        raise ConfigError(
            f"layout {label!r} has no known form; write it as tp2-pp16-dp8-mb1-full-zero1 "
            "(tp2sp: sequence-parallel, pp16v: DualPipeV, pp16i4: interleaved with 4 stages a rank)"
        )
    return Candidate(
        tensor=int(match["tp"]), pipeline=int(match["pp"]), data=int(match["dp"]),
        sequence_parallel=bool(match["sp"]), virtual_stages=int(match["chunks"] or 1),
        schedule="dualpipev" if match["dual"] else "interleaved" if match["chunks"] else "1f1b",
        micro_batch=int(match["mb"]), recompute=cast(Recompute, match["recompute"]), zero_stage=int(match["zero"]),
    )  # fmt: skip


def of_config(config: RunConfig, world_size: int, zero_stage: int) -> Candidate:
    """Return the layout that `config` itself asks for."""
    parallel = config.parallel
    return Candidate(
        parallel.tensor_parallel_size, parallel.pipeline_parallel_size, max(1, world_size // ranks_per_replica(config)),
        parallel.sequence_parallel, parallel.pipeline_schedule, config.batch.micro_batch_size, parallel.recompute,
        zero_stage, parallel.virtual_stages,
    )  # fmt: skip


def grids(world_size: int) -> Iterator[Candidate]:
    """Yield every grid tensor x pipeline x data of `world_size` ranks."""
    for tensor in check.divisors(world_size):
        for pipeline in check.divisors(world_size // tensor):
            yield Candidate(tensor, pipeline, world_size // (tensor * pipeline))


def variants(grid: Candidate, micro_batches: Sequence[int] = MICRO_BATCHES) -> Iterator[Candidate]:
    """Yield every schedule, ZeRO stage, sequence parallelism, micro-batch size and recompute mode of a grid."""
    schedules = SCHEDULES if grid.pipeline > 1 else SCHEDULES[:1]
    for (schedule, virtual_stages), zero_stage in product(schedules, range(4)):
        if schedule == "interleaved" and zero_stage != 1:
            continue  # like every pipeline; said once, of 1F1B
        for sequence_parallel in (False, True) if grid.tensor > 1 else (False,):
            for micro_batch, recompute in product(micro_batches, RECOMPUTE):
                yield replace(
                    grid, schedule=schedule, virtual_stages=virtual_stages, zero_stage=zero_stage,
                    sequence_parallel=sequence_parallel, micro_batch=micro_batch, recompute=recompute,
                )  # fmt: skip


def obstacle(config: RunConfig, candidate: Candidate) -> str | None:
    """Return why `candidate` cannot run `config`, in a sentence; None where it can."""
    if candidate.zero_stage == 0 and config.precision.dtype != "fp32":
        return f"zero_optimization.stage=0 with precision.dtype={config.precision.dtype} runs as stage 1"
    applied = candidate.apply(config)
    found = check.findings(applied, candidate.world_size, candidate.zero_stage, needs_corpus=False)
    return found[0] if found else None
