"""What a configuration of an earlier version means."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from megatron_omega.checkpoint.catalogue import identity_differences, require_identity
from megatron_omega.config.history import with_earlier_meaning
from megatron_omega.config.schema import ModelConfig, ObjectiveConfig, RunConfig
from megatron_omega.errors import CheckpointError

LATER = {
    "model": {"parametrization", "table_multiplier", "decoder_start", "decoder_overlap", "shared_mode_token"},
    "objective": {"mlm_weighing", "mask_span_length", "overlap_labels"},
}


def stored_by_the_first_version() -> dict[str, Any]:
    values = RunConfig(model=ModelConfig(depth_base=2)).model_dump(mode="json")
    return {
        name: {key: value for key, value in section.items() if key not in LATER.get(name, ())}
        for name, section in values.items()
    }


def test_a_stored_configuration_means_what_was_done() -> None:
    config = RunConfig.model_validate(stored_by_the_first_version())
    assert (config.model.parametrization, config.model.decoder_start) == (1, "begin")
    assert not config.model.shared_mode_token and config.model.table_multiplier == 1
    assert (config.objective.mlm_weighing, config.objective.mask_span_length) == ("means", 1)
    assert config.model.residual_multiplier(96) == 2 / 192 and config.model.logit_multiplier == 0.5
    again = RunConfig.model_validate(config.model_dump(mode="json"))
    assert again == config


def test_a_fresh_configuration_has_the_defaults_of_today() -> None:
    assert ModelConfig(hidden_size=64, encoder_layers=2).parametrization == 2
    assert ModelConfig().decoder_start == "prefix" and ObjectiveConfig().mlm_weighing == "labels"
    assert RunConfig.model_validate(RunConfig().model_dump(mode="json")) == RunConfig()


def test_what_a_stored_configuration_says_itself_stands() -> None:
    stored = stored_by_the_first_version()["model"] | {"decoder_start": "prefix"}
    assert ModelConfig.model_validate(stored).decoder_start == "prefix"
    assert with_earlier_meaning("model", "no section") == "no section"


def test_a_checkpoint_of_the_first_version_belongs_to_a_run_that_acts_alike(tmp_path: Any) -> None:
    class Stored:
        identity: ClassVar[dict[str, Any]] = {"model": stored_by_the_first_version()["model"], "tokenizer": "t"}

    alike = ModelConfig.model_validate(stored_by_the_first_version()["model"]).model_dump(mode="json")
    require_identity(tmp_path, Stored(), {"model": alike, "tokenizer": "t"})  # pyright: ignore[reportArgumentType]
    today = {**alike, "decoder_start": "prefix"}
    assert identity_differences(alike, today)
    with pytest.raises(CheckpointError, match=r"model\.decoder_start is 'begin' in the checkpoint and 'prefix'"):
        require_identity(tmp_path, Stored(), {"model": today, "tokenizer": "t"})  # pyright: ignore[reportArgumentType]
