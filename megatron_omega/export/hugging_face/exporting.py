"""The files beside the weights by which Transformers loads an export: settings, tokenizer, and the model's code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from megatron_omega.config.schema import RunConfig
from megatron_omega.data.tokenizer import MODE_PIECES, Tokenizer
from megatron_omega.export.hugging_face.tokenizer_json import obstacles, tokenizer_config, tokenizer_json
from megatron_omega.log import get_logger

CONFIG_NAME = "config.json"
MODEL_TYPE = "gpt_omega"
TORCH_NAMES: Mapping[str, str] = {"fp32": "float32", "bf16": "bfloat16"}
CODE_FOLDER = "megatron_omega.export.hugging_face.model"
_MOST_NEW_TOKENS = 128
_CONFIG, _STACKS, _MODELS = (f"{part}_gpt_omega" for part in ("configuration", "stacks", "modeling"))

logger = get_logger(__name__)


def hub_files(config: RunConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, bytes]:
    """Return every file that Transformers needs beside the weights, by its name.

    A tokenizer that tokenizer.json cannot express is left out with a warning.
    """
    documents = {
        CONFIG_NAME: model_settings(config, tokenizer, dtype),
        "generation_config.json": generation_settings(config, tokenizer),
    }
    if reasons := obstacles(tokenizer):
        logger.warning("no tokenizer.json is written: the tokenizer cannot be expressed in it (%s)", "; ".join(reasons))
    else:
        is_decoder_only = config.model.is_decoder_only
        opening = tokenizer.processor.id_to_piece(tokenizer.special.bos) if is_decoder_only else MODE_PIECES[0]
        documents["tokenizer.json"] = tokenizer_json(tokenizer, opening)
        documents["tokenizer_config.json"] = tokenizer_config(
            tokenizer, padding_side="left" if is_decoder_only else "right"
        )
    files = {name: _encoded(content) for name, content in documents.items()}
    return files | model_code()


def model_code() -> dict[str, bytes]:
    """Return the files of the model's code, by name."""
    folder = resources.files(CODE_FOLDER)
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name.endswith("_gpt_omega.py")}


def model_settings(config: RunConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """Return the content of config.json."""
    model, special = config.model, tokenizer.special
    classes = _classes(config)
    return {
        "architectures": [classes["AutoModelForCausalLM" if model.is_decoder_only else "AutoModelForSeq2SeqLM"][1]],
        "model_type": MODEL_TYPE,
        "auto_map": {auto: f"{module}.{name}" for auto, (module, name) in classes.items()},
        "dtype": TORCH_NAMES[dtype],
        **model.model_dump(mode="json"),
        "max_encoder_length": config.data.encoder_seq_length,
        "max_decoder_length": config.data.decoder_seq_length,
        "prefix_mode_token_id": special.modes.prefix,
        "mask_mode_token_id": special.modes.mask,
        "tokenizer_sha256": tokenizer.fingerprint,
        "is_encoder_decoder": not model.is_decoder_only,
        "tie_word_embeddings": True,
        **_special_ids(config, tokenizer),
    }


def generation_settings(config: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of generation_config.json: greedy, and only pieces of text are written, or the end."""
    wanted = {*tokenizer.text_ids, tokenizer.special.eos}
    return {
        **_special_ids(config, tokenizer),
        "max_new_tokens": _MOST_NEW_TOKENS,
        "suppress_tokens": [number for number in range(tokenizer.vocab_size) if number not in wanted],
    }


def _special_ids(config: RunConfig, tokenizer: Tokenizer) -> dict[str, int]:
    special = tokenizer.special
    ids = {"pad_token_id": special.pad, "bos_token_id": special.bos, "eos_token_id": special.eos}
    return ids if config.model.is_decoder_only else ids | {"decoder_start_token_id": special.bos}


def _classes(config: RunConfig) -> dict[str, tuple[str, str]]:
    """Return the module and name of the class behind each of Transformers' automatic ones."""
    classes = {"AutoConfig": (_CONFIG, "GPTOmegaConfig"), "AutoModel": (_STACKS, "GPTOmegaModel")}
    if config.model.is_decoder_only:
        return classes | {"AutoModelForCausalLM": (_MODELS, "GPTOmegaForCausalLM")}
    classes["AutoModelForSeq2SeqLM"] = (_MODELS, "GPTOmegaForConditionalGeneration")
    return classes | ({"AutoModelForMaskedLM": (_MODELS, "GPTOmegaForMaskedLM")} if config.model.has_mlm_head else {})


def _encoded(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()
