"""Continue texts with a trained model, from a checkpoint of any layout.

megatron-omega generate --checkpoint runs/omega-tiny --prompt "This function returns" --seed 1
megatron-omega generate --checkpoint runs/omega-tiny --prompt-file a.txt b.txt --num-samples 4 --json
torchrun --nproc-per-node 2 -m megatron_omega generate --checkpoint runs/omega-11.9b ...     # each rank loads its slice

All texts grow together. They are printed in their order, the first one as it comes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_omega.commands.texts_in_order import Told, in_order
from megatron_omega.commands.together import Together, join
from megatron_omega.errors import ConfigError, DataError
from megatron_omega.export.loading import TextModel, load_text_model
from megatron_omega.generation.decoding import limits_for
from megatron_omega.generation.leading import Leader, follow
from megatron_omega.generation.matrices import int8, plain
from megatron_omega.generation.prompts import prompt_ids
from megatron_omega.generation.requests import Finished, Request, Token
from megatron_omega.generation.sampling import Sampling
from megatron_omega.generation.scheduler import Scheduler
from megatron_omega.host.command_line import CommandLine
from megatron_omega.host.regular_files import read_text
from megatron_omega.log import configure_logging

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.takes_checkpoint()
    add = parser.add_argument
    add("--tokenizer", type=Path, help="SentencePiece model (default: the run's)")
    add("--prompt", nargs="+", help="texts to continue ('' starts from nothing)")
    add("--prompt-file", type=Path, nargs="+", help="files, each a text to continue; - is stdin")
    add("--max-new-tokens", type=int, default=128, help="tokens at most (default 128)")
    add("--num-samples", type=int, default=1, help="texts for each prompt (default 1); with --beams the best ones")
    add("--beams", type=int, default=1, help="beam search of this width (default 1: none)")
    add("--length-penalty", type=float, default=1.0, help="beams compare log-probability / length ** this (default 1)")
    add("--stop", nargs="+", default=[], metavar="TEXT", help="end a text before the first of these")
    add("--greedy", action="store_true", help="always the most probable token: --temperature 0")
    add("--temperature", type=float, default=0.8, help="default 0.8; 0 is greedy")
    add("--top-k", type=int, default=0, help="draw from this many best tokens (default 0: all)")
    add("--top-p", type=float, default=0.95, help="draw from this share of probability (default 0.95)")
    add("--min-p", type=float, default=0.0, help="draw from tokens with this share of the best one's (default 0: all)")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: less of what was read or written (default 1)")
    add("--frequency-penalty", type=float, default=0.0, help="above 0: less of what was written, each time (default 0)")
    add("--presence-penalty", type=float, default=0.0, help="above 0: less of what was written at all (default 0)")
    add("--seed", type=int, default=0, help="same seed, same text; the n-th prompt has seed + n (default 0)")
    add("--sequences", type=int, default=16, help="texts that grow at the same time (default 16)")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=default_device, help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    add("--dtype", choices=tuple(DTYPES), default="fp32", help="number format (default fp32)")
    add("--int8", action="store_true", help="keep the decoder's matrices in int8, by torchao")
    add("--compile", action="store_true", help="fuse the decoder's layers by torch.compile; pays for long answers")
    add("--json", action="store_true", help="print one JSON object for each text, a line each")
    add("--stream", action="store_true", help="print what comes at once; with --json an object for each token")
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


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    """Return the rules of choice."""
    return Sampling(
        0.0 if arguments.greedy else arguments.temperature, arguments.top_k, arguments.top_p, arguments.min_p,
        arguments.repetition_penalty, arguments.frequency_penalty, arguments.presence_penalty,
    )  # fmt: skip


def requests_of(text_model: TextModel, texts: Sequence[str], arguments: argparse.Namespace) -> list[Request]:
    """Return a request for each prompt."""
    sampling = sampling_of(arguments)
    return [
        Request(
            *prompt_ids(text_model, text), arguments.max_new_tokens, sampling, tuple(arguments.stop),
            samples=arguments.num_samples, beams=arguments.beams, length_penalty=arguments.length_penalty,
            seed=arguments.seed + number,
        )
        for number, text in enumerate(texts)
    ]  # fmt: skip


class Printer:
    """Prints the texts of prompts in their order."""

    def __init__(self, text_model: TextModel, texts: Sequence[str], arguments: argparse.Namespace) -> None:
        self._texts, self._arguments = texts, arguments
        self._eos = text_model.tokenizer.special.eos
        self._facts = {"checkpoint": str(text_model.path), **asdict(sampling_of(arguments))}
        self._is_live = arguments.stream or sys.stdout.isatty()
        self._begun: tuple[int, int] | None = None

    def show(self, told: Told) -> None:
        """Print an event of a text, of which those before are printed."""
        if self._arguments.json:
            self._show_json(told)
        else:
            self._show_text(told)

    def _show_text(self, told: Told) -> None:
        if self._begun != (told.prompt, told.sample):
            print("" if self._begun is None else "\n", end="")
            print(self._texts[told.prompt], end="", flush=self._is_live)
            self._begun = told.prompt, told.sample
        if isinstance(told.event, Token):
            print(told.event.text, end="", flush=self._is_live)
        else:
            print()

    def _show_json(self, told: Told) -> None:
        event = told.event
        if isinstance(event, Finished):
            self._print_json(self._result(told.prompt, event))
        elif self._arguments.stream:
            place = {"prompt": self._texts[told.prompt], "sample": told.sample}
            self._print_json({**place, "text": event.text, "log_probability": event.log_probability})

    def _result(self, prompt: int, event: Finished) -> dict[str, Any]:
        ended = "eos" if event.ids[-1:] == (self._eos,) else event.reason
        seed = self._arguments.seed + prompt
        return {
            "prompt": self._texts[prompt], "text": event.text, "num_tokens": len(event.ids), "finished": ended,
            "sample": event.sample, "seed": seed, **self._facts,
        }  # fmt: skip

    def _print_json(self, value: dict[str, Any]) -> None:
        print(json.dumps(value, ensure_ascii=False), flush=True)


def run(text_model: TextModel, together: Together, arguments: argparse.Namespace) -> None:
    """Lead, or follow, through all prompts."""
    texts = together.agreed(list(prompts(arguments)) if together.is_first else None)
    requests = requests_of(text_model, texts, arguments)
    if not requests:
        return
    wanted = len(requests) * max(arguments.num_samples, arguments.beams)
    limits, weigh = limits_for(requests, min(arguments.sequences, wanted)), int8 if arguments.int8 else plain
    if together.peers is None:
        scheduler = Scheduler(text_model, limits, weigh)
        if arguments.compile:
            scheduler.compile()
        answer(scheduler, requests, Printer(text_model, texts, arguments))
    elif together.is_first:
        leader = Leader(text_model, limits, weigh, peers=together.peers)
        try:
            answer(leader, requests, Printer(text_model, texts, arguments))
        finally:
            leader.end()
    else:
        follow(Scheduler(text_model, limits, weigh), together.peers)


def answer(scheduler: Scheduler, requests: Sequence[Request], printer: Printer) -> None:
    """Let all requests be answered, and print."""
    prompts_of = {scheduler.submit(request): prompt for prompt, request in enumerate(requests)}
    events = (event for event in _events(scheduler))
    for told in in_order(events, prompts_of, [request.samples for request in requests]):
        printer.show(told)


def _events(scheduler: Scheduler) -> Iterator[Token | Finished]:
    while not scheduler.idle:
        yield from scheduler.step()


def main(argv: Sequence[str]) -> None:
    arguments = read_arguments(argv)
    configure_logging()
    sampling_of(arguments)
    if arguments.sequences < 1:
        raise ConfigError(f"--sequences {arguments.sequences} must be 1 or more")
    if arguments.compile and arguments.int8:
        raise ConfigError("--compile fuses plain matrices, and --int8 keeps others: leave one of them out")
    with join(arguments.device) as together:
        if arguments.compile and together.peers is not None:
            raise ConfigError("--compile works on one rank; leave it out, or start generate without torchrun")
        text_model = load_text_model(
            arguments.checkpoint, together.device, DTYPES[arguments.dtype], arguments.tokenizer, together.parallel
        )
        run(text_model, together, arguments)
