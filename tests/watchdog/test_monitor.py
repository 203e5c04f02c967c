"""The monitor and the hub over real sockets, beside processes that train nothing."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from megatron_omega.watchdog.coordinator import Hub, Limits
from megatron_omega.watchdog.guard import STACK_SIGNAL
from megatron_omega.watchdog.heartbeat import Beacon
from megatron_omega.watchdog.messages import Line, Message
from megatron_omega.watchdog.sealing import enter

RANK = """
import faulthandler, os, signal, socket, subprocess, sys, tempfile, threading, time
sys.path.insert(0, {root!r})
from megatron_omega.watchdog.guard import STACK_SIGNAL
from megatron_omega.watchdog.messages import Line
from megatron_omega.watchdog.heartbeat import Beacon
from megatron_omega.watchdog.ledger import Ledger
rank, directory = int(sys.argv[1]), sys.argv[2]
beacon, stacks, ledger = Beacon.create(), tempfile.TemporaryFile(), Ledger.create()
faulthandler.register(STACK_SIGNAL, file=stacks, all_threads=True, chain=False)
ours, theirs = socket.socketpair()
descriptors = (theirs.fileno(), beacon.descriptor, stacks.fileno(), ledger.descriptor)
subprocess.Popen([sys.executable, "-m", "megatron_omega.watchdog.monitor", *map(str, descriptors)],
                 pass_fds=descriptors, env={{**os.environ, "PYTHONPATH": {root!r}}})
theirs.close()
line = Line(ours)
line.send("watch", rank=rank, local_rank=rank, world_size=2, place=f"pp 0, dp {{rank}}, tp 0", host="here",
          pid=os.getpid(), ident=threading.main_thread().ident, signal=int(STACK_SIGNAL), run_directory=directory,
          master="127.0.0.1", start="this one", start_timeout=30)
line.send("hello", findings=sys.argv[4:], finding_code=3, fingerprint={{}})
go = line.receive()
if go[0]["kind"] == "end":
    os._exit(go[0]["code"])
def obey():
    while True:
        for message in line.receive() or sys.exit():
            os._exit(message["code"]) if message["kind"] == "end" else None
threading.Thread(target=obey, daemon=True).start()
def idle_here():
    print("ready", flush=True)
    while True:
        time.sleep(0.02)
beacon.beat("in a step", step=5, allowed_seconds=0.5 if sys.argv[3] == "hang" else 1e9)
if sys.argv[3] == "fail":
    line.send("failed", message="boom", error="ValueError", trace="Traceback ...", code=1)
if sys.argv[3] == "done":
    line.send("done"); sys.exit(0)
idle_here()
"""


class Pair:
    """Two processes with their monitors."""

    def __init__(self, folder: Path, *modes: str, findings: tuple[str, ...] = ()) -> None:
        root = str(Path(__file__).resolve().parents[2])
        self.log = (folder / "log").open("w+")
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", RANK.format(root=root), str(rank), str(folder), mode, *findings],
                stdout=subprocess.PIPE, stderr=self.log,
            )
            for rank, mode in enumerate(modes)
        ]  # fmt: skip

    def ready(self) -> None:
        for process in self.processes:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"

    def codes(self) -> list[int]:
        try:
            return [process.wait(timeout=60) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
                assert process.stdout is not None
                process.stdout.close()

    def said(self) -> str:
        self.log.seek(0)
        text = self.log.read()
        self.log.close()
        return text


def test_a_killed_rank_ends_the_other(tmp_path: Path) -> None:
    pair = Pair(tmp_path, "idle", "idle")
    pair.ready()
    pair.processes[1].kill()
    assert pair.codes() == [137, -signal.SIGKILL]
    assert "error: rank 1 (pp 0, dp 1, tp 0) on here is gone" in pair.said()
    assert "Lost" in (tmp_path / "events.jsonl").read_text()


def test_a_stopped_rank_is_named_with_its_frame(tmp_path: Path) -> None:
    pair = Pair(tmp_path, "hang", "hang")
    pair.ready()
    os.kill(pair.processes[1].pid, signal.SIGSTOP)
    assert pair.codes() == [76, 76]
    said = pair.said()
    assert "hang: rank 1" in said and "it is stopped (SIGSTOP)" in said and "in idle_here" in said
    assert "idle_here" in (tmp_path / "stacks" / "rank-00001.txt").read_text()


def test_one_failure_is_told_once_and_ends_all(tmp_path: Path) -> None:
    pair = Pair(tmp_path, "idle", "fail")
    assert pair.codes() == [1, 1]
    said = pair.said()
    assert said.count("Traceback ...") == 1
    assert said.rstrip().endswith(
        "error: rank 1 (pp 0, dp 1, tp 0) on here failed while in a step (step 5): ValueError: boom"
    )


def test_findings_stop_everybody_before_the_start(tmp_path: Path) -> None:
    pair = Pair(tmp_path, "idle", "idle", findings=("no corpus",))
    assert pair.codes() == [3, 3]
    assert pair.said().strip() == "error: no corpus"


def test_a_run_that_ends_well_leaves_nothing(tmp_path: Path) -> None:
    pair = Pair(tmp_path, "done", "done")
    assert pair.codes() == [0, 0]
    until = time.monotonic() + 20
    while (tmp_path / ".monitor").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not (tmp_path / ".monitor").exists()
    assert pair.said() == ""


def test_the_beacon_is_read_by_another_process_as_it_was_written() -> None:
    beacon = Beacon.create()
    beacon.beat("validating", step=12, allowed_seconds=3.5)
    read = Beacon(os.dup(beacon.descriptor)).read()
    assert (read.phase, read.step, read.allowed_seconds, read.count) == ("validating", 12, 3.5, 1)
    beacon.beat()
    assert beacon.read().count == 2 and beacon.read().phase == "validating"
    beacon.close()


@pytest.mark.parametrize("cut", [1, 7, 30])
def test_messages_survive_any_cut(cut: int) -> None:
    ours, theirs = socket.socketpair()
    sender, receiver = Line(ours), Line(theirs)
    theirs.settimeout(1.0)
    writer = threading.Thread(target=lambda: [sender.send("beat", number=n, text="x" * 100) for n in range(50)])
    writer.start()
    heard: list[Message] = []
    while len(heard) < 50:
        heard += receiver.receive() or []
    writer.join()
    assert [message["number"] for message in heard] == list(range(50))
    ours.sendall(b'{"kind": "beat"}\n'[:cut])
    assert receiver.receive() == ([] if cut < 17 else [{"kind": "beat"}])
    ours.close()
    assert receiver.receive() is None
    theirs.close()


def test_strangers_are_no_news() -> None:
    ours, theirs = socket.socketpair()
    ours.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert Line(theirs).receive() is None
    ours.close()
    theirs.close()


def test_the_stack_signal_is_nobody_elses() -> None:
    assert signal.SIGRTMIN < STACK_SIGNAL < signal.SIGRTMAX
    with tempfile.TemporaryFile() as file:
        assert file.fileno() > 2


def test_a_hub_takes_a_thousand_ranks(tmp_path: Path) -> None:
    count = 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 3 * count:
        pytest.skip(f"only {hard} files may be open")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    hub = threading.Thread(target=Hub(listener, count, "secret", tmp_path, Limits.of(count, 60.0)).serve)
    hub.start()
    lines = [enter(socket.create_connection(listener.getsockname()), "secret", 30.0) for _ in range(count)]
    for rank, line in enumerate(lines):
        assert line is not None
        line.send("hello", rank=rank, place="here", host=f"h{rank // 8}", pid=1, findings=[],
                  finding_code=2, fingerprint={"code": "same"})  # fmt: skip
    for line in filter(None, lines):
        line.connection.settimeout(30.0)
        heard: list[Message] = []
        while {"kind": "go"} not in heard:  # beats may come before it
            messages = line.receive()
            assert messages
            heard += messages
        line.send("done")
    hub.join(timeout=30.0)
    assert not hub.is_alive()
    for line in filter(None, lines):
        line.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
