"""The garbage collector runs where all ranks run it, and nowhere else."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_omega.training.garbage import INTERVAL_STEPS, GarbageCollection


def test_collects_at_its_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda *_: collected.append(1))
    hook = GarbageCollection()
    hook.on_start(cast(Any, None))
    try:
        assert not gc.isenabled() and gc.get_freeze_count() > 0 and len(collected) == 1
        for step in range(1, 2 * INTERVAL_STEPS + 1):
            hook.on_step_end(cast(Any, SimpleNamespace(step=step)))
        assert len(collected) == 3
    finally:
        hook.on_close()
    assert gc.isenabled() and gc.get_freeze_count() == 0
