"""What is kept, what is deleted, what belongs to another model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import IDENTITY, Saved, full_tensors

from megatron_omega.checkpoint import retention
from megatron_omega.checkpoint.catalogue import (
    check_structure,
    identity_differences,
    list_checkpoints,
    require_identity,
)
from megatron_omega.checkpoint.reader import open_checkpoint
from megatron_omega.checkpoint.retention import Keeper, Row, choose, strip_optimizer
from megatron_omega.config.schema import CheckpointConfig
from megatron_omega.errors import CheckpointError

ROWS = st.lists(
    st.builds(Row, step=st.integers(0, 60), validation_loss=st.none() | st.floats(0, 9), has_optimizer=st.booleans()),
    unique_by=lambda row: row.step, max_size=12,
)  # fmt: skip
CONFIGS = st.builds(
    CheckpointConfig,
    keep_last=st.integers(1, 4),
    keep_every_steps=st.integers(0, 20),
    keep_best=st.booleans(),
    drop_optimizer_from_older=st.booleans(),
)


@settings(max_examples=200)
@given(ROWS, CONFIGS)
def test_the_rules_hold(rows: list[Row], config: CheckpointConfig) -> None:
    choice = choose(rows, config)
    steps = sorted((row.step for row in rows), reverse=True)
    kept = set(steps) - choice.delete
    assert set(steps[: config.keep_last]) <= kept
    assert not choice.strip & set(steps[: config.keep_last])
    assert choice.strip <= kept
    assert not choice.strip or config.drop_optimizer_from_older
    if config.keep_every_steps:
        assert {step for step in steps if step % config.keep_every_steps == 0} <= kept
    scored = [row for row in rows if row.validation_loss is not None]
    if config.keep_best and scored:
        best = min(row.validation_loss for row in scored if row.validation_loss is not None)
        assert any(row.step in kept for row in scored if row.validation_loss == best)
    allowed = (
        config.keep_last
        + config.keep_best
        + (len([s for s in steps if s % config.keep_every_steps == 0]) if config.keep_every_steps else 0)
    )
    assert len(kept) <= allowed


def keep(directory: Path, *, after: int = 99, **rules: object) -> list[str]:
    Keeper(directory, CheckpointConfig.model_validate({"keep_best": False} | rules)).tidy(after)
    return sorted(path.name for path in directory.iterdir())


def test_old_checkpoints_go(tmp_path: Path) -> None:
    saved = Saved(tmp_path, tensor=1, data=1)
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 4.0)):
        saved.write(step, validation_loss=loss)
    assert keep(tmp_path, keep_last=2, keep_best=True) == ["step-00000020", "step-00000030", "step-00000040"]
    assert keep(tmp_path, keep_last=1, keep_every_steps=20) == ["step-00000020", "step-00000040"]


def test_the_only_whole_checkpoint_is_kept(tmp_path: Path) -> None:
    saved = Saved(tmp_path, tensor=1, data=1)
    for step in (10, 20, 30):
        saved.write(step)
    for step in (20, 30):
        (tmp_path / f"step-000000{step}" / "weights-00000.safetensors").unlink()
    assert keep(tmp_path, keep_last=1) == ["step-00000010", "step-00000020", "step-00000030"]
    check_structure(tmp_path / "step-00000010")


def test_later_checkpoints_that_a_resume_passed_over_do_not_count(tmp_path: Path) -> None:
    saved = Saved(tmp_path, tensor=1, data=1)
    for step in (10, 20, 30):  # 30 has wrong bytes, which nobody notices without reading them
        saved.write(step)
    assert keep(tmp_path, after=20, keep_last=1) == ["step-00000020", "step-00000030"]


def test_an_interrupted_deletion_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Saved(tmp_path, tensor=1, data=1).write(10)
    monkeypatch.setattr(retention.shutil, "rmtree", lambda *_: (_ for _ in ()).throw(OSError("power cut")))
    with pytest.raises(OSError, match="power cut"):
        retention.delete_checkpoint(path)
    assert list_checkpoints(tmp_path) == []


def test_stripped_checkpoints_keep_their_weights(tmp_path: Path) -> None:
    saved = Saved(tmp_path)
    for step in (10, 20, 30):
        saved.write(step)
    keep(tmp_path, keep_last=1, keep_every_steps=10, drop_optimizer_from_older=True)
    for step in (10, 20):
        path = tmp_path / f"step-000000{step}"
        assert not check_structure(path).has_optimizer
        assert not list(path.glob("optimizer*"))
        with open_checkpoint(path) as reader:
            assert reader.verify() == []
            assert torch.equal(reader.tensor("token_table.weight"), full_tensors(step)["token_table.weight"]["weight"])
            with pytest.raises(CheckpointError, match="no optimizer state"):
                reader.tensor("token_table.weight", "exp_avg")
    assert check_structure(tmp_path / "step-00000030").has_optimizer


def test_an_interrupted_strip_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Saved(tmp_path).write(10)
    monkeypatch.setattr(
        Path,
        "unlink",
        lambda self, missing_ok=False: (
            (_ for _ in ()).throw(OSError("power cut")) if self.suffix == ".safetensors" else None
        ),
    )
    with pytest.raises(OSError, match="power cut"):
        strip_optimizer(path)
    with open_checkpoint(path) as reader:
        assert reader.verify() == []


def test_only_step_folders_are_checkpoints(tmp_path: Path) -> None:
    for name in (
        "step-00000002",
        "step-00000010",
        "step-123456789",
        "step-2",
        "old-step-00000003",
        ".unfinished-step-00000004-x",
    ):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-123456789", "step-00000010", "step-00000002"]
    assert list_checkpoints(tmp_path / "absent") == []


def test_another_model_is_refused_listing_the_fields(tmp_path: Path) -> None:
    path = Saved(tmp_path).write(1)
    manifest = check_structure(path)
    require_identity(path, manifest, IDENTITY)
    other = {"model": {"hidden_size": 8, "vocab_size": 37, "heads": 2}, "tokenizer": "xyz"}
    with pytest.raises(CheckpointError) as raised:
        require_identity(path, manifest, other)
    assert len(raised.value.findings) == 3
    assert "model.hidden_size is 6 in the checkpoint and 8 in this run" in str(raised.value)
    assert identity_differences(IDENTITY, IDENTITY) == []
