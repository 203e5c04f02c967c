"""CPU-seconds of evaluating: `score` and its adapter, beside lm-evaluation-harness's class for Transformers.

python benchmarks/evaluation.py [--checkpoint runs/omega-tiny] [--questions 24] [--choices 4] [--rounds 3] [--json]

Both evaluate the same model (ours, and its own export under Transformers) on the same questions, in one process on one
thread, interleaved: each round runs each rival once. Any checkpoint will do: `make demo` makes one. Before anything is
timed, answers are compared: the likelihood of every choice has to be equal within 1e-4, and how many written texts are
alike is told (a near tie may fall either way).

    choices   a context of 40-120 words, choices of 2-12 words (multiple choice by likelihood)
    write     the same contexts, answers of 24 tokens
    as it is  the same through the harness as it stands: for an encoder-decoder it lets an answer grow by as many
              tokens as the prompt has; for `write` the export's generation settings are told the right limit
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from megatron_omega.export.adapted import open_whole
from megatron_omega.export.loading import TextModel, load_text_model
from megatron_omega.export.native import write_export
from megatron_omega.tasks.likelihood import likelihoods
from megatron_omega.tasks.questions import text_asked
from megatron_omega.tasks.scoring import answered, request_of

ANSWER = 24
WORDS = "the quick brown fox jumps over a lazy dog while some bright vixens watch and quiz every nymph"
Pair = tuple[str, str]


def rival_of(model: TextModel, folder: Path) -> Any:
    """Export the checkpoint of `model`, and load it as the harness loads a model of Transformers."""
    from lm_eval.models.huggingface import HFLM

    with open_whole(model.path) as source:
        write_export(folder, source, model.tokenizer, dtype="fp32", shard_bytes=1 << 40)
    backend = "causal" if model.config.model.is_decoder_only else "seq2seq"
    return cast("Any", HFLM)(
        pretrained=str(folder),
        backend=backend,
        trust_remote_code=True,
        dtype="float32",
        batch_size=16,
        device="cpu",
    )


def questions(count: int, choices: int) -> list[Pair]:
    """Return contexts with the choices of each behind each other."""
    draw = random.Random(1)
    found = []
    for _ in range(count):
        context = " ".join(draw.choices(WORDS.split(), k=draw.randint(40, 120)))
        for _ in range(choices):
            found.append((context, " " + " ".join(draw.choices(WORDS.split(), k=draw.randint(2, 12)))))
    return found


def instances(kind: Any, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=one, idx=at) for at, one in enumerate(arguments)]


def compare(checkpoint: Path, count: int, choices: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Return medians of CPU-seconds of both, and their ratio, for each kind of work."""
    model = load_text_model(checkpoint)
    tokenizer = model.tokenizer
    rival = rival_of(model, folder / "export")
    longest = model.config.data.encoder_seq_length - 2  # ours cuts what is longer, the rival does not
    pairs = [pair for pair in questions(count, choices) if len(tokenizer.encode(pair[0])) <= longest]
    prompts = list(dict.fromkeys(context for context, _ in pairs))
    settings = rival.model.generation_config

    def our_choices() -> list[float]:
        return [one.nats for one in likelihoods(model, [text_asked(tokenizer, *pair) for pair in pairs])]

    def their_choices() -> list[float]:
        return [float(nats) for nats, _ in rival.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)]

    def our_texts() -> list[str]:
        return answered(model, [request_of(model, tuple(tokenizer.encode(text)), ANSWER) for text in prompts])

    def their_texts(most: int | None = ANSWER) -> list[str]:
        settings.max_new_tokens = most
        options = {"until": [], "max_gen_toks": ANSWER, "do_sample": False}
        asked = instances("generate_until", [(text, dict(options)) for text in prompts])
        return list(rival.generate_until(asked, disable_tqdm=True))

    worst = max(abs(one - other) / abs(other) for one, other in zip(our_choices(), their_choices(), strict=True))
    ours = our_texts()
    same = sum(one == other for one, other in zip(ours, their_texts(), strict=True))
    begun = sum(other.startswith(one) for one, other in zip(ours, their_texts(None), strict=True))
    if worst > 1e-4:
        raise SystemExit(f"{checkpoint}: likelihoods differ by {worst:.2g} of themselves")
    rivals: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {"choices": (our_choices, their_choices)}
    rivals["write"] = (our_texts, their_texts)
    rivals["as it is"] = (our_texts, lambda: their_texts(None))
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    for _ in range(rounds):
        for kind, both in rivals.items():
            for which, work in enumerate(both):
                seconds[kind, which].append(cpu_seconds(work))
    found: dict[str, Any] = {
        "checkpoint": str(model.path),
        "choices differ by": worst,
        "texts alike": f"{same} of {len(prompts)}",
        "as it is: begin alike": f"{begun} of {len(prompts)}",
    }
    for kind in rivals:
        ours, theirs = (statistics.median(seconds[kind, which]) for which in (0, 1))
        found |= {f"{kind}: ours, CPU-s": ours, f"{kind}: harness, CPU-s": theirs, f"{kind}: ratio": theirs / ours}
    return found


def cpu_seconds(work: Callable[[], object]) -> float:
    gc.collect()
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/omega-tiny"), help="default runs/omega-tiny")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--choices", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = compare(arguments.checkpoint, arguments.questions, arguments.choices, arguments.rounds, Path(folder))
    if arguments.json:
        print(json.dumps(found))
        return
    for key, value in found.items():
        print(f"{key:24} {value:.4g}" if isinstance(value, float) else f"{key:24} {value}")


if __name__ == "__main__":
    main()
