"""Interleaved stages train as 1F1B does: losses, norms, evaluation, on real ranks."""

from __future__ import annotations

from typing import Any

import pytest
from synthetic import replica_batches, small_config, start_engine, train_losses

from megatron_omega.launching.local_ranks import run_ranks

pytestmark = pytest.mark.distributed
STEPS = 3


def _config(ranks: int, chunks: int, parallel: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Any:
    schedule = {"pipeline_schedule": "interleaved", "virtual_stages": chunks} if chunks > 1 else {}
    defaults: dict[str, Any] = {
        "model": {"encoder_layers": 6, "decoder_layers": 7},
        "batch": {"micro_batch_size": 1, "global_batch_size": 4},
    }
    return small_config(
        parallel={"pipeline_parallel_size": ranks, **schedule, **(parallel or {})}, **(defaults | sections)
    )


def _train_all(cases: list[dict[str, Any]]) -> list[Any]:
    return [train_losses(_config(**case), STEPS) for case in cases]


def _differences(ranks: int, cases: list[dict[str, Any]]) -> list[float]:
    """Train each case; return the largest relative difference of each to the first, over everything reported."""
    trained = run_ranks(_train_all, ranks, [{"ranks": ranks, **case} for case in cases], timeout_seconds=300)
    assert all(rank == trained[0] for rank in trained), "ranks report differently"
    first, *others = ([number for row in rows for number in row] for rows in trained[0])
    return [max(abs(a - b) / abs(b) for a, b in zip(rows, first, strict=True)) for rows in others]


def test_two_ranks_equal_1f1b() -> None:
    """All numbers of stages and recompute modes, rounds of unequal size, one micro-batch alone."""
    many = {"batch": {"micro_batch_size": 1, "global_batch_size": 5}}
    cases = [{"chunks": 2}, {"chunks": 3, "parallel": {"recompute": "full"}}, {"chunks": 4}]
    cases += [{"chunks": 2, "parallel": {"recompute": mode}} for mode in ("swiglu", "ffn")]
    assert max(_differences(2, [{"chunks": 1}, *cases])) < 1e-6
    assert max(_differences(2, [{"chunks": 1, **many}, {"chunks": 3, **many}])) < 1e-6


def test_four_ranks_equal_1f1b() -> None:
    """With uneven cuts: at the first layer, inside the encoder, at the bridge, inside the decoder."""
    cuts = {"stage_boundaries": (1, 2, 5, 7, 9, 12, 13)}
    assert max(_differences(4, [{"chunks": 1}, {"chunks": 2}, {"chunks": 4}, {"chunks": 2, "parallel": cuts}])) < 1e-6


def test_bf16_is_the_same_for_any_number_of_stages_and_near_1f1b() -> None:
    bf16 = {"precision": {"dtype": "bf16"}}
    differences = _differences(2, [{"chunks": chunks, **bf16} for chunks in (1, 2, 4)])
    assert max(differences) < 5e-3


def _train_a_growing_batch(chunks: int) -> list[tuple[float, float]]:
    config = _config(2, chunks, batch={"micro_batch_size": 1, "global_batch_size": 6})
    engine, found = start_engine(config), []
    batches = replica_batches(config, engine)
    for size in (1, 2, 5, 6):
        engine.set_global_batch_size(size)
        result = engine.train_step(batches, learning_rate=1e-2)
        found.append((result.loss, result.grad_norm))
    return found


def test_a_growing_batch() -> None:
    plain = run_ranks(_train_a_growing_batch, 2, 1, timeout_seconds=120)[0]
    for (loss, norm), (expected, expected_norm) in zip(
        run_ranks(_train_a_growing_batch, 2, 4, timeout_seconds=120)[0], plain, strict=True
    ):
        assert loss == pytest.approx(expected, rel=1e-6) and norm == pytest.approx(expected_norm, rel=1e-5)
