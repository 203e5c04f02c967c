"""Block-sparse attention: a block of tokens attends itself and the earlier blocks of its document that suit it best.

    blocks    of `width` tokens, the rows of the axial grid; documents start with one
    route     a block m of a document, earlier than n, scores q_first(n) . mean(k of m); the `blocks` best are chosen,
              for every head apart. Only a block's FIRST query routes: any later one, or a mean, would tell the tokens
              before it what comes behind them.
    attend    token i of block n sees the tokens of the chosen blocks, and j <= i of its own

The choice itself has no gradient; what is chosen learns as any attention does. Cost grows with length x (blocks + 1) x
width, and with (length / width)^2 for the scores. Related: MoBA (2502.13189), NSA (2502.11089).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_omega.model.kernels import scaled_dot_product_attention
from megatron_omega.model.stream import OUTSIDE, PADDING, Pattern, Stream, additive, share_document

SelectFacts = tuple[Tensor, Tensor]


def earlier_blocks(stream: Stream, pattern: Pattern) -> Tensor:
    """bool [b, n, n]: is m an earlier block of the document of block n?"""
    first = _blocks_of(stream, pattern)[..., 0]
    same = (first.unsqueeze(-1) == first.unsqueeze(-2)) & (first > PADDING).unsqueeze(-1)
    return same.tril(diagonal=-1)


def select_mask(stream: Stream, pattern: Pattern, dtype: torch.dtype) -> Tensor:
    """[b * n, 1, width, (blocks + 1) * width]: a block's queries, and the keys of its choice and of itself.

    Whichever blocks are chosen, they are whole, and the best ones come first: how many there are is all that counts.
    """
    blocks = _blocks_of(stream, pattern)
    chosen = min(pattern.blocks, blocks.shape[1])
    count = stream.once(earlier_blocks, pattern).sum(dim=-1, keepdim=True)  # [b, n, 1]
    far = (torch.arange(chosen, device=blocks.device) < count).repeat_interleave(pattern.width, dim=-1)
    own = share_document(blocks, blocks).tril()  # [b, n, width, width]
    mask = torch.cat((far.unsqueeze(2).expand(-1, -1, pattern.width, -1), own), dim=-1)
    return additive(mask.flatten(0, 1).unsqueeze(1), dtype)


def _blocks_of(stream: Stream, pattern: Pattern) -> Tensor:
    """[b, n, width] segments."""
    missing = -stream.segments.shape[1] % pattern.width
    return F.pad(stream.segments, (0, missing), value=OUTSIDE).unflatten(1, (-1, pattern.width))


@torch.no_grad()
def route(first_queries: Tensor, keys: Tensor, earlier: Tensor, blocks: int) -> Tensor:
    """Return the choice of every block and head: indices [b, n, h, blocks], the best first.

    first_queries [b, n, h, head_dim]; keys [b, m, h, width, head_dim]; earlier [b, n, m]. If fewer blocks are earlier,
    what is behind them is arbitrary.
    """
    means = keys.float().mean(dim=3)
    scores = torch.einsum("bnhd,bmhd->bnhm", first_queries.float(), means)
    return scores.masked_fill(~earlier.unsqueeze(2), float("-inf")).topk(min(blocks, scores.shape[-1]), dim=-1).indices


def select(pattern: Pattern, query: Tensor, key: Tensor, value: Tensor, facts: SelectFacts) -> Tensor:
    """Attend [b, h, s, head_dim]; `facts` are `earlier_blocks` and `select_mask`."""
    earlier, mask = facts
    length = query.shape[2]
    queries, keys, values = (_by_block(part, pattern.width) for part in (query, key, value))
    chosen = route(queries[:, :, :, 0], keys, earlier, pattern.blocks)
    batch, count, heads, _ = chosen.shape
    places = torch.arange(batch * count * heads, device=query.device).view(batch, count, heads, 1)  # of own blocks
    begin = places - torch.arange(count, device=query.device).view(1, count, 1, 1) * heads  # of block 0 of that head
    rows = torch.cat((begin + chosen * heads, places), dim=-1).flatten()
    found = (part.reshape(-1, part.shape[-2] * part.shape[-1]).index_select(0, rows) for part in (keys, values))
    shape = (batch * count, heads, -1, query.shape[-1])
    chosen_keys, chosen_values = (part.view(shape) for part in found)
    attended = scaled_dot_product_attention(queries.flatten(0, 1), chosen_keys, chosen_values, mask)
    return attended.unflatten(0, (batch, count)).transpose(1, 2).flatten(2, 3)[:, :, :length]


def _by_block(part: Tensor, width: int) -> Tensor:
    """[b, h, s, head_dim] -> [b, n, h, width, head_dim]."""
    missing = -part.shape[2] % width
    part = F.pad(part, (0, 0, 0, missing)) if missing else part
    return part.unflatten(2, (-1, width)).transpose(1, 2)


def select_visible(pattern: Pattern, routes: Tensor | None, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return who sees whom when one document grows, and the choice of its last block for the next call.

    query [b, h, t, head_dim] of the last t tokens, keys [b, h, s, head_dim] of all. `routes` bool [b, h, m]: what the
    call before chose for the block it ended in. Returns bool [b, h, t, s] and the same for the present last block.
    """
    width, total = pattern.width, keys.shape[2]
    seen = total - query.shape[2]
    first, last = seen // width, (total - 1) // width  # blocks that the new tokens lie in
    starts = torch.arange(-(-seen // width), last + 1, device=query.device)  # those of which the first token is new
    chosen = torch.zeros(*query.shape[:2], last + 1 - first, last + 1, dtype=torch.bool, device=query.device)
    if routes is not None:
        chosen[:, :, 0, : routes.shape[-1]] = routes
    if len(starts):
        whole = _by_block(keys[:, :, : last * width], width) if last else keys[:, :, :0].unsqueeze(1)
        earlier = torch.arange(last, device=query.device) < starts.unsqueeze(-1)
        firsts = query[:, :, starts * width - seen].transpose(1, 2)
        picked = route(firsts, whole, earlier.unsqueeze(0), pattern.blocks) if last else starts.new_zeros(1, 1, 1, 0)
        valid = torch.arange(picked.shape[-1], device=query.device) < starts.view(1, -1, 1, 1)
        hits = torch.zeros(*firsts.shape[:3], last + 1, dtype=torch.bool, device=query.device)
        hits.scatter_(3, picked.expand(*firsts.shape[:3], -1), valid.expand(*firsts.shape[:3], -1))
        chosen[:, :, starts[0] - first :] = hits.transpose(1, 2)
    i = torch.arange(seen, total, device=query.device)
    j = torch.arange(total, device=query.device)
    own = (i.unsqueeze(-1) // width == j // width) & (j <= i.unsqueeze(-1))
    far = chosen[:, :, i // width - first][..., j // width]
    return far | own, chosen[:, :, -1]
