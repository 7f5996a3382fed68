"""The script that fetches models: all files with their checksums, or none. Another plays the hub's own command."""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading

import pytest

from tests.deploy import charts

FILES = {"model_index.json": b"{}", "unet/model.safetensors": b"weights"}
COMMIT = "0" * 40
HF = """#!/bin/sh
# hf download REPO --revision REVISION --local-dir FOLDER [--include PATTERN ...]
echo "$@" >> "$FAKE/called"
sleep "${FAKE_SLEEP:-0}"
mkdir -p "$6/.cache"
cp -r "$FAKE/files/." "$6"
exit "${FAKE_CODE:-0}"
"""


@pytest.fixture
def fetch(tmp_path):
    """Run the script: for files that the hub has, and what is known of them."""
    fake = tmp_path / "fake"
    (fake / "bin").mkdir(parents=True)
    (fake / "bin/hf").write_text(HF)
    (fake / "bin/hf").chmod(0o755)
    models = tmp_path / "models"
    models.mkdir()

    def run(files=FILES, known=FILES, **environment):
        subprocess.run(["rm", "-rf", str(fake / "files")], check=True)
        for name, content in files.items():
            (fake / "files" / name).parent.mkdir(parents=True, exist_ok=True)
            (fake / "files" / name).write_bytes(content)
        sums = tmp_path / "sums"
        sums.write_text("".join(f"{hashlib.sha256(known[name]).hexdigest()}  {name}\n" for name in sorted(known)))
        return subprocess.run(
            [
                "sh",
                str(charts.SERVING / "files/fetch.sh"),
                str(sums),
                str(models / "m"),
                "o/m",
                COMMIT,
                "--include",
                "*",
            ],
            env={**os.environ, "PATH": f"{fake / 'bin'}:{os.environ['PATH']}", "FAKE": str(fake), **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    run.models = models
    run.called = lambda: (fake / "called").read_text().splitlines() if (fake / "called").exists() else []
    return run


def test_files_are_fetched_once(fetch):
    assert fetch().returncode == 0
    assert {
        str(path.relative_to(fetch.models / "m")) for path in (fetch.models / "m").rglob("*") if path.is_file()
    } == {
        *FILES,
        ".sha256",
    }
    assert fetch().stdout.endswith("there\n")
    partial = fetch.models / "m.partial"
    assert fetch.called() == [f"download o/m --revision {COMMIT} --local-dir {partial} --include *"]
    assert not partial.exists()


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (FILES | {"unet/model.safetensors": b"others"}, "unet/model.safetensors"),
        ({"model_index.json": b"{}"}, "unet/model.safetensors"),
        (FILES | {"more.bin": b""}, "more.bin"),
        (FILES | {"unet/model.safetensor": b""}, "unet/model.safetensor"),
    ],
    ids=["changed", "missing", "unknown", "a name that is part of another"],
)
def test_what_is_not_what_was_named_is_not_served(fetch, files, told):
    done = fetch(files)
    assert done.returncode != 0
    assert told in done.stdout + done.stderr
    assert not (fetch.models / "m").exists()
    assert fetch().returncode == 0  # and the next try goes on


def test_a_hub_that_fails_is_seen(fetch):
    assert fetch(FAKE_CODE="3").returncode == 3
    assert not (fetch.models / "m").exists()


def test_a_folder_is_never_replaced(fetch):
    fetch()
    done = fetch(known=FILES | {"new": b""})
    assert done.returncode == 1
    assert "a new name" in done.stderr
    assert (fetch.models / "m/unet/model.safetensors").read_bytes() == b"weights"


def test_pods_that_start_together_fetch_once(fetch):
    done = []
    threads = [threading.Thread(target=lambda: done.append(fetch(FAKE_SLEEP="0.3").returncode)) for _ in range(2)]
    # The files that the hub has are laid anew by each; what counts is who asks for them.
    threads[0].start()
    threads[0].join(0.1)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert done == [0, 0]
    assert len(fetch.called()) == 1
