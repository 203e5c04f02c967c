"""How rows attend: one row for each of several texts (`Growing`), or the next rows of one text (`Reading`)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_omega.generation.cache import Cache, Held, Keeping, Part, Seen
from megatron_omega.generation.decoder import Decoder, LayerPass, Room, make_room
from megatron_omega.generation.encoder import Memory
from megatron_omega.model.attention import with_sink
from megatron_omega.model.kernels import scaled_dot_product_attention
from megatron_omega.model.select import select_visible
from megatron_omega.model.stream import visible

Text = tuple[Held, Memory | None]
_MOST_WORKSPACES = 64


class PartViews(NamedTuple):
    """Of the heads of one part."""

    new: Tensor
    """Keys and values [texts, 2, heads, head_dim]."""
    queries: Sequence[Tensor]
    """[1, heads, 1, head_dim] of each text."""
    attended: Tensor
    """[texts, heads, 1, head_dim]."""


class Workspace:
    """Room for what the rows of a layer become, and views of it, made once for all layers and steps of so many rows."""

    def __init__(self, rows: int, texts: int, layer: LayerPass) -> None:
        branches, _, heads, head_dim = layer.gains.shape
        like = layer.gains
        self.room = make_room(rows, like)
        self.attended = like.new_zeros(rows, branches * heads * head_dim)
        self.remembered = like.new_zeros(rows, heads * head_dim)
        split = self.room.split[:texts]
        gathered = self.attended.view(rows, branches, heads, head_dim)[:texts]
        self.parts = [
            PartViews(
                split[:, part.branch_index, 1:, part.heads],
                split[:, part.branch_index, 0, part.heads].unsqueeze(2).split(1),
                gathered[:, part.branch_index, part.heads].unsqueeze(2),
            )
            for part in layer.parts
        ]
        self.queries = self.room.query_heads.unsqueeze(2)[:texts].split(1)
        self.answers = self.remembered.view(rows, heads, 1, head_dim)[:texts]


class Growing:
    """The next row of each of several texts. There may be more rows than texts: nobody asks for them."""

    def __init__(self, decoder: Decoder, cache: Cache, texts: Sequence[Text], rows: int) -> None:
        self._layers, self._stores = decoder.layers, cache.stores
        self._held, self._memories = [held for held, _ in texts], [memory for _, memory in texts]
        self._spaces = [_workspace(decoder.workspaces, rows, len(texts), layer) for layer in self._layers]
        places: dict[Keeping, list[int]] = {
            keeping: [cache.places(keeping, held, range(held.length, held.length + 1))[0] for held in self._held]
            for keeping in self._stores
        }
        self._places = {keeping: torch.tensor(found, device=decoder.device) for keeping, found in places.items()}
        self._seen: dict[Keeping, list[Seen]] = {
            keeping: [cache.seen(keeping, held, held.length) for held in self._held] for keeping in self._stores
        }

    def room(self, layer: int) -> Room:
        """Return where the products of all rows are to be written."""
        return self._spaces[layer].room

    def attend(self, layer: int, projected: Tensor) -> Tensor:
        """Keep what is new of every text, and attend."""
        of_layer, space = self._layers[layer], self._spaces[layer]
        for part, sink, views in zip(of_layer.parts, of_layer.sinks, space.parts, strict=True):
            self._stores[part.keeping].rows[part.entry].index_copy_(0, self._places[part.keeping], views.new)
            pairs = [seen.of(part.entry) for seen in self._seen[part.keeping]]
            if sink is not None:
                pairs = [with_sink(keys, values, sink[part.heads]) for keys, values in pairs]
            if part.keeping == "select":
                found = self._select(part, of_layer, views.queries, pairs)
            else:
                found = [
                    F.scaled_dot_product_attention(query, keys, values)
                    for query, (keys, values) in zip(views.queries, pairs, strict=True)
                ]
            views.attended.copy_(_together(found))
        return space.attended

    def _select(
        self, part: Part, layer: LayerPass, queries: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor]]
    ) -> list[Tensor]:
        """Attend [1, heads, 1, head_dim] of each text to the blocks that it chooses."""
        found = []
        for held, query, (keys, values) in zip(self._held, queries, pairs, strict=True):
            mask, held.routes[part.entry] = select_visible(layer.pattern, held.routes.get(part.entry), query, keys)
            found.append(scaled_dot_product_attention(query, keys, values, mask))
        return found

    def attend_memory(self, layer: int, query: Tensor) -> Tensor:
        """Every text attends the memory of its own prompt."""
        space, found = self._spaces[layer], []
        for mine, memory in zip(space.queries, self._memories, strict=True):
            assert memory is not None, "a decoder with cross-attention has a memory"
            found.append(F.scaled_dot_product_attention(mine, *memory.layers[layer]))
        space.answers.copy_(_together(found))
        return space.remembered

    def end(self) -> None:
        """Count the rows as read."""
        for held in self._held:
            held.length += 1


def _workspace(kept: dict[Hashable, Workspace], rows: int, texts: int, layer: LayerPass) -> Workspace:
    """Return the workspace that layers with the same parts share; it stays for later steps of as many rows."""
    key = rows, texts, layer.form
    if key not in kept:
        if len(kept) >= _MOST_WORKSPACES:
            kept.clear()
        kept[key] = Workspace(rows, texts, layer)
    return kept[key]


def _together(found: list[Tensor]) -> Tensor:
    """Tensors [1, ...] -> [texts, ...]."""
    return found[0] if len(found) == 1 else torch.cat(found)


class Reading:
    """The next `count` rows of one text. There may be more rows: nobody asks for them."""

    def __init__(self, decoder: Decoder, cache: Cache, text: Text, count: int, rows: int) -> None:
        self._layers, self._cache, self._count, self._rows = decoder.layers, cache, count, rows
        self._held, self._memory = text
        self._rooms: dict[tuple[int, ...], Room] = {}
        self._device = decoder.device
        self._new = range(self._held.length, self._held.length + count)
        self._masks: dict[tuple[Keeping, int], Tensor] = {}
        self._indices: dict[tuple[Keeping, range], Tensor] = {}

    def room(self, layer: int) -> Room:
        """Return where the products of all rows are written: room of this reading alone, which layers share."""
        gains = self._layers[layer].gains
        if gains.shape not in self._rooms:
            self._rooms[gains.shape] = make_room(self._rows, gains)
        return self._rooms[gains.shape]

    def attend(self, layer: int, projected: Tensor) -> Tensor:
        """Attend to what the text has read and to the new rows, and keep those."""
        of_layer = self._layers[layer]
        attended = projected.new_zeros(len(projected), projected.shape[1], *projected.shape[3:])
        for part, sink in zip(of_layer.parts, of_layer.sinks, strict=True):
            heads = projected[: self._count, part.branch_index, :, part.heads]  # [rows, 3, heads, head_dim]
            query = heads[:, 0].transpose(0, 1).unsqueeze(0)
            found = self._attend(part, of_layer, query, heads[:, 1:], None if sink is None else sink[part.heads])
            attended[: self._count, part.branch_index, part.heads] = found[0].transpose(0, 1)
        return attended.flatten(1)

    def _attend(self, part: Part, layer: LayerPass, query: Tensor, new: Tensor, sink: Tensor | None) -> Tensor:
        """query [1, heads, rows, head_dim], new keys and values [rows, 2, heads, head_dim] -> as the query."""
        rows = self._cache.stores[part.keeping].rows[part.entry]
        earlier = self._earlier(part.keeping)
        seen = torch.cat((rows.index_select(0, self._at(part.keeping, earlier)), new)) if earlier else new
        kept = self._kept(part.keeping)
        rows.index_copy_(0, self._at(part.keeping, kept), new[self._count - len(kept) :])
        keys, values = seen.permute(1, 2, 0, 3).unsqueeze(1)
        if part.keeping == "select":
            routes = self._held.routes
            mask, routes[part.entry] = select_visible(layer.pattern, routes.get(part.entry), query, keys)
        else:
            mask = self._mask(part, layer)
            if sink is not None:
                keys, values = with_sink(keys, values, sink)
                mask = F.pad(mask, (0, 1), value=True)
        return scaled_dot_product_attention(query, keys, values, mask)

    def _earlier(self, keeping: Keeping) -> range:
        """Return the positions that the cache still has of the tokens read before."""
        ring = self._cache.rings.get(keeping)
        return range(0 if ring is None else max(0, self._new.start - ring), self._new.start)

    def _kept(self, keeping: Keeping) -> range:
        """Return the new positions that are kept."""
        ring = self._cache.rings.get(keeping)
        return self._new if ring is None else self._new[-ring:]

    def _at(self, keeping: Keeping, positions: range) -> Tensor:
        key = (keeping, positions)
        if key not in self._indices:
            self._indices[key] = torch.tensor(self._cache.places(keeping, self._held, positions), device=self._device)
        return self._indices[key]

    def _mask(self, part: Part, layer: LayerPass) -> Tensor:
        """bool [1, heads or 1, rows, keys]; equal for all layers."""
        key = (part.keeping, part.branch_index)
        if key not in self._masks:
            keys_at = torch.arange(self._earlier(part.keeping).start, self._new.stop, device=self._device)
            queries_at = torch.arange(self._new.start, self._new.stop, device=self._device)
            count = layer.gains.shape[2]
            self._masks[key] = visible(part.branch, layer.pattern, queries_at, keys_at, count)[part.heads].unsqueeze(0)
        return self._masks[key]

    def attend_memory(self, layer: int, query: Tensor) -> Tensor:
        """All rows attend the memory of the text's prompt."""
        assert self._memory is not None, "a decoder with cross-attention has a memory"
        rows = query.transpose(0, 1).unsqueeze(0)
        return F.scaled_dot_product_attention(rows, *self._memory.layers[layer])[0].transpose(0, 1).flatten(1)

    def end(self) -> None:
        """Count the rows as read."""
        self._held.length += self._count
