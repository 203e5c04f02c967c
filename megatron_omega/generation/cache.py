"""Keys and values of growing texts: each attention pattern keeps the tokens that it may still see, and no more.

    part     heads                       keeps                            a token of position i attends
    causal   all of the branch           all tokens, in pages             0 .. i
    select   all of the branch           all tokens, in pages             what its blocks choose
    column   odd axial heads             all tokens, in pages             i mod w, i mod w + w, .. i
    row      even axial heads            a ring of w tokens               i - i mod w .. i
    local    all of the branch           a ring of W tokens               i - W + 1 .. i

A page is a row of the axial grid: w tokens. A text of n tokens holds

    ceil(n / w) w (causal + select + column) + W local + w row    keys and values, each of as many heads as it has

Texts that begin alike share pages; rings, which are overwritten, are copied. Everything is allocated once, for all
layers together: a view of one text is made once a step, not once a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_omega.config.schema import Branch, ModelConfig
from megatron_omega.generation.pages import Pages

Keeping = Literal["causal", "select", "column", "row", "local"]
PAGED: frozenset[Keeping] = frozenset({"causal", "select", "column"})


class Part(NamedTuple):
    """Heads of one branch of one layer that keep the same tokens."""

    keeping: Keeping
    branch: Branch
    branch_index: int
    heads: slice
    """Of this rank's heads of the branch."""
    entry: int
    """Place of this part among all parts, of all layers, that keep the same tokens."""


def layer_parts(model: ModelConfig, local_heads: tuple[int, int]) -> list[tuple[Part, ...]]:
    """Return the parts of every decoder layer on the rank that has the heads first .. end."""
    entries: dict[Keeping, int] = {}
    layers = []
    for layer in range(model.decoder_layers):
        parts = []
        for index, branch in enumerate(model.layer_branches("decoder", layer)):
            for keeping, heads in _branch_parts(branch, local_heads):
                parts.append(Part(keeping, branch, index, heads, entries.setdefault(keeping, 0)))
                entries[keeping] += 1
        layers.append(tuple(parts))
    return layers


def _branch_parts(branch: Branch, local_heads: tuple[int, int]) -> list[tuple[Keeping, slice]]:
    first, end = local_heads
    if branch == "axial":
        rows, columns = slice(first % 2, None, 2), slice(1 - first % 2, None, 2)
        halves: list[tuple[Keeping, slice]] = [("row", rows), ("column", columns)]
        return [(keeping, heads) for keeping, heads in halves if _count(heads, end - first)]
    keeping: Keeping = "local" if branch == "local" else "select" if branch == "select" else "causal"
    return [(keeping, slice(None))]


def _count(heads: slice, of: int) -> int:
    return len(range(*heads.indices(of)))


@dataclass
class Held:
    """What one text holds of the cache."""

    slot: int
    """Its rings."""
    pages: list[int]
    """Of its tokens, in their order; the last ones may be unused yet."""
    length: int = 0
    """Tokens read."""
    routes: dict[int, Tensor] = field(default_factory=dict)
    """Of each select part, by its entry, the blocks that the last block attends."""


class Seen:
    """The keys and values that one text's next token attends, in every layer that has such a part."""

    def __init__(self, store: Store, index: slice | Tensor) -> None:
        self._store, self._index = store, index
        self._views: list[tuple[Tensor, Tensor]] | None = None
        if isinstance(index, slice):
            found = store.parted[:, :, :, :, index]
            self._views = list(zip(*(one.unbind() for one in found.unbind()), strict=True))

    def of(self, entry: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [1, heads, tokens, head_dim]; read in place if they lie side by side."""
        if self._views is not None:
            return self._views[entry]
        found = self._store.rows[entry].index_select(0, self._index)  # pyright: ignore[reportArgumentType]
        keys, values = found.permute(1, 2, 0, 3).unsqueeze(1)
        return keys, values


class Store:
    """The room of all parts that keep the same tokens."""

    def __init__(self, entries: int, tokens: int, heads: int, head_dim: int, like: Tensor) -> None:
        self.data = like.new_zeros(entries, tokens, 2, heads, head_dim)  # zeros: what is masked has to be finite
        self.rows = self.data.unbind()
        self.parted = self.data.permute(2, 0, 3, 1, 4).unsqueeze(2)
        """Keys and values apart: [2, entries, 1, heads, tokens, head_dim]."""

    @property
    def token_bytes(self) -> int:
        """Bytes of one token, in all layers."""
        return self.data.nbytes // self.data.shape[1]

    def copy(self, sources: slice | Tensor, targets: slice | Tensor) -> None:
        """Copy tokens inside the room."""
        self.data[:, targets] = self.data[:, sources].clone()


class Cache:
    """The room of all texts."""

    def __init__(
        self, model: ModelConfig, local_heads: tuple[int, int], *, pages: int, slots: int, like: Tensor
    ) -> None:
        self.width = model.axial_width
        self.rings: dict[Keeping, int] = {"row": model.axial_width, "local": model.local_window}
        self.parts = layer_parts(model, local_heads)
        self.pages = Pages(pages)
        self.slots = Pages(slots)
        self.stores: dict[Keeping, Store] = {}
        every = [part for parts in self.parts for part in parts]
        for part in every:
            if part.keeping in self.stores:
                continue
            entries = sum(other.keeping == part.keeping for other in every)
            tokens = pages * self.width if part.keeping in PAGED else slots * self.rings[part.keeping]
            heads = _count(part.heads, local_heads[1] - local_heads[0])
            self.stores[part.keeping] = Store(entries, tokens, heads, model.resolved_head_dim, like)

    def pages_for(self, tokens: int) -> int:
        """Return how many pages a text of so many tokens has."""
        return -(-tokens // self.width)

    def bytes_held(self, tokens: int) -> int:
        """Return what one text of so many tokens holds, in bytes."""
        paged = self.pages_for(tokens) * self.width
        return sum(
            store.token_bytes * (paged if keeping in PAGED else self.rings[keeping])
            for keeping, store in self.stores.items()
        )

    def hold(self, tokens: int, source: Held | None = None) -> Held:
        """Take a slot, and pages for a text that will have so many tokens and goes on where `source` stands."""
        shared = [] if source is None else source.pages[: source.length // self.width]
        self.pages.share(shared)
        held = Held(self.slots.take(1)[0], [*shared, *self.pages.take(self.pages_for(tokens) - len(shared))])
        if source is not None:
            self.continue_from(held, source)
        return held

    def release(self, held: Held) -> None:
        """Give everything back."""
        self.slots.drop([held.slot])
        self.pages.drop(held.pages)
        held.pages = []

    def continue_from(self, held: Held, source: Held) -> None:
        """Let `held` go on where `source` stands: whole pages are shared, the last one and the rings copied.

        What it held before at the places of shared pages is dropped; the pages behind them stay its own.
        """
        whole, rest = divmod(source.length, self.width)
        self.pages.share(source.pages[:whole])
        self.pages.drop(held.pages[:whole])
        held.pages[:whole] = source.pages[:whole]
        if rest:
            self._copy_pages(source.pages[whole], held.pages[whole], rest)
        for keeping, size in self.rings.items():
            if keeping in self.stores:
                self.stores[keeping].copy(_run(source.slot, size), _run(held.slot, size))
        held.length, held.routes = source.length, dict(source.routes)

    def _copy_pages(self, source: int, target: int, tokens: int) -> None:
        for keeping in PAGED & self.stores.keys():
            first, to = source * self.width, target * self.width
            self.stores[keeping].copy(slice(first, first + tokens), slice(to, to + tokens))

    def places(self, keeping: Keeping, held: Held, positions: range) -> list[int]:
        """Return where in its store the tokens of some positions are written."""
        if keeping in PAGED:
            return [held.pages[i // self.width] * self.width + i % self.width for i in positions]
        size = self.rings[keeping]
        return [held.slot * size + i % size for i in positions]

    def seen(self, keeping: Keeping, held: Held, position: int) -> Seen:
        """Return what the token at `position`, the last one written, attends."""
        store = self.stores[keeping]
        if keeping == "local":
            first = held.slot * self.rings["local"]
            return Seen(store, slice(first, first + min(position + 1, self.rings["local"])))
        if keeping == "row":
            first = held.slot * self.width
            return Seen(store, slice(first, first + position % self.width + 1))
        step = self.width if keeping == "column" else 1
        return Seen(store, self._range(held, range(position % step, position + 1, step)))

    def _range(self, held: Held, positions: range) -> slice | Tensor:
        """Return the places of positions in pages: a slice if the pages lie side by side."""
        pages = held.pages[: positions[-1] // self.width + 1]
        if pages[-1] - pages[0] == len(pages) - 1 and pages == list(range(pages[0], pages[-1] + 1)):
            first = pages[0] * self.width
            return slice(first + positions.start, first + positions[-1] + 1, positions.step)
        like = self.stores[next(iter(PAGED & self.stores.keys()))].data
        return torch.tensor(self.places("causal", held, positions), device=like.device)


def _run(slot: int, size: int) -> slice:
    return slice(slot * size, (slot + 1) * size)
