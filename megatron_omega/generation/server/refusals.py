"""What a client is told if its request is refused: a status and a sentence, in OpenAI's form."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_MOST_FINDINGS = 5
_SHOWN_CHARACTERS = 60


class Refusal(Exception):
    """A request that is not answered as it stands."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, wait_seconds: int = 0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.wait_seconds = wait_seconds

    def content(self) -> dict[str, Any]:
        """Return the body of the answer."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Return the headers that say when to come back, and how to present a key."""
        found = {"Retry-After": str(self.wait_seconds)} if self.wait_seconds else {}
        if self.status == 401:
            found["WWW-Authenticate"] = "Bearer"
        if self.status in (408, 413):
            found["Connection"] = "close"  # the rest of the body is not read
        return found


def misfit(error: ValidationError) -> Refusal:
    """Return all that is wrong with the fields of a request as one refusal."""
    details = error.errors(include_url=False)
    sentences = [_sentence(detail) for detail in details[:_MOST_FINDINGS]]
    if len(details) > _MOST_FINDINGS:
        sentences.append(f"and {len(details) - _MOST_FINDINGS} more")
    place = details[0]["loc"]
    return Refusal(400, "; ".join(sentences), param=str(place[0])[:_SHOWN_CHARACTERS] if place else None)


def _sentence(detail: ErrorDetails) -> str:
    name = shortened(".".join(map(str, detail["loc"])))
    if detail["type"] == "extra_forbidden":
        return f"there is no parameter {name}"
    if detail["type"] == "missing":
        return f"{name} is missing"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{name} {message}" if name else message
    return f"{name}={shortened(repr(detail['input']))}: {message[:1].lower()}{message[1:]}"


def shortened(text: str) -> str:
    """Return the beginning of a text that a client sent."""
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
