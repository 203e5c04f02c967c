from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import zstandard

from megatron_omega.corpus.reading.finding import expand_inputs
from megatron_omega.corpus.sampling import RecordCount, TextSampler
from megatron_omega.errors import DataError


def lines(number: int, seed: int) -> bytes:
    source = random.Random(seed)
    words = ["".join(source.choices("abcdefgh", k=5)) for _ in range(20 + 40 * (seed % 4))]
    return b"".join(json.dumps({"text": " ".join(source.choices(words, k=60))}).encode() + b"\n" for _ in range(number))


def taken(folder: Path, budget: int, count: RecordCount) -> Counter[str]:
    sampler = TextSampler(expand_inputs([str(folder)]), ("text",), 1 << 20, count)
    found: Counter[str] = Counter()
    for file, text in sampler.texts(budget):
        found[Path(file.path).name] += len(text.encode())
    return found


@pytest.mark.parametrize("is_plain", [True, False])
def test_every_file_gives_its_share(tmp_path: Path, is_plain: bool) -> None:
    sizes = {}
    for number in range(12):
        data = lines(200 + 150 * number, number)
        name = f"{number:02}.jsonl" if is_plain else f"{number:02}.jsonl.zst"
        (tmp_path / name).write_bytes(data if is_plain else zstandard.compress(data))
        sizes[name] = len(data)
    budget = sum(sizes.values()) // 10
    found = taken(tmp_path, budget, RecordCount(0))
    for name, size in sizes.items():
        assert abs(found[name] / (budget * size / sum(sizes.values())) - 1) < 0.1, name


def test_a_large_file_gives_pieces_from_all_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b"".join(json.dumps({"text": f"{n:06} " * 30}).encode() + b"\n" for n in range(20_000))
    )
    sampler = TextSampler(expand_inputs([str(tmp_path)]), ("text",), 1 << 20, RecordCount(0))
    tenths = Counter(int(text[:6]) // 2000 for _, text in sampler.texts(1_000_000))
    assert set(tenths) == set(range(10))


def test_a_large_budget_takes_everything(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(50, 1))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(lines(70, 2)))
    count = RecordCount(0)
    taken(tmp_path, 1 << 30, count)
    assert count.records == 120


def test_too_many_bad_records_stop(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(98, 1) + b'{"text": null}\nno json\n\n')
    assert taken(tmp_path, 1 << 30, RecordCount(0.02))
    with pytest.raises(DataError, match=r"2 of 100 records are bad \(1 key 'text' is null, 1 not JSON\)"):
        taken(tmp_path, 1 << 30, RecordCount(0.01))
