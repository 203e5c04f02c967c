"""A run saved under one layout goes on under any other: bit for bit under the same, bitwise state under all."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import Ranks, run_ranks
from scenarios import OFFLOAD, ROUND_ROBIN, Case, Run, config_of, resume, same_state, start, state_on_disk, whole_state

from megatron_omega.checkpoint.catalogue import list_checkpoints
from megatron_omega.errors import CheckpointError

pytestmark = pytest.mark.distributed

GATHERED_ANEW = (("stage3_param_persistence_threshold", 1),)  # else small parameters stay gathered between steps
ONE_RANK = [Case(zero=0), Case(zero=1, dtype="bf16"), Case(zero=3, options=OFFLOAD)]
TWO_RANKS = [
    Case(data=2, zero=0),
    Case(data=2, zero=2, options=ROUND_ROBIN),
    Case(data=2, zero=3),
    Case(data=2, zero=3, options=GATHERED_ANEW),
    Case(tensor=2, zero=1, sequence_parallel=True),
    Case(pipeline=2, dtype="bf16"),
    Case(data=2, dtype="bf16", optimizer="muon"),
]
FOUR_RANKS = [
    Case(2, 1, 2, schedule="dualpipev"),
    Case(2, 2, 1, schedule="interleaved", virtual_stages=3, dtype="bf16"),
]


def save(run: Run, directory: Path, step: int, **options: Any) -> CheckpointError | None:
    store = run.store(directory)
    store.save(run.engine, run.state, step=step, **options)
    return store.wait()


def continues_bit_for_bit(case: Case, directory: Path) -> None:
    """Check [3 steps] = [2 + save, resume + 1], and that the disk holds what the engines hold. Runs on every rank."""
    run = start(case)
    run.train(2)
    assert save(run, directory, 2, asynchronous=True) is None
    saved = whole_state(run)
    on_disk = state_on_disk(directory / "step-00000002")
    assert [key for key in on_disk if not torch.equal(on_disk[key], saved[key])] == []
    unbroken = run.train(1)
    again = resume(case, directory)
    assert same_state(saved, whole_state(again)) == []
    assert again.engine.deepspeed.global_steps == 2
    assert again.train(1) == unbroken
    end = whole_state(run)
    assert same_state(end, whole_state(again)) == []
    rolls_back(run, directory, saved, unbroken, end)


def rolls_back(run: Run, directory: Path, saved: Any, unbroken: Any, end: Any) -> None:
    """Check that an engine in the middle of training goes back to its checkpoint, and on as if nothing had been."""
    run.train(1)
    state = run.store(directory).load_latest(run.engine)
    assert state is not None
    run.consumed = state["consumed_samples"]  # type: ignore[assignment]
    assert same_state(saved, whole_state(run)) == []
    assert run.train(1) == unbroken
    assert same_state(end, whole_state(run)) == []


def all_continue_bit_for_bit(cases: list[Case], directory: Path) -> None:
    for case in cases:
        continues_bit_for_bit(case, directory / case.label)


def state_crosses(source: Case, target: Case, directory: Path) -> None:
    """Check that `target` resumes what `source` saved, with the same state and the same next losses."""
    run = start(source)
    run.train(2)
    assert save(run, directory, 2) is None
    saved, unbroken = whole_state(run), run.train(2)
    again = resume(target, directory)
    # The working weights of another format are another cast of the same masters.
    assert same_state(saved, whole_state(again), but="working/" if source.dtype != target.dtype else "") == []
    tolerance = 1e-5 if source.dtype == target.dtype == "fp32" else 2e-3
    for (loss, norm), (found_loss, found_norm) in zip(unbroken, again.train(2), strict=True):
        assert found_loss == pytest.approx(loss, rel=tolerance)
        assert found_norm == pytest.approx(norm, rel=20 * tolerance)


@pytest.mark.parametrize("cases", [ONE_RANK, TWO_RANKS, FOUR_RANKS], ids=["one rank", "two ranks", "four ranks"])
def test_the_same_layout_continues_bit_for_bit(cases: list[Case], tmp_path: Path) -> None:
    run_ranks(cases[0].size, all_continue_bit_for_bit, cases, tmp_path)


def cross_layouts(pairs: list[tuple[Case, Case]], directory: Path) -> None:
    for index, (source, target) in enumerate(pairs):
        state_crosses(source, target, directory / str(index))


def test_any_layout_continues_what_another_saved(tmp_path: Path) -> None:
    pairs = [
        (Case(2, 1, 2, sequence_parallel=True), Case(1, 4, 1, zero=3)),
        (Case(1, 2, 2, zero=3), Case(2, 2, 1, options=ROUND_ROBIN)),
        (Case(1, 4, 1, zero=0), Case(2, 2, 1, dtype="bf16")),
        (Case(2, 1, 2, schedule="interleaved", virtual_stages=2), Case(2, 2, 1)),
        (Case(1, 2, 2, zero=2), Case(2, 2, 1, schedule="interleaved", virtual_stages=3)),
        (Case(1, 2, 2, zero=3, optimizer="muon"), Case(2, 2, 1, optimizer="muon")),
    ]
    run_ranks(4, cross_layouts, pairs, tmp_path)


def save_alone(case: Case, directory: Path) -> float:
    run = start(case)
    run.train(2)
    assert save(run, directory, 2) is None
    return run.train(1)[0][0]


def go_on(case: Case, directory: Path) -> float:
    run = resume(case, directory)
    found, saved = whole_state(run), state_on_disk(directory / "step-00000002")
    assert [key for key in saved if not torch.equal(saved[key], found[key])] == []
    return run.train(1)[0][0]


def test_the_number_of_ranks_may_change(tmp_path: Path) -> None:
    unbroken = run_ranks(1, save_alone, Case(zero=0), tmp_path)[0]
    for case in (Case(1, 1, 3, zero=1), Case(1, 2, 1, zero=3)):
        assert run_ranks(case.size, go_on, case, tmp_path)[0] == pytest.approx(unbroken, rel=1e-5)


def choosing(directory: Path) -> None:
    """What a run does with good, damaged, foreign and absent checkpoints, on two ranks."""
    case = Case(data=2)
    run = start(case)
    engine = run.engine
    store = run.store(directory)
    assert store.find_latest() is None
    assert store.load_latest(engine) is None
    states = {}
    for step in (1, 2, 3):
        run.train(1)
        store.save(engine, run.state, step=step)
        assert store.wait() is None
        states[step] = whole_state(run)

    damage(directory / "step-00000003" / "weights-00001.safetensors", position=-1)
    assert store.find_latest() == directory / "step-00000003"  # whole but for its tensors, which are not read yet
    assert (store.load_latest(engine) or {})["consumed_samples"] == 16
    assert same_state(states[2], whole_state(run)) == []
    with pytest.raises(CheckpointError, match=r"weights-00001.safetensors has changed bytes .*tensor "):
        store.load(engine, directory / "step-00000003")

    damage(directory / "step-00000002" / "manifest.json", position=40)
    assert (store.load_latest(engine) or {})["consumed_samples"] == 8
    assert same_state(states[1], whole_state(run)) == []
    assert engine.deepspeed.global_steps == 1

    other = run.store(directory, identity={"model": {"hidden_size": 7}})
    for attempt in (other.find_latest, lambda: other.load_latest(engine), lambda: other.resolve(directory)):
        with pytest.raises(CheckpointError, match="belongs to another model: model."):
            attempt()

    muon = replace(run, config=config_of(replace(case, optimizer="muon"))).store(directory)
    with pytest.raises(CheckpointError, match=r"state of adamw, and this run has optimizer.name=muon; use"):
        muon.load_latest(engine)
    assert muon.load(engine, directory, weights_only=True)["consumed_samples"] == 8

    for step in (1, 3):
        damage(directory / f"step-0000000{step}" / "manifest.json", position=40)
    for attempt in (store.find_latest, lambda: store.load_latest(engine), lambda: store.resolve(directory)):
        with pytest.raises(CheckpointError, match="no usable checkpoint"):
            attempt()
    with pytest.raises(CheckpointError, match="without its manifest"):
        store.resolve(directory / "step-00000099")


def going_back(directory: Path) -> None:
    """A run in its middle goes back to an earlier checkpoint, past later ones, which a restart then does not find."""
    run = start(Case(data=2))
    store = run.store(directory)
    for step in (1, 2, 3):
        run.train(1)
        store.save(run.engine, run.state, step=step, asynchronous=True)
    with pytest.raises(CheckpointError, match="step-00000009"):
        store.forget_after(9)
    assert len(list_checkpoints(directory)) == 3
    assert (store.load_latest(run.engine, up_to_step=2) or {})["consumed_samples"] == 16
    store.forget_after(2)
    assert (store.load_latest(run.engine) or {})["consumed_samples"] == 16
    assert [path.name for path in list_checkpoints(directory)] == ["step-00000002", "step-00000001"]
    assert store.load_latest(run.engine, up_to_step=0) is None


def test_a_run_can_go_back(tmp_path: Path) -> None:
    run_ranks(2, going_back, tmp_path)


def damage(file: Path, *, position: int) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        data = bytearray(file.read_bytes())
        data[position] ^= 4
        file.write_bytes(data)
    dist.barrier()


def test_a_run_resumes_from_the_newest_valid_checkpoint(tmp_path: Path) -> None:
    run_ranks(2, choosing, tmp_path)


def weights_only(directory: Path) -> None:
    source = start(Case(data=2, zero=2))
    source.train(2)
    assert save(source, directory, 2) is None
    saved = whole_state(source)
    run = start(Case(data=2, zero=3))
    run.train(1)
    before = whole_state(run)
    run.store(directory / "mine").load(run.engine, directory, weights_only=True)
    after = whole_state(run)
    assert (
        same_state(
            {key: value for key, value in saved.items() if key.startswith(("weight/", "working/"))},
            {key: value for key, value in after.items() if key.startswith(("weight/", "working/"))},
        )
        == []
    )
    assert (
        same_state(before, {**after, **{key: before[key] for key in before if key.startswith(("weight/", "working/"))}})
        == []
    )
    assert run.engine.deepspeed.global_steps == 1


def test_weights_alone_can_be_loaded(tmp_path: Path) -> None:
    run_ranks(2, weights_only, tmp_path)


def failing_saves(directory: Path) -> None:
    """One rank's disk fills up, in the background and in the foreground; training goes on, the next save works."""
    run = start(Case(data=2))
    engine = run.engine
    told: list[CheckpointError] = []
    store = run.store(directory)
    store._on_failure = told.append
    run.train(1)
    store.save(engine, run.state, step=1)
    real = os.write
    for asynchronous in (True, False):
        if dist.get_rank() == 1:
            os.write = full_disk
        store.save(engine, run.state, step=2, asynchronous=asynchronous)
        losses = run.train(1)
        error = store.wait()
        os.write = real
        assert error is not None
        assert "rank 1: OSError: [Errno 28] No space left on device" in str(error)
        assert losses[0][0] > 0
        dist.barrier()
        assert [path.name for path in directory.iterdir()] == ["step-00000001"]
        dist.barrier()  # the next save of the other rank would be seen here
    assert len(told) == 2
    assert store.wait() is None
    store.save(engine, run.state, step=3, asynchronous=True)
    assert store.wait() is None
    assert [path.name for path in list_checkpoints(directory)] == ["step-00000003", "step-00000001"]


def full_disk(descriptor: int, data: memoryview) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failing_save_does_not_stop_training(tmp_path: Path) -> None:
    run_ranks(2, failing_saves, tmp_path)


def snapshot_is_of_its_step(directory: Path) -> None:
    """The background save holds the state of its moment, though training went on before a byte was written."""
    run = start(Case(data=2))
    run.train(1)
    store = run.store(directory)
    real, moment = os.write, whole_state(run)

    def late(descriptor: int, data: memoryview) -> int:
        while not (directory / "go").exists():
            time.sleep(0.01)
        return real(descriptor, data)

    os.write = late
    store.save(run.engine, run.state, step=1, asynchronous=True)
    run.train(2)
    dist.barrier()
    directory.mkdir(exist_ok=True)
    (directory / "go").touch()
    assert store.wait() is None
    os.write = real
    on_disk = state_on_disk(directory / "step-00000001")
    assert [key for key in on_disk if not torch.equal(on_disk[key], moment[key])] == []


def test_a_background_save_holds_the_state_of_its_moment(tmp_path: Path) -> None:
    run_ranks(2, snapshot_is_of_its_step, tmp_path)


def outlive_a_killed_rank(directory: Path) -> str:
    """Rank 1 dies in the middle of a background save; the other is told, cleans up and does not wait for ever."""
    run = start(Case(data=2))
    run.train(1)
    store = run.store(directory)
    store.save(run.engine, run.state, step=1)
    if dist.get_rank() == 1:
        os.write = lambda descriptor, data: os.kill(os.getpid(), 9)  # type: ignore[assignment]
    store.save(run.engine, run.state, step=2, asynchronous=True)
    found = str(store.wait())
    (directory / "outcome").write_text(found)
    return found


def test_a_killed_rank_keeps_nobody_waiting(tmp_path: Path) -> None:
    ranks = Ranks(2, outlive_a_killed_rank, tmp_path)
    with pytest.raises(AssertionError, match="died|Connection closed by peer|Connection reset by peer"):
        ranks.results(timeout=60)
    assert "step 2 was not saved: another rank is gone" in (tmp_path / "outcome").read_text()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    run_ranks(1, resumes_at, tmp_path, 8)


def resumes_at(directory: Path, consumed: int) -> None:
    assert resume(Case(), directory).consumed == consumed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint and a half."""
    size = run_ranks(2, checkpoint_bytes, tmp_path / "measured")[0] * 3 // 2
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def checkpoint_bytes(directory: Path) -> int:
    run = start(Case(data=2))
    run.train(1)
    assert save(run, directory, 1) is None
    return sum(file.stat().st_size for file in directory.glob("*/*"))


def fill_the_disk(directory: Path) -> None:
    run = start(Case(data=2))
    run.train(1)
    store = run.store(directory, keep_last=1)
    store.save(run.engine, run.state, step=1)
    assert store.wait() is None
    before = whole_state(run)
    for step in (2, 3):
        run.train(1)
        store.save(run.engine, run.state, step=step, asynchronous=step == 2)
        run.train(1)
        assert "No space left on device" in str(store.wait())
        dist.barrier()
        assert [path.name for path in directory.iterdir()] == ["step-00000001"]
    again = resume(Case(data=2), directory)
    assert same_state(before, whole_state(again)) == []


def test_training_outlives_a_full_disk(small_disk: Path) -> None:
    run_ranks(2, fill_the_disk, small_disk)
