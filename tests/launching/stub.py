"""A rank without a model: its steps are files, its exit codes, marker, checkpoints and signals are those of a real one.

Ranks share the run folder, whose `plan.json` says what is to happen: {"steps": 6, "hold": 3} waits after step 3 until
the rank is told to stop or the file `go` is there; {"exit": [rank, code]} ends that rank, negative codes by a signal, in
the first turn (the others wait for it until they are ended), {"always": true} in every turn, {"blame": reason} its
host; {"linger": true} leaves a process behind.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_omega.host.environment import complete_environment
from megatron_omega.host.exclusions import exclude

TICK = 0.02
REQUESTS = (signal.SIGTERM, signal.SIGUSR1)


class Stub:
    """One rank of a run of files."""

    def __init__(self, folder: Path) -> None:
        self.place = complete_environment()
        self.folder = folder
        self.plan = {"steps": 4} | json.loads((folder / "plan.json").read_text())
        for number in REQUESTS:
            signal.signal(number, lambda *_: (folder / "stopping").touch())

    def run(self) -> int:
        """Take all steps; return the exit code."""
        self._start()
        self._fail_as_planned()
        while not self._is_done():
            if (self.folder / "stopping").exists():
                for number in REQUESTS:  # as the sentinel does: a second one finds the request granted
                    signal.signal(number, signal.SIG_IGN)
                return 75
            if self.place.rank == 0:
                self._step()
            time.sleep(TICK)
        return 0

    def _start(self) -> None:
        me = self.folder / f"started-{self.place.rank}"
        with me.open("a") as file:
            file.write(f"{self.place.world_size} {os.uname().nodename} {self._newest()} {os.getpid()}\n")
        if self.place.rank == 0:
            (self.folder / "stopping").unlink(missing_ok=True)
            (self.folder / "SUCCESS").unlink(missing_ok=True)
        turns = len(me.read_text().splitlines())
        while any(self._turns(rank) < turns for rank in range(self.place.world_size)):
            time.sleep(TICK)  # as a rendezvous does
        if self.plan.get("linger"):
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
            (self.folder / f"lingering-{self.place.rank}").write_text(str(child.pid))

    def _turns(self, rank: int) -> int:
        path = self.folder / f"started-{rank}"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def _fail_as_planned(self) -> None:
        if "exit" not in self.plan or (self._turns(self.place.rank) > 1 and not self.plan.get("always")):
            return
        rank, code = self.plan["exit"]
        while rank != self.place.rank:
            time.sleep(TICK)  # as in a collective without that rank
            if (self.folder / "stopping").exists():
                sys.exit(137)
        if "blame" in self.plan:
            exclude(self.folder, [os.uname().nodename], self.plan["blame"])
        if code < 0:
            os.kill(os.getpid(), -code)
        sys.exit(code)

    def _newest(self) -> int:
        return max((int(path.name[5:]) for path in self.folder.glob("checkpoints/step-*")), default=0)

    def _step(self) -> None:
        step = self._newest()
        if step == self.plan.get("hold") and not (self.folder / "go").exists() and self._turns(0) == 1:
            return
        if step == self.plan["steps"]:
            (self.folder / "SUCCESS").write_text(json.dumps({"step": step}))
            return
        checkpoint = self.folder / f"checkpoints/step-{step + 1:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").touch()

    def _is_done(self) -> bool:
        return (self.folder / "SUCCESS").exists()


if __name__ == "__main__":
    sys.exit(Stub(Path(sys.argv[sys.argv.index("--logging.run_directory") + 1])).run())
