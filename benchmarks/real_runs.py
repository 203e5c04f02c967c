#!/usr/bin/env python
"""The planner against real training steps on this machine: memory, messages, step time.

    python benchmarks/real_runs.py memory [--model tiny 300m] [--layout tp2-pp1-dp1-mb1-full-zero1 ...]
    python benchmarks/real_runs.py time [--hardware runs/hardware.yaml] [--rounds 3]

memory: every layout trains two steps in processes of its own. Measured is how much more memory of its own (pages of
files left out) a rank holds at its fullest than before it has an engine; all libraries are loaded by then, and the C
library is told to give back what is freed. The bytes that the second step handed to its process groups are counted,
too. Exit 1 where memory is further than 10% from the plan, or bytes differ at all. All 72 layouts of omega-tiny take
2.5 minutes, those of 300m half an hour.

time: steps of several layouts in turn, in every round after a calibration (what `tools/calibrate.py` does): the speed
of a shared machine drifts. Printed is the shortest step by the wall beside the whole plan, and the CPU-seconds of the
busiest rank (median) beside the plan without its waiting; of the rounds, the one whose error is in the middle. Exit 1
where a wall time is further than 20% from the plan, or Spearman's correlation of both orders is below 0.8. With
--hardware that file is what the plans are of. A round takes 80 seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product, repeat
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_omega.config.load import load_config
from megatron_omega.config.schema import BatchConfig, DataConfig, ModelConfig, PrecisionConfig, RunConfig
from megatron_omega.launching.local_ranks import run_ranks
from megatron_omega.planner.candidates import Candidate, obstacle, parse_label
from megatron_omega.planner.estimate import Estimate, Planner
from megatron_omega.planner.hardware import Hardware, find_hardware, read_hardware
from megatron_omega.planner.messages import step_bytes
from megatron_omega.studies.calibration import calibrate

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
SMALL_MESSAGE = 64
"""Bytes up to which an all-reduce is the engine's own: norms, losses, token counts."""
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Every tensor in a mapping of its own: what is freed leaves the process. By default the C library keeps a share of it,
in pieces, that differs from run to run."""
MICRO_BATCHES = 2
STEPS = 3
SENDS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "send": "send",
}
ON_ONE_HOST = {
    "allreduce": "allreduce_",
    "allgather": "allgather_",
    "all_gather_single": "_allgather_base_",
    "reduce_scatter_single": "_reduce_scatter_base_",
    "send": "send",
}
"""What groups of one host do by themselves, and torch's dispatcher does not see."""
GRIDS = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 2, 2), (1, 1, 2), (2, 1, 2))
"""Tensor x pipeline x data."""
LAYOUTS_OF_TWO = (
    "tp1-pp1-dp2-mb1-none-zero1",
    "tp1-pp1-dp2-mb1-full-zero1",
    "tp1-pp1-dp2-mb1-none-zero3",
    "tp2-pp1-dp1-mb1-none-zero1",
    "tp2-pp1-dp1-mb1-full-zero1",
    "tp2sp-pp1-dp1-mb1-none-zero1",
    "tp1-pp2-dp1-mb1-none-zero1",
    "tp1-pp2-dp1-mb1-full-zero1",
)


def tiny() -> RunConfig:
    """Return examples/omega-tiny."""
    return load_config(ROOT / "examples/omega-tiny/run.yaml")


def three_hundred_million() -> RunConfig:
    """Return an Omega of 300 million parameters in the card's proportions, with short sequences."""
    model = ModelConfig(
        hidden_size=512, ffn_hidden_size=8192, num_attention_heads=16, encoder_layers=9, decoder_layers=9,
        vocab_size=8192, local_window=32, axial_width=16,
    )  # fmt: skip
    data = DataConfig(encoder_seq_length=64, decoder_seq_length=64)
    return RunConfig(model=model, data=data, precision=PrecisionConfig(dtype="fp32"))


def medium() -> RunConfig:
    """Return an Omega whose steps take a core about a second: long enough to time, short enough to repeat."""
    model = ModelConfig(
        hidden_size=192, ffn_hidden_size=1536, num_attention_heads=8, encoder_layers=3, decoder_layers=3,
        vocab_size=4096, local_window=64, axial_width=16,
    )  # fmt: skip
    data = DataConfig(encoder_seq_length=256, decoder_seq_length=256)
    return RunConfig(model=model, data=data, precision=PrecisionConfig(dtype="fp32"))


MODELS = {"tiny": tiny, "300m": three_hundred_million}


def layouts(config: RunConfig, labels: list[str]) -> Iterator[Candidate]:
    """Yield the named layouts, or every legal one of `GRIDS` x ZeRO stage x recompute mode."""
    if labels:
        yield from map(parse_label, labels)
        return
    for (tensor, pipeline, data), stage, recompute in product(GRIDS, range(4), ("none", "swiglu", "ffn", "full")):
        candidate = Candidate(tensor, pipeline, data, recompute=recompute, zero_stage=stage)
        if obstacle(config, candidate) is None:
            yield candidate


def plan(config: RunConfig, candidate: Candidate, hardware: Hardware) -> Estimate:
    """Return the estimate of a layout, with `MICRO_BATCHES` micro-batches on each replica."""
    fewest = 2 * candidate.pipeline if candidate.schedule == "dualpipev" else MICRO_BATCHES
    batch = BatchConfig(global_batch_size=fewest * candidate.micro_batch * candidate.data)
    return Planner(config.model_copy(update={"batch": batch}), hardware).estimate(candidate, exact=True)


# ------------------------------------------------------------------------------------------------ inside a rank


def train_and_measure(config: RunConfig, stage: int) -> dict[str, Any]:
    """Train two steps on this rank; return the growth of its memory (bytes) and what the second step sent."""
    from megatron_omega.monitoring.forecast import peak_bytes

    warnings.filterwarnings("ignore", category=FutureWarning)
    before = peak_bytes()
    engine = _engine(config, stage)
    batches = _batches(config, masked=1.0)
    engine.train_step(batches, learning_rate=1e-3)
    with _watch_messages() as sent:
        engine.train_step(batches, learning_rate=1e-3)
    return {"grown": peak_bytes() - before, "sent": +sent}


def time_steps(config: RunConfig, stage: int, steps: int) -> dict[str, list[float]]:
    """Train; return CPU-seconds and wall seconds of every step of this rank but the first."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    engine, found = _engine(config, stage), []
    batches = _batches(config, masked=_masked_share(config))
    for _ in range(steps + 1):
        cpu, wall = time.process_time(), time.perf_counter()
        engine.train_step(batches, learning_rate=1e-3)
        found.append((time.process_time() - cpu, time.perf_counter() - wall))
    return {"cpu": [cpu for cpu, _ in found[1:]], "wall": [wall for _, wall in found[1:]]}


def _engine(config: RunConfig, stage: int) -> Any:
    from megatron_omega.config.deepspeed import resolve_deepspeed
    from megatron_omega.config.layout import layout_of
    from megatron_omega.engine.start import start_distributed
    from megatron_omega.parallel.topology import create_topology
    from megatron_omega.planner.plan_files import ZERO
    from megatron_omega.run.construction import build_engine

    start_distributed(local_rank=int(os.environ["LOCAL_RANK"]), timeout_seconds=600)
    layout = layout_of(config, int(os.environ["WORLD_SIZE"]))
    settings = resolve_deepspeed(config, {"zero_optimization": dict(ZERO[stage])}, layout.data)
    return build_engine(config, settings.values, create_topology(layout))


def _batches(config: RunConfig, *, masked: float) -> Iterator[Any]:
    """One made-up micro-batch for ever; a share of `masked` of the encoder's tokens has an MLM label."""
    import torch

    from megatron_omega.engine.results import MicroBatch

    rows, data = config.batch.micro_batch_size, config.data
    encoder, decoder = (
        torch.ones(rows, n, dtype=torch.int64) for n in (data.encoder_seq_length, data.decoder_seq_length)
    )
    labels = encoder.masked_fill(torch.arange(encoder.shape[1]) >= round(masked * encoder.shape[1]), -100)
    return repeat(MicroBatch((encoder, encoder, decoder, decoder), (decoder, labels)))


def _masked_share(config: RunConfig) -> float:
    objective = config.objective
    return (
        objective.mask_rate
        * objective.masked_prefix
        / (objective.prefix_lm + objective.span_corruption + objective.masked_prefix)
    )


def _watch_messages() -> Any:
    """Return a context that adds up what goes to process groups: bytes of full tensors by kind of call."""
    from unittest.mock import patch

    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_omega.parallel.shared_memory import SharedMemoryGroup

    class Sent(TorchDispatchMode):
        def __enter__(self) -> Counter[str]:
            self.sent: Counter[str] = Counter()
            methods = {method: getattr(SharedMemoryGroup, method) for method in ON_ONE_HOST}
            counted = {method: self.counted(ON_ONE_HOST[method], methods[method]) for method in methods}
            self.patch = patch.multiple(SharedMemoryGroup, **counted)
            self.patch.start()
            super().__enter__()
            return self.sent

        def __exit__(self, *error: Any) -> None:
            super().__exit__(*error)
            self.patch.stop()

        def counted(self, name: str, method: Any) -> Any:
            def call(group: Any, *arguments: Any) -> Any:
                self.count(name, arguments)
                return method(group, *arguments)

            return call

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            namespace, _, name = str(func._overloadpacket).partition(".")
            if namespace == "c10d" and name in SENDS:
                self.count(name, args)
            return func(*args, **(kwargs or {}))

        def count(self, name: str, arguments: Any) -> None:
            tensor = arguments[1] if name == "_reduce_scatter_base_" else arguments[0]
            while isinstance(tensor, list | tuple):
                tensor = tensor[0]
            size = tensor.numel() * tensor.element_size()
            if size > SMALL_MESSAGE or name != "allreduce_":
                self.sent[SENDS[name]] += size

    return Sent()


# ------------------------------------------------------------------------------------------------- the comparison


def compare_memory(arguments: argparse.Namespace) -> bool:
    """Run and print every layout; return whether all are within the tolerance."""
    hardware, agrees = find_hardware("cpu", file=read_hardware()), True
    for name in arguments.model:
        config = MODELS[name]()
        for candidate in layouts(config, arguments.layout):
            estimate = plan(config, candidate, hardware)
            ranks = run_ranks(train_and_measure, candidate.world_size, estimate.config, candidate.zero_stage)
            replica = candidate.data * candidate.tensor
            for stage in range(candidate.pipeline):  # the largest of the ranks that should be equal
                mine = ranks[stage * replica : (stage + 1) * replica]
                grown, planned = max(rank["grown"] for rank in mine), estimate.ranks[stage]
                error = planned.total / grown - 1
                parts = {part: round(value / MIB, 1) for part, value in planned._asdict().items()}
                row = {"model": name, "layout": candidate.label, "stage": stage, "measured": round(grown / MIB, 1)}
                row |= {"planned": round(planned.total / MIB, 1), "error": round(error, 3), "parts": parts}
                row |= _compare_sent(estimate, stage, mine[0]["sent"])
                agrees = agrees and abs(error) <= 0.10 and row["sent"] == "equal"
                print(json.dumps(row), flush=True)
    return agrees


def _compare_sent(estimate: Estimate, stage: int, sent: Counter[str]) -> dict[str, Any]:
    works = Planner(estimate.config, estimate.hardware).works(estimate.candidate)
    micro_batches = estimate.micro_batches
    planned = step_bytes(estimate.config, estimate.candidate, estimate.stages, works, stage, micro_batches)
    return {"sent": "equal" if planned == sent else "DIFFERENT", "planned_bytes": planned, "sent_bytes": sent}


def compare_time(arguments: argparse.Namespace) -> bool:
    """Time every layout in turn, several rounds, and print it beside the plan; return whether the plan holds."""
    candidates = [parse_label(label) for label in arguments.layout or LAYOUTS_OF_TWO]
    rounds = [_time_round(candidates, arguments.hardware) for _ in range(arguments.rounds)]
    typical: list[dict[str, Timed]] = []
    for index, candidate in enumerate(candidates):
        parts = {clock: _median_by_error([found[index][clock] for found in rounds]) for clock in ("CPU", "wall")}
        typical.append(parts)
        shown = "; ".join(
            f"{clock} {timed.measured:.3f} s, planned {timed.planned:.3f} ({timed.error:+.0%})"
            for clock, timed in parts.items()
        )
        print(f"{candidate.label:<32} {shown}")
    correlations = {
        clock: spearman([parts[clock].measured for parts in typical], [parts[clock].planned for parts in typical])
        for clock in ("CPU", "wall")
    }
    print("Spearman: " + ", ".join(f"{clock} {value:.2f}" for clock, value in correlations.items()))
    return correlations["wall"] >= 0.8 and max(abs(parts["wall"].error) for parts in typical) <= 0.2


class Timed(NamedTuple):
    """A step of one layout, in seconds."""

    measured: float
    planned: float

    @property
    def error(self) -> float:
        return self.planned / self.measured - 1


def _time_round(candidates: Sequence[Candidate], file: Path | None) -> list[dict[str, Timed]]:
    """Calibrate, unless there is a hardware file, and time each layout; return both clocks beside the plan."""
    hardware = find_hardware("cpu", file=read_hardware(file) if file else calibrate("cpu", "cpu", ranks=2))
    found = []
    for candidate in candidates:
        estimate = plan(medium(), candidate, hardware)
        ranks = run_ranks(time_steps, candidate.world_size, estimate.config, candidate.zero_stage, STEPS)
        cpu, wall = (
            [max(parts) for parts in zip(*(rank[clock] for rank in ranks), strict=True)] for clock in ("cpu", "wall")
        )
        working = estimate.step_seconds - estimate.breakdown.bubble
        found.append({"CPU": Timed(statistics.median(cpu), working), "wall": Timed(min(wall), estimate.step_seconds)})
    return found


def _median_by_error(rounds: list[Timed]) -> Timed:
    return sorted(rounds, key=lambda timed: timed.error)[len(rounds) // 2]


def spearman(first: list[float], second: list[float]) -> float:
    """Return the correlation of the ranks of two lists without ties."""
    ranks = [[sorted(values).index(value) for value in values] for values in (first, second)]
    return statistics.correlation(*ranks)


def main() -> None:
    """Run the comparison that was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("what", choices=("memory", "time"))
    parser.add_argument("--model", nargs="+", choices=tuple(MODELS), default=list(MODELS), help="of memory")
    parser.add_argument("--layout", nargs="+", default=[], help="default: every legal one (time: eight of two ranks)")
    parser.add_argument("--hardware", type=Path, help="of time: what tools/calibrate.py wrote (default: calibrate)")
    parser.add_argument("--rounds", type=int, default=3, help="of time")
    arguments = parser.parse_args()
    if arguments.what == "memory":
        os.environ |= ALLOCATOR
    sys.exit(not (compare_memory(arguments) if arguments.what == "memory" else compare_time(arguments)))


if __name__ == "__main__":
    main()
