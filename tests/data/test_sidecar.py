"""A sidecar may be anybody's: every content is read or refused in one sentence."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_omega.data.sidecar import Sidecar, read_sidecar, sidecar_path, to_json
from megatron_omega.data.tokenizer import Tokenizer
from megatron_omega.errors import DataError

SIDECAR = Sidecar("0" * 64, 600, 3, 90, "uint16", "text", {"append_eod": True}, {"bad": {}, "duplicates": 0})


@pytest.mark.parametrize("field", sorted(asdict(SIDECAR)))
def test_a_field_of_another_type_is_named(tmp_path: Path, field: str) -> None:
    for value in (None, True, -1, 2**70, 1.5, ["x"]):
        path = sidecar_path(tmp_path / "t")
        path.write_text(json.dumps({**asdict(SIDECAR), field: value}))
        with pytest.raises(DataError, match=rf"t.json is damaged \({field}"):
            read_sidecar(tmp_path / "t")


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    sidecar_path(tmp_path / "t").write_text(to_json(SIDECAR))
    assert read_sidecar(tmp_path / "t") == SIDECAR and read_sidecar(tmp_path / "u") is None


@pytest.mark.parametrize("content", [b"", b"[" * 9999, b"\xff", b"[1]", b'{"format": "other"}'])
def test_any_content_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    sidecar_path(tmp_path / "t").write_bytes(content)
    with pytest.raises(DataError, match="is damaged"):
        read_sidecar(tmp_path / "t")


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "t.json")
    for path in (tmp_path / "t.json", Path("/dev/zero"), tmp_path):
        with pytest.raises(DataError, match="is no regular file"):
            Tokenizer.open(path)
    with pytest.raises(DataError, match="is no regular file"):
        read_sidecar(tmp_path / "t")


def test_every_changed_byte_is_found_and_the_first_format_is_still_read(tmp_path: Path) -> None:
    path, text = sidecar_path(tmp_path / "t"), to_json(SIDECAR).encode()
    for place in range(len(text)):
        path.write_bytes(text[:place] + bytes([text[place] ^ 1]) + text[place + 1 :])
        with pytest.raises(DataError, match="is damaged"):
            read_sidecar(tmp_path / "t")
    path.write_bytes(b"{" + text[text.index(b"\n") :])
    with pytest.raises(DataError, match="it has no checksum"):
        read_sidecar(tmp_path / "t")
    path.write_bytes(path.read_bytes().replace(b"shard 2", b"shard 1"))
    assert read_sidecar(tmp_path / "t") == replace(SIDECAR, format="megatron-omega shard 1")
