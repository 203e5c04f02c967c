"""The process of one loader worker: `python -m megatron_omega.data.loader_worker FILE_DESCRIPTOR`."""

from __future__ import annotations

import signal
import sys
from multiprocessing.connection import Connection

from megatron_omega.data.loader import serve

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for training, which then closes the socket
    serve(Connection(int(sys.argv[1])))
