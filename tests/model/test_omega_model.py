"""The model as a whole: its size, what it cannot see, and that its options change nothing they should not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from megatron_omega import accounting
from megatron_omega.config.schema import ModelConfig, ObjectiveConfig
from megatron_omega.model.attention_mix import SelfAttention
from megatron_omega.model.context import ModelContext
from megatron_omega.model.kernels import PORTABLE
from megatron_omega.model.omega import Omega, omega_layers
from megatron_omega.model.stream import Stream
from megatron_omega.parallel.parameters import declared_parameters

SMALL: dict[str, Any] = {
    "hidden_size": 48, "ffn_hidden_size": 96, "num_attention_heads": 6, "encoder_layers": 2, "decoder_layers": 2,
    "vocab_size": 250, "local_window": 16, "axial_width": 8,
}  # fmt: skip
PATTERN: dict[str, Any] = {
    "encoder_layers": 3,
    "encoder_branches": [["full", "local"], ["axial", "local", "dynamic"]],
    "decoder_branches": [["causal"], ["local", "axial"]],
}
LENGTH = 64
OBJECTIVE = ObjectiveConfig()


def context(objective: ObjectiveConfig = OBJECTIVE, **fields: Any) -> ModelContext:
    model = ModelConfig(**SMALL | fields)
    return ModelContext(model, objective, encoder_seq_length=LENGTH, decoder_seq_length=LENGTH, seed=1)


def attend_all(attention: SelfAttention, hidden: Tensor, segments: Tensor) -> Tensor:
    return attention(hidden, attention.facts(Stream(segments, PORTABLE), hidden.dtype))


def made_up(model: ModelConfig, seed: int = 0) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Two packed documents in two rows, as (inputs, labels)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.vocab_size, (2, 2, LENGTH), generator=generator)
    segments = torch.ones(2, LENGTH, dtype=torch.long)
    segments[:, 40:] = 2
    segments[:, 60:] = 0
    lm = torch.where(segments > 0, ids[1], -100)
    mlm = torch.full_like(lm, -100)
    mlm[:, :40:7] = 5
    decoder = (ids[1], segments)
    inputs = decoder if model.is_decoder_only else (ids[0], segments, *decoder)
    return inputs, (lm, mlm, torch.tensor([1 / 120, 1 / 12]))


def test_the_large_model_has_exactly_the_parameters_of_its_card() -> None:
    with torch.device("meta"):
        omega = Omega(ModelContext(ModelConfig()))
    built = sum(parameter.numel() for parameter in omega.parameters())
    d, f, heads, v, layers = 960, 16_384, 48, 32_768, 96
    gains, dynamic = 4 * 2 * heads * 20, 2 * heads * (d + 1)
    encoder = 4 * 4 * d * d + 3 * d * f + 2 * d + gains + dynamic
    decoder = (3 + 1) * 4 * d * d + 3 * d * f + 3 * d + gains
    closed = layers * (encoder + decoder) + v * d + 2 * d + (d * d + 2 * d + v)
    assert built == closed == accounting.parameter_count(ModelConfig()) == 11_934_059_264
    assert round(built / 1e9, 1) == 11.9


@pytest.mark.parametrize(
    "fields", [{}, {"encoder_layers": 0, "decoder_branches": ("causal",)}, {"mlm_head": False}, PATTERN]
)
def test_every_parameter_has_one_name_and_the_count_is_the_closed_form(fields: dict[str, Any]) -> None:
    omega = Omega(context(**fields))
    infos = [info for info, _ in declared_parameters(omega)]
    assert len({info.name for info in infos}) == len(infos)
    count = sum(parameter.numel() for parameter in omega.parameters())
    assert count == accounting.parameter_count(context(**fields).model)
    assert [recipe.name for recipe in omega_layers(context(**fields))] == accounting.layer_names(
        context(**fields).model
    )


@pytest.mark.parametrize("branch", ["causal", "local", "axial"])
def test_no_decoder_branch_sees_the_future(branch: Any) -> None:
    made = context(decoder_branches=(branch,))
    attention = SelfAttention("test", (branch,), made, causal=True)
    segments = torch.ones(1, LENGTH, dtype=torch.long)
    hidden = torch.randn(1, LENGTH, 48)
    for cut in (1, 13, 31, 63):
        changed = hidden.clone()
        changed[:, cut:] = torch.randn(1, LENGTH - cut, 48)
        before, after = (attend_all(attention, state, segments)[:, :cut] for state in (hidden, changed))
        assert torch.equal(before, after)
    past = hidden.clone()
    past[:, 0] += 1
    seen = (attend_all(attention, past, segments) != attend_all(attention, hidden, segments)).any(dim=-1)
    assert seen[0, :8].all(), "a token of the same row and window must see the first one"


@pytest.mark.parametrize(
    "fields", [{}, {"encoder_layers": 0}, {"positions": "learned"}, {"positions": "sinusoidal"}, PATTERN]
)
def test_the_whole_decoder_sees_no_future_and_no_other_document(fields: dict[str, Any]) -> None:
    omega = Omega(context(**fields))
    inputs, _ = made_up(omega.context.model)
    *encoder, ids, segments = inputs
    before = omega.hidden(inputs)[0]
    for cut in (1, 17, 39):
        changed = ids.clone()
        changed[:, cut:40] = (changed[:, cut:40] + 1) % 250
        after = omega.hidden((*encoder, changed, segments))[0]
        assert torch.equal(before[:, :cut], after[:, :cut]), "a later token was seen"
        assert torch.equal(before[:, 40:60], after[:, 40:60]), "another document was seen"
        assert not torch.equal(before[:, cut:40], after[:, cut:40])
    if encoder:
        changed = encoder[0].clone()
        changed[:, 40:] = (changed[:, 40:] + 1) % 250
        after = omega.hidden((changed, encoder[1], ids, segments))[0]
        assert torch.equal(before[:, :40], after[:, :40]), "the other document's encoder text was seen"
        assert not torch.equal(before[:, 40:60], after[:, 40:60])


@pytest.mark.parametrize("recompute", ["swiglu", "ffn", "full"])
def test_recomputing_changes_neither_loss_nor_gradients(recompute: Any) -> None:
    made = context()
    reference, other = Omega(made), Omega(replace(made, recompute=recompute))
    inputs, labels = made_up(made.model)
    losses = [omega(inputs, labels) for omega in (reference, other)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == losses[1].item()
    for left, right in zip(reference.parameters(), other.parameters(), strict=True):
        assert left.grad is not None and right.grad is not None
        assert torch.allclose(left.grad, right.grad, rtol=1e-5, atol=1e-8)


def test_every_parameter_learns_and_padding_does_not_matter() -> None:
    omega = Omega(context())
    with torch.no_grad():  # the dynamic branch starts at zero, where its own gradients vanish for no one
        for parameter in omega.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    inputs, labels = made_up(omega.context.model)
    loss = omega(inputs, labels)
    loss.backward()
    for info, parameter in declared_parameters(omega):
        assert parameter.grad is not None and parameter.grad.any(), info.name
    encoder_ids, segments, decoder_ids, _ = inputs
    noise = [torch.where(segments == 0, 7, ids) for ids in (encoder_ids, decoder_ids)]
    assert omega((noise[0], segments, noise[1], segments), labels).item() == loss.item()


@pytest.mark.parametrize("weighing", ["labels", "means"])
@pytest.mark.parametrize("version", [1, 2])
def test_loss_is_lm_plus_weighted_mlm_plus_z(weighing: Any, version: int) -> None:
    objective = ObjectiveConfig(mlm_weight=0.5, mlm_weighing=weighing)
    omega = Omega(context(objective=objective, parametrization=version))
    logit_multiplier = 0.5 if version == 1 else 0.5 * (128 / 48) ** 0.5
    inputs, labels = made_up(omega.context.model)
    loss = omega(inputs, labels)
    hidden, encoded, bias = omega.hidden(inputs)
    total = 0.0
    mlm_factor = labels[2][0 if weighing == "labels" else 1]
    for states, wanted, offset, weight, factor in (
        (hidden, labels[0], 0.0, 1.0, labels[2][0]), (encoded, labels[1], bias, 0.5, mlm_factor),
    ):  # fmt: skip
        logits = (states @ omega.table.weight.t() * logit_multiplier + offset)[..., :250][wanted >= 0].double()
        log_partition = logits.logsumexp(-1)
        cross_entropy = (log_partition - logits.gather(1, wanted[wanted >= 0].unsqueeze(1)).squeeze(1)).sum()
        total += weight * factor.item() * (cross_entropy + 1e-4 * log_partition.square().sum()).item()
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_layers_take_the_lists_of_a_pattern_in_turn() -> None:
    omega = Omega(context(**PATTERN))
    found = {name: cast(Any, omega.module_named(name)).attention.branches for name in omega.names if ".layers." in name}
    assert found == {
        "encoder.layers.0": ("full", "local"), "encoder.layers.1": ("axial", "local", "dynamic"),
        "encoder.layers.2": ("full", "local"), "decoder.layers.0": ("causal",), "decoder.layers.1": ("local", "axial"),
    }  # fmt: skip
    shapes = {info.name: info.shape for info, _ in declared_parameters(omega)}
    assert shapes["encoder.layers.1.attention.qkv.weight"] == (3, 3, 6, 8, 48)
    assert shapes["decoder.layers.0.attention.out.weight"] == (48, 1, 6, 8)


def test_one_list_in_a_pattern_is_the_list_itself() -> None:
    inputs, labels = made_up(context().model)
    flat, nested = (Omega(context(encoder_branches=branches)) for branches in (["full", "axial"], [["full", "axial"]]))
    assert flat(inputs, labels).item() == nested(inputs, labels).item()


def test_dynamic_branch_starts_as_plain_attention() -> None:
    dynamic, full = (SelfAttention("same", (branch,), context(), causal=False) for branch in ("dynamic", "full"))
    hidden, segments = torch.randn(2, LENGTH, 48), torch.ones(2, LENGTH, dtype=torch.long)
    assert torch.equal(attend_all(dynamic, hidden, segments), attend_all(full, hidden, segments))


def test_a_mix_is_the_sum_of_its_branches() -> None:
    branches: Any = ("full", "local", "axial", "dynamic")
    mix = SelfAttention("mix", branches, context(), causal=False)
    hidden, segments = torch.randn(2, LENGTH, 48), torch.ones(2, LENGTH, dtype=torch.long)
    total = torch.zeros_like(hidden)
    for index, branch in enumerate(branches):
        alone = SelfAttention("alone", (branch,), context(), causal=False)
        with torch.no_grad():
            alone.qkv.weight.copy_(mix.qkv.weight[index : index + 1])
            alone.out.weight.copy_(mix.out.weight[:, index : index + 1])
        total += attend_all(alone, hidden, segments)
    assert torch.allclose(attend_all(mix, hidden, segments), total, atol=1e-5)


def test_a_stream_of_16384_tokens_runs_and_what_it_keeps_grows_as_it_does() -> None:
    kept = []
    for length in (4096, 16_384):
        made = context(hidden_size=24, ffn_hidden_size=24, num_attention_heads=2, encoder_layers=1, decoder_layers=1)
        omega = Omega(made)
        segments = torch.arange(length).div(512, rounding_mode="floor").add(1).unsqueeze(0)
        ids, few = (
            torch.zeros_like(segments),
            (torch.zeros(1, 32, dtype=torch.long), torch.ones(1, 32, dtype=torch.long)),
        )
        storages: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: Tensor, storages: dict[int, torch.UntypedStorage] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden, encoded, _ = omega.hidden((ids, segments, *few))
        (hidden.sum() + encoded.sum()).backward()
        total = sum(storage.nbytes() for storage in storages.values())
        columns = made.model.axial_width * (length // made.model.axial_width) ** 2 * 4  # mask of the axial columns
        kept.append(total - columns)
    assert 3.5 < kept[1] / kept[0] < 4.5
