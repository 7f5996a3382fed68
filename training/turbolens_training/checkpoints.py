"""Checkpoints of a run and its log: the last one that is whole is taken, and the one before it is kept for that.

state.pt             the last checkpoint
state.previous.pt    the one before
log.jsonl            lines of what was measured, each with its step
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from turbolens_server.files import WriteError, add_lines, first_line, whole_file, write_file


class CheckpointError(ValueError):
    """No checkpoint can be read; the text is one line that names the files."""


@contextlib.contextmanager
def terminated() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM does not end the process; what is yielded says whether it came."""
    received = False

    def receive(*_: object) -> None:
        nonlocal received
        received = True

    before = signal.signal(signal.SIGTERM, receive)
    try:
        yield lambda: received
    finally:
        signal.signal(signal.SIGTERM, before)


def previous(path: Path) -> Path:
    """Where the checkpoint before the last one is."""
    return path.with_suffix(f".previous{path.suffix}")


def save_state(path: Path, state: Mapping[str, Any], *, barrier: Callable[[], None] = lambda: None) -> None:
    """Write a checkpoint; the one that was there becomes the one before.

    Args:
        path: of the last checkpoint.
        state: tensors and plain values.
        barrier: returns once all processes that save together have theirs on the disk.

    Raises:
        WriteError: it cannot be written, as on a full disk; the checkpoints are as they were.
    """
    for left in path.parent.glob(f".{path.name}-*"):  # by a run that was killed while it wrote
        left.unlink(missing_ok=True)
    try:
        with whole_file(path) as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
            barrier()
            if path.exists():
                path.replace(previous(path))
    except WriteError as error:
        raise WriteError(f"{error}; the last checkpoint is as it was") from error


def read_states(path: Path, device: torch.device | str, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The last checkpoint and the one before, those that are there and whole; of others a line tells.

    Args:
        path: of the last checkpoint.
        device: where its tensors are to be.
        keys: that its state has.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    damaged: list[str] = []
    whole = 0
    for candidate in (path, previous(path)):
        if not candidate.exists():
            continue
        try:
            state = _read(candidate, device, keys)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        if damaged:
            print(f"{damaged[-1]}; going on from {candidate.name}, of step {state['step']}", file=sys.stderr)
        whole += 1
        yield state
    if damaged and not whole:
        raise CheckpointError(f"{'; '.join(damaged)}; delete it to start anew, or choose another folder")


def _read(path: Path, device: torch.device | str, keys: Sequence[str]) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:  # torch looks at no checksum, so it would go on with changed numbers
            if (bad := archive.testzip()) is not None:
                raise CheckpointError(f"{path}: damaged ({bad} has another checksum)")
        state = torch.load(path, map_location=device, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # zipfile, pickle and torch raise many kinds
        raise CheckpointError(f"{path}: damaged ({first_line(error)})") from error
    if not isinstance(state, dict) or not {"step", *keys} <= state.keys():
        raise CheckpointError(f"{path}: no checkpoint of such a run")
    return state


def add_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a log.

    Raises:
        WriteError: they cannot be written.
    """
    add_lines(path, [json.dumps(row) for row in rows])


def cut_log(path: Path, step: int) -> None:
    """Take from a log what came after a step, and lines that are not whole; a line tells of the latter.

    Raises:
        WriteError: it cannot be written.
    """
    if not path.exists():
        return
    text = path.read_text("utf-8", errors="replace")
    lines = [line for line in text.split("\n") if line]
    steps = [_step(line) for line in lines]
    kept = [line for line, at in zip(lines, steps, strict=True) if at is not None and at <= step]
    if broken := steps.count(None):
        print(f"{path}: {broken} line{'s'[: broken > 1]} not whole, left out", file=sys.stderr)
    content = "".join(f"{line}\n" for line in kept)
    if content != text:
        write_file(path, content)


def _step(line: str) -> int | None:
    """Of a log's line; None: it is not whole."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return None
    return step if isinstance(step, int) else None
