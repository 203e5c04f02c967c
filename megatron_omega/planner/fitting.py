"""A layout for fewer machines than a run was written for: the same model, data order and global batch."""

from __future__ import annotations

from megatron_omega.config.load import ResolvedRun
from megatron_omega.planner.candidates import Candidate, obstacle, of_config
from megatron_omega.planner.hardware import Hardware
from megatron_omega.planner.ranking import rank


def fitting_layout(resolved: ResolvedRun, world_size: int, hardware: Hardware) -> Candidate | None:
    """Return the layout to run on `world_size` ranks: the configured one if it fits, else the fastest; None: none does.

    The ZeRO stage stays: it is DeepSpeed's configuration that says it.
    """
    config, zero_stage = resolved.config, resolved.deepspeed.zero_stage
    own = of_config(config, world_size, zero_stage)
    if own.world_size == world_size and obstacle(config, own) is None:
        return own
    found = rank(config, hardware, world_size, _micro_batches(config.batch.micro_batch_size)).fitting
    return next((estimate.candidate for estimate in found if estimate.candidate.zero_stage == zero_stage), None)


def _micro_batches(largest: int) -> list[int]:
    return [size for size in range(1, largest + 1) if largest % size == 0]


def as_words(candidate: Candidate, configured: Candidate) -> list[str]:
    """Return the words of a command line that ask for a layout in place of the configured one."""
    settings = {
        "parallel.tensor_parallel_size": (candidate.tensor, configured.tensor),
        "parallel.pipeline_parallel_size": (candidate.pipeline, configured.pipeline),
        "parallel.sequence_parallel": (candidate.sequence_parallel, configured.sequence_parallel),
        "parallel.pipeline_schedule": (candidate.schedule, configured.schedule),
        "parallel.virtual_stages": (candidate.virtual_stages, configured.virtual_stages),
        "parallel.recompute": (candidate.recompute, configured.recompute),
        "batch.micro_batch_size": (candidate.micro_batch, configured.micro_batch),
    }
    words = [
        word for name, (value, was) in settings.items() if value != was for word in (f"--{name}", str(value).lower())
    ]
    same_cut = (candidate.pipeline, candidate.schedule, candidate.virtual_stages) == (
        configured.pipeline, configured.schedule, configured.virtual_stages,
    )  # fmt: skip
    return words if same_cut else [*words, "--parallel.stage_boundaries", "null"]
