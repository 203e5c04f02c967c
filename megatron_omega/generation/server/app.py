"""The application: which path answers what. Knows how models are asked, not how they compute."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from megatron_omega.generation.server.answers import json_answer, refused
from megatron_omega.generation.server.bounds import Bounds
from megatron_omega.generation.server.completions import Completion
from megatron_omega.generation.server.door import Door
from megatron_omega.generation.server.encoding import embedded_ids, embeddings, filled, filled_ids
from megatron_omega.generation.server.exchange import Events, read_question, while_client_stays, within
from megatron_omega.generation.server.metrics import Metrics
from megatron_omega.generation.server.pages import page_routes
from megatron_omega.generation.server.questions import (
    CompletionQuestion,
    DetokenizeQuestion,
    EmbeddingQuestion,
    FillMaskQuestion,
    TokenizeQuestion,
)
from megatron_omega.generation.server.refusals import Refusal
from megatron_omega.generation.server.served import Served
from megatron_omega.generation.server.tokens import detokenized, tokenized, tokenizer_card

_SENTENCES = {
    404: "there is no such path; GET / shows a page, GET /v1/models the models",
    405: "this path does not take {method}",
}


class Application:
    """Models behind paths."""

    def __init__(self, models: Sequence[Served], bounds: Bounds) -> None:
        self.models: Mapping[str, Served] = {served.name: served for served in models}
        self.bounds = bounds
        self.metrics = Metrics()
        for served in models:
            self.metrics.watch(served.name, served.worker)

    def behind_door(self, key: str | None = None, names: Sequence[str] | None = None) -> Door:
        """Return the whole as an ASGI application. Arguments as of `Door`."""
        routes = [
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/embeddings", self._embeddings, methods=["POST"]),
            Route("/v1/fill-mask", self._fill_mask, methods=["POST"]),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/detokenize", self._detokenize, methods=["POST"]),
            Route("/tokenizer_info", self._tokenizer_info),
            Route("/v1/models", self._list),
            Route("/v1/models/{name:path}", self._card),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            *page_routes(),
        ]
        handlers: Mapping[Any, Any] = {
            Refusal: _refuse, HTTPException: _refuse_path, ClientDisconnect: self._note_leaving, Exception: _fail,
        }  # fmt: skip
        app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)
        return Door(app, self.metrics, {route.path for route in routes}, key, names)

    def end_all(self) -> None:
        """End all answers that are unfinished."""
        for served in self.models.values():
            served.worker.end_all()

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        for served in self.models.values():
            served.worker.start()
        yield
        for served in self.models.values():
            served.worker.close()

    def _served(self, name: str | None) -> Served:
        served = next(iter(self.models.values())) if name is None else self.models.get(name)
        if served is None:
            shown, names = (name or "")[:100], ", ".join(self.models)
            message = f"there is no model {shown!r}; there are: {names}"
            raise Refusal(404, message, param="model", code="model_not_found")
        if not served.worker.is_healthy:
            raise Refusal(503, f"{served.name} has failed; the server has to be started again")
        return served

    async def _completions(self, request: Request) -> Response:
        question = await read_question(request, CompletionQuestion, self.bounds)
        served = self._served(question.model)
        askings = await asyncio.to_thread(served.ask, question)
        completion = Completion(served, question, askings, self.metrics)
        if question.stream:
            admission = served.worker.admit(completion.num_answers)
            self.metrics.prompt_tokens.labels(served.name).inc(completion.num_prompt_tokens)
            return Events(completion.chunks(), admission, self.bounds.answer_seconds, self.metrics)
        return await self._answer(request, served, completion.num_answers, completion.whole)

    async def _embeddings(self, request: Request) -> Response:
        question = await read_question(request, EmbeddingQuestion, self.bounds)
        served = self._served(question.model)
        texts = await asyncio.to_thread(embedded_ids, served, question)
        work = partial(embeddings, served, question, texts)
        return await self._answer(request, served, len(texts), work)

    async def _fill_mask(self, request: Request) -> Response:
        question = await read_question(request, FillMaskQuestion, self.bounds)
        served = self._served(question.model)
        texts = await asyncio.to_thread(filled_ids, served, question)
        return await self._answer(request, served, len(texts), partial(filled, served, question, texts))

    async def _tokenize(self, request: Request) -> Response:
        question = await read_question(request, TokenizeQuestion, self.bounds)
        return json_answer(await asyncio.to_thread(tokenized, self._served(question.model), question))

    async def _detokenize(self, request: Request) -> Response:
        question = await read_question(request, DetokenizeQuestion, self.bounds)
        return json_answer(detokenized(self._served(question.model), question))

    async def _tokenizer_info(self, request: Request) -> Response:
        return json_answer(tokenizer_card(self._served(request.query_params.get("model"))))

    async def _answer(
        self, request: Request, served: Served, answers: int, work: Callable[[], Awaitable[dict[str, Any]]]
    ) -> Response:
        """Do `work` as one of the answers in flight, within its time, as long as the client stays."""
        with served.worker.admit(answers):
            found = await while_client_stays(request.receive, lambda: within(self.bounds.answer_seconds, work()))
        self.metrics.prompt_tokens.labels(served.name).inc(found["usage"]["prompt_tokens"])
        return json_answer(found)

    async def _list(self, _: Request) -> Response:
        return json_answer({"object": "list", "data": [served.card() for served in self.models.values()]})

    async def _card(self, request: Request) -> Response:
        return json_answer(self._served(request.path_params["name"]).card())

    async def _health(self, _: Request) -> Response:
        failed = [served.name for served in self.models.values() if not served.worker.is_healthy]
        return json_answer({"status": "failed" if failed else "ok", "failed": failed}, 503 if failed else 200)

    async def _metrics(self, _: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _note_leaving(self, _: Request, __: Exception) -> Response:
        self.metrics.left.inc()
        return Response(status_code=499)  # nobody reads it


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return refused(error)


async def _refuse_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    sentence = _SENTENCES.get(error.status_code, error.detail).format(method=request.method[:20])
    return refused(Refusal(error.status_code, sentence))


async def _fail(_: Request, __: Exception) -> Response:
    return refused(Refusal(500, "the server failed at this request; its log says more"))
