"""Coordinate checks: how far every kind of activation moves in the first steps, at one width and depth.

In a parametrization that transfers, the movement is the same at every width and depth (Tensor Programs V, arXiv
2203.03466; CompleteP, 2505.01618). The model is the real one with the real parameter groups; the batch is made up, and
the same in all steps, which aligns the updates as much as they can be.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megatron_omega.config.labels import IGNORED_LABEL
from megatron_omega.config.schema import ModelConfig, OptimizerConfig
from megatron_omega.engine.optimizer import parameter_groups, set_learning_rate
from megatron_omega.model.context import ModelContext
from megatron_omega.model.layers import DecoderLayer, EncoderLayer
from megatron_omega.model.omega import Omega, vocabulary_logits
from megatron_omega.parallel.parameters import declared_parameters

Activations = dict[str, list[Tensor]]
_LENGTH, _ROWS = 32, 2


def proportioned(width: int, layers: int, *, ffn_ratio: int = 4, **fields: object) -> ModelConfig:
    """Return a model of so many encoder and as many decoder layers, with heads of 16 features as wide models have."""
    values = {
        "hidden_size": width, "ffn_hidden_size": ffn_ratio * width, "num_attention_heads": width // 16,
        "encoder_layers": layers, "decoder_layers": layers, "vocab_size": 256, "local_window": 16, "axial_width": 8,
    }  # fmt: skip
    return ModelConfig.model_validate(values | fields)


def movement(model: ModelConfig, steps: Sequence[int], learning_rate: float) -> dict[str, list[float]]:
    """Train on one batch; return for each kind of activation the RMS of its change since the start, after `steps`."""
    omega = build(model)
    optimizer = torch.optim.AdamW(
        parameter_groups(omega.parameters(), OptimizerConfig()), lr=learning_rate, betas=(0.9, 0.95)
    )
    set_learning_rate(optimizer, learning_rate)
    inputs, labels = made_up_batch(model)
    start = activations(omega, inputs, labels)
    moved: dict[str, list[float]] = {kind: [] for kind in start}
    for step in range(1, max(steps) + 1):
        omega(inputs, labels).backward()
        nn.utils.clip_grad_norm_(omega.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step in steps:
            for kind, tensors in activations(omega, inputs, labels).items():
                moved[kind].append(_change(start[kind], tensors))
    return moved


def build(model: ModelConfig) -> Omega:
    """Build the model, for streams of a made-up batch."""
    return Omega(ModelContext(model, encoder_seq_length=_LENGTH, decoder_seq_length=_LENGTH, seed=1))


def made_up_batch(model: ModelConfig) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return inputs and labels of rows in which the decoder goes on where the encoder ends."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, model.vocab_size, (_ROWS, 2 * _LENGTH), generator=generator)
    encoder, decoder = ids[:, :_LENGTH], ids[:, _LENGTH - 1 : -1]
    segments = torch.ones_like(encoder)
    masked = torch.rand(encoder.shape, generator=generator) < 0.15
    mlm = torch.where(masked, encoder, IGNORED_LABEL)
    factor = torch.full((2,), 1 / decoder.numel())
    return (encoder.masked_fill(masked, 0), segments, decoder, segments), (ids[:, _LENGTH:], mlm, factor)


@torch.no_grad()
def activations(omega: Omega, inputs: tuple[Tensor, ...], labels: tuple[Tensor, ...]) -> Activations:
    """Return every kind of activation of one forward pass: of blocks over all layers, of streams where they end."""
    with _recording(omega) as found:
        decoded, encoded, bias = omega.hidden(inputs)
    found["MLM transform"].append(encoded)
    found["label's logit"].append(_label_logits(vocabulary_logits(omega, decoded), labels[0]))
    found["label's MLM logit"].append(_label_logits(vocabulary_logits(omega, encoded, bias), labels[1]))
    return found


def _label_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how far the label's logit stands above the mean, for every label.

    The other logits move as random projections do, by 1 / sqrt(width), as all logits of a tied table do at the start.
    """
    wanted = labels >= 0
    chosen = logits[wanted]
    return chosen.gather(1, labels[wanted].unsqueeze(1)).squeeze(1) - chosen.mean(dim=1)


@contextmanager
def _recording(omega: Omega) -> Iterator[Activations]:
    """Collect what modules return while this is open: attention, cross-attention, feed-forward, streams, embedding."""
    found: Activations = defaultdict(list)

    def record(module: nn.Module, kind: str) -> None:
        handles.append(module.register_forward_hook(lambda _, __, output: found[kind].append(output.detach())))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    record(omega.table, "embedding")
    record(omega.module_named(f"encoder.layers.{omega.context.model.encoder_layers - 1}"), "encoder stream")
    record(omega.module_named(f"decoder.layers.{omega.context.model.decoder_layers - 1}"), "decoder stream")
    for module in omega.modules():
        if isinstance(module, EncoderLayer | DecoderLayer):
            stack = "encoder" if isinstance(module, EncoderLayer) else "decoder"
            record(module.attention, f"{stack} attention")
            record(module.feed_forward, f"{stack} feed-forward")
            if isinstance(module, DecoderLayer) and module.cross is not None:
                record(module.cross, "cross-attention")
    yield found
    for handle in handles:
        handle.remove()


def _change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the root-mean-square difference over all elements of all tensors."""
    squares = sum(float((new - old).double().square().sum()) for old, new in zip(before, after, strict=True))
    return (squares / sum(tensor.numel() for tensor in before)) ** 0.5


def spread(moved: Mapping[int, Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """Return for each kind, after each of the steps, the largest movement of all sizes over the smallest."""
    sizes = list(moved.values())
    return {
        kind: [max(values) / min(values) for values in zip(*(size[kind] for size in sizes), strict=True)]
        for kind in sizes[0]
    }


def gradients_over_epsilon(model: ModelConfig, epsilon: float = OptimizerConfig().epsilon) -> dict[str, float]:
    """Return for each matrix the RMS of its first gradient over the epsilon that Adam adds to it."""
    omega = build(model)
    inputs, labels = made_up_batch(model)
    omega(inputs, labels).backward()
    return {
        info.name: float(parameter.grad.square().mean().sqrt()) / (epsilon * info.scales.epsilon)
        for info, parameter in declared_parameters(omega)
        if parameter.grad is not None and info.scales.weight_decay
    }
