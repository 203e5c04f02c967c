"""Ranks that share a model write what one process writes, each from its slice of the checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_parts import answers, random_requests
from written_models import tiny_config, tiny_model, tiny_tokenizer, write_model, write_run

from megatron_omega.commands.together import join
from megatron_omega.errors import ConfigError
from megatron_omega.export.loading import load_text_model
from megatron_omega.generation.leading import Leader, follow
from megatron_omega.generation.matrices import Weigh, int8, plain, quantised_linear
from megatron_omega.generation.requests import Limits, Request
from megatron_omega.generation.scheduler import Scheduler
from megatron_omega.launching.local_ranks import run_ranks
from megatron_omega.parallel.parameters import declared_parameters
from megatron_omega.parallel.tensor_parallel import TensorParallel

HEADS = {"num_attention_heads": 6, "hidden_size": 48, "ffn_hidden_size": 50}
LIMITS = Limits(6, 1200, 400, 32)
MASKED = [[8, 300, 4, 301], [8, 4]]


def write_sliced(folder: Path, tensor: int) -> None:
    """Write a run folder with a checkpoint as so many ranks would."""
    tokenizer = folder / "tokenizer.model"
    tokenizer.write_bytes(tiny_tokenizer().model)
    config = tiny_config(model=HEADS, data={"tokenizer": str(tokenizer)})
    write_model(tiny_model(config), config, folder / "checkpoints", tensor=tensor)


def everything(scheduler: Scheduler, requests: list[Request]) -> tuple[Any, ...]:
    """What a scheduler answers to every question."""
    texts = [[tuple(event[1:4]) for event in told] for told in answers(scheduler, requests)]
    scored = scheduler.prompt_log_probabilities(requests[0].encoder_ids, list(range(300, 330)))
    return texts, scored.log_probabilities, scheduler.embed(MASKED).numpy(), [m.numpy() for m in scheduler.fill(MASKED)]


def ranks(folder: Path, requests: list[Request], weigh: Weigh = plain) -> tuple[Any, ...] | None:
    with join("cpu") as together:
        model = load_text_model(folder, parallel=together.parallel)
        held = sum(parameter.numel() for _, parameter in declared_parameters(model.model))
        assert together.peers is not None
        if not together.is_first:
            follow(Scheduler(model, LIMITS, weigh), together.peers)
            return None
        leader = Leader(model, LIMITS, weigh, peers=together.peers)
        try:
            return (*everything(leader, requests), held)
        finally:
            leader.end()


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_write_what_one_process_writes(size: int, tmp_path: Path) -> None:
    write_sliced(tmp_path, tensor=3)
    model = load_text_model(tmp_path)
    requests = random_requests(model, 12, seed=size)
    expected = everything(Scheduler(model, LIMITS), requests)
    found, *others = run_ranks(partial(ranks, tmp_path, requests), size, timeout_seconds=120)
    assert others == [None] * (size - 1)
    assert found[0] == expected[0]
    for mine, wanted in zip(found[1:3], expected[1:3], strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(wanted), rtol=0, atol=1e-4)
    for mine, wanted in zip(found[3], expected[3], strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(wanted), rtol=0, atol=1e-5)
    whole = sum(parameter.numel() for _, parameter in declared_parameters(model.model))
    assert found[4] < whole / size + 0.15 * whole  # norms and gains are everybody's


def test_a_matrix_in_int8_is_rounded_to_steps_of_each_output() -> None:
    pytest.importorskip("torchao")
    weight, inputs = torch.randn(50, 48), torch.randn(4, 48)
    kept = quantised_linear(weight).weight.dequantize()  # pyright: ignore[reportCallIssue]
    steps = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((kept - weight).abs() < 0.51 * steps).all() and not torch.equal(kept, weight)
    total = torch.ones(4, 50)
    int8(weight, 1).add_to(total, inputs, 0.5)
    torch.testing.assert_close(total, 1 + 0.5 * inputs @ kept.t(), rtol=0, atol=1e-4)


@pytest.mark.distributed
def test_ranks_keep_their_slices_in_int8(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    write_sliced(tmp_path, tensor=1)
    model = load_text_model(tmp_path)
    requests = random_requests(model, 3, seed=8)
    exact, whole = (everything(Scheduler(model, LIMITS, weigh), requests) for weigh in (plain, int8))
    (texts, scores, *_), other = run_ranks(partial(ranks, tmp_path, requests, int8), 2, timeout_seconds=120)
    assert other is None and [bool(told) for told in texts] == [True] * 3
    differences = [max(abs(a - b) for a, b in zip(scores, found[1], strict=True)) for found in (exact, whole)]
    assert 1e-4 < differences[0] < 0.2  # rounded, but no other model
    assert differences[1] < 0.1  # halves of a row have steps of their own


def test_ranks_that_cannot_share_the_heads_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path)
    with pytest.raises(ConfigError, match="4 attention heads cannot be shared by 3"):
        load_text_model(tmp_path, parallel=TensorParallel(None, 0, 3))
