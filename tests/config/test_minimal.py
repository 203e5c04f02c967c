"""A short configuration of one's own gives a sensible run: no finding, no number that would surprise."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from megatron_omega.accounting import parameter_count
from megatron_omega.config import yaml_text
from megatron_omega.config.arguments import parse_arguments
from megatron_omega.config.load import ResolvedRun, resolve_run
from megatron_omega.data.sidecar import Sidecar, sidecar_path, to_json
from megatron_omega.run.preview import describe

FOLDER = Path(__file__).parent / "minimal"


class Wanted(NamedTuple):
    """What one would expect of a file."""

    world_size: int
    parameters: float
    seq_length: int
    heads: int
    tokens_a_step: int


MINIMAL = {
    "decoder-10m": Wanted(1, 10e6, 512, 10, 8 * 512),
    "encoder-decoder-100m": Wanted(1, 100e6, 1024, 10, 8 * 2 * 1024),
    "encoder-decoder-100m-8-gpus": Wanted(8, 100e6, 1024, 10, 256 * 2 * 1024),
}


def resolved(name: str, folder: Path) -> ResolvedRun:
    """Resolve a file beside a corpus of 1,000 pieces."""
    (folder / "corpus").mkdir()
    sidecar = Sidecar("0" * 64, 1000, 3, 90, np.dtype(np.uint16).name, "text")
    sidecar_path(folder / "corpus/text_text_document").write_text(to_json(sidecar))
    return resolve_run(parse_arguments(["--config", str(FOLDER / f"{name}.yaml")]), MINIMAL[name].world_size)


def test_each_file_is_known_and_short() -> None:
    files = {path.stem: yaml_text.parse(path.read_text(), str(path)) for path in FOLDER.glob("*.yaml")}
    assert files.keys() == MINIMAL.keys()
    assert all(sum(len(section) for section in values.values()) <= 8 for values in files.values())


@pytest.mark.parametrize("name", MINIMAL)
def test_a_short_file_gives_a_sensible_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run, wanted = resolved(name, tmp_path), MINIMAL[name]
    config = run.config
    assert run.notices == ()
    assert parameter_count(config.model) == pytest.approx(wanted.parameters, rel=0.1)
    assert config.model.vocab_size == 1000 and config.model.num_attention_heads == wanted.heads
    assert 2.5 < config.model.ffn_hidden_size / config.model.hidden_size < 3
    assert config.data.decoder_seq_length == wanted.seq_length
    assert config.data.encoder_seq_length == (0 if config.model.is_decoder_only else wanted.seq_length)
    assert config.schedule.warmup_steps == 0.02 * config.training.train_steps
    tokens = config.batch.global_batch_size * (config.data.encoder_seq_length + config.data.decoder_seq_length)
    assert tokens == wanted.tokens_a_step
    assert config.precision.dtype == ("bf16" if wanted.world_size > 1 else "fp32")
    text = describe(run)
    assert f"= {wanted.world_size} ranks" in text and "model.vocab_size=1000: the tokenizer's" in text
    assert "nan" not in text.lower() and "inf " not in text
