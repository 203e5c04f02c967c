"""The scripts that are written: those in examples/ are the generator's, and what cannot run is refused before."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT, run_python

from megatron_omega.commands import launch
from megatron_omega.errors import ConfigError
from megatron_omega.launching import scripts

SCRIPTS = sorted(
    path.relative_to(ROOT) for name in ("slurm", "evaluate") for path in ROOT.glob(f"examples/*/{name}.sbatch")
)


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str]:
    """Call the tool in this process, in the checkout; return its exit code and what it printed."""
    monkeypatch.chdir(ROOT)
    code = launch.main(words)
    return code, capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_examples_are_what_the_tool_writes(
    script: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / script).read_text()
    command = re.search(r"^# Written by: megatron-omega launch (.*)$", text, re.MULTILINE)
    assert command
    assert call(capsys, monkeypatch, *shlex.split(command[1]), "--dry-run") == (0, text)


def test_the_large_model_is_for_64_hosts_of_8() -> None:
    text = (ROOT / "examples/omega-11.9b/slurm.sbatch").read_text()
    assert "#SBATCH --nodes=64\n#SBATCH --ntasks-per-node=8\n#SBATCH --gpus-per-node=8\n" in text


def test_a_script_for_hosts_that_the_run_does_not_fit_is_not_written(tmp_path: Path) -> None:
    target = tmp_path / "script"
    words = ["slurm", "--nodes", "3", "--ranks-per-node", "1", "--output", target, "--model.hiden_size", "3"]
    done = run_python("tools/launch.py", *words, "--config", "examples/omega-tiny/run.yaml")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "hiden_size" in done.stderr and "3 processes" in done.stderr
    assert not target.exists()


def test_a_missing_option_is_named() -> None:
    done = run_python("tools/launch.py", "slurm", "--config", "examples/omega-tiny/run.yaml")
    assert done.returncode == 2 and "--nodes" in done.stderr and "Traceback" not in done.stderr


def test_hosts_by_ssh(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    path = tmp_path / "hosts.sh"
    words = ["hostfile", "--hosts", "a", "b", "--ranks-per-node", "4", "--output", str(path), "--port", "3333"]
    code, said = call(capsys, monkeypatch, *words, "--config", "examples/omega-tiny/run.yaml", "--training.seed", "7")
    assert code == 0
    assert (tmp_path / "hostfile").read_text() == "a slots=4\nb slots=4\n"
    assert (tmp_path / "deepspeed_env").read_text().startswith(f"PATH={Path(sys.executable).parent}:")
    text = path.read_text()
    assert "--master_port 3333" in text and "--training.seed 7" in text and "runs/omega-tiny/stop" in text
    assert f"DS_ENV_FILE={tmp_path}/deepspeed_env" in text
    assert said.count("--no_ssh --node_rank") == 2 and "--master_addr a " in said
    assert "hf_secret" not in said
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0


def test_hosts_by_ssh_with_one_to_spare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "hosts.sh"
    words = ["hostfile", "--hosts", "a", "b", "c", "--nodes", "1-2", "--ranks-per-node", "4", "--output", str(path)]
    code, said = call(capsys, monkeypatch, *words, "--config", "examples/omega-tiny/run.yaml")
    assert code == 0
    text = path.read_text()
    assert f"--hostfile {tmp_path}/hostfile --nodes 1-2 --ranks-per-node 4 --gpu h100-80g" in text
    assert '--include "${hosts//,/@}" --force_multi' in text
    assert "\nOMEGA_EXCHANGES_HOSTS=1\n" in (tmp_path / "deepspeed_env").read_text()
    assert said.count("--no_ssh --node_rank") == 2
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    with pytest.raises(ConfigError, match="--nodes 4: --hosts names 3"):
        call(capsys, monkeypatch, *words, "--nodes", "4", "--config", "examples/omega-tiny/run.yaml")


def test_values_with_blanks_survive_the_script() -> None:
    words = ("--data.corpora", "[{prefix: a b}]", "--logging.run_directory", "it's")
    launch = scripts.Launch(words, 1, 1, command="a test", program="PROGRAM")
    text = scripts.slurm_script(launch, Path("x"), "name")
    line = next(line for line in text.splitlines() if line.startswith("run="))
    shown = subprocess.run(
        ["bash", "-c", f"{line}; printf '%s\\n' \"${{run[@]}}\""], capture_output=True, text=True, check=True
    )
    assert shown.stdout.splitlines() == list(words)


def test_of_a_range_of_hosts_slurm_is_to_give_the_most() -> None:
    """It stops at the fewest as soon as the head names a number of tasks."""
    launch = scripts.Launch(("--x", "1"), 3, 4, command="a test", least_nodes=2, spares=1, cpus_per_rank=8)
    text = scripts.slurm_script(launch, Path("x"), "name")
    assert "#SBATCH --nodes=2-4\n#SBATCH --mincpus=32\n" in text and "#SBATCH --ntasks" not in text
    assert "launch begin --nodes 2-3 --ranks-per-node 4" in text and "OMEGA_EXCHANGES_HOSTS=1" in text
    plain = scripts.slurm_script(scripts.Launch((), 3, 4, command="a test"), Path("x"), "name")
    assert "#SBATCH --nodes=3\n#SBATCH --ntasks-per-node=4\n" in plain and "EXCHANGES" not in plain
