"""Every preset's layers trace into one graph for each class, under any recomputation and tensor parallelism.

Traced only (`backend="eager"`): what a layer computes, and whether it can be one graph, does not depend on who fuses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from test_omega_model import LENGTH, context, made_up
from torch._dynamo.utils import counters

from megatron_omega.model.compilation import Compilations, compile_layers
from megatron_omega.model.omega import Omega
from megatron_omega.parallel.tensor_parallel import TensorParallel
from megatron_omega.studies.rehearsal import fake_world

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {"hidden_size", "ffn_hidden_size", "num_attention_heads", "head_dim", "encoder_layers", "decoder_layers"}
SMALL |= {"vocab_size", "local_window", "axial_width"}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def architectures() -> dict[str, dict[str, Any]]:
    """The presets, made small: what remains tells their layers apart. Those that remain equal are one."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(EXAMPLES.glob("*/run.yaml")):
        model = yaml.safe_load(path.read_text()).get("model", {})
        fields = {name: value for name, value in model.items() if name not in SMALL}
        fields |= {"encoder_layers": 0} if model.get("encoder_layers") == 0 else {}
        if fields not in found.values():
            found[path.parent.name] = fields
    return found


ARCHITECTURES = architectures()


@pytest.mark.parametrize("preset", ARCHITECTURES)
@pytest.mark.parametrize("recompute", ["none", "swiglu", "ffn", "full"])
def test_one_graph_for_each_class_equal_to_eager_layers_whatever_the_documents(preset: str, recompute: Any) -> None:
    made = replace(context(**ARCHITECTURES[preset]), recompute=recompute)
    eager, compiled = Omega(made), Omega(made)
    compile_layers(compiled, backend="eager", refuse_breaks=True)
    inputs, labels = made_up(made.model)
    other = (*inputs[:-1], torch.ones(2, LENGTH, dtype=torch.long))  # one document in the decoder, where there were two
    for given in (inputs, other):
        for omega in (eager, compiled):
            omega.zero_grad()
            omega(given, labels).backward()
        for left, right in zip(eager.parameters(), compiled.parameters(), strict=True):
            assert left.grad is not None and right.grad is not None
            assert torch.allclose(left.grad, right.grad, rtol=1e-4, atol=1e-7)
    classes = 1 if made.model.is_decoder_only else 2
    adds_positions = made.model.positions != "rotary"  # the first layer of a stack does what the others do not
    assert counters["stats"]["unique_graphs"] == classes * (1 + adds_positions)
    assert not counters["graph_break"]


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("recompute", ["none", "ffn", "full"])
def test_messages_do_not_break_the_graph(recompute: Any, *, sequence_parallel: bool) -> None:
    with fake_world(2):
        group: Any = dist.new_group([0, 1])
        made = replace(context(), recompute=recompute, parallel=TensorParallel(group, 0, 2, sequence_parallel))
        omega = Omega(made)
        compile_layers(omega, backend="eager", refuse_breaks=True)
        omega(*made_up(made.model)).backward()
    assert counters["stats"]["unique_graphs"] == 2


def test_what_is_compiled_and_why_is_told() -> None:
    made = context()
    omega, compilations = Omega(made), Compilations()
    compile_layers(omega, backend="eager")
    inputs, labels = made_up(made.model)
    assert compilations.new() == []
    omega(inputs, labels)
    assert compilations.new() == ["the first call of its kind"] * 2
    omega(inputs, labels)
    assert compilations.new() == []
    with torch.no_grad():
        omega(inputs, labels)
    causes = compilations.new()
    assert len(causes) == 2 and all("grad" in cause for cause in causes)
