#!/usr/bin/env python
"""What two ranks cost over one: CPU-seconds of a step on the same samples, both ranks together, over one rank's.

One rank is measured as two trainings that know nothing of each other: cores share caches and memory, and work that has
a busy neighbour takes more CPU-seconds for that alone.

    python benchmarks/ranks.py [--rounds 8] [--layouts DP TP PP] [--json]

An encoder-decoder of 29.9 M parameters in fp32, 8 samples of 256 + 256 tokens a step, micro-batches of 2, one thread a
rank. Every layout has processes of its own, which take turns step by step, so that all share whatever else the machine
does; each round begins with another layout. Printed are the median seconds of a step and the median of the rounds'
ratios with their quartiles. Exit 1 where a ratio is beyond its goal: data parallel 1.03, tensor parallel 1.12, pipeline
parallel 1.03.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, redirect_stdout
from itertools import repeat
from multiprocessing.connection import Client, Connection, Listener
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
WARM_UP, TIMEOUT = 2, 3600
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


def take_turns(name: str, address: str) -> None:
    """Make a step whenever the benchmark asks for one, and say how many CPU-seconds it took. Collective."""
    parallel, zero_stage = LAYOUTS[name]
    torch.set_num_threads(1)
    with redirect_stdout(sys.stderr):
        start_distributed(local_rank=int(os.environ["LOCAL_RANK"]), timeout_seconds=TIMEOUT)
        config = configuration(parallel)
        layout = layout_of(config, int(os.environ["WORLD_SIZE"]))
        settings = resolve_deepspeed(config, {"zero_optimization": {"stage": zero_stage}}, layout.data)
        engine = build_engine(config, settings.values, create_topology(layout))
    ids = torch.randint(3, VOCABULARY, (MICRO_BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    ones, nothing = torch.ones_like(ids), torch.full_like(ids, -100)
    with Client(address) as benchmark:
        benchmark.send(name)
        while benchmark.recv():
            began = time.process_time()
            engine.train_step(repeat(MicroBatch((ids, ones, ids, ones), (ids, nothing))), learning_rate=1e-4)
            benchmark.send(time.process_time() - began)


def measure(names: list[str], rounds: int) -> dict[str, list[float]]:
    """Return the CPU-seconds of each round's step, both ranks together; of one rank, the mean of two at once."""
    worlds = [(ONE, 1), (ONE, 1), *((name, 2) for name in names)]
    with (
        Listener(family="AF_UNIX", backlog=2 * len(worlds)) as listener,
        ThreadPoolExecutor(len(worlds)) as pool,
        ExitStack() as connections,
    ):
        address = str(listener.address)
        runs = [
            pool.submit(run_ranks, take_turns, size, name, address, timeout_seconds=TIMEOUT) for name, size in worlds
        ]
        ranks: dict[str, list[Connection]] = {name: [] for name in (ONE, *names)}
        for _ in range(sum(size for _, size in worlds)):
            rank = connections.enter_context(listener.accept())
            ranks[rank.recv()].append(rank)
        seconds: dict[str, list[float]] = {name: [] for name in ranks}
        order = list(ranks)
        for turn in range(WARM_UP + rounds):
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                for rank in ranks[name]:
                    rank.send(True)
                found = sum(rank.recv() for rank in ranks[name]) / (2 if name == ONE else 1)
                seconds[name] += [found] if turn >= WARM_UP else []
        for rank in (rank for group in ranks.values() for rank in group):
            rank.send(False)
        for run in runs:
            run.result()
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--layouts", nargs="+", choices=[*LAYOUTS][1:], default=[*LAYOUTS][1:])
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args()
    seconds = measure(options.layouts, options.rounds)
    results = {}
    for name, found in seconds.items():
        ratios = [mine / one for mine, one in zip(found, seconds[ONE], strict=True)]
        middle, ratio = statistics.median(found), statistics.median(ratios)
        low, _, high = statistics.quantiles(ratios, n=4)
        results[name] = {"seconds": middle, "ratio": ratio, "quartiles": [low, high]}
        if not options.json:
            spread = f"{low:.3f} to {high:.3f}"
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
