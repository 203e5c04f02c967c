"""What Transformers says of an export, beside what its own model said: `python -I fresh_stranger.py EXPORT FOLDER`.

Runs where this package is not installed, and imports nothing of it; `fresh.py` writes what FOLDER holds. Prints a line
for each comparison; exits with 1 if one fails.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

TOLERANCE = 1e-5
"""Of the logits' standard deviation."""
TRUSTED: dict[str, Any] = {"trust_remote_code": True}
Line = tuple[str, str, bool]
"""What was compared, what came of it, and whether that is right."""


class Stranger:
    """An export, and what was said of it."""

    def __init__(self, export: Path, folder: Path) -> None:
        self.export, self.folder = export, folder
        self.said = json.loads((folder / "said.json").read_text())
        self.tensors = load_file(folder / "logits.safetensors")
        self.is_decoder_only = self.said["is_decoder_only"]
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(export, **TRUSTED)
        self.model = self.load(export)

    def load(self, folder: Path, **options: Any) -> Any:
        auto = transformers.AutoModelForCausalLM if self.is_decoder_only else transformers.AutoModelForSeq2SeqLM
        return auto.from_pretrained(folder, **TRUSTED, **options).eval()

    def rows(self, kind: str) -> list[Tensor]:
        return [self.tensors[f"{kind} {number}"] for number in range(3) if f"{kind} {number}" in self.tensors]

    def batch(self, side: str) -> tuple[dict[str, Tensor], Tensor]:
        """Return all texts padded on one side, and the mask of what is measured."""
        decoder = padded(self.rows("decoder"), side)
        if self.is_decoder_only:
            return decoder, decoder["attention_mask"].bool()
        named = {f"decoder_{name}": value for name, value in decoder.items()}
        return padded(self.rows("encoder"), side) | named, decoder["attention_mask"].bool()

    def lines(self) -> Iterator[Line]:
        yield from self.logits()
        yield from self.texts()
        yield from self.masks()
        yield from self.round_trip()
        yield from self.adapters()

    def logits(self) -> Iterator[Line]:
        for side in ("left", "right"):
            given, real = self.batch(side)
            found = self.model(**given).logits
            off = max(difference(row[mask], ours) for row, mask, ours in zip(found, real, self.rows("lm"), strict=True))
            yield f"logits, padded on the {side}", f"{off:.1e} of their deviation", off < TOLERANCE
        if not self.rows("mlm"):
            return
        masked = transformers.AutoModelForMaskedLM.from_pretrained(self.export, **TRUSTED).eval()
        given = padded(self.rows("encoder"), "left")
        found, real = masked(**given).logits, given["attention_mask"].bool()
        off = max(difference(row[mask], ours) for row, mask, ours in zip(found, real, self.rows("mlm"), strict=True))
        yield "logits of the MLM head", f"{off:.1e} of their deviation", off < TOLERANCE

    def texts(self) -> Iterator[Line]:
        sides = ("left",) if self.is_decoder_only else ("left", "right")
        for side in sides:
            found = self.write(self.said["prompts"], side, max_new_tokens=self.said["tokens"])
            yield self.compared(f"greedy, padded on the {side}", found, self.said["greedy"])
        prompts = self.said["prompts"][: len(self.said["beams"]) // 2]
        options = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": self.said["beam_tokens"]}
        yield self.compared("4 beams, the best 2", self.write(prompts, "left", **options), self.said["beams"])

    def write(self, prompts: list[str], side: str, **options: Any) -> list[list[int]]:
        given = self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side=side)
        start = given["input_ids"].shape[1] if self.is_decoder_only else 1
        return self.model.generate(**given, do_sample=False, **options)[:, start:].tolist()

    def compared(self, name: str, found: list[list[int]], wanted: list[list[int]]) -> Line:
        pad = self.tokenizer.pad_token_id
        pairs = list(zip(found, wanted, strict=True))
        same = sum(ids[: len(ours)] == ours and set(ids[len(ours) :]) <= {pad} for ids, ours in pairs)
        return name, f"{same} of {len(pairs)} texts, {sum(map(len, wanted)):,} tokens", same == len(pairs)

    def masks(self) -> Iterator[Line]:
        if not self.said["masks"]:
            return
        masked = transformers.AutoModelForMaskedLM.from_pretrained(self.export, **TRUSTED).eval()
        fill = transformers.pipeline("fill-mask", model=masked, tokenizer=self.tokenizer)
        allowed, same = set(self.said["text_ids"]), 0
        for text, ours in self.said["masks"]:
            found = [answer["token"] for answer in fill(text, top_k=200) if answer["token"] in allowed]
            same += found[: len(ours)] == ours
        yield 'pipeline("fill-mask")', f"{same} of {len(self.said['masks'])} masks", same == len(self.said["masks"])

    def round_trip(self) -> Iterator[Line]:
        again = self.folder / "again"
        self.model.save_pretrained(again)
        self.tokenizer.save_pretrained(again)
        given, _ = self.batch("left")
        is_equal = torch.equal(self.load(again)(**given).logits, self.model(**given).logits)
        yield "saved and loaded again", "equal" if is_equal else "another model", is_equal
        prompts = self.said["prompts"]
        ids = transformers.AutoTokenizer.from_pretrained(again, **TRUSTED)(prompts)["input_ids"]
        is_equal = ids == self.tokenizer(prompts)["input_ids"]
        yield "its tokenizer, saved and loaded again", "equal" if is_equal else "other ids", is_equal
        placed = self.load(self.export, device_map="auto")(**given).logits
        is_equal = torch.equal(placed, self.model(**given).logits)
        yield "placed by accelerate", "equal" if is_equal else "other logits", is_equal

    def adapters(self) -> Iterator[Line]:
        kind = "CAUSAL_LM" if self.is_decoder_only else "SEQ_2_SEQ_LM"
        given, real = self.batch("left")
        before = self.model(**given).logits
        settings = peft.LoraConfig(r=4, target_modules="all-linear", task_type=kind, init_lora_weights=False)
        adapted = peft.get_peft_model(self.model, settings)
        written = adapted(**given).logits[real]
        merged = adapted.merge_and_unload()(**given).logits[real]
        off, moved = difference(merged, written), difference(written, before[real])
        yield "LoRA on every matrix, merged", f"{off:.1e}, after a change of {moved:.2g}", off < 1e-3 < moved


def padded(rows: list[Tensor], side: str) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long).unbind()
    for row, tokens in enumerate(rows):
        at = slice(0, len(tokens)) if side == "right" else slice(longest - len(tokens), longest)
        ids[row, at], mask[row, at] = tokens, 1
    return {"input_ids": ids, "attention_mask": mask}


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, in standard deviations of what is expected."""
    return float((found - expected).abs().max() / expected.std())


@torch.no_grad()
def main(export: str, folder: str) -> int:
    assert find_spec("megatron_omega") is None, "this environment has the package; it says nothing of strangers"
    transformers.logging.set_verbosity_error()
    has_failed, began = False, time.monotonic()
    for name, figure, is_right in Stranger(Path(export), Path(folder)).lines():
        print(f"  {'ok  ' if is_right else 'FAIL'}  {name:38}  {figure}", flush=True)
        has_failed |= not is_right
    print(f"  {time.monotonic() - began:.0f} s", flush=True)
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
