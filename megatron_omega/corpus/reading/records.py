"""One record of a corpus: a `Document`, or the reason why it is none. Knows nothing of files.

A record is lost only for what is wrong with its text: what a strict parser refuses under other keys (NaN, half a
surrogate pair, deep nesting) is asked of a patient one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import orjson

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Document:
    """The texts of one record, in the order of the keys."""

    position: int
    """Number of the record in its unit, from 0."""
    texts: tuple[str, ...]


@dataclass(frozen=True)
class BadRecord:
    """A record without usable text."""

    position: int
    reason: str


@dataclass(frozen=True)
class BlankLine:
    """A line that holds no record; it counts in positions only, so that these stay line numbers."""

    position: int


Record = Document | BadRecord | BlankLine
_MISSING = object()


def parse_line(line: bytes, keys: Sequence[str], position: int) -> Record:
    """Return the document of one line of JSON, or why it has none."""
    if line.startswith(BYTE_ORDER_MARK):
        line = line.removeprefix(BYTE_ORDER_MARK)
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        if not line.strip():
            return BlankLine(position)
        try:
            record = parse_patiently(line)
        except ValueError as error:
            return BadRecord(position, str(error))
    if not isinstance(record, dict):
        return BadRecord(position, "not a JSON object")
    return check_texts([record.get(key, _MISSING) for key in keys], keys, position)


def parse_patiently(line: bytes) -> Any:
    """Return what `line` holds, by a parser that takes what JSON's own grammar does not forbid in passing.

    Raises ValueError with the reason in a few words.
    """
    try:
        return json.loads(line.decode(), parse_int=float)  # whole numbers may be longer than int() takes
    except UnicodeDecodeError:
        raise ValueError("invalid UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError:
        raise ValueError("not JSON") from None


def check_texts(values: Sequence[object], keys: Sequence[str], position: int) -> Document | BadRecord:
    """Return the document of one record's values, or why it has none."""
    for value, key in zip(values, keys, strict=True):
        if value is _MISSING:
            return BadRecord(position, f"key {key!r} missing")
        if value is None:
            return BadRecord(position, f"key {key!r} is null")
        if not isinstance(value, str):
            return BadRecord(position, f"key {key!r} is not a string")
        if not value or value.isspace():
            return BadRecord(position, "empty")
        if "\0" in value:
            return BadRecord(position, "NUL")
        if not value.isascii() and not _is_encodable(value):
            return BadRecord(position, "invalid Unicode in the text")
    return Document(position, tuple(cast(Sequence[str], values)))


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
