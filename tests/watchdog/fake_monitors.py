"""Monitors without ranks, in one thread: they greet the hub, say where their rank stands, and answer when asked."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_omega.watchdog.coordinator import Hub, Limits
from megatron_omega.watchdog.messages import Line, Message
from megatron_omega.watchdog.sealing import enter

WAITING = [["/x/torch/distributed/distributed_c10d.py", 3000, "all_reduce"],
           ["/repo/megatron_omega/parallel/tensor_parallel.py", 61, "_total"]]  # fmt: skip
IDLE = [["/repo/megatron_omega/data/loader.py", 90, "take"]]


@dataclass
class FakeRank:
    """What a rank's monitor says."""

    frames: list[list[object]]
    count: int = 7
    age: float = 9.0
    allowed: float = 5.0
    phase: str = "in a step"
    text: str = "stack\n"

    @property
    def standing(self) -> Message:
        return {"phase": self.phase, "step": 3, "age": self.age, "allowed": self.allowed, "state": "S"}

    @property
    def dump(self) -> Message:
        rows = [["0", "allreduce", self.count, -1, -1]]
        return self.standing | {"frames": self.frames, "text": self.text, "device": False, "rows": rows}


class FakeRun:
    """A hub and the monitors of `ranks`."""

    def __init__(self, folder: Path, ranks: list[FakeRank], limits: Limits | None = None) -> None:
        self.ranks = ranks
        listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        hub = Hub(listener, len(ranks), "secret", folder, limits or Limits.of(len(ranks), 60.0))
        self.hub = threading.Thread(target=hub.serve)
        self.hub.start()
        self.codes: dict[int, int] = {}
        self.asked_at = self.verdict_at = 0.0
        """When the first was asked for its stack, and when the first was ended."""
        self._selector = selectors.DefaultSelector()
        self.lines: list[Line] = []
        for rank in range(len(ranks)):
            line = enter(socket.create_connection(listener.getsockname()), "secret", 30.0)
            assert line is not None
            line.send("hello", rank=rank, place=f"dp {rank}", host=f"h{rank // 8}", pid=1, findings=[], finding_code=2,
                      fingerprint={})  # fmt: skip
            line.connection.settimeout(10.0)
            self._selector.register(line.connection, selectors.EVENT_READ, rank)
            self.lines.append(line)

    def serve(self, seconds: float, is_over: Callable[[], bool] | None = None) -> bool:
        """Answer the hub until it has ended all ranks, or for `seconds`; return whether it has."""
        until, beaten = time.monotonic() + seconds, 0.0
        while len(self.codes) < len(self.ranks) and time.monotonic() < until and not (is_over and is_over()):
            if time.monotonic() - beaten > 1.0:
                beaten = time.monotonic()
                for line, rank in zip(self.lines, self.ranks, strict=True):
                    line.send("beat", **rank.standing)
            for key, _ in self._selector.select(0.05):
                for message in self.lines[key.data].receive() or ():
                    self._obey(key.data, message)
        return len(self.codes) == len(self.ranks)

    def _obey(self, rank: int, message: Message) -> None:
        if message["kind"] == "dump":
            self.asked_at = self.asked_at or time.monotonic()
            self.lines[rank].send("dump", **self.ranks[rank].dump)
        elif message["kind"] == "end" and rank not in self.codes:
            self.codes[rank], self.verdict_at = message["code"], self.verdict_at or time.monotonic()
            self._selector.unregister(self.lines[rank].connection)
            self.lines[rank].close()

    def close(self) -> None:
        """End what is left."""
        for rank, line in enumerate(self.lines):
            if rank not in self.codes:
                line.send("done")
                line.close()
        self.hub.join(timeout=30.0)
        assert not self.hub.is_alive()
