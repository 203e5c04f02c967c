"""Paths of a configuration: absolute in what a run writes down, and those of another machine found again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_omega.config.schema import RunConfig
from megatron_omega.host import run_folder


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return the configuration with every path that leads somewhere from here, and the run folder, made absolute."""
    data = config.data.model_copy(
        update={
            "tokenizer": _absolute(config.data.tokenizer),
            "corpora": tuple(
                corpus.model_copy(update={"prefix": _absolute(corpus.prefix, ".idx")}) for corpus in config.data.corpora
            ),
            "tasks": tuple(
                task.model_copy(update={"path": _absolute(task.path), "validation": _absolute(task.validation)})
                for task in config.data.tasks
            ),
        }
    )
    load = config.checkpoint.load
    checkpoint = config.checkpoint.model_copy(update={"load": None if load is None else _absolute(load)})
    logging = config.logging.model_copy(update={"run_directory": str(Path(config.logging.run_directory).absolute())})
    return config.model_copy(update={"data": data, "checkpoint": checkpoint, "logging": logging})


def with_carried_tokenizer(config: RunConfig, folder: Path) -> RunConfig:
    """Return the configuration with the tokenizer that a run folder or a checkpoint carries, if it carries one."""
    own = folder / run_folder.TOKENIZER
    if not own.exists():
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": str(own)})})


def with_moved_corpora(config: RunConfig, prefixes: Sequence[str]) -> RunConfig:
    """Return the configuration with the shard of `prefixes` that has its name for each corpus that has moved."""
    found = {Path(prefix).name: prefix for prefix in prefixes}
    corpora = tuple(
        corpus
        if Path(f"{corpus.prefix}.idx").exists()
        else corpus.model_copy(update={"prefix": found.get(Path(corpus.prefix).name, corpus.prefix)})
        for corpus in config.data.corpora
    )
    return config.model_copy(update={"data": config.data.model_copy(update={"corpora": corpora})})


def _absolute(path: str, suffix: str = "") -> str:
    return str(Path(path).absolute()) if path and Path(path + suffix).exists() else path
