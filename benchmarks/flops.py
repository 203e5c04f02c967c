#!/usr/bin/env python
"""The planner's FLOPs against torch's own FlopCounterMode on the whole real model, forward and backward, one sample.

    python benchmarks/flops.py [--config examples/omega-11.9b/run.yaml]

Runs on the meta device: no memory, no numbers; about half a CPU-minute for 192 layers. Every encoder token counts as
masked, as in the plan. Exit 1 where the two differ by 0.1% or more.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_omega import accounting
from megatron_omega.config.load import load_config
from megatron_omega.config.schema import RunConfig
from megatron_omega.model.context import ModelContext
from megatron_omega.model.omega import Omega


def count(config: RunConfig) -> tuple[int, int]:
    """Return parameters and FLOPs of the real model on one sample."""
    parallel = config.parallel.model_copy(
        update={"recompute": "none", "tensor_parallel_size": 1, "sequence_parallel": False}
    )
    data = config.data
    with torch.device("meta"):
        model = Omega(ModelContext.of(config.model_copy(update={"parallel": parallel})))
        encoder, decoder = (
            torch.ones(1, length, dtype=torch.int64) for length in (data.encoder_seq_length, data.decoder_seq_length)
        )
        streams = (decoder,) if config.model.is_decoder_only else (encoder, decoder)
        inputs = tuple(tensor for stream in streams for tensor in (stream, stream))
        with FlopCounterMode(display=False) as counter:
            model(inputs, (decoder, encoder, torch.ones(2))).backward()
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops()


def main() -> None:
    """Print both counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=Path("examples/omega-11.9b/run.yaml"))
    config = load_config(parser.parse_args().config)
    parameters, counted = count(config)
    planned = accounting.training_flops_per_sample(config)
    planned_parameters = sum(cost.parameters for cost in accounting.layer_costs(config))
    print(f"parameters: planned {planned_parameters:,}, built {parameters:,}")
    print(f"FLOPs of a sample: planned {planned:,}, counted {counted:,} ({planned / counted - 1:+.3%})")
    sys.exit(parameters != planned_parameters or abs(planned / counted - 1) >= 0.001)


if __name__ == "__main__":
    main()
