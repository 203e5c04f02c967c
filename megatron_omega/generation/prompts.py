"""From a text to what the model reads of it.

encoder-decoder   encoder: mode token, prompt     decoder: the prompt's last tokens, then what is generated
decoder-only                                      decoder: begin, prompt, then what is generated

The decoder begins with the begin token after an empty prompt, and where the model was trained so (model.decoder_start).
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_omega.config.schema import RunConfig
from megatron_omega.data.objectives import first_decoder_ids
from megatron_omega.errors import DataError
from megatron_omega.export.loading import TextModel
from megatron_omega.log import get_logger

logger = get_logger(__name__)

Ids = tuple[int, ...]


def prompt_ids(text_model: TextModel, prompt: str | Sequence[int]) -> tuple[Ids, Ids]:
    """Return what encoder and decoder read before the first token that continues `prompt`, a text or its ids."""
    model, special = text_model.config.model, text_model.tokenizer.special
    text = text_model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    if model.is_decoder_only:
        return (), (special.bos, *text)
    return (special.modes.prefix, *text), first_decoder_ids(text, special, model.resolved_overlap)


def scored_ids(text_model: TextModel, text: Sequence[int]) -> tuple[Ids, Ids]:
    """Return what encoder and decoder read so that all tokens of `text` are measured: it continues an empty prompt."""
    encoder, start = prompt_ids(text_model, ())
    return encoder, (*start, *text)


def gap_ids(
    text_model: TextModel, before: Sequence[int], after: Sequence[int], most_tokens: int
) -> tuple[Ids, Ids, Ids]:
    """Return what encoder and decoder read to fill the gap between two texts, and the ids that end what fills it.

    The gap is the first span of span corruption; one that may be longer than twice a usual span is an extreme one.
    """
    special = text_model.tokenizer.special
    first, second = special.sentinels[:2]
    is_usual = most_tokens <= 2 * text_model.config.objective.span_mean_length
    mode = special.modes.span if is_usual else special.modes.extreme
    return (mode, *before, first, *after), (special.bos, first), (second,)


def room(config: RunConfig, start: int, wanted: int) -> int:
    """Return how many tokens may follow `start` ones, and warn if that is less, or more than a model has learnt."""
    longest = config.data.decoder_seq_length
    trained = longest + 1 - start  # the last token is not read any more
    if wanted <= trained:
        return wanted
    if config.model.positions == "learned":
        logger.warning("at most %d tokens are generated: the model's learned positions end there", trained)
        return trained
    logger.warning("the text may grow beyond %d tokens, the longest this model was trained on", longest)
    return wanted


def check_length(ids: Sequence[int], config: RunConfig, stack: str) -> None:
    """Refuse what is longer than learned positions; warn where it is longer than what the model was trained on."""
    longest = config.data.encoder_seq_length if stack == "encoder" else config.data.decoder_seq_length
    if len(ids) <= longest:
        return
    if config.model.positions == "learned":
        raise DataError(f"the text has {len(ids):,} tokens, the {stack}'s learned positions end at {longest:,}; cut it")
    logger.warning("the text has %d tokens, the %s was trained on at most %d", len(ids), stack, longest)
