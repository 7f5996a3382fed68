"""Small things about files and this machine that every room needs: hashes, free memory, first lines of errors, writers.

Files appear whole or not at all, and every writer of the product goes through here. What is written goes to a name
beside its own that begins with a dot, down to the disk, and then takes its place: one rename, which readers see as
before or after. Who may read a file is decided by the umask, whatever a library asks for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO


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


def read_object(path: Path, error: Callable[[str], Exception]) -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
        path: of the file.
        error: makes what is raised where it cannot be read, or holds something else, of a line that names it.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as cause:
        raise error(f"{path}: unreadable ({first_line(cause)})") from cause
    if not isinstance(found, dict):
        raise error(f"{path}: holds a {type(found).__name__}, expected an object")
    return found


class WriteError(OSError):
    """A file cannot be written; what it would have replaced is as it was. The text is one line that names it."""


def write_file(path: Path, content: bytes | str) -> None:
    """Write one file, text as UTF-8; folders above it are made.

    Raises:
        WriteError: it cannot be written, as on a full disk.
    """
    write_files({path: content})


def write_files(contents: Mapping[Path, bytes | str]) -> None:
    """Write files that belong together: all are on the disk before the first takes its place.

    Raises:
        WriteError: one cannot be written; none has changed, but where renaming itself failed.
    """
    with contextlib.ExitStack() as files:
        for path, content in contents.items():
            file = files.enter_context(whole_file(path))
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())


def add_lines(path: Path, lines: Sequence[str]) -> None:
    """Add lines to a log; one that was cut off is ended first, so that it takes no other with it.

    Raises:
        WriteError: they cannot be written; the last may then be cut off.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            whole = True
            if file.tell():
                file.seek(-1, os.SEEK_END)
                whole = file.read() == b"\n"
            file.write(("" if whole else "\n").encode() + "".join(f"{line}\n" for line in lines).encode())
    except OSError as error:
        raise _failure(path, error) from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` once the block ends well.

    Raises:
        WriteError: it cannot be written, as on a full disk.
    """
    partial = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync(path.parent)
    except (OSError, RuntimeError) as error:
        if (cause := _of_the_disk(error)) is None:
            raise
        raise _failure(path, cause) from error
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes `path` once the block ends well.

    Args:
        path: the folder to be.
        replace: it takes the place of one that is there; else that one stays, as of two processes that make the same.

    Raises:
        WriteError: it cannot be written, as on a full disk.
    """
    partial = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        settle(partial)
        if replace:
            _put_in_place(partial, path)
        else:
            try:
                partial.rename(path)
            except OSError:
                if not path.is_dir():
                    raise
        _sync(path.parent)
    except OSError as error:
        raise _failure(path, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def settle(folder: Path) -> None:
    """Force a folder and all in it down to the disk, each file open to whom the umask says.

    Libraries write files that only their owner can read; the server of a container is another user.
    """
    mode = _mode_of_new(folder)
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod(mode if path.is_dir() else mode & 0o666)
            _sync(path)
    folder.chmod(mode)
    _sync(folder)


def check_writable(*folders: Path) -> None:
    """Refuse folders that cannot be written to, or made, before the work whose results they are for.

    Raises:
        WriteError: one takes no file, or no folder can be made where it is to be.
    """
    for folder in folders:
        # Not Path.exists, which raises below a folder that may not be looked into.
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.exists(place))
        probe = _beside(there / "probe")
        try:
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise _failure(folder, error) from error


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")


def _put_in_place(partial: Path, path: Path) -> None:
    """Rename a folder onto another one, which moves out of the way first and back where that fails."""
    if not path.exists():
        partial.rename(path)
        return
    old = _beside(path)
    path.rename(old)
    try:
        partial.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _mode_of_new(folder: Path) -> int:
    """The permissions of a folder that is made now: the only way to read the umask that other threads do not notice."""
    probe = _beside(folder / "probe")
    probe.mkdir()
    mode = stat.S_IMODE(probe.stat().st_mode) & 0o777
    probe.rmdir()
    return mode


def _of_the_disk(error: Exception) -> OSError | None:
    """The error of the file system behind an error; torch tells of it by one of its own."""
    if isinstance(error, OSError):
        return error
    return error.__context__ if isinstance(error.__context__, OSError) else None


def _failure(path: Path, error: OSError) -> WriteError:
    if isinstance(error, WriteError):
        return error
    parents = (parent for parent in path.absolute().parents if os.path.exists(parent))
    free = shutil.disk_usage(next(parents)).free
    failure = WriteError(f"{path}: cannot be written ({error.strerror or error}; {free / 1e6:,.0f} MB free)")
    failure.errno = error.errno
    return failure


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
