"""The order in which a pipeline rank starts its messages and its passes, under 1F1B as under interleaved stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from synthetic import replica_batches, small_config, start_engine

from megatron_omega.engine.pipeline import StagesInTurns
from megatron_omega.launching.local_ranks import run_ranks

pytestmark = pytest.mark.distributed
RANKS, MICRO_BATCHES = 2, 4


class _Log:
    """Writes down when messages are posted and awaited, on which group, and when passes begin."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine: Any) -> None:
        self.events: list[str] = []
        self.groups: set[Any] = set()
        batch = dist.batch_isend_irecv

        def posted(operations: list[Any]) -> list[Any]:
            name = "receive" if operations[0].op is dist.irecv else "send"
            assert len({id(each.group) for each in operations}) == 1, "a message is one launch on one group"
            self.events.append(name)
            self.groups.add(operations[0].group)
            return [_Awaited(work, name, self.events) for work in batch(operations)]

        monkeypatch.setattr(dist, "batch_isend_irecv", posted)
        for name in ("send", "recv"):  # those that block
            monkeypatch.setattr(dist, name, lambda *_, name=name, **__: self.events.append(f"blocking {name}"))
        for method, name in (("_exec_forward_pass", "F"), ("_exec_backward_pass", "B"), ("_exec_reduce_grads", "end")):
            monkeypatch.setattr(engine, method, self._noting(getattr(engine, method), name))

    def _noting(self, method: Any, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.events.append(name)
            return method(*arguments, **options)

        return call


class _Awaited:
    def __init__(self, work: Any, name: str, events: list[str]) -> None:
        self.work, self.name, self.events = work, name, events

    def wait(self) -> None:
        if self.events[-1] != f"await {self.name}":  # a message of several tensors is awaited once
            self.events.append(f"await {self.name}")
        self.work.wait()


def _events(parallel: dict[str, Any]) -> tuple[list[str], int]:
    config = small_config(
        parallel={"pipeline_parallel_size": RANKS, **parallel},
        batch={"micro_batch_size": 1, "global_batch_size": MICRO_BATCHES},
    )
    engine = start_engine(config)
    assert isinstance(engine.deepspeed, StagesInTurns)
    batches = replica_batches(config, engine)
    engine.train_step(batches, learning_rate=1e-3)  # says the shapes of what is sent
    with pytest.MonkeyPatch.context() as monkeypatch:
        log = _Log(monkeypatch, engine.deepspeed)
        engine.train_step(batches, learning_rate=1e-3)
    assert dist.group.WORLD not in log.groups
    return log.events, len(log.groups)


def test_1f1b_receives_early_and_waits_for_what_it_takes_in_alone() -> None:
    (first, groups), (second, _) = run_ranks(_events, RANKS, {}, timeout_seconds=90)
    assert groups == 2  # one there, one back
    assert [event for event in first if event in "FB"] == list("FFBFBFBB")
    assert [event for event in second if event in "FB"] == list("FBFBFBFB")
    assert not any(event.startswith("blocking") for event in first + second)
    # The gradient that a backward pass takes in is received while the forward pass before it computes.
    assert first[first.index("F", first.index("F") + 1) - 1] == "receive"
    for events in (first, second):
        sends = [place for place, event in enumerate(events) if event == "await send"]
        arrived = events.index("await receive")
        assert all(place > arrived for place in sends), "a send was waited for before the other rank had taken it in"
        passes = [place for place, event in enumerate(events) if event in "FB"]
        waits = [place for place, event in enumerate(events) if event == "await receive"]
        posts = [place for place, event in enumerate(events) if event == "receive"]
        early = [post for post, wait in zip(posts, waits, strict=True) if any(post < p < wait for p in passes)]
        assert len(early) >= len(posts) - 1, events  # all but the first of a step travel behind a pass


def test_interleaved_stages_do_so_too() -> None:
    parallel = {"pipeline_schedule": "interleaved", "virtual_stages": 2}
    (events, groups), _ = run_ranks(_events, RANKS, parallel, timeout_seconds=90)
    assert groups == 2
    assert events.count("F") == events.count("B") == 2 * MICRO_BATCHES
    assert not any(event.startswith("blocking") for event in events)
