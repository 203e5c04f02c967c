"""Agreement with megatron-core, where it is installed: pip install --no-deps megatron-core==0.16.1 (extra: rivals)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_omega.data.indexed import IndexedShard
from megatron_omega.data.megatron_order import MegatronWindows


@pytest.fixture(scope="module")
def megatron() -> Iterator[SimpleNamespace]:
    """The rival's classes; importing them takes some seconds."""
    pytest.importorskip("megatron.core")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.gpt_dataset import (  # pyright: ignore[reportMissingImports]
            GPTDataset,
            GPTDatasetConfig,
        )
        from megatron.core.datasets.indexed_dataset import (  # pyright: ignore[reportMissingImports]
            IndexedDataset,
            IndexedDatasetBuilder,
        )
        from megatron.core.datasets.utils import Split  # pyright: ignore[reportMissingImports]

        pytest.importorskip("megatron.core.datasets.helpers_cpp")
        yield SimpleNamespace(
            GPTDataset=GPTDataset,
            GPTDatasetConfig=GPTDatasetConfig,
            IndexedDataset=IndexedDataset,
            IndexedDatasetBuilder=IndexedDatasetBuilder,
            Split=Split,
        )


def test_it_reads_what_we_write(megatron: SimpleNamespace, prefix: str) -> None:
    ours, theirs = IndexedShard(prefix), megatron.IndexedDataset(prefix)
    assert len(ours) == len(theirs) == len(theirs.document_indices) - 1
    assert all(np.array_equal(ours.document(number), theirs[number]) for number in range(len(ours)))


@pytest.mark.parametrize("sequences", [1, 2])
def test_we_read_what_it_writes(megatron: SimpleNamespace, tmp_path: Path, prefix: str, sequences: int) -> None:
    """With one sequence a document the files are the same to the byte."""
    import torch

    ours = IndexedShard(prefix)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.uint16)
    for number in range(len(ours)):
        tokens = ours.document(number)
        for part in np.array_split(tokens, sequences):
            builder.add_item(torch.from_numpy(part.astype(np.int32)))
        builder.end_document()
    builder.finalize(str(tmp_path / "m.idx"))
    theirs = IndexedShard(tmp_path / "m")
    assert all(np.array_equal(ours.document(number), theirs.document(number)) for number in range(len(ours)))
    for suffix in ("bin", "idx"):
        is_equal = (tmp_path / f"m.{suffix}").read_bytes() == Path(f"{prefix}.{suffix}").read_bytes()
        assert is_equal == (suffix == "bin" or sequences == 1)


@pytest.mark.parametrize("seed", [1234, 7])
@pytest.mark.parametrize(("seq_length", "num_samples"), [(64, 300), (64, 1000), (257, 40), (257, 120)])
def test_samples_are_its_samples(
    megatron: SimpleNamespace, prefix: str, tmp_path: Path, seed: int, seq_length: int, num_samples: int
) -> None:
    tokenizer: Any = SimpleNamespace(vocab_size=600, eod=3, pad=0, unique_identifiers={"name": "test"})
    config = megatron.GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=None,
        blend_per_split=None,
        split="1",
        path_to_cache=str(tmp_path),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    documents = np.arange(280, dtype=np.int32)
    dataset = megatron.IndexedDataset(prefix)
    theirs = megatron.GPTDataset(dataset, prefix, documents, num_samples, megatron.Split.train, config)
    ours = MegatronWindows(
        IndexedShard(prefix),
        range(280),
        seq_length=seq_length,
        num_samples=num_samples,
        seed=seed,
        corpus=0,
        vocab_size=600,
        eos_id=None,
    )
    assert len(ours) == len(theirs) >= num_samples
    for number in range(len(theirs)):
        wanted = theirs._query_document_sample_shuffle_indices(number)[0]
        assert np.array_equal(np.concatenate([span.tokens for span in ours.take(number, 0)[1]]), wanted)
