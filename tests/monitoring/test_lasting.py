"""A disk that is full for a while costs lines, which are named, and never the run."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_omega.host.json_lines import append_line, read_objects
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
    append_line(path, b"one\n")
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:2]))
    with pytest.raises(OSError, match="No space left"):
        append_line(path, b"two\n")
    monkeypatch.undo()
    append_line(path, b"three\n")
    assert path.read_bytes() == b"one\nthree\n"


def test_half_a_line_of_a_killed_writer_is_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b'{"a":1}\n{"b":' + b"2" * 200_000)
    append_line(path, b'{"c":3}\n')
    assert path.read_bytes() == b'{"a":1}\n{"c":3}\n'


def test_nobody_waits_for_a_stopped_writer_and_nothing_of_it_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b'{"a":1}\n{"b":')
    with path.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        append_line(path, b'{"c":3}\n')
    assert path.read_bytes() == b'{"a":1}\n{"b":\n{"c":3}\n'
    assert [*read_objects(path)] == [{"a": 1}, {"c": 3}]


def test_many_writers_killed_at_any_moment_leave_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    program = (
        "import sys; from pathlib import Path; from megatron_omega.host.json_lines import append_line, read_objects, encode_line\n"
        "print(flush=True)\n"
        "while True: append_line(Path(sys.argv[1]), encode_line({'text': sys.argv[2] * 100_000}))"
    )
    for round_ in range(4):
        writers = [
            subprocess.Popen([sys.executable, "-c", program, str(path), letter], stdout=subprocess.PIPE)
            for letter in "ab"
        ]
        for writer in writers:
            assert writer.stdout is not None and writer.stdout.readline()
        time.sleep(0.03 * (round_ + 1))
        for writer in writers:
            writer.kill()
            writer.communicate()
    append_line(path, b'{"text":"end"}\n')
    lines = path.read_bytes().splitlines()
    assert len(lines) > 8
    # An empty line: on a busy machine a writer did not get the lock in time, and took a line in the making for half a one.
    assert {len(set(json.loads(line)["text"])) for line in lines[:-1] if line} == {1}
