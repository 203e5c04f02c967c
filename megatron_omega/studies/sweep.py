"""Successive halving: every candidate trains a while, the better half goes on from where it stands, until one is left.

A candidate is a configuration with other values of some settings, the learning rate for example. Each is a real run in
a folder of its own, which resumes: a later rung costs only its own steps, and a sweep that was interrupted goes on
where it was. The schedule is constant, so that a candidate is judged by its rate and not by how far a decay has come.
What is compared is the validation loss of the decoder: the same text for all. (arXiv 1502.07943)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from megatron_omega.config import yaml_text
from megatron_omega.config.arguments import Arguments, Override
from megatron_omega.config.load import dump_config, load_config, resolve_run
from megatron_omega.config.schema import RunConfig
from megatron_omega.errors import ConfigError
from megatron_omega.host import run_folder
from megatron_omega.host.json_lines import read_objects

RATE = "optimizer.learning_rate"
_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)

Values = tuple[tuple[str, str], ...]
"""What makes a candidate: settings by dotted name, with their values as typed."""
Train = Callable[[Arguments], None]


@dataclass(frozen=True)
class Sweep:
    """What is searched, and how long."""

    config: Path
    overrides: tuple[Override, ...]
    deepspeed_config: str | None
    folder: Path
    candidates: tuple[Values, ...]
    rungs: tuple[int, ...]
    """Steps after which candidates are compared, ascending."""


@dataclass(frozen=True)
class Outcome:
    """Losses of every candidate at the rungs it reached, and the order at the end: the best first."""

    rungs: tuple[int, ...]
    losses: Mapping[Values, tuple[float, ...]]
    order: tuple[Values, ...]

    @property
    def best(self) -> Values:
        return self.order[0]


def candidates_of(config: RunConfig, varied: Mapping[str, Sequence[str]]) -> tuple[Values, ...]:
    """Return every combination of the varied values; without any, rates by factors of 2 around the configured one."""
    if not varied:
        rate = config.optimizer.learning_rate
        varied = {RATE: [f"{rate * factor:.6g}" for factor in _FACTORS]}
    names = list(varied)
    return tuple(tuple(zip(names, values, strict=True)) for values in product(*varied.values()))


def rungs_of(steps: int, count: int, num_candidates: int) -> tuple[int, ...]:
    """Return the steps of `count` rungs, each twice as far as the one before; the last is `steps`.

    Raises:
        ConfigError: the first rung would have no step, or more rungs are asked for than halve the candidates.
    """
    useful = max(1, math.ceil(math.log2(num_candidates)) + 1)
    if not 1 <= count <= useful:
        raise ConfigError(f"--rungs {count} for {num_candidates} candidates, which can be halved {useful - 1} times; "
                          f"use 1 to {useful}")  # fmt: skip
    rungs = tuple(steps >> (count - 1 - rung) for rung in range(count))
    if rungs[0] < 1:
        raise ConfigError(
            f"--steps {steps} leaves nothing for the first of {count} rungs; use at least {2 ** (count - 1)}"
        )
    return rungs


def run_sweep(sweep: Sweep, train: Train, tell: Callable[[Values, int, float], None]) -> Outcome:
    """Train, compare and halve. `train` trains what its arguments describe; `tell` hears of every loss."""
    going = list(sweep.candidates)
    losses: dict[Values, tuple[float, ...]] = dict.fromkeys(going, ())
    for rung, steps in enumerate(sweep.rungs):
        for candidate in going:
            loss = _loss_after(sweep, candidate, steps, train)
            losses[candidate] = (*losses[candidate], loss)
            tell(candidate, steps, loss)
        going.sort(key=lambda candidate: losses[candidate][-1])
        if rung < len(sweep.rungs) - 1:
            going = going[: math.ceil(len(going) / 2)]
    last = len(sweep.rungs)
    order = sorted(losses, key=lambda candidate: (last - len(losses[candidate]), losses[candidate][-1]))
    return Outcome(sweep.rungs, losses, tuple(order))


def _loss_after(sweep: Sweep, candidate: Values, steps: int, train: Train) -> float:
    """Return the validation loss of a candidate after `steps`; it is trained if that has not been done before."""
    arguments = arguments_of(sweep, candidate, steps)
    folder = sweep.folder / label(candidate)
    found = _validations(folder)
    if steps not in found:
        train(arguments)
        found = _validations(folder)
    loss = found.get(steps, math.nan)
    return loss if math.isfinite(loss) else math.inf


def arguments_of(sweep: Sweep, candidate: Values, steps: int) -> Arguments:
    """Return the command line of a candidate's run up to `steps`. Raises ConfigError if it cannot run."""
    own = {
        "training.train_steps": str(steps),
        "schedule.decay": "constant",
        "evaluation.interval_steps": str(steps),
        "checkpoint.interval_steps": "0",
        "checkpoint.keep_last": "1",
        "logging.run_directory": str(sweep.folder / label(candidate)),
        "logging.tensorboard": "false",
        "logging.wandb": "off",
        "logging.progress_bar": "false",
    }
    warmup = load_config(sweep.config, sweep.overrides).schedule.warmup_steps
    own["schedule.warmup_steps"] = str(min(warmup, sweep.rungs[0]))
    words = (*sweep.overrides, *(Override(*pair) for pair in (own | dict(candidate)).items()))
    arguments = Arguments(config=sweep.config, deepspeed_config=sweep.deepspeed_config, overrides=words)
    resolve_run(arguments)
    return arguments


def _validations(folder: Path) -> dict[int, float]:
    """Return the validation losses of the decoder by step; none if the run has not begun."""
    events = read_objects(folder / run_folder.EVENTS)
    return {event["step"]: _number(event["lm_loss"]) for event in events if event["event"] == "evaluate"}


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def label(candidate: Values) -> str:
    """Return a candidate's name, also that of its folder."""
    return ",".join(f"{name.rpartition('.')[2]}={value}" for name, value in candidate).replace("/", "_")


def report(outcome: Outcome) -> str:
    """Return the losses as a table, and what follows from them."""
    lines = [f"| candidate | {' | '.join(f'{steps} steps' for steps in outcome.rungs)} |"]
    lines.append("|---" * (len(outcome.rungs) + 1) + "|")
    for candidate in outcome.order:
        losses = [f"{loss:.4f}" for loss in outcome.losses[candidate]]
        losses += [""] * (len(outcome.rungs) - len(losses))
        lines.append(f"| {label(candidate)} | {' | '.join(losses)} |")
    lines += ["", f"Best: {label(outcome.best)}.", *edge_notices(outcome)]
    return "\n".join(lines)


def edge_notices(outcome: Outcome) -> list[str]:
    """Return a sentence for each setting whose best value is the smallest or largest that was tried."""
    found = []
    for name, value in outcome.best:
        tried = sorted(
            {number for candidate in outcome.losses if (number := _as_number(dict(candidate)[name])) is not None}
        )
        number = _as_number(value)
        if len(tried) > 1 and number in (tried[0], tried[-1]):
            side = "smallest" if number == tried[0] else "largest"
            found.append(f"{name}={value} is the {side} that was tried; the best may lie beyond: try more.")
    return found


def _as_number(text: str) -> float | None:
    value = yaml_text.parse(text, text)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def best_configuration(sweep: Sweep, outcome: Outcome) -> str:
    """Return the configuration that was given, with the best values in it, as YAML."""
    chosen = (*sweep.overrides, *(Override(*pair) for pair in outcome.best))
    return dump_config(load_config(sweep.config, chosen))
