"""Memories of prompts: made once, shared by all texts of a prompt, and kept for later ones while there is room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator

import torch

from megatron_omega.generation.encoder import Memory, encoding, finish, project
from megatron_omega.model.omega import Omega

Prompt = tuple[int, ...]


class Memories:
    """What the encoder has read, up to so many tokens."""

    def __init__(self, model: Omega, most_tokens: int) -> None:
        self._model, self._most_tokens = model, most_tokens
        self._kept: OrderedDict[Prompt, Memory] = OrderedDict()
        self._users: dict[Prompt, int] = {}

    @property
    def tokens(self) -> int:
        """Tokens of prompts that are kept or in use."""
        return sum(map(len, self._kept.keys() | self._users.keys()))

    def has_room(self, prompt: Prompt) -> bool:
        """Return whether a memory of `prompt` can be made now; those that nobody uses make room."""
        if prompt in self._kept or prompt in self._users or not prompt:
            return True
        while self.tokens + len(prompt) > self._most_tokens:
            unused = next((other for other in self._kept if other not in self._users), None)
            if unused is None:
                return False
            del self._kept[unused]
        return True

    def use(self, prompt: Prompt) -> None:
        """Hold the place of a prompt's memory."""
        if prompt:
            self._users[prompt] = self._users.get(prompt, 0) + 1

    def leave(self, prompt: Prompt) -> None:
        """Hold it once less; it is kept until others need its place."""
        if not prompt:
            return
        self._users[prompt] -= 1
        if not self._users[prompt]:
            del self._users[prompt]

    def making(self, prompt: Prompt) -> Generator[int, None, Memory]:
        """Make a memory, or find it; yield the tokens that went through one layer more."""
        if prompt not in self._kept:
            memory = yield from encoding(self._model, [prompt])
            self._kept[prompt] = project(self._model, memory[0])
            yield len(prompt)
        self._kept.move_to_end(prompt)
        return self._kept[prompt]

    @torch.inference_mode()
    def make(self, prompt: Prompt) -> Memory:
        """Make a memory at once, or find it. One that is made is not kept."""
        return self._kept.get(prompt) or project(self._model, finish(encoding(self._model, [prompt]))[0])
