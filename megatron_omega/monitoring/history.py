"""What a run read, step by step, from its events: batches, corpora and seeds as they were, over all starts.

Each start, and each return to a checkpoint, begins a stretch of steps that read alike; it replaces what was done behind
it before. The last stretch goes on as far as anybody asks.
"""

from __future__ import annotations

import re
import sys
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from megatron_omega.config.schema import RunConfig
from megatron_omega.training.batch_size import Interval, consumed_after, samples_of_step
from megatron_omega.training.state import TrainState

_READ_BY = ("batch", "data", "objective")
"""Sections that decide what a step reads, beside the seed."""


def reading(config: RunConfig, state: TrainState) -> dict[str, Any]:
    """Return what the event of a start says of the samples from there on."""
    settings = config.model_dump(mode="json")
    return {
        "consumed_samples": state.consumed_samples,
        "seed": config.training.seed,
        "reading": {section: settings[section] for section in _READ_BY},
    }


@dataclass(frozen=True)
class Stretch:
    """Steps that read alike."""

    config: RunConfig
    after_step: int
    """The last step before it."""
    consumed_samples: int
    """Samples consumed by then."""
    left_out: tuple[Interval, ...] = ()
    replicas: int | None = None
    """Data-parallel ranks; None if nobody said so."""
    up_to_step: int = sys.maxsize

    def consumed_before(self, step: int) -> int:
        """Return the samples consumed before `step`."""
        steps = step - 1 - self.after_step
        return consumed_after(self.config.batch, steps, self.left_out, begin=self.consumed_samples)

    def samples_of(self, step: int) -> tuple[range, ...]:
        """Return the samples of `step`, ascending."""
        return samples_of_step(self.config.batch, self.consumed_before(step), self.left_out)

    def step_of(self, sample: int, last_step: int) -> int:
        """Return the step, up to `last_step`, that read `sample`."""
        steps = range(self.after_step + 1, last_step + 1)
        return self.after_step + bisect_right(steps, sample, key=self.consumed_before)


def stretches(events: Iterable[Mapping[str, Any]], config: RunConfig) -> list[Stretch]:
    """Return the stretches of a run, ascending.

    events: of events.jsonl, in their order. config: as the run has it now, for what starts of older versions left out.
    """
    found: list[Stretch] = []
    for event in events:
        if event.get("event") == "start":
            _append(found, _of_start(event, config, found))
        elif event.get("event") == "rollback" and found:
            step, last = int(event["to_step"]), found[-1]
            left_out = tuple((start, stop) for start, stop in event.get("left_out", ()))
            consumed = event.get("consumed_samples", _consumed(found, step))
            _append(found, replace(last, after_step=step, consumed_samples=consumed, left_out=left_out))
    return found or [Stretch(config, 0, 0)]


def stretch_of(found: Iterable[Stretch], step: int) -> Stretch:
    """Return the stretch that holds `step`."""
    return next(stretch for stretch in found if step <= stretch.up_to_step)


def _of_start(event: Mapping[str, Any], config: RunConfig, before: list[Stretch]) -> Stretch:
    step = int(event.get("step", 0))
    left_out = tuple((start, stop) for start, stop in event.get("left_out", ()))
    layout = re.search(r"\bDP (\d+)\b", str(event.get("layout", "")))
    consumed = event.get("consumed_samples", _consumed(before, step))
    return Stretch(_config_of(event, config), step, consumed, left_out, int(layout[1]) if layout else None)


def _config_of(event: Mapping[str, Any], config: RunConfig) -> RunConfig:
    if "reading" not in event:
        return config
    settings = config.model_dump(mode="json")
    training = settings["training"] | {"seed": event["seed"]}
    try:
        return RunConfig.model_validate({**settings, **event["reading"], "training": training})
    except ValidationError:  # written by another version
        return config


def _consumed(found: list[Stretch], step: int) -> int:
    return stretch_of(found, step + 1).consumed_before(step + 1) if found and step else 0


def _append(found: list[Stretch], stretch: Stretch) -> None:
    """Add a stretch in the place of what was done behind its beginning."""
    kept = [replace(each, up_to_step=min(each.up_to_step, stretch.after_step)) for each in found]
    found[:] = [each for each in kept if each.after_step < each.up_to_step]
    found.append(stretch)
