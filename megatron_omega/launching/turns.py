"""The turns of a run: each start with its end, kept in the run folder, and whether another one follows.

`launches.jsonl` has a line for each start and each end. The folder `exit-codes/` holds, while a turn lasts, a file for
each rank that failed: launchers lose codes, and the order of the files is the order of the failures.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_omega.errors import ConfigError
from megatron_omega.host import run_folder
from megatron_omega.host.json_lines import append_line, encode_line, objects_in
from megatron_omega.host.redaction import redacted
from megatron_omega.host.regular_files import read_text
from megatron_omega.host.run_folder import SUCCESS
from megatron_omega.launching.outcome import STOPPED, End, Outcome, judge
from megatron_omega.log import get_logger

log = get_logger(__name__)
MAX_RESTARTS = 20
"""Failures in a row without a new checkpoint between them, after which a run is not started again."""


@dataclass(frozen=True)
class Turn:
    """One start of a run, by whatever launcher."""

    run_directory: Path
    job: str
    """What holds the turns of a run together: Slurm's job, or the process that supervises."""
    restart: int = 0
    """How often the job was started before."""
    max_restarts: int = MAX_RESTARTS

    @property
    def codes(self) -> Path:
        """Folder for the exit codes of failing ranks, a file each, named by rank."""
        return self.run_directory / run_folder.EXIT_CODES / f"{self.job}-{self.restart}"

    @property
    def newest_checkpoint(self) -> str:
        """Name of the newest checkpoint that has its manifest; empty: there is none."""
        manifests = self.run_directory.glob("checkpoints/step-*/manifest.json")
        return max((path.parent.name for path in manifests), default="")

    def begin(self, **facts: Any) -> None:
        """Record the start. `facts` go into its line.

        Raises:
            ConfigError: the run folder cannot be written.
        """
        try:
            shutil.rmtree(self.codes, ignore_errors=True)
            self.codes.mkdir(parents=True)
            (self.codes / "started").touch()
            self._record("start", **facts)
        except OSError as error:
            raise ConfigError(
                f"logging.run_directory={self.run_directory} cannot be written: {error.strerror}; choose another folder"
            ) from None

    def end(self, launcher_code: int = 0, ends: Sequence[End] | None = None) -> Outcome:
        """Judge and record the end. `ends`: of the ranks, in their order; read from `codes` if it is not given."""
        outcome = judge(self._ends() if ends is None else ends, launcher_code, succeeded=self._succeeded(launcher_code))
        try:
            self._record("end", code=outcome.code, cause=outcome.cause)
        except OSError as error:  # a full disk does not keep the run from its next start
            log.warning("the end of this turn is not recorded in %s: %s", run_folder.LAUNCHES, error)
        shutil.rmtree(self.codes, ignore_errors=True)
        if self.codes.parent.is_dir() and not any(self.codes.parent.iterdir()):
            self.codes.parent.rmdir()
        return outcome

    def fruitless_starts(self) -> int:
        """Return how many of the job's last starts came no further than the checkpoint that is the newest now.

        A start that ended on request is none of them; one that never came to an end (its node died) is.
        """
        now, count, was_stopped = self.newest_checkpoint, 0, False
        for line in reversed(self._lines()):
            if line["event"] == "end":
                was_stopped = line["code"] == STOPPED
                continue
            if line["checkpoint"] != now:
                break
            count += not was_stopped
            was_stopped = False
        return count

    def last_final_code(self) -> int | None:
        """Return the exit code of the job's last turn where it was one that no other start mends, or success."""
        ends = [line["code"] for line in self._lines() if line["event"] == "end"]
        return ends[-1] if ends and not Outcome(ends[-1], "").is_failure and ends[-1] != STOPPED else None

    def may_start(self) -> bool:
        """Return whether the limit of failures leaves another start."""
        return self.fruitless_starts() <= self.max_restarts

    def _succeeded(self, launcher_code: int) -> bool:
        """Return whether the marker is of this turn, or of an earlier one that this one found nothing to add to."""
        try:
            marker = (self.run_directory / SUCCESS).stat().st_mtime_ns
            started = (self.codes / "started").stat().st_mtime_ns
        except FileNotFoundError:
            return False
        return launcher_code == 0 or marker >= started

    def _ends(self) -> list[End]:
        files = [path for path in self.codes.glob("[0-9]*") if path.read_text().strip().isdecimal()]
        files.sort(key=lambda path: path.stat().st_mtime_ns)
        return [End(int(path.name), int(path.read_text())) for path in files]

    def _record(self, event: str, **facts: Any) -> None:
        line = {
            "event": event,
            "time": round(time.time(), 3),
            "job": self.job,
            "restart": self.restart,
            "checkpoint": self.newest_checkpoint,
            **facts,
        }
        append_line(self.run_directory / run_folder.LAUNCHES, encode_line(redacted(line)))

    def _lines(self) -> list[Mapping[str, Any]]:
        """Return the job's lines; half a line, which a full disk leaves, is none."""
        try:
            text = read_text(self.run_directory / run_folder.LAUNCHES)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ConfigError(f"{error.filename} cannot be read: {error.strerror}; move it away") from None
        return [line for line in objects_in(text.splitlines()) if line["job"] == self.job]


def next_step(turn: Turn, outcome: Outcome, *, goes_on_when_stopped: bool) -> tuple[bool, str]:
    """Return whether the run is to be started again, and the sentence that says what happens.

    `goes_on_when_stopped`: a stop was the scheduler's wish, not the user's.
    """
    place = turn.newest_checkpoint or "the beginning"
    where = f"job {turn.job}, restart {turn.restart}" if turn.restart else f"job {turn.job}"
    if outcome.code == STOPPED and goes_on_when_stopped:
        return True, f"{where}: {outcome.cause}; it is started again, from {place}"
    if not outcome.is_failure:
        return False, f"{where}: {outcome.cause} (exit code {outcome.code})"
    failures = turn.fruitless_starts()
    if turn.may_start():
        count = f"failure {failures} of at most {turn.max_restarts}" if failures else "it had made progress"
        return True, f"{where}: {outcome.cause} (exit code {outcome.code}); started again, from {place} ({count})"
    return False, (
        f"{where}: {outcome.cause} (exit code {outcome.code}); not started again: {failures} starts in a row came to "
        f"no new checkpoint after {place}. Look for the cause above, then start it by hand"
    )
