"""Names that would be commands, through every script that is written, executed: they arrive as names, and nothing runs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from cluster.lab import Lab
from cluster.test_training import BIN, ENVIRONMENT
from megatron_omega.errors import ConfigError
from megatron_omega.launching import scripts

pytestmark = [pytest.mark.distributed, pytest.mark.cluster]
NAMES = (
    "it's",
    'a "b" c',
    "$(touch pwned)",
    "`touch pwned`",
    "-rf",
    "a b; touch pwned",
    "#x",
    "&touch pwned&",
    "*",
    "a\\b",
    "$HOME",
)
ECHO = """import json, os, sys
from pathlib import Path
folder = Path(__file__).parent
(folder / f"said-{os.uname().nodename}.json").write_text(json.dumps(sys.argv[1:]))
run = Path(sys.argv[len(sys.argv) - 1 - sys.argv[::-1].index("--logging.run_directory") + 1])
run.mkdir(parents=True, exist_ok=True)
(run / "SUCCESS").write_text("{}")
"""


ONE_RANK = (
    "--config", "examples/omega-tiny/run.yaml", "--parallel.tensor_parallel_size", "1",
    "--parallel.pipeline_parallel_size", "1",
)  # fmt: skip
"""A job that begins checks first that the run fits its hosts."""


def _settings(folder: Path, name: str) -> tuple[str, ...]:
    return (*ONE_RANK, "--logging.run_directory", str(folder / "run" / name))


def _nothing_else_ran(lab: Lab, folder: Path) -> bool:
    return not list(folder.rglob("pwned")) and not Path("pwned").exists() and not (lab.folder / "pwned").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_script_hands_names_on(lab: Lab, name: str, tmp_path: Path) -> None:
    program = tmp_path / "echo.py"
    program.write_text(ECHO)
    folder = tmp_path / name
    folder.mkdir()
    words = _settings(tmp_path, name)
    launch = scripts.Launch(
        words, 1, 1, command="a test", device="cpu", time="00:05:00", cpus_per_rank=1, program=str(program),
        options=(f"--output={tmp_path}/log.txt", "--comment=a b $(touch pwned)"),
    )  # fmt: skip
    script = folder / "x.sbatch"
    script.write_text(scripts.slurm_script(launch, script, name).replace("#SBATCH --output=%x-%j.out\n", ""))
    job = lab.submit(script, environ=ENVIRONMENT)
    lab.until((tmp_path / "log.txt").exists)
    lab.wait(job)
    (said,) = tmp_path.glob("said-*.json")
    assert json.loads(said.read_text()) == list(words), (tmp_path / "log.txt").read_text()
    assert (tmp_path / "run" / name / "launches.jsonl").exists()
    assert _nothing_else_ran(lab, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_a_script_over_ssh_hands_names_on_or_refuses_them(lab: Lab, name: str, tmp_path: Path) -> None:
    program = tmp_path / "echo.py"
    program.write_text(ECHO)
    files = scripts.HostFiles.beside(tmp_path / "hosts.sh")
    usual = _settings(tmp_path, "usual")
    launch = scripts.Launch(usual, 2, 1, command="a test", device="cpu", program=str(program))
    files.hostfile.write_text(scripts.hostfile(["n1", "n2"], 1))
    files.environment.write_text(scripts.deepspeed_environment(ENVIRONMENT, BIN / "python"))
    files.script.write_text(scripts.hosts_script(launch, files, 29621, str(tmp_path / "run")))
    extra = ["--logging.run_directory", str(tmp_path / "run" / name)]
    done = subprocess.run(
        lab.enter("bash", files.script, *extra, environ={**ENVIRONMENT, "OMEGA_MAX_RESTARTS": "0"}),
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    said = [json.loads(path.read_text()) for path in tmp_path.glob("said-*.json")]
    try:
        scripts.require_reachable(extra, ENVIRONMENT, BIN / "python", Path.cwd())
        assert said == [[*usual, *extra]] * 2, done.stderr
    except ConfigError:
        assert done.returncode == 2 and said == [] and "pdsh" in done.stderr, done.stderr
    assert _nothing_else_ran(lab, tmp_path)


def test_the_tool_refuses_hosts_that_are_none(lab: Lab, tmp_path: Path) -> None:
    words = [
        "hostfile",
        "--hosts",
        "n1",
        "$(touch pwned)",
        "n[1-2]",
        "--ranks-per-node",
        "1",
        "--output",
        tmp_path / "h.sh",
    ]
    done = subprocess.run(
        lab.enter("python", "tools/launch.py", *words, *_settings(tmp_path, "x"), environ=ENVIRONMENT),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []
