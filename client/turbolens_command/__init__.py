"""The `turbolens` command before any of it is imported.

That takes a moment, in which nothing has begun: who presses Ctrl-C then gets an end and no traceback.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Entry point of the command."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # and not one of those that were started to ignore it
        signal.signal(signal.SIGINT, _end)
    if sys.argv[1:2] == ["serve"]:
        # gRPC's core, which reads this while it is imported, prints plain lines, one for each handshake that fails.
        # What an operator set stays.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from turbolens.cli import main as run

    signal.signal(signal.SIGINT, before)
    run()


def _end(sign: int, _: object) -> None:
    os._exit(128 + sign)
