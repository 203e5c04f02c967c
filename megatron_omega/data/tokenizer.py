"""SentencePiece with the special ids of the objectives.

Ids 0-3 are padding, unknown, begin and end; then follow the mask, one mode token for each objective and 100 sentinels.
All of them are control symbols: text that spells one stays text. Bytes that no piece covers are encoded as byte pieces,
and nothing is normalised, so `decode(encode(text)) == text` for all text without U+2581 (SentencePiece's own sign for a
space, which comes back as a space).
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import sentencepiece

from megatron_omega.errors import DataError
from megatron_omega.host.regular_files import read_regular

NUM_SENTINELS = 100
MASK_PIECE = "<mask>"
MODE_PIECES = ("<mode_prefix>", "<mode_span>", "<mode_extreme>", "<mode_mask>")
SENTINEL_PIECES = tuple(f"<extra_id_{number}>" for number in range(NUM_SENTINELS))
CONTROL_PIECES = (MASK_PIECE, *MODE_PIECES, *SENTINEL_PIECES)
_SENTENCE_CHARACTERS = 4000
_MOST_MODEL_BYTES = 256 << 20


class ModeIds(NamedTuple):
    """Ids of the tokens that open an encoder stream and name its objective."""

    prefix: int
    span: int
    extreme: int
    mask: int


@dataclass(frozen=True)
class SpecialIds:
    """Ids that text never produces. `sentinels[k]` is <extra_id_k>; ids ascend with k."""

    pad: int
    bos: int
    eos: int
    mask: int
    modes: ModeIds
    sentinels: tuple[int, ...]


class Tokenizer:
    """One SentencePiece model, identified by the SHA-256 of its file."""

    def __init__(self, model: bytes, path: str = "<memory>") -> None:
        self.path = path
        self.model = model
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.LoadFromSerializedProto(model)
            self.processor.id_to_piece(list(range(self.processor.get_piece_size())))  # each piece has to be text
        except (RuntimeError, UnicodeDecodeError):
            raise DataError(
                f"{path} is not a SentencePiece model; make one with megatron-omega train-tokenizer"
            ) from None

    @classmethod
    def open(cls, path: str | Path) -> Tokenizer:
        """Read the model at `path`; raise DataError if there is none."""
        if not str(path):
            raise DataError("no tokenizer is set; give data.tokenizer the path of a SentencePiece model")
        try:
            model = read_regular(path, _MOST_MODEL_BYTES)
        except OSError as error:
            reason = error.strerror or str(error)
            raise DataError(
                f"tokenizer {path} cannot be read ({reason}); correct the path, "
                "or train one with megatron-omega train-tokenizer"
            ) from None
        return cls(model, str(path))

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[bytes, str]]:
        return type(self), (self.processor.serialized_model_proto(), self.path)

    @cached_property
    def vocab_size(self) -> int:
        return self.processor.get_piece_size()

    @property
    def eos_id(self) -> int:
        return self.processor.eos_id()

    @cached_property
    def special(self) -> SpecialIds:
        """The ids of the objectives; DataError where the model was trained without them."""
        missing = [piece for piece in CONTROL_PIECES if self._control_id(piece) is None]
        names = {"<s>": self.processor.bos_id(), "</s>": self.processor.eos_id()}
        missing += [piece for piece, number in names.items() if number < 0]
        if missing:
            shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise DataError(
                f"tokenizer {self.path} has no control symbols {shown}; train one with megatron-omega train-tokenizer"
            )
        ids = {piece: self.processor.piece_to_id(piece) for piece in CONTROL_PIECES}
        return SpecialIds(
            pad=max(0, self.processor.pad_id()),
            bos=self.processor.bos_id(),
            eos=self.processor.eos_id(),
            mask=ids[MASK_PIECE],
            modes=ModeIds(*(ids[piece] for piece in MODE_PIECES)),
            sentinels=tuple(ids[piece] for piece in SENTINEL_PIECES),
        )

    @cached_property
    def text_ids(self) -> tuple[int, ...]:
        """Ids that text can produce: all but control and unknown symbols."""
        processor = self.processor
        return tuple(n for n in range(self.vocab_size) if not (processor.is_control(n) or processor.is_unknown(n)))

    def _control_id(self, piece: str) -> int | None:
        number = self.processor.piece_to_id(piece)
        return number if self.processor.is_control(number) else None

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without begin or end."""
        return self.processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; control symbols (begin, sentinels, modes, ...) vanish."""
        return self.processor.decode([int(number) for number in ids])

    def decode_one(self, number: int) -> str:
        """Return `decode` of one id, which is kept: what is written comes id by id."""
        if number not in self._decoded:
            self._decoded[number] = self.decode((number,))
        return self._decoded[number]

    @cached_property
    def _decoded(self) -> dict[int, str]:
        return {}

    def render(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` with every control symbol written out, for people to read."""
        parts: list[str] = []
        run: list[int] = []
        for number in map(int, ids):
            if self.processor.is_control(number):
                parts += [self.decode(run), self.processor.id_to_piece(number)]
                run = []
            else:
                run.append(number)
        return "".join([*parts, self.decode(run)])


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """Cut texts into the pieces SentencePiece learns from, whitespace and line ends kept."""
    for text in texts:
        clean = text.replace("\0", "")
        for start in range(0, len(clean), _SENTENCE_CHARACTERS):
            yield clean[start : start + _SENTENCE_CHARACTERS]


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int,
    model_type: Literal["bpe", "unigram"] = "bpe",
    num_threads: int = 2,
    character_coverage: float = 0.9995,
) -> bytes:
    """Learn a model of `vocab_size` pieces from `texts` and return its file's content.

    Raises DataError if the texts cannot give that many pieces, or the vocabulary has no room for the specials.
    """
    smallest = 4 + len(CONTROL_PIECES) + 256
    if vocab_size <= smallest:
        raise DataError(
            f"a vocabulary of {vocab_size} has no room beside {smallest} special and byte pieces; ask for more"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            num_threads=num_threads,
            character_coverage=character_coverage,
            control_symbols=list(CONTROL_PIECES),
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=8 * _SENTENCE_CHARACTERS,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        if most := re.search(r"Vocabulary size too high .* value <= (\d+)", reason):
            reason = f"it gives at most {most[1]}; ask for fewer, or give more text"
        raise DataError(f"no tokenizer of {vocab_size} pieces can be learned from this text ({reason})") from None
    return model.getvalue()
