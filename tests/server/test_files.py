from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from turbolens_server.files import (
    WriteError,
    check_writable,
    first_line,
    whole_file,
    whole_folder,
    write_file,
    write_files,
)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n  one\ntwo"), "one"), (RuntimeError("a" * 500), "a" * 200), (KeyError(), "KeyError"),
        (MemoryError("\n"), "MemoryError"),
    ],
)  # fmt: skip
def test_the_first_line_of_an_error_is_short_and_says_something(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_a_file_appears_whole_in_folders_that_are_made(tmp_path: Path) -> None:
    write_file(tmp_path / "a" / "b.txt", "Mädchen")
    assert content(tmp_path) == {"a/b.txt": "Mädchen".encode()}
    write_file(tmp_path / "a" / "b.txt", b"new")
    assert content(tmp_path) == {"a/b.txt": b"new"}


def test_nothing_changes_where_the_disk_is_full(tmp_path: Path, full_disk) -> None:
    write_files({tmp_path / "a": "old a", tmp_path / "b": "old b"})
    with (
        full_disk(100),
        pytest.raises(WriteError, match=r"b: cannot be written \(File too large; .* MB free\)") as caught,
    ):
        write_files({tmp_path / "a": "new a", tmp_path / "b": "x" * 101})
    assert "\n" not in str(caught.value)
    assert content(tmp_path) == {"a": b"old a", "b": b"old b"}


def test_nothing_changes_where_the_writer_fails(tmp_path: Path) -> None:
    write_file(tmp_path / "a", "old")

    def fail(into: Path) -> None:
        into.write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "a") as file:
        fail(Path(file.name))
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "f") as folder:
        fail(folder / "x")
    assert content(tmp_path) == {"a": b"old"}


@pytest.mark.parametrize("library", ["torch", "pyarrow"])
def test_libraries_that_write_to_a_full_disk_are_one_line(tmp_path: Path, full_disk, library: str) -> None:
    rows = pa.table({"a": [os.urandom(20).hex() for _ in range(1000)]})
    writers = {
        "torch": lambda f: torch.save({"x": torch.zeros(10_000)}, f),
        "pyarrow": lambda f: pq.write_table(rows, f),
    }
    with full_disk(4096), pytest.raises(WriteError, match=r"a: cannot be written"), whole_file(tmp_path / "a") as file:
        writers[library](file)
    assert not content(tmp_path)


def test_a_folder_appears_whole_and_may_take_anothers_place(tmp_path: Path, full_disk) -> None:
    path = tmp_path / "up" / "f"
    for number, replace in enumerate((False, False, True)):
        with whole_folder(path, replace=replace) as folder:
            (folder / str(number)).write_text("")
            assert folder.parent == path.parent
        assert list(content(path)) == [["0"], ["0"], ["2"]][number]
    with (
        full_disk(10),
        pytest.raises(WriteError, match="f: cannot be written"),
        whole_folder(path, replace=True) as folder,
    ):
        (folder / "3").write_text("x" * 11)
    assert list(content(path)) == ["2"]
    assert [entry.name for entry in path.parent.iterdir()] == ["f"]


def test_the_umask_says_who_may_read(tmp_path: Path, umask: int) -> None:
    with whole_folder(tmp_path / "f") as folder:
        (folder / "sub").mkdir(mode=0o700)
        save_file({"x": torch.zeros(3)}, folder / "sub" / "x.safetensors")
        os.chmod(folder / "sub" / "x.safetensors", 0o600)  # as newer versions write it
    write_file(tmp_path / "a", "")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"f": 0o777 & ~umask, "sub": 0o777 & ~umask, "x.safetensors": 0o666 & ~umask, "a": 0o666 & ~umask}


def test_a_folder_that_takes_nothing_is_refused_before_the_work(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    write_file(tmp_path / "file", "")
    with pytest.raises(WriteError, match="file: cannot be written"):
        check_writable(tmp_path / "file")
    with pytest.raises(WriteError, match="file/below: cannot be written"):
        check_writable(tmp_path / "a", tmp_path / "file" / "below")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_folder_that_may_not_be_looked_into_is_refused_in_one_line(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    os.seteuid(65534)
    try:
        with pytest.raises(WriteError, match="cannot be written"):
            check_writable(closed / "a" / "b")
    finally:
        os.seteuid(0)
