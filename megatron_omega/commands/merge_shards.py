"""Join shards into one, in the given order, copying bytes (of a Slurm array, for example).

megatron-omega merge-shards --input data/omega-?????-of-00016_text_document.idx --output-prefix data/omega_text_document
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_omega.corpus.merge import merge_shards
from megatron_omega.data.indexed import without_suffix
from megatron_omega.data.sidecar import read_sidecar
from megatron_omega.errors import DataError
from megatron_omega.host.command_line import CommandLine


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", nargs="+", required=True, help="prefixes, or .idx files, or a folder of shards, or globs"
    )
    parser.add_argument("--output-prefix", required=True, help="prefix of the whole, without .bin and .idx")
    parser.add_argument("--dedup", choices=("exact",), help="keep the first of documents with the same tokens")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser.parse_args(argv)


def find_prefixes(names: list[str]) -> list[str]:
    """Return the prefixes that `names` stand for, sorted within each name."""
    found: list[str] = []
    for name in names:
        if Path(name).is_dir():
            paths = sorted(map(str, Path(name).glob("*.idx")))
        elif any(sign in name for sign in "*?["):
            paths = sorted(path for path in glob.glob(name) if path.endswith(".idx"))  # noqa: PTH207
        else:
            paths = [name]
        found += map(without_suffix, paths)
    if not found:
        raise DataError(f"--input {' '.join(names)} names no shard; give prefixes or .idx files")
    return found


def without_earlier_merges(prefixes: list[str], output: str) -> list[str]:
    """Leave out what an earlier merge made of shards that are named too, which would be taken twice; say so.

    Raises:
        DataError: the output itself is among the inputs.
    """
    if Path(output) in map(Path, prefixes):
        raise DataError(f"--output-prefix {output} is one of --input; choose another name for the whole")
    named = {Path(prefix).absolute() for prefix in prefixes}
    kept = []
    for prefix in prefixes:
        sidecar = read_sidecar(prefix)
        merged = [Path(part).absolute() for part in (sidecar.options.get("merged", ()) if sidecar else ())]
        if any(part in named for part in merged):
            print(f"left out: {prefix} is an earlier merge of shards in --input", file=sys.stderr)
        else:
            kept.append(prefix)
    return kept


def main(argv: Sequence[str]) -> None:
    arguments = read_arguments(argv)
    prefixes = without_earlier_merges(find_prefixes(arguments.input), arguments.output_prefix)
    merged = merge_shards(prefixes, arguments.output_prefix, is_deduplicated=arguments.dedup == "exact")
    if arguments.json:
        print(json.dumps({"prefix": arguments.output_prefix, "shards": prefixes, **dataclasses.asdict(merged)}))
        return
    counts = f"{merged.documents:,} documents, {merged.tokens:,} tokens of {len(prefixes)} shards"
    left_out = f", {merged.duplicates:,} duplicates left out" if arguments.dedup else ""
    print(f"{arguments.output_prefix}: {counts}{left_out}")
