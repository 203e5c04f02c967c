"""Hosts of a hostfile: those that answer are used, and a start waits only if it cannot do without the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_omega.errors import ConfigError
from megatron_omega.launching.by_ssh import listed, reachable


def test_hosts_are_read_as_deepspeed_reads_them(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("# two racks\nn1 slots=8\n\nn2 slots=8 # the new one\n")
    assert listed(tmp_path / "hostfile") == ["n1", "n2"]
    with pytest.raises(ConfigError, match="absent cannot be read"):
        listed(tmp_path / "absent")


def test_enough_that_answer_are_not_waited_for() -> None:
    found = reachable(["n1", "n2", "n3"], 2, ask=lambda host: host != "n2", pause=lambda _: pytest.fail("it waits"))
    assert found == ["n1", "n3"]


def test_too_few_are_waited_for() -> None:
    asked: list[str] = []
    pauses: list[float] = []

    def answers(host: str) -> bool:
        asked.append(host)
        return host == "n1" or len(pauses) == 2  # n2 boots

    assert reachable(["n1", "n2"], 2, ask=answers, pause=pauses.append) == ["n1", "n2"]
    assert len(asked) == 6
    with pytest.raises(ConfigError, match="n2: no answer by ssh for 0 s, and 2 hosts are needed"):
        reachable(["n1", "n2"], 2, ask=lambda host: host == "n1", patience_seconds=0, pause=pauses.append)
