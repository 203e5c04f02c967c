"""A process that has Transformers and an export, but not this package: `python stranger.py EXPORT FOLDER`.

Loads the export, saves it again, loads that, and writes the logits of both into FOLDER.
"""

from __future__ import annotations

import importlib.abc
import sys
from pathlib import Path
from typing import Any


class Absent(importlib.abc.MetaPathFinder):
    """Makes this package one that is not installed."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] == "megatron_omega":
            raise ModuleNotFoundError(name)


def main(export: str, folder: str) -> None:
    sys.meta_path.insert(0, Absent())
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer

    trusted: dict[str, Any] = {"trust_remote_code": True}
    tokenizer = AutoTokenizer.from_pretrained(export, **trusted)
    inputs = tokenizer(["The quick", "Zwölf"], return_tensors="pt", padding=True)
    again = Path(folder) / "again"
    found = {"type": AutoConfig.from_pretrained(export, **trusted).model_type}
    for place in (export, again):
        model = AutoModelForSeq2SeqLM.from_pretrained(place, **trusted).eval()
        with torch.no_grad():
            found[f"lm {place == again}"] = model(**inputs, labels=inputs["input_ids"]).logits
        if place == export:
            found["mlm"] = AutoModelForMaskedLM.from_pretrained(place, **trusted).eval()(**inputs).logits.detach()
            model.save_pretrained(again)
            tokenizer.save_pretrained(again)
    found["ids"] = AutoTokenizer.from_pretrained(again, **trusted)(["The quick", "Zwölf"], padding=True)["input_ids"]
    torch.save(found, Path(folder) / "found.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
