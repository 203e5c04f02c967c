from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_omega.corpus import join
from megatron_omega.corpus.join import copy_range, first_occurrences
from megatron_omega.data.origins import Origins, join_runs, load_origins, reordered, save_origins, unit_runs
from megatron_omega.errors import DataError


@given(st.lists(st.lists(st.integers(0, 9), max_size=30), min_size=1, max_size=4), st.sampled_from([4, 1 << 20]))
@settings(max_examples=40)
def test_the_first_of_every_hash_is_kept(
    tmp_path_factory: pytest.TempPathFactory, values: list[list[int]], bucket: int
) -> None:
    folder = tmp_path_factory.mktemp("hashes")
    paths = []
    for number, some in enumerate(values):
        paths.append(folder / str(number))
        pairs = [[value * 7919, value] for value in some]
        paths[-1].write_bytes(np.asarray(pairs, dtype="<u8").tobytes())
    flat = [value for some in values for value in some]
    wanted = [place for place, value in enumerate(flat) if value not in flat[:place]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(join, "_BUCKET_DOCUMENTS", bucket)
        assert first_occurrences(paths).tolist() == wanted


def test_ranges_are_copied_without_help_of_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(bytes(range(200)))
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.delattr(join.os, "copy_file_range", raising=False)
        with (tmp_path / "a").open("rb") as source, (tmp_path / name).open("wb") as target:
            copy_range(source, 10, 150, target)
            copy_range(source, 0, 5, target)
        assert (tmp_path / name).read_bytes() == bytes(range(10, 150)) + bytes(range(5))


def test_a_source_that_ends_early_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123")
    with (
        (tmp_path / "a").open("rb") as source,
        (tmp_path / "b").open("wb") as target,
        pytest.raises(OSError, match="early"),
    ):
        copy_range(source, 0, 5, target)


def test_damaged_origins_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.origins.npz"
    save_origins(path, Origins(("f",), unit_runs(0, 0, 0, 9, [4])))
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="a.origins.npz is damaged"):
            load_origins(tmp_path / "a")


@given(st.lists(st.tuples(st.integers(0, 12), st.sets(st.integers(0, 11))), max_size=6))
@settings(max_examples=40)
def test_origins_name_every_record(units: list[tuple[int, set[int]]]) -> None:
    pieces, wanted = [], []
    first_record = 0
    for records, bad in units:
        mine = sorted(position for position in bad if position < records)
        pieces.append(unit_runs(len(wanted), 0, first_record, records, mine))
        wanted += [first_record + position for position in range(records) if position not in mine]
        first_record += records
    origins = Origins(("f",), join_runs(pieces))
    assert [origins.locate(document) for document in range(len(wanted))] == [("f", record) for record in wanted]
    assert len(origins.runs) <= 1 + first_record - len(wanted)
    order = np.random.default_rng(0).permutation(len(wanted))
    if len(order):
        moved = Origins(("f",), reordered(origins, order))
        assert [moved.locate(place)[1] for place in range(len(order))] == [wanted[document] for document in order]
