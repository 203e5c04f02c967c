"""A little of every attack; `make hostile` does all of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from hostile.attacks import TARGETS, Trial, changed_streams, mutated_files, random_configurations

CONFIGURATIONS, MUTATIONS = 25, 2
QUICK = tuple(target for target in TARGETS if not target.is_slow)


def ends(trials: list[Trial]) -> list[str]:
    return [
        f"{trial.name}: {trial.outcome.end}\n{trial.outcome.output[-1500:]}" for trial in trials if not trial.is_right
    ]


def test_no_changed_byte_gives_another_text(tmp_path: Path) -> None:
    counts = Counter(end for _, end in changed_streams(tmp_path, 1))
    assert set(counts) == {"refused", "same text"} and counts["refused"] > counts["same text"]


def test_random_configurations_end_with_a_sentence(tmp_path: Path) -> None:
    assert ends(list(random_configurations(tmp_path, CONFIGURATIONS, seed=1))) == []


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_mutated_files_end_with_a_sentence(tmp_path: Path) -> None:
    assert ends(list(mutated_files(tmp_path, MUTATIONS, QUICK, seed=1))) == []
