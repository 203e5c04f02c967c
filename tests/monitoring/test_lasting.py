"""A disk that is full for a while costs lines, which are named, and never the run."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_omega.host.events import append_whole
from megatron_omega.monitoring import lasting
from megatron_omega.monitoring.lasting import Lasting


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(lasting.log, "warning", lambda text, *values: said.append(text % values))
    return said


def fails(number: int) -> Any:
    def write() -> None:
        raise OSError(number, os.strerror(number))

    return write


@pytest.mark.parametrize("number", sorted(lasting.PASSING))
def test_one_warning_and_then_the_gap(number: int, warnings: list[str]) -> None:
    writing = Lasting("metrics.jsonl")
    for step in range(20, 40):
        assert not writing.attempt(fails(number), f"step {step}")
    assert len(warnings) == 1 and os.strerror(number) in warnings[0]
    assert writing.attempt(lambda: None, "step 40")
    assert warnings[1].startswith("metrics.jsonl is written again; missing: 20 lines, step 20 to step 39")
    writing.close()
    assert len(warnings) == 2


def test_what_is_missing_at_the_end_is_named_too(warnings: list[str]) -> None:
    writing = Lasting("events.jsonl")
    writing.attempt(fails(errno.ENOSPC), "save after step 3")
    writing.close()
    assert "could not be written: save after step 3" in warnings[-1]


def test_other_errors_are_errors() -> None:
    with pytest.raises(PermissionError):
        Lasting("x").attempt(fails(errno.EACCES), "step 1")


def test_half_a_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines"
    append_whole(path, b"one\n")
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:2]))
    with pytest.raises(OSError, match="No space left"):
        append_whole(path, b"two\n")
    monkeypatch.undo()
    append_whole(path, b"three\n")
    assert path.read_bytes() == b"one\nthree\n"
