#!/usr/bin/env python
"""What two ranks cost over one: CPU-seconds of a step on the same samples, both ranks together, over one rank's.

One rank is measured as two trainings that know nothing of each other: cores share caches and memory, and work that has
a busy neighbour takes more CPU-seconds for that alone.

    python benchmarks/ranks.py [--rounds 5] [--layouts DP TP PP] [--json]

An encoder-decoder of 29.9 M parameters in fp32, 8 samples of 256 + 256 tokens a step, micro-batches of 2, over gloo,
one thread a rank. Each round runs every layout, one after the other, in processes of its own; printed are the median
seconds of a step and the median of the rounds' ratios with their range. Exit 1 where a ratio is beyond its goal: data
parallel 1.03, tensor parallel 1.12, pipeline parallel 1.03.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from itertools import repeat
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from megatron_omega.config.deepspeed import resolve_deepspeed
from megatron_omega.config.layout import layout_of
from megatron_omega.config.schema import RunConfig
from megatron_omega.engine.results import MicroBatch
from megatron_omega.engine.start import start_distributed
from megatron_omega.launching.local_ranks import run_ranks
from megatron_omega.parallel.topology import create_topology
from megatron_omega.run.construction import build_engine

LENGTH, MICRO_BATCH, GLOBAL_BATCH, VOCABULARY = 256, 2, 8, 8192
WARM_UP, STEPS = 2, 3
ONE = "one rank"
LAYOUTS: dict[str, tuple[dict[str, Any], int]] = {
    ONE: ({}, 1),
    "DP": ({}, 1),
    "DP, ZeRO-0": ({}, 0),
    "TP": ({"tensor_parallel_size": 2}, 1),
    "TP + SP": ({"tensor_parallel_size": 2, "sequence_parallel": True}, 1),
    "PP": ({"pipeline_parallel_size": 2}, 1),
}
"""Settings of `parallel` and the ZeRO stage; two ranks all but the first."""
GOALS = {"DP": 1.03, "TP": 1.12, "PP": 1.03}


def configuration(parallel: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {
                "hidden_size": 384, "ffn_hidden_size": 1536, "num_attention_heads": 6, "encoder_layers": 5,
                "decoder_layers": 5, "vocab_size": VOCABULARY, "encoder_branches": ["full"],
                "decoder_branches": ["causal"], "mlm_head": False,
            },
            "data": {"encoder_seq_length": LENGTH, "decoder_seq_length": LENGTH},
            "parallel": {"recompute": "none", **parallel},
            "precision": {"dtype": "fp32"},
            "batch": {"micro_batch_size": MICRO_BATCH, "global_batch_size": GLOBAL_BATCH},
        }
    )  # fmt: skip


def step_seconds(name: str) -> float:
    """Return this rank's CPU-seconds of a step. Collective."""
    parallel, zero_stage = LAYOUTS[name]
    torch.set_num_threads(1)
    with redirect_stdout(sys.stderr):
        start_distributed(local_rank=int(os.environ["LOCAL_RANK"]), timeout_seconds=300)
        config = configuration(parallel)
        layout = layout_of(config, int(os.environ["WORLD_SIZE"]))
        settings = resolve_deepspeed(config, {"zero_optimization": {"stage": zero_stage}}, layout.data)
        engine = build_engine(config, settings.values, create_topology(layout))
    ids = torch.randint(3, VOCABULARY, (MICRO_BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    ones, nothing = torch.ones_like(ids), torch.full_like(ids, -100)
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            began = time.process_time()
        engine.train_step(repeat(MicroBatch((ids, ones, ids, ones), (ids, nothing))), learning_rate=1e-4)
    return (time.process_time() - began) / STEPS


def both_ranks(name: str) -> float:
    """Return the CPU-seconds of a step, both ranks together; of one rank, the mean of two at the same time."""
    if name != ONE:
        return sum(run_ranks(step_seconds, 2, name, timeout_seconds=300))
    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(lambda _: run_ranks(step_seconds, 1, name, timeout_seconds=300)[0], range(2))) / 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layouts", nargs="+", choices=[*LAYOUTS][1:], default=[*LAYOUTS][1:])
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in (ONE, *options.layouts)}
    for _ in range(options.rounds):
        for name, found in seconds.items():
            found.append(both_ranks(name))
    results = {}
    for name, found in seconds.items():
        ratios = [mine / one for mine, one in zip(found, seconds[ONE], strict=True)]
        middle, ratio = statistics.median(found), statistics.median(ratios)
        results[name] = {"seconds": middle, "ratio": ratio, "range": [min(ratios), max(ratios)]}
        if not options.json:
            spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
            print(f"{name:10} {middle:.3f} CPU-seconds, {ratio:.3f} of one rank ({spread})", flush=True)
    missed = [name for name, goal in GOALS.items() if name in results and results[name]["ratio"] > goal]
    print(
        json.dumps(results | {"missed": missed})
        if options.json
        else f"beyond their goals: {', '.join(missed) or 'none'}"
    )
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
