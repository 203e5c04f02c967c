# ruff: noqa: E402, T201
"""Save under every layout, load under every other: prints the matrix; exit code 1 if a cell fails.

    python tests/checkpoint/reshape_matrix.py [--only fp32|bf16]

A cell is one resume: rows saved, columns loaded. It holds the largest relative difference of the next 5 losses from the
unbroken run of the row, on the same samples. "STATE" marks a cell whose state after loading (master weights, moments,
step counters, working weights) is not, bit for bit, the one that was saved; "FAR" one whose losses are out of tolerance:
1e-5 in fp32. In bf16 the losses of two layouts scatter about each other from the first step on, without any checkpoint;
a resume may not bring them farther apart than 1.5 times the farthest of those.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch
from launch import run_ranks
from scenarios import OFFLOAD, ROUND_ROBIN, Case, resume, start, state_on_disk, whole_state

STEPS_BEFORE, STEPS_AFTER = 3, 5
RATE = 2e-3
SAVED = f"step-{STEPS_BEFORE:08d}"
FP32 = [
    Case(1, 1, 1, zero=0, micro_batch=8, global_batch=24, learning_rate=RATE),
    Case(1, 2, 1, zero=0, micro_batch=4, global_batch=24, learning_rate=RATE),
    Case(1, 8, 1, zero=2, options=ROUND_ROBIN, micro_batch=3, global_batch=24, learning_rate=RATE),
    Case(1, 4, 2, zero=3, micro_batch=3, global_batch=24, learning_rate=RATE),
    Case(1, 2, 2, zero=1, sequence_parallel=True, micro_batch=4, global_batch=24, learning_rate=RATE),
    Case(
        2, 2, 2, zero=1, sequence_parallel=True, options=ROUND_ROBIN, micro_batch=3, global_batch=24, learning_rate=RATE
    ),
    Case(4, 2, 1, zero=1, micro_batch=3, global_batch=24, learning_rate=RATE),
    Case(2, 2, 2, zero=1, schedule="dualpipev", global_batch=24, learning_rate=RATE),
    Case(1, 3, 2, zero=3, options=OFFLOAD, micro_batch=4, global_batch=24, learning_rate=RATE),
    Case(1, 1, 3, zero=2, options=OFFLOAD, micro_batch=8, global_batch=24, learning_rate=RATE),
]
BF16 = [replace(case, dtype="bf16", zero=max(case.zero, 1)) for case in FP32[:1] + FP32[2:9]]  # bf16 has no stage 0
TOLERANCE = 1e-5
SCATTER = 1.5


@dataclass(frozen=True)
class Cell:
    """What came of one resume."""

    num_different_tensors: int
    largest_difference: float

    def text(self, tolerance: float) -> str:
        marks = ["STATE"] * (self.num_different_tensors > 0) + ["FAR"] * (not self.largest_difference <= tolerance)
        return " ".join([f"{self.largest_difference:.1e}", *marks])

    def passes(self, tolerance: float) -> bool:
        return self.num_different_tensors == 0 and self.largest_difference <= tolerance


def save_and_go_on(case: Case, directory: Path) -> list[float]:
    """Train, save, compare the disk with the engines, train on; return the losses after the save."""
    run = start(case)
    run.train(STEPS_BEFORE)
    store = run.store(directory)
    store.save(run.engine, run.state, step=STEPS_BEFORE)
    error = store.wait()
    assert error is None, error
    assert not different(directory, whole_state(run)), "the files do not hold what the engines held"
    return [loss for loss, _ in run.train(STEPS_AFTER)]


def different(directory: Path, state: dict[str, torch.Tensor]) -> list[str]:
    """Return what differs between a checkpoint and a gathered state; working weights are casts of the masters."""
    saved = state_on_disk(directory / SAVED)
    names = [key.removeprefix("working/") for key in state if key.startswith("working/")]
    wrong = [f"working/{name}" for name in names if not torch.equal(state[f"working/{name}"], cast(state, name))]
    return [*(key for key in saved if not torch.equal(saved[key], state[key])), *wrong]


def cast(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    master, working = state[f"weight/{name}"], state[f"working/{name}"]
    rounded = master.bfloat16().float()
    return rounded if torch.equal(working, rounded) else master


def resume_all(case: Case, directories: list[Path], unbroken: list[list[float]]) -> list[Cell]:
    """Resume each checkpoint under `case`."""
    cells = []
    for directory, losses in zip(directories, unbroken, strict=True):
        run = resume(case, directory)
        num_different = len(different(directory, whole_state(run)))
        found = [loss for loss, _ in run.train(STEPS_AFTER)]
        cells.append(Cell(num_different, difference(found, losses)))
    return cells


def difference(found: list[float], expected: list[float]) -> float:
    """Return the largest relative difference of a step."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def matrix(cases: list[Case], directory: Path) -> tuple[list[list[Cell]], float]:
    """Return rows of cells, saved under the row's layout, loaded under the column's; and how far unbroken runs differ."""
    folders = [directory / str(index) for index in range(len(cases))]
    unbroken = [
        run_ranks(case.size, save_and_go_on, case, folder, timeout=900)[0]
        for case, folder in zip(cases, folders, strict=True)
    ]
    columns = [run_ranks(case.size, resume_all, case, folders, unbroken, timeout=1800)[0] for case in cases]
    scatter = max(difference(a, b) for a, b in combinations(unbroken, 2))
    return [list(row) for row in zip(*columns, strict=True)], scatter


def show(cases: list[Case], rows: list[list[Cell]], tolerance: float) -> None:
    for number, case in enumerate(cases, start=1):
        print(f"{number:3} {case.label}")
    width = max(len(cell.text(tolerance)) for row in rows for cell in row) + 2
    print("\nsaved \\ loaded " + "".join(str(number).rjust(width) for number in range(1, len(cases) + 1)))
    for number, row in enumerate(rows, start=1):
        print(f"{number:14} " + "".join(cell.text(tolerance).rjust(width) for cell in row))
    passed = sum(cell.passes(tolerance) for row in rows for cell in row)
    print(
        f"\n{passed} of {len(rows) ** 2} cells: state bitwise, next {STEPS_AFTER} losses within {tolerance:.1e}\n",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("fp32", "bf16"))
    options = parser.parse_args()
    good = True
    for dtype, cases in (("fp32", FP32), ("bf16", BF16)):
        if options.only in (None, dtype):
            begin = time.monotonic()
            with tempfile.TemporaryDirectory() as directory:
                rows, scatter = matrix(cases, Path(directory))
            print(f"unbroken runs of two layouts differ by {scatter:.1e} at most\n")
            tolerance = TOLERANCE if dtype == "fp32" else SCATTER * scatter
            show(cases, rows, tolerance)
            print(f"{dtype}: {time.monotonic() - begin:.0f} s\n", flush=True)
            good &= all(cell.passes(tolerance) for row in rows for cell in row)
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
