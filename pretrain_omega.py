"""Pretrain GPT-Omega. Started by deepspeed, torchrun, srun, or alone:

    deepspeed pretrain_omega.py --config examples/omega-tiny/run.yaml --deepspeed_config ds_configs/zero1.json

--help lists every setting; --dry-run shows what would run (on WORLD_SIZE ranks, else on one replica).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_omega.commands.ending import exit_cleanly
from megatron_omega.config.arguments import parse_arguments
from megatron_omega.config.load import resolve_run
from megatron_omega.host.environment import announced_world_size, complete_environment


def main(argv: Sequence[str]) -> None:
    """Parse, check, and train; or, with --dry-run, print what would be trained."""
    with exit_cleanly():
        arguments = parse_arguments(argv, program="pretrain_omega.py")
        if arguments.dry_run:
            from megatron_omega.run.preview import describe

            print(describe(resolve_run(arguments, announced_world_size()), as_json=arguments.json))
            return
        place = complete_environment()
        resolved = resolve_run(arguments, place.world_size)
        from megatron_omega.run.assembly import train  # torch starts only now: what is wrong above is told at once

        train(resolved, place)


if __name__ == "__main__":
    main(sys.argv[1:])
