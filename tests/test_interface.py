"""What Python programs use: every cell of the notebook runs; logits and losses are those of decoding and training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import ROOT, run_python
from written_models import tiny_config, tiny_model, tiny_tokenizer, write_model, write_run

import megatron_omega
from megatron_omega.errors import DataError
from megatron_omega.generation.decoding import Continuation, encode
from megatron_omega.interface import Model


def test_the_notebook_runs(tmp_path: Path) -> None:
    cells = json.loads((ROOT / "examples/python.ipynb").read_text())["cells"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    (tmp_path / "notebook.py").write_text(code)
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "notebook.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "20 steps, loss" in done.stdout and "nats per token" in done.stdout


@pytest.fixture(scope="module", params=["encoder-decoder", "decoder-only"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("run")
    if request.param == "decoder-only":
        (path / "tokenizer.model").write_bytes(tiny_tokenizer().processor.serialized_model_proto())
        data = {"encoder_seq_length": 0, "decoder_seq_length": 96, "tokenizer": str(path / "tokenizer.model")}
        config = tiny_config(model={"encoder_layers": 0}, data=data)
        write_model(tiny_model(config), config, path / "checkpoints")
    else:
        write_run(path)
    return megatron_omega.load(path)


def test_logits_are_those_of_decoding(model: Model) -> None:
    before, after = model.tokenizer.encode("The quick brown"), model.tokenizer.encode(" fox")
    found, special = model.logits("The quick brown", " fox"), model.tokenizer.special
    assert found.shape == (len(after) + 1, tiny_tokenizer().vocab_size)
    with torch.inference_mode():
        if model.config.model.is_decoder_only:
            memory, start = None, [special.bos, *before]
        else:
            memory = encode(model.module, [special.modes.prefix, *before])
            settings = model.config.model
            start = before[-settings.decoder_overlap :] if settings.decoder_start == "prefix" else [special.bos]
        continuation = Continuation(model.module, memory)
        torch.testing.assert_close(continuation.read(start), found[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(continuation.read(after), found[-1], rtol=1e-4, atol=1e-4)
    assert torch.equal(model(before, after), found)


def test_the_loss_is_the_mean_of_what_the_tokens_cost(model: Model) -> None:
    ids = model.tokenizer.encode(" fox jumps")
    costs = -model.logits("The quick", ids)[:-1].log_softmax(dim=-1)
    expected = sum(float(costs[place, number]) for place, number in enumerate(ids)) / len(ids)
    assert model.loss("The quick", " fox jumps") == pytest.approx(expected, rel=1e-5)
    with pytest.raises(DataError, match="nothing to measure"):
        model.loss("The quick", "")


def test_a_text_is_the_sum_of_its_stream(model: Model) -> None:
    settings = {"max_new_tokens": 9, "seed": 3}
    assert model.generate("The", **settings) == "".join(model.stream("The", **settings))
    assert "<Model of" in repr(model)


def test_the_package_imports_nothing_until_it_is_asked() -> None:
    code = "import sys, megatron_omega; sys.exit(bool({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    assert run_python("-c", code).returncode == 0
    assert "load" in megatron_omega.__all__
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        megatron_omega.colour  # noqa: B018
