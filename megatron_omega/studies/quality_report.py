"""What the measures of a study say: tables in Markdown, curves as a picture. Trains nothing."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any

import numpy as np

from megatron_omega.studies.held_out import paired
from megatron_omega.studies.quality import REFERENCES, measured

Rows = Sequence[Mapping[str, Any]]
BUDGETS = {"step": "steps", "tokens": "tokens", "labels": "labels", "cpu": "CPU-seconds"}
_COLUMNS = {
    "loss": "loss", "gain": "context gain", "loss_first": "first label", "mlm_loss": "MLM loss",
    "mlm_accuracy": "MLM accuracy", "bits_per_byte": "bits a byte", "clipped": "steps clipped", "cpu": "CPU-s",
}  # fmt: skip


def write_report(folder: Path) -> Path:
    """Write report.md and curves.png beside the measures; return the page's path."""
    rows = measured(folder)
    references = json.loads((folder / REFERENCES).read_text())
    best = best_rates(rows)
    chosen = [row for row in rows if row["rate"] == best[row["arm"]]]
    parts = [
        "## At the last step",
        last_table(chosen),
        "## Against the first arm",
        paired_table(chosen),
        "## Every rate",
        rates_table(rows),
        "Frequencies alone: " + ", ".join(f"{name} {value:.3f}" for name, value in references.items()) + ".",
    ]
    draw_curves(chosen, folder / "curves.png")
    page = folder / "report.md"
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def best_rates(rows: Rows) -> dict[str, float]:
    """Return for each arm the rate with the lowest mean loss at its last step."""
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    last = max(row["step"] for row in rows)
    for row in rows:
        if row["step"] == last:
            found[row["arm"]][row["rate"]].append(row["loss"])
    return {arm: min(rates, key=lambda rate: np.mean(rates[rate])) for arm, rates in found.items()}


def last_table(rows: Rows) -> str:
    """Return a line for each arm: means over seeds, and the standard deviation of the loss between them."""
    names = {name: title for name, title in _COLUMNS.items() if any(name in row for row in rows)}
    lines = [f"| arm | rate | seeds | parameters | {' | '.join(names.values())} |", "|---" * (len(names) + 4) + "|"]
    for arm, members in _by_arm(_last(rows)).items():
        cells = [_cell([row[name] for row in members if name in row], name) for name in names]
        head = f"{arm} | {members[0]['rate']:g} | {len(members)} | {members[0]['parameters']:,}"
        lines.append(f"| {head} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float], name: str) -> str:
    if not values:
        return ""
    mean = f"{np.mean(values):.0f}" if name == "cpu" else f"{np.mean(values):.3f}"
    return f"{mean} ± {np.std(values, ddof=1):.3f}" if name == "loss" and len(values) > 1 else mean


def paired_table(rows: Rows) -> str:
    """Return the paired difference of each arm's loss from the first arm's, at equal budgets of every kind.

    A budget ends where the shortest run has spent it.
    """
    arms = list(_by_arm(rows))
    ends = {budget: _common_end(rows, budget) for budget in BUDGETS}
    titles = " | ".join(f"{ends[budget]:,.0f} {title}" for budget, title in BUDGETS.items())
    lines = [f"| loss minus that of {arms[0]}, after | {titles} | context gain, difference |"]
    lines.append("|---" * (len(BUDGETS) + 2) + "|")
    for arm in arms[1:]:
        cells = [_difference(rows, arms[0], arm, budget, "loss", end) for budget, end in ends.items()]
        cells.append(_difference(rows, arms[0], arm, "step", "gain", ends["step"]))
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _common_end(rows: Rows, budget: str) -> float:
    """Return the budget that the shortest run of any arm has spent."""
    spent: dict[tuple[str, int], float] = defaultdict(float)
    for row in rows:
        key = row["arm"], row["seed"]
        spent[key] = max(spent[key], row[budget])
    return min(spent.values())


def _difference(rows: Rows, first: str, second: str, budget: str, value: str, end: float) -> str:
    first_ends, second_ends = (
        {seed: at_budget(points, end) for seed, points in curves_of(rows, arm, budget, value).items()}
        for arm in (first, second)
    )
    mean, error, count = paired(second_ends, first_ends)
    return f"{mean:+.3f} ± {error:.3f}" if count > 1 else f"{mean:+.3f} (one seed)"


def curves_of(rows: Rows, arm: str, budget: str, value: str) -> dict[int, list[tuple[float, float]]]:
    """Return for each seed of an arm the points (budget spent, value), ascending."""
    found: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if row["arm"] == arm:
            found[row["seed"]].append((row[budget], row[value]))
    return {seed: sorted(points) for seed, points in found.items()}


def at_budget(points: Sequence[tuple[float, float]], budget: float) -> float:
    """Return the value after `budget`, between two points along the logarithm of the budget."""
    spent, values = zip(*points, strict=True)
    return float(np.interp(log(budget), np.log(spent), values))


def rates_table(rows: Rows) -> str:
    """Return the mean loss of every arm at every rate, at the last step."""
    rates = sorted({row["rate"] for row in rows})
    lines = [f"| arm | {' | '.join(f'{rate:g}' for rate in rates)} |", "|---" * (len(rates) + 1) + "|"]
    for arm, members in _by_arm(_last(rows)).items():
        cells = ([row["loss"] for row in members if row["rate"] == rate] for rate in rates)
        lines.append(f"| {arm} | {' | '.join(f'{np.mean(cell):.3f}' if cell else '' for cell in cells)} |")
    return "\n".join(lines)


def draw_curves(rows: Rows, path: Path) -> None:
    """Draw the mean loss of each arm over steps, labels and CPU-seconds, with the range of its seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, budget in zip(axes, ("step", "labels", "cpu"), strict=True):
        for arm in _by_arm(rows):
            seeds = list(curves_of(rows, arm, budget, "loss").values())
            shared = min(len(points) for points in seeds)
            values = np.asarray([points[:shared] for points in seeds])  # [seeds, points, 2]
            x, y = values[:, :, 0].mean(axis=0), values[:, :, 1]
            (line,) = axis.plot(x, y.mean(axis=0), marker="o", label=arm)
            axis.fill_between(x, y.min(axis=0), y.max(axis=0), alpha=0.2, color=line.get_color())
        axis.set(xlabel=BUDGETS[budget], xscale="log")
    axes[0].set(ylabel="loss of held-out continuations, nats")
    axes[0].legend()
    figure.savefig(path, dpi=120)


def _last(rows: Rows) -> Rows:
    last = max(row["step"] for row in rows)
    return [row for row in rows if row["step"] == last]


def _by_arm(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["arm"]].append(row)
    return dict(found)
