"""A refused step is no step, bit for bit, under every engine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from synthetic import replica_batches, small_config, start_engine
from torch import Tensor

from megatron_omega.engine.internals import base_optimizer, engine_holdings
from megatron_omega.launching.local_ranks import run_ranks

pytestmark = pytest.mark.distributed
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}


def held_by(engine: Any) -> Iterator[Tensor]:
    """Masters, moments, their step counts and working weights of this rank."""
    optimizer = base_optimizer(engine.deepspeed)
    for mine in engine_holdings(engine.deepspeed):
        state = optimizer.state[mine.flat]
        yield from (mine.part(mine.flat), mine.working(), state["step"])
        yield from (mine.part(state[name]) for name in ("exp_avg", "exp_avg_sq"))


def step_refused_or_left_out(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case: three steps, the second refused, against two steps on the same data."""
    found = []
    for case in cases:
        schedule = case.get("schedule", "1f1b")
        config = small_config(
            parallel={
                "tensor_parallel_size": case.get("tensor", 1), "pipeline_parallel_size": case.get("pipeline", 1),
                "pipeline_schedule": schedule,
            },
            precision={"dtype": case.get("dtype", "fp32")},
            batch={"micro_batch_size": 1, "global_batch_size": 4},
        )  # fmt: skip
        ends = []
        for is_refused in (True, False):
            engine = start_engine(config, case.get("zero", 1), **case.get("options", {}))
            asked: list[float] = []

            def accept(loss: float, asked: list[float] = asked) -> bool:
                asked.append(loss)
                return False

            batches = [replica_batches(config, engine, start) for start in (0, 4, 8)]
            engine.train_step(batches[0], learning_rate=1e-2, accept=lambda loss: True)
            if is_refused:
                second = engine.train_step(batches[1], learning_rate=1e-2, accept=accept)
            third = engine.train_step(batches[2], learning_rate=1e-2, accept=math.isfinite)
            ends.append((third, [tensor.clone() for tensor in held_by(engine)], len(asked), asked[:1]))
        (refused_third, refused, calls, losses), (other_third, left_out, _, _) = ends
        found.append(
            {
                "skipped": second.skipped and not refused_third.skipped,
                "loss": not losses or losses[0] == pytest.approx(second.lm_loss, rel=1e-6),
                "finite": math.isfinite(second.loss),
                "same": len(refused) > 0 and all(map(torch.equal, refused, left_out)),
                "next": (refused_third.loss, refused_third.grad_norm) == (other_third.loss, other_third.grad_norm),
                "calls": calls,
            }
        )
    return found


CASES = [
    {"zero": 0}, {"zero": 1, "dtype": "bf16"}, {"zero": 2}, {"zero": 3}, {"zero": 3, "options": OFFLOAD},
    {"tensor": 2, "zero": 0}, {"pipeline": 2}, {"pipeline": 2, "schedule": "dualpipev"},
]  # fmt: skip


def test_a_refused_step_is_no_step() -> None:
    ranks = run_ranks(step_refused_or_left_out, 2, CASES, timeout_seconds=240)
    for position, case in enumerate(CASES):
        for found in (rank[position] for rank in ranks):
            assert all(found[name] for name in ("skipped", "loss", "finite", "same", "next")), (case, found)
        calls = [rank[position]["calls"] for rank in ranks]
        assert set(calls) <= {0, 1} and sum(calls) >= 1, case
