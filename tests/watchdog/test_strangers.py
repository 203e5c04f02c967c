"""Nothing that a connection sends ends the hub, takes a seat, or keeps the monitors of the run from theirs."""

from __future__ import annotations

import errno
import json
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from watchdog.attacks import HELLO, WITH_SECRET, WITHOUT_SECRET, connect

from megatron_omega.host.private import refuse_others
from megatron_omega.host.run_folder import MONITOR
from megatron_omega.watchdog import meeting
from megatron_omega.watchdog.coordinator import Hub, Limits
from megatron_omega.watchdog.meeting import Address
from megatron_omega.watchdog.messages import Line
from megatron_omega.watchdog.sealing import enter

SECRET = "known to the run alone"


class Door:
    """A hub for two ranks. `finish` lets both come, go on and end."""

    def __init__(self, folder: Path, listener: socket.socket | None = None) -> None:
        listener = listener or socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.place = listener.getsockname()
        self.hub = Hub(listener, 2, SECRET, folder, Limits.of(2, 60.0))
        self.thread = threading.Thread(target=self.hub.serve, daemon=True)
        self.thread.start()
        self.lines: list[Line] = []
        self.ranks: set[int] = set()

    def come(self, rank: int) -> None:
        line = enter(connect(self.place), SECRET, 10.0)
        assert line is not None
        line.send(**HELLO | {"rank": rank, "host": "ours"})
        self.lines.append(line)
        self.ranks.add(rank)

    def finish(self) -> None:
        for rank in {0, 1} - self.ranks:
            self.come(rank)
        for line in self.lines:
            line.connection.settimeout(10.0)
            until, heard = time.monotonic() + 10.0, ""
            while heard != "go" and time.monotonic() < until:
                messages = line.receive()
                assert messages is not None
                heard = next((message["kind"] for message in messages if message["kind"] != "beat"), "")
            assert heard == "go"
            line.send("done")
        self.thread.join(10.0)
        assert not self.thread.is_alive()
        for line in self.lines:
            line.close()


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    door = Door(tmp_path)
    yield door
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("name", WITHOUT_SECRET)
def test_strangers_change_nothing(name: str, door: Door, capfd: pytest.CaptureFixture[str]) -> None:
    door.come(0)
    held = WITHOUT_SECRET[name](door.place)
    door.finish()
    for connection in held:
        connection.close()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", WITH_SECRET)
def test_one_that_knows_the_secret_and_talks_nonsense_is_shown_the_door(
    name: str, door: Door, capfd: pytest.CaptureFixture[str]
) -> None:
    door.come(0)
    for connection in WITH_SECRET[name](door.place, SECRET):
        connection.settimeout(10.0)
        while connection.recv(4096):  # until the hub closes it
            pass
        connection.close()
    door.finish()
    assert capfd.readouterr().err == ""


def test_a_seat_that_is_taken_stays_taken(door: Door) -> None:
    door.come(1)
    second = enter(connect(door.place), SECRET, 10.0)
    assert second is not None
    second.send(**HELLO)
    second.connection.settimeout(10.0)
    assert second.receive() is None
    second.close()
    door.finish()


def test_after_the_last_rank_has_come_nobody_gets_in(door: Door) -> None:
    door.finish()
    with pytest.raises(ConnectionError):
        connect(door.place)


class Full(socket.socket):
    """A listening socket of a process that, while `is_full`, may open nothing more."""

    is_full = False

    def accept(self) -> tuple[socket.socket, Any]:
        if self.is_full:
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


def test_without_descriptors_the_hub_makes_room_and_goes_on(tmp_path: Path) -> None:
    listener = Full(fileno=socket.create_server(("127.0.0.1", 0)).detach())
    door = Door(tmp_path, listener)
    held = [connect(door.place) for _ in range(4)]
    assert all(connection.recv(4096) for connection in held)  # challenged
    listener.is_full = True
    held.append(connect(door.place))
    assert held[0].recv(4096) == b""  # turned away
    listener.is_full = False
    door.finish()
    for connection in held:
        connection.close()


@pytest.mark.parametrize(
    "spoken", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b'{"kind": "challenge", "number": "1"}\n']
)
def test_a_monitor_does_not_take_a_stranger_for_the_hub(spoken: bytes) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def pretend() -> None:
        connection, _ = listener.accept()
        connection.sendall(spoken)
        connection.recv(4096)
        connection.sendall(b'{"kind": "welcome", "proof": "0"}\n{"kind": "end", "code": 0}\n')
        connection.close()

    threading.Thread(target=pretend, daemon=True).start()
    with connect(listener.getsockname()) as connection:
        assert enter(connection, SECRET, 1.0) is None
    listener.close()


class TestMeeting:
    def test_the_address_is_found_and_withdrawn(self, tmp_path: Path) -> None:
        address = Address("127.0.0.1", 1234, SECRET)
        published = meeting.publish(address, tmp_path, "a")
        assert meeting.find_address(tmp_path, "a") == address
        refuse_others(published.path)
        refuse_others(published.path.parent, is_folder=True)
        published.withdraw()
        assert list(tmp_path.iterdir()) == [] and meeting.find_address(tmp_path, "a") is None

    @pytest.mark.parametrize(
        "text", ["", "[]", "3", '{"host": "h"}', '{"host": "h", "port": "1", "secret": "s"}', "\x00"]
    )
    def test_an_address_of_another_kind_is_none(self, text: str, tmp_path: Path) -> None:
        meeting.publish(Address("h", 1, "s"), tmp_path, "a").path.write_text(text)
        assert meeting.find_address(tmp_path, "a") is None

    def test_what_others_could_have_written_is_not_read(self, tmp_path: Path) -> None:
        published = meeting.publish(Address("h", 1, "s"), tmp_path, "a")
        published.path.parent.chmod(0o755)
        assert meeting.find_address(tmp_path, "a") is None

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
    def test_another_users_folder_is_left_alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr("tempfile.tempdir", None)
        run = tmp_path / "run"
        run.write_text("not a folder: nothing can be written there")
        published = meeting.publish(Address("h", 1, "s"), run, "a")
        assert published.path.parent.parent == tmp_path
        os.chown(published.path.parent, 4242, 4242)
        assert meeting.find_address(run, "a") is None
        with pytest.raises(OSError, match="to this user alone"):
            meeting.publish(Address("h", 1, "s"), run, "a")

    def test_a_secret_from_the_launcher_is_written_nowhere(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OMEGA_RUN_SECRET", "handed out")
        listener, address = meeting.open_hub("127.0.0.1")
        listener.close()
        published = meeting.publish(address, tmp_path, "a")
        assert "handed out" not in published.path.read_text() and json.loads(published.path.read_text())["secret"] == ""
        assert meeting.find_address(tmp_path, "a") == address
        assert published.path.parent == tmp_path / MONITOR

    @pytest.mark.parametrize(
        "master", ["127.0.0.1", "localhost", "127.0.0.2", socket.gethostname(), "192.0.2.7", "no.such.host"]
    )
    def test_one_interface_is_bound_never_all(self, master: str) -> None:
        listener, address = meeting.open_hub(master)
        assert listener.getsockname()[0] not in ("0.0.0.0", "::") and address.port == listener.getsockname()[1]
        listener.close()
