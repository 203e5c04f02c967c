"""The process of one loader worker: `python -m megatron_omega.data.loader_worker FILE_DESCRIPTOR`."""

from __future__ import annotations

import signal
import sys
from multiprocessing.connection import Connection

from megatron_omega.data.loader import STOP_SIGNALS, serve

if __name__ == "__main__":
    for number in STOP_SIGNALS:  # they are for training, which then closes the socket
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    serve(Connection(int(sys.argv[1])))
