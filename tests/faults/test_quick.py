"""The quick part of `make faults`: two ranks, one fault of each family."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tiny import TinyCorpus

from faults.catalogue import FAULTS, exception, kill, not_a_number
from faults.chaos import make_plan
from faults.laboratory import Laboratory

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def lab(tiny_corpus: TinyCorpus) -> Iterator[Laboratory]:
    with Laboratory(tiny_corpus, layout="1x2x1", seed=5) as laboratory:
        yield laboratory


@pytest.mark.parametrize(
    "fault",
    [kill("last"), FAULTS["SIGSTOP of a rank"], FAULTS["SIGTERM, twice"], exception("hook"), not_a_number],
    ids=["kill", "stop", "ask", "exception", "not a number"],
)
def test_a_run_survives(lab: Laboratory, fault: object) -> None:
    outcome = fault(lab)  # pyright: ignore[reportCallIssue]
    assert outcome.passes, f"{outcome}"


def test_chaos_is_a_function_of_its_seed(lab: Laboratory) -> None:
    lab.random.seed(3)
    plan = make_plan(25, 300, 8, lab.random)
    lab.random.seed(3)
    assert make_plan(25, 300, 8, lab.random) == plan
    assert len(plan.outside) + len(plan.inside) + len(plan.at_start) == 25
