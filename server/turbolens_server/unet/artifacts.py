"""A folder of things that take long to make: exported graphs, TensorRT engines, compiled code; whole or not there.

    <root>/lock                          held while something is made or removed
    <root>/graphs/<key>/                 one entry: its files and manifest.json
    <root>/engines/<key>/
    <root>/packages/<key>/
    <root>/{graphs,engines,packages}/.<key>-*     being made, or left by a process that was killed

An entry is made in a partial folder and renamed when its files and its manifest are on the disk, so a reader sees all
of it or nothing. The manifest holds the key in words and every file's size and SHA-256; both are checked at each load.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from turbolens_server.files import hash_file, whole_folder
from turbolens_server.unet.backend import BackendError

Kind = Literal["graphs", "engines", "packages"]
KINDS: Final[tuple[Kind, ...]] = ("graphs", "engines", "packages")
_FORMAT: Final = 1
_MANIFEST: Final = "manifest.json"
_PARTIAL: Final = "."
"""What the names of folders that are being made begin with."""
_GIB: Final = 2**30


@dataclasses.dataclass(frozen=True)
class Entry:
    """A whole entry."""

    kind: Kind
    folder: Path
    key: dict[str, Any]
    """What it was made of and for."""
    files: dict[str, dict[str, Any]]
    """By name: `size` in bytes and `sha256`."""
    notes: dict[str, Any]
    """What was measured when it was made."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(int(file["size"]) for file in self.files.values())


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/turbolens`, or `~/.cache/turbolens`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "turbolens"


class ArtifactCache:
    """The folder. Any number of processes may share it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, kind: Kind, key: Mapping[str, Any]) -> Path:
        """Where the entry of a key is, or would be."""
        text = json.dumps(key, sort_keys=True)
        return self.root / kind / hashlib.sha256(text.encode()).hexdigest()[:32]

    def find(self, kind: Kind, key: Mapping[str, Any]) -> Entry | None:
        """The entry of a key, checked; None where there is none.

        Raises:
            BackendError: it is damaged.
        """
        folder = self.folder(kind, key)
        return self.verify(folder) if folder.is_dir() else None

    def add(
        self,
        kind: Kind,
        key: Mapping[str, Any],
        make: Callable[[Path], dict[str, Any]],
        *,
        needs_bytes: int = 0,
        on_wait: Callable[[], None] = lambda: None,
    ) -> Entry:
        """The entry of a key; made where there is none, by one process at a time.

        Args:
            kind: of entry.
            key: values that JSON can hold, all that decides the content.
            make: writes files into an empty folder and returns notes for the manifest. Where it raises, nothing stays.
            needs_bytes: about what the files will take; where the disk has less, nothing is begun.
            on_wait: called where another process holds the lock, before waiting for it.

        Raises:
            BackendError: the disk is full, the folder cannot be written, or the entry there is damaged.
        """
        try:
            # What is there is whole, so reading it needs no lock: the folder may be one that cannot be written.
            if (entry := self.find(kind, key)) is not None:
                return entry
            with self._lock(on_wait):
                if (entry := self.find(kind, key)) is not None:
                    return entry
                self._remove_partial()
                if (free := shutil.disk_usage(self.root).free) < needs_bytes:
                    raise BackendError(
                        f"{self.root}: {free / _GIB:.1f} GiB free, about {needs_bytes / _GIB:.1f} GiB needed; "
                        "free some, or name another folder by --cache"
                    )
                with whole_folder(self.folder(kind, key)) as folder:
                    _complete(folder, kind, key, make(folder))
                return self.verify(self.folder(kind, key))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise BackendError(f"{self.root}: no space left; free some, or name another by --cache") from error
            raise BackendError(f"{self.root}: cannot be written ({error}); name another folder by --cache") from error

    def set_aside(self, kind: Kind, key: Mapping[str, Any]) -> None:
        """Take a damaged entry out of the way, so that it is made anew; it goes when the next one is made."""
        folder = self.folder(kind, key)
        with contextlib.suppress(OSError):  # another process may have been first
            folder.rename(folder.with_name(f"{_PARTIAL}{folder.name}-{os.getpid()}-damaged"))

    def entries(self) -> Iterator[Path]:
        """Folders of all entries, damaged ones included."""
        for kind in KINDS:
            if (self.root / kind).is_dir():
                yield from sorted(f for f in (self.root / kind).iterdir() if not f.name.startswith(_PARTIAL))

    def key_of(self, folder: Path) -> dict[str, Any] | None:
        """What the entry in a folder was made of and for, whole or damaged; None where that cannot be told any more."""
        try:
            manifest = json.loads((folder / _MANIFEST).read_text())
            kind, key = manifest["kind"], manifest["key"]
            return key if self.folder(kind, key).name == folder.name else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def verify(self, folder: Path, *, contents: bool = True) -> Entry:
        """An entry, with every file's size and (with `contents`) hash checked.

        Raises:
            BackendError: it is damaged; the text says which file and how.
        """
        again = "remove it by `turbolens engine prune` and build it again"
        try:
            manifest = json.loads((folder / _MANIFEST).read_text())
            if manifest["format"] != _FORMAT:
                raise BackendError(f"{folder}: format {manifest['format']}, this version reads {_FORMAT}; {again}")
            entry = Entry(manifest["kind"], folder, manifest["key"], manifest["files"], manifest["notes"])
            sizes = {name: (int(file["size"]), str(file["sha256"])) for name, file in entry.files.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BackendError(f"{folder}: {_MANIFEST} is missing or unreadable; {again}") from error
        for name, (size, sha256) in sizes.items():
            path = folder / name
            if not path.is_file():
                raise BackendError(f"{path}: missing; {again}")
            if (found := path.stat().st_size) != size:
                raise BackendError(f"{path}: {found} bytes, {size} were written; {again}")
            if contents and hash_file(path) != sha256:
                raise BackendError(f"{path}: its content has changed since it was written; {again}")
        return entry

    def prune(self, *, everything: bool = False) -> list[Path]:
        """Remove what a killed process left and what is damaged, or `everything`; returns the folders removed."""
        if not self.root.is_dir():
            return []
        with self._lock(lambda: None):
            removed = self._remove_partial()
            for folder in self.entries():
                try:
                    keep = not everything and self.verify(folder) is not None
                except BackendError:
                    keep = False
                if not keep:
                    shutil.rmtree(folder)
                    removed.append(folder)
            return removed

    def _remove_partial(self) -> list[Path]:
        """What is partial while we hold the lock, nobody is making."""
        left = [folder for kind in KINDS for folder in (self.root / kind).glob(f"{_PARTIAL}*")]
        for folder in left:
            shutil.rmtree(folder)
        return left

    @contextlib.contextmanager
    def _lock(self, on_wait: Callable[[], None]) -> Iterator[None]:
        """Hold the folder's lock; the kernel drops it with the process, however that ends."""
        import fcntl  # not on every platform, and only those who write need it

        for kind in KINDS:
            (self.root / kind).mkdir(parents=True, exist_ok=True)
        with (self.root / "lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _complete(folder: Path, kind: Kind, key: Mapping[str, Any], notes: dict[str, Any]) -> None:
    """Write the manifest of what is in a folder."""
    files = {path.name: {"size": path.stat().st_size, "sha256": hash_file(path)} for path in sorted(folder.iterdir())}
    manifest = {"format": _FORMAT, "kind": kind, "key": dict(key), "files": files, "notes": notes}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
