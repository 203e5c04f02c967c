"""A run for a number of parameters, tokens and devices is of that size, and its file is one that runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_omega.commands.main import main
from megatron_omega.config.arguments import parse_arguments
from megatron_omega.config.load import resolve_run
from megatron_omega.errors import ConfigError
from megatron_omega.planner.hardware import find_hardware
from megatron_omega.planner.proposal import TOKENS_PER_PARAMETER, Wish, propose


@pytest.mark.parametrize(
    ("parameters", "devices", "gpu", "is_decoder_only"),
    [(10e6, 2, "cpu", True), (100e6, 8, "h100-80g", False), (1e9, 16, "a100-80g", False), (7e9, 64, "h100-80g", True)],
)
def test_a_proposal_has_the_size_that_was_asked_for(
    parameters: float, devices: int, gpu: str, is_decoder_only: bool
) -> None:
    found = propose(Wish(parameters, devices, is_decoder_only=is_decoder_only), find_hardware(gpu))
    assert found.parameters == pytest.approx(parameters, rel=0.1)
    assert found.estimate.fits and found.estimate.candidate.world_size == devices
    tokens = found.estimate.tokens_per_second * found.seconds
    assert tokens == pytest.approx(TOKENS_PER_PARAMETER * found.parameters, rel=0.01)
    assert (found.values["model"]["encoder_layers"] == 0) == is_decoder_only


@pytest.mark.parametrize("words", [["--gpus", "2", "--decoder-only"], ["--gpus", "8", "--gpu", "h100-80g"]])
def test_the_file_that_is_written_runs(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.yaml"
    assert main(["configure", "--parameters", "10e6", "--output", str(path), *words]) == 0
    assert f"wrote {path}: " in capsys.readouterr().out
    text = path.read_text()
    assert all(text.splitlines()[index - 1].lstrip().startswith("#") or "prefix" in line or not line.startswith("  ")
               for index, line in enumerate(text.splitlines()) if not line.lstrip().startswith("#"))  # fmt: skip
    found = resolve_run(parse_arguments(["--config", str(path)]), int(words[1]))
    assert found.config.logging.run_directory == "runs/small" and not found.notices
    with pytest.raises(SystemExit):
        main(["configure", "--parameters", "10e6", "--output", str(path), *words])
    assert "exists" in capsys.readouterr().err


def test_wishes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError) as error:
        propose(Wish(-1, 0), find_hardware("cpu"))
    assert len(error.value.findings) == 2
    with pytest.raises(ConfigError, match="fit"):
        propose(Wish(70e9, 1), find_hardware("a100-40g"))
