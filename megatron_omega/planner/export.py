"""A chosen plan as files a cluster can start: run.yaml, the DeepSpeed configuration, a Slurm script."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_omega.config.load import dump_config
from megatron_omega.errors import ConfigError
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

SLURM = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={per_node}
#SBATCH --gpus-per-node={per_node}
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%j.log

# {label}: {seconds:.2f} s a step predicted on {nodes} x {per_node} {hardware}.
# Start it in the repository: sbatch {path}
set -euo pipefail
export OMP_NUM_THREADS=8
export CUDA_DEVICE_MAX_CONNECTIONS=1

srun --kill-on-bad-exit=1 python pretrain_omega.py --config {config} --deepspeed_config {deepspeed} &
steps=$!
trap 'kill -USR1 "$steps" 2>/dev/null || true' USR1
code=0
wait "$steps" || code=$?
while kill -0 "$steps" 2>/dev/null; do wait "$steps" && code=0 || code=$?; done
[ "$code" -ne 75 ] || scontrol requeue "$SLURM_JOB_ID"  # stopped in time, checkpoint saved: continue later
exit "$code"
"""


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
    return SLURM.format(
        name=Path(estimate.config.logging.run_directory).name,
        nodes=-(-estimate.candidate.world_size // per_node),
        per_node=per_node,
        label=estimate.candidate.label,
        seconds=estimate.step_seconds,
        hardware=estimate.hardware.name,
        config=run,
        deepspeed=deepspeed,
        path=slurm,
    )
