"""Where a step waits for the device: at its end, for losses and norm; never between micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
from synthetic import replica_batches, small_config, start_engine

from megatron_omega.launching.local_ranks import run_ranks
from megatron_omega.studies.device.recording import watched_step

pytestmark = pytest.mark.distributed
AT_THE_END = 10
"""Losses, norm, whether it is finite, what clipping asks; ZeRO-2 asks for every group of parameters."""


def _waits(parallel: dict[str, Any], dtype: str, stage: int) -> tuple[dict[str, int], list[str]]:
    config = small_config(parallel=parallel, precision={"dtype": dtype}, batch={"micro_batch_size": 1})
    engine = start_engine(config, stage)
    batches = replica_batches(config, engine)
    for _ in range(2):
        engine.train_step(batches, learning_rate=1e-3)
    waits = watched_step(engine, lambda: engine.train_step(batches, learning_rate=1e-3))
    return dict(waits.found), waits.places


@pytest.mark.parametrize(
    ("ranks", "parallel", "dtype", "stage"),
    [
        (1, {}, "fp32", 0),
        (1, {}, "bf16", 1),
        (1, {}, "bf16", 2),
        (2, {"pipeline_parallel_size": 2}, "bf16", 1),
        (2, {"pipeline_parallel_size": 2, "pipeline_schedule": "interleaved", "virtual_stages": 2}, "bf16", 1),
    ],
    ids=["plain", "zero-1", "zero-2", "1f1b", "interleaved"],
)
def test_nothing_waits_between_micro_batches(ranks: int, parallel: dict[str, Any], dtype: str, stage: int) -> None:
    for found, places in run_ranks(_waits, ranks, parallel, dtype, stage, timeout_seconds=90):
        assert found.get("micro-batches", 0) == 0, [place for place in places if place.startswith("micro")]
        ending = [place for place in places if place.startswith("end")]
        assert len(ending) <= AT_THE_END, ending
