"""The training process's side: requests to stop, and what a rank tells its monitor and is told by it.

Signals are read by a thread from the interpreter's wake-up descriptor, so they are seen even while the main thread is
stuck inside a collective. Before the first step there is nothing to save and a request to stop ends the process;
afterwards it is a wish that all ranks agree on at the next step (`resilience.stopping`).
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import selectors
import signal
import socket
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

from megatron_omega.config.layout import layout_of, ranks_per_replica
from megatron_omega.config.schema import RunConfig
from megatron_omega.errors import BUG, OmegaError, Preempted
from megatron_omega.host.child_process import start_python
from megatron_omega.host.environment import ProcessPlace, has_gpu, meeting_host, meeting_point
from megatron_omega.host.redaction import redact
from megatron_omega.watchdog.heartbeat import Beacon
from megatron_omega.watchdog.ledger import Ledger
from megatron_omega.watchdog.messages import Line, Message
from megatron_omega.watchdog.monitor import IGNORED_SIGNALS

STACK_SIGNAL = signal.SIGRTMIN + 3
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_END_SECONDS = 15.0


class Guard:
    """Stands guard over one rank's training; a context manager around all of it.

    An exception that leaves it ends all ranks: the monitors name this rank and its error, once.
    """

    def __init__(self, config: RunConfig, place: ProcessPlace) -> None:
        self.beacon = Beacon.create()
        self.ledger = Ledger.create()
        self.ask_device: Callable[[], tuple[bool, Mapping[str, tuple[int, int]]]] | None = None
        """Says whether the device has work left, and how many messages of each name it has started and finished."""
        self.started = time.monotonic()
        self._config = config
        self._place = place
        self._line: Line | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._stacks = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        self._wakeup, self._waker = socket.socketpair()
        self._go = threading.Event()
        self._is_armed = False
        self._is_over = False
        self._signal = 0
        self._restore: list[Any] = []
        self._at_end: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._listen, name="guard", daemon=True)

    # ---- what training asks

    def arm(self) -> None:
        """From now on a signal is a wish to save and stop, no longer the end at once."""
        self._is_armed = True

    def at_end(self, action: Callable[[], None]) -> None:
        """Let `action`, which must be short, be done once when this rank ends, by itself or because it is told to."""
        self._at_end.append(action)

    @property
    def stop_signal(self) -> int:
        """The signal that asked this rank to stop; 0 where none did."""
        return self._signal

    def arrive(self, findings: Sequence[str], finding_code: int, fingerprint: Mapping[str, str]) -> None:
        """Wait until every rank has arrived and none has a finding that speaks against the start.

        Raises OmegaError with this process's findings where there is no monitor to gather those of all ranks.
        """
        if self._line is None:
            if findings:
                raise _as_error(findings, finding_code)
            return
        self._line.send("hello", findings=list(findings), finding_code=finding_code, fingerprint=dict(fingerprint))
        self._go.wait()
        allowed = self._config.resilience.start_timeout_seconds
        self.beacon.beat("starting", allowed_seconds=allowed)

    # ---- guard

    def __enter__(self) -> Self:
        self._waker.setblocking(False)
        before = signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        self._restore.append((signal.set_wakeup_fd, (before,)))
        for number in STOP_SIGNALS:
            self._restore.append((signal.signal, (number, signal.signal(number, _leave_to_the_thread))))
        if self._config.resilience.monitor and self._place.world_size > 1:
            self._start_monitor()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._line is not None:
            if error is None or isinstance(error, Preempted):
                self._line.send("done")
            elif kind is not None:
                self._report(error)
        self._is_over = True
        with contextlib.suppress(OSError):
            self._waker.send(b"\0")
        self._thread.join(timeout=1.0)
        for function, arguments in reversed(self._restore):
            function(*arguments)
        if isinstance(error, Preempted):
            for number in STOP_SIGNALS:  # all is saved: a second request is granted already
                signal.signal(number, signal.SIG_IGN)
        if self._line is not None:
            faulthandler.unregister(STACK_SIGNAL)
            self._line.close()
        self._finish()

    def _finish(self) -> None:
        while self._at_end:
            with contextlib.suppress(Exception):  # the process ends, one way or another
                self._at_end.pop()()

    def _start_monitor(self) -> None:
        faulthandler.register(STACK_SIGNAL, file=self._stacks, all_threads=True, chain=False)
        ours, theirs = socket.socketpair()
        descriptors = (theirs.fileno(), self.beacon.descriptor, self._stacks.fileno(), self.ledger.descriptor)
        self._process = start_python("megatron_omega.watchdog.monitor", descriptors, blocked=IGNORED_SIGNALS)
        theirs.close()
        ours.settimeout(None)
        self._line = Line(ours)
        self._line.send(
            "watch",
            rank=self._place.rank,
            local_rank=self._place.local_rank,
            world_size=self._place.world_size,
            place=_coordinates(self._config, self._place),
            host=socket.gethostname(),
            pid=os.getpid(),
            ident=threading.main_thread().ident,
            signal=int(STACK_SIGNAL),
            run_directory=str(Path(self._config.logging.run_directory).absolute()),
            master=meeting_host(),
            start=meeting_point(),
            start_timeout=self._config.resilience.start_timeout_seconds,
            silence_seconds=self._config.resilience.silence_seconds,
            dump_seconds=self._config.resilience.dump_seconds,
            device=has_gpu(),
        )

    def _report(self, error: BaseException) -> None:
        """Tell the monitor, and wait to be ended by it, so that the diagnosis stands alone in the log."""
        assert self._line is not None
        is_ours = isinstance(error, OmegaError)
        trace = "" if is_ours else "".join(traceback.format_exception(error))
        code = error.exit_code if is_ours else BUG
        kind = type(error).__name__
        if self._line.send("failed", message=redact(str(error)), error=kind, trace=redact(trace), code=code):
            self._thread.join(timeout=_END_SECONDS)

    def _listen(self) -> None:
        """Thread: hear the monitor and the signals."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._wakeup, selectors.EVENT_READ)
            if self._line is not None:
                selector.register(self._line.connection, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._wakeup:
                        for number in self._wakeup.recv(64):
                            self._note_signal(number)
                    elif self._line is not None:
                        messages = self._line.receive()
                        if messages is None:  # the monitor was killed: the run goes on unwatched
                            selector.unregister(key.fileobj)
                            self._go.set()
                        for message in messages or ():
                            self._obey(message)
                if self._is_over:
                    return

    def _note_signal(self, number: int) -> None:
        if number not in STOP_SIGNALS:
            return
        self._signal = self._signal or number
        if not self._is_armed and not self._is_over:
            if self._line is not None:
                self._line.send("done")
            os.write(2, f"stopped by {signal.Signals(number).name} before the first step\n".encode())
            self._finish()
            os._exit(Preempted.exit_code)

    def _obey(self, message: Message) -> None:
        if message["kind"] == "go":
            self._go.set()
        elif message["kind"] == "settle":
            self._settle()
        elif message["kind"] == "end":
            self._finish()
            os._exit(message["code"])  # no clean-up that could wait for ranks that are gone

    def _settle(self) -> None:
        """Write down how far the device is. Whatever is wrong with it, the stack says where this rank stands."""
        if self.ask_device is not None:
            with contextlib.suppress(Exception):
                is_busy, progress = self.ask_device()
                self.ledger.settle(progress, is_busy=is_busy)


def _leave_to_the_thread(number: int, frame: object) -> None:
    """Replace the default action; the thread reads the number from the wake-up descriptor."""


def _coordinates(config: RunConfig, place: ProcessPlace) -> str:
    return str(layout_of(config, max(place.world_size, ranks_per_replica(config))).coordinate(place.rank))


def _as_error(findings: Sequence[str], code: int) -> OmegaError:
    kinds = {kind.exit_code: kind for kind in OmegaError.__subclasses__()}
    return kinds.get(code, OmegaError)(*findings)
