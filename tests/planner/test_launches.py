"""The kernels that a plan expects of a layer against those that torch's dispatcher sees of the real one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_omega.config.schema import Branches, ModelConfig, RunConfig
from megatron_omega.model.context import ModelContext
from megatron_omega.model.layers import DecoderLayer, EncoderLayer
from megatron_omega.model.stream import Stream
from megatron_omega.planner.work import BACKWARD_LAUNCHES, layer_works
from megatron_omega.studies.device.recording import KernelCounts

TOKENS, WIDTH = 256, 96
ENCODERS: list[Branches] = [
    ("full", "local", "axial", "dynamic"), ("dynamic", "local", "axial"), ("full", "dynamic"), ("full",), ("axial",),
]  # fmt: skip
DECODERS: list[Branches] = [("causal", "local", "axial"), ("causal",), ("select", "causal"), ("local",)]


def config_of(**fields: object) -> RunConfig:
    sizes = {"hidden_size": WIDTH, "ffn_hidden_size": 128, "num_attention_heads": 4, "head_dim": 20}
    return RunConfig.model_validate(
        {
            "model": sizes | {"encoder_layers": 2, "decoder_layers": 2} | fields,
            "data": {"encoder_seq_length": TOKENS, "decoder_seq_length": TOKENS},
            "precision": {"dtype": "bf16"},
            "parallel": {"recompute": "none"},
        }
    )


def counted(call: Callable[[], Tensor]) -> tuple[int, int]:
    """Return the kernels of both passes; facts of the batch exist already, as for all layers but the first."""
    call()
    with KernelCounts() as forward:
        output = call()
    gradient = torch.ones_like(output)
    with KernelCounts() as backward:
        output.backward(gradient)
    return forward.counts.total(), backward.counts.total()


def drawn() -> tuple[Tensor, Stream]:
    hidden = torch.randn(1, TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    return hidden, Stream(torch.ones(1, TOKENS, dtype=torch.long), ModelContext(ModelConfig()).kernels)


@pytest.mark.parametrize("branches", ENCODERS, ids="-".join)
def test_an_encoder_layer_launches_what_the_plan_says(branches: Branches) -> None:
    config, (hidden, stream) = config_of(encoder_branches=branches), drawn()
    layer = EncoderLayer("encoder", ModelContext.of(config), branches).bfloat16()
    forward, _ = counted(lambda: layer(hidden, stream))
    assert forward == layer_works(config)["encoder"].launches


@pytest.mark.parametrize("is_alone", [True, False])
@pytest.mark.parametrize("branches", DECODERS, ids="-".join)
def test_a_decoder_layer_launches_what_the_plan_says(branches: Branches, *, is_alone: bool) -> None:
    fields = {"encoder_layers": 0} if is_alone else {}
    config, (hidden, stream), (memory, memory_stream) = config_of(decoder_branches=branches, **fields), drawn(), drawn()
    layer = DecoderLayer("decoder", ModelContext.of(config), branches).bfloat16()
    given = (hidden, stream) if is_alone else (hidden, stream, memory, memory_stream)
    forward, _ = counted(lambda: layer(*given))
    assert forward == layer_works(config)["decoder"].launches


def test_backward_passes_of_the_layers_of_the_default_launch_what_the_plan_says() -> None:
    config, (hidden, stream), (memory, memory_stream) = config_of(), drawn(), drawn()
    context, model = ModelContext.of(config), config.model
    encoder = EncoderLayer("encoder", context, model.layer_branches("encoder", 0)).bfloat16()
    decoder = DecoderLayer("decoder", context, model.layer_branches("decoder", 0)).bfloat16()
    passes = [counted(lambda: encoder(hidden, stream)), counted(lambda: decoder(hidden, stream, memory, memory_stream))]
    forward, backward = (sum(found) for found in zip(*passes, strict=True))
    assert backward / forward == pytest.approx(BACKWARD_LAUNCHES, abs=0.01)
