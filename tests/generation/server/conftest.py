"""Fixtures of the server's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from served_models import SHAPES, Gated, application, client_of
from serving import Process, serving
from starlette.testclient import TestClient


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    """A server of an encoder-decoder, a decoder-only model, and one that fills no masks, in this process."""
    with client_of(application(*SHAPES)) as found:
        yield found


@pytest.fixture
def gated() -> Gated:
    """A server whose steps are let one by one."""
    return Gated()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A server of the models one and two, as a process."""
    with serving(tmp_path_factory.mktemp("served"), "--max-queue", 40) as found:
        yield found
