"""Text -> ids at the speed of the machine: SentencePiece's own ids, by SentencePiece or by an exact shortcut.

The shortcut (`native_bpe.cpp`, compiled once with the system's C++ compiler) is taken for byte-pair models without
normalisation, and only after it gave SentencePiece's ids on a sample. Anything else runs on SentencePiece itself.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_omega.data.indexed import token_dtype
from megatron_omega.data.tokenizer import Tokenizer
from megatron_omega.host.private import code_folder, refuse_foreign
from megatron_omega.log import get_logger

_SPACE = "\u2581"
_CACHE_BITS = 18
_JOINED_BITS = 22
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_PROBES = (
    "",
    " ",
    "  two  spaces \n\n\tand\ttabs\r\n",
    "</s> <s> <pad> <unk> <mask> <extra_id_0> <0x41>",
    "na\u00efve \u65e5\u672c\u8a9e \U0001f389 \u0000 \u2581 e\u0301 \ufeff \ufffd",
    "a" * 1000 + "-" * 1000 + " " * 1000 + "ab" * 500,
    "".join(map(chr, range(1, 0x600))),
)


class TextEncoder(Protocol):
    """Turns text into the bytes of its ids, in the type of the shard. Raises UnicodeEncodeError on lone surrogates."""

    name: str

    def encode(self, text: str) -> bytes: ...


class SentencePieceEncoder:
    """The reference."""

    name = "sentencepiece"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encode = tokenizer.processor.encode
        self._dtype = token_dtype(tokenizer.vocab_size)

    def encode(self, text: str) -> bytes:
        return np.asarray(self._encode(text.encode()), dtype=self._dtype).tobytes()


class CutEncoder:
    """Byte-pair encoding of text cut where no piece reaches across, with a cache from chunk to ids (16 MB)."""

    name = "cut-and-cache"

    def __init__(self, tokenizer: Tokenizer, library: ctypes.CDLL) -> None:
        dtype = token_dtype(tokenizer.vocab_size)
        self._encode = library.encoder_encode_16 if dtype.itemsize == 2 else library.encoder_encode_32
        self._encode.restype = ctypes.c_int64
        self._encode.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64, ctypes.c_void_p]
        self._itemsize = dtype.itemsize
        self._buffer = ctypes.create_string_buffer(1 << 16)
        self._delete = library.encoder_delete
        self._delete.argtypes = [ctypes.c_void_p]
        self._handle = _fill(tokenizer, library)

    def __del__(self) -> None:
        handle, self._handle = getattr(self, "_handle", None), None
        if handle:
            self._delete(handle)

    def encode(self, text: str) -> bytes:
        data = text.encode()
        if len(data) * self._itemsize > len(self._buffer):
            self._buffer = ctypes.create_string_buffer(2 * len(data) * self._itemsize)
        count = self._encode(self._handle, data, len(data), self._buffer)
        return ctypes.string_at(self._buffer, count * self._itemsize)


def open_encoder(tokenizer: Tokenizer, *, samples: Iterable[str] = (), is_native_allowed: bool = True) -> TextEncoder:
    """Return the fastest encoder whose ids are SentencePiece's on `samples` and on built-in hard cases."""
    reference = SentencePieceEncoder(tokenizer)
    if not is_native_allowed or not is_cuttable(tokenizer):
        return reference
    library = load_library()
    if library is None:
        return reference
    fast = CutEncoder(tokenizer, library)
    for text in (*_PROBES, *samples):
        if fast.encode(text) != reference.encode(text):
            get_logger(__name__).warning("the fast encoder differs from SentencePiece on %r...: not used", text[:40])
            return reference
    return fast


def is_cuttable(tokenizer: Tokenizer) -> bool:
    """Return whether cutting is exact: byte-pair model, byte fallback, no normalisation, only ordinary pieces."""
    model = _read_proto(tokenizer)
    if model is None:
        return False
    trained, normalised, kinds = model.trainer_spec, model.normalizer_spec, {piece.type for piece in model.pieces}
    return (
        trained.model_type == trained.BPE
        and trained.byte_fallback
        and not trained.treat_whitespace_as_suffix
        and not normalised.precompiled_charsmap
        and not normalised.add_dummy_prefix
        and not normalised.remove_extra_whitespaces
        and normalised.escape_whitespaces
        and kinds <= {_NORMAL, _UNKNOWN, _CONTROL, _BYTE}
        and tokenizer.processor.id_to_piece(tokenizer.processor.piece_to_id(_SPACE)) == _SPACE
    )


def _read_proto(tokenizer: Tokenizer) -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:  # protobuf is optional; without it SentencePiece itself encodes
        return None
    messages: Any = sentencepiece_model_pb2  # its classes are made at run time
    model = messages.ModelProto()
    model.ParseFromString(tokenizer.processor.serialized_model_proto())
    return model


def _fill(tokenizer: Tokenizer, library: ctypes.CDLL) -> int:
    """Give the library the model's pieces: characters, pairs that stand side by side, merges and their ranks."""
    model = _read_proto(tokenizer)
    symbols = {piece.piece: number for number, piece in enumerate(model.pieces) if piece.type == _NORMAL}
    num_pieces = len(model.pieces)
    scores = [piece.score for piece in model.pieces]
    pieces = list(symbols)
    characters = sorted({character for piece in pieces for character in piece})
    for character in characters:
        if character not in symbols:
            symbols[character] = len(scores)
            scores.append(0.0)
    ranks = np.unique(-np.asarray(scores, dtype=np.float32), return_inverse=True)[1].astype(np.int32)
    merges = [
        (symbols[piece[:cut]], symbols[piece[cut:]], symbols[piece])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in symbols and piece[cut:] in symbols
    ]
    joined = {pair for piece in pieces for pair in pairwise(piece)}
    byte_ids = [tokenizer.processor.piece_to_id(f"<0x{value:02X}>") for value in range(256)]
    spelled = [(ord(character), symbols[character]) for character in characters]
    spelled.append((ord(" "), symbols[_SPACE]))
    points = [(ord(a), ord(b)) for pair in joined for a in _spellings(pair[0]) for b in _spellings(pair[1])]
    library.encoder_new.restype = ctypes.c_void_p
    arrays = [
        np.asarray([point for point, _ in spelled], dtype=np.uint32),
        np.asarray([symbol for _, symbol in spelled], dtype=np.int32),
        np.asarray(points, dtype=np.uint32).reshape(-1, 2),
        np.asarray(merges, dtype=np.int32).reshape(-1, 3),
    ]
    byte_array = np.asarray(byte_ids, dtype=np.uint32)
    handle = library.encoder_new(num_pieces, len(scores), _at(ranks), _at(byte_array), _CACHE_BITS, _JOINED_BITS)
    sizes = [ctypes.c_int64(len(array)) for array in arrays]
    library.encoder_add(
        ctypes.c_void_p(handle),
        _at(arrays[0]),
        _at(arrays[1]),
        sizes[0],
        _at(arrays[2]),
        sizes[2],
        _at(arrays[3]),
        sizes[3],
    )
    return handle


def _spellings(character: str) -> str:
    return character + " " if character == _SPACE else character


def _at(array: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def load_library() -> ctypes.CDLL | None:
    """Return the compiled shortcut, compiling it on first use; None where that is impossible."""
    source = Path(__file__).with_name("native_bpe.cpp")
    name = f"native_bpe-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}.so"
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for folder in (base / "megatron_omega", Path(tempfile.gettempdir()) / f"megatron_omega-{os.getuid()}"):
        try:
            library = code_folder(folder) / name
            if not library.exists() and not _compile(source, library):
                return None
            refuse_foreign(library)
            return ctypes.CDLL(str(library))
        except OSError:
            continue  # not writable, not ours alone, or not loadable from there: try the next place
    return None


def _compile(source: Path, target: Path) -> bool:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        get_logger(__name__).info("no C++ compiler found: SentencePiece itself encodes")
        return False
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    command = [compiler, "-O3", "-std=c++17", "-shared", "-fPIC", "-o", str(partial), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        get_logger(__name__).warning(
            "the fast encoder does not compile, SentencePiece itself encodes: %s", result.stderr[-300:]
        )
        partial.unlink(missing_ok=True)
        return False
    partial.chmod(0o700)  # whatever the umask
    partial.replace(target)
    return True
