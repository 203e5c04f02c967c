"""Keys, tokens and passwords stay out of all that a run writes: logs, configurations, events, checkpoints, tracebacks.

What is secret: the values of environment variables and settings that are named like a key, what follows such a name
in a text, and the credentials in a URL. Knows nothing of what writes.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

HIDDEN = "***"
_SHORTEST = 6
"""Characters below which a value is taken for a switch (TOKEN=1), not for a secret."""
_KEY = (
    r"(?:api|access|private|secret|auth)[_-]?key|secret|passw(?:or)?d|passphrase|credentials?"
    r"|(?<=[a-z0-9][_-])(?:pass|pwd|pat)(?![a-z0-9])"
)
"""The short ones count behind another word only: DB_PASS and GITHUB_PAT, not bypass, path or the shell's PWD."""
_NAME = re.compile(rf"{_KEY}|(?:^|[^a-z])token$", re.IGNORECASE)
_VARIABLE = re.compile(rf"{_KEY}|token(?!i[sz])", re.IGNORECASE)
"""Environment variables are named more freely; TOKENIZERS_PARALLELISM is none."""
_URL = re.compile(r"(?<=://)(?:[^\s/?#:@\"']*:(?!\d+/)[^\s\"']*|[^\s/@\"']+)@(?=[\w.\[-])")
"""User and password of a URL; a password may hold what should have been written as %40 and %2F. The last @ ends it."""
_BEARER = re.compile(rf"(\b(?:Bearer|Basic)\s+)[\w.~+/=-]{{{_SHORTEST},}}", re.IGNORECASE)
_ASSIGNMENT = re.compile(
    rf"""((?:(?:{_KEY})\w*|(?<![a-z])token)["']?\s*[=:]\s*["']?|--[\w.-]*(?:{_KEY}|token)\s+)([^\s"',;&]{{{_SHORTEST},}})""",
    re.IGNORECASE,
)
"""`name=value`, `name: value` and `--name value`."""


def is_secret_name(name: str) -> bool:
    """Return whether a setting of this name holds a secret.

    >>> [is_secret_name(name) for name in ("api_key", "hub.token", "DB_PASSWORD", "num_tokens", "tokenizer")]
    [True, True, True, False, False]
    """
    return _NAME.search(name) is not None


def secrets_of(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the secret values of an environment, the longest first."""
    found = {
        value
        for name, value in environ.items()
        if _VARIABLE.search(name) and len(value) >= _SHORTEST and not (value.isdecimal() and "TOKEN" in name.upper())
    }  # MAX_TOKENS=1000000 is a number
    return sorted(found, key=lambda value: (-len(value), value))


def redact(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return `text` without secrets.

    >>> redact("GET https://me:pass@host/x?api_key=0123456789&page=2, token: abcdef, 12 tokens: 345678", {})
    'GET https://***@host/x?api_key=***&page=2, token: ***, 12 tokens: 345678'
    >>> redact("Authorization: Bearer abc.def-123, DB_PASS=hunter22, https://me:p@ss/w0rd@host/x http://n1:80/a@b", {})
    'Authorization: Bearer ***, DB_PASS=***, https://***@host/x http://n1:80/a@b'
    >>> redact("denied: s3cr3t-value", {"WANDB_API_KEY": "s3cr3t-value"})
    'denied: ***'
    """
    for value in secrets_of(environ):
        text = text.replace(value, HIDDEN)
    return _ASSIGNMENT.sub(rf"\1{HIDDEN}", _BEARER.sub(rf"\1{HIDDEN}", _URL.sub(f"{HIDDEN}@", text)))


def redacted(value: Any, environ: Mapping[str, str] = os.environ) -> Any:
    """Return plain data without secrets: what is named like one, and what its texts hold."""
    if isinstance(value, str):
        return redact(value, environ)
    if isinstance(value, Mapping):
        return {
            name: HIDDEN if is_secret_name(str(name)) and isinstance(inner, str) and inner else redacted(inner, environ)
            for name, inner in value.items()
        }
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [redacted(inner, environ) for inner in value]
    return value


class RedactingFormatter(logging.Formatter):
    """Formats records, tracebacks included, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def redact_tracebacks() -> None:
    """Let errors that nobody catches, in any thread, be printed without secrets."""

    def told(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))

    def told_of_a_thread(failed: threading.ExceptHookArgs) -> None:
        if failed.exc_value is not None and failed.exc_type is not SystemExit:
            told(failed.exc_type, failed.exc_value, failed.exc_traceback)

    sys.excepthook, threading.excepthook = told, told_of_a_thread
