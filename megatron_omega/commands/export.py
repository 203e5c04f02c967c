"""Export a checkpoint as safetensors, config.json and tokenizer, and prove that the export says the same.

megatron-omega export-hf --checkpoint runs/omega-tiny --output exports/omega-tiny

Transformers 5 loads the folder: AutoModelForSeq2SeqLM, AutoModelForMaskedLM, AutoModelForCausalLM (decoder-only),
AutoTokenizer; its README.md shows how. So do megatron-omega generate, fill-mask and load_omega (in
megatron_omega.export.loading). What was trained on there comes back by megatron-omega import-hf.

A checkpoint of adapters is merged into its base; with --adapters it is written alone, as PEFT loads it:

megatron-omega export-hf --checkpoint runs/omega-tiny-lora --adapters --output exports/adapters
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_omega.checkpoint.catalogue import newest_whole
from megatron_omega.errors import CheckpointError, ConfigError
from megatron_omega.export.adapted import AdaptedReader, open_whole
from megatron_omega.export.comparison import Comparison, compare_export
from megatron_omega.export.hugging_face.adapter_folder import write_adapters
from megatron_omega.export.loading import open_tokenizer
from megatron_omega.export.native import DTYPES, is_export, write_export
from megatron_omega.host.command_line import CommandLine
from megatron_omega.log import configure_logging


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.takes_checkpoint()
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model (default: the run's)")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="fp32", help="number format of the weights (default fp32)"
    )
    parser.add_argument("--shard-gigabytes", type=float, default=5.0, help="largest file (default 5)")
    parser.add_argument("--device", default="cpu", help="where logits are compared (default cpu)")
    parser.add_argument("--adapters", action="store_true", help="write the adapters alone, in PEFT's format")
    parser.add_argument("--base-name", help="with --adapters: where PEFT finds the export of the base by itself")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser.parse_args(argv)


def verdict(found: Comparison) -> str:
    """Say in a line what the comparison has shown."""
    tensors = (
        "equal bit for bit" if not found.changed else f"of which {len(found.changed)} differ: {found.changed[0]}, ..."
    )
    return (
        f"read back: {found.num_tensors} tensors {tensors}; logits differ by at most {found.logit_difference:.2g} "
        f"standard deviations (tolerance {found.tolerance:g}): {'PASS' if found.is_same else 'FAIL'}"
    )


def export_adapters(arguments: argparse.Namespace) -> None:
    """Write the adapters of a checkpoint alone."""
    with open_whole(newest_whole(arguments.checkpoint)) as source:
        if not isinstance(source, AdaptedReader):
            raise CheckpointError(f"{source.path} is a whole model and has no adapters; leave --adapters out")
        count = write_adapters(arguments.output, source, base_name=arguments.base_name)
        result = {"adapters": str(arguments.output), "checkpoint": str(source.path), "num_parameters": count}
        base = source.folders[0]
    if arguments.json:
        print(json.dumps(result))
    else:
        print(f"{arguments.output}: {count:,} parameters of {result['checkpoint']}, read back bit for bit")
        print(f"PEFT loads it on the export of its base, {base}")


def main(argv: Sequence[str]) -> None:
    arguments = read_arguments(argv)
    configure_logging()
    if not arguments.shard_gigabytes > 0:
        raise ConfigError(f"--shard-gigabytes {arguments.shard_gigabytes:g} must be more than 0")
    if is_export(arguments.checkpoint):
        raise CheckpointError(f"{arguments.checkpoint} is an export already; give a checkpoint")
    if arguments.adapters:
        export_adapters(arguments)
        return
    checkpoint = newest_whole(arguments.checkpoint)
    with open_whole(checkpoint) as source:
        tokenizer = open_tokenizer(source, arguments.tokenizer)
        count = source.element_count()
        written = write_export(
            arguments.output, source, tokenizer, dtype=arguments.dtype, shard_bytes=int(arguments.shard_gigabytes * 1e9)
        )
    found = compare_export(arguments.output, checkpoint, arguments.device)
    files = {parameter.file for parameter in written.parameters.values()}
    if arguments.json:
        result = {"export": str(arguments.output), "checkpoint": str(checkpoint), "num_parameters": count}
        result |= {"dtype": written.dtype, "num_files": len(files), "is_same": found.is_same, **asdict(found)}
        print(json.dumps(result))
    else:
        print(
            f"{arguments.output}: {count:,} parameters of {checkpoint}, {written.dtype}, {len(files)} "
            f"weight file{'s' * (len(files) > 1)}"
        )
        print(verdict(found))
    if not found.is_same:
        raise CheckpointError(f"{arguments.output} does not say what {checkpoint} says; do not use it")
