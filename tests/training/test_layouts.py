"""Every layout trains to the same figures as one process; a missing all-reduce does not go unnoticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ROOT, TinyCorpus

from megatron_omega.config.arguments import Arguments, Override
from megatron_omega.config.load import load_config
from megatron_omega.parallel import mappings
from megatron_omega.verification import (
    FP32_TOLERANCE,
    check_layout,
    compare,
    every_layout,
    measure,
    parse_layout,
    tolerance_of,
    train_rank,
)

pytestmark = pytest.mark.distributed
STEPS = 10
SMALLER = [Override("optimizer.learning_rate", "2e-3"), Override("model.ffn_hidden_size", "192")]
LAYOUTS = every_layout(load_config(ROOT / "examples/omega-tiny/run.yaml").model)


@pytest.fixture(scope="module")
def reference(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train(tiny_corpus, "tp1", tmp_path_factory.mktemp("reference"))


def train(corpus: TinyCorpus, label: str, folder: Path, *more: Override, **arguments: Any) -> list[dict[str, Any]]:
    return measure(corpus.run_yaml, parse_layout(label), [*SMALLER, *more], steps=STEPS, folder=folder, **arguments)


@pytest.mark.parametrize("label", LAYOUTS)
def test_layout_equals_one_process(
    label: str, reference: list[dict[str, Any]], tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    verdict = compare(label, reference, train(tiny_corpus, label, tmp_path), FP32_TOLERANCE)
    assert len(reference) == STEPS
    assert verdict.passed, verdict.differences


def test_bf16_stays_within_its_tolerance(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    bf16 = [Override("precision.dtype", "bf16")]
    config = check_layout(tiny_corpus.run_yaml, parse_layout("tp1"), bf16, steps=STEPS, folder=tmp_path)
    rows = train(tiny_corpus, "tp1", tmp_path, *bf16)
    verdict = compare("bf16", rows, train(tiny_corpus, "tp2-pp2", tmp_path, *bf16), tolerance_of(config))
    assert verdict.passed, verdict.differences


def train_without_an_all_reduce(arguments: Arguments) -> None:
    """The backward pass of `enter` forgets to add up the ranks' gradients."""

    def forget(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None

    mappings._Copy.backward = staticmethod(forget)
    train_rank(arguments)


def test_a_missing_all_reduce_fails(reference: list[dict[str, Any]], tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    rows = train(tiny_corpus, "tp2", tmp_path, train=train_without_an_all_reduce)
    verdict = compare("tp2", reference, rows, FP32_TOLERANCE)
    assert not verdict.passed
    assert verdict.differences["grad_norm"] > 100 * FP32_TOLERANCE
