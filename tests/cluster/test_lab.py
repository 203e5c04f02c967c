"""The lab itself leaves nothing behind, even where the session that made it is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from tiny import ROOT

from cluster.lab import why_not

pytestmark = [pytest.mark.distributed, pytest.mark.cluster]
SESSION = "import sys, time; from pathlib import Path; from cluster.lab import Lab; lab = Lab(Path(sys.argv[1]), 1); print('up', flush=True); time.sleep(600)"


def test_a_killed_session_leaves_nothing(tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path / "site"
    environ = {"PYTHONPATH": f"{ROOT}:{ROOT}/tests", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    session = subprocess.Popen([sys.executable, "-c", SESSION, folder], env=environ, stdout=subprocess.PIPE, text=True)
    assert session.stdout is not None and session.stdout.readline() == "up\n"
    started = psutil.Process(session.pid).children(recursive=True)
    assert {"slurmctld", "slurmd", "munged", "sshd"} <= {process.name() for process in started}
    session.send_signal(signal.SIGKILL)
    session.communicate()
    _, living = psutil.wait_procs(started, timeout=30)
    assert [process for process in living if process.status() != psutil.STATUS_ZOMBIE] == []
    assert str(folder) not in Path("/proc/mounts").read_text()
    assert not Path("/sys/class/net/omega0").exists()
