"""Megatron's indexed shards: `{prefix}.bin` holds the tokens of all documents, `{prefix}.idx` their lengths and places.

Layout of the .idx, little-endian: magic (9 bytes), version u64 = 1, dtype code u8, number of sequences u64, number of
document bounds u64, then from byte 34 int32 lengths [sequences], int64 byte pointers [sequences], int64 document bounds
[documents + 1] in sequences, and int8 modes [sequences] in multimodal shards (ignored here). The pointers are the
cumulative lengths, so a shard opens in constant time whatever its size, and needs no other index.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron_omega.data.checksums import CheckedFile, block_range, num_blocks
from megatron_omega.data.mapped_file import MappedFile
from megatron_omega.data.search import last_not_above
from megatron_omega.errors import DataError

MAGIC: Final = b"MMIDIDX\x00\x00"
_HEADER: Final = struct.Struct("<9sQBQQ")
HEADER_BYTES: Final = _HEADER.size
_DTYPES: Final[dict[int, type[np.generic]]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_TOKEN_CODES: Final = (1, 2, 3, 4, 5, 8)
_UINT16_VOCABULARY: Final = 65500
_CHUNK: Final = 1 << 20


def without_suffix(name: str) -> str:
    """Return the prefix of a shard that is named by its prefix or by one of its files.

    >>> without_suffix("data/text.bin"), without_suffix("data/text")
    ('data/text', 'data/text')
    """
    stem, _, suffix = name.rpartition(".")
    return stem if suffix in ("bin", "idx", "sums", "json") else name


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the type Megatron stores ids of such a vocabulary in: uint16 below 65,500, else int32."""
    return np.dtype("<u2") if vocab_size < _UINT16_VOCABULARY else np.dtype("<i4")


def dtype_code(dtype: DTypeLike) -> int:
    """Return the code of `dtype` in a header."""
    wanted = np.dtype(dtype)
    return next(code for code, known in _DTYPES.items() if np.dtype(known) == wanted)


def header(dtype: DTypeLike, sequences: int, bounds: int) -> bytes:
    """Return the 34 bytes an .idx begins with."""
    return _HEADER.pack(MAGIC, 1, dtype_code(dtype), sequences, bounds)


@dataclass(frozen=True)
class _Layout:
    """Where the arrays of an .idx stand."""

    dtype: np.dtype
    sequences: int
    bounds: int

    @property
    def pointers_at(self) -> int:
        return HEADER_BYTES + 4 * self.sequences

    @property
    def bounds_at(self) -> int:
        return self.pointers_at + 8 * self.sequences

    @property
    def size(self) -> int:
        return self.bounds_at + 8 * self.bounds


class IndexedShard:
    """A read-only, memory-mapped shard. Opens in constant time; picklable (opens again in the other process)."""

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self._index = _map(self.prefix + ".idx")
        self._layout = _read_layout(self._index, self.prefix + ".idx")
        layout, view = self._layout, self._index.data
        self._lengths = view[HEADER_BYTES : layout.pointers_at].cast("i")
        self._pointers = view[layout.pointers_at : layout.bounds_at].cast("q")
        self._bounds = view[layout.bounds_at : layout.size].cast("q")
        self._itemsize = layout.dtype.itemsize
        self._token_map = self._map_tokens()
        self._tokens = self._token_map.array(layout.dtype) if self._token_map else np.empty(0, dtype=layout.dtype)
        self._checked_tokens, self._checked_index = self._open_sums()

    def __reduce__(self) -> tuple[type[IndexedShard], tuple[str]]:
        return type(self), (self.prefix,)

    def __len__(self) -> int:
        """Number of documents."""
        return self._layout.bounds - 1

    @property
    def has_checksums(self) -> bool:
        return self._checked_tokens is not None

    @property
    def dtype(self) -> np.dtype:
        return self._layout.dtype

    @property
    def num_sequences(self) -> int:
        return self._layout.sequences

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    @property
    def is_one_sequence_per_document(self) -> bool:
        return self._layout.bounds - 1 == self._layout.sequences

    def start(self, document: int) -> int:
        """Return the first token of `document` (of the end for `document == len(self)`)."""
        sequence = document if self.is_one_sequence_per_document else self._bounds[document]
        if sequence >= self._layout.sequences:
            return self.num_tokens
        return self._pointers[sequence] // self._itemsize

    def find(self, token: int) -> int:
        """Return the document that holds `token`, by binary search on the pointers."""
        sequence = bisect_right(self._pointers, token * self._itemsize) - 1
        document = sequence if self.is_one_sequence_per_document else bisect_right(self._bounds, sequence) - 1
        if not self.start(document) <= token < self.start(document + 1):
            raise DataError(f"{self.prefix}.idx is damaged near document {document}: its pointers do not ascend")
        return document

    def find_weighted(self, position: int, weight: int, documents: range) -> int:
        """Return the last of `documents` with start + document · weight <= position. The first has to be one such."""
        pointers, itemsize = self._pointers, self._itemsize

        def place(number: int) -> int:
            return pointers[number] // itemsize + number * weight

        def place_by_bounds(number: int) -> int:
            return self.start(number) + number * weight

        value = place if self.is_one_sequence_per_document else place_by_bounds
        end = self.num_tokens + documents.stop * weight
        return last_not_above(value, position, documents.start, documents.stop, end)

    def tokens(self, start: int, stop: int) -> NDArray[np.integer]:
        """Return tokens start..stop of the whole shard, a view on the file."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise DataError(
                f"{self.prefix}.idx points at tokens {start}..{stop}, but {self.prefix}.bin has {self.num_tokens}; "
                "the shard is damaged, make it again"
            )
        first, last = start * self._itemsize, stop * self._itemsize
        if self._checked_tokens is not None:
            first, last = block_range(first, last)
        _advise(self._token_map, "MADV_WILLNEED", first, last)
        if self._checked_tokens is not None:
            self._checked_tokens.check(first, last)
        return self._tokens[start:stop]

    def ids(self, start: int, stop: int, vocab_size: int) -> NDArray[np.int64]:
        """Return tokens start..stop as int64; raise DataError if one is no id of such a vocabulary."""
        tokens = self.tokens(start, stop)
        unsigned = tokens.view(f"<u{self._itemsize}")  # negative ids are large as unsigned
        if len(unsigned) and unsigned.max() >= vocab_size:
            wrong = start + int(np.argmax(unsigned >= vocab_size))
            document = self.find(wrong)
            raise DataError(
                f"{self.prefix}.bin holds token id {self._tokens[wrong]} in document {document} at token "
                f"{wrong - self.start(document)}, beyond the vocabulary of {vocab_size}; "
                "it was made with another tokenizer"
            )
        return tokens.astype(np.int64)

    def check_index(self, first: int, stop: int) -> None:
        """Raise DataError if the index entries of documents first..stop are damaged (shards with checksums only)."""
        if self._checked_index is None:
            return
        if not self.is_one_sequence_per_document:
            bounds = self._layout.bounds_at
            self._check_index_bytes(bounds + 8 * first, bounds + 8 * (stop + 1))
            first, stop = self._bounds[first], self._bounds[stop]
        pointers = self._layout.pointers_at
        self._check_index_bytes(pointers + 8 * first, min(pointers + 8 * (stop + 1), self._layout.bounds_at))

    def _check_index_bytes(self, start: int, stop: int) -> None:
        """Check the blocks of bytes start..stop, asked for at once: page by page they come late."""
        assert self._checked_index is not None
        _advise(self._index, "MADV_WILLNEED", *block_range(start, stop))
        self._checked_index.check(start, stop)

    def check_all(self) -> None:
        """Raise DataError at the first damaged block of the whole shard; needs checksums."""
        if self._checked_index is None or self._checked_tokens is None:
            raise DataError(f"{self.prefix} has no checksums (.sums); shards of other tools have none")
        for mapped in (self._index, self._token_map):
            _advise(mapped, "MADV_SEQUENTIAL")
        self._checked_index.check(0, self._layout.size)
        self._checked_tokens.check(0, self.num_tokens * self._itemsize)

    def document(self, document: int) -> NDArray[np.integer]:
        """Return the tokens of one document, a view on the file."""
        return self.tokens(self.start(document), self.start(document + 1))

    def lengths(self) -> NDArray[np.int64]:
        """Return the number of tokens of every document (this reads the whole index)."""
        lengths = self.lengths_of(0, self.num_sequences).astype(np.int64)
        if self.is_one_sequence_per_document:
            return lengths
        sums = np.concatenate([[0], np.cumsum(lengths)])
        return np.diff(sums[self.bounds_of(0, self._layout.bounds)])

    def lengths_of(self, start: int, stop: int) -> NDArray[np.int32]:
        """Return the tokens of sequences start..stop."""
        return self._entries(self._lengths, HEADER_BYTES, start, stop)

    def pointers_of(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the byte offsets of sequences start..stop."""
        return self._entries(self._pointers, self._layout.pointers_at, start, stop)

    def bounds_of(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the first sequences of documents start..stop (the end counts as a document)."""
        return self._entries(self._bounds, self._layout.bounds_at, start, stop)

    def _entries(self, view: memoryview, begin: int, start: int, stop: int) -> NDArray[Any]:
        """Return entries start..stop of an array of the index that begins at byte `begin`."""
        _advise(self._index, "MADV_WILLNEED", begin + view.itemsize * start, begin + view.itemsize * stop)
        return np.frombuffer(view[start:stop], dtype=f"<i{view.itemsize}")

    def _map_tokens(self) -> MappedFile | None:
        path, layout = Path(self.prefix + ".bin"), self._layout
        if not path.exists():
            raise DataError(f"{path} is missing beside its .idx; copy both files of the shard")
        size = path.stat().st_size
        last = layout.sequences - 1
        needed = 0 if last < 0 else self._pointers[last] + self._lengths[last] * self._itemsize
        if size != needed:
            raise DataError(
                f"{path} has {size} bytes, its index needs {needed}; the shard is cut short or damaged, make it again"
            )
        if layout.bounds and self._bounds[layout.bounds - 1] != layout.sequences:
            raise DataError(f"{self.prefix}.idx is damaged: its last document does not end with the last sequence")
        return _map(str(path)) if size else None

    def _open_sums(self) -> tuple[CheckedFile, CheckedFile] | tuple[None, None]:
        path = Path(self.prefix + ".sums")
        if not path.exists():
            return None, None
        index = self._index.data
        tokens = memoryview(self._tokens.view(np.uint8).data) if len(self._tokens) else memoryview(b"")
        blocks = num_blocks(len(tokens))
        if path.stat().st_size != 8 * (blocks + num_blocks(len(index))):
            raise DataError(
                f"{path} has {path.stat().st_size} bytes, which does not fit the shard; make the shard again"
            )
        sums = _map(str(path)).array("<u8")
        return (
            CheckedFile(self.prefix + ".bin", tokens, sums[:blocks]),
            CheckedFile(self.prefix + ".idx", index, sums[blocks:]),
        )


def _advise(mapped: MappedFile | None, advice: str, start: int = 0, stop: int | None = None) -> None:
    if mapped is not None:
        mapped.advise(advice, start, stop)


def _map(path: str) -> MappedFile:
    try:
        mapped = MappedFile(path)
        _advise(mapped, "MADV_RANDOM")  # reads are far apart: the megabytes that follow one would be read for nothing
        return mapped
    except FileNotFoundError:
        raise DataError(
            f"shard {path} does not exist; a prefix is the path without .bin and .idx, as "
            "megatron-omega preprocess-data printed it"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(
            f"shard {path} cannot be read ({error}); make it again with megatron-omega preprocess-data"
        ) from None


def _read_layout(index: MappedFile, path: str) -> _Layout:
    if len(index) < HEADER_BYTES:
        raise DataError(f"{path} has {len(index)} bytes, too few for a header; the shard is damaged, make it again")
    magic, version, code, sequences, bounds = _HEADER.unpack_from(index.data)
    if magic != MAGIC or version != 1:
        raise DataError(f"{path} is not a Megatron index (magic {magic!r}, version {version})")
    if code not in _TOKEN_CODES:
        raise DataError(f"{path} stores values of type code {code}; tokens are integers (codes {_TOKEN_CODES})")
    layout = _Layout(np.dtype(_DTYPES[code]).newbyteorder("<"), sequences, bounds)
    if len(index) not in (layout.size, layout.size + sequences) or bounds < 1:
        raise DataError(
            f"{path} has {len(index)} bytes, its header promises {layout.size}; the shard is cut short or damaged, "
            "make it again"
        )
    return layout


def write_index(file: IO[bytes], lengths: Iterable[NDArray[np.integer]], dtype: DTypeLike) -> int:
    """Write the .idx of one-sequence documents, block by block, and return the number of tokens.

    `lengths` is iterated twice (a list, or an object that starts again), so the whole never lies in memory.
    """
    itemsize = np.dtype(dtype).itemsize
    documents = sum(len(block) for block in lengths)
    file.write(header(dtype, documents, documents + 1))
    for block in lengths:
        file.write(np.ascontiguousarray(block, dtype="<i4").tobytes())
    total = 0
    for block in lengths:
        sums = np.cumsum(block, dtype=np.int64)
        file.write(((total + sums - block) * itemsize).astype("<i8").tobytes())
        total += int(sums[-1]) if len(sums) else 0
    for start in range(0, documents + 1, _CHUNK):
        file.write(np.arange(start, min(start + _CHUNK, documents + 1), dtype="<i8").tobytes())
    return total


def write_shard(prefix: str | Path, documents: Iterable[Iterable[int]], dtype: DTypeLike) -> None:
    """Write a small shard from token lists in memory (tests, notebooks); the tool for corpora is preprocess-data."""
    lengths: list[int] = []
    with Path(f"{prefix}.bin").open("wb") as file:
        for document in documents:
            tokens = np.asarray(list(document), dtype=dtype)
            file.write(tokens.tobytes())
            lengths.append(len(tokens))
    with Path(f"{prefix}.idx").open("wb") as file:
        write_index(file, [np.asarray(lengths, dtype=np.int32)], dtype)
