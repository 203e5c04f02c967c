"""The monitor of rank 0 as judge of all ranks: gathers what the monitors say, decides once, tells everyone.

    arriving   every monitor says hello with its findings -> `go`, or `end` with the list of what is wrong
    running    a failure: others get a moment to tell theirs, then the first cause is named
               a rank overdue: every stack is dumped, then who is waited for is named
               a monitor silent: its host is named
    ending     all ranks but 0 are ended, the diagnosis is printed, rank 0 is ended: so it is the last word

One thread, one selector, one connection for each rank.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_omega.errors import LOST, ConfigError
from megatron_omega.host import run_folder
from megatron_omega.host.events import append_event
from megatron_omega.host.exclusions import exclude
from megatron_omega.watchdog.diagnosis import (
    Diagnosis,
    Failure,
    Member,
    Standing,
    diagnose_absence,
    diagnose_failure,
    diagnose_hang,
    diagnose_refusal,
    diagnose_silence,
    disagreements,
)
from megatron_omega.watchdog.ledger import Row
from megatron_omega.watchdog.messages import FROM_MONITOR, Line, Message, is_well_formed
from megatron_omega.watchdog.reception import Reception
from megatron_omega.watchdog.stack_files import StackFiles
from megatron_omega.watchdog.stacks import Frame

TICK_SECONDS = 0.2
GREETING_SECONDS = 1.0
FINDINGS_SECONDS = 20.0
"""How long the rest may take to arrive when one rank has said already that the run cannot start."""
GRACE_SECONDS = 1.0
END_SECONDS = 3.0
_OWN_PAUSE_SECONDS = 3.0


@dataclass(frozen=True)
class Limits:
    """How long the hub waits for what, seconds. More ranks are given more time: one process hears them all."""

    start_seconds: float
    silence_seconds: float
    """Without a word from a monitor, after which its host counts as gone."""
    dump_seconds: float
    """For all stacks to arrive, once they are asked for."""

    @staticmethod
    def of(
        num_ranks: int, start_seconds: float, silence_seconds: float | None = None, dump_seconds: float | None = None
    ) -> Limits:
        """Return the limits of a run; what is not given follows from the number of ranks."""
        return Limits(start_seconds, silence_seconds or 10.0 + num_ranks / 200, dump_seconds or 4.0 + num_ranks / 200)


@dataclass
class _Seat:
    """One rank, as the hub knows it."""

    member: Member
    line: Line
    findings: list[str]
    finding_code: int
    fingerprint: dict[str, str]
    heard: float
    phase: str = "starting"
    step: int = 0
    age: float = 0.0
    allowed: float = float("inf")
    state: str = "S"
    is_open: bool = True
    is_done: bool = False
    dump: Standing | None = None
    stack: str | None = None
    """What was dumped last, as text."""

    @property
    def is_overdue(self) -> bool:
        return self.age > self.allowed


class Hub:
    """Judges the ranks of one run. `serve` returns when all are done or ended."""

    def __init__(
        self, listener: socket.socket, world_size: int, secret: str, run_directory: Path, limits: Limits
    ) -> None:
        self._world_size = world_size
        self._run_directory = run_directory
        self._limits = limits
        self._seats: dict[int, _Seat] = {}
        self._seat_of: dict[Line, _Seat] = {}
        self._failures: list[Failure] = []
        self._deadline: float | None = None
        self._dumps_until: float | None = None
        self._patient_until = 0.0
        """Until then somebody else's longer phase lasts, for which those that are overdue wait."""
        self._has_started = False
        self._greeted = 0.0
        self._selector = selectors.DefaultSelector()
        self._reception = Reception(listener, self._selector, secret, world_size)

    def serve(self) -> None:
        """Run until the end of all ranks."""
        begin = last = time.monotonic()
        diagnosis = None
        while diagnosis is None and not self._is_over():
            self._listen()
            now = time.monotonic()
            if now - last > _OWN_PAUSE_SECONDS:  # this process slept, not the others: count from here
                for seat in self._seats.values():
                    seat.heard = now
            last = now
            self._reception.look_around(now)
            self._greet(now)
            diagnosis = self._judge(now, begin)
        self._reception.close()
        if diagnosis is not None:
            self._end(diagnosis)
        for line in [seat.line for seat in self._seats.values()]:
            line.close()
        self._selector.close()

    def _greet(self, now: float) -> None:
        """Let the monitors know that the hub is there: one that is cut off ends its rank by itself."""
        if now - self._greeted >= GREETING_SECONDS:
            self._greeted = now
            for seat in self._seats.values():
                if seat.is_open and not seat.is_done:
                    seat.line.send("beat")

    # ---- hearing

    def _listen(self) -> None:
        """Hear everybody who has something to say, for a moment."""
        for key, _ in self._selector.select(TICK_SECONDS):
            if key.fileobj is self._reception.listener:
                self._reception.accept(time.monotonic())
            elif self._reception.is_guest(key.data):
                self._welcome(key.data)
            elif key.data in self._seat_of:  # else it was turned away since
                self._hear(self._seat_of[key.data])

    def _welcome(self, line: Line) -> None:
        """Give a monitor that has proved itself the seat of its rank, unless there is none or somebody sits there."""
        messages = self._reception.hear(line)
        if not messages:
            return
        message = messages[0]
        member = Member(message["rank"], message["place"], message["host"], message["pid"])
        if member.rank >= self._world_size or member.rank in self._seats:
            self._reception.turn_away(line)
            return
        self._reception.seat(line)
        seat = _Seat(
            member, line, message["findings"], message["finding_code"], message["fingerprint"], time.monotonic()
        )
        self._seats[member.rank] = self._seat_of[line] = seat
        if len(self._seats) == self._world_size:
            self._reception.close()
        self._take(seat, messages[1:])

    def _hear(self, seat: _Seat) -> None:
        self._take(seat, seat.line.receive())

    def _take(self, seat: _Seat, messages: list[Message] | None) -> None:
        for message in messages or ():
            if not is_well_formed(message, FROM_MONITOR):
                messages = None
                break
            self._note(seat, message)
        if messages is None:
            self._selector.unregister(seat.line.connection)
            del self._seat_of[seat.line]
            seat.line.close()
            self._lose(seat)

    def _note(self, seat: _Seat, message: Message) -> None:
        seat.heard = time.monotonic()
        kind = message["kind"]
        if kind in ("beat", "dump"):
            seat.phase, seat.step, seat.state = message["phase"], message["step"], message["state"]
            seat.age, seat.allowed = message["age"], message["allowed"]
        if kind == "dump":
            frames = [Frame(*frame) for frame in message["frames"]]
            rows = [Row(*row) for row in message["rows"]]
            at_device = message["device"]
            seat.dump = Standing(seat.member, seat.phase, seat.step, seat.age, seat.state, frames, rows, at_device)
            seat.stack = message["text"]
        elif kind == "failed":
            self._fail(Failure(seat.member, *(message[k] for k in ("phase", "message", "error", "trace", "code"))))
        elif kind == "lost":
            self._fail(Failure(seat.member, message["phase"], code=LOST))
        elif kind == "done":
            seat.is_done = True

    def _lose(self, seat: _Seat) -> None:
        """A monitor is gone. Where its rank had not said that it was done, the host or both processes were killed."""
        seat.is_open = False
        if not seat.is_done:
            self._fail(Failure(seat.member, seat.phase, code=LOST))

    def _fail(self, failure: Failure) -> None:
        self._failures.append(failure)
        if self._deadline is None:
            self._deadline = time.monotonic() + GRACE_SECONDS

    # ---- judging

    def _is_over(self) -> bool:
        return len(self._seats) == self._world_size and all(seat.is_done for seat in self._seats.values())

    def _judge(self, now: float, begin: float) -> Diagnosis | None:
        if self._deadline is not None and (now >= self._deadline or len(self._failures) == self._world_size):
            return diagnose_failure(self._failures)
        if self._deadline is not None:
            return None
        seats = list(self._seats.values())
        if not self._has_started:
            return self._judge_start(seats, now - begin)
        silent = [seat.member for seat in seats if not seat.is_done and now - seat.heard > self._limits.silence_seconds]
        if silent:
            return diagnose_silence(silent, self._limits.silence_seconds)
        return self._judge_progress([seat for seat in seats if not seat.is_done], now)

    def _judge_start(self, seats: list[_Seat], waited: float) -> Diagnosis | None:
        findings = any(seat.findings for seat in seats)
        if len(seats) < self._world_size and not (findings and waited > FINDINGS_SECONDS):
            limit = self._limits.start_seconds
            if waited < limit:
                return None
            return diagnose_absence([seat.member for seat in seats], self._world_size, limit)
        findings = [(text, seat.finding_code) for seat in seats for text in seat.findings]
        prints = {seat.member.rank: seat.fingerprint for seat in seats}
        findings += [(text, ConfigError.exit_code) for text in disagreements(prints)]
        if findings:
            return diagnose_refusal(findings)
        self._has_started = True
        for seat in seats:
            seat.line.send("go")
        return None

    def _judge_progress(self, seats: list[_Seat], now: float) -> Diagnosis | None:
        if self._dumps_until is None:
            if now >= self._patient_until and any(seat.is_overdue for seat in seats):
                self._dumps_until = now + self._limits.dump_seconds
                for seat in seats:
                    seat.line.send("dump", resume=False)
            return None
        waiting = [seat for seat in seats if seat.dump is None]
        if waiting and now < self._dumps_until:
            return None
        if not any(seat.is_overdue for seat in seats):  # somebody moved on meanwhile: slow, not stuck
            self._dumps_until = None
            for seat in seats:
                seat.dump = None
            return None
        stopped = [seat for seat in seats if seat.dump is not None and seat.dump.state == "T"]
        if not stopped and (left := self._time_left(seats)) > 0:
            self._patient_until, self._dumps_until = now + left, None
            for seat in seats:
                seat.dump = None
            return None
        self._resume_stopped(stopped)
        return self._diagnose_hang(seats)

    def _diagnose_hang(self, seats: list[_Seat]) -> Diagnosis:
        return diagnose_hang([_standing_of(seat) for seat in seats], str(self._stack_folder()))

    def _time_left(self, seats: list[_Seat]) -> float:
        """Return for how long those that the others wait for may do what they do: longer phases are theirs."""
        awaited = [self._seats[rank] for rank in self._diagnose_hang(seats).event["ranks"]]
        return min((seat.allowed - seat.age for seat in awaited), default=0.0)

    def _resume_stopped(self, seats: list[_Seat]) -> None:
        """Let stopped processes go on for the moment in which they write their stacks; others have written theirs."""
        stopped = [seat.dump for seat in seats]
        for seat in seats:
            seat.dump = None
            seat.line.send("dump", resume=True)
        self._listen_while(lambda: any(seat.dump is None for seat in seats), self._limits.dump_seconds)
        for seat, standing in zip(seats, stopped, strict=True):
            if seat.dump is not None and standing is not None:  # it may have moved on then: only its stack counts
                seat.dump = replace(standing, frames=seat.dump.frames)

    # ---- ending

    def _end(self, diagnosis: Diagnosis) -> None:
        others = [seat for rank, seat in self._seats.items() if rank and seat.is_open]
        for seat in others:
            seat.line.send("end", code=diagnosis.code)
        stacks = StackFiles(self._stack_folder(), {r: seat.stack for r, seat in self._seats.items() if seat.stack})
        self._listen_while(lambda: any(seat.is_open for seat in others), END_SECONDS)
        self._record(diagnosis)
        lines: Sequence[str] = (*diagnosis.lines, *stacks.finish())
        text = "\n".join((diagnosis.trace.rstrip(), *lines) if diagnosis.trace else lines)
        sys.stderr.write(f"\n{text}\n")
        sys.stderr.flush()
        if 0 in self._seats:
            self._seats[0].line.send("end", code=diagnosis.code)

    def _listen_while(self, is_awaited: Callable[[], bool], seconds: float) -> None:
        until = time.monotonic() + seconds
        while is_awaited() and time.monotonic() < until:
            self._listen()
            for seat in self._seats.values():
                if seat.is_open:
                    seat.line.flush()

    def _record(self, diagnosis: Diagnosis) -> None:
        exclude(self._run_directory, diagnosis.blamed, diagnosis.reason)
        if not diagnosis.event:
            return
        step = max((seat.step for seat in self._seats.values()), default=0)
        fields = {**diagnosis.event, "verdict": "\n".join(diagnosis.lines), "code": diagnosis.code}
        with contextlib.suppress(OSError):
            append_event(self._run_directory, fields.pop("event"), step, fields)

    def _stack_folder(self) -> Path:
        return self._run_directory / run_folder.STACKS


def _standing_of(seat: _Seat) -> Standing:
    """Return where a rank stands: as its stack says or, where none has arrived, as its last beat did."""
    member, phase, step, age, state = seat.member, seat.phase, seat.step, seat.age, seat.state
    return seat.dump or Standing(member, phase, step, age, state, has_answered=False)
