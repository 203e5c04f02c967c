"""A sweep keeps the better half, goes on where it was, and ends with the best of what reached the last rung."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tiny import ROOT, TinyCorpus

from megatron_omega.commands import sweep as verb
from megatron_omega.config.arguments import Arguments
from megatron_omega.config.load import load_config
from megatron_omega.errors import ConfigError
from megatron_omega.studies.sweep import (
    RATE,
    Sweep,
    best_configuration,
    candidates_of,
    label,
    report,
    run_sweep,
    rungs_of,
)

CONFIG = ROOT / "examples/omega-tiny/run.yaml"


def sweep_of(folder: Path, rates: list[str], rungs: tuple[int, ...]) -> Sweep:
    return Sweep(CONFIG, (), None, folder, candidates_of(load_config(CONFIG), {RATE: rates}), rungs)


class Pretended:
    """Training whose loss is known: the distance of the rate from .004, less the longer it trains."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int]] = []

    def __call__(self, arguments: Arguments) -> None:
        settings = {override.name: override.text for override in arguments.overrides}
        steps, rate = int(settings["training.train_steps"]), float(settings[RATE])
        self.steps.append((settings[RATE], steps))
        folder = Path(settings["logging.run_directory"])
        folder.mkdir(parents=True, exist_ok=True)
        loss = None if rate > 0.05 else abs(rate - 0.004) + 1 / steps
        with (folder / "events.jsonl").open("a") as file:
            file.write(json.dumps({"event": "evaluate", "step": steps, "lm_loss": loss}) + "\n")


def test_the_better_half_goes_on_and_a_loss_that_is_not_finite_is_the_worst(tmp_path: Path) -> None:
    pretended, rates = Pretended(), ["0.001", "0.1", "0.003", "0.02"]
    outcome = run_sweep(sweep_of(tmp_path, rates, (10, 20, 40)), pretended, lambda *_: None)
    assert pretended.steps == [*((rate, 10) for rate in rates), ("0.003", 20), ("0.001", 20), ("0.003", 40)]
    assert label(outcome.order[0]) == "learning_rate=0.003"
    assert label(outcome.order[-1]) == "learning_rate=0.1"
    assert "| learning_rate=0.003 | 0.1010 | 0.0510 | 0.0260 |" in report(outcome)
    assert "tried" not in report(outcome)


def test_an_interrupted_sweep_does_nothing_twice(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, ["0.001", "0.008"], (10, 20))
    first = run_sweep(sweep, Pretended(), lambda *_: None)
    again = Pretended()
    assert run_sweep(sweep, again, lambda *_: None) == first and again.steps == []


def test_the_best_is_written_and_an_edge_is_told(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, ["0.008", "0.016"], (10,))
    outcome = run_sweep(sweep, Pretended(), lambda *_: None)
    assert "optimizer.learning_rate=0.008 is the smallest that was tried" in report(outcome)
    written = yaml.safe_load(best_configuration(sweep, outcome))
    assert written["optimizer"]["learning_rate"] == 0.008
    assert written["schedule"] == load_config(CONFIG).model_dump(mode="json")["schedule"]


@given(st.integers(1, 40), st.integers(1, 10_000))
def test_rungs_double_and_end_at_the_steps_asked_for(candidates: int, steps: int) -> None:
    count = max(1, min(3, candidates.bit_length(), steps.bit_length()))
    try:
        rungs = rungs_of(steps, count, candidates)
    except ConfigError as error:
        assert "rungs" in str(error)
        return
    assert rungs[-1] == steps and len(rungs) == count
    assert all(2 * first <= second + 1 for first, second in pairwise(rungs))


def test_without_values_rates_around_the_configured_one_are_tried() -> None:
    config = load_config(CONFIG)
    found = [float(value) for ((_, value),) in candidates_of(config, {})]
    assert found == pytest.approx([config.optimizer.learning_rate * 2**power for power in range(-2, 3)])
    with pytest.raises(ConfigError, match="--vary learning_rate: write a setting and its values"):
        verb.read_varied(["learning_rate"])


@pytest.mark.distributed
def test_a_real_sweep_resumes_from_rung_to_rung(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    words = ["--config", str(tiny_corpus.run_yaml), "--output", str(tmp_path), "--steps", "4", "--rungs", "2"]
    words += ["--vary", f"{RATE}=1e-3,1e-6", "--evaluation.num_batches", "1", "--model.ffn_hidden_size", "96"]
    verb.main(words)
    best = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert best["optimizer"]["learning_rate"] == 1e-3
    events = [json.loads(line) for line in (tmp_path / "learning_rate=1e-3" / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "evaluate"] == [0, 2, 4] or (
        [event["step"] for event in events if event["event"] == "start"] == [0, 2]
    )
    assert "| learning_rate=1e-6 |" in (tmp_path / "report.md").read_text()
