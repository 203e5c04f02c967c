"""Say what a run learned, on validation text, beside what frequencies of pieces and of pairs of pieces reach.

    megatron-omega report --run runs/omega-tiny

Tells the losses of both heads, what the encoder's text is worth to the decoder, and a masked word of held-out text that
was found because of the words around it, if there is one. Exit code 1: the decoder learned less than frequencies.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_omega.config.load import load_config
from megatron_omega.config.paths import with_carried_tokenizer
from megatron_omega.config.schema import RunConfig
from megatron_omega.data.sources import Sources, open_sources
from megatron_omega.data.tokenizer import MASK_PIECE, Tokenizer
from megatron_omega.errors import DataError
from megatron_omega.host import run_folder
from megatron_omega.host.command_line import CommandLine
from megatron_omega.host.regular_files import read_text

_WINDOWS = 256
_LONGEST = 120
_SHOWN_TOKENS = 12
_MOST_BYTES = 1 << 30


def validations(run: Path) -> list[dict[str, Any]]:
    """Return every validation of the run, oldest first."""
    try:
        lines = read_text(run / run_folder.EVENTS, _MOST_BYTES).splitlines()
    except OSError as error:
        raise DataError(
            f"{run / run_folder.EVENTS} cannot be read: {error.strerror}; give the folder of a run"
        ) from None
    found = [event for event in map(json.loads, lines) if event["event"] == "evaluate"]
    if not found:
        raise DataError(f"{run} has no validation yet; set evaluation.interval_steps")
    return found


def main(argv: Sequence[str]) -> int:
    """Print the figures; return 1 where the model learned less than the frequencies of words."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.takes_run()
    options = parser.parse_args(argv)
    config = with_carried_tokenizer(load_config(options.run / run_folder.CONFIG), options.run)
    found = validations(options.run)
    first, last = found[0], found[-1]
    print(f"validation, nats per token     before    after {last['step']} steps")
    print(f"  language modelling        {first['lm_loss']:9.3f}{last['lm_loss']:9.3f}")
    if last["mlm_loss"] is not None:
        print(f"  masked tokens             {first['mlm_loss']:9.3f}{last['mlm_loss']:9.3f}")
    unigram = tell_held_out(config, options.run)
    return 0 if last["lm_loss"] < min(math.log(config.model.vocab_size) - 1.5, unigram) else 1


def tell_held_out(config: RunConfig, run: Path) -> float:
    """Print what the newest checkpoint knows of held-out windows; return the loss of the unigram."""
    from megatron_omega.export.loading import load_omega  # torch comes in here
    from megatron_omega.studies.held_out import cut_windows, measure, references

    sources = open_sources(config)
    held, train = sources.validation.corpora[0], sources.train.corpora[0]
    length = min(_LONGEST, (config.data.encoder_seq_length or config.data.decoder_seq_length // 2) - 8)
    windows = cut_windows(
        held.shard, held.documents, sources.tokenizer, count=_WINDOWS, prefix=length, continuation=length,
        vocab_size=config.model.vocab_size,
    )  # fmt: skip
    model, _ = load_omega(run)
    found = measure(model, windows, sources.tokenizer.special)
    known = references(windows, train.shard, train.documents, config.model.vocab_size)
    print(f"\nheld-out text, nats per piece ({len(windows.prefixes)} windows of {length} + {length})")
    print("\n".join(f"  {name:<28}{value:7.3f}   {beside}" for name, value, beside in _lines(found, known)))
    if "mlm_loss" in found:
        tell_found_word(model, windows, sources)
    return known["unigram"]


def _lines(found: Mapping[str, float], known: Mapping[str, float]) -> Iterator[tuple[str, float, str]]:
    """Yield what was measured: its name, its value, and what it is to be compared with."""
    by = "by frequency {:.3f}, by pairs {:.3f}"
    yield "continuing a text", found["loss"], by.format(known["unigram"], known["bigram"])
    yield "  its first piece", found["loss_first"], by.format(known["unigram_first"], known["bigram_first"])
    yield "  gained by the text before", found["gain"], "the last piece of it is seen in both cases"
    if "mlm_loss" in found:
        accuracy, most = 100 * found["mlm_accuracy"], 100 * known["most_frequent_accuracy"]
        share = f"{accuracy:.1f}% are found, {most:.1f}% would be by the most frequent piece"
        yield "a masked piece", found["mlm_loss"], f"by frequency {known['mlm_unigram']:.3f}; {share}"


def tell_found_word(model: Any, windows: Any, sources: Sources) -> None:
    """Print the surest masked word that was found because of its text; nothing if there is none."""
    from megatron_omega.studies.held_out import found_tokens

    tokenizer = sources.tokenizer
    for token in found_tokens(model, windows, tokenizer.special):
        ids = windows.prefixes[token.window].tolist()
        word = tokenizer.decode([ids[token.place]]).strip()
        if len(word) > 2 and word.isalpha():
            print(f"\na masked word that it found ({100 * token.probability:.0f}%; "
                  f"{100 * token.elsewhere:.1f}% in another text): {word}")  # fmt: skip
            print(f"  {snippet(tokenizer, ids, token.place)}")
            return


def snippet(tokenizer: Tokenizer, ids: Sequence[int], place: int) -> str:
    """Return the text around a place, on one line, with a mask there."""
    before = tokenizer.decode(list(ids[max(0, place - _SHOWN_TOKENS) : place]))
    after = tokenizer.decode(list(ids[place + 1 : place + 1 + _SHOWN_TOKENS]))
    return " ".join(f"{before} {MASK_PIECE} {after}".split())
