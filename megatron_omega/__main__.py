"""`python -m megatron_omega VERB ...`, the same as the command `megatron-omega`."""

import sys

from megatron_omega.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
