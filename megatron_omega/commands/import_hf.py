"""Turn a folder that Transformers wrote into a checkpoint, which trains on under any layout.

megatron-omega import-hf --folder tuned --output runs/tuned/start --tokenizer exports/omega-tiny/tokenizer.model
megatron-omega train --config run.yaml --checkpoint.load runs/tuned/start --checkpoint.load_weights_only true

The folder is one of save_pretrained, or an export as it is. Transformers does not save
tokenizer.model again, so the export's is named. A model that was trained as a Seq2SeqLM has lost its masked-language
head, one that was trained as a MaskedLM its decoder: --base names a model to take them from.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from megatron_omega.errors import ConfigError
from megatron_omega.export.hugging_face.adapter_folder import SETTINGS_NAME, import_adapters
from megatron_omega.export.hugging_face.exporting import CONFIG_NAME
from megatron_omega.export.hugging_face.importing import Imported, import_folder
from megatron_omega.export.loading import find_weights, open_weights
from megatron_omega.host.command_line import CommandLine
from megatron_omega.log import configure_logging


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder of save_pretrained, or an export")
    parser.add_argument("--output", type=Path, required=True, help="folder to make: checkpoints, with one in it")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model (default: the folder's tokenizer.model)")
    parser.add_argument("--base", type=Path, help="model that gives what the folder lacks; for adapters, their base")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser.parse_args(argv)


def summary(found: Imported) -> str:
    """Say in a few lines what came in, and how to train on."""
    lines = [f"{found.checkpoint}: {found.num_parameters:,} parameters, no optimizer state"]
    if found.from_base:
        lines.append(f"from the base: {found.from_base[0]} and {len(found.from_base) - 1} more parameters")
    if found.has_lost_mlm_head:
        lines.append("the folder has no masked-language head: model.mlm_head is false (--base gives one)")
    lines.append(f"train on: --checkpoint.load {found.checkpoint.parent} --checkpoint.load_weights_only true")
    return "\n".join(lines)


def bring_adapters(arguments: argparse.Namespace) -> None:
    """Import adapters that PEFT saved."""
    if arguments.base is None:
        raise ConfigError(f"{arguments.folder} holds adapters alone; name the checkpoint of their base with --base")
    found = import_adapters(arguments.folder, arguments.output, arguments.base, arguments.tokenizer)
    if arguments.json:
        result = {"checkpoint": str(found.checkpoint), "num_parameters": found.num_parameters}
        print(json.dumps(result | {"lora": found.lora.model_dump(mode="json"), "num_new": found.num_new}))
        return
    print(
        f"{found.checkpoint}: {found.num_parameters:,} parameters of adapters of rank {found.lora.rank} beside "
        f"{', '.join(found.lora.targets)}"
    )
    if found.num_new:
        print(f"{found.num_new} products of these targets had no adapter there; theirs begin as nothing")
    print(f"train on: megatron-omega finetune --load {found.checkpoint.parent} --tasks ...")


def main(argv: Sequence[str]) -> None:
    arguments = read_arguments(argv)
    configure_logging()
    if (arguments.folder / SETTINGS_NAME).exists() and not (arguments.folder / CONFIG_NAME).exists():
        bring_adapters(arguments)
        return
    with ExitStack() as stack:
        base = None
        if arguments.base is not None:
            base = open_weights(find_weights(arguments.base)[0])
            stack.callback(base.close)
        found = import_folder(arguments.folder, arguments.output, tokenizer=arguments.tokenizer, base=base)
    if arguments.json:
        result = {"checkpoint": str(found.checkpoint), "num_parameters": found.num_parameters}
        result |= {"from_base": list(found.from_base), "has_lost_mlm_head": found.has_lost_mlm_head}
        print(json.dumps(result))
    else:
        print(summary(found))
