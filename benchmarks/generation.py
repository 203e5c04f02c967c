"""Tokens per CPU-second of generation: the scheduler, the plain loop before it, and Transformers' T5 of equal shape.

python benchmarks/generation.py [--shape omega-125m t5-like] [--rounds 3] [--requests 64] [--json]

Everything runs in one process on one thread, interleaved: each round runs every rival once, on the same prompts and
answer lengths, drawn once. Weights are random, decoding is greedy, and no text ends before its length.

    one       a prompt of 64 tokens, an answer of 32: all rivals
    steps     the same answer, its prompt read before, beside the bound, the time of reading every matrix
              once; the best of each
    batch     prompts of 16-256 tokens, answers of 8-128, at most 16 at once: Transformers takes them by sixteens, pads
              their prompts, and writes until the longest answer is done, as it must; only tokens asked for count
    trace     the same requests arrive at random moments; time to the first token, and between tokens (p50, p99), wall
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_omega.config.schema import RunConfig
from megatron_omega.data.tokenizer import Tokenizer, train_tokenizer
from megatron_omega.export.loading import TextModel
from megatron_omega.generation.decoding import Continuation, encode, limits_for
from megatron_omega.generation.requests import Finished, Limits, Request, Token
from megatron_omega.generation.sampling import Sampling
from megatron_omega.generation.scheduler import Scheduler
from megatron_omega.model.context import ModelContext
from megatron_omega.model.omega import Omega

ROOT = Path(__file__).parents[1]
PROMPT, ANSWER = (16, 256), (8, 128)
BATCH = 16


@dataclass(frozen=True)
class Task:
    """What is to be written after what."""

    prompt: tuple[int, ...]
    tokens: int


def tasks(count: int, vocabulary: int, seed: int) -> list[Task]:
    draw = random.Random(seed)
    return [
        Task(tuple(draw.randrange(300, vocabulary) for _ in range(draw.randint(*PROMPT))), draw.randint(*ANSWER))
        for _ in range(count)
    ]


def endless_tokenizer() -> Tokenizer:
    """A tokenizer of few pieces; its end token is made improbable below, so its text does not matter."""
    text = ("The quick brown fox jumps over the lazy dog. " * 20,)
    return Tokenizer(train_tokenizer(text, vocab_size=400, num_threads=1))


def our_model(name: str) -> TextModel:
    values = yaml.safe_load((ROOT / f"examples/{name}/run.yaml").read_text())
    config = RunConfig.model_validate({"model": values["model"], "data": {"decoder_seq_length": 1024}})
    context = replace(ModelContext.of(config), recompute="none")  # as a model is loaded
    model = Omega(context).eval().requires_grad_(requires_grad=False)
    return TextModel(model, config, endless_tokenizer(), Path(name))


def t5_of(config: RunConfig) -> Any:
    """Transformers' T5 (v1.1: gated feed-forward block) of the same width, depth, heads and vocabulary."""
    from transformers import T5Config, T5ForConditionalGeneration

    model = config.model
    return T5ForConditionalGeneration(T5Config(
        vocab_size=model.vocab_size, d_model=model.hidden_size, d_kv=model.resolved_head_dim,
        d_ff=model.ffn_hidden_size, num_layers=model.encoder_layers, num_decoder_layers=model.decoder_layers,
        num_heads=model.num_attention_heads,
        feed_forward_proj="gated-silu", dropout_rate=0.0, pad_token_id=0,
    )).eval()  # fmt: skip


class Endless(Scheduler):
    """A scheduler in which no text ends before its length."""

    def __init__(self, model: TextModel, limits: Limits) -> None:
        super().__init__(model, limits)
        allowed = torch.zeros(model.config.model.vocab_size)
        allowed[model.tokenizer.special.eos] = float("-inf")
        self._engine._allowed = allowed


def request_of(task: Task) -> Request:
    return Request(task.prompt, (2,), task.tokens, Sampling(0))


def step_seconds(model: TextModel, task: Task) -> float:
    """CPU-seconds of a step of one text, its prompt read before."""
    request = request_of(task)
    scheduler = Endless(model, limits_for([request]))
    scheduler.submit(request)
    scheduler.step()  # reads the prompt, writes the first token

    def write() -> None:
        while not scheduler.idle:
            scheduler.step()

    return cpu_seconds(write) / (task.tokens - 1)


def with_scheduler(model: TextModel, found: Sequence[Task]) -> None:
    requests = [request_of(task) for task in found]
    scheduler = Endless(model, replace(limits_for(requests, min(BATCH, len(requests))), chunk_tokens=512))
    for request in requests:
        scheduler.submit(request)
    tokens = 0
    while not scheduler.idle:
        tokens += sum(isinstance(event, Token) for event in scheduler.step())
    assert tokens == sum(task.tokens for task in found)


@torch.inference_mode()
def with_loop(model: TextModel, found: Sequence[Task]) -> None:
    """One text after the other, as it was done before there was a scheduler."""
    for task in found:
        continuation = Continuation(model.model, encode(model.model, task.prompt))
        new = 2
        for _ in range(task.tokens):
            new = int(continuation.read([new]).argmax())


def with_t5(model: Any, found: Sequence[Task]) -> None:
    for first in range(0, len(found), BATCH):
        one_batch_with_t5(model, found[first : first + BATCH])


@torch.inference_mode()
def one_batch_with_t5(model: Any, found: Sequence[Task]) -> None:
    longest = max(len(task.prompt) for task in found)
    ids = torch.tensor([[*task.prompt, *[0] * (longest - len(task.prompt))] for task in found])
    mask = torch.tensor([[1] * len(task.prompt) + [0] * (longest - len(task.prompt)) for task in found])
    count = max(task.tokens for task in found)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        num_beams=1,
        decoder_start_token_id=2,
    )
    assert out.shape[1] == count + 1


@torch.inference_mode()
def bound_seconds(model: TextModel) -> float:
    """CPU-seconds of multiplying one row with every matrix that a step reads: what memory allows."""
    scheduler = Endless(model, Limits(1, 256, 300))
    layers = scheduler._engine.decoder.layers
    matrices = [one for layer in layers for one in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    matrices += [one for layer in layers if layer.cross is not None for one in (layer.cross_q, layer.cross_out)]
    matrices.append(scheduler._engine.decoder.to_logits)
    rows = [torch.randn(1, one.inputs) for one in matrices]
    return min(cpu_seconds(lambda: [one(row) for row, one in zip(rows, matrices, strict=True)]) for _ in range(5))


def cpu_seconds(work: Callable[[], object]) -> float:
    gc.collect()
    start = time.process_time()
    work()
    return time.process_time() - start


def compare(name: str, rounds: int, count: int) -> dict[str, Any]:
    """Return tokens per CPU-second of every rival, as medians of rounds."""
    model = our_model(name)
    t5 = t5_of(model.config)
    one = [Task(tasks(1, model.config.model.vocab_size, 1)[0].prompt[:1] * 64, 32)]
    batch = tasks(count, model.config.model.vocab_size, 2)
    rivals: dict[str, Callable[[Sequence[Task]], None]] = {
        "scheduler": lambda found: with_scheduler(model, found),
        "loop": lambda found: with_loop(model, found),
        "t5": lambda found: with_t5(t5, found),
    }
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    bounds, steps = [], []
    for _ in range(rounds):
        bounds.append(bound_seconds(model))
        steps.append(min(step_seconds(model, one[0]) for _ in range(3)))
        for rival, write in rivals.items():
            seconds["one", rival].append(cpu_seconds(lambda write=write: write(one)))
            if rival != "loop":  # one after the other: its rate is that of "one"
                seconds["batch", rival].append(cpu_seconds(lambda write=write: write(batch)))
    wanted = {"one": one[0].tokens, "batch": sum(task.tokens for task in batch)}
    rates = {f"{kind} {rival}": wanted[kind] / statistics.median(found) for (kind, rival), found in seconds.items()}
    bound = {"bound": 1 / min(bounds), "steps": 1 / min(steps)}
    return {
        "shape": name, **bound, "steps / bound": bound["steps"] / bound["bound"], **rates,
        "batch / t5": rates["batch scheduler"] / rates["batch t5"], **trace(model, batch),
    }  # fmt: skip


def trace(model: TextModel, found: Sequence[Task]) -> dict[str, float]:
    """Let requests arrive at random, about as fast as they are answered; return waiting times in milliseconds."""
    scheduler, draw = Endless(model, Limits(16, 16 * 256, 16 * 300)), random.Random(3)
    arrivals, at = [], 0.0
    for task in found:
        arrivals.append((at, task))
        at += draw.expovariate(1.0)
    began, arrived, last = time.perf_counter(), {}, {}
    first, between = [], []
    while arrivals or not scheduler.idle:
        now = time.perf_counter() - began
        while arrivals and (arrivals[0][0] <= now or scheduler.idle):
            arrived[scheduler.submit(request_of(arrivals.pop(0)[1]))] = now
        for event in scheduler.step():
            now = time.perf_counter() - began
            if isinstance(event, Finished):
                continue
            waits = between if event.request in last else first
            waits.append(now - last.get(event.request, arrived[event.request]))
            last[event.request] = now
    return {
        f"{name} p{percent} ms": 1000 * sorted(waits)[min(len(waits) - 1, len(waits) * percent // 100)]
        for name, waits in (("first token", first), ("between tokens", between))
        for percent in (50, 99)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["omega-125m", "t5-like"], help="folders of examples/")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.shape:
        found = compare(name, arguments.rounds, arguments.requests)
        if arguments.json:
            print(json.dumps(found), flush=True)
            continue
        print(f"{name}: tokens per CPU-second")
        for key, value in found.items():
            if key != "shape":
                print(f"  {key:24} {value:10.{3 if '/' in key else 1}f}", flush=True)


if __name__ == "__main__":
    main()
