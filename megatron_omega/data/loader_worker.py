"""The process of one loader worker: `python -m megatron_omega.data.loader_worker FILE_DESCRIPTOR`."""

from __future__ import annotations

import sys
from multiprocessing.connection import Connection

from megatron_omega.data.loader import STOP_SIGNALS, serve
from megatron_omega.host.child_process import ignore_signals

if __name__ == "__main__":
    ignore_signals(STOP_SIGNALS)  # they are for training, which then closes the socket
    serve(Connection(int(sys.argv[1])))
