"""Make the sync client from the async one, or check that it is fresh.

python tools/unasync.py            write client/turbolens/_sync.py
python tools/unasync.py --check    fail where the checked-in file differs
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

CLIENT = Path(__file__).resolve().parent.parent / "client" / "turbolens"
HEADER = '"""The sync client. Made from `_async.py` by `tools/unasync.py`: edit there only."""'
# In this order: the longer ones first.
WORDS = (
    (r"await asyncio\.to_thread\((.+)\)", r"\1()"),
    (r"await asyncio\.sleep\(", "time.sleep("),
    (r"import asyncio\n", ""),
    (r"\basync (def|for|with)\b", r"\1"),
    (r"\bawait ", ""),
    (r"\bAsyncIterator\b", "Iterator"),
    (r"\bAsyncLens\b", "Lens"),
    (r"\basync_channel\b", "sync_channel"),
    (r"\basync_window\b", "sync_window"),
    (r"\basync_messages\b", "sync_messages"),
    (r"\basync_home\b", "sync_home"),
    (
        r"turbolens\._many\.run import extract_many, generate_many, run_async",
        "turbolens._many.run import extract_many, generate_many",
    ),
    (r"(?=from turbolens\._window)", "from turbolens._twin import run_sync\n"),
    (r"\brun_async\b", "run_sync"),
    (r"__aenter__", "__enter__"),
    (r"__aexit__", "__exit__"),
    (r"turbolens\.aio\.connect", "turbolens.connect"),
)


def sync_source() -> str:
    """The text of `_sync.py`."""
    text = (CLIENT / "_async.py").read_text()
    text = HEADER + text[text.index("\n") :]
    for pattern, replacement in WORDS:
        text = re.sub(pattern, replacement, text)
    ruff = [str(Path(sys.executable).parent / "ruff")]
    for command in ([*ruff, "check", "--fix", "--quiet", "--exit-zero"], [*ruff, "format", "--quiet"]):
        done = subprocess.run(
            [*command, "--stdin-filename", str(CLIENT / "_sync.py"), "-"],
            input=text, capture_output=True, text=True, check=True,
        )  # fmt: skip
        text = done.stdout
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    target = CLIENT / "_sync.py"
    if not parser.parse_args().check:
        target.write_text(sync_source())
    elif not target.exists() or target.read_text() != sync_source():
        raise SystemExit("client/turbolens/_sync.py is stale, run `python tools/unasync.py`")


if __name__ == "__main__":
    main()
