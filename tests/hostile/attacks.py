"""The attacks: each yields what was done and how it ended. Every one is seeded."""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import json
import lzma
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import xxhash
import yaml
import zstandard
from written_models import TEXT, tiny_tokenizer, write_run

from hostile.mutations import STRANGE, mutate_bytes, mutate_json
from hostile.trials import Outcome, run_command
from megatron_omega.checkpoint.manifest import FILE_NAME as MANIFEST
from megatron_omega.checkpoint.tensor_file import checksum
from megatron_omega.commands.main import VERBS
from megatron_omega.config.arguments import Setting, settings
from megatron_omega.corpus.reading.compression import open_binary
from megatron_omega.errors import DataError

CONFIG_SECONDS = 5


@dataclass(frozen=True)
class Trial:
    """One attack and its end."""

    name: str
    outcome: Outcome
    allowed: tuple[int, ...]

    @property
    def is_right(self) -> bool:
        return self.outcome.end in self.allowed


def changed_streams(folder: Path, changes: int) -> Iterator[tuple[str, str]]:
    """Change every byte of a small file of three streams, `changes` times each; yield (format, what came of it)."""
    compressors: dict[Any, Callable[[bytes], bytes]] = {
        "gz": lambda data: gzip.compress(data, mtime=0),
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    }
    texts = ["".join(json.dumps({"text": f"{n} {part}"}) + "\n" for n in range(60)).encode() for part in range(3)]
    chance = random.Random(0)
    for compression, compress in compressors.items():
        data, path = b"".join(map(compress, texts)), folder / f"a.jsonl.{compression}"
        for place in range(len(data)):
            for change in chance.sample(range(1, 256), changes):
                path.write_bytes(data[:place] + bytes([data[place] ^ change]) + data[place + 1 :])
                try:
                    with open_binary(str(path), compression) as file:
                        same = file.read() == b"".join(texts)
                    yield compression, "same text" if same else "OTHER TEXT"
                except DataError:
                    yield compression, "refused"


def random_configurations(folder: Path, times: int, seed: int = 0) -> Iterator[Trial]:
    """Give `train --dry-run` some settings of random values, on the command line or in a file."""
    chance, every = random.Random(seed), list(settings())
    for number in range(times):
        chosen = {
            setting.name: _random_value(setting, chance) for setting in chance.sample(every, chance.randint(1, 5))
        }
        words: list[object] = ["train", "--dry-run"]
        if chance.random() < 0.5:
            words += ["--config", _config_file(folder, chosen, chance)]
        else:
            preset = chance.choice(("omega-tiny", "omega-125m", "t5-like"))
            shown = [
                (name, str(value) if isinstance(value, str) else json.dumps(value)) for name, value in chosen.items()
            ]
            words += ["--config", preset, *(f"--{name}={text}".replace("\0", "") for name, text in shown)]
        yield Trial(f"configuration {number}: {chosen}", run_command(words, folder, CONFIG_SECONDS), (0, 2))


def _config_file(folder: Path, chosen: dict[str, Any], chance: random.Random) -> Path:
    values: dict[str, Any] = {}
    for name, value in chosen.items():
        section, _, field = name.partition(".")
        values.setdefault(section, {})[field] = value
    text = yaml.safe_dump(values, allow_unicode=True).encode(errors="replace")
    path = folder / "run.yaml"
    path.write_bytes(mutate_bytes(text, chance) if chance.random() < 0.3 else text)
    return path


def _random_value(setting: Setting, chance: random.Random) -> Any:
    kinds = str(setting.field.annotation)
    choices = [kind for kind in get_args(setting.field.annotation) if isinstance(kind, str)]
    plausible: list[Any] = [
        *choices,
        chance.randint(0, 8),
        2 ** chance.randint(0, 14),
        chance.random(),
        chance.random() * 1e-3,
    ]
    if "bool" in kinds:
        plausible = [True, False]
    extreme = [
        2**64,
        10**12,
        1e300,
        10**4000,
        "0100",
        "1:30",
        "a: b",
        "[",
        "&a [*a]",
        "\u2028",
        "$(true)",
        "-x",
        [[["full"]]],
    ]
    pick = chance.random()
    return chance.choice(plausible if pick < 0.6 else extreme if pick < 0.8 else STRANGE)


@dataclass(frozen=True)
class Target:
    """A file that is mutated, in a copy of the folder of all, and the command that reads it."""

    name: str
    file: str
    words: tuple[str, ...]
    mutate: Callable[[bytes, random.Random], bytes]
    allowed: tuple[int, ...] = (3, 4)
    excuse: str = ""
    """Why an end of 0 may be right: nothing says what was there before."""
    is_same: Callable[[bytes, bytes], bool] = lambda before, after: False
    """Whether a mutation changed nothing in meaning, so that an end of 0 is right."""

    @property
    def is_slow(self) -> bool:
        """Whether its command runs a model or writes a shard."""
        return self.words[0] in ("generate", "preprocess-data")


def _json_values(data: bytes, chance: random.Random) -> bytes:
    return mutate_json(data.decode(), chance).encode(errors="surrogatepass")


def _signed_manifest(data: bytes, chance: random.Random) -> bytes:
    """Change values of a manifest and write the checksum that goes with them, as somebody who means harm would."""
    _, _, rest = data.partition(b"\n")
    changed = mutate_json("{" + rest.decode(), chance).encode()[1:]
    return b'{"checksum": "%s",\n' % checksum(changed).encode() + changed


def _is_same_json(before: bytes, after: bytes) -> bool:
    """Tell whether two texts hold the same values: only blanks and spellings differ (true is 1)."""
    try:
        return bool(json.loads(before) == json.loads(after))
    except ValueError:
        return False


def _is_same_arrays(before: bytes, after: bytes) -> bool:
    """Tell whether two files of arrays hold the same: a zip file has bytes that nobody reads, such as times."""
    try:
        first, second = (np.load(io.BytesIO(data)) for data in (before, after))
        return first.files == second.files and all(np.array_equal(first[name], second[name]) for name in first.files)
    except Exception:  # whatever damage is called: it is none of the same
        return False


def _signed_sidecar(data: bytes, chance: random.Random) -> bytes:
    _, _, rest = data.partition(b"\n")
    changed = mutate_json("{" + rest.decode(), chance).encode(errors="surrogatepass")[1:]
    return b'{"checksum": "%s",\n' % xxhash.xxh3_64_hexdigest(changed).encode() + changed


def _signed_export(data: bytes, chance: random.Random) -> bytes:
    values = json.loads(mutate_json(data.decode(), chance))
    if not isinstance(values, dict):
        return json.dumps(values).encode()
    rest = {name: value for name, value in values.items() if name != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return json.dumps({**rest, "checksum": checksum(text.encode())}).encode()


SIGNED = "the checksum was made anew: only values that cannot be are refused"
GENERATE = ("generate", "--prompt", "hello", "--max-new-tokens", "2", "--checkpoint")
CHECK = ("inspect-data", "--check", "{}/shards/t_text_document")
TARGETS = (
    *(Target(f"shard {suffix}", f"shards/t_text_document.{suffix}", CHECK, mutate_bytes, (3,)) for suffix in ("idx", "bin", "sums")),
    Target("sidecar bytes", "shards/t_text_document.json", CHECK, mutate_bytes, (3,)),
    Target("sidecar values", "shards/t_text_document.json", CHECK, _json_values, (3,)),
    Target("origins", "shards/t_text_document.origins.npz", CHECK, mutate_bytes, (3,), is_same=_is_same_arrays),
    Target("sidecar signed", "shards/t_text_document.json", CHECK, _signed_sidecar, (0, 3), SIGNED),
    Target("manifest bytes", f"run/checkpoints/step-00000001/{MANIFEST}", ("inspect-checkpoint", "{}/run", "--verify"), mutate_bytes, (4,)),
    Target("manifest signed", f"run/checkpoints/step-00000001/{MANIFEST}", (*GENERATE, "{}/run"), _signed_manifest, (0, 3, 4), SIGNED),
    Target("manifest verify", f"run/checkpoints/step-00000001/{MANIFEST}", ("inspect-checkpoint", "{}/run", "--verify"), _signed_manifest, (0, 4), SIGNED),
    Target("export bytes", "export/omega.json", ("inspect-checkpoint", "{}/export", "--verify"), mutate_bytes, (4,), is_same=_is_same_json),
    Target("export values", "export/omega.json", (*GENERATE, "{}/export"), _json_values, (4,), is_same=_is_same_json),
    Target("export signed", "export/omega.json", (*GENERATE, "{}/export"), _signed_export, (0, 3, 4), SIGNED),
    Target("export weights", "export/model.safetensors", ("inspect-checkpoint", "{}/export", "--verify"), mutate_bytes, (4,)),
    Target("tokenizer", "tokenizer.model", ("preprocess-data", "--input", "{}/a.jsonl", "--output-prefix", "{}/out", "--tokenizer-model", "{}/tokenizer.model", "--workers", "1", "--overwrite"), mutate_bytes, (0, 3), "a model that can be read is another tokenizer, and the shard's metadata name it"),
    Target("tokenizer of a run", "run/tokenizer.model", (*GENERATE, "{}/run", "--tokenizer", "{}/run/tokenizer.model"), mutate_bytes, (3,)),
)  # fmt: skip


def write_targets(folder: Path) -> None:
    """Write a small good one of everything that is mutated, in processes of their own: this one stays fit to fork."""
    (folder / "shards").mkdir(parents=True)
    _apart(lambda: _write_model(folder))
    _succeed(folder, ["preprocess-data", "--input", folder / "a.jsonl", "--output-prefix", folder / "shards" / "t",
                      "--tokenizer-model", folder / "tokenizer.model", "--workers", "1"])  # fmt: skip
    _succeed(folder, ["export-hf", "--checkpoint", folder / "run", "--output", folder / "export"])


def _write_model(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer().processor.serialized_model_proto())
    (folder / "run.yaml").write_text("model: {hidden_size: 32, decoder_layers: 2}\nlogging: {tensorboard: false}\n")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT))
    write_run(folder / "run")


def _apart(work: Callable[[], None]) -> None:
    """Do `work` in a forked process: a library's threads would not survive the next fork of the one they run in."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def _succeed(folder: Path, words: Sequence[object]) -> None:
    outcome = run_command(words, folder, 60)
    assert outcome.end == 0, outcome.output


def mutated_files(folder: Path, times: int, targets: Sequence[Target] = TARGETS, seed: int = 0) -> Iterator[Trial]:
    """Mutate each target `times` times and let its command read it."""
    pristine = folder / "pristine"
    write_targets(pristine)
    for module in {VERBS[target.words[0]] for target in targets}:
        importlib.import_module(f"megatron_omega.commands.{module}")  # once, not in each child
    for target in targets:
        chance = random.Random(f"{seed} {target.name}")
        place = folder / "mutated"
        shutil.copytree(pristine, place)
        data = (pristine / target.file).read_bytes()
        words = [word.format(place) for word in target.words]
        _succeed(folder, words)
        for number in range(times):
            mutated = target.mutate(data, chance)
            (place / target.file).write_bytes(mutated)
            is_same = target.is_same(data, mutated)
            name = f"{target.name}{', of the same meaning' if is_same else ''} {number}"
            yield Trial(name, run_command(words, folder), (*target.allowed, *((0,) if is_same else ())))
        shutil.rmtree(place)
