"""Gradients of replicas are summed in buckets behind the last micro-batch's backward pass, to the same sums."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from synthetic import replica_batches, small_config, start_engine
from torch import Tensor

from megatron_omega.engine import early_sums
from megatron_omega.engine import engine as engine_module
from megatron_omega.launching.local_ranks import run_ranks

pytestmark = pytest.mark.distributed
MICRO_BATCHES, REPLICAS, BUCKET, STEPS = 2, 2, 3_000, 3
INTERLEAVED = {"pipeline_parallel_size": 2, "pipeline_schedule": "interleaved", "virtual_stages": 2}


class _Log:
    """Writes down, in one step, when gradients are added up and when their sums are started and awaited."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, group: Any) -> None:
        self.events: list[str] = []
        take, reduce = BF16_Optimizer._update_hp_grad, dist.all_reduce

        def taking(optimizer: BF16_Optimizer, *arguments: Any, **options: Any) -> None:
            self.events.append("gradient")
            take(optimizer, *arguments, **options)

        def reducing(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
            work = reduce(tensor, *arguments, **options)
            if options.get("group") is not group or not options.get("async_op"):
                return work
            self.events.append("sum")
            return _Awaited(work, self.events)

        monkeypatch.setattr(BF16_Optimizer, "_update_hp_grad", taking)
        monkeypatch.setattr(dist, "all_reduce", reducing)


class _Awaited:
    def __init__(self, work: Any, events: list[str]) -> None:
        self.work, self.events = work, events

    def wait(self) -> None:
        self.events.append("await")
        self.work.wait()


def _trained(parallel: dict[str, Any], who: str) -> tuple[list[tuple[float, float]], list[str]]:
    """Return loss and norm of each step, and the events of the last; `who` sums: we early, or the engine late."""
    batch = {"micro_batch_size": 1, "global_batch_size": MICRO_BATCHES * REPLICAS}
    config = small_config(parallel=parallel, precision={"dtype": "bf16"}, batch=batch)
    engine_module.sum_early = partial(early_sums.sum_early, bucket_elements=BUCKET) if who == "we" else lambda _: None
    engine = start_engine(config)
    if who == "engine":  # in fp32, which is not its choice
        engine.deepspeed.communication_data_type = torch.float32
    batches, rows = replica_batches(config, engine), []
    with pytest.MonkeyPatch.context() as monkeypatch:
        for _ in range(STEPS):
            monkeypatch.undo()
            log = _Log(monkeypatch, engine.topology.data.handle)
            result = engine.train_step(batches, learning_rate=1e-2)
            rows.append((result.loss, result.grad_norm))
    return rows, log.events


@pytest.mark.parametrize(("ranks", "parallel"), [(2, {}), (4, INTERLEAVED)], ids=["plain", "interleaved"])
def test_sums_start_before_the_last_gradient_and_are_awaited_after_it(ranks: int, parallel: dict[str, Any]) -> None:
    early = run_ranks(_trained, ranks, parallel, "we", timeout_seconds=120)
    late = run_ranks(_trained, ranks, parallel, "engine", timeout_seconds=120)
    assert [rows for rows, _ in early] == [rows for rows, _ in late], "two addends: the same to the last bit"
    for _, events in early:
        gradients = [place for place, event in enumerate(events) if event == "gradient"]
        sums = [place for place, event in enumerate(events) if event == "sum"]
        waits = [place for place, event in enumerate(events) if event == "await"]
        assert len(sums) == len(waits) > 4
        is_in_the_last = min(sums) > gradients[len(gradients) // MICRO_BATCHES]
        assert is_in_the_last == (not parallel), "a stage's sums begin in its own last pass, while others have more"
        assert sum(place < gradients[-1] for place in sums) >= len(sums) // 2, events
        assert min(waits) > gradients[-1]
    assert all("sum" not in events for _, events in late)


def _a_gradient_too_many() -> str:
    engine_module.sum_early = partial(early_sums.sum_early, bucket_elements=BUCKET)
    config = small_config(precision={"dtype": "bf16"}, batch={"micro_batch_size": 1, "global_batch_size": 2})
    engine = start_engine(config)
    sums = engine.deepspeed.early_sums
    sums.is_last_pass = True
    parameter = next(engine.module.parameters())
    sums.take(parameter)
    try:
        sums.take(parameter)
    except AssertionError as error:
        return str(error)
    return ""


def test_a_gradient_that_comes_after_its_last_one_is_no_silent_fault() -> None:
    for said in run_ranks(_a_gradient_too_many, 2, timeout_seconds=60):
        assert "after its last" in said
