"""Small things about files and this machine that every room needs: hashes, free memory, first lines of errors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def hash_files(paths: Sequence[Path]) -> str:
    """SHA-256 of one file, or of the hashes of several, in the order given."""
    if len(paths) == 1:
        return hash_file(paths[0])
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hash_file(path).encode())
    return digest.hexdigest()


def available_host_bytes(root: Path) -> int | None:
    """Memory that this process may still take: what the machine has, within what its control group allows.

    Args:
        root: of the file system.
    """
    meminfo = _read(root / "proc/meminfo")
    if meminfo is None:
        return None
    fields = dict(line.split(":", 1) for line in meminfo.splitlines() if ":" in line)
    if "MemAvailable" not in fields:
        return None
    free = int(fields["MemAvailable"].split()[0]) * 1024
    for limit_file, used_file, stat_file, reclaimable in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),  # version 2
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        folder = root / "sys/fs/cgroup"
        limit, used = _read(folder / limit_file), _read(folder / used_file)
        if limit is None or used is None or not limit.strip().isdecimal():
            continue
        stat = dict(line.split() for line in (_read(folder / stat_file) or "").splitlines())
        free = min(free, int(limit) - int(used) + int(stat.get(reclaimable, 0)))
    return free


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def first_line(error: BaseException) -> str:
    """An error's first line, in short; its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
