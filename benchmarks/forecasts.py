#!/usr/bin/env python
"""Forecast beside measured, as runs themselves print it: the demo and four other small runs on this machine.

    benchmarks/forecasts.py                      # after a quick calibration; minutes
    benchmarks/forecasts.py demo "one rank"      # some of them, by name
    benchmarks/forecasts.py --prefix runs/demo/text_document --tokenizer runs/demo/tokenizer.model

Every run is started as a user starts it (`launch local`), and its last line is read: the median step and the peak
memory of rank 0 beside the forecast that it began with. Exit 1 where a time is further than 30% from the forecast or a
memory further than 20%. Nothing else should run meanwhile: the line says how much of the cores others took.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
TIME_LIMIT, MEMORY_LIMIT = 0.30, 0.20
LINE = re.compile(
    r"median step (\S+) s \(forecast (\S+), \S+\); peak memory of rank 0 (\S+) GiB \(forecast (\S+), \S+\)(.*)"
)


@dataclass(frozen=True)
class Run:
    """A small run: a preset, processes, and what is changed of it."""

    preset: str
    ranks: int
    settings: tuple[str, ...] = ()


def parallel(tensor: int = 1, pipeline: int = 1) -> tuple[str, ...]:
    return (f"--parallel.tensor_parallel_size={tensor}", f"--parallel.pipeline_parallel_size={pipeline}")


RUNS = {
    "demo": Run("omega-tiny", 8, parallel(2, 2)),
    "one rank": Run("omega-tiny", 1, parallel()),
    "two replicas": Run("t5-like", 2, parallel()),
    "two tensor ranks, decoder only": Run("llama-like", 2, parallel(2)),
    "two stages, twice as wide": Run(
        "omega-tiny", 2, (*parallel(1, 2), "--model.hidden_size=192", "--model.ffn_hidden_size=1536")
    ),
}


@dataclass(frozen=True)
class Comparison:
    """What a run took, and what it had forecast."""

    seconds: float
    forecast_seconds: float
    gib: float
    forecast_gib: float
    reason: str

    @property
    def time_gap(self) -> float:
        return self.seconds / self.forecast_seconds - 1

    @property
    def memory_gap(self) -> float:
        return self.gib / self.forecast_gib - 1

    @property
    def passes(self) -> bool:
        return abs(self.time_gap) <= TIME_LIMIT and abs(self.memory_gap) <= MEMORY_LIMIT


def start(run: Run, steps: int, corpus: tuple[str, ...], folder: Path) -> Comparison:
    """Start a run and return the comparison in its log. Raises RuntimeError with the log's end if there is none."""
    settings = (
        f"--training.train_steps={steps}", "--schedule.warmup_steps=1", "--evaluation.interval_steps=0",
        "--checkpoint.interval_steps=0", "--logging.tensorboard=false", "--logging.progress_bar=false",
        f"--logging.run_directory={folder}", *corpus, *run.settings,
    )  # fmt: skip
    command = [sys.executable, "-m", "megatron_omega", "launch", "local", "--ranks", str(run.ranks)]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--config", run.preset, *settings], capture_output=True, text=True, check=False, env=environ
    )
    found = LINE.search(done.stderr) or LINE.search(done.stdout)
    if found is None:
        raise RuntimeError(f"{run}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    *figures, reason = found.groups()
    return Comparison(*map(float, figures), reason.removeprefix(". ").strip())


def made_corpus(folder: Path) -> tuple[str, str]:
    """Make a little corpus in `folder`; return its prefix and its tokenizer."""
    from tiny import make_tiny_corpus  # pyright: ignore[reportMissingImports]

    corpus = make_tiny_corpus(folder)
    return str(corpus.prefix), str(corpus.tokenizer)


def main() -> int:
    """Return 0 where every run is as near to its forecast as it has to be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", choices=[[], *RUNS], help="which (default: all)")
    parser.add_argument("--steps", type=int, default=25, help="of each run (default 25)")
    parser.add_argument("--prefix", help="shard to read (default: a little one is made)")
    parser.add_argument("--tokenizer", help="of that shard")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        prefix, tokenizer = arguments.prefix, arguments.tokenizer
        if prefix is None:
            prefix, tokenizer = made_corpus(Path(folder))
        corpus = (
            f"--data.corpora=[{{prefix: {prefix}}}]", f"--data.tokenizer={tokenizer}",
            *(("--model.vocab_size=1000",) if arguments.prefix is None else ()),
        )  # fmt: skip
        print(f"{'run':<32} {'step':>8} {'forecast':>9} {'':>6} {'memory':>10} {'forecast':>9}")
        for number, name in enumerate(arguments.runs or RUNS):
            found = start(RUNS[name], arguments.steps, corpus, Path(folder) / f"run-{number}")
            failed += not found.passes
            print(
                f"{name:<32} {found.seconds:>6.3g} s {found.forecast_seconds:>7.3g} s {found.time_gap:>+6.0%} "
                f"{found.gib:>6.2f} GiB {found.forecast_gib:>5.2f} GiB {found.memory_gap:>+6.0%} "
                f"{'PASS' if found.passes else 'FAIL'} {found.reason}".rstrip(),
                flush=True,
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
