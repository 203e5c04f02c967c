"""A folder has one holder, whatever happens to those who want it, and nobody has to clean up."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tiny import ROOT

from megatron_omega.host import lease as leases
from megatron_omega.host.lease import HeldError, Holder, Lease

WRITER = """
import sys, time
from pathlib import Path
from megatron_omega.host.lease import HeldError, Lease
folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
try:
    lease = Lease.take(folder / ".lease")
except HeldError as error:
    print("held by", error)
    sys.exit(2)
me, mark = sys.argv[3], folder / "writer"
mark.write_text(me)
print("writes", flush=True)
until = time.monotonic() + seconds
while time.monotonic() < until:
    assert mark.read_text() == me, "two writers"
    time.sleep(0.001)
lease.release()
"""


def start(folder: Path, seconds: float, name: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", WRITER, str(folder), str(seconds), name]
    return subprocess.Popen(
        words, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_starts_in_one_folder_ten_times(tmp_path: Path) -> None:
    random.seed(7)
    folder = tmp_path / "run"
    for _ in range(10):
        starts = [start(folder, 30.0, "one")]
        time.sleep(random.random() * 0.12)
        starts.append(start(folder, 30.0, "two"))
        said = {}
        for each in starts:
            assert each.stdout is not None
            said[each] = each.stdout.readline()
        (holder,) = (each for each in starts if said[each] == "writes\n")
        (refused,) = (each for each in starts if each is not holder)
        assert refused.wait(10) == 2 and f"held by process {holder.pid} on " in said[refused]
        holder.kill()  # and the next round begins with what it left
        assert holder.wait() == -signal.SIGKILL
        for each in starts:
            assert each.communicate()[1] == ""
    assert start(folder, 0.0, "last").wait(10) == 0
    assert [path.name for path in folder.iterdir()] == ["writer"]


def test_a_refusal_leaves_no_folder(tmp_path: Path) -> None:
    Lease.take(tmp_path / "a" / "b" / ".lease").release()
    assert list(tmp_path.iterdir()) == []


def elsewhere(path: Path, **changes: str) -> None:
    """Let a process of another host hold the lease."""
    path.write_text(json.dumps(asdict(replace(Holder.this_process(), kernel="another", host="n7", **changes))))


def test_a_holder_on_another_host_is_believed_as_long_as_it_renews(tmp_path: Path) -> None:
    path = tmp_path / ".lease"
    elsewhere(path)
    renewer = subprocess.Popen(["sh", "-c", f"while true; do sleep 0.2; touch -c '{path}'; done"])
    try:
        with pytest.raises(HeldError, match=r"process \d+ on n7"):
            Lease.take(path, lapse_seconds=30.0)
    finally:
        renewer.kill()
        renewer.wait()
    assert "n7" in path.read_text()


def test_a_holder_on_another_host_that_is_silent_is_waited_for_and_replaced(tmp_path: Path) -> None:
    elsewhere(tmp_path / ".lease")
    Lease.take(tmp_path / ".lease", lapse_seconds=1.0).release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"host": 3}'])
def test_a_lease_that_says_nothing_lapses(text: str, tmp_path: Path) -> None:
    (tmp_path / ".lease").write_text(text)
    Lease.take(tmp_path / ".lease", lapse_seconds=0.5).release()


def test_a_number_used_again_is_another_process(tmp_path: Path) -> None:
    mine = Holder.this_process()
    (tmp_path / ".lease").write_text(json.dumps(asdict(replace(mine, started="1"))))
    Lease.take(tmp_path / ".lease").release()


def test_a_holder_learns_that_it_was_replaced(tmp_path: Path) -> None:
    lease = Lease.take(tmp_path / ".lease", renewal_seconds=0.05)
    elsewhere(tmp_path / ".lease")
    until = time.monotonic() + 10.0
    while lease.lost_to is None and time.monotonic() < until:
        time.sleep(0.02)
    assert lease.lost_to is not None and lease.lost_to.host == "n7"
    lease.release()
    assert (tmp_path / ".lease").exists()  # it is the other's


def test_without_locks_and_links_it_holds_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.lockf", refuse)
    monkeypatch.setattr("os.link", refuse)
    monkeypatch.setattr(leases, "_DOUBT_SECONDS", 0.05)
    lease = Lease.take(tmp_path / ".lease")
    with pytest.raises(HeldError):
        Lease.take(tmp_path / ".lease")
    lease.release()
    assert list(tmp_path.iterdir()) == []
