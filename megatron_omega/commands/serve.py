"""Serve models over HTTP: OpenAI's /v1/completions, /v1/embeddings, /v1/fill-mask, and a page to try them at /.

megatron-omega serve --checkpoint runs/omega-tiny
megatron-omega serve --checkpoint runs/a runs/b --port 8080      # the page compares them side by side

It listens on this machine alone. On another --host an API key is needed: --api-key-file, or MEGATRON_OMEGA_API_KEY.
SIGTERM lets answers finish, then ends with 0.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_omega.commands.generate import DTYPES
from megatron_omega.config.schema import RunConfig
from megatron_omega.errors import ConfigError
from megatron_omega.export.loading import load_text_model
from megatron_omega.generation.requests import Limits
from megatron_omega.generation.server.bounds import LOOPBACK_NAMES, Bounds
from megatron_omega.host.command_line import CommandLine
from megatron_omega.host.regular_files import read_regular
from megatron_omega.log import configure_logging, get_logger

if TYPE_CHECKING:
    from megatron_omega.generation.server.app import Application

KEY_VARIABLE = "MEGATRON_OMEGA_API_KEY"
_MOST_KEY_BYTES = 4096
_FEWEST_KEY_CHARACTERS = 16

logger = get_logger(__name__)


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    meaning = "run folders, their checkpoints, step-... folders, or exports; NAME=FOLDER gives a name of your own"
    parser.add_argument("--checkpoint", nargs="+", required=True, metavar="FOLDER", help=meaning)
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model (default: each run's)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine)")
    parser.add_argument("--port", type=int, default=8000, help="default 8000; 0 takes a free one")
    parser.add_argument("--api-key-file", type=Path, help=f"file with the key that clients present (or {KEY_VARIABLE})")
    parser.add_argument("--max-prompt-tokens", type=int, help="default: as long as the model was trained on")
    parser.add_argument("--max-new-tokens", type=int, help="default: as long as the model was trained on")
    parser.add_argument("--max-queue", type=int, default=256, help="answers that wait or grow; more get 429")
    parser.add_argument("--max-seconds", type=float, default=600, help="that one answer may take (default 600)")
    parser.add_argument("--drain-seconds", type=float, default=30, help="for answers after SIGTERM (default 30)")
    parser.add_argument("--sequences", type=int, default=16, help="texts of a model that grow together (default 16)")
    cache = "tokens of a model's texts together that are kept (default 16384)"
    parser.add_argument("--cache-tokens", type=int, default=16384, help=cache)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default_device, help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="number format (default fp32)")
    parser.add_argument("--compile", action="store_true", help="fuse the decoder's layers by torch.compile")
    return parser.parse_args(argv)


def api_key(file: Path | None) -> str | None:
    """Return the key that clients have to present, if one is set. Raises ConfigError if it is none."""
    try:
        given = os.environ.get(KEY_VARIABLE) if file is None else read_regular(file, _MOST_KEY_BYTES).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise ConfigError(f"the API key file {file} cannot be read ({reason}); give a file with one line") from None
    if given is not None and (len(given) < _FEWEST_KEY_CHARACTERS or not given.isascii() or not given.isprintable()):
        raise ConfigError(
            f"the API key has to be {_FEWEST_KEY_CHARACTERS} printable ASCII characters or more; "
            "make one with: python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    return given


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches `host`.

    >>> is_loopback("localhost"), is_loopback("::1"), is_loopback("0.0.0.0"), is_loopback("example.org")
    (True, True, False, False)
    """
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def named_folders(words: Sequence[str]) -> dict[str, Path]:
    """Return name -> folder; a folder without a name is called as it is, its number appended where two are alike.

    >>> named_folders(["runs/a", "best=runs/b", "old/a"])
    {'a': PosixPath('runs/a'), 'best': PosixPath('runs/b'), 'a-2': PosixPath('old/a')}
    """
    found: dict[str, Path] = {}
    for word in words:
        given, is_named, folder = word.partition("=")
        path = Path(folder if is_named else word)
        name = stem = given if is_named and given else path.resolve().name
        number = 2
        while name in found:
            name, number = f"{stem}-{number}", number + 1
        found[name] = path
    return found


def main(argv: Sequence[str]) -> None:
    arguments = read_arguments(argv)
    configure_logging()
    try:
        from megatron_omega.generation.server.running import listen, run
    except ModuleNotFoundError as missing:
        raise ConfigError(f"serving needs {missing.name}; install it: pip install 'megatron-omega[serve]'") from None
    key = required_key(arguments)
    sock = listen(arguments.host, arguments.port)
    application = load(arguments)
    door = application.behind_door(key, LOOPBACK_NAMES if is_loopback(arguments.host) else None)
    host, port = sock.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {', '.join(application.models)} on http://{shown}:{port}/", flush=True)
    run(door, application.bounds, sock, application.end_all)


def required_key(arguments: argparse.Namespace) -> str | None:
    """Return the API key; raise ConfigError if there is none and other machines reach the server."""
    key = api_key(arguments.api_key_file)
    if is_loopback(arguments.host):
        return key
    if key is None:
        raise ConfigError(
            f"--host {arguments.host} can be reached from other machines, and no API key is set; "
            f"give --api-key-file or {KEY_VARIABLE}, or leave --host out"
        )
    logger.warning("other machines reach %s, and HTTP is not encrypted: put a proxy with TLS in front", arguments.host)
    return key


def load(arguments: argparse.Namespace) -> Application:
    """Load all models that are named; return them behind their paths."""
    from megatron_omega.generation.server.app import Application
    from megatron_omega.generation.server.served import Served

    bounds = Bounds(
        queue=arguments.max_queue, answer_seconds=arguments.max_seconds, drain_seconds=arguments.drain_seconds
    )
    limits = Limits(sequences=arguments.sequences, cache_tokens=arguments.cache_tokens)
    models = []
    for name, folder in named_folders(arguments.checkpoint).items():
        model = load_text_model(folder, arguments.device, DTYPES[arguments.dtype], arguments.tokenizer)
        models.append(
            Served.of(name, model, lengths(arguments, model.config, bounds), limits, compiled=arguments.compile)
        )
    return Application(models, bounds)


def lengths(arguments: argparse.Namespace, config: RunConfig, bounds: Bounds) -> Bounds:
    """Return the bounds of a model: the lengths that are asked for, or those that it was trained on."""
    data, is_decoder_only = config.data, config.model.is_decoder_only
    trained = (data.decoder_seq_length if is_decoder_only else data.encoder_seq_length) - 1  # beside its first token
    prompt, new = arguments.max_prompt_tokens, arguments.max_new_tokens
    return replace(
        bounds,
        prompt_tokens=trained if prompt is None else prompt,
        new_tokens=data.decoder_seq_length if new is None else new,
    )
