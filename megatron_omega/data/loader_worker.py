"""The process of one loader worker: `python -m megatron_omega.data.loader_worker FILE_DESCRIPTOR`."""

from __future__ import annotations

import signal
import sys
from multiprocessing.connection import Connection

from megatron_omega.data.loader import serve

if __name__ == "__main__":
    # Requests to stop go to every process of a job; they are for training, which closes the socket when it is done.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    serve(Connection(int(sys.argv[1])))
