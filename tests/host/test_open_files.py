from __future__ import annotations

import resource

import pytest

from megatron_omega.config.layout import Layout
from megatron_omega.health.preflight import open_files_findings
from megatron_omega.host.open_files import allow_many_files


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """A limit of this test, as (soft, hard)."""
    limits = [(1024, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.append(pair))
    return limits


def test_the_soft_limit_is_raised_to_the_hard_one(limit: list[tuple[int, int]]) -> None:
    assert allow_many_files() == 4096 and limit[-1] == (4096, 4096)
    limit.append((1024, resource.RLIM_INFINITY))
    assert allow_many_files() == 1 << 17


def test_a_limit_that_is_too_low_is_a_finding(limit: list[tuple[int, int]]) -> None:
    limit.append((1024, 1024))
    layout = Layout(pipeline=8, data=64, tensor=2)
    (finding,) = open_files_findings(0, layout, "cuda")
    assert "may open 1,024" in finding and "needs 1,536" in finding
    assert open_files_findings(1, layout, "cuda") == [], "others have no connection for every rank"
    assert open_files_findings(1, layout, "cpu"), "gloo connects every rank with every other"
