"""Predict the words masked as <mask> (or [MASK]) with the encoder and its MLM head, from a checkpoint of any layout.

megatron-omega fill-mask --checkpoint runs/omega-tiny --text "The [MASK] of the file is returned."
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_omega.export.loading import load_text_model
from megatron_omega.generation.fill_mask import Filled, fill_masks
from megatron_omega.host.command_line import CommandLine
from megatron_omega.log import configure_logging


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.takes_checkpoint()
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model (default: the run's)")
    parser.add_argument("--text", nargs="+", required=True, help="texts with one or several <mask> or [MASK]")
    parser.add_argument("--top-k", type=int, default=5, help="candidates of each mask (default 5)")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default_device, help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each text, a line each")
    return parser.parse_args(argv)


def show(filled: Filled) -> None:
    """Print the filled text, and the candidates of each mask."""
    print(filled.text)
    for number, candidates in enumerate(filled.masks, start=1):
        print(f"  mask {number}" if len(filled.masks) > 1 else "  mask")
        for candidate in candidates:
            print(f"    {candidate.probability:7.2%}  {candidate.piece!r}")


def main(argv: Sequence[str]) -> None:
    arguments = read_arguments(argv)
    configure_logging()
    text_model = load_text_model(arguments.checkpoint, arguments.device, tokenizer=arguments.tokenizer)
    for text, filled in zip(arguments.text, fill_masks(text_model, arguments.text, top_k=arguments.top_k), strict=True):
        if arguments.json:
            result = {"masked": text, **asdict(filled), "checkpoint": str(text_model.path)}
            print(json.dumps(result, ensure_ascii=False))
        else:
            show(filled)
