"""How a process ends with an error of the user: what it says, who says it, and the exit code."""

from __future__ import annotations

import pytest

from megatron_omega.commands import ending
from megatron_omega.commands.ending import exit_cleanly
from megatron_omega.errors import CheckpointError, ConfigError, DataError, OmegaError, Preempted


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the list of what was waited for; nothing is waited for in fact."""
    found: list[float] = []
    monkeypatch.setattr(ending.time, "sleep", found.append)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    return found


def end(error: BaseException) -> object:
    with pytest.raises(SystemExit) as ended, exit_cleanly():
        raise error
    return ended.value.code


@pytest.mark.parametrize(("error", "code"), [(ConfigError, 2), (DataError, 3), (CheckpointError, 4), (Preempted, 75)])
def test_one_sentence_and_its_code(
    error: type[OmegaError], code: int, waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert end(error("found this; do that")) == code
    assert capsys.readouterr().err.endswith("found this; do that\n") and not waits


def test_several_findings_are_numbered(waits: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    end(ConfigError("one", "two"))
    assert capsys.readouterr().err == "errors:\n1. one\n2. two\n"


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_other_ranks_speak_only_where_rank_0_did_not(
    variable: str, waits: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "0")
    end(ConfigError("said at once"))
    assert not waits and "said at once" in capsys.readouterr().err
    for rank in (1, 2, 999):
        monkeypatch.setenv(variable, str(rank))
        assert end(ConfigError("said late")) == 2
        assert "said late" in capsys.readouterr().err
    assert 0 < waits[0] < waits[1] < waits[2] == ending.LONGEST_GRACE_SECONDS
    assert end(Preempted("all ranks together")) == 75
    assert len(waits) == 3 and not capsys.readouterr().err


def test_errors_of_ours_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), exit_cleanly():
        raise ZeroDivisionError
