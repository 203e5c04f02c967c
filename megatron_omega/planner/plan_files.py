"""A chosen plan as files a cluster can start: run.yaml, the DeepSpeed configuration, a Slurm script."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_omega.config.load import dump_config
from megatron_omega.errors import ConfigError
from megatron_omega.launching.scripts import Launch, slurm_script
from megatron_omega.planner.estimate import Estimate

BUCKET = 200_000_000
ZERO: Mapping[int, Mapping[str, Any]] = {
    0: {"stage": 0},
    1: {"stage": 1},
    2: {
        "stage": 2,
        "contiguous_gradients": True,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    },
    3: {
        "stage": 3,
        "contiguous_gradients": True,
        "overlap_comm": True,
        "reduce_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": 50_000_000,
        "stage3_param_persistence_threshold": 100_000,
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_max_reuse_distance": 1_000_000_000,
    },
}
"""The settings of ds_configs/, by stage."""


def write_plan(estimate: Estimate, directory: Path) -> list[Path]:
    """Write run.yaml, deepspeed.json and train.slurm into `directory`; return their paths.

    Raises:
        ConfigError: the folder cannot be made or written.
    """
    settings = json.dumps({"zero_optimization": ZERO[estimate.candidate.zero_stage]}, indent=2) + "\n"
    run, deepspeed, slurm = (directory / name for name in ("run.yaml", "deepspeed.json", "train.slurm"))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        run.write_text(dump_config(estimate.config), encoding="utf-8")
        deepspeed.write_text(settings, encoding="utf-8")
        slurm.write_text(_slurm(estimate, run, deepspeed, slurm), encoding="utf-8")
        slurm.chmod(0o755)
    except OSError as error:
        raise ConfigError(f"--write {directory} cannot be written: {error.strerror}; choose another folder") from None
    return [run, deepspeed, slurm]


def _slurm(estimate: Estimate, run: Path, deepspeed: Path, slurm: Path) -> str:
    per_node = min(estimate.hardware.facts.per_node, estimate.candidate.world_size)
    nodes = -(-estimate.candidate.world_size // per_node)
    where = f"{nodes} x {per_node} {estimate.hardware.name}"
    launch = Launch(
        ("--config", str(run), "--deepspeed_config", str(deepspeed)),
        nodes,
        per_node,
        command=f"megatron-omega plan; {estimate.candidate.label}: {estimate.step_seconds:.2f} s a step on {where}",
        options=("--exclusive",),
    )
    return slurm_script(launch, slurm, Path(estimate.config.logging.run_directory).name)
