#!/usr/bin/env python
"""A layer pair of omega-11.9b, forward and backward in fp32, as a share of what one core's matrix products reach.

    python benchmarks/layers.py [--rounds 5] [--tokens 1024] [--documents 2] [--json]

FLOPs are those that the planner counts: dense products and attention of what the documents let be seen. Two peaks,
measured in the same rounds on a square of 2,048: torch's own product (MKL), which Transformers and others use, and
oneDNN's; our layers use the one that is faster on the processor. Exit 1 where a layer is below .85 of torch's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from megatron_omega.config.load import load_config
from megatron_omega.config.schema import RunConfig
from megatron_omega.host.allocator import keep_freed_memory
from megatron_omega.model.context import ModelContext
from megatron_omega.model.kernels import select_kernels
from megatron_omega.model.layers import DecoderLayer, EncoderLayer
from megatron_omega.model.stream import Stream
from megatron_omega.parallel.products import by_onednn
from megatron_omega.planner.work import layer_works

SIDE = 2048
GOAL = 0.85


def configuration(tokens: int, documents: int) -> RunConfig:
    """Return the preset with sequences of one document: what is seen of a row of several."""
    config = load_config(Path(__file__).parents[1] / "examples/omega-11.9b/run.yaml")
    length = tokens // documents
    one = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "sequence_parallel": False, "recompute": "none"}
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"encoder_seq_length": length, "decoder_seq_length": length}),
            "batch": config.batch.model_copy(update={"micro_batch_size": documents}),
            "parallel": config.parallel.model_copy(update=one),
        }
    )  # fmt: skip


def seconds_of(work: Any) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def layers(config: RunConfig, tokens: int, documents: int) -> dict[str, Any]:
    """Return a forward and backward pass of each kind of layer over one packed row."""
    context = ModelContext.of(config, kernels=select_kernels("cpu"))
    segments = torch.arange(1, documents + 1).repeat_interleave(tokens // documents).unsqueeze(0)
    width, stream = config.model.hidden_size, Stream(segments, context.kernels)
    hidden = torch.randn(1, tokens, width, requires_grad=True)
    memory = torch.randn(1, tokens, width, requires_grad=True)
    weighting = torch.randn(1, tokens, width)
    encoder = EncoderLayer("encoder", context, config.model.layer_branches("encoder", 0))
    decoder = DecoderLayer("decoder", context, config.model.layer_branches("decoder", 0))

    def both(output: Tensor) -> None:
        output.backward(weighting)

    return {
        "encoder": lambda: both(encoder(hidden, stream)),
        "decoder": lambda: both(decoder(hidden, stream, memory, stream)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as a training does
    config = configuration(options.tokens, options.documents)
    works, passes = layer_works(config), layers(config, options.tokens, options.documents)
    square = torch.randn(SIDE, SIDE)
    peaks = {"torch": lambda: torch.mm(square, square), "oneDNN": lambda: by_onednn(square, square)}
    found: dict[str, list[float]] = {name: [] for name in (*passes, *peaks)}
    for work in (passes | peaks).values():
        work()  # allocates, and plans
    for _ in range(options.rounds):
        for name, work in (passes | peaks).items():
            found[name].append(seconds_of(work))
    rates = {name: 2 * SIDE**3 / statistics.median(found[name]) for name in peaks}
    results: dict[str, Any] = {"gflops": {name: rate / 1e9 for name, rate in rates.items()}}
    for name in passes:
        seconds, flops = statistics.median(found[name]), works[name].total_flops
        results[name] = {"seconds": seconds, "of": {peak: flops / seconds / rate for peak, rate in rates.items()}}
        if not options.json:
            shares = ", ".join(f"{share:.2f} of {peak}'s peak" for peak, share in results[name]["of"].items())
            print(f"{name}: {seconds:.2f} CPU-seconds, {flops / seconds / 1e9:.0f} GFLOP/s: {shares}")
    print(json.dumps(results) if options.json else f"peaks: {results['gflops']}")
    return any(results[name]["of"]["torch"] < GOAL for name in passes)


if __name__ == "__main__":
    sys.exit(main())
