"""One scheduler on several tensor-parallel ranks: the first one leads, the others do what it does.

Every rank has a scheduler of its own, over its slice of the model; all do the same steps in the same order, so all
choose the same tokens. What the first is told, it tells the others before it does it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from torch import Tensor

from megatron_omega.errors import OmegaError
from megatron_omega.export.loading import TextModel
from megatron_omega.generation.matrices import Weigh, plain
from megatron_omega.generation.requests import Event, Limits, Request, Scored
from megatron_omega.generation.sampling import Sampling
from megatron_omega.generation.scheduler import Scheduler
from megatron_omega.parallel.exchange import Peers

PATIENCE = timedelta(days=30)
"""How long a rank waits for the next word; one that died is noticed at once."""
_END = "end"


class Leader(Scheduler):
    """The scheduler of the first rank. `end` lets the others go."""

    def __init__(
        self, text_model: TextModel, limits: Limits | None = None, weigh: Weigh = plain, *, peers: Peers
    ) -> None:
        super().__init__(text_model, limits, weigh)
        self._peers = peers

    def submit(self, request: Request) -> int:
        self._tell("submit", asdict(request))
        return super().submit(request)

    def cancel(self, number: int) -> None:
        self._tell("cancel", number)
        super().cancel(number)

    def step(self) -> list[Event]:
        self._tell("step")
        return super().step()

    def prompt_log_probabilities(
        self, encoder_ids: Sequence[int], decoder_ids: Sequence[int], alternatives: int = 0
    ) -> Scored:
        self._tell("prompt_log_probabilities", list(encoder_ids), list(decoder_ids), alternatives)
        return super().prompt_log_probabilities(encoder_ids, decoder_ids, alternatives)

    def embed(self, texts: Sequence[Sequence[int]]) -> Tensor:
        self._tell("embed", [list(ids) for ids in texts])
        return super().embed(texts)

    def fill(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        self._tell("fill", [list(ids) for ids in texts])
        return super().fill(texts)

    def end(self) -> None:
        """Let the other ranks return from `follow`."""
        self._tell(_END)

    def _tell(self, name: str, *arguments: Any) -> None:
        self._peers.agree([name, *arguments])


def follow(scheduler: Scheduler, peers: Peers) -> None:
    """Do what the first rank does, until it ends. What it refuses is refused here as well."""
    while True:
        told: Any = peers.agree(None)
        name, *arguments = told
        if name == _END:
            return
        act: Callable[..., object] = getattr(scheduler, name)
        if name == "submit":
            arguments = [_request(*arguments)]
        with suppress(OmegaError):
            act(*arguments)


def _request(values: dict[str, Any]) -> Request:
    """Return the request that was told as JSON."""
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return Request(**{**values, **lists, "sampling": Sampling(**values["sampling"])})
