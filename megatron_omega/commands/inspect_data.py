"""Look at shards, and at what a run read.

megatron-omega inspect-data data/omega_text_document                     statistics (also of a .bin, .idx or run folder)
megatron-omega inspect-data data/omega_text_document --check             read everything: checksums, ids, pointers
megatron-omega inspect-data data/omega_text_document --show 17 --tokenizer-model tokenizer.model
megatron-omega inspect-data data/omega_text_document --histogram lengths.png
megatron-omega inspect-data --run runs/omega --step 12345                the text of a step, with its masks and spans
megatron-omega inspect-data --run runs/omega --find 4711                 the steps that saw a document
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_omega.config.load import load_config
from megatron_omega.config.paths import with_carried_tokenizer, with_moved_corpora
from megatron_omega.config.schema import RunConfig
from megatron_omega.data.indexed import IndexedShard, without_suffix
from megatron_omega.data.inspection import SeenExample, check_shard, plot_lengths, render_sample, source_of, statistics
from megatron_omega.data.loader import micro_batch_indices
from megatron_omega.data.sidecar import read_sidecar
from megatron_omega.data.sources import Sources, open_sources
from megatron_omega.data.tokenizer import Tokenizer
from megatron_omega.errors import ConfigError, DataError
from megatron_omega.host import run_folder
from megatron_omega.host.command_line import CommandLine, output_file, writing
from megatron_omega.host.json_lines import read_objects
from megatron_omega.monitoring.history import Stretch, stretch_of, stretches


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "prefixes",
        nargs="*",
        metavar="PREFIX",
        help="shards, with or without .bin or .idx, or folders of runs; with --run: where shards of the run lie now",
    )
    parser.add_argument("--check", action="store_true", help="read everything and say whether it is whole")
    parser.add_argument("--show", type=int, metavar="DOCUMENT", help="print one document")
    parser.add_argument("--histogram", type=output_file, metavar="PNG", help="draw the lengths of documents")
    parser.add_argument("--tokenizer-model", help="SentencePiece model (default: the run's, or the one of the sidecar)")
    parser.takes_run(required=False)
    parser.add_argument("--step", type=int, help="with --run: print what each data-parallel rank read in this step")
    parser.add_argument("--find", type=int, metavar="DOCUMENT", help="with --run: print the steps that saw a document")
    parser.add_argument(
        "--corpus", type=int, default=0, help="with --find: place of the corpus in data.corpora (default 0)"
    )
    parser.add_argument("--steps", type=int, help="with --find: how many steps to search (default: all of the run)")
    parser.add_argument("--data-parallel-size", type=int, help="with --step: replicas (default: as the run last had)")
    parser.add_argument("--json", action="store_true", help="print JSON, one object a line")
    arguments = parser.parse_args(argv)
    if not arguments.prefixes and not arguments.run:
        raise ConfigError("nothing to look at; give the prefix of a shard, or --run")
    if arguments.step is not None and arguments.step < 1:
        raise ConfigError(f"--step {arguments.step}: steps are numbered from 1")
    return arguments


def look_at_shards(arguments: argparse.Namespace) -> None:
    shards = [IndexedShard(prefix) for prefix in prefixes_of(arguments)]
    for shard in shards:
        if arguments.check:
            tokenizer = Tokenizer.open(arguments.tokenizer_model) if arguments.tokenizer_model else None
            check_shard(shard, tokenizer)
        if arguments.show is not None:
            show_document(shard, arguments)
            continue
        found = {**statistics(shard), **({"check": "passed"} if arguments.check else {})}
        print(json.dumps(found) if arguments.json else "\n".join(f"{k:>17}  {v}" for k, v in in_words(found).items()))
    if arguments.histogram:
        with writing(arguments.histogram):
            plot_lengths(shards, arguments.histogram)
        if not arguments.json:
            print(f"{'histogram':>17}  {arguments.histogram}")


def in_words(found: dict[str, Any]) -> dict[str, str]:
    """Return statistics for people: no braces, no nulls."""
    shown: dict[str, str] = {}
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{part} {number:,}" for part, number in value.items()) or "none"
        elif isinstance(value, bool):
            value = "yes" if value else "no"
        elif isinstance(value, int):
            value = f"{value:,}"
        shown[name.replace("_", " ")] = "not recorded" if value is None else str(value)
    return shown


def prefixes_of(arguments: argparse.Namespace) -> list[str]:
    """Return the shards that are meant: prefixes, files of a shard, or all corpora of a run."""
    found: list[str] = []
    for name in arguments.prefixes or [arguments.run]:
        if (Path(name) / run_folder.CONFIG).exists():
            found += [corpus.prefix for corpus in load_config(Path(name) / run_folder.CONFIG).data.corpora]
        elif Path(name).is_dir():
            found += [str(path.with_suffix("")) for path in sorted(Path(name).glob("*.idx"))]
        else:
            found.append(without_suffix(str(name)))
    if not found:
        raise DataError(f"{' '.join(map(str, arguments.prefixes)) or arguments.run} names no shard; give a prefix")
    return found


def show_document(shard: IndexedShard, arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.show < len(shard):
        raise DataError(f"{shard.prefix} has documents 0 to {len(shard) - 1}, no {arguments.show}")
    sidecar = read_sidecar(shard.prefix)
    own = arguments.run / run_folder.TOKENIZER if arguments.run else None
    named = sidecar.options.get("tokenizer_model") if sidecar else None
    model = arguments.tokenizer_model or (own if own and own.exists() else named)
    if model is None:
        raise ConfigError(f"{shard.prefix} does not say which tokenizer made it; give --tokenizer-model")
    tokenizer, ids = Tokenizer.open(model), shard.document(arguments.show)
    source, text = source_of(shard, arguments.show), tokenizer.render(ids)
    if arguments.json:
        print(json.dumps({"document": arguments.show, "source": source, "tokens": len(ids), "text": text}))
    else:
        print(f"document {arguments.show}, {len(ids):,} tokens, from {source}\n{text}")


def open_history(run: Path) -> list[Stretch]:
    """Return what the run read, as it was configured when it did."""
    path = run / run_folder.CONFIG
    if not path.exists():
        raise DataError(f"{path} is missing; {run} is not the folder of a run")
    return stretches(read_objects(run / run_folder.EVENTS), load_config(path))


def open_corpus(arguments: argparse.Namespace, config: RunConfig) -> Sources:
    """Open the corpus of a stretch, with the run's own copy of the tokenizer; a shard may have moved."""
    config = with_moved_corpora(config, [without_suffix(prefix) for prefix in arguments.prefixes])
    return open_sources(with_carried_tokenizer(config, arguments.run))


def examples_of_step(arguments: argparse.Namespace) -> Iterator[SeenExample]:
    stretch = stretch_of(open_history(arguments.run), arguments.step)
    sources = open_corpus(arguments, stretch.config)
    replicas = arguments.data_parallel_size or stretch.replicas or 1
    pieces = stretch.samples_of(arguments.step)
    size = sum(map(len, pieces))
    micro = stretch.config.batch.micro_batch_size
    if size % (micro * replicas):
        raise ConfigError(f"a batch of {size} cannot be dealt to --data-parallel-size {replicas} in parts of {micro}")
    for rank in range(replicas):
        batches = micro_batch_indices(pieces[0].start, lambda _: pieces, micro, rank, replicas)
        for _ in range(size // (micro * replicas)):
            for index in next(batches):
                yield from render_sample(sources.train[index], rank, sources.train, sources.tokenizer)


def show_step(arguments: argparse.Namespace) -> None:
    for seen in examples_of_step(arguments):
        if arguments.json:
            print(json.dumps(dataclasses.asdict(seen)))
            continue
        origin = seen.origin
        where = f"tokens {origin.offset}..{origin.offset + origin.num_tokens} of document {origin.document}"
        print(f"-- rank {seen.rank}, sample {seen.sample}, {origin.kind}, {seen.source}, {where}")
        if seen.encoder:
            print(f"   encoder: {seen.encoder!r}")
        print(f"   decoder: {seen.decoder!r}")


def steps_of_document(arguments: argparse.Namespace, history: Sequence[Stretch]) -> tuple[str, list[dict[str, int]]]:
    """Return where a document comes from, and every step and sample that held text of it."""
    last = arguments.steps or history[-1].config.training.train_steps
    found: list[dict[str, int]] = []
    source = ""
    for stretch in history:
        sources = open_corpus(arguments, stretch.config)
        up_to = min(last, stretch.up_to_step)
        if up_to <= stretch.after_step or arguments.corpus >= len(sources.train.corpora):
            continue
        source = _source_in(sources, arguments)
        end = stretch.consumed_before(up_to + 1)
        found += [
            {"step": stretch.step_of(sample, up_to), "sample": sample}
            for sample in sources.train.samples_of(arguments.corpus, arguments.find, end)
            if sample >= stretch.consumed_samples
            and not any(start <= sample < stop for start, stop in stretch.left_out)
        ]
    if not source:
        most = max(len(stretch.config.data.corpora) for stretch in history) - 1
        raise ConfigError(f"--corpus {arguments.corpus}: the run has corpora 0 to {most}")
    return source, found


def _source_in(sources: Sources, arguments: argparse.Namespace) -> str:
    shard = sources.train.corpora[arguments.corpus].shard
    if not 0 <= arguments.find < len(shard):
        raise DataError(f"{shard.prefix} has documents 0 to {len(shard) - 1}, no {arguments.find}")
    return source_of(shard, arguments.find)


def show_steps_of_document(arguments: argparse.Namespace) -> None:
    history = open_history(arguments.run)
    steps = arguments.steps or history[-1].config.training.train_steps
    source, found = steps_of_document(arguments, history)
    if arguments.json:
        print(json.dumps({"document": arguments.find, "source": source, "seen": found}))
        return
    print(f"document {arguments.find} ({source}): {len(found)} samples in {steps} steps")
    for one in found:
        print(f"step {one['step']}, sample {one['sample']}")


def main(argv: Sequence[str]) -> None:
    arguments = read_arguments(argv)
    if arguments.run and arguments.step is not None:
        show_step(arguments)
    elif arguments.run and arguments.find is not None:
        show_steps_of_document(arguments)
    else:
        look_at_shards(arguments)
