"""The supervisor with ranks of files: what it returns, when it starts again, what it leaves behind (nothing)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from tiny import ROOT

HERE = Path(__file__).parent


@contextmanager
def supervised(folder: Path, ranks: int = 3, restarts: int = 3, **plan: object) -> Iterator[subprocess.Popen[str]]:
    """A supervisor in a process group of its own, its ranks waiting at the plan's `hold`."""
    (folder / "plan.json").write_text(json.dumps(plan))
    words = [sys.executable, HERE / "supervise_stub.py", folder, str(ranks), str(restarts)]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, env=environ, text=True, stderr=subprocess.PIPE, start_new_session=True)
    try:
        if "hold" in plan:
            until((folder / f"checkpoints/step-{plan['hold']:08d}/manifest.json").exists)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not come to pass in a minute"
        time.sleep(0.02)


def outcome(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return exit code and log of a supervisor."""
    _, said = process.communicate(timeout=60)
    assert "Traceback" not in said, said
    return process.returncode, said


def turns(folder: Path) -> int:
    return len((folder / "started-0").read_text().splitlines())


def pids(folder: Path) -> list[int]:
    lines = [line for path in folder.glob("started-*") for line in path.read_text().splitlines()]
    return [int(line.split()[-1]) for line in lines] + [int(p.read_text()) for p in folder.glob("lingering-*")]


def nobody_is_left(folder: Path) -> bool:
    return all(not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie" for pid in pids(folder))


def test_a_run_is_done(tmp_path: Path) -> None:
    with supervised(tmp_path, linger=True) as process:
        code, said = outcome(process)
    assert code == 0 and turns(tmp_path) == 1 and "the run is done" in said
    assert nobody_is_left(tmp_path)


@pytest.mark.parametrize("code", [-signal.SIGKILL, -signal.SIGSEGV, 76])
def test_a_run_comes_back_after_a_failure(tmp_path: Path, code: int) -> None:
    with supervised(tmp_path, exit=[1, code]) as process:
        returned, said = outcome(process)
    assert returned == 0 and turns(tmp_path) == 2 and "started again" in said
    assert nobody_is_left(tmp_path)


def test_a_run_does_not_come_back_for_ever(tmp_path: Path) -> None:
    with supervised(tmp_path, restarts=1, exit=[2, -signal.SIGKILL], always=True) as process:
        returned, said = outcome(process)
    assert returned == 137 and "not started again" in said
    assert turns(tmp_path) == 2


@pytest.mark.parametrize("code", [1, 2, 3, 4])
def test_a_mistake_is_not_started_again(tmp_path: Path, code: int) -> None:
    with supervised(tmp_path, exit=[1, code]) as process:
        assert outcome(process)[0] == code
    assert turns(tmp_path) == 1 and nobody_is_left(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_request_to_stop_reaches_the_ranks(tmp_path: Path, number: signal.Signals) -> None:
    with supervised(tmp_path, hold=2, steps=5) as process:
        process.send_signal(number)
        process.send_signal(signal.SIGUSR1)  # a second one does no harm
        code, said = outcome(process)
    assert code == 75 and turns(tmp_path) == 1 and "has saved" in said
    with supervised(tmp_path, steps=5) as process:
        assert outcome(process)[0] == 0
    assert [line.split()[2] for line in (tmp_path / "started-0").read_text().splitlines()] == ["0", "2"]


def test_a_request_to_the_group_is_survived_too(tmp_path: Path) -> None:
    """As from a terminal, or from `kill -- -GROUP`: supervisor and ranks get it."""
    with supervised(tmp_path, hold=2) as process:
        os.killpg(process.pid, signal.SIGTERM)
        assert outcome(process)[0] == 75


@pytest.mark.parametrize("whole_group", [False, True], ids=["the supervisor", "its group"])
def test_a_kill_leaves_nothing_behind(tmp_path: Path, whole_group: bool) -> None:
    with supervised(tmp_path, hold=1, linger=whole_group) as process:
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        until(lambda: nobody_is_left(tmp_path))
