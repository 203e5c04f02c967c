"""Where runs are hurt: a small corpus, the undisturbed run to compare with, and the measure of each outcome."""

from __future__ import annotations

import random
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny import TinyCorpus, make_tiny_corpus

from faults.ranks import Attempt, Ending, Run, losses, weights_digest

STEPS, SAVE_EVERY = 12, 4
LAYOUTS = {"2x2x2": (2, 2, 2), "4x1x2": (4, 1, 2), "1x2x1": (1, 2, 1)}
"""Pipeline x data x tensor."""


@dataclass(frozen=True)
class Outcome:
    """What became of a fault."""

    detected_seconds: float | None
    """From the fault to the end of all ranks, or to the event; None where nothing had to be noticed."""
    survived: bool
    """Whether the run reached its last step, started again where needed."""
    bit_equal: bool | None
    """Whether the final weights are those of the undisturbed run; None where they cannot be (steps were skipped)."""
    problems: tuple[str, ...] = ()
    said: str = ""
    """The last words of the log."""

    @property
    def passes(self) -> bool:
        return self.survived and self.bit_equal is not False and not self.problems


class Laboratory:
    """Makes runs of omega-tiny on short streams. Everything lies in one folder that goes with it."""

    def __init__(self, corpus: TinyCorpus | None = None, *, layout: str = "2x2x2", seed: int = 0) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="omega-faults-"))
        self.corpus = corpus or make_tiny_corpus(self.folder)
        self.layout = layout
        self.random = random.Random(seed)
        self._references: dict[tuple[str, ...], Run] = {}
        self._count = 0

    def __enter__(self) -> Laboratory:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def world_size(self) -> int:
        pipeline, data, tensor = LAYOUTS[self.layout]
        return pipeline * data * tensor

    def run(
        self,
        *overrides: str,
        faults: Sequence[Mapping[str, Any]] = (),
        layout: str | None = None,
        environment: Mapping[str, str] | None = None,
        name: str | None = None,
        directory: Path | None = None,
    ) -> Run:
        """Return a run that has not started."""
        self._count += 1
        pipeline, data, tensor = LAYOUTS[layout or self.layout]
        options = {
            "parallel.pipeline_parallel_size": pipeline, "parallel.tensor_parallel_size": tensor,
            "batch.global_batch_size": 8, "training.train_steps": STEPS, "schedule.warmup_steps": 2,
            "optimizer.learning_rate": 2e-3,  # what a fault does is to be seen, not a rate at the edge of what trains
            "evaluation.interval_steps": 0, "checkpoint.interval_steps": SAVE_EVERY, "logging.interval_steps": 1,
            "logging.tensorboard": "false", "parallel.timeout_seconds": 120, "resilience.start_timeout_seconds": 90,
            "resilience.hang_floor_seconds": 6,
        }  # fmt: skip
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        directory = directory or self.folder / (name or f"run-{self._count}")
        return Run(
            self.corpus.run_yaml,
            directory,
            self.folder,
            pipeline * data * tensor,
            (*words, *overrides),
            faults,
            environment or {},
        )

    def reference(self, *overrides: str, layout: str | None = None) -> Run:
        """Return the undisturbed run with the same settings, done once."""
        key = (layout or self.layout, *overrides)
        if key not in self._references:
            run = self.run(*overrides, layout=layout, name=f"reference-{len(self._references)}")
            ending = run.finish(most_starts=1)
            assert run.is_complete and set(ending.codes) == {0}, ending.log[-4000:]
            self._references[key] = run
        return self._references[key]

    def is_equal(self, run: Run, reference: Run) -> bool:
        """Whether weights, moments and every loss are those of the reference, bit for bit."""
        ours, theirs = (max((r.directory / "checkpoints").glob("step-*")) for r in (run, reference))
        return weights_digest(ours) == weights_digest(theirs) and losses(run) == losses(reference)

    def compare(
        self, run: Run, *overrides: str, layout: str | None = None, detected: float | None = None,
        problems: Sequence[str] = (), said: str = "",
    ) -> Outcome:  # fmt: skip
        """Finish the run where it is not complete, and compare it with the undisturbed one."""
        if not run.is_complete:
            run.finish()
        reference = self.reference(*overrides, layout=layout)
        survived = run.is_complete
        return Outcome(detected, survived, survived and self.is_equal(run, reference), tuple(problems), said)


def after_step(attempt: Attempt, step: int, *, jitter: float = 0.0) -> float:
    """Wait until `step` is done and some seconds more; return the monotonic time."""
    attempt.wait_until(lambda: attempt.steps() >= step)
    time.sleep(jitter)
    return time.monotonic()


def last_words(log: str, count: int = 10) -> str:
    """Return the last lines of a log that say something."""
    return "\n".join([line for line in log.splitlines() if line.strip()][-count:])


def demand(ending: Ending, *, code: int, pattern: str, within: float | None = None, tracebacks: int = 0) -> list[str]:
    """Return what is not as it has to be: exit codes, the last words, how soon, how many tracebacks."""
    found = []
    odd = sorted({each for each in ending.codes if each not in (code, -9)})
    if odd:
        found.append(f"exit codes {odd}, not {code}")
    if not re.search(pattern, last_words(ending.log), re.DOTALL):
        found.append(f"the last words do not match {pattern!r}: {last_words(ending.log)}")
    if within is not None and ending.seconds > within:
        found.append(f"ended after {ending.seconds:.1f} s, not within {within:g} s")
    if ending.log.count("Traceback (most recent call last)") > tracebacks:
        found.append(f"{ending.log.count('Traceback (most recent call last)')} tracebacks")
    return found
