"""Fixtures shared by all tests."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings
from tiny import TinyCorpus, make_tiny_corpus

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _own_place() -> Iterator[None]:
    """Take back what a run in this process said of its place: a later test would be one rank of one."""
    kept = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    yield
    for name, value in kept.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(autouse=True)
def _own_process_group() -> Iterator[None]:
    """Take down the process group that a run in this process left: a later test would find itself in it."""
    had_one = dist.is_initialized()
    yield
    if dist.is_initialized() and not had_one:
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _own_random_numbers() -> None:
    """Begin every test with the same random numbers, whichever tests ran before it in this process."""
    torch.manual_seed(1)


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    """Take back what a test did to the package's logger: a later one would hear each line twice, or through a closed file."""
    yield
    logger = logging.getLogger("megatron_omega")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    """A corpus made once for all tests."""
    return make_tiny_corpus(tmp_path_factory.mktemp("corpus"))
