from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_omega.config.schema import Corpus, RunConfig
from megatron_omega.data.batch import Batch, Sample
from megatron_omega.data.indexed import token_dtype, write_shard
from megatron_omega.data.loader import Loader, build_batch, micro_batch_indices
from megatron_omega.data.sources import open_sources
from megatron_omega.errors import DataError

MakeConfig = Callable[..., RunConfig]


@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=40)
def test_any_layout_takes_the_same_samples_in_each_step(
    consumed: int, micro: int, replicas: int, accumulation: int
) -> None:
    size = micro * replicas * accumulation
    taken: list[list[int]] = [[], []]
    for rank in range(replicas):
        batches = micro_batch_indices(consumed, lambda at: [range(at, at + size)], micro, rank, replicas)
        for step in (0, 1):
            for number in range(accumulation):
                indices = next(batches)
                first = consumed + step * size + (number * replicas + rank) * micro
                assert indices == list(range(first, first + micro))
                taken[step] += indices
    assert sorted(taken[0]) == list(range(consumed, consumed + size))
    assert sorted(taken[1]) == list(range(consumed + size, consumed + 2 * size))


def test_the_batch_may_grow() -> None:
    indices = micro_batch_indices(0, lambda at: [range(at, at + (2 if at < 4 else 4))], 1, 0, 2)
    assert list(itertools.islice(indices, 6)) == [[0], [2], [4], [6], [8], [10]]


def test_a_step_may_pass_over_samples() -> None:
    indices = micro_batch_indices(0, lambda at: [range(at, 2), range(6, 8)] if at < 6 else [range(at, at + 4)], 1, 1, 2)
    assert list(itertools.islice(indices, 4)) == [[1], [7], [9], [11]]


def test_a_batch_that_cannot_be_dealt_is_refused() -> None:
    with pytest.raises(ValueError, match="6 samples cannot be dealt"):
        next(micro_batch_indices(0, lambda _: [range(6)], 2, 0, 2))


def assert_equal(one: Batch, other: Batch) -> None:
    for name in Batch.__dataclass_fields__:
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_change_nothing(make_config: MakeConfig, workers: int) -> None:
    source = open_sources(make_config()).train
    wanted = [[4, 5], [0, 1], [9, 2], [3, 3], [7, 8]]
    with Loader(source, iter(wanted), workers, 2) as loader:
        found = list(loader)
        pids = loader.worker_pids
    assert len(found) == len(wanted)
    for batch, indices in zip(found, wanted, strict=True):
        assert_equal(batch, build_batch(source, indices))
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_workers_leave_requests_to_stop_to_training(make_config: MakeConfig) -> None:
    """A scheduler signals every process of a run, at any moment: here before the workers are up."""
    source = open_sources(make_config()).train
    with Loader(source, iter([[4, 5], [0, 1], [9, 2]]), 2, 1) as loader:
        for pid in loader.worker_pids:
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
                os.kill(pid, number)
        assert len(list(loader)) == 3


def test_a_worker_that_is_killed_is_replaced_and_nothing_lost(make_config: MakeConfig) -> None:
    source = open_sources(make_config()).train
    with Loader(source, ([n] for n in itertools.count()), 2, 2) as loader:
        found = [next(loader)]
        killed = loader.worker_pids[1]
        os.kill(killed, signal.SIGKILL)
        found += [next(loader) for _ in range(8)]
        assert killed not in loader.worker_pids
    for index, batch in enumerate(found):
        assert_equal(batch, build_batch(source, [index]))


class Deadly:
    """A source that ends every process that reads it."""

    def __getitem__(self, index: int) -> Sample:
        os._exit(3)


def test_workers_that_keep_dying_are_an_error_and_not_a_hang() -> None:
    expected = pytest.raises(DataError, match="ended with exit code 3")
    with Loader(Deadly(), ([n] for n in itertools.count()), 1, 1) as loader, expected:
        next(loader)


def test_an_error_in_a_worker_arrives_as_it_is(make_config: MakeConfig, tmp_path: Path) -> None:
    write_shard(f"{tmp_path}/wild", [[200] * 90 + [777]] * 90, token_dtype(600))
    source = open_sources(make_config(corpora=(Corpus(prefix=f"{tmp_path}/wild"),))).train
    with Loader(source, iter([[0]]), 1, 1) as loader, pytest.raises(DataError, match="token id 777"):
        next(loader)


def test_closing_twice_is_harmless(make_config: MakeConfig) -> None:
    loader = Loader(open_sources(make_config()).train, iter([[0], [1]]), 1, 1)
    loader.close()
    loader.close()
    with pytest.raises(StopIteration):
        next(loader)


def test_the_data_wing_imports_no_torch() -> None:
    code = (
        "import sys, megatron_omega.data.loader_worker, megatron_omega.data.samples; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
