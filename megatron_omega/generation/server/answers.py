"""Answers in JSON, refusals among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from starlette.responses import Response

from megatron_omega.generation.server.refusals import Refusal


def json_answer(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return an answer in JSON; numbers that are not finite become null."""
    return Response(orjson.dumps(content), status, headers, "application/json")


def refused(refusal: Refusal) -> Response:
    """Return a refusal as an answer."""
    return json_answer(refusal.content(), refusal.status, refusal.headers())
