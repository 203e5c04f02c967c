"""The thread in which one model computes: it feeds its scheduler, and hands what comes out to the event loop.

event loop   ask(requests) ──commands──▶  thread: submit, step, step, ...
             events of them ◀──batches──

The model is touched in this thread only. Calls (fill-mask, embeddings, scores) run between two steps, one at a time, so
that texts go on growing beside them. A fault of a step ends what was growing, and a fresh scheduler takes over.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from megatron_omega.errors import DataError, OmegaError
from megatron_omega.generation.requests import Event, Finished, Request
from megatron_omega.generation.scheduler import Scheduler
from megatron_omega.generation.server.refusals import Refusal
from megatron_omega.log import get_logger

logger = get_logger(__name__)
Answer = TypeVar("Answer")
Mail = tuple[Callable[[Any], None], Any]
"""What the event loop is to do, and with what."""
_MOST_FAULTS = 3
_FAULT = "the model failed while it computed this answer; the server's log says more"


@dataclass(eq=False)
class Asked:
    """Requests that belong to one question; lives on the event loop, its numbers in the thread."""

    requests: Sequence[Request]
    inbox: asyncio.Queue[tuple[int, Event] | Exception] = field(default_factory=asyncio.Queue)
    numbers: list[int] = field(default_factory=list)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield (place of the request, event) until all texts are finished. Raises Refusal."""
        unfinished = sum(request.samples for request in self.requests)
        while unfinished:
            found = await self.inbox.get()
            if isinstance(found, Exception):
                raise found
            unfinished -= isinstance(found[1], Finished)
            yield found


class Worker:
    """A model's thread. All methods but those that begin with `_` belong to the event loop."""

    def __init__(self, make_scheduler: Callable[[], Scheduler], most_in_flight: int) -> None:
        self._make_scheduler = make_scheduler
        self._scheduler = make_scheduler()
        self._most = most_in_flight
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._calls: deque[Callable[[], None]] = deque()
        self._owners: dict[int, tuple[Asked, int, int]] = {}
        self._mail: list[Mail] = []
        self._faults = 0
        self._is_closing = False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._in_flight = 0

    def start(self) -> None:
        """Begin to work for the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def close(self) -> None:
        """End the thread after the step it is in."""
        self._commands.put(self._close)
        self._thread.join()

    @property
    def is_healthy(self) -> bool:
        """Whether the thread lives and its last steps did not all fail."""
        return self._thread.is_alive() and self._faults < _MOST_FAULTS

    @property
    def in_flight(self) -> int:
        """Answers that were let in and are not finished."""
        return self._in_flight

    @property
    def free_slots(self) -> int:
        """Texts more that could grow at the same time."""
        return self._scheduler.free

    def admit(self, answers: int) -> AbstractContextManager[None]:
        """Count `answers` as in flight until the end of the context, or raise Refusal with the time to come back."""
        if self._in_flight + answers > self._most:
            raise Refusal(
                429,
                f"{self._in_flight} answers wait already and {answers} more would exceed {self._most}; try again later",
                code="rate_limit_exceeded",
                wait_seconds=1 + self._in_flight // self._scheduler.limits.sequences,
            )
        self._in_flight += answers
        return self._admission(answers)

    @contextmanager
    def _admission(self, answers: int) -> Iterator[None]:
        try:
            yield
        finally:
            self._in_flight -= answers

    @asynccontextmanager
    async def ask(self, requests: Sequence[Request]) -> AsyncIterator[AsyncIterator[tuple[int, Event]]]:
        """Submit requests; give their events. What is unfinished at the end of the context is cancelled."""
        asked = Asked(requests)
        self._commands.put(partial(self._begin, asked))
        try:
            yield asked.events()
        finally:
            self._commands.put(partial(self._end, asked))

    async def call(self, function: Callable[[Scheduler], Answer]) -> Answer:
        """Return what `function` makes of the scheduler, between two of its steps.

        What does not fit beside the texts that grow waits for them. Raises Refusal.
        """
        assert self._loop is not None
        future: asyncio.Future[Answer] = self._loop.create_future()
        self._commands.put(partial(self._calls.append, partial(self._answer, future, function)))
        return await future

    def end_all(self) -> None:
        """End every answer that is unfinished with a refusal."""
        self._commands.put(partial(self._fail_all, Refusal(503, "the server is stopping", wait_seconds=10)))

    def _work(self) -> None:
        while not self._is_closing:
            self._obey()
            try:
                self._step()
            except Exception:
                self._recover()
            self._send()
        self._fail_all(Refusal(503, "the server is stopping", wait_seconds=10))
        self._send()

    def _obey(self) -> None:
        """Take all commands that wait; wait for one if there is nothing to do."""
        is_waiting = self._scheduler.idle and not self._calls
        while True:
            try:
                self._commands.get(block=is_waiting)()
            except queue.Empty:
                return
            is_waiting = False

    def _step(self) -> None:
        if self._calls:
            self._calls.popleft()()
        if self._scheduler.idle:
            return
        for event in self._scheduler.step():
            self._hand_over(event)
        self._faults = 0

    def _hand_over(self, event: Event) -> None:
        owner = self._owners.get(event.request)
        if owner is None:
            return  # it was cancelled
        asked, place, unfinished = owner
        self._mail.append((asked.inbox.put_nowait, (place, event)))
        if isinstance(event, Finished):
            self._owners[event.request] = (asked, place, unfinished - 1)
            if unfinished == 1:
                del self._owners[event.request]

    def _send(self) -> None:
        """Give the event loop all mail at once."""
        mail, self._mail = self._mail, []
        if mail and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, mail)

    def _begin(self, asked: Asked) -> None:
        try:
            for place, request in enumerate(asked.requests):
                number = self._scheduler.submit(request)
                asked.numbers.append(number)
                self._owners[number] = (asked, place, request.samples)
        except OmegaError as error:
            self._end(asked)
            self._mail.append((asked.inbox.put_nowait, Refusal(400, str(error))))

    def _end(self, asked: Asked) -> None:
        for number in asked.numbers:
            if self._owners.pop(number, None):
                self._scheduler.cancel(number)

    def _answer(self, future: asyncio.Future[Answer], function: Callable[[Scheduler], Answer]) -> None:
        if future.cancelled():
            return
        try:
            self._mail.append((partial(_settle, future), function(self._scheduler)))
        except OmegaError as error:
            if isinstance(error, DataError) and not self._scheduler.idle:
                self._calls.append(partial(self._answer, future, function))
            else:
                self._mail.append((partial(_settle, future), Refusal(400, str(error))))
        except Exception:
            logger.exception("a model failed")
            self._mail.append((partial(_settle, future), Refusal(500, _FAULT)))

    def _recover(self) -> None:
        logger.exception("a model failed; the answers that were growing are ended")
        self._faults += 1
        self._fail_all(Refusal(500, _FAULT))
        self._scheduler = self._make_scheduler()

    def _fail_all(self, refusal: Refusal) -> None:
        for number, (asked, _, _) in list(self._owners.items()):
            self._mail.append((asked.inbox.put_nowait, refusal))
            self._scheduler.cancel(number)
        self._owners.clear()

    def _close(self) -> None:
        self._is_closing = True


def _deliver(mail: list[Mail]) -> None:
    for take, what in mail:
        take(what)


def _settle(future: asyncio.Future[Any], found: Any) -> None:
    if future.done():
        return  # whoever asked has gone
    if isinstance(found, Exception):
        future.set_exception(found)
    else:
        future.set_result(found)
