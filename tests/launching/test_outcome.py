from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from megatron_omega.commands import launch
from megatron_omega.commands.ending import exit_cleanly
from megatron_omega.launching.outcome import End, judge
from megatron_omega.launching.turns import Turn, next_step


def ends(*codes: int) -> list[End]:
    """Ranks in the order in which they ended."""
    return [End(rank, code) for rank, code in enumerate(codes)]


@pytest.mark.parametrize(
    ("codes", "launcher", "succeeded", "code", "is_failure"),
    [
        ((0, 0), 0, True, 0, False),
        ((0, 137), 137, True, 0, False),  # it failed after the marker: the run is done
        ((0, 0), 0, False, 137, True),  # the launcher lost ranks and did not notice
        ((), 0, False, 137, True),
        ((), 137, False, 137, True),
        ((), 247, False, 137, True),  # sys.exit(-9) of deepspeed's launcher
        ((), 75, False, 75, False),
        ((), 2, False, 2, False),
        ((75, 75), 0, False, 75, False),
        ((75, 143), 143, False, 75, False),  # ended by the launcher while leaving
        ((143, 75), 143, False, 75, False),
        ((1, 75), 1, False, 1, False),  # a bug, then asked to stop by the launcher before the first step
        ((137, 75), 137, False, 137, True),
        ((138, 138), 138, False, 75, False),  # a second signal met ranks that had saved
        ((137, 1), 137, False, 137, True),  # a lost peer, then an exception about it
        ((1, 143), 143, False, 1, False),  # a bug, then ended by the launcher
        ((76, 137), 137, False, 76, True),
        ((77, 137), 137, False, 77, True),
        ((143, 4), 143, False, 4, False),  # the user's fault counts wherever it stands
        ((2, 2), 2, True, 2, False),  # with the marker of an earlier, shorter run
        ((139,), 139, False, 137, True),
        ((127,), 127, False, 127, False),
    ],
)
def test_the_outcome(codes: tuple[int, ...], launcher: int, succeeded: bool, code: int, is_failure: bool) -> None:
    outcome = judge(ends(*codes), launcher, succeeded=succeeded)
    assert (outcome.code, outcome.is_failure) == (code, is_failure)
    assert outcome.cause


def checkpoint(folder: Path, step: int) -> None:
    path = folder / f"checkpoints/step-{step:08d}"
    path.mkdir(parents=True)
    (path / "manifest.json").touch()


def fail(turn: Turn) -> tuple[bool, str]:
    turn.begin()
    return next_step(turn, turn.end(137), goes_on_when_stopped=True)


def test_failures_in_a_row_are_limited_and_progress_counts_anew(tmp_path: Path) -> None:
    turn = Turn(tmp_path, "7", max_restarts=2)
    assert [fail(turn)[0] for _ in range(3)] == [True, True, False]
    assert not turn.may_start()
    checkpoint(tmp_path, 5)
    assert turn.may_start()
    assert [fail(turn)[0] for _ in range(3)] == [True, True, False]
    again, sentence = fail(turn)
    assert not again and "4 starts in a row" in sentence and "step-00000005" in sentence


def test_a_start_that_saved_before_it_failed_is_not_fruitless(tmp_path: Path) -> None:
    turn = Turn(tmp_path, "7", max_restarts=0)
    turn.begin()
    checkpoint(tmp_path, 1)
    again, sentence = next_step(turn, turn.end(76), goes_on_when_stopped=True)
    assert again and "step-00000001" in sentence and "progress" in sentence


def test_stops_are_no_failures_and_dead_nodes_are(tmp_path: Path) -> None:
    turn = Turn(tmp_path, "7", max_restarts=1)
    for _ in range(5):
        turn.begin()
        outcome = turn.end(75)
        assert next_step(turn, outcome, goes_on_when_stopped=True)[0]
        assert not next_step(turn, outcome, goes_on_when_stopped=False)[0]
    assert turn.fruitless_starts() == 0
    turn.begin()  # the node died: no end
    turn.begin()
    assert turn.fruitless_starts() == 2 and not turn.may_start()
    assert Turn(tmp_path, "8", max_restarts=1).may_start()  # another job starts afresh


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4])
def test_what_no_other_start_mends_is_final(tmp_path: Path, code: int) -> None:
    turn = Turn(tmp_path, "7")
    turn.begin()
    if code == 0:
        (tmp_path / "SUCCESS").write_text("{}")
    again, sentence = next_step(turn, turn.end(code), goes_on_when_stopped=True)
    assert not again and f"exit code {code}" in sentence
    assert turn.last_final_code() == code


def test_codes_are_read_in_the_order_of_the_failures(tmp_path: Path) -> None:
    turn = Turn(tmp_path, "7", restart=2)
    turn.begin()
    for age, (rank, code) in enumerate([(3, 1), (0, 143), (1, 143)]):
        (turn.codes / str(rank)).write_text(f"{code}\n")
        os.utime(turn.codes / str(rank), ns=(0, 10**9 * (age + 1)))
    outcome = turn.end(143)
    assert outcome.code == 1 and "rank 3" in outcome.cause
    assert not (tmp_path / "exit-codes").exists()


def test_an_old_marker_is_not_this_turns_success(tmp_path: Path) -> None:
    (tmp_path / "SUCCESS").write_text("{}")
    os.utime(tmp_path / "SUCCESS", ns=(0, 10**9))
    turn = Turn(tmp_path, "7")
    turn.begin()
    assert turn.end(137).code == 137
    turn.begin()
    assert turn.end(0).code == 0  # finished before, nothing to add


def test_the_turns_are_kept(tmp_path: Path) -> None:
    turn = Turn(tmp_path, "7", restart=1)
    turn.begin(hosts="n[1-2]")
    turn.end(76)
    start, end = [json.loads(line) for line in (tmp_path / "launches.jsonl").read_text().splitlines()]
    assert (start["event"], start["hosts"], start["job"], start["restart"]) == ("start", "n[1-2]", "7", 1)
    assert (end["event"], end["code"]) == ("end", 76)


def test_on_a_full_disk_a_start_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Turn, "_record", full)
    with pytest.raises(SystemExit) as ended, exit_cleanly():
        launch.main(["begin", "--config", "omega-tiny", "--logging.run_directory", str(tmp_path)])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "No space left on device" in said and "Traceback" not in said


def test_half_a_line_is_passed_over(tmp_path: Path) -> None:
    turn = Turn(tmp_path, "7", max_restarts=0)
    turn.begin()
    path = tmp_path / "launches.jsonl"
    path.write_text(path.read_text() + '{"event": "sta')
    turn.begin()
    assert len(path.read_text().splitlines()) == 2 and turn.fruitless_starts() == 2
