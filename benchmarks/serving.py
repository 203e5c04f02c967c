"""A server under load: many clients of every kind for some minutes; errors, latency, and whether memory stays flat.

python benchmarks/serving.py --checkpoint runs/omega-tiny [--clients 64] [--seconds 120]

Clients ask one after the other: completions streamed and whole, with several answers, log-probabilities and echoes,
masks, embeddings, and streams that they leave in the middle. The server is a process of its own; its memory is read
once a second, and compared between the second quarter of the time and the last.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

import httpx2 as httpx
import psutil

ROOT = Path(__file__).resolve().parents[1]
TEXT = "The function returns the name of the file that was opened last, or nothing if there is none."


@dataclass
class Counts:
    """What the clients saw."""

    ends: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    first_seconds: list[float] = field(default_factory=list)
    between_seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def prompt(draw: random.Random, most_characters: int) -> str:
    words = TEXT.split()
    return " ".join(draw.choice(words) for _ in range(draw.randint(1, 30)))[:most_characters]


def completion(draw: random.Random, most_characters: int) -> dict[str, object]:
    """Draw a question about /v1/completions."""
    found: dict[str, object] = {
        "prompt": prompt(draw, most_characters),
        "max_tokens": draw.randint(4, 48),
        "seed": draw.randrange(1000),
    }
    if draw.random() < 0.3:
        found |= {"logprobs": draw.randint(0, 5), "echo": draw.random() < 0.5}
    if draw.random() < 0.2:
        found |= {"n": draw.randint(2, 3)}
    if draw.random() < 0.3:
        found |= {"temperature": 0}
    if draw.random() < 0.2:
        found |= {"stop": [draw.choice([".", " the", "\n"])], "frequency_penalty": 0.5}
    return found


async def stream(
    client: httpx.AsyncClient, draw: random.Random, most_characters: int, counts: Counts, *, leaves: bool
) -> None:
    """Ask for a stream; leave it after some parts if `leaves`."""
    body = completion(draw, most_characters) | {"stream": True}
    patience = draw.randint(1, 8) if leaves else 1 << 30
    last = time.monotonic()
    count = 0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code} {(await answer.aread())[:200]!r}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            if line.startswith('data: {"error"'):
                raise RuntimeError(line[:200])
            now = time.monotonic()
            (counts.between_seconds if count else counts.first_seconds).append(now - last)
            last, count = now, count + 1
            if count >= patience:
                counts.ends["left in the middle"] += 1
                return
    counts.tokens += count
    counts.ends["streamed"] += 1


async def ask(client: httpx.AsyncClient, path: str, body: dict[str, object], counts: Counts) -> None:
    """Ask for a whole answer."""
    answer = await client.post(f"/v1/{path}", json=body)
    if answer.status_code != 200:
        raise RuntimeError(f"{answer.status_code} {answer.text[:200]}")
    counts.tokens += answer.json()["usage"].get("completion_tokens", 0)
    counts.ends[path] += 1


async def be_a_client(client: httpx.AsyncClient, seed: int, end: float, counts: Counts, card: dict[str, Any]) -> None:
    """Ask until `end`."""
    abilities, most_characters = card["abilities"], card["max_prompt_tokens"] - 12  # a character is a token at most
    draw = random.Random(seed)
    kinds = ["stream"] * 5 + ["leave"] * 2 + ["completions"] * 3
    kinds += ["fill-mask"] * abilities["fill_mask"] + ["embeddings"] * abilities["embeddings"]
    while time.monotonic() < end:
        kind = draw.choice(kinds)
        try:
            if kind in ("stream", "leave"):
                await stream(client, draw, most_characters, counts, leaves=kind == "leave")
            elif kind == "completions":
                await ask(client, kind, completion(draw, most_characters), counts)
            else:
                text = prompt(draw, most_characters) + " <mask>" * (kind == "fill-mask")
                await ask(client, kind, {"input": [text] * draw.randint(1, 3)}, counts)
        except (httpx.HTTPError, RuntimeError) as error:
            counts.ends["error"] += 1
            counts.errors.append(f"{type(error).__name__}: {error}")


async def watch(pid: int, end: float, found: list[int]) -> None:
    """Read the server's memory once a second."""
    process = psutil.Process(pid)
    while time.monotonic() < end:
        found.append(process.memory_info().rss)
        await asyncio.sleep(1)


async def load(url: str, pid: int, clients: int, seconds: float) -> tuple[Counts, list[int]]:
    """Let all clients ask; return what they saw, and the server's memory over time."""
    counts, memory = Counts(), []
    card = httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]
    end = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:  # a connection for each asker
        askers = (be_a_client(client, seed, end, counts, card) for seed in range(clients))
        await asyncio.gather(*askers, watch(pid, end, memory))
    return counts, memory


def in_flight(url: str) -> float:
    """Return the answers that the server still counts."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("omega_answers_in_flight{"))


def percentiles(values: list[float]) -> str:
    cuts = quantiles(values, n=100) if len(values) > 1 else [0.0] * 99
    return f"{cuts[49] * 1000:.0f} ms at p50, {cuts[98] * 1000:.0f} ms at p99"


def report(counts: Counts, memory: list[int], seconds: float) -> None:
    """Print it all."""
    print(f"requests: {sum(counts.ends.values()):,} ({', '.join(f'{n} {name}' for name, n in counts.ends.items())})")
    print(f"tokens:   {counts.tokens:,}, {counts.tokens / seconds:.1f} a second")
    print(f"first part of a stream: {percentiles(counts.first_seconds)}")
    print(f"from part to part:      {percentiles(counts.between_seconds)}")
    quarter = max(1, len(memory) // 4)
    early, late = mean(memory[quarter : 2 * quarter]), mean(memory[-quarter:])
    shown = f"{early / 2**20:.1f} MiB in the second quarter, {late / 2**20:.1f} in the last"
    print(f"memory:   {shown} ({late / early - 1:+.2%})")
    for error, count in Counter(counts.errors).most_common(5):
        print(f"error:    {count} x {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--tokenizer")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    arguments = parser.parse_args()
    words = ["--checkpoint", arguments.checkpoint, "--port", "0", "--max-queue", str(8 * arguments.clients)]
    words += ["--tokenizer", arguments.tokenizer] if arguments.tokenizer else []
    server = subprocess.Popen([sys.executable, ROOT / "tools/serve.py", *words], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[-1].rstrip("/")
        counts, memory = asyncio.run(load(url, server.pid, arguments.clients, arguments.seconds))
        report(counts, memory, arguments.seconds)
        time.sleep(2)
        print(f"in flight at the end: {in_flight(url):g}")
    finally:
        server.terminate()
        print(f"the server ended with {server.wait(timeout=60)}")


if __name__ == "__main__":
    main()
