from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_omega.data.checksums import file_sums
from megatron_omega.data.indexed import HEADER_BYTES, IndexedShard, header, token_dtype, write_shard
from megatron_omega.errors import DataError

DOCUMENTS = [[5, 6, 7], [], [8], [9, 10, 11, 12]]


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    write_shard(tmp_path / "s", DOCUMENTS, np.uint16)
    return str(tmp_path / "s")


def add_sums(prefix: str) -> None:
    sums = [file_sums(Path(f"{prefix}.{suffix}")) for suffix in ("bin", "idx")]
    Path(f"{prefix}.sums").write_bytes(np.concatenate(sums).astype("<u8").tobytes())


@given(st.lists(st.lists(st.integers(0, 60000), max_size=9), max_size=9), st.sampled_from([np.uint16, np.int32]))
@settings(max_examples=40)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], dtype: type
) -> None:
    path = tmp_path_factory.mktemp("shard") / "s"
    write_shard(path, documents, dtype)
    shard = IndexedShard(path)
    assert [shard.document(number).tolist() for number in range(len(shard))] == documents
    assert shard.lengths().tolist() == [len(document) for document in documents]
    assert shard.dtype == dtype and shard.num_tokens == sum(map(len, documents))


def test_bytes_are_megatrons(prefix: str) -> None:
    index = Path(f"{prefix}.idx").read_bytes()
    assert index[:34] == b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + b"\x08" + (4).to_bytes(8, "little") + (
        5
    ).to_bytes(8, "little")
    assert np.frombuffer(index[34:50], "<i4").tolist() == [3, 0, 1, 4]
    assert np.frombuffer(index[50:82], "<i8").tolist() == [0, 6, 6, 8]
    assert np.frombuffer(index[82:], "<i8").tolist() == [0, 1, 2, 3, 4]
    assert Path(f"{prefix}.bin").read_bytes() == np.arange(5, 13, dtype="<u2").tobytes()


def test_the_type_follows_megatrons_limit() -> None:
    assert token_dtype(65499) == np.uint16 and token_dtype(65500) == np.int32


def test_find_passes_over_empty_documents(prefix: str) -> None:
    assert [IndexedShard(prefix).find(token) for token in range(8)] == [0, 0, 0, 2, 3, 3, 3, 3]


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(np.arange(6, dtype="<i4").tobytes())
    arrays = [np.array([1, 2, 3], "<i4"), np.array([0, 4, 12], "<i8"), np.array([0, 2, 3], "<i8")]
    (tmp_path / "m.idx").write_bytes(header(np.int32, 3, 3) + b"".join(array.tobytes() for array in arrays))
    shard = IndexedShard(tmp_path / "m")
    assert [shard.document(number).tolist() for number in range(2)] == [[0, 1, 2], [3, 4, 5]]
    assert [shard.find(token) for token in range(6)] == [0, 0, 0, 1, 1, 1]
    assert shard.lengths().tolist() == [3, 3]
    assert shard.find_weighted(13, 10, range(2)) == 1 and shard.find_weighted(12, 10, range(2)) == 0


def test_a_shard_goes_to_another_process(prefix: str) -> None:
    assert pickle.loads(pickle.dumps(IndexedShard(prefix))).document(3).tolist() == DOCUMENTS[3]


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_shard_cut_at_any_byte_is_refused(prefix: str, suffix: str) -> None:
    path = Path(f"{prefix}.{suffix}")
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=f"s.{suffix} "):
            IndexedShard(prefix)


def test_every_flipped_bit_is_found(prefix: str) -> None:
    add_sums(prefix)
    for suffix in ("bin", "idx"):
        path = Path(f"{prefix}.{suffix}")
        whole = bytearray(path.read_bytes())
        for place in range(len(whole) * 8):
            whole[place // 8] ^= 1 << place % 8
            path.write_bytes(whole)
            with pytest.raises(DataError):
                IndexedShard(prefix).check_all()
            whole[place // 8] ^= 1 << place % 8
        path.write_bytes(whole)
    IndexedShard(prefix).check_all()


def test_reading_checks_what_it_reads(prefix: str) -> None:
    add_sums(prefix)
    with Path(f"{prefix}.bin").open("r+b") as file:
        file.write(b"\xff")
    with pytest.raises(DataError, match=r"s.bin is damaged between bytes 0 and 16 \(checksum differs\)"):
        IndexedShard(prefix).tokens(2, 3)


def test_offsets_beyond_the_file_are_refused(prefix: str) -> None:
    with Path(f"{prefix}.idx").open("r+b") as file:
        file.seek(HEADER_BYTES + 4 * 4 + 8 * 3)
        file.write((1 << 40).to_bytes(8, "little"))
    with pytest.raises(DataError, match="its index needs"):
        IndexedShard(prefix)


def test_ids_beyond_the_vocabulary_are_named_with_their_place(prefix: str) -> None:
    shard = IndexedShard(prefix)
    assert shard.ids(0, 8, 13).tolist() == list(range(5, 13))
    with pytest.raises(DataError, match="token id 9 in document 3 at token 0, beyond the vocabulary of 9"):
        shard.ids(2, 8, 9)


def test_negative_ids_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "n", [[1, -2]], np.int32)
    with pytest.raises(DataError, match="token id -2 in document 0 at token 1"):
        IndexedShard(tmp_path / "n").ids(0, 2, 100)


def test_missing_and_foreign_files_are_named(tmp_path: Path, prefix: str) -> None:
    with pytest.raises(DataError, match="shard .*nowhere.idx does not exist"):
        IndexedShard(tmp_path / "nowhere")
    Path(f"{prefix}.bin").unlink()
    with pytest.raises(DataError, match="s.bin is missing beside its .idx"):
        IndexedShard(prefix)
    (tmp_path / "x.idx").write_bytes(b"x" * 60)
    with pytest.raises(DataError, match="is not a Megatron index"):
        IndexedShard(tmp_path / "x")


def test_open_shards_need_no_descriptors(tmp_path: Path) -> None:
    for number in range(40):
        write_shard(tmp_path / f"{number}", [[1, 2, number]], "<u2")
    before = len(list(Path("/proc/self/fd").iterdir()))
    shards = [IndexedShard(tmp_path / f"{number}") for number in range(40)]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
    assert [shard.document(0)[2] for shard in shards] == list(range(40))
