#!/usr/bin/env python
"""Print how far every kind of activation moves after 1, 5 and 20 steps, over widths and over depths.

    benchmarks/coordinates.py [--ffn-ratio 17] [--rate 3e-3] [--version 1]

Flat rows mean that a rate found on a small model suits a large one; docs/parametrization.md says why.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_omega.studies.coordinates import gradients_over_epsilon, movement, proportioned, spread

STEPS = (1, 5, 20)
WIDTHS = (64, 128, 256, 512)
DEPTHS = (2, 6, 12, 24)


def table(name: str, moved: Mapping[int, Mapping[str, Sequence[float]]]) -> str:
    """Return the movement at each size, and the largest over the smallest, as Markdown."""
    sizes = " | ".join(map(str, moved))
    lines = [f"| {name} | {sizes} | largest / smallest |", "|---" * (len(moved) + 2) + "|"]
    for kind, factors in spread(moved).items():
        cells = (" ".join(f"{value:.3g}" for value in size[kind]) for size in moved.values())
        lines.append(f"| {kind} | {' | '.join(cells)} | {' '.join(f'{factor:.2f}' for factor in factors)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ffn-ratio", type=int, default=4, help="feed-forward width over width")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate")
    parser.add_argument("--version", type=int, default=2, help="model.parametrization")
    options = parser.parse_args()
    made = {"ffn_ratio": options.ffn_ratio, "parametrization": options.version}
    widths = {width: movement(proportioned(width, 2, **made), STEPS, options.rate) for width in WIDTHS}
    print(table("width", widths), end="\n\n", flush=True)
    depths = {layers: movement(proportioned(64, layers, **made), STEPS, options.rate) for layers in DEPTHS}
    print(table("layers of a stack", depths), end="\n\n", flush=True)
    found = gradients_over_epsilon(proportioned(64, 96, **made))
    smallest = min(found, key=lambda name: found[name])
    print(f"96 + 96 layers: the smallest gradient is {found[smallest]:,.0f} epsilons ({smallest})")


if __name__ == "__main__":
    main()
