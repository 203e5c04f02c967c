"""The page that goes with exported weights: enough to write a program that reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from pydantic import JsonValue

_CARD = """# GPT-Omega weights

{shape}, stored as {dtype} in {files}.

`tokenizer.model` is SentencePiece. `config.json` has every setting (`config`), and for every parameter its shape, its
file and the XXH3-64 of its bytes (`parameters`).

## What reads them

megatron-omega: `megatron-omega generate --checkpoint FOLDER`, `megatron-omega fill-mask --checkpoint FOLDER`, or

    from megatron_omega.export.loading import load_omega
    model, config = load_omega("FOLDER")

Any safetensors reader gives the tensors. The Transformers library has no such architecture: `AutoModel` does not load
this.

## What they mean

| name | shape |
|---|---|
| `token_table.weight` | [vocabulary padded to a multiple of 128, d]; input embedding (times sqrt(d)) and output, tied |
| `*.attention.qkv.weight` | [branches, 3 = q k v, heads, head size, d]; branches in the order of `model.*_branches` |
| `*.attention.out.weight` | [d, branches, heads, head size] |
| `*.attention.qk_gains` | [branches, 2 = q k, heads, head size]; RMSNorm of q and k, before rotary positions |
| `*.attention.dynamic.weight`, `.bias` | [2 = temperature gate, heads, d], [2, heads]; 2 sigmoid(w x + b) |
| `*.cross.q.weight`, `*.cross.kv.weight` | [heads, head size, d], [2 = k v, heads, head size, d] |
| `*.cross.out.weight`, `*.cross.qk_gains` | [d, heads, head size], [2 = q k, heads, head size] |
| `*.feed_forward.gate_up.weight`, `.down.weight` | [2 = gate up, f, d], [d, f]; down(silu(gate x) * up x) |
| `*_norm.weight`, `encoder.norm.weight`, `decoder.norm.weight` | [d]; RMSNorm |
| `*.positions.weight` | [length, d]; learned positions, where there are any |
| `head.mlm.*` | dense [d, d] and bias, GELU, RMSNorm, then the token table and `output_bias` |

    encoder   x += a Attention(norm(x));  x += a FFN(norm(x));  memory = norm(x)
    decoder   y += a Attention(norm(y));  y += a Cross(norm(y), memory);  y += a FFN(norm(y))
    logits    c norm(y) table^T;  MLM: c transform(memory) table^T + output_bias

a = depth_base / layers of the stack, c = output_multiplier sqrt(width_base / d); where model.parametrization is 1,
a = depth_base / (encoder layers + decoder layers), c = output_multiplier. Scores are scaled by 1 / sqrt(head size).
Rotary pairs are (k, k + head size / 2). The encoder reads a mode token, then the text. The decoder begins with the
text's last token; with <s> where model.decoder_start is begin, and after no text.

Branches, for token i attending j: full (all j), causal (j <= i), local (abs(i - j) < local_window), axial (heads with
an even index: same i // axial_width; odd: same i % axial_width), dynamic (full, q times temperature, output times
gate), select (the model.select_blocks earlier blocks of axial_width tokens with the largest q . mean(k), q of the first
token of i's own block, and that block). In the decoder all are causal. `*.attention.sinks` [local and axial branches,
heads, head size]: a further key of those heads, with a value of zero. If `model.*_branches` is a list of lists, layer
i has list i modulo their number.
"""


def model_card(dtype: str, config: Mapping[str, JsonValue], num_files: int) -> str:
    """Return the page, in Markdown."""
    model = cast(Mapping[str, JsonValue], config["model"])
    layers = f"{model['encoder_layers']} encoder and {model['decoder_layers']} decoder layers"
    shape = (
        f"{layers}, d = {model['hidden_size']}, f = {model['ffn_hidden_size']}, {model['num_attention_heads']} heads"
    )
    files = (
        "`model.safetensors`" if num_files == 1 else f"{num_files} files (`model.safetensors.index.json` lists them)"
    )
    return _CARD.format(shape=shape, dtype=dtype, files=files)
