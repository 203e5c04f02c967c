"""What a file is: its compression and its format, told from its content, and from its name where content cannot tell.

What cannot be read as records (archives, a JSON value over many lines, a pointer in the place of the file) is refused
by its name, never read as lines or as a document.
"""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path

import orjson

from megatron_omega.corpus.reading.compressed_source import Compression
from megatron_omega.corpus.reading.compression import SUFFIXES, open_binary
from megatron_omega.corpus.reading.input_file import Format, InputFile
from megatron_omega.corpus.reading.records import BYTE_ORDER_MARK
from megatron_omega.errors import DataError

FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".ldjson": "jsonl",
    ".jl": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_HEAD_BYTES = 1 << 16
_SIGNATURES: dict[Compression, re.Pattern[bytes]] = {
    "gz": re.compile(rb"\x1f\x8b\x08"),
    "zst": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
    "bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)"),
}
_BINARY_FORMATS: dict[bytes, Format] = {b"PAR1": "parquet", b"ARROW1": "arrow"}
_UNPACK = "unpack it and name its files"
_REFUSED = {
    re.compile(rb"PK(\x03\x04|\x05\x06|\x07\x08)"): ("a zip archive", _UNPACK),
    re.compile(rb".{257}ustar", re.DOTALL): ("a tar archive", _UNPACK),
    re.compile(rb"7z\xbc\xaf\x27\x1c"): ("a 7z archive", _UNPACK),
    re.compile(rb"Rar!\x1a\x07"): ("a rar archive", _UNPACK),
    re.compile(rb"\x04\x22\x4d\x18"): ("compressed with lz4", "compress it with zstd, gzip, xz or bzip2 instead"),
    re.compile(rb"version https://git-lfs\.github\.com/spec/"): (
        "a pointer of Git LFS, not the file itself",
        "get it with git lfs pull",
    ),
}


def describe(path: Path, forced: Format | None = None) -> InputFile:
    """Tell what a file is; a file that is nothing else is plain text. `forced` overrides the format, not compression.

    Raises DataError if it cannot be read as records.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(
                f"input {path} is no regular file; only these are opened, pipe others in with --input - (lines of JSON)"
            )
        compression = _compression(path)
        inner = path.with_suffix("") if path.suffix.lower() in SUFFIXES else path
        named = FORMATS.get(inner.suffix.lower())
        head = _head(path, compression)
    except OSError as error:
        raise DataError(f"input {path} cannot be read ({error.strerror}); mend it or leave it out") from None
    _refuse_strangers(path, head)
    format_ = forced or named or _recognised(head, inner.suffix.lower())
    if format_ == "jsonl" and not forced:
        _refuse_json_over_lines(path, head)
    if compression and format_ in ("parquet", "arrow"):
        raise DataError(f"{path} is a compressed {format_} file, which cannot be read in parts; decompress it first")
    return InputFile(str(path), format_, compression, status.st_size, status.st_mtime_ns)


def _compression(path: Path) -> Compression:
    """Return the compression that the content has; DataError where the name promises another."""
    with path.open("rb") as file:
        start = file.read(16)
    matching: list[Compression] = [name for name, pattern in _SIGNATURES.items() if pattern.match(start)]
    found = matching[0] if matching else ""
    promised = SUFFIXES.get(path.suffix.lower(), "")
    if promised and found != promised:
        what = f"it begins with {start[:6].hex()}" if start else "it is empty"
        raise DataError(f"{path} is no {promised} file, though its name says so ({what}); restore or rename it")
    return found


def _head(path: Path, compression: Compression) -> bytes:
    with open_binary(str(path), compression) as file:
        return file.read(_HEAD_BYTES)


def _refuse_strangers(path: Path, head: bytes) -> None:
    for pattern, (what, advice) in _REFUSED.items():
        if pattern.match(head):
            raise DataError(f"input {path} is {what}; {advice}")


def _recognised(head: bytes, suffix: str) -> Format:
    """Return the format of a file whose name says nothing, or the suffix of some text (a notebook is JSON and text)."""
    for magic, format_ in _BINARY_FORMATS.items():
        if head.startswith(magic):
            return format_
    lines = _first_lines(head)
    is_json = bool(lines) and all(_starts_object(line, is_whole) for line, is_whole in lines)
    return "jsonl" if is_json or (suffix in ("", ".txt") and _json_over_lines(head)) else "text"


def _first_lines(head: bytes, number: int = 2) -> list[tuple[bytes, bool]]:
    """Return the first lines that are not blank, each with whether its end was seen."""
    is_all = len(head) < _HEAD_BYTES
    lines = head.removeprefix(BYTE_ORDER_MARK).splitlines(keepends=True)
    found = [(line.strip(), is_all or line.endswith(b"\n")) for line in lines]
    return [(line, is_whole) for line, is_whole in found if line][:number]


def _starts_object(line: bytes, is_whole: bool) -> bool:
    if not is_whole:
        return re.match(rb'\{\s*"', line) is not None
    return isinstance(_parsed(line), dict)


def _parsed(line: bytes) -> object:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(line.decode(errors="replace"), parse_int=float)
    except (ValueError, RecursionError):
        return None


def _refuse_json_over_lines(path: Path, head: bytes) -> None:
    kind = _json_over_lines(head)
    if kind:
        query = "'.[]'" if kind == "array" else "."
        raise DataError(
            f"input {path} holds JSON values over many lines or one array, not JSON Lines; write each record on a line "
            f"of its own: jq -c {query} IN > OUT.jsonl"
        )


def _json_over_lines(head: bytes) -> str:
    """Return "array" or "object" where the file begins with one that is not a line of JSON Lines; else nothing."""
    lines = _first_lines(head)
    if not lines or lines[0][0][:1] not in (b"{", b"["):
        return ""
    first, is_whole = lines[0]
    is_array = first.startswith(b"[")
    if not is_whole:
        return "array" if is_array and re.match(rb'\[\s*[\[{"]', first) else ""
    if _parsed(first) is not None:
        return "array" if is_array and len(lines) == 1 and re.match(rb"\[\s*\{", first) else ""
    if re.fullmatch(rb'[\[{]\s*|\[\s*\{.*|\{\s*"(\\.|[^"\\])*"\s*:.*[,{\[]', first):
        return _kind_of_continued(head, is_array)
    return ""


def _kind_of_continued(head: bytes, is_array: bool) -> str:
    """Return the kind of a value whose first line is none by itself, if the following lines go on with it."""
    text = head.removeprefix(BYTE_ORDER_MARK).decode(errors="replace").lstrip()
    try:
        json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        is_cut = len(head) == _HEAD_BYTES and error.pos > len(text) - 8
        if not is_cut and "Unterminated string" not in error.msg:
            return ""
    except RecursionError:
        return ""
    return "array" if is_array else "object"
