"""Looking at shards and at what a run read: statistics, checks, documents, the samples of a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_omega.config.labels import IGNORED_LABEL
from megatron_omega.data.batch import Origin, Sample
from megatron_omega.data.indexed import IndexedShard
from megatron_omega.data.origins import Origins, load_origins
from megatron_omega.data.pairs.shard import PairShard
from megatron_omega.data.sidecar import check_sidecar, read_sidecar
from megatron_omega.data.sources import Source
from megatron_omega.data.tokenizer import Tokenizer
from megatron_omega.errors import DataError

_BLOCK = 1 << 22


def statistics(shard: IndexedShard) -> dict[str, Any]:
    """Return counts and length quantiles of a shard, and what its sidecar says."""
    lengths = shard.lengths()
    quantiles = np.quantile(lengths, [0, 0.1, 0.5, 0.9, 0.99, 1]).astype(int).tolist() if len(lengths) else [0] * 6
    sidecar = read_sidecar(shard.prefix)
    return {
        "prefix": shard.prefix,
        "documents": len(shard),
        "tokens": shard.num_tokens,
        "dtype": shard.dtype.name,
        "mean_length": round(float(lengths.mean()), 1) if len(lengths) else 0.0,
        "length_quantiles": dict(zip(("min", "10%", "50%", "90%", "99%", "max"), quantiles, strict=True)),
        "empty_documents": int((lengths == 0).sum()),
        "has_checksums": shard.has_checksums,
        "tokenizer": sidecar.tokenizer_fingerprint if sidecar else None,
        "bad_records": sidecar.counts.get("bad", {}) if sidecar else None,
        "duplicates": sidecar.counts.get("duplicates", 0) if sidecar else None,
    }


def check_shard(shard: IndexedShard, tokenizer: Tokenizer | None) -> None:
    """Read all of a shard; raise DataError at the first damage: checksums, pointers, origins, ids beyond the
    vocabulary.

    A tokenizer that is given must be the one that made the shard.
    """
    sidecar = read_sidecar(shard.prefix)
    load_origins(shard.prefix)
    if tokenizer is not None:
        check_sidecar(shard, tokenizer)
    if shard.has_checksums:
        shard.check_all()
    place = 0
    for start in range(0, shard.num_sequences, _BLOCK):
        stop = min(shard.num_sequences, start + _BLOCK)
        sums = np.cumsum(shard.lengths_of(start, stop), dtype=np.int64) * shard.dtype.itemsize
        wrong = np.flatnonzero(shard.pointers_of(start, stop) != np.concatenate([[0], sums[:-1]]) + place)
        if len(wrong):
            raise DataError(
                f"{shard.prefix}.idx is damaged at sequence {start + wrong[0]}: its pointer is not the sum of the "
                "lengths before it"
            )
        place += int(sums[-1])
    limit = tokenizer.vocab_size if tokenizer else sidecar.vocab_size if sidecar else None
    for start in range(0, shard.num_tokens if limit else 0, _BLOCK):
        shard.ids(start, min(shard.num_tokens, start + _BLOCK), limit or 0)


def source_of(shard: IndexedShard | PairShard, document: int) -> str:
    """Return file and line of a document or a pair, or its number where nobody wrote that down."""
    if isinstance(shard, PairShard):
        return shard.place(document)
    origins = load_origins(shard.prefix)
    if origins is None:
        return f"{shard.prefix} document {document}"
    name, record = origins.locate(document)
    return f"{name}:{record + 1}"


def documents_of(source: Source, samples: Iterable[int]) -> list[dict[str, Any]]:
    """Return the distinct documents that `samples` hold text of: shard, number, and file:line where it is known."""
    held = sorted({one for index in samples for one in source.held(index)})
    origins: dict[int, Origins | None] = {}
    found = []
    for corpus, document in held:
        shard = source.corpora[corpus].shard
        if isinstance(shard, PairShard):
            found.append({"task": shard.name, "pair": document, "source": shard.place(document)})
            continue
        prefix = shard.prefix
        if corpus not in origins:
            origins[corpus] = load_origins(prefix)
        known = origins[corpus]
        name, record = known.locate(document) if known else (None, 0)
        place = {"source": f"{name}:{record + 1}"} if name else {}
        found.append({"shard": str(prefix), "document": document, **place})
    return found


def plot_lengths(shards: Sequence[IndexedShard], path: Path) -> None:
    """Draw histograms of document lengths, in tokens, to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(shards), 1, figsize=(8, 3 * len(shards)), squeeze=False, layout="constrained")
    for axis, shard in zip(axes[:, 0], shards, strict=True):
        lengths = shard.lengths()
        bins = np.geomspace(1, max(2, lengths.max(initial=2)), 60)
        axis.hist(lengths, bins=bins, color="#4477aa", label="documents")
        axis.set(xscale="log", xlabel="tokens of a document", ylabel="documents", title=Path(shard.prefix).name)
        share = axis.twinx()
        share.hist(lengths, bins=bins, weights=lengths, histtype="step", color="#cc6677", label="tokens")
        share.set_ylabel("tokens")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


@dataclass(frozen=True)
class SeenExample:
    """One example of a sample, for people to read."""

    rank: int
    sample: int
    origin: Origin
    source: str
    encoder: str
    decoder: str


def render_sample(sample: Sample, rank: int, source: Source, tokenizer: Tokenizer) -> Iterator[SeenExample]:
    """Yield the examples of a sample with their sources; masked tokens read [mask=answer]."""
    row = sample.row
    for origin in sample.origins:
        shard = source.corpora[origin.corpus].shard
        inside = row.encoder_segments[0] == origin.segment
        encoder = _with_answers(row.encoder_ids[0][inside], row.mlm_labels[0][inside], tokenizer)
        labels = row.lm_labels[0][row.decoder_segments[0] == origin.segment]
        place = source_of(shard, origin.document)
        yield SeenExample(rank, sample.index, origin, place, encoder, tokenizer.render(labels))


def _with_answers(ids: NDArray[np.int64], answers: NDArray[np.int64], tokenizer: Tokenizer) -> str:
    parts: list[str] = []
    run: list[int] = []
    for token, answer in zip(ids.tolist(), answers.tolist(), strict=True):
        if answer == IGNORED_LABEL:
            run.append(token)
            continue
        parts += [tokenizer.render(run), f"[{tokenizer.render([token])}={tokenizer.render([answer])}]"]
        run = []
    return "".join([*parts, tokenizer.render(run)])
