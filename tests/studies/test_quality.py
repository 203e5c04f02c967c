"""The instrument measures what it says, on the same windows for every model, and does nothing twice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import TinyCorpus
from written_models import VOCAB_SIZE, tiny_config, tiny_model, tiny_tokenizer

from megatron_omega.errors import ConfigError
from megatron_omega.model.omega import vocabulary_logits
from megatron_omega.studies import quality
from megatron_omega.studies.held_out import HeldOut, measure, paired
from megatron_omega.studies.quality import Study, Trial, overrides_of, read_study, run_study, trials
from megatron_omega.studies.quality_report import at_budget, best_rates, write_report

SPECIAL = tiny_tokenizer().special


def windows(count: int = 5, prefix: int = 11, continuation: int = 9) -> HeldOut:
    random = np.random.default_rng(3)
    tokens = random.integers(150, VOCAB_SIZE, (count, prefix + continuation))
    masked = np.zeros((count, prefix), dtype=np.bool_)
    masked[:, 2:5] = True
    return HeldOut(tokens[:, :prefix], tokens[:, prefix:], masked, 100)


def test_the_loss_is_the_cross_entropy_of_the_continuation_alone() -> None:
    model, held = tiny_model(tiny_config()), windows()
    found = measure(model, held, SPECIAL)
    losses = []
    for prefix, continuation in zip(held.prefixes, held.continuations, strict=True):
        encoder = torch.tensor([[SPECIAL.modes.prefix, *prefix]])
        opening = prefix[-model.context.model.decoder_overlap :]
        decoder = torch.tensor([[*opening, *continuation[:-1]]])
        hidden = model.hidden((encoder, torch.ones_like(encoder), decoder, torch.ones_like(decoder)))[0]
        labels = torch.from_numpy(continuation)
        logits = vocabulary_logits(model, hidden)[0, len(opening) - 1 :]
        losses.append(F.cross_entropy(logits, labels, reduction="none"))
    expected = torch.stack(losses)
    assert found["loss"] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert found["loss_first"] == pytest.approx(expected[:, 0].mean().item(), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(expected.sum().item() / 100 / math.log(2), rel=1e-5)


def test_the_encoders_gain_is_nothing_for_a_model_that_does_not_look_at_its_context() -> None:
    model = tiny_model(tiny_config(model={"decoder_overlap": 3}))
    assert abs(measure(model, windows(), SPECIAL)["encoder_gain"]) > 1e-4
    for name, parameter in model.named_parameters():
        if "cross.out" in name:
            parameter.zero_()
    assert measure(model, windows(), SPECIAL)["encoder_gain"] == pytest.approx(0, abs=1e-6)


def test_a_head_with_one_answer_is_seen() -> None:
    model = tiny_model(tiny_config())
    head: Any = model.module_named("head")
    head.output_bias[7] = 1e3
    found = measure(model, windows(), SPECIAL)
    assert found["mlm_commonest_answer"] == 1 and found["mlm_accuracy"] == 0


def test_a_decoder_only_model_reads_the_context_in_the_decoder() -> None:
    model, held = tiny_model(tiny_config(model={"encoder_layers": 0})), windows(2)
    found = measure(model, held, SPECIAL)
    ids = torch.tensor([[SPECIAL.bos, *held.prefixes[0], *held.continuations[0][:-1]]])
    logits = vocabulary_logits(model, model.hidden((ids, torch.ones_like(ids)))[0])[0, -9:]
    first = F.cross_entropy(logits[:1], torch.from_numpy(held.continuations[0, :1]))
    other = measure(model, HeldOut(held.prefixes[:1], held.continuations[:1], held.is_masked[:1], 9), SPECIAL)
    assert other["loss_first"] == pytest.approx(first.item(), rel=1e-5) and "mlm_loss" not in found


def test_differences_are_paired_by_seed() -> None:
    mean, error, count = paired({1: 1.0, 2: 2.0, 3: 9.0}, {1: 0.5, 2: 1.3})
    assert (mean, count) == (pytest.approx(0.6), 2) and error == pytest.approx(0.1)
    assert math.isnan(paired({1: 1.0}, {1: 0.0})[1])


def study(**fields: Any) -> Study:
    values = {"config": "run.yaml", "arms": {"a": {}, "b": {"optimizer.learning_rate": 0.5}}, "rates": [1e-3, 2e-3]}
    return Study.model_validate(values | {"seeds": [1, 2], "steps": [10, 25]} | fields)


def test_an_arm_may_fix_its_rate_and_all_have_the_same_seeds() -> None:
    found = list(trials(study()))
    assert found[:3] == [Trial("a", 1e-3, 1), Trial("a", 2e-3, 1), Trial("b", 0.5, 1)] and len(found) == 6
    settings = {override.name: override.text for override in overrides_of(study(), found[0], Path("x"))}
    assert settings["checkpoint.interval_steps"] == "5" and settings["training.train_steps"] == "25"


def test_a_study_goes_on_with_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def pretended(study: Study, trial: Trial, folder: Path) -> list[dict[str, Any]]:
        ran.append(trial.label)
        loss = trial.rate * 100 + trial.seed / 10
        head = {"arm": trial.arm, "rate": trial.rate, "seed": trial.seed, "parameters": 5, "clipped": 0.0}
        spent = ({"step": step, "cpu": step, "tokens": step, "labels": step} for step in study.steps)
        return [head | row | {"loss": loss + 1 / row["step"], "gain": 0.1, "loss_first": 1.0, "bits_per_byte": 1.0}
                for row in spent]  # fmt: skip

    monkeypatch.setattr(quality, "run_trial", pretended)
    monkeypatch.setattr(quality, "_references", lambda _: {"unigram": 5.0})
    assert len(list(run_study(study(seeds=[1]), tmp_path))) == 3
    assert [trial.seed for trial, _ in run_study(study(), tmp_path)] == [2, 2, 2] and len(ran) == 6
    rows = [json.loads(line) for line in (tmp_path / "measures.jsonl").read_text().splitlines()]
    assert best_rates(rows) == {"a": 1e-3, "b": 0.5}
    page = write_report(tmp_path).read_text()
    assert "| b | +49.900 ± 0.000 |" in page and "unigram 5.000" in page and (tmp_path / "curves.png").exists()
    assert at_budget([(10, 1.0), (1000, 3.0)], 100) == pytest.approx(2.0)


def test_a_faulty_study_is_told_with_every_finding(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("config: run.yaml\nrates: []\nseeds: [1]\nsteps: [1]\nnope: 1\n")
    with pytest.raises(ConfigError) as raised:
        read_study(tmp_path / "study.yaml")
    assert len(raised.value.findings) == 3


@pytest.mark.distributed
def test_a_trial_is_a_real_run(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    small = {"model.ffn_hidden_size": 96, "schedule.warmup_steps": 1, "data.split": [80, 19, 1]}
    made = study(
        config=str(tiny_corpus.run_yaml), settings=small, arms={"a": {}}, rates=[1e-3], seeds=[1], steps=[2, 4],
        windows=6, prefix_tokens=30, continuation_tokens=30,
    )  # fmt: skip
    ((trial, rows),) = run_study(made, tmp_path)
    assert [row["step"] for row in rows] == [2, 4] and rows[1]["cpu"] > rows[0]["cpu"] > 0
    assert 5 < rows[1]["loss"] < 8 and rows[0]["labels"] * 2 == rows[1]["labels"]
    assert not (tmp_path / trial.label).exists()
