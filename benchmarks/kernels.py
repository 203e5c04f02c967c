#!/usr/bin/env python
"""Kernels of one encoder and one decoder layer, as torch's dispatcher sees them; compiled ones from inductor's output.

    python benchmarks/kernels.py [--compiled] [--tokens 256] [--json]

Counted is what a layer adds to a micro-batch: facts of the batch exist already, as they do for all layers but the
first. Views are no kernels. The layers are omega-11.9b's with narrow weights: what is launched does not depend on it.
Saved bytes are those of the true width, a token, counted on the meta device beside the planner's; `host` is the time of
one core to run a layer so narrow. --compiled takes a minute and a C++ compiler. Exit 1 where a figure is beyond its
goal, or the planner is wrong by a byte.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from megatron_omega import accounting
from megatron_omega.config.load import load_config
from megatron_omega.config.schema import ModelConfig, RunConfig
from megatron_omega.model.compilation import compile_layers
from megatron_omega.model.context import ModelContext
from megatron_omega.model.layers import DecoderLayer, EncoderLayer
from megatron_omega.model.stream import Stream
from megatron_omega.planner.activations import Shape, decoder_layer, encoder_layer, facts
from megatron_omega.studies.device.recording import KernelCounts
from megatron_omega.studies.rehearsal import count_stage, fake_world

ROUNDS = 30
FORWARD_GOALS = {("encoder", "eager"): 65, ("decoder", "eager"): 95}
COMPILED_GOALS = {"encoder": 30, "decoder": 45}
SAVED_BEFORE = {"encoder": 273 * 1024, "decoder": 273 * 1024}
"""Bytes a token that a layer kept for its backward pass, recompute none, bf16, before backward passes were written."""
SAVED_SHARE = 0.82
_FOREIGN = re.compile(r"(\w+ = )?(extern_kernels|torch\.ops)\.")
Call = Callable[[], Tensor]


def narrow_layers(tokens: int, dtype: torch.dtype) -> Iterator[tuple[str, torch.nn.Module, Call]]:
    """Yield stack, layer and a call of it, two documents in the stream."""
    context = ModelContext(ModelConfig(hidden_size=96, ffn_hidden_size=128, num_attention_heads=4, head_dim=20))
    segments = torch.ones(1, tokens, dtype=torch.long)
    segments[:, tokens // 2 :] = 2
    stream, memory_stream = Stream(segments, context.kernels), Stream(segments, context.kernels)
    hidden, memory = (torch.randn(1, tokens, 96, dtype=dtype, requires_grad=True) for _ in range(2))
    model = context.model
    encoder = EncoderLayer("encoder", context, model.layer_branches("encoder", 0)).to(dtype)
    decoder = DecoderLayer("decoder", context, model.layer_branches("decoder", 0)).to(dtype)
    yield "encoder", encoder, lambda: encoder(hidden, stream)
    yield "decoder", decoder, lambda: decoder(hidden, stream, memory, memory_stream)


def count(call: Call) -> tuple[Counter[str], Counter[str]]:
    """Return the kernels of a forward and of a backward pass."""
    call()  # makes the facts
    with KernelCounts() as forward:
        output = call()
    gradient = torch.ones_like(output)
    with KernelCounts() as backward:
        output.backward(gradient)
    return forward.counts, backward.counts


def host_microseconds(call: Call) -> float:
    """Return the CPU time of one forward and backward pass, in microseconds."""
    gradient = torch.ones_like(call())
    begin = time.process_time()
    for _ in range(ROUNDS):
        call().backward(gradient)
    return (time.process_time() - begin) / ROUNDS * 1e6


def count_compiled(layer: torch.nn.Module, call: Call) -> tuple[int, int]:
    """Return the kernels that inductor makes of a layer, forward and backward: its own, and those it calls."""
    torch._dynamo.reset()
    compile_layers(layer, refuse_breaks=True)
    without_cache = torch._inductor.config.patch(fx_graph_cache=False)  # what comes from a cache shows no code
    with without_cache, torch._functorch.config.patch(enable_autograd_cache=False):
        _, codes = run_and_get_code(lambda: call().sum().backward())
    passes = {name: next(code for code in codes if f"_{name}']" in code) for name in ("forward", "backward")}
    return _calls(passes["forward"]), _calls(passes["backward"])


def _calls(code: str) -> int:
    """Count the launches in the `call` function of generated code."""
    body = code.partition("def call(")[2].partition("def get_args(")[0]
    lines = [line.strip() for line in body.splitlines()]
    own = sum(line.startswith(("cpp_fused_", "triton_")) for line in lines)
    return own + sum(bool(_FOREIGN.match(line)) for line in lines)


def saved_bytes(config: RunConfig) -> dict[str, tuple[float, float]]:
    """Return what a layer of each stack keeps, in bytes a token: as planned, and as counted."""
    shape, model = Shape.of(config), config.model
    names = [cost.name for cost in accounting.layer_costs(config)]
    found = {}
    for stack, planned in (("encoder", encoder_layer), ("decoder", decoder_layer)):
        branches = model.layer_branches(stack, 0)
        first = names.index(f"{stack}.layers.1")
        with fake_world(1):
            counted = count_stage(config, first, first + 1).kept_bytes
        shared = facts(config, shape, *((branches, ()) if stack == "encoder" else ((), branches)))
        memory = shape.whole(shape.encoder) if stack == "decoder" else 0
        tokens = shape.encoder if stack == "encoder" else shape.decoder
        found[stack] = (planned(config, shape, branches) / tokens, (counted - shared - memory) / tokens)
    return found


def measure(tokens: int, *, compiled: bool) -> dict[str, Any]:
    """Return all figures by name."""
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    for stack, layer, call in narrow_layers(tokens, torch.bfloat16):
        forward, backward = count(call)
        result[stack] = {
            "eager": {"forward": sum(forward.values()), "backward": sum(backward.values())},
            "host microseconds": {"eager": round(host_microseconds(call))},
            "kernels": {"forward": dict(forward.most_common()), "backward": dict(backward.most_common())},
        }
        if compiled:
            made = count_compiled(layer, call)
            result[stack]["compiled"] = {"forward": made[0], "backward": made[1]}
            result[stack]["host microseconds"]["compiled"] = round(host_microseconds(call))
    path = Path(__file__).resolve().parents[1] / "examples/omega-11.9b/run.yaml"
    wanted = {
        "parallel.recompute": "none",
        "parallel.tensor_parallel_size": "1",
        "parallel.pipeline_parallel_size": "1",
    }
    for stack, (planned, counted) in saved_bytes(load_config(path, wanted)).items():
        result[stack]["saved bytes a token"] = {"planned": planned, "counted": counted, "before": SAVED_BEFORE[stack]}
    return result


def judge(result: dict[str, Any]) -> list[str]:
    """Return what is beyond its goal."""
    faults = []
    for stack, found in result.items():
        if found["eager"]["forward"] > FORWARD_GOALS[stack, "eager"]:
            faults.append(f"{stack}: {found['eager']['forward']} kernels forward, goal {FORWARD_GOALS[stack, 'eager']}")
        if "compiled" in found and found["compiled"]["forward"] > COMPILED_GOALS[stack]:
            faults.append(f"{stack}: {found['compiled']['forward']} compiled kernels, goal {COMPILED_GOALS[stack]}")
        saved = found["saved bytes a token"]
        if saved["planned"] != saved["counted"]:
            faults.append(f"{stack}: {saved['planned']} bytes planned, {saved['counted']} counted")
        if saved["counted"] > SAVED_SHARE * saved["before"]:
            faults.append(f"{stack}: {saved['counted'] / saved['before']:.2f} of the bytes before, goal {SAVED_SHARE}")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiled", action="store_true", help="compile the layers, too")
    parser.add_argument("--tokens", type=int, default=256, help="length of the counted stream")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    arguments = parser.parse_args()
    result = measure(arguments.tokens, compiled=arguments.compiled)
    faults = judge(result)
    if arguments.json:
        print(json.dumps(result | {"faults": faults}))
        return bool(faults)
    for stack, found in result.items():
        for mode in ("eager", "compiled"):
            if mode in found:
                host = found["host microseconds"][mode]
                print(f"{stack} {mode}: {found[mode]['forward']} + {found[mode]['backward']} kernels, host {host} µs")
        saved = found["saved bytes a token"]
        share = saved["counted"] / saved["before"]
        print(f"{stack} saved: {saved['counted'] / 1024:.1f} KiB a token, {share:.2f} of before")
    print(*faults or ["all within their goals"], sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
