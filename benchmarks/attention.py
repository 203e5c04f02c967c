#!/usr/bin/env python
"""Sparse attention against dense attention: CPU-seconds, forward and backward.

    python benchmarks/attention.py [--length 4096] [--rounds 5] [--json]

The rival of local and axial is torch's scaled_dot_product_attention with the pattern's n x n boolean mask; that of
select, whose pattern depends on the queries, our causal branch, and torch's `is_causal` beside it, which needs no mask
and half the work but knows one document only. What is made once for all layers is not counted.
Rounds are interleaved; the figure is the median ratio. One thread, fp32, two packed documents.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_omega.config.schema import Branch
from megatron_omega.model.attention import attend, branch_facts
from megatron_omega.model.kernels import PORTABLE
from megatron_omega.model.stream import Pattern, Stream, share_document, visible

HEADS, HEAD_DIM, WINDOW, WIDTH = 4, 20, 128, 64
SELECT_WIDTH, SELECT_BLOCKS = 32, 4
SELECT_AND_CAUSAL: tuple[Branch, ...] = ("select", "causal")
CASES: tuple[tuple[Branch, bool], ...] = (("local", False), ("local", True), ("axial", False), ("axial", True))


def cpu_seconds(run: Callable[[], Tensor]) -> float:
    """Return the CPU time of one forward and backward pass."""
    begin = time.process_time()
    run().sum().backward()
    return time.process_time() - begin


def measure(branch: Branch, length: int, rounds: int, *, causal: bool) -> dict[str, float]:
    """Return the median CPU-seconds of both forms and the median of their ratios."""
    pattern = Pattern(causal, WINDOW, WIDTH)
    query, key, value = (torch.randn(1, HEADS, length, HEAD_DIM, requires_grad=True) for _ in range(3))
    segments = torch.ones(1, length, dtype=torch.long)
    segments[:, length // WIDTH // 2 * WIDTH :] = 2
    places = torch.arange(length)
    mask = visible(branch, pattern, places, places, HEADS) & share_document(segments, segments).unsqueeze(1)

    def ours() -> Tensor:
        facts = branch_facts(branch, pattern, Stream(segments, PORTABLE), query.dtype)
        return attend(branch, pattern, query, key, value, facts, PORTABLE)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    assert torch.allclose(ours(), dense(), atol=1e-5)
    pairs = [(cpu_seconds(ours), cpu_seconds(dense)) for _ in range(rounds + 1)][1:]
    return {
        "ours": statistics.median(ours for ours, _ in pairs),
        "dense": statistics.median(dense for _, dense in pairs),
        "ratio": statistics.median(dense / ours for ours, dense in pairs),
    }


def measure_select(length: int, rounds: int) -> dict[str, float]:
    """Return the median CPU-seconds of the select and the causal branch, and the median of their ratios."""
    pattern = Pattern(causal=True, window=WINDOW, width=SELECT_WIDTH, blocks=SELECT_BLOCKS)
    parts = [torch.randn(1, HEADS, length, HEAD_DIM, requires_grad=True) for _ in range(3)]
    query, key, value = parts
    stream = Stream(torch.ones(1, length, dtype=torch.long), PORTABLE)
    facts = {branch: branch_facts(branch, pattern, stream, query.dtype) for branch in SELECT_AND_CAUSAL}

    def run(branch: Branch) -> Tensor:
        return attend(branch, pattern, query, key, value, facts[branch], PORTABLE)

    def causal() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    runs = [*(partial(run, branch) for branch in SELECT_AND_CAUSAL), causal]
    times = [[cpu_seconds(one) for one in runs] for _ in range(rounds + 1)][1:]
    return {
        "ours": statistics.median(ours for ours, _, _ in times),
        "dense": statistics.median(dense for _, dense, _ in times),
        "ratio": statistics.median(dense / ours for ours, dense, _ in times),
        "ratio to is_causal": statistics.median(causal / ours for ours, _, causal in times),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096, help="tokens (default: 4096)")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default: 5)")
    parser.add_argument("--json", action="store_true", help="print data")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {
        f"{branch}, {'decoder' if causal else 'encoder'}": measure(
            branch, options.length, options.rounds, causal=causal
        )
        for branch, causal in CASES
    }
    rows["select, decoder"] = measure_select(options.length, options.rounds)
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print(
        f"{options.length} tokens, {HEADS} heads of {HEAD_DIM}, W {WINDOW}, w {WIDTH}; CPU-seconds, forward + backward"
    )
    for name, row in rows.items():
        beside = f" ({row['ratio to is_causal']:.1f} x is_causal)" if "ratio to is_causal" in row else ""
        print(f"{name:<16} ours {row['ours']:.4f}   dense {row['dense']:.4f}   {row['ratio']:.1f} x{beside}")


if __name__ == "__main__":
    main()
