"""Paths of a configuration, made absolute: what a run writes down has to be found from any folder."""

from __future__ import annotations

from pathlib import Path

from megatron_omega.config.schema import RunConfig


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return the configuration with every path that leads somewhere from here, and the run folder, made absolute."""
    data = config.data.model_copy(
        update={
            "tokenizer": _absolute(config.data.tokenizer),
            "corpora": tuple(
                corpus.model_copy(update={"prefix": _absolute(corpus.prefix, ".idx")}) for corpus in config.data.corpora
            ),
        }
    )
    load = config.checkpoint.load
    checkpoint = config.checkpoint.model_copy(update={"load": None if load is None else _absolute(load)})
    logging = config.logging.model_copy(update={"run_directory": str(Path(config.logging.run_directory).absolute())})
    return config.model_copy(update={"data": data, "checkpoint": checkpoint, "logging": logging})


def _absolute(path: str, suffix: str = "") -> str:
    return str(Path(path).absolute()) if path and Path(path + suffix).exists() else path
