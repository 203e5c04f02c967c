"""Presets at their full size in an environment that has Transformers and not this package: `make hf-fresh`.

python fresh.py [--preset omega-tiny ...] [--environment FOLDER] [--torch 'torch==2.13.0'] [--keep FOLDER]

Makes a virtual environment of its own (torch, transformers, safetensors, tokenizers, accelerate, sentencepiece, peft, in the
versions of constraints.txt), exports a model of each preset with random weights, writes down what our own model says
of some texts, and lets `fresh_stranger.py` compare there. A preset in brackets is smaller than its file says:
omega-11.9b-hd32 has its full width, and one layer in each stack, since all of it would take 48 GB in each process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import yaml
from export_cases import our_logits
from safetensors.torch import save_file
from torch import Tensor
from written_models import write_model

from megatron_omega.checkpoint.reader import open_checkpoint
from megatron_omega.config.schema import RunConfig
from megatron_omega.data.tokenizer import Tokenizer, train_tokenizer
from megatron_omega.export.loading import TextModel, load_text_model
from megatron_omega.export.native import write_export
from megatron_omega.generation.decoding import limits_for
from megatron_omega.generation.prompts import prompt_ids
from megatron_omega.generation.requests import Finished, Request
from megatron_omega.generation.sampling import Sampling
from megatron_omega.generation.scheduler import Scheduler
from megatron_omega.model.context import ModelContext
from megatron_omega.model.omega import Omega

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("transformers", "safetensors", "tokenizers", "accelerate", "sentencepiece", "peft", "numpy")
SMALLER: dict[str, dict[str, int]] = {
    "omega-11.9b-hd32": {"encoder_layers": 1, "decoder_layers": 1, "vocab_size": 4096},
    "omega-125m": {"vocab_size": 4096},  # there is no more text here to learn pieces from
}
ENCODER, DECODER = (120, 77, 9), (100, 41, 64)
"""Tokens of the texts that logits are compared on."""
PROMPTS, TOKENS = 20, 100
BEAM_PROMPTS, BEAM_TOKENS = 4, 30


def build(preset: str, folder: Path) -> Path:
    """Write an export of the preset's shape with random weights; return its folder."""
    values = yaml.safe_load((ROOT / f"examples/{preset}/run.yaml").read_text())
    model = values["model"] | SMALLER.get(preset, {})
    tokenizer = Tokenizer(train_tokenizer(tuple(topics.values()), vocab_size=model["vocab_size"]))
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(tokenizer.model)
    lengths = {name: values["data"][name] for name in ("encoder_seq_length", "decoder_seq_length")}
    data = {"tokenizer": str(folder / "tokenizer.model"), **lengths}
    config = RunConfig.model_validate({"model": model, "data": data, "precision": {"dtype": "fp32"}})
    checkpoint = write_model(random_model(config), config, folder / "checkpoints", tokenizer=tokenizer)
    with open_checkpoint(checkpoint) as source:
        write_export(folder / "export", source, tokenizer, dtype="fp32", shard_bytes=2**30)
    return folder / "export"


def random_model(config: RunConfig) -> Omega:
    """A model with nothing hidden by zeros and ones, and matrices of about the size they are trained from."""
    model = Omega(ModelContext.of(config)).eval().requires_grad_(requires_grad=False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
        parameter += (0.5 * spread or 0.2) * torch.randn(parameter.shape, generator=generator)
    return model


def random_texts(model: TextModel, lengths: Sequence[int], seed: int) -> list[Tensor]:
    allowed = torch.tensor(model.tokenizer.text_ids)
    generator = torch.Generator().manual_seed(seed)
    return [allowed[torch.randint(len(allowed), (length,), generator=generator)] for length in lengths]


def write_expectations(export: Path, folder: Path) -> None:
    """Write what our own model says: logits as tensors, written ids as JSON."""
    model = load_text_model(export)
    encoder, decoder = random_texts(model, ENCODER, 1), random_texts(model, DECODER, 2)
    tensors: dict[str, Tensor] = {}
    for number, (read, written) in enumerate(zip(encoder, decoder, strict=True)):
        logits = our_logits(model.model, read, written)
        tensors |= {f"encoder {number}": read, f"decoder {number}": written}
        tensors |= {f"{kind} {number}": found.contiguous() for kind, found in zip(("lm", "mlm"), logits, strict=False)}
    save_file(tensors, folder / "logits.safetensors")
    sentences = [line for text in topics.values() for line in text.splitlines() if 30 < len(line) < 70][:: len(topics)]
    prompts = ["", *(line.strip() for line in sentences)][:PROMPTS]
    assert len(prompts) == PROMPTS
    said: dict[str, Any] = {
        "prompts": prompts, "tokens": TOKENS, "greedy": write(model, prompts, TOKENS),
        "beams": write(model, prompts[:BEAM_PROMPTS], BEAM_TOKENS, beams=4, samples=2), "beam_tokens": BEAM_TOKENS,
        "text_ids": model.tokenizer.text_ids, "is_decoder_only": model.config.model.is_decoder_only,
        "masks": masks(model, [f"{prompt} <mask> and" for prompt in prompts[1:4]]),
    }  # fmt: skip
    (folder / "said.json").write_text(json.dumps(said))


def write(model: TextModel, prompts: Sequence[str], tokens: int, **options: Any) -> list[list[int]]:
    """Return the ids that continue each prompt; of beams the best ones, side by side."""
    requests = [Request(*prompt_ids(model, prompt), tokens, Sampling(0), **options) for prompt in prompts]
    scheduler = Scheduler(model, limits_for(requests, 8))
    order = {scheduler.submit(request): place for place, request in enumerate(requests)}
    ended: list[Finished] = []
    while not scheduler.idle:
        ended += [event for event in scheduler.step() if isinstance(event, Finished)]
    return [list(event.ids) for event in sorted(ended, key=lambda event: (order[event.request], event.sample))]


def masks(model: TextModel, texts: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Return texts with the ids that most probably stand at their mask; none if the model has no MLM head."""
    if not model.config.model.has_mlm_head:
        return []
    special, tokenizer = model.tokenizer.special, model.tokenizer
    found = []
    for text in texts:
        before, _, after = text.partition("<mask>")
        ids = [special.modes.mask, *tokenizer.encode(before.rstrip(" ")), special.mask, *tokenizer.encode(after)]
        (probabilities,) = Scheduler(model).fill([ids])
        best = probabilities[0].topk(200).indices.tolist()
        found.append((text, [number for number in best if number in tokenizer.text_ids][:5]))
    return found


def make_environment(folder: Path, torch_requirement: str) -> Path:
    """Make a virtual environment without this package, if it is not there yet; return its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        install += ["--constraint", ROOT / "constraints.txt"]
        subprocess.run([*install, torch_requirement], check=True)
        subprocess.run([*install, *PACKAGES], check=True)
    return python


def compare(python: Path, export: Path, folder: Path) -> int:
    """Let the stranger compare in its own environment; return its exit code."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    script = Path(__file__).with_name("fresh_stranger.py")
    return subprocess.run([python, "-I", script, export, folder], cwd=folder, env=environment, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = ["omega-tiny", "t5-like", "llama-like", "omega-11.9b-hd32"]
    parser.add_argument("--preset", nargs="+", default=presets, help="folders of examples/")
    parser.add_argument("--environment", type=Path, help="where the virtual environment is, or is made")
    parser.add_argument("--torch", default="torch==2.13.0", help="what pip installs as torch")
    arguments = parser.parse_args()
    codes = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        python = make_environment((arguments.environment or place / "environment").absolute(), arguments.torch)
        for preset in arguments.preset:
            name = f"({preset})" if preset in SMALLER else preset
            print(name, flush=True)
            export = build(preset, place / preset)
            write_expectations(export, place / preset)
            codes.append(compare(python, export, place / preset))
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
