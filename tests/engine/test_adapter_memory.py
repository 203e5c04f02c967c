"""What adapters cost is a closed form under every ZeRO stage: optimizer state on each rank, bytes on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic import replica_batches, small_config, start_engine

from megatron_omega.checkpoint.reader import open_checkpoint
from megatron_omega.checkpoint.store import CheckpointStore
from megatron_omega.config.schema import CheckpointConfig, ModelConfig, RunConfig
from megatron_omega.engine.internals import base_optimizer, engine_parts
from megatron_omega.launching.local_ranks import run_ranks

RANK, REPLICAS = 4, 2
STATE_BYTES = 12
"""A master (or, without one, the weight itself) and two moments, fp32."""


def products(model: ModelConfig) -> Iterator[tuple[int, int]]:
    """Yield (inputs, outputs) of every product that can have an adapter, from the architecture alone."""
    d, f, heads = model.hidden_size, model.ffn_hidden_size, model.num_attention_heads * model.resolved_head_dim
    for stack, layers in (("encoder", model.encoder_layers), ("decoder", model.decoder_layers)):
        for index in range(layers):
            inner = len(model.layer_branches(stack, index)) * heads  # pyright: ignore[reportArgumentType]
            yield from ((d, 3 * inner), (inner, d), (d, 2 * f), (f, d))
            if stack == "decoder" and model.encoder_layers:
                yield from ((d, heads), (d, 2 * heads), (heads, d))


def config_of() -> RunConfig:
    """Adapters beside a base that is never read: engines are built, and nothing is started from."""
    return small_config(
        lora={"rank": RANK}, checkpoint={"load": "base"}, batch={"micro_batch_size": 2, "global_batch_size": 4}
    )


def spent(stage: int, folder: str) -> dict[str, Any]:
    """Train a step of adapters; return the bytes of this rank's optimizer, and what it has trained. Saves it."""
    config = config_of()
    engine = start_engine(config, stage)
    engine.train_step(replica_batches(config, engine), learning_rate=1e-2)
    parts = engine_parts(engine.deepspeed)
    flats = {id(part.flat): part.flat for part in parts}.values()
    state = base_optimizer(engine.deepspeed).state
    held = sum(
        tensor.numel() * tensor.element_size()
        for flat in flats
        for tensor in (flat, *(value for name, value in state[flat].items() if name != "step"))
    )
    store = CheckpointStore(
        Path(folder), config=CheckpointConfig(), topology=engine.topology,
        identity={"model": config.model.model_dump(mode="json")}, run_config=config.model_dump(mode="json"),
    )  # fmt: skip
    store.save(engine, {"step": 1}, step=1, asynchronous=False)
    return {"bytes": held, "groups": len(flats), "owned": sum(part.count for part in parts)}


def all_stages(folder: str) -> list[dict[str, Any]]:
    return [spent(stage, f"{folder}/{stage}") for stage in range(4)]


@pytest.mark.distributed
def test_optimizer_and_disk_cost_what_the_formula_says(tmp_path: Path) -> None:
    ranks = run_ranks(all_stages, REPLICAS, str(tmp_path))
    model = config_of().model
    trained = sum(RANK * (inputs + outputs) for inputs, outputs in products(model))
    for stage in range(4):
        found = [rank[stage] for rank in ranks]
        copies = REPLICAS if stage == 0 else 1
        assert sum(each["owned"] for each in found) == copies * trained
        bytes_held = sum(each["bytes"] for each in found)
        padding = 0 if stage == 0 else STATE_BYTES * 2 * REPLICAS * REPLICAS * found[0]["groups"] * len(ranks)
        assert copies * trained * STATE_BYTES <= bytes_held <= copies * trained * STATE_BYTES + padding
        with open_checkpoint(tmp_path / f"{stage}/step-00000001") as reader:
            assert reader.element_count() == trained
            files = list(reader.path.glob("*.safetensors"))
            data = sum(file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little") for file in files)
            assert data == trained * STATE_BYTES
            assert all(".lora_" in name for name in reader.names())
