"""The page that goes with exported weights: enough to write a program that reads them."""

from __future__ import annotations

from megatron_omega.config.schema import ModelConfig

_CARD = """---
library_name: transformers
pipeline_tag: {pipeline}
tags: [gpt-omega, megatron-omega]
---

# GPT-Omega weights

{shape}, stored as {dtype} in {files}.

## Use

Transformers 5, without any other package (the model's code lies in this folder, hence `trust_remote_code`):

{usage}

megatron-omega: `megatron-omega generate --checkpoint FOLDER`{fill_mask}, or

    from megatron_omega.export.loading import load_omega
    model, config = load_omega("FOLDER")

Where megatron-omega is installed, `megatron_omega.register_transformers()` makes the flag unnecessary.
`megatron-omega import-hf` turns a folder that was trained on with Transformers into a checkpoint.

`tokenizer.model` is SentencePiece, `tokenizer.json` the same for Transformers: literal control pieces such as `</s>`
stay text, `<mask>` alone is the mask (with split_special_tokens=True it stays text too: for texts of strangers). What
the decoder is to answer is given as `text_target`: it has no mode token in front and ends.
`omega.json` has every setting (`config`), and for every parameter its shape, its file and the XXH3-64 of its bytes
(`parameters`).

## What they mean

Parameters by their canonical names. In the files `head.mlm.` is `mlm.`, all other names begin with `model.`, and every
matrix has two dimensions: the same bytes, outputs before inputs.

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
text's last model.decoder_overlap tokens; with <s> where model.decoder_start is begin, and after no text.

Branches, for token i attending j: full (all j), causal (j <= i), local (abs(i - j) < local_window), axial (heads with
an even index: same i // axial_width; odd: same i % axial_width), dynamic (full, q times temperature, output times
gate), select (the model.select_blocks earlier blocks of axial_width tokens with the largest q . mean(k), q of the first
token of i's own block, and that block). In the decoder all are causal. `*.attention.sinks` [local and axial branches,
heads, head size]: a further key of those heads, with a value of zero. If `model.*_branches` is a list of lists, layer
i has list i modulo their number.
"""


_SEQ2SEQ = """    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
    model = AutoModelForSeq2SeqLM.from_pretrained("FOLDER", trust_remote_code=True)
    inputs = tokenizer(["The first"], return_tensors="pt")
    print(tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True))"""

_CAUSAL = _SEQ2SEQ.replace("AutoModelForSeq2SeqLM", "AutoModelForCausalLM")

_MASKED = """

    from transformers import pipeline
    fill = pipeline("fill-mask", "FOLDER", trust_remote_code=True)
    fill("The first <mask> of all")"""


def model_card(dtype: str, model: ModelConfig, num_files: int) -> str:
    """Return the page, in Markdown."""
    encoder = "" if model.is_decoder_only else f"{model.encoder_layers} encoder and "
    files = (
        "`model.safetensors`" if num_files == 1 else f"{num_files} files (`model.safetensors.index.json` lists them)"
    )
    return _CARD.format(
        shape=f"{encoder}{model.decoder_layers} decoder layers, d = {model.hidden_size}, f = {model.ffn_hidden_size}, "
        f"{model.num_attention_heads} heads",
        dtype=dtype,
        files=files,
        pipeline="text-generation" if model.is_decoder_only else "text2text-generation",
        usage=(_CAUSAL if model.is_decoder_only else _SEQ2SEQ) + (_MASKED if model.has_mlm_head else ""),
        fill_mask=", `megatron-omega fill-mask --checkpoint FOLDER`" if model.has_mlm_head else "",
    )
