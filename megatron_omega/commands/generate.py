"""Continue a text with a trained model, from a checkpoint of any layout.

megatron-omega generate --checkpoint runs/omega-tiny --prompt "This function returns" --seed 1
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_omega.errors import DataError
from megatron_omega.export.loading import TextModel, load_text_model
from megatron_omega.generation.decoding import generate, stream_text
from megatron_omega.generation.sampling import Sampling
from megatron_omega.host.command_line import CommandLine
from megatron_omega.host.regular_files import read_text
from megatron_omega.log import configure_logging

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.takes_checkpoint()
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model (default: the run's)")
    parser.add_argument("--prompt", nargs="+", help="texts to continue, one after the other ('' starts from nothing)")
    parser.add_argument("--prompt-file", type=Path, nargs="+", help="files, each a text to continue; - is stdin")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens at most (default 128)")
    parser.add_argument("--greedy", action="store_true", help="always the most probable token: --temperature 0")
    parser.add_argument("--temperature", type=float, default=0.8, help="default 0.8; 0 is greedy")
    parser.add_argument("--top-k", type=int, default=0, help="draw from this many best tokens (default 0: all)")
    parser.add_argument("--top-p", type=float, default=0.95, help="draw from this share of probability (default 0.95)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text (default 0)")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default_device, help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="number format (default fp32)")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each prompt, a line each")
    return parser.parse_args(argv)


def prompts(arguments: argparse.Namespace) -> Iterator[str]:
    """Yield the texts to continue; standard input where none is named."""
    yield from arguments.prompt or ()
    files = arguments.prompt_file or ([] if arguments.prompt else [Path("-")])
    for file in files:
        try:
            text = sys.stdin.read() if str(file) == "-" else read_text(file)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "is not text in UTF-8"
            raise DataError(f"prompt file {file} cannot be read ({reason}); give a text file, or - for stdin") from None
        yield text.removesuffix("\n")


def show(
    text_model: TextModel, prompt: str, ids: Iterator[int], sampling: Sampling, arguments: argparse.Namespace
) -> None:
    """Print what was generated: at once on a terminal, or as one JSON object."""
    if not arguments.json:
        print(prompt, end="", flush=True)
        for part in stream_text(text_model.tokenizer, ids):
            print(part, end="", flush=sys.stdout.isatty())
        print()
        return
    found = list(ids)
    is_end = found[-1] == text_model.tokenizer.special.eos
    result = {
        "prompt": prompt,
        "text": text_model.tokenizer.decode(found),
        "num_tokens": len(found),
        "finished": "eos" if is_end else "length",
        "seed": arguments.seed,
        "checkpoint": str(text_model.path),
        **asdict(sampling),
    }
    print(json.dumps(result, ensure_ascii=False), flush=True)


def main(argv: Sequence[str]) -> None:
    arguments = read_arguments(argv)
    configure_logging()
    temperature = 0.0 if arguments.greedy else arguments.temperature
    sampling = Sampling(temperature, arguments.top_k, arguments.top_p)
    text_model = load_text_model(arguments.checkpoint, arguments.device, DTYPES[arguments.dtype], arguments.tokenizer)
    for number, prompt in enumerate(prompts(arguments)):
        if number and not arguments.json:
            print()
        ids = generate(text_model, prompt, sampling, max_new_tokens=arguments.max_new_tokens, seed=arguments.seed)
        show(text_model, prompt, ids, sampling, arguments)
