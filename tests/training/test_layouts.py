"""Every layout trains to the same figures as one process; a missing all-reduce does not go unnoticed."""

from __future__ import annotations

from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from tiny import ROOT, TinyCorpus

from megatron_omega.config.arguments import Arguments, Override
from megatron_omega.config.load import load_config
from megatron_omega.parallel import tensor_parallel as mappings
from megatron_omega.studies.layouts import (
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
SMALLER = [Override("model.ffn_hidden_size", "192")]
IN_THE_LOSS_ONLY = "tp2-pp2-cut4"  # the last stage uses the token table for nothing else
IMPLIED = {"dp2", "pp2", "tp2", "pp2-dp2", "tp2-dp2", "tp2-pp2", "tp2sp", "zero0", "dp2-zero3"}
"""Left to tools/verify_parallel.py, which runs the whole list: others here combine them."""
LAYOUTS = [
    label for label in every_layout(load_config(ROOT / "examples/omega-tiny/run.yaml").model) if label not in IMPLIED
]


@pytest.fixture(scope="module")
def reference(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train(tiny_corpus, "tp1", tmp_path_factory.mktemp("reference"))


def train(corpus: TinyCorpus, label: str, folder: Path, *more: Override, **arguments: Any) -> list[dict[str, Any]]:
    return measure(corpus.run_yaml, parse_layout(label), [*SMALLER, *more], steps=STEPS, folder=folder, **arguments)


@pytest.mark.parametrize("label", LAYOUTS)
def test_layout_equals_one_process(
    label: str, reference: list[dict[str, Any]], tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    comparison = compare(label, reference, train(tiny_corpus, label, tmp_path), FP32_TOLERANCE)
    assert len(reference) == STEPS
    assert comparison.passed, comparison.differences


def test_bf16_stays_within_its_tolerance(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    bf16 = [Override("precision.dtype", "bf16")]
    config = check_layout(tiny_corpus.run_yaml, parse_layout("tp1"), bf16, steps=STEPS, folder=tmp_path)
    rows = train(tiny_corpus, "tp1", tmp_path, *bf16)
    comparison = compare("bf16", rows, train(tiny_corpus, IN_THE_LOSS_ONLY, tmp_path, *bf16), tolerance_of(config))
    assert comparison.passed, comparison.differences


def train_leaving_one_out(number: int, arguments: Arguments) -> None:
    """Of all all-reduces between layers in the whole run, one is not done: call `number`, on every rank."""
    calls, reduce = count(1), mappings._all_reduce
    mappings._all_reduce = lambda tensor, parallel: tensor if next(calls) == number else reduce(tensor, parallel)
    train_rank(arguments)


@pytest.mark.parametrize("number", [5, 16], ids=["forward", "backward"])  # a micro-batch has 12 forward, then backward
def test_one_all_reduce_left_out_once_fails(
    number: int, reference: list[dict[str, Any]], tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    rows = train(tiny_corpus, "tp2", tmp_path, train=partial(train_leaving_one_out, number))
    comparison = compare("tp2", reference, rows, FP32_TOLERANCE)
    assert not comparison.passed
    assert comparison.differences["grad_norm"] > 10 * FP32_TOLERANCE
