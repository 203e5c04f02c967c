"""How parameters are optimised at other widths and depths; that it works is shown by tests/studies/test_coordinates.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_omega.config.schema import ModelConfig
from megatron_omega.model.context import ModelContext
from megatron_omega.model.omega import Omega
from megatron_omega.parallel.parameters import ParameterInfo, Scales, declared_parameters


def declared(**fields: Any) -> dict[str, ParameterInfo]:
    settings: dict[str, Any] = {"ffn_hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "vocab_size": 128}
    with torch.device("meta"):
        omega = Omega(ModelContext(ModelConfig(**settings | fields)))
    return {info.name: info for info, _ in declared_parameters(omega)}


def test_at_the_base_nothing_is_scaled_but_what_does_not_decay() -> None:
    found = declared(hidden_size=128, encoder_layers=1, decoder_layers=1, table_multiplier=1)
    assert {info.scales for info in found.values()} == {Scales(), Scales(weight_decay=0.0)}


@pytest.mark.parametrize("width", [64, 512])
def test_rate_times_decay_of_a_matrix_is_the_same_at_every_width(width: int) -> None:
    found = declared(hidden_size=width, encoder_layers=1, decoder_layers=1, table_multiplier=3)
    for name, info in found.items():
        table = 3 if name == "token_table.weight" else 1
        assert info.scales.learning_rate * info.scales.weight_decay == pytest.approx(
            table * bool(info.scales.weight_decay)
        )


def test_epsilon_follows_width_and_the_depth_of_the_stack() -> None:
    found = declared(hidden_size=512, encoder_layers=4, decoder_layers=2, table_multiplier=1)
    assert found["encoder.layers.3.feed_forward.down.weight"].scales.epsilon == 1 / 4 / 4
    assert found["decoder.layers.1.cross.q.weight"].scales == Scales(1 / 4, 4.0, 1 / 4 / 2)
    assert found["encoder.layers.0.attention_norm.weight"].scales == Scales(1.0, 0.0, 1 / 4 / 4)
    assert found["head.mlm.dense.weight"].scales.epsilon == 1 / 4
    assert found["token_table.weight"].scales == Scales(0.5, 2.0, 0.5)


def test_the_first_version_scaled_the_rate_of_matrices_only() -> None:
    found = declared(hidden_size=512, encoder_layers=4, decoder_layers=2, parametrization=1, table_multiplier=1)
    scales = {info.scales for info in found.values()}
    assert scales == {Scales(), Scales(weight_decay=0.0), Scales(learning_rate=0.25)}
