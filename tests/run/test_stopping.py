"""One wish at one rank stops all of them, for a reason that all know."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_omega.launching.local_ranks import run_ranks
from megatron_omega.run.stopping import StopRequests
from megatron_omega.watchdog.hook import Patience


def requests(folder: Path, **options: object) -> StopRequests:
    settings = {"is_main": True, "max_minutes": None, "stop_signal": lambda: 0, "started": time.monotonic()}
    return StopRequests(folder, **(settings | {"device": torch.device("cpu")} | options))  # pyright: ignore[reportArgumentType]


def test_nobody_asks(tmp_path: Path) -> None:
    assert requests(tmp_path).agreed() is None


def test_a_file_stops_once(tmp_path: Path) -> None:
    (tmp_path / "stop").write_text("")
    asked = requests(tmp_path)
    assert asked.agreed() == f"found {tmp_path / 'stop'}"
    assert not (tmp_path / "stop").exists() and asked.agreed() is None


def test_only_the_main_rank_looks_for_the_file(tmp_path: Path) -> None:
    (tmp_path / "stop").write_text("")
    assert requests(tmp_path, is_main=False).agreed() is None


def test_time_runs_out(tmp_path: Path) -> None:
    assert requests(tmp_path, max_minutes=2.0, started=time.monotonic() - 119).agreed() is None
    assert requests(tmp_path, max_minutes=2.0, started=time.monotonic() - 121).agreed() == "2 minutes are over"


def _ask_at_last(folder: str) -> tuple[str | None, str | None]:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    asked = requests(Path(folder), is_main=rank == 0, stop_signal=lambda: int(signal.SIGUSR1) if rank == 2 else 0)
    quiet = requests(Path(folder), is_main=rank == 0)
    return asked.agreed(), quiet.agreed()


def test_one_rank_speaks_for_all(tmp_path: Path) -> None:
    assert run_ranks(_ask_at_last, 3, str(tmp_path)) == [("SIGUSR1", None)] * 3


def test_patience_follows_the_slowest_of_the_last_steps() -> None:
    patience = Patience(None, 600.0, 5.0)
    for seconds in (90.0, 2.0, 1.0):  # the first warms up
        assert patience.allowed_seconds == 600.0
        patience.observe(seconds)
    assert patience.allowed_seconds == 3 * 2.0
    for _ in range(50):
        patience.observe(1.5)
    assert patience.allowed_seconds == 5.0, "no less than the floor"
    assert Patience(7.0, 600.0, 60.0).allowed_seconds == 600.0
