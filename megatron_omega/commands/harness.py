"""Run lm-evaluation-harness on a model of ours, on any of its tasks.

    megatron-omega lm-eval --checkpoint runs/omega-tiny --tasks arc_easy --num_fewshot 5
    megatron-omega lm-eval --checkpoint runs/omega-tiny --tasks quiz --include_path folder/of/task/files

It is `lm_eval --model omega --model_args checkpoint=...`; other options are lm_eval's own (`lm_eval run --help` lists
them). docs/likelihoods.md says what its requests mean for an encoder-decoder. Tasks that are data alone (YAML and
records) need no harness: megatron-omega score --tasks FILE.yaml.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence

from megatron_omega.errors import ConfigError
from megatron_omega.host.command_line import CommandLine
from megatron_omega.log import configure_logging


def main(argv: Sequence[str]) -> None:
    """Hand over to the harness."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.takes_checkpoint()
    parser.add_argument("--device", default="cpu", help="where the model runs (default cpu)")
    parser.add_argument("--tokenizer", help="SentencePiece model (default: the run's)")
    options, rest = parser.parse_known_args(argv)
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm-evaluation-harness is not installed; install the extra harness, or lm-eval")
    configure_logging()
    from megatron_omega.export.loading import find_weights

    find_weights(options.checkpoint)  # a wrong path is said before the harness is loaded, which takes a while
    from lm_eval.__main__ import cli_evaluate

    import megatron_omega.tasks.harness  # registers the model  # noqa: F401

    named = {"checkpoint": options.checkpoint, "tokenizer": options.tokenizer}
    values = json.dumps({name: str(value) for name, value in named.items() if value is not None})
    kept = sys.argv
    sys.argv = ["lm_eval", "run", "--model", "omega", "--model_args", values, "--device", options.device, *rest]
    try:
        cli_evaluate()
    except (ValueError, OSError) as error:  # how it says what a user got wrong, such as a task that it does not know
        raise ConfigError(f"lm-evaluation-harness: {error}") from error
    finally:
        sys.argv = kept
