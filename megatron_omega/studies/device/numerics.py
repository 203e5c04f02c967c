"""Attention, norms, gate and loss on a device against their definitions in fp64 on the CPU, forward and backward.

The definition of a branch is `stream.visible`, token by token, as a dense mask. Inputs are rounded to the number format
under test first, so that only what the kernel itself rounds counts. The error is that of a whole tensor, relative to
its norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_omega.config.schema import Branch
from megatron_omega.model.attention import attend, attend_memory, attend_whole, branch_facts, cross_facts
from megatron_omega.model.embeddings import RotaryTable
from megatron_omega.model.heads import Temperature, split_heads
from megatron_omega.model.kernels import Kernels, select_kernels
from megatron_omega.model.select import select_visible
from megatron_omega.model.stream import PADDING, Pattern, Stream, rotations, share_document, visible
from megatron_omega.parallel.cross_entropy import VocabularyLoss
from megatron_omega.parallel.lean import add_and_norm
from megatron_omega.parallel.tensor_parallel import SERIAL
from megatron_omega.studies.device.findings import Finding, Setting
from megatron_omega.studies.device.recording import AttentionKernels

HEADS, HEAD_DIM, WIDTH, WINDOW = 2, 20, 32, 128
LENGTHS = {
    "64": [64],
    "192": [192],
    "2,048": [2048],
    "ragged": [70, 3, 128, 200],  # documents begin at multiples of the axial width; what is between them is padding
}
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""In bf16 a value is rounded to 8 bits: .4% each time."""
CASES: dict[str, tuple[Branch, bool]] = {
    "full": ("full", False), "causal": ("causal", True), "local, encoder": ("local", False),
    "local, decoder": ("local", True), "axial, encoder": ("axial", False), "axial, decoder": ("axial", True),
    "dynamic": ("dynamic", False), "select": ("select", True),
}  # fmt: skip
MASKED = ("local", "axial", "select")
"""Branches with a mask of their own: small, and not of all tokens by all tokens."""
Function = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One kernel and its definition, of the same tensors."""

    what: str
    ours: Function
    definition: Function
    inputs: tuple[Tensor, ...]
    """Tensors that have gradients, in fp64 on the CPU, and can be held in the format under test."""
    counts: Tensor | None = None
    """Where the result is of account, broadcast; None: everywhere."""


def formats(setting: Setting) -> tuple[torch.dtype, ...]:
    """Return what a device is tested in: a CPU without instructions for bf16 takes too long there."""
    return (torch.bfloat16, torch.float32) if setting.on_gpu else (torch.float32,)


def check_branches(setting: Setting) -> Iterator[Finding]:
    """Yield, for every branch, length and format, the errors of both passes, and whether the right kernel ran."""
    kernels = select_kernels(setting.device)
    for dtype in formats(setting):
        for length, documents in LENGTHS.items():
            segments = packed(documents)
            for name, (branch, causal) in CASES.items():
                case = branch_case(f"{name}, {length}", branch, segments, dtype, kernels, setting, causal=causal)
                yield from judged("branches", case, branch, dtype, setting, kernels)
            case = pair_case(f"full and dynamic together, {length}", segments, dtype, kernels, setting)
            yield from judged("branches", case, "full", dtype, setting, kernels)
            case = cross_case(f"cross, {length}", segments, dtype, kernels, setting)
            yield from judged("branches", case, "full", dtype, setting, kernels)


def judged(
    check: str, case: Case, branch: Branch, dtype: torch.dtype, setting: Setting, kernels: Kernels
) -> Iterator[Finding]:
    """Yield the findings of one attention kernel."""
    ran = AttentionKernels()
    error = error_of(case, dtype, setting.device, ran)
    wrong = wrong_kernels(ran.names, branch, dtype, setting, kernels)
    yield Finding(check, f"{case.what}, {_name(dtype)}", error, LIMITS[dtype], detail=", ".join(sorted(ran.names)))
    if wrong:
        yield Finding(check, f"{case.what}, {_name(dtype)}: kernels that should not run", 1.0, 0.0, detail=wrong)


def wrong_kernels(names: set[str], branch: Branch, dtype: torch.dtype, setting: Setting, kernels: Kernels) -> str:
    """Return what is wrong with the kernels that ran; nothing if they are those meant for `branch`."""
    masked = {name for name in names if name.endswith("masked")}
    if not names:
        return "no attention kernel was seen"
    if any("softmax" in name or "math" in name for name in names):
        return "scores are computed one by one: no fused kernel takes these tensors"
    if any("cudnn" in name for name in names):
        return "cuDNN's: its masked backward pass can give values that are no numbers"
    by_bounds = setting.on_gpu and kernels.variable_length_attention is not None and dtype != torch.float32
    needs_mask = branch in MASKED and not (branch == "local" and by_bounds)
    if setting.on_gpu and not by_bounds:
        return ""  # without a variable-length kernel every branch has a mask there
    if masked and not needs_mask:
        return f"a mask where documents are known: {', '.join(sorted(masked))}"
    return "" if masked or not needs_mask else f"no mask: {', '.join(sorted(names))}"


def packed(documents: list[int]) -> Tensor:
    """Return segments [1, s] of documents that begin at multiples of the axial width, with padding between them."""
    pieces = []
    for number, length in enumerate(documents, start=1):
        pieces += [torch.full((length,), number), torch.full((-length % WIDTH,), PADDING)]
    if len(documents) > 1:  # a ragged stream ends where it ends
        pieces.pop()
    return torch.cat(pieces).unsqueeze(0)


def branch_case(
    what: str, branch: Branch, segments: Tensor, dtype: torch.dtype, kernels: Kernels, setting: Setting, *, causal: bool
) -> Case:
    """Return self-attention of `branch` inside the documents of `segments`."""
    pattern = Pattern(causal, WINDOW, WIDTH, blocks=2)
    stream = Stream(segments.to(setting.device), kernels)
    facts = branch_facts(branch, pattern, stream, dtype)
    parts = _drawn(3, segments.shape[1], dtype)

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(branch, pattern, query, key, value, facts, kernels)

    def definition(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _dense(query, key, value, _seen(branch, pattern, query, key, segments))

    return Case(what, ours, definition, parts, (segments > PADDING).view(1, 1, -1, 1))


def pair_case(what: str, segments: Tensor, dtype: torch.dtype, kernels: Kernels, setting: Setting) -> Case:
    """Return two branches that see whole documents as one call, laid out as a projection is: token by token."""
    pattern = Pattern(causal=False, window=WINDOW, width=WIDTH)
    facts = branch_facts("full", pattern, Stream(segments.to(setting.device), kernels), dtype)
    parts = tuple(_numbers((1, segments.shape[1], 2, HEADS, HEAD_DIM), dtype, seed=seed) for seed in range(3))
    mask = _seen("full", pattern, parts[0].permute(0, 2, 3, 1, 4)[0], parts[0], segments).unsqueeze(1)

    def ours(*given: Tensor) -> Tensor:
        query, key, value = (part.permute(0, 2, 3, 1, 4) for part in given)
        return torch.stack(attend_whole(pattern, query, key, value, facts, kernels), dim=1)

    def definition(*given: Tensor) -> Tensor:
        query, key, value = (part.permute(0, 2, 3, 1, 4) for part in given)
        return _dense(query, key, value, mask)

    return Case(what, ours, definition, parts, (segments > PADDING).view(1, 1, 1, -1, 1))


def cross_case(what: str, segments: Tensor, dtype: torch.dtype, kernels: Kernels, setting: Setting) -> Case:
    """Return cross-attention from every document to itself in an encoder's stream that is cut differently."""
    ends = F.pad(segments, (0, 2 * WIDTH), value=PADDING)
    memory, stream = Stream(ends.to(setting.device), kernels), Stream(segments.to(setting.device), kernels)
    facts = cross_facts(stream, memory, WIDTH, dtype)
    (query,), (key, value) = _drawn(1, segments.shape[1], dtype), _drawn(2, ends.shape[1], dtype)
    mask = share_document(segments, ends).unsqueeze(1)
    return Case(
        what,
        lambda q, k, v: attend_memory(q, k, v, facts, kernels),
        lambda q, k, v: _dense(q, k, v, mask),
        (query, key, value),
        (segments > PADDING).view(1, 1, -1, 1),
    )


def _seen(branch: Branch, pattern: Pattern, query: Tensor, key: Tensor, segments: Tensor) -> Tensor:
    """[1, heads, s, s]: who sees whom, by definition."""
    if branch != "select":
        places = torch.arange(segments.shape[1])
        return visible(branch, pattern, places, places, HEADS) & share_document(segments, segments).unsqueeze(1)
    seen = torch.zeros(1, HEADS, segments.shape[1], segments.shape[1], dtype=torch.bool)
    for document in range(1, int(segments.max()) + 1):
        places = (segments[0] == document).nonzero().flatten()
        inside = slice(int(places[0]), int(places[-1]) + 1)
        seen[:, :, inside, inside] = select_visible(pattern, None, query[:, :, inside], key[:, :, inside])[0]
    return seen | (segments == PADDING).view(1, 1, -1, 1)


def _dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    scores = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ value


def check_functions(setting: Setting) -> Iterator[Finding]:
    """Yield the errors of norms, the gate, heads with their rotation, and the loss."""
    kernels = select_kernels(setting.device)
    for dtype in formats(setting):
        for case in function_cases(dtype, kernels, setting):
            error = error_of(case, dtype, setting.device)
            yield Finding("functions", f"{case.what}, {_name(dtype)}", error, LIMITS[dtype])


def function_cases(dtype: torch.dtype, kernels: Kernels, setting: Setting) -> Iterator[Case]:
    """Yield what a layer computes beside attention and products, and the loss."""
    tokens, hidden, epsilon = 192, 96, 1e-6
    state, update, gate_up = (_numbers((1, tokens, size), dtype) for size in (hidden, hidden, 2 * hidden))
    weight = _numbers((hidden,), dtype)
    yield Case("RMSNorm", lambda x, w: kernels.norm(x, w, epsilon), lambda x, w: _norm(x, w, epsilon), (state, weight))
    yield Case(
        "sum with its norm",
        lambda x, u, w: add_and_norm(x, u, 0.25, w, epsilon),
        lambda x, u, w: (x + 0.25 * u, _norm(x + 0.25 * u, w, epsilon)),
        (state, update, weight),
    )
    yield Case("SwiGLU", kernels.gated_activation, _gate, (gate_up,))
    projected, gains = _numbers((1, tokens, 2, 3, HEADS, HEAD_DIM), dtype), _numbers((2, 2, HEADS, HEAD_DIM), dtype)
    temperature = _numbers((1, tokens, HEADS, 1), dtype)
    segments = packed([96, 96])
    table = rotations(Stream(segments.to(setting.device), kernels), HEAD_DIM, 10_000.0)
    wide = rotations(Stream(segments, kernels), HEAD_DIM, 10_000.0)
    yield Case(
        "QK-norm, rotation, temperature",
        lambda p, g, t: split_heads(p, g, table, epsilon, groups=(range(2),), temperature=Temperature(1, t)),
        lambda p, g, t: _pair_of_heads(p, g, t, wide, epsilon),
        (projected, gains, temperature),
    )
    vocabulary = 250
    labels = torch.arange(tokens) * 7 % vocabulary
    loss = VocabularyLoss(SERIAL, vocabulary, vocabulary, 0.5, 1e-2, 64)
    here = labels.to(setting.device)
    yield Case(
        "loss over the vocabulary",
        lambda h, t: loss(h, t, here)[0],
        lambda h, t: _loss(h, t, labels, loss),
        (_numbers((tokens, hidden), dtype), _numbers((vocabulary, hidden), dtype)),
    )


def _norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return hidden * (hidden.square().mean(dim=-1, keepdim=True) + epsilon).rsqrt() * weight


def _gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * gate.sigmoid() * up


def _pair_of_heads(
    projected: Tensor, gains: Tensor, temperature: Tensor, table: RotaryTable, epsilon: float
) -> tuple[Tensor, ...]:
    """q, k and v of two branches side by side; the second one's queries have a temperature."""
    first, second = (_heads(projected[:, :, branch], gains[branch], table, epsilon) for branch in range(2))
    second = (second[0] * temperature.transpose(1, 2), *second[1:])
    return tuple(torch.stack(parts, dim=1) for parts in zip(first, second, strict=True))


def _heads(projected: Tensor, gains: Tensor, table: RotaryTable, epsilon: float) -> tuple[Tensor, ...]:
    """Query and key normalised, then rotated as complex numbers would be; the value as it is."""
    half = projected.shape[-1] // 2
    found = []
    for part in range(2):
        normal = _norm(projected[:, :, part], gains[part], epsilon)
        real, imaginary = normal[..., :half], normal[..., half:]
        c, s = (values.to(normal.dtype).unsqueeze(2)[..., half:] for values in table)
        found.append(torch.cat((real * c - imaginary * s, imaginary * c + real * s), dim=-1).transpose(1, 2))
    return (*found, projected[:, :, 2].transpose(1, 2))


def _loss(hidden: Tensor, table: Tensor, labels: Tensor, loss: VocabularyLoss) -> Tensor:
    logits = hidden @ table.t() * loss.output_multiplier
    cross_entropy = F.cross_entropy(logits, labels, reduction="sum")
    return cross_entropy + loss.z_loss_weight * logits.logsumexp(dim=-1).square().sum()


def error_of(
    case: Case, dtype: torch.dtype, device: str, watching: AbstractContextManager[object] | None = None
) -> float:
    """Return the largest error of the results and of the gradients of `case`, each relative to its tensor's norm.

    `watching` surrounds what is under test.
    """
    with watching or nullcontext():
        ours = _results(case.ours, case, dtype, device)
    meant = _results(case.definition, case, torch.float64, "cpu")
    return max(_relative(one, other) for one, other in zip(ours, meant, strict=True))


def _results(function: Function, case: Case, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Return results and gradients, in fp64 on the CPU."""
    inputs = [part.to(device=device, dtype=dtype).detach().requires_grad_() for part in case.inputs]
    found = function(*inputs)
    results = found if isinstance(found, tuple) else (found,)
    counts = torch.ones(()) if case.counts is None else case.counts.to(device)
    weights = [_numbers(tuple(result.shape), dtype, seed=7).to(device=device, dtype=result.dtype) for result in results]
    gradients = torch.autograd.grad(results, inputs, [weight * counts for weight in weights])
    return [part.detach().double().cpu() for part in (*(result * counts for result in results), *gradients)]


def _relative(found: Tensor, meant: Tensor) -> float:
    if not bool(found.isfinite().all()):
        return float("nan")
    return float((found - meant).norm() / meant.norm().clamp_min(1e-30))


def _drawn(count: int, length: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(_numbers((1, HEADS, length, HEAD_DIM), dtype, seed=seed) for seed in range(count))


def _numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return fp64 numbers that `dtype` can hold."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    held = torch.float32 if dtype == torch.float64 else dtype
    return torch.randn(shape, generator=generator).to(held).double()


def _name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}[dtype]
