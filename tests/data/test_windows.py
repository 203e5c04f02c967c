from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_omega.data.indexed import IndexedShard, write_shard
from megatron_omega.data.windows import Windows, WindowShape, split_documents

EOS = 3


def make_windows(path: Path, lengths: list[int], shape: WindowShape, *, with_end: bool = True) -> Windows:
    """Token ids are unique over the shard, so that a test sees what was lost or repeated."""
    ids = iter(range(10, 10**6))
    write_shard(path, ([*(next(ids) for _ in range(length)), *([EOS] * with_end)] for length in lengths), np.int32)
    return Windows(IndexedShard(path), range(len(lengths)), shape, vocab_size=10**6, eos_id=EOS)


@given(st.lists(st.integers(0, 40), min_size=8, max_size=40), st.integers(5, 30), st.integers(0, 8), st.integers(0, 99))
@settings(max_examples=60)
def test_an_epoch_shows_every_token_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], tokens: int, overhead: int, key: int
) -> None:
    windows = make_windows(tmp_path_factory.mktemp("shard") / "s", lengths, WindowShape(tokens, overhead))
    if not len(windows):
        return
    for epoch in range(2):
        seen: Counter[int] = Counter()
        for ordinal in range(epoch * len(windows), (epoch + 1) * len(windows)):
            found_epoch, spans = windows.take(ordinal, key)
            assert found_epoch == epoch
            assert sum(len(span.tokens) for span in spans) <= tokens
            for span in spans:
                whole = windows.shard.document(span.document)
                part = whole[span.offset : span.offset + len(span.tokens)]
                assert span.tokens.tolist() == part.tolist()
                assert span.is_end == (span.offset + len(span.tokens) == len(whole) - 1) or not span.is_end
                seen.update(span.tokens.tolist())
        assert set(seen.values()) <= {1}
        assert sum(lengths) - len(seen) <= tokens, "at most one window may be left over"


def test_epochs_are_cut_and_ordered_differently(tmp_path: Path) -> None:
    windows = make_windows(tmp_path / "s", [50] * 20, WindowShape(37, 3))
    starts = [
        [windows.take(epoch * len(windows) + n, 6)[1][0].tokens[0] for n in range(len(windows))] for epoch in (0, 1)
    ]
    assert set(starts[0]) != set(starts[1])


def test_documents_that_end_are_told_from_those_that_are_cut(tmp_path: Path) -> None:
    windows = make_windows(tmp_path / "s", [10, 10], WindowShape(16, 0))
    assert [(len(span.tokens), span.is_end) for span in windows.spans(0)] == [(10, True), (5, False)]
    bare = make_windows(tmp_path / "b", [10, 10], WindowShape(16, 0), with_end=False)
    assert [(len(span.tokens), span.is_end) for span in bare.spans(0)] == [(10, True), (6, False)]


def test_short_documents_take_more_room(tmp_path: Path) -> None:
    windows = make_windows(tmp_path / "s", [10] * 50, WindowShape(100, 9))
    spans = windows.spans(0)
    assert [span.document for span in spans] == [0, 1, 2, 3, 4]


@given(st.lists(st.integers(0, 40), min_size=8, max_size=30), st.integers(0, 29), st.integers(0, 99))
@settings(max_examples=30)
def test_the_samples_of_a_document_are_found(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], document: int, key: int
) -> None:
    windows = make_windows(tmp_path_factory.mktemp("shard") / "s", lengths, WindowShape(20, 2))
    document, stop = document % len(lengths), 3 * len(windows)
    found = set(windows.ordinals_of(document, key, stop))
    with_text = {n for n in range(stop) if any(span.document == document for span in windows.take(n, key)[1])}
    assert with_text <= found <= set(range(stop))
    assert len(found - with_text) <= 3 * 2  # windows that hold nothing but the end token


def test_windows_go_to_another_process(tmp_path: Path) -> None:
    windows = make_windows(tmp_path / "s", [30] * 10, WindowShape(20, 2))
    other = pickle.loads(pickle.dumps(windows))
    assert [span.tokens.tolist() for span in other.take(3, 1)[1]] == [
        span.tokens.tolist() for span in windows.take(3, 1)[1]
    ]


def test_the_split_is_consecutive_and_complete() -> None:
    assert split_documents(1000, (969, 30, 1)) == [range(969), range(969, 999), range(999, 1000)]
    assert split_documents(10, (1, 0, 1)) == [range(5), range(5, 5), range(5, 10)]
