from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_omega.config.load import load_config
from megatron_omega.config.shards import spread_corpora


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size in {"web-0": 300, "web-1": 100, "code": 50}.items():
        (tmp_path / f"{name}.idx").touch()
        (tmp_path / f"{name}.bin").write_bytes(bytes(size))
    return tmp_path


def spread(*corpora: Any) -> Any:
    return spread_corpora({"data": {"corpora": list(corpora)}})["data"]["corpora"]


def test_a_pattern_is_its_shards_by_their_size(folder: Path) -> None:
    found = spread({"prefix": f"{folder}/web-*", "weight": 2, "from_sample": 5}, {"prefix": f"{folder}/code"})
    assert found == [
        {"prefix": f"{folder}/web-0", "weight": 1.5, "from_sample": 5},
        {"prefix": f"{folder}/web-1", "weight": 0.5, "from_sample": 5},
        {"prefix": f"{folder}/code"},
    ]


def test_a_list_may_hold_patterns(folder: Path) -> None:
    found = spread({"prefix": [f"{folder}/code", f"{folder}/web-*"]})
    assert [Path(entry["prefix"]).name for entry in found] == ["code", "web-0", "web-1"]
    assert sum(entry["weight"] for entry in found) == pytest.approx(1.0)


@pytest.mark.parametrize("corpus", [{"prefix": "no/such-*"}, {"prefix": 3}, {"prefix": "x*", "weight": "a"}, "text"])
def test_what_is_no_pattern_of_shards_is_left_for_others_to_judge(corpus: Any) -> None:
    assert spread(corpus) == [corpus]
    assert spread_corpora({"data": {"corpora": corpus}}) == {"data": {"corpora": corpus}}


def test_a_configuration_is_read_with_its_shards(folder: Path) -> None:
    config = load_config({"data": {"corpora": [{"prefix": f"{folder}/web-*"}]}})
    assert [corpus.weight for corpus in config.data.corpora] == [0.75, 0.25]
