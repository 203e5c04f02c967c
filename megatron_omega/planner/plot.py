"""A plan as a picture: the schedule of one step and the memory of every rank. The only module that needs matplotlib."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_omega.planner.estimate import Estimate
from megatron_omega.planner.hardware import GIB
from megatron_omega.planner.memory import Memory

COLOURS = {"F": "#4c78a8", "B": "#f58518"}


def plot(estimate: Estimate, path: Path) -> None:
    """Draw `estimate` into a .png or .html file."""
    figure = Figure(figsize=(14, 8), layout="constrained")
    above, below = figure.subplots(2, 1)
    _draw_schedule(above, estimate)
    _draw_memory(figure, below, estimate)
    if path.suffix == ".png":
        figure.savefig(path, dpi=110)
        return
    drawing = io.StringIO()
    figure.savefig(drawing, format="svg")
    svg = drawing.getvalue()
    title = estimate.candidate.label
    page = f"<!doctype html><meta charset=utf-8><title>{title}</title>{svg[svg.index('<svg') :]}"
    path.write_text(page, encoding="utf-8")


def _draw_schedule(axes: Axes, estimate: Estimate) -> None:
    timeline = estimate.timeline
    for rank, intervals in enumerate(timeline.ranks):
        for direction, colour in COLOURS.items():
            bars = [(start, end - start) for task, start, end in intervals if task.direction == direction]
            axes.broken_barh(bars, (rank - 0.4, 0.8), facecolors=colour, edgecolor="white", linewidth=0.3)
    axes.invert_yaxis()
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="seconds", ylabel="pipeline rank")
    axes.set_title(
        f"{estimate.candidate.label}: one step, {timeline.idle_fraction:.1%} idle (blue forward, orange backward)"
    )


def _draw_memory(figure: Figure, axes: Axes, estimate: Estimate) -> None:
    ranks = range(len(estimate.ranks))
    bottom = [0.0 for _ in ranks]
    for name in Memory._fields:
        heights = [getattr(memory, name) / GIB for memory in estimate.ranks]
        axes.bar(ranks, heights, bottom=bottom, label=name)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.axhline(estimate.hardware.facts.memory_gib, color="black", linestyle="--", label=estimate.hardware.name)
    axes.set(xlabel="pipeline rank", ylabel="GiB")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*axes.get_legend_handles_labels(), ncols=8, loc="outside lower center")
