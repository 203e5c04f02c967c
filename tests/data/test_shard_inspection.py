"""What a look at a shard reads: where documents came from only if it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_omega.data.indexed import IndexedShard, write_shard
from megatron_omega.data.inspection import check_shard, source_of, statistics
from megatron_omega.data.origins import Origins, origins_path, save_origins, unit_runs
from megatron_omega.errors import DataError


@pytest.fixture
def shard(tmp_path: Path) -> IndexedShard:
    write_shard(tmp_path / "s", [[1, 2, 3], [4], [5, 6]], "uint16")
    save_origins(origins_path(tmp_path / "s"), Origins(("a.jsonl",), unit_runs(0, 0, 0, 3, [])))
    return IndexedShard(tmp_path / "s")


def test_origins_are_read_only_on_request(shard: IndexedShard, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr("megatron_omega.data.inspection.load_origins", asked.append)
    statistics(shard)
    assert asked == []
    check_shard(shard, None)
    source_of(shard, 1)
    assert asked == [shard.prefix, shard.prefix]


def test_damaged_origins_are_in_nobodys_way_until_then(shard: IndexedShard) -> None:
    assert "a.jsonl" in source_of(shard, 1)
    origins_path(shard.prefix).write_bytes(b"PK")
    assert statistics(shard)["documents"] == 3
    for ask in (lambda: check_shard(shard, None), lambda: source_of(shard, 1)):
        with pytest.raises(DataError, match=r"s\.origins\.npz is damaged"):
            ask()
