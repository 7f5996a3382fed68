"""The process that compiles in the background: told a server's settings in a line of JSON, it fills the cache.

It ends with its server: that is seen by the end of its input.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any


def main() -> None:
    """Compile what the settings on standard input serve; exit code 1 and one line where that cannot be."""
    settings = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_server, daemon=True).start()
    cores = settings["compile_cores"]
    os.nice(19)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(cores)

    from turbolens_server.config import ServerConfig
    from turbolens_server.loading.errors import LoadError
    from turbolens_server.serving import load_from

    known: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }
    try:
        load_from(ServerConfig(**known))
    except LoadError as error:
        sys.exit(str(error))


def _end_with_server() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
