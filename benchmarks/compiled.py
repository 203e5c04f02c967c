#!/usr/bin/env python
"""Compiled layers of omega-tiny against eager ones: the same losses for 20 steps, and nothing compiled twice.

    python benchmarks/compiled.py [--config examples/omega-tiny/run.yaml] [--steps 20] [--json]

Both engines train in one process on the same made-up batches, in fp32. Compared is the largest relative difference of
losses and gradient norms; what torch compiles after two steps counts as again. A C++ compiler is needed, and a minute.
Exit 1 if losses differ by more than 1e-5, or if something was compiled again.

Every layout with compiled layers, which takes hours on two cores:

    megatron-omega verify-parallel --config examples/omega-tiny/run.yaml --training.compile layers
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from megatron_omega.config.deepspeed import resolve_deepspeed
from megatron_omega.config.layout import layout_of
from megatron_omega.config.load import load_config
from megatron_omega.engine.engine import Engine
from megatron_omega.engine.start import start_distributed
from megatron_omega.host.environment import complete_environment
from megatron_omega.model.compilation import Compilations
from megatron_omega.parallel.topology import create_topology
from megatron_omega.run.construction import build_engine
from megatron_omega.studies.made_up import replica_batches

TOLERANCE, WARM_UP = 1e-5, 2


def configuration(path: Path, mode: str) -> Any:
    """Return the configuration of one process in fp32, with `training.compile` as `mode` says."""
    return load_config(
        path,
        {
            "training.compile": mode,
            "precision.dtype": "fp32",
            "parallel.tensor_parallel_size": "1",
            "parallel.pipeline_parallel_size": "1",
            "parallel.sequence_parallel": "false",
            "batch.global_batch_size": "4",
            "batch.micro_batch_size": "2",
        },
    )


def engine_of(config: Any) -> Engine:
    settings = resolve_deepspeed(config, {"zero_optimization": {"stage": 1}}, 1)
    return build_engine(config, settings.values, create_topology(layout_of(config, 1)))


def trained(config: Any, steps: int) -> tuple[list[tuple[float, ...]], list[str], float]:
    """Return losses and norm of every step, what was compiled after the warm-up, and CPU-seconds of a later step."""
    engine, compilations, rows = engine_of(config), Compilations(), []
    batches, again, begin = replica_batches(config, engine), [], 0.0
    compilations.new()
    for number in range(steps):
        if number == WARM_UP:
            begin = time.process_time()
        result = engine.train_step(batches, learning_rate=1e-3)
        rows.append((result.loss, result.lm_loss, result.mlm_loss, result.grad_norm))
        made = compilations.new()
        again += made if number >= WARM_UP else []
    return rows, again, (time.process_time() - begin) / (steps - WARM_UP)


def difference(rows: list[tuple[float, ...]], others: list[tuple[float, ...]]) -> float:
    """Return the largest relative difference of any figure that is a number in both."""
    pairs = [pair for row, other in zip(rows, others, strict=True) for pair in zip(row, other, strict=True)]
    return max(abs(one - two) / abs(two) for one, two in pairs if not math.isnan(one) and not math.isnan(two))


def main() -> int:
    """Train both, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("examples/omega-tiny/run.yaml"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start_distributed(local_rank=complete_environment().local_rank, timeout_seconds=600)
    eager, _, eager_seconds = trained(configuration(options.config, "off"), options.steps)
    compiled, again, compiled_seconds = trained(configuration(options.config, "layers"), options.steps)
    found = {
        "difference": difference(compiled, eager),
        "compiled again": again,
        "CPU-seconds a step of eager": compiled_seconds / eager_seconds,
    }
    print(json.dumps(found) if options.json else "\n".join(f"{name}: {value}" for name, value in found.items()))
    return int(not found["difference"] <= TOLERANCE or bool(again))


if __name__ == "__main__":
    sys.exit(main())
