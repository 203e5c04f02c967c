"""The inspect tool says what is there, what is damaged and what differs."""

from __future__ import annotations

import io
import json
import math
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from parts import KINDS, SHAPES, Saved, full_tensors

from megatron_omega.checkpoint.inspection import checkpoint_rows, compare, parameter_rows
from megatron_omega.checkpoint.reader import open_checkpoint
from megatron_omega.commands.main import run as run_verb


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Call the tool in this process, which has torch already."""
    said, complained, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(said), redirect_stderr(complained):
        try:
            run_verb("inspect-checkpoint", [str(argument) for argument in arguments])
        except SystemExit as ended:
            code = int(ended.code or 0)
    return subprocess.CompletedProcess([], code, said.getvalue(), complained.getvalue())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    saved = Saved(tmp_path_factory.mktemp("run"))
    saved.write(1)
    saved.write(2, validation_loss=3.25)
    return saved.directory


def as_json(*arguments: object) -> Any:
    result = run_tool(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_the_table_of_a_checkpoint(run: Path) -> None:
    facts = as_json(run / "step-00000002", "--verify")
    assert (facts["step"], facts["validation_loss"], facts["verified"], facts["damage"]) == (2, 3.25, True, [])
    assert facts["saved_under"] == "PP 1 x DP 2 x TP 2, ZeRO-1, float32"
    assert {row["name"]: tuple(row["shape"]) for row in facts["parameters"]} == {
        name: shape for name, (shape, _) in SHAPES.items()
    }
    text = run_tool(run / "step-00000002", "--verify").stdout
    assert "token_table.weight" in text
    assert "37x6" in text
    assert "every byte of" in text


def test_damage_is_named_and_exits_with_4(run: Path, tmp_path: Path) -> None:
    path = Saved(tmp_path).write(5)
    file = path / "weights-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert run_tool(path).returncode == 0  # no byte of a tensor was read
    for directory in (path, tmp_path):
        result = run_tool(directory, "--verify")
        assert result.returncode == 4
        assert "weights-00003.safetensors has changed bytes" in result.stderr
        assert "Traceback" not in result.stderr
    file.unlink()
    assert [row.damage is None for row in checkpoint_rows(tmp_path)] == [False]
    assert "weights-00003.safetensors cannot be opened" in run_tool(tmp_path).stdout
    assert run_tool(tmp_path / "nothing").returncode == 4


def test_the_checkpoints_of_a_run(run: Path) -> None:
    rows = as_json(run)
    assert [(row["step"], row["validation_loss"]) for row in rows] == [(2, 3.25), (1, None)]
    assert run_tool(run).stdout.splitlines()[1].startswith("step-00000002")


def test_differences_are_the_differences(run: Path) -> None:
    first, second = full_tensors(1), full_tensors(2)
    with open_checkpoint(run / "step-00000001") as a, open_checkpoint(run / "step-00000002") as b:
        comparison = compare(a, b)
        assert all(row.num_different == 0 and row.relative == 0 for row in compare(a, a).differences)
        assert len(parameter_rows(a.manifest)) == len(SHAPES)
    assert len(comparison.differences) == len(SHAPES) * len(KINDS)
    for row in comparison.differences:
        mine, theirs = first[row.name][row.kind], second[row.name][row.kind]
        assert math.isclose(row.largest, (mine - theirs).abs().max().item(), rel_tol=1e-6)
        assert math.isclose(row.relative, ((mine - theirs).norm() / mine.norm()).item(), rel_tol=1e-5)
        assert row.num_different == torch.count_nonzero(mine != theirs)
    assert (
        f"{len(SHAPES) * len(KINDS)} of {len(SHAPES) * len(KINDS)} tensors differ"
        in run_tool(run / "step-00000001", "--diff", run).stdout
    )
