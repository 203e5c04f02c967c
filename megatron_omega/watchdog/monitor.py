"""The process beside one rank: `python -m megatron_omega.watchdog.monitor SOCKET BEACON STACKS LEDGER` (descriptors).

It hears from its rank over the socket, reads its beacon and its ledger, and speaks with the hub, which runs as a thread
of rank 0's monitor. It ends soon after its rank, whatever happens, and never outlives the run.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_omega.errors import LOST, HangError
from megatron_omega.host.child_process import ignore_signals
from megatron_omega.host.open_files import allow_many_files
from megatron_omega.watchdog import meeting, sealing
from megatron_omega.watchdog.coordinator import Hub, Limits
from megatron_omega.watchdog.heartbeat import Beacon
from megatron_omega.watchdog.ledger import Ledger
from megatron_omega.watchdog.meeting import Address, Published
from megatron_omega.watchdog.messages import FROM_HUB, Line, Message, is_well_formed
from megatron_omega.watchdog.stacks import Frame, main_thread, waits_for_device

BEAT_SECONDS = 1.0
_MEET_SECONDS = 0.2
_STACK_SECONDS = 2.0
_STACK_BYTES = 1 << 17
_END_SECONDS = 1.5
_CONNECT_SECONDS = 2.0
_PROOF_SECONDS = 5.0
IGNORED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class Monitor:
    """Watches the process `rank` (its parent)."""

    def __init__(self, rank: Line, beacon: Beacon, stacks: int, ledger: Ledger) -> None:
        self._rank = rank
        self._beacon = beacon
        self._stacks = stacks
        self._ledger = ledger
        self._parent = os.getppid()
        self._hub: Line | None = None
        self._hub_heard = 0.0
        self._facts: Message = {}
        self._limits = Limits.of(1, 0.0)
        self._address: Address | None = None
        self._hello: Message | None = None
        self._is_done = False
        self._server: threading.Thread | None = None
        self._published: Published | None = None
        self._said: list[Message] = []

    def run(self) -> None:
        """Watch until the rank is done or gone."""
        selector = selectors.DefaultSelector()
        selector.register(self._rank.connection, selectors.EVENT_READ)
        beaten = 0.0
        started = last = time.monotonic()
        while self._listen_to_rank(selector):
            now = time.monotonic()
            if now - last > BEAT_SECONDS * 4:
                self._hub_heard = now  # this process slept: do not take that for the hub's silence
            last = now
            if self._hub is None and self._hello is not None:
                self._try_to_connect(selector, now - started)
            if self._hub is not None and now - beaten >= BEAT_SECONDS:
                self._hub.send("beat", **self._standing())
                beaten = now
            self._listen_to_hub(selector, now)
        if self._server is not None:
            self._server.join()
        if self._published is not None:
            self._published.withdraw()

    # ---- the rank

    def _listen_to_rank(self, selector: selectors.BaseSelector) -> bool:
        """Hear the rank until something comes or a beat is due; return whether it is still to be watched."""
        ready = {key.fileobj for key, _ in selector.select(BEAT_SECONDS if self._hub else _MEET_SECONDS)}
        if self._rank.connection in ready:
            messages = self._rank.receive()
            for message in messages or ():
                self._take(message)
            if messages is None:
                return self._part()
        if os.getppid() != self._parent:
            return self._part()
        return not self._is_done

    def _take(self, message: Message) -> None:
        kind = message["kind"]
        if kind == "watch":
            self._facts = message
            self._limits = Limits.of(
                message["world_size"],
                message["start_timeout"],
                message.get("silence_seconds"),
                message.get("dump_seconds"),
            )
            if message["rank"] == 0:
                self._start_hub()
        elif kind == "hello":
            self._hello = message
        elif kind == "done":
            self._is_done = True
            self._tell_hub("done")
        elif kind == "failed":
            told = {name: message[name] for name in ("message", "error", "trace", "code")}
            self._tell_hub("failed", phase=self._standing()["phase"], **told)

    def _tell_hub(self, kind: str, **fields: object) -> None:
        if self._hub is not None:
            self._hub.send(kind, **fields)
        else:
            self._said.append({"kind": kind, **fields})

    def _part(self) -> bool:
        """The rank is gone: say so, unless it said goodbye."""
        if not self._is_done:
            self._tell_hub("lost", phase=self._standing()["phase"])
        return False

    def _standing(self) -> Message:
        beat = self._beacon.read()
        age = time.monotonic() - beat.at if beat.count else 0.0
        phase = f"{beat.phase} (step {beat.step})" if beat.step else beat.phase
        allowed = None if beat.allowed_seconds == float("inf") else beat.allowed_seconds
        return {"phase": phase, "step": beat.step, "age": age, "allowed": 1e30 if allowed is None else allowed,
                "state": _process_state(self._parent)}  # fmt: skip

    # ---- the hub

    def _start_hub(self) -> None:
        """Serve as the judge of all ranks. Where that is impossible the ranks say that rank 0 did not arrive."""
        directory = Path(self._facts["run_directory"])
        allow_many_files()
        try:
            listener, self._address = meeting.open_hub(self._facts["master"])
            self._published = meeting.publish(self._address, directory, self._facts["start"])
        except OSError as error:
            sys.stderr.write(f"\nwarning: ranks on other hosts cannot meet rank 0's monitor: {error}\n")
            if self._address is None:
                return
        hub = Hub(listener, self._facts["world_size"], self._address.secret, directory, self._limits)
        self._server = threading.Thread(target=hub.serve, name="hub")
        self._server.start()

    def _try_to_connect(self, selector: selectors.BaseSelector, waited: float) -> None:
        facts = self._facts
        address = self._address or meeting.find_address(Path(facts["run_directory"]), facts["start"])
        hub = None if address is None else _meet(address)
        if hub is not None:
            self._hub, self._hub_heard = hub, time.monotonic()
            selector.register(hub.connection, selectors.EVENT_READ)
            hub.send("hello", **self._introduction())
            for message in self._said:
                hub.send(**message)
        elif waited > facts["start_timeout"] + self._limits.silence_seconds:
            self._end_alone(HangError.exit_code, f"rank 0 did not arrive within {facts['start_timeout']:.0f} s")

    def _introduction(self) -> Message:
        assert self._hello is not None
        facts = {name: self._facts[name] for name in ("rank", "place", "host", "pid")}
        return facts | {name: self._hello[name] for name in ("findings", "finding_code", "fingerprint")}

    def _listen_to_hub(self, selector: selectors.BaseSelector, now: float) -> None:
        if self._hub is None:
            return
        self._hub.connection.settimeout(0.0)
        messages = self._hub.receive()
        self._hub.connection.settimeout(_CONNECT_SECONDS)
        if messages is None or not all(is_well_formed(message, FROM_HUB) for message in messages):
            selector.unregister(self._hub.connection)
            if not self._is_done:
                self._end_alone(LOST, "the connection to rank 0's host is gone")
            return
        for message in messages:
            self._hub_heard = now
            self._obey(message)
        if now - self._hub_heard > self._limits.silence_seconds:
            limit = self._limits.silence_seconds
            self._end_alone(LOST, f"no word from rank 0's host for {limit:.0f} s")

    def _obey(self, message: Message) -> None:
        kind = message["kind"]
        if kind == "go":
            self._rank.send("go")
        elif kind == "dump":
            self._dump(resume=message["resume"])
        elif kind == "end":
            self._end(message["code"])

    def _end_alone(self, code: int, reason: str) -> None:
        """End the rank without the hub's word. One line for each host: nobody is there to speak for all."""
        if self._facts["local_rank"] == 0:
            sys.stderr.write(f"\nerror: {reason}; seen from rank {self._facts['rank']} on {self._facts['host']}\n")
            sys.stderr.flush()
        self._end(code)

    # ---- acting on the rank

    def _dump(self, *, resume: bool) -> None:
        """Send the stack of the rank. One that is stopped writes it only when it goes on."""
        standing = self._standing()
        text, settled = "stopped\n", self._ledger.settled
        if standing["state"] != "T" or resume:
            text = self._written_stack(resume=resume)
        stack = main_thread(text, self._facts["ident"])
        told: Message = {
            "frames": [[frame.file, frame.line, frame.function] for frame in stack],
            "text": text,
            "device": self._ledger.is_busy if self._ledger.settled > settled else self._waits_for_device(stack),
            "rows": [[row.name, row.operation, row.count, row.started, row.finished] for row in self._ledger.read()],
        }
        if self._hub is not None:
            self._hub.send("dump", **self._standing() | {"state": standing["state"]}, **told)

    @property
    def _has_device(self) -> bool:
        return bool(self._facts.get("device"))

    def _waits_for_device(self, stack: Sequence[Frame]) -> bool:
        return self._has_device and waits_for_device(stack)

    def _written_stack(self, *, resume: bool) -> str:
        """Let the rank write its stack and, where it can still do so, what its device has done."""
        before, settled = os.fstat(self._stacks).st_size, self._ledger.settled
        self._signal_main_thread(self._facts["signal"])
        if self._has_device:
            self._rank.send("settle")
        if resume:
            self._signal(signal.SIGCONT)
        until, size = time.monotonic() + _STACK_SECONDS, before
        while time.monotonic() < until:
            time.sleep(0.05)
            now = os.fstat(self._stacks).st_size
            if now > before and now == size and not (self._has_device and self._ledger.settled == settled):
                break
            size = now
        return os.pread(self._stacks, min(size - before, _STACK_BYTES), before).decode(errors="replace")

    def _end(self, code: int) -> None:
        self._is_done = True
        self._rank.send("end", code=code)
        if _process_state(self._parent) == "T":
            self._signal(signal.SIGCONT)
        until = time.monotonic() + _END_SECONDS
        while os.getppid() == self._parent and time.monotonic() < until:
            time.sleep(0.02)
        self._signal(signal.SIGKILL)

    def _signal_main_thread(self, number: int) -> None:
        """Signal the thread whose stack is wanted. Of a process that was stopped any other thread might take a signal
        to all, and the main one would have run on by the time that stacks are written.
        """
        send = getattr(ctypes.CDLL(None), "tgkill", None)  # glibc 2.30 and newer
        if send is None:
            self._signal(number)
        elif os.getppid() == self._parent:
            send(self._parent, self._parent, int(number))

    def _signal(self, number: int) -> None:
        if os.getppid() == self._parent:  # else the number may belong to another process by now
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._parent, number)


def _meet(address: Address) -> Line | None:
    """Connect to the hub, and prove to each other who one is; None where it is not there, or not of this run."""
    try:
        connection = socket.create_connection((address.host, address.port), timeout=_CONNECT_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError:
        return None
    hub = sealing.enter(connection, address.secret, _PROOF_SECONDS)
    if hub is None:
        connection.close()
    else:
        connection.settimeout(_CONNECT_SECONDS)
    return hub


def _process_state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "X"


if __name__ == "__main__":
    ignore_signals(IGNORED_SIGNALS)
    socket_descriptor, beacon_descriptor, stacks_descriptor, ledger_descriptor = map(int, sys.argv[1:5])
    rank_line = Line(socket.socket(fileno=socket_descriptor))
    Monitor(rank_line, Beacon(beacon_descriptor), stacks_descriptor, Ledger(ledger_descriptor)).run()
