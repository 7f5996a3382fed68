"""A folder of things that take long to make: exported graphs, TensorRT engines, compiled code; whole or not there.

    <root>/lock                          held while something is made or removed
    <root>/graphs/<key>/                 one entry: its files and manifest.json
    <root>/engines/<key>/
    <root>/packages/<key>/
    <root>/models/                       see `turbolens_server.loading.kept`
    <root>/{graphs,engines,packages}/.<key>-*     being made, left by a process that was killed, or found damaged

An entry is made in a partial folder and renamed when its files and its manifest are on the disk, so a reader sees all
of it or nothing. The manifest holds the key in words and every file's size and SHA-256; both are checked at each load.
What is damaged is never loaded: it is set aside, told in one line of the log, and made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from turbolens_server.files import hash_file, whole_folder
from turbolens_server.logs import get_logger
from turbolens_server.unet.backend import BackendError

Kind = Literal["graphs", "engines", "packages"]
KINDS: Final[tuple[Kind, ...]] = ("graphs", "engines", "packages")
_FORMAT: Final = 1
_MANIFEST: Final = "manifest.json"
_PARTIAL: Final = "."
"""What the names of folders that are no entries begin with."""
_UNREADABLE: Final = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What JSON that is none, or of another shape, can end in."""
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


def tell_of_waiting() -> None:
    """A line of the log: another process makes something in the same folder."""
    get_logger().info("waiting for the cache", why="another process makes an entry, and holds its lock until then")


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/turbolens`, or `~/.cache/turbolens`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "turbolens"


class DamagedError(BackendError):
    """An entry is not what was written; the text says which file and how."""

    def __init__(self, folder: Path, text: str) -> None:
        super().__init__(text)
        self.folder = folder
        """The entry's."""


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
            DamagedError: it is damaged.
        """
        folder = self.folder(kind, key)
        return self.verify(folder) if folder.exists() else None

    def add(
        self,
        kind: Kind,
        key: Mapping[str, Any],
        make: Callable[[Path], dict[str, Any]],
        *,
        needs_bytes: int = 0,
        on_wait: Callable[[], None] = tell_of_waiting,
    ) -> Entry:
        """The entry of a key; made where there is none, or a damaged one, by one process at a time.

        Args:
            kind: of entry.
            key: values that JSON can hold, all that decides the content.
            make: writes files into an empty folder and returns notes for the manifest. Where it raises, nothing stays.
            needs_bytes: about what the files will take; where the disk has less, nothing is begun.
            on_wait: called where another process holds the lock, before waiting for it.

        Raises:
            BackendError: the disk is full, or the folder cannot be written.
        """
        damage = ""
        try:
            # What is there is whole, so reading it needs no lock: the folder may be one that cannot be written.
            try:
                if (entry := self.find(kind, key)) is not None:
                    return entry
            except DamagedError as error:
                damage = f"{error}; "
            with self._lock(on_wait):
                self._remove_partial()
                try:
                    if (entry := self.find(kind, key)) is not None:
                        return entry
                except DamagedError as error:
                    self.set_aside(kind, key)
                    get_logger().warning("cache entry set aside", why=str(error), then="made again")
                if shutil.disk_usage(self.root).free < needs_bytes:
                    self._remove_partial()  # what was just set aside, too
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
                raise BackendError(
                    f"{damage}{self.root}: no space left; free some, or name another by --cache"
                ) from error
            text = f"{damage}{self.root}: cannot be written ({error}); name another folder by --cache"
            raise BackendError(text) from error

    def set_aside(self, kind: Kind, key: Mapping[str, Any]) -> None:
        """Take a damaged entry out of the way, so that it is made anew; it goes when the next one is made."""
        folder = self.folder(kind, key)
        with contextlib.suppress(OSError):  # another process may have been first
            folder.rename(folder.with_name(f"{_PARTIAL}{folder.name}-{uuid.uuid4().hex[:8]}-damaged"))

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
        except (OSError, *_UNREADABLE):
            return None

    def verify(self, folder: Path, *, contents: bool = True) -> Entry:
        """An entry, with every file's size and (with `contents`) hash checked.

        Raises:
            DamagedError: it is damaged; the text says which file and how.
        """
        try:
            manifest = json.loads((folder / _MANIFEST).read_text())
            if manifest["format"] != _FORMAT:
                raise DamagedError(folder, f"{folder}: format {manifest['format']}, this version reads {_FORMAT}")
            entry = Entry(manifest["kind"], folder, manifest["key"], manifest["files"], manifest["notes"])
            sizes = {name: (int(file["size"]), str(file["sha256"])) for name, file in entry.files.items()}
            own = self.folder(entry.kind, entry.key)
        except (OSError, *_UNREADABLE) as error:
            raise DamagedError(folder, f"{folder}: {_MANIFEST} is missing or unreadable") from error
        if own.name != folder.name:
            raise DamagedError(folder, f"{folder}: its {_MANIFEST} is that of {own.name}")
        for name, (size, sha256) in sizes.items():
            path = folder / name
            if not path.is_file():
                raise DamagedError(folder, f"{path}: missing")
            if (found := path.stat().st_size) != size:
                raise DamagedError(folder, f"{path}: {found} bytes, {size} were written")
            if contents and hash_file(path) != sha256:
                raise DamagedError(folder, f"{path}: its content has changed since it was written")
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
                except DamagedError:
                    keep = False
                if not keep:
                    _remove(folder)
                    removed.append(folder)
            if everything and (kept := self.root / "models").is_dir():
                _remove(kept)
                removed.append(kept)
            return removed

    def _remove_partial(self) -> list[Path]:
        """What is partial while we hold the lock, nobody is making."""
        left = [folder for kind in KINDS for folder in (self.root / kind).glob(f"{_PARTIAL}*")]
        for folder in left:
            _remove(folder)
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


def _remove(path: Path) -> None:
    """A folder, or a file where a folder should be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _complete(folder: Path, kind: Kind, key: Mapping[str, Any], notes: dict[str, Any]) -> None:
    """Write the manifest of what is in a folder."""
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": hash_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {"format": _FORMAT, "kind": kind, "key": dict(key), "files": files, "notes": notes}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
