"""Layers that differ, selected blocks and learned sinks train to the same figures under every layout."""

from __future__ import annotations

from typing import Any

import pytest
from synthetic import small_config, train_losses

from megatron_omega.launching.local_ranks import run_ranks

pytestmark = pytest.mark.distributed

MODEL: dict[str, Any] = {
    "encoder_branches": [["full", "local"], ["axial", "local", "dynamic"]],
    "decoder_branches": [["select", "local"], ["causal", "axial", "select"]],
    "select_blocks": 1,
    "attention_sinks": True,
}


def _train(parallel: dict[str, Any], stage: int) -> list[tuple[float, ...]]:
    return train_losses(small_config(model=MODEL, parallel=parallel), 3, stage)


@pytest.mark.parametrize(
    ("ranks", "parallel", "stage"),
    [
        (4, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, 1),
        (4, {"tensor_parallel_size": 2, "sequence_parallel": True, "recompute": "full"}, 3),
    ],
    ids=["tensor and pipeline", "sequence and ZeRO-3"],
)
def test_the_figures_are_those_of_one_process(ranks: int, parallel: dict[str, Any], stage: int) -> None:
    (alone,) = run_ranks(_train, 1, {}, 0, timeout_seconds=200)
    for rows in run_ranks(_train, ranks, parallel, stage, timeout_seconds=200):
        for expected, found in zip(alone, rows, strict=True):
            assert found == pytest.approx(expected, rel=1e-5, nan_ok=True)
