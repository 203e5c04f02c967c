#!/usr/bin/env python
"""How much a step shortens when each of two ranks holds more stages: predicted on the virtual clock, then measured.

    python benchmarks/interleaving.py [--rounds 12] [--stages 1 2 4]

Two real ranks over gloo, one core each, as many micro-batches as ranks: where 1F1B idles most. All schedules are built
in the same two processes and take turns, so that they share whatever else the machine does. Printed first is what the
schedule alone predicts, from the FLOPs of each stage; and what it predicts on this machine, where a core takes longer
while its neighbour computes (measured before, on plain passes without any schedule): more stages a rank mean fewer
moments in which one computes alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from contextlib import redirect_stdout
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from megatron_omega import accounting
from megatron_omega.config.deepspeed import resolve_deepspeed
from megatron_omega.config.layout import layout_of
from megatron_omega.config.schema import RunConfig
from megatron_omega.engine.engine import Engine, MicroBatch
from megatron_omega.engine.start import start_distributed
from megatron_omega.launching.local_ranks import run_ranks
from megatron_omega.model.context import ModelContext
from megatron_omega.model.omega import Omega
from megatron_omega.parallel.topology import create_topology
from megatron_omega.planner.pipeline_schedule import execute, instructions
from megatron_omega.run.construction import build_engine, stage_boundaries

RANKS, MICRO_BATCHES, LENGTH = 2, 2, 512


def configuration(stages: int) -> RunConfig:
    """Return a decoder of 16 equal layers with a small vocabulary: nearly equal stages for every number of them."""
    schedule: dict[str, Any] = {"pipeline_schedule": "interleaved", "virtual_stages": stages} if stages > 1 else {}
    return RunConfig.model_validate(
        {
            "model": {
                "hidden_size": 256, "ffn_hidden_size": 1024, "num_attention_heads": 4, "encoder_layers": 0,
                "decoder_layers": 16, "vocab_size": 256, "decoder_branches": ["causal"], "mlm_head": False,
            },
            "data": {"encoder_seq_length": 0, "decoder_seq_length": LENGTH},
            "parallel": {"pipeline_parallel_size": RANKS, "recompute": "none", **schedule},
            "precision": {"dtype": "fp32"},
            "batch": {"micro_batch_size": 2, "global_batch_size": 2 * MICRO_BATCHES},
        }
    )  # fmt: skip


def predicted(stages: int, beside: float = 1.0) -> float:
    """Return the length of a step, in forward FLOPs of the whole model for one micro-batch.

    `beside`: how much longer a pass takes while the other rank computes too. That stretches the moments in which both
    do by one factor, and so changes no order.
    """
    config = configuration(stages)
    flops = [cost.forward_flops for cost in accounting.layer_costs(config)]
    edges = [0, *stage_boundaries(config), len(flops)]
    forward = [sum(flops[first:last]) / sum(flops) for first, last in pairwise(edges)]
    schedule = instructions("interleaved", RANKS, MICRO_BATCHES, stages)
    timeline = execute(schedule, forward, [2 * seconds for seconds in forward])
    alone = RANKS * timeline.makespan * timeline.idle_fraction  # one of two idles: the other computes
    return alone + beside * (timeline.makespan - alone)


def slowdown(rounds: int) -> float:
    """Return how much longer a rank's passes take while the other rank's run too than alone. Collective."""
    torch.set_num_threads(1)
    with redirect_stdout(sys.stderr):
        start_distributed(local_rank=int(os.environ["LOCAL_RANK"]), timeout_seconds=120)
        share = configuration(1).model.model_copy(update={"decoder_layers": 16 // RANKS})
        model = Omega(ModelContext(share, encoder_seq_length=0, decoder_seq_length=LENGTH))
        batch = next(_batches())
        labels = (*batch.labels, torch.tensor([1.0 / batch.num_tokens, 0.0]))
        ratios = []
        for turn in range(rounds + 1):
            seconds = {}
            for at_once in ([0], [1], [0, 1]):
                dist.barrier()
                if dist.get_rank() in at_once:
                    began = time.perf_counter()
                    for _ in range(MICRO_BATCHES):
                        model.heads(model.hidden(batch.inputs), labels).backward()
                    seconds[len(at_once)] = time.perf_counter() - began
            ratios += [seconds[2] / seconds[1]] if turn else []
    found = torch.tensor(statistics.median(ratios))
    dist.all_reduce(found)
    return found.item() / RANKS


def measured(rounds: int, stages: list[int]) -> dict[int, list[float]]:
    """Return the seconds of each step under each number of stages; on every rank alike. Collective."""
    torch.set_num_threads(1)
    with redirect_stdout(sys.stderr):
        start_distributed(local_rank=int(os.environ["LOCAL_RANK"]), timeout_seconds=120)
        engines = {number: _engine(number) for number in stages}
        seconds: dict[int, list[float]] = {number: [] for number in stages}
        for turn in range(rounds + 2):
            for number in stages[turn % len(stages) :] + stages[: turn % len(stages)]:
                dist.barrier()
                began = time.perf_counter()
                engines[number].train_step(_batches(), learning_rate=1e-4)
                seconds[number] += [time.perf_counter() - began] if turn >= 2 else []
    return seconds


def _engine(stages: int) -> Engine:
    config = configuration(stages)
    layout = layout_of(config, RANKS)
    settings = resolve_deepspeed(config, {"zero_optimization": {"stage": 1}}, layout.data)
    return build_engine(config, settings.values, create_topology(layout))


def _batches() -> Any:
    ids = torch.randint(0, 256, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    return repeat(MicroBatch((ids, torch.ones_like(ids)), (ids, torch.full_like(ids, -100)), ids.numel()))


def main() -> None:
    """Print the prediction, measure, and print both side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    beside = run_ranks(slowdown, RANKS, options.rounds, timeout_seconds=300)[0]
    first = options.stages[0]
    print(f"a pass takes {beside:.3f} times as long while the other rank computes", flush=True)
    expected = {number: predicted(number, beside) / predicted(first, beside) for number in options.stages}
    for number in options.stages:
        alone = predicted(number) / predicted(first)
        print(
            f"{number} stages a rank: predicted {expected[number]:.3f} of {first}'s step here; "
            f"{alone:.3f} by the schedule alone",
            flush=True,
        )
    seconds = run_ranks(measured, RANKS, options.rounds, options.stages, timeout_seconds=900)[0]
    for number, found in seconds.items():
        ratios = [mine / theirs for mine, theirs in zip(found, seconds[first], strict=True)]
        print(
            f"{number} stages a rank: measured {statistics.median(ratios):.3f} (predicted "
            f"{expected[number]:.3f}), {1000 * statistics.median(found):.0f} ms a step, best "
            f"{1000 * min(found):.0f}"
        )


if __name__ == "__main__":
    main()
