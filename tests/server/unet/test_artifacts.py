"""The folder of graphs and engines: whole entries or none, whatever happens while they are made."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbolens_server.unet.artifacts import ArtifactCache, default_cache
from turbolens_server.unet.backend import BackendError

KEY = {"graph": "x", "version": "1", "buckets": [[1, 16, 16]]}


@pytest.fixture
def cache(tmp_path) -> ArtifactCache:
    return ArtifactCache(tmp_path / "cache")


def make(folder):
    (folder / "unet.plan").write_bytes(b"plan" * 1000)
    return {"build_s": 1.0}


def refused(call, *arguments, **more) -> str:
    with pytest.raises(BackendError) as caught:
        call(*arguments, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_entry_comes_back_as_it_was_added(cache):
    assert cache.find("engines", KEY) is None
    added = cache.add("engines", KEY, make)
    found = cache.find("engines", {"buckets": [[1, 16, 16]], "version": "1", "graph": "x"})
    assert found == added
    assert (found.key, found.notes, found.size) == (KEY, {"build_s": 1.0}, 4000)
    assert (found.folder / "unet.plan").read_bytes() == b"plan" * 1000
    assert list(cache.entries()) == [found.folder]
    assert cache.find("engines", KEY | {"version": "2"}) is None
    assert cache.find("graphs", KEY) is None
    cache.add("engines", KEY, lambda folder: pytest.fail("it is there"))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "unet.plan").write_bytes(b"plan" * 999), "3996 bytes, 4000 were written"),
        (lambda f: (f / "unet.plan").write_bytes(b"nalp" * 1000), "has changed"),
        (lambda f: (f / "unet.plan").unlink(), "unet.plan: missing"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is missing or unreadable"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json is missing or unreadable"),
        (lambda f: (f / "manifest.json").write_text('{"format": 9}'), "format 9"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    ],
)
def test_damage_is_told_and_pruned_or_made_again(cache, damage, says, log_lines):
    good = cache.add("engines", KEY | {"version": "2"}, make).folder
    bad = cache.add("engines", KEY, make).folder
    damage(bad)
    assert says in refused(cache.find, "engines", KEY)
    assert cache.prune() == [bad]
    assert list(cache.entries()) == [good]
    assert cache.add("engines", KEY, make).folder == bad
    assert not log_lines
    damage(bad)
    again = cache.add("engines", KEY, make)
    assert again == cache.find("engines", KEY)
    (line,) = log_lines
    assert says in line["why"]
    aside = cache.root / "engines"
    assert len(list(aside.glob(".*-damaged"))) == 1
    cache.add("engines", KEY | {"version": "3"}, make)
    assert not list(aside.glob(".*-damaged")), "what is set aside goes when the next is made"


@given(st.data())
def test_no_damage_is_ever_loaded_and_any_is_mended(data):
    """Truncated and random bytes, in any file of an entry, and other things in the place of files and folders."""
    with tempfile.TemporaryDirectory() as root:
        cache = ArtifactCache(Path(root))
        whole = cache.add("graphs", KEY, make)
        path = whole.folder / data.draw(st.sampled_from(["unet.plan", "manifest.json", "."]))
        before = b"" if path.is_dir() else path.read_bytes()
        match how := data.draw(st.sampled_from(["cut", "random", "nested", "folder", "gone", "file"])):
            case "cut" if path.is_file():
                path.write_bytes(before[: data.draw(st.integers(0, len(before) - 1))])
            case "random" if path.is_file():
                path.write_bytes(data.draw(st.binary(max_size=200)))
            case "nested" if path.is_file():
                path.write_bytes(b"[" * 200_000)
            case "folder" if path.is_file():
                path.unlink()
                path.mkdir()
            case _ if path == whole.folder:
                shutil.rmtree(path)
                if how == "file":
                    path.write_bytes(b"not a folder")
            case _:
                path.unlink()
        assert cache.add("graphs", KEY, make) == whole
        assert cache.find("graphs", KEY) == whole
        assert (whole.folder / "unet.plan").read_bytes() == b"plan" * 1000


def test_an_entry_in_the_place_of_another_is_not_taken(cache):
    other = cache.add("graphs", KEY | {"version": "2"}, make).folder
    shutil.copytree(other, cache.folder("graphs", KEY))
    assert "is that of" in refused(cache.find, "graphs", KEY)
    assert cache.add("graphs", KEY, make).key == KEY


def test_what_cannot_be_made_leaves_nothing(cache):
    def fails(folder):
        make(folder)
        raise BackendError("TensorRT says no")

    def full(folder):
        make(folder)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert refused(cache.add, "engines", KEY, fails) == "TensorRT says no"
    assert "no space left" in refused(cache.add, "engines", KEY, full)
    assert "GiB needed" in refused(cache.add, "engines", KEY, make, needs_bytes=2**60)
    assert list((cache.root / "engines").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert "--cache" in refused(ArtifactCache(tmp_path / "file" / "cache").add, "engines", KEY, make)


def test_what_is_there_is_found_in_a_folder_that_cannot_be_written(cache, monkeypatch):
    added = cache.add("graphs", KEY, make)

    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(type(cache.root), "mkdir", read_only)
    monkeypatch.setattr(cache, "_lock", read_only)
    assert cache.add("graphs", KEY, lambda folder: pytest.fail("it is there")) == added
    assert "cannot be written" in refused(cache.add, "graphs", KEY | {"version": "2"}, make)
    (added.folder / "unet.plan").write_bytes(b"plan")
    told = refused(cache.add, "graphs", KEY, make)
    assert "4 bytes, 4000 were written" in told
    assert "cannot be written" in told


KILLED = """
import sys, time
from pathlib import Path
from turbolens_server.unet.artifacts import ArtifactCache

def make(folder):
    (folder / "unet.plan").write_bytes(b"half of it")
    print("begun", flush=True)
    time.sleep(600)
    return {}

ArtifactCache(Path(sys.argv[1])).add("engines", {"graph": "x"}, make)
"""


def test_a_killed_build_leaves_no_entry_and_no_lock(cache):
    build = subprocess.Popen([sys.executable, "-c", KILLED, str(cache.root)], stdout=subprocess.PIPE, text=True)
    assert build.stdout.readline() == "begun\n"
    assert cache.find("engines", {"graph": "x"}) is None, "half an entry can be seen"
    waited = []
    build.send_signal(signal.SIGKILL)
    build.wait()
    build.stdout.close()
    assert list(cache.entries()) == []
    assert len(list((cache.root / "engines").glob(".*"))) == 1
    entry = cache.add("engines", {"graph": "x"}, make, on_wait=lambda: waited.append(True))
    assert (entry.folder / "unet.plan").stat().st_size == 4000
    assert not list((cache.root / "engines").glob(".*"))
    assert not waited


def test_two_makers_of_one_entry_make_it_once(cache):
    made, waited, entries = [], [], []

    def slow(folder):
        made.append(folder)
        time.sleep(0.3)
        return make(folder)

    def add():
        entries.append(cache.add("engines", KEY, slow, on_wait=lambda: waited.append(True)))

    threads = [threading.Thread(target=add) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == len(waited) == 1
    assert entries[0] == entries[1]


def test_everything_can_be_pruned(cache):
    folders = [cache.add(kind, KEY, make).folder for kind in ("graphs", "engines")]
    assert cache.prune() == []
    assert cache.prune(everything=True) == folders
    assert list(cache.entries()) == []
    assert ArtifactCache(cache.root / "nowhere").prune() == []


def test_the_default_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "turbolens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "turbolens"


def test_a_manifest_says_in_words_what_an_entry_is_for(cache):
    manifest = json.loads((cache.add("engines", KEY, make).folder / "manifest.json").read_text())
    assert manifest["key"] == KEY
    assert manifest["files"]["unet.plan"]["size"] == 4000
