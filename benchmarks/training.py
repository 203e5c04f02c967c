#!/usr/bin/env python
"""Training steps against other systems' loops of equal size, interleaved in one process, in CPU-seconds.

    python benchmarks/training.py [--model decoder encoder-decoder] [--rounds 5] [--compiled] [--json]

decoder: 13.8 M parameters, 4 x 512 tokens, fp32, one thread. Rivals: a loop as nanoGPT's (torch's own modules, causal
attention without masks, one fused AdamW), Transformers' Llama, litgpt if it is installed.
encoder-decoder: 19.7 M parameters, 4 x (512 + 512). Rival: Transformers' gated T5.

Ours is the whole engine with ZeRO-0: data checks, clipping, AdamW, the losses read back. Each round runs one step of
everybody, first in another order each round; printed are the median CPU-seconds of a step and the median of the rounds'
ratios. Exit 1 where ours is beyond its goal: 1.00 of the best rival, .95 of T5; compiled .92.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_omega.config.deepspeed import resolve_deepspeed
from megatron_omega.config.layout import layout_of
from megatron_omega.config.schema import RunConfig
from megatron_omega.engine.results import MicroBatch
from megatron_omega.engine.start import start_distributed
from megatron_omega.host.environment import complete_environment
from megatron_omega.parallel.topology import create_topology
from megatron_omega.run.construction import build_engine

VOCABULARY, WIDTH, HEADS, FFN, HEAD_SIZE, LENGTH, BATCH = 8192, 384, 6, 1024, 64, 512, 4
LAYERS = {"decoder": 6, "encoder-decoder": 4}
GOALS = {"decoder": 1.0, "encoder-decoder": 0.95}
COMPILED_GOAL = 0.92
Step = Callable[[Tensor], float]
"""From ids [4, length + 1] to the loss of one optimizer step."""


class Block(nn.Module):
    """A Llama block as one would write it for oneself."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH, 1e-6) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * HEAD_SIZE, bias=False)
        self.out = nn.Linear(HEADS * HEAD_SIZE, WIDTH, bias=False)
        self.gate_up = nn.Linear(WIDTH, 2 * FFN, bias=False)
        self.down = nn.Linear(FFN, WIDTH, bias=False)

    def forward(self, hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        qkv = self.qkv(self.norms[0](hidden)).view(batch, length, 3, HEADS, HEAD_SIZE)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        query, key = (_rotate(part, cosine, sine) for part in (query, key))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(attended.transpose(1, 2).reshape(batch, length, -1))
        gate, up = self.gate_up(self.norms[1](hidden)).chunk(2, dim=-1)
        return hidden + self.down(F.silu(gate) * up)


def _rotate(part: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = part.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


class PlainDecoder(nn.Module):
    """The decoder of a nanoGPT-style loop."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        nn.init.normal_(self.table.weight, std=0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS["decoder"]))
        self.norm = nn.RMSNorm(WIDTH, 1e-6)
        half = HEAD_SIZE // 2
        angles = torch.arange(LENGTH).unsqueeze(1) * 10_000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.table(ids)
        for block in self.blocks:
            hidden = block(hidden, self.cosine, self.sine)
        return F.linear(self.norm(hidden), self.table.weight)


def plain_loop(model: nn.Module, logits_and_labels: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Step:
    """A training step as small loops have it: loss, backward, clipping, AdamW."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)

    def step(ids: Tensor) -> float:
        logits, labels = logits_and_labels(ids)
        loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def nano() -> Step:
    model = PlainDecoder()
    return plain_loop(model, lambda ids: (model(ids[:, :-1]), ids[:, 1:]))


def llama() -> Step:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=FFN, num_hidden_layers=LAYERS["decoder"],
        num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=HEAD_SIZE, max_position_embeddings=LENGTH,
        tie_word_embeddings=True, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    return plain_loop(model, lambda ids: (model(input_ids=ids[:, :-1]).logits, ids[:, 1:]))


def litgpt() -> Step:
    from litgpt.config import Config  # pyright: ignore[reportMissingImports]
    from litgpt.model import GPT  # pyright: ignore[reportMissingImports]

    config = Config(
        name="rival", block_size=LENGTH, vocab_size=VOCABULARY, padded_vocab_size=VOCABULARY, n_embd=WIDTH,
        n_layer=LAYERS["decoder"], n_head=HEADS, head_size=HEAD_SIZE, rotary_percentage=1.0, parallel_residual=False,
        bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=FFN,
    )  # fmt: skip
    model = GPT(config)
    model.lm_head.weight = model.transformer.wte.weight
    return plain_loop(model, lambda ids: (model(ids[:, :-1].contiguous()), ids[:, 1:]))


def t5() -> Step:
    from transformers import T5Config, T5ForConditionalGeneration

    layers = LAYERS["encoder-decoder"]
    config = T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=HEAD_SIZE, d_ff=FFN, num_layers=layers, num_decoder_layers=layers,
        num_heads=HEADS, feed_forward_proj="gated-silu", dropout_rate=0.0, tie_word_embeddings=True, use_cache=False,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)

    def logits_and_labels(ids: Tensor) -> tuple[Tensor, Tensor]:
        encoder, decoder, labels = ids[:, :LENGTH], ids[:, LENGTH:-1], ids[:, LENGTH + 1 :]
        return model(input_ids=encoder, decoder_input_ids=decoder, use_cache=False).logits, labels

    return plain_loop(model, logits_and_labels)


def ours(kind: str, *, compiled: bool = False) -> Step:
    """Our engine with ZeRO-0 on a model of the rivals' size."""
    is_decoder = kind == "decoder"
    layers = LAYERS[kind]
    values: dict[str, Any] = {
        "model": {
            "hidden_size": WIDTH, "ffn_hidden_size": FFN, "num_attention_heads": HEADS, "head_dim": HEAD_SIZE,
            "encoder_layers": 0 if is_decoder else layers, "decoder_layers": layers, "vocab_size": VOCABULARY,
            "encoder_branches": ["full"], "decoder_branches": ["causal"], "mlm_head": False,
        },
        "data": {"encoder_seq_length": LENGTH, "decoder_seq_length": LENGTH},
        "batch": {"micro_batch_size": BATCH, "global_batch_size": BATCH},
        "parallel": {"recompute": "none"},
        "precision": {"dtype": "fp32"},
        "training": {"compile": "layers" if compiled else "off"},
    }  # fmt: skip
    config = RunConfig.model_validate(values)
    settings = resolve_deepspeed(config, {"zero_optimization": {"stage": 0}}, 1)
    engine = build_engine(config, settings.values, create_topology(layout_of(config, 1)))
    nothing = torch.full((BATCH, 0 if is_decoder else LENGTH), -100)

    def step(ids: Tensor) -> float:
        decoder, labels = ids[:, -LENGTH - 1 : -1].contiguous(), ids[:, -LENGTH:].contiguous()
        streams = [decoder] if is_decoder else [ids[:, :LENGTH].contiguous(), decoder]
        inputs = tuple(tensor for stream in streams for tensor in (stream, torch.ones_like(stream)))
        return engine.train_step(iter([MicroBatch(inputs, (labels, nothing))]), learning_rate=1e-3).loss

    return step


def contenders(kind: str, *, compiled: bool) -> dict[str, Step]:
    """Return everybody's step by name; rivals that are not installed are left out, and named."""
    makers: dict[str, Callable[[], Step]] = {"ours": lambda: ours(kind)}
    if compiled:
        makers["ours, compiled"] = lambda: ours(kind, compiled=True)
    makers |= {"nanoGPT-style": nano, "Llama": llama, "litgpt": litgpt} if kind == "decoder" else {"T5": t5}
    found: dict[str, Step] = {}
    for name, make in makers.items():
        torch.manual_seed(0)
        try:
            found[name] = make()
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    return found


def interleave(steps: dict[str, Step], batches: list[Tensor], rounds: int) -> dict[str, list[float]]:
    """Return each contender's CPU-seconds of a step, round by round."""
    for step in steps.values():
        for ids in batches[:2]:
            step(ids)
    names, seconds = list(steps), {name: [] for name in steps}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            gc.collect()
            begin = time.process_time()
            steps[name](batches[number % len(batches)])
            seconds[name].append(time.process_time() - begin)
    return seconds


def measure(kind: str, rounds: int, *, compiled: bool) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Return each contender's figures, and which goals are missed."""
    generator = torch.Generator().manual_seed(0)
    length = LENGTH + 1 if kind == "decoder" else 2 * LENGTH + 1
    batches = [torch.randint(3, VOCABULARY, (BATCH, length), generator=generator) for _ in range(4)]
    seconds = interleave(contenders(kind, compiled=compiled), batches, rounds)
    rivals = {name: statistics.median(values) for name, values in seconds.items() if not name.startswith("ours")}
    best = min(rivals, key=lambda name: rivals[name])
    figures, missed = {}, []
    for name, values in seconds.items():
        ratio = statistics.median(mine / theirs for mine, theirs in zip(values, seconds[best], strict=True))
        figures[name] = {"seconds": statistics.median(values), f"of {best}": ratio}
        goal = {"ours": GOALS[kind], "ours, compiled": COMPILED_GOAL}.get(name)
        if goal is not None and ratio > goal:
            missed.append(f"{kind}: {name} takes {ratio:.3f} of {best}, goal {goal}")
    return figures, missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(LAYERS), default=list(LAYERS), help="which sizes")
    parser.add_argument("--rounds", type=int, default=5, help="steps of everybody")
    parser.add_argument("--compiled", action="store_true", help="our layers compiled, too; takes minutes")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start_distributed(local_rank=complete_environment().local_rank, timeout_seconds=600)
    results, missed = {}, []
    for kind in arguments.model:
        results[kind], faults = measure(kind, arguments.rounds, compiled=arguments.compiled)
        missed += faults
        for name, figures in results[kind].items() if not arguments.json else ():
            print(f"{kind} {name:16}", *(f"{value:.3f} {title}" for title, value in figures.items()), flush=True)
    print(json.dumps(results | {"missed": missed}) if arguments.json else "\n".join(missed or ["all goals reached"]))
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
