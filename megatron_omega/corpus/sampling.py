"""A sample of text from all of a corpus: every file gives its share by uncompressed bytes, evenly over the file.

Files that can be read from any place (lines of JSON, parquet) give pieces from all over; the others their beginning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from megatron_omega.corpus.inputs import read_unit, units_of
from megatron_omega.corpus.reading.compressed_source import Note, ignore_note
from megatron_omega.corpus.reading.compression import uncompressed_size
from megatron_omega.corpus.reading.input_file import InputFile, Unit
from megatron_omega.corpus.reading.records import BadRecord, BlankLine
from megatron_omega.corpus.reading.tables import column_bytes
from megatron_omega.errors import DataError

_PIECE_BYTES = 1 << 18
_PATIENCE_RECORDS = 10_000


@dataclass
class RecordCount:
    """Records read so far, and what was wrong with the bad ones."""

    max_bad_fraction: float
    records: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, reason: str | None) -> None:
        """Count one record, bad where it has a reason; raise DataError as soon as too many of many are bad."""
        self.records += 1
        if reason is not None:
            self.reasons[reason] += 1
            if self.records >= _PATIENCE_RECORDS:
                self.check()

    def check(self) -> None:
        """Raise DataError if more records are bad than is allowed."""
        bad = self.reasons.total()
        if bad > self.max_bad_fraction * self.records:
            listed = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common(4))
            raise DataError(
                f"{bad} of {self.records} records are bad ({listed}), more than --max-bad-fraction "
                f"{self.max_bad_fraction:g}; mend the input, set --json-keys, or raise the limit"
            )


@dataclass(frozen=True)
class TextSampler:
    """How a sample is taken."""

    files: Sequence[InputFile]
    keys: Sequence[str]
    max_record_bytes: int
    count: RecordCount
    note: Note = ignore_note

    def texts(self, budget: int) -> Iterator[tuple[InputFile, str]]:
        """Yield about `budget` bytes of text, each text with its file; all there is where that is less.

        Raises DataError if too many records are bad; where all are, nothing is yielded and the count says why.
        """
        sizes = [_text_size(file, self.keys) for file in self.files]
        total = max(1, sum(sizes))
        for number, (file, size) in enumerate(zip(self.files, sizes, strict=True)):
            share = budget if budget >= total else budget * size // total
            for text in self._from_file(number, share):
                yield file, text
        if self.count.reasons.total() < self.count.records:
            self.count.check()

    def _from_file(self, number: int, share: int) -> Iterator[str]:
        """Yield `share` bytes of one file: the beginnings of pieces that lie evenly over it."""
        pieces = units_of(number, self.files[number], _PIECE_BYTES)
        wanted = min(len(pieces), -(-share // _PIECE_BYTES) * 4)
        taken = 0
        for place in range(wanted):
            due = share * (place + 1) // wanted
            for text in self._from_piece(pieces[place * len(pieces) // wanted], due - taken):
                taken += len(text.encode())
                yield text

    def _from_piece(self, piece: Unit, budget: int) -> Iterator[str]:
        file = self.files[piece.file]
        for record in read_unit(file, piece, self.keys, self.max_record_bytes, self.note):
            if budget <= 0:
                return
            if isinstance(record, BlankLine):
                continue
            if isinstance(record, BadRecord):
                self.count.add(record.reason)
                continue
            self.count.add(None)
            for text in record.texts:
                kept = text.encode()[: max(0, budget)].decode(errors="ignore")
                budget -= len(text.encode())
                if kept:
                    yield kept


def _text_size(file: InputFile, keys: Sequence[str]) -> int:
    if file.format == "parquet":
        return column_bytes(file, keys)
    return uncompressed_size(file.path, file.compression)
