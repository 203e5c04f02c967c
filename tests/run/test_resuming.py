"""A run that goes on from a checkpoint says what is new, and refuses what would silently repeat or lose text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_omega.config import check
from megatron_omega.config.load import load_config
from megatron_omega.config.schema import RunConfig
from megatron_omega.data.blending import Blend
from megatron_omega.run.resuming import changes_on_resuming, notices, refusals
from megatron_omega.training.state import TrainState

BASE = {"data.corpora": "[{prefix: /d/a, weight: 3}, {prefix: /d/b}]"}
STATE = TrainState(step=100, consumed_samples=800)


def made(**changes: str) -> RunConfig:
    return load_config(None, BASE | {name.replace("__", "."): text for name, text in changes.items()})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"training__seed": "7"}, "training.seed is 7"),
        ({"data__split": "[90, 9, 1]"}, "data.split"),
        ({"data__decoder_seq_length": "1024"}, "data.decoder_seq_length is 1024"),
        ({"data__order": "megatron"}, "data.order is megatron"),
        ({"data__corpora": "[{prefix: /d/a, weight: 3}]"}, "keep their places"),
        ({"data__corpora": "[{prefix: /d/b, weight: 3}, {prefix: /d/a}]"}, "keep their places"),
        ({"data__corpora": "[{prefix: /d/a, weight: 2}, {prefix: /d/b}]"}, "change them from there on"),
        ({"data__corpora": "[{prefix: /d/a, weight: 3}, {prefix: /d/b}, {prefix: /d/c}]"}, "from_sample: 800 or more"),
        ({"data__reweight": "[{from_sample: 400, weights: [1, 1]}]"}, "change them from there on"),
    ],
)
def test_what_would_repeat_or_lose_text_is_refused(changes: dict[str, str], says: str) -> None:
    finding = refusals(made(), made(**changes), STATE, "/runs/old")[-1]
    assert says in finding and "--checkpoint.load /runs/old" in finding
    assert refusals(made(), made(**changes), TrainState(), "/runs/old") == []


@pytest.mark.parametrize(
    "changes",
    [
        {"data__corpora": "[{prefix: /d/a, weight: 3}, {prefix: /d/b}, {prefix: /d/c, from_sample: 800}]"},
        {"data__corpora": "[{prefix: /d/a, weight: 3}, {prefix: /d/b}, {prefix: /d/c, from_sample: 900, weight: 0}]"},
        {"data__corpora": "[{prefix: /moved/a, weight: 3}, {prefix: /moved/b}]"},
        {"data__reweight": "[{from_sample: 800, weights: [1, 1]}]"},
        {"batch__global_batch_size": "16", "optimizer__learning_rate": "1e-4", "training__train_steps": "5000"},
        {"objective__prefix_lm": "1.0"},
    ],
)
def test_what_changes_nothing_that_was_read_is_told_once(changes: dict[str, str]) -> None:
    assert refusals(made(), made(**changes), STATE, "x") == []
    told = notices(made(), made(**changes), STATE)
    for name in changes:
        assert sum(line.startswith(name.replace("__", ".") + ":") for line in told) == 1


def test_a_jump_of_the_learning_rate_is_told_with_both_values() -> None:
    told = notices(made(schedule__decay="constant"), made(optimizer__learning_rate="1e-5"), STATE)
    assert any("the learning rate of step 101 is 1" in line and "it would have been" in line for line in told)
    assert notices(made(), made(), STATE) == []


def test_in_the_other_order_the_length_of_the_run_counts_too() -> None:
    old, new = made(data__order="megatron"), made(data__order="megatron", training__train_steps="5000")
    assert "training.train_steps is 5000" in refusals(old, new, STATE, "x")[0]


@given(st.integers(1, 400), st.integers(0, 100), st.floats(0.1, 5), st.lists(st.floats(0.1, 5), min_size=1, max_size=3))
def test_a_corpus_that_joins_makes_no_other_repeat(
    consumed: int, later: int, weight: float, weights: list[float]
) -> None:
    corpora = ", ".join(f"{{prefix: /d/{place}, weight: {each}}}" for place, each in enumerate(weights))
    old = made(data__corpora=f"[{corpora}]")
    new = made(data__corpora=f"[{corpora}, {{prefix: /d/new, weight: {weight}, from_sample: {consumed + later}}}]")
    before, after = (Blend(data.phases[0][1], data.phases[1:]) for data in (old.data, new.data))
    seen = [before.locate(sample) for sample in range(consumed)]
    assert seen == [after.locate(sample) for sample in range(consumed)]
    seen += [after.locate(sample) for sample in range(consumed, consumed + later + 100)]
    for corpus in range(len(weights) + 1):
        numbers = [number for each, number in seen if each == corpus]
        assert numbers == list(range(len(numbers)))  # each sample once, none left out


def test_weights_over_time_are_one_table() -> None:
    data = made(
        data__corpora="[{prefix: a}, {prefix: b, weight: 2, from_sample: 50}, {prefix: c, weight: 0, from_sample: 10}]",
        data__reweight="[{from_sample: 20, weights: [4]}, {from_sample: 60, weights: [1, 0, 3]}]",
    ).data
    assert data.phases == ((0, (1, 0, 0)), (10, (1, 0, 0)), (20, (4, 0, 0)), (50, (4, 2, 0)), (60, (1, 0, 3)))


def test_a_blend_of_nothing_is_a_finding() -> None:
    found = check.findings(made(data__corpora="[{prefix: a, from_sample: 5}]"), None, None)
    assert any("from sample 0 on; keep one above 0" in finding for finding in found)


def test_a_folder_without_checkpoints_has_nothing_to_compare(tmp_path: Path) -> None:
    assert changes_on_resuming(made(logging__run_directory=str(tmp_path)), {}) == []
