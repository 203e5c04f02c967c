"""In-context examples, of related parts of a document, train alike under every layout and resume bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from resuming import unbroken_and_broken
from tiny import TinyCorpus

from megatron_omega.checkpoint.reader import open_checkpoint
from megatron_omega.config.arguments import Override
from megatron_omega.studies.layouts import FP32_TOLERANCE, compare, measure, parse_layout

pytestmark = pytest.mark.distributed
STEPS, BREAK = 4, 2
FIGURES = ("step", "loss", "lm_loss", "mlm_loss", "grad_norm", "consumed_samples", "consumed_tokens")
SMALL = ("model.ffn_hidden_size=192", "model.hidden_size=48", "model.num_attention_heads=6", "model.head_dim=8")
IN_CONTEXT = ("objective.in_context=2.0", "objective.prefix_lm=1.0")


def overrides(*words: str) -> list[Override]:
    return [Override(*word.split("=", 1)) for word in (*SMALL, *words)]


@pytest.fixture(scope="module")
def reference(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return rows_of(tiny_corpus, "tp1", tmp_path_factory.mktemp("reference"))


def rows_of(corpus: TinyCorpus, label: str, folder: Path, *words: str) -> list[dict[str, Any]]:
    words = words or IN_CONTEXT
    return measure(corpus.run_yaml, parse_layout(label), overrides(*words), steps=STEPS, folder=folder)


@pytest.mark.parametrize("label", ["tp2", "pp2"])
def test_layout_equals_one_process(
    label: str, reference: list[dict[str, Any]], tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    comparison = compare(label, reference, rows_of(tiny_corpus, label, tmp_path), FP32_TOLERANCE)
    assert FP32_TOLERANCE <= 1e-5 and len(reference) == STEPS
    assert comparison.passed, comparison.differences


def test_its_examples_are_others(reference: list[dict[str, Any]], tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    plain = rows_of(tiny_corpus, "tp1", tmp_path, "objective.prefix_lm=1.0")
    assert abs(plain[0]["lm_loss"] - reference[0]["lm_loss"]) > 1e-4  # the same weights, on other questions


def test_resumed_equals_unbroken(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    more = overrides(*IN_CONTEXT, f"checkpoint.interval_steps={BREAK}")
    unbroken, broken = unbroken_and_broken(tiny_corpus.run_yaml, "tp2", more, STEPS, tmp_path)
    expected, found = (_figures(run) for run in (unbroken, broken))
    assert found == expected and [row["step"] for row in found] == list(range(1, STEPS + 1))
    readers = [open_checkpoint(run / f"checkpoints/step-{STEPS:08d}") for run in (unbroken, broken)]
    assert all(torch.equal(readers[0].tensor(name), readers[1].tensor(name)) for name in readers[0].names())


def _figures(run: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: row[name] for name in FIGURES} for row in rows]
