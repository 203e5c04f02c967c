"""Fixtures shared by all tests."""

from __future__ import annotations

import os

import pytest
from tiny import TinyCorpus, make_tiny_corpus

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    """A corpus made once for all tests."""
    return make_tiny_corpus(tmp_path_factory.mktemp("corpus"))
