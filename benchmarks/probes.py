#!/usr/bin/env python
"""Steps until small models solve small tasks, for Omega and for a T5-like of as many parameters; and for each branch.

    python benchmarks/probes.py [--steps 1500] [--seeds 3] [--tasks copy,reverse] [--json]

Budgets are equal: batch (32), rate (3e-3, of recall 1e-3), steps, width and layers. "-" means not solved within the
steps. Accuracy is over the last ten batches, none of which was seen before. A recall of more than 64 tokens begins with
the shorter ones; its steps are those of all of them, and in brackets stands where each was solved.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from megatron_omega.accounting import parameter_count
from megatron_omega.config.schema import ModelConfig
from megatron_omega.host.allocator import keep_freed_memory
from megatron_omega.studies.probes import Task, behind, copy, count, far, induction, omega, recall, t5_like, train

TASKS = [
    copy(16), copy(16, backwards=True), recall(1024), count(24), induction(16),
]  # fmt: skip
ANYWHERE = far(48, anywhere=True)
BRANCHES: list[tuple[Task, int, list[list[str]]]] = [
    (behind(48), 2, [["local"], ["axial"]]),
    (far(64), 2, [["axial", "local"], ["local"], ["axial"]]),
    (ANYWHERE, 1, [["causal"], ["select"], ["axial", "local"]]),
]


def measure(name: str, task: Task, model: ModelConfig, steps: int, seeds: int) -> dict[str, Any]:
    """Train once for each seed; return a row of the table."""
    begin = time.process_time()
    outcomes = [train(task, model, steps=steps, seed=seed) for seed in range(seeds)]
    solved = [outcome.steps for outcome in outcomes]
    return {
        "task": task.name, "model": name, "parameters": parameter_count(model), "steps": solved,
        "stages": [outcome.solved for outcome in outcomes],
        "accuracy": statistics.mean(outcome.accuracy for outcome in outcomes),
        "cpu_seconds": time.process_time() - begin,
    }  # fmt: skip


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure what is asked, and print each row when it is there."""
    wanted = set(options.tasks.split(",")) if options.tasks else None
    cases = [(name, task, model(task)) for task in TASKS for name, model in (("Omega", omega), ("T5-like", t5_like))]
    cases += [
        (" + ".join(branches), task, omega(task, width=32, layers=layers, decoder_branches=branches))
        for task, layers, lists in BRANCHES
        for branches in lists
    ]
    found = []
    for name, task, model in cases:
        if wanted is None or task.name in wanted:
            found.append(measure(name, task, model, options.steps, options.seeds))
            if not options.json:
                _show(found[-1])
    return found


def _show(row: dict[str, Any]) -> None:
    steps = " ".join("-" if step is None else str(step) for step in row["steps"])
    between = [", ".join(f"{name} {step}" for name, step in stages.items()) for stages in row["stages"]]
    if any("," in stages for stages in between):
        steps += f" ({'; '.join(between)})"
    print(
        f"{row['task']:<14} {row['model']:<16} {row['parameters']:>9,} parameters   steps to 90%: {steps:<16} "
        f"accuracy {row['accuracy']:.2f}   {row['cpu_seconds']:.0f} CPU-s",
        flush=True,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500, help="budget of each training (default: 1500)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each (default: 3)")
    parser.add_argument("--tasks", default="", help="names, separated by commas (default: all)")
    parser.add_argument("--json", action="store_true", help="print data")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    found = rows(options)
    if options.json:
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
