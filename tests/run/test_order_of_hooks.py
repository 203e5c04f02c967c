"""The order of a run's hooks is one list, and every hook of the package has its place in it."""

from __future__ import annotations

import random

import pytest

from megatron_omega.monitoring.goodput import GoodputLog
from megatron_omega.monitoring.trackers import Tracker
from megatron_omega.run.hooks import ORDER, in_order
from megatron_omega.training.hooks import Hook, Hooks

ROOMS = ("health", "monitoring", "watchdog", "run.claims", "run.compilation", "run.profiling", "training.garbage")
"""Rooms whose hooks a run has; those of studies and of callers come after."""
GATHERED = {Hooks, Tracker}
"""Hooks that stand for others."""


def kinds(root: type[Hook]) -> set[type[Hook]]:
    return {kind for child in root.__subclasses__() for kind in {child, *kinds(child)}}


def test_every_hook_has_one_place_and_a_reason() -> None:
    ordered = [kind for kind, _ in ORDER]
    homes = tuple(f"megatron_omega.{room}" for room in ROOMS)
    assert {kind for kind in kinds(Hook) - GATHERED if kind.__module__.startswith(homes)} == {*ordered}
    assert len({*ordered}) == len(ordered) == len({reason for _, reason in ORDER})


def test_hooks_stand_as_the_list_says() -> None:
    hooks = [kind.__new__(kind) for kind, _ in ORDER]
    shuffled = random.Random(1).sample(hooks, len(hooks))
    assert in_order(shuffled) == hooks


def test_a_hook_without_a_place_is_refused() -> None:
    class Stranger(GoodputLog):
        """Not in the list."""

    with pytest.raises(ValueError, match="Stranger has no place"):
        in_order([Stranger()])
