"""`turbolens engine`."""

from __future__ import annotations

import json

import pytest

from turbolens_server.loading.engine_cli import main
from turbolens_server.unet.artifacts import ArtifactCache

GRAPH = {"opset": 20, "dtype": "float32", "model": "abcdef" * 10, "points": ["mid.0"]}
ENGINE = {"graph": GRAPH, "tensorrt": "tensorrt_rtx", "version": "1.7", "target": "sm89", "buckets": [[1, 16, 16]]}


@pytest.fixture
def cache(tmp_path):
    def make(folder):
        (folder / "data").write_bytes(bytes(2**20))
        return {}

    cache = ArtifactCache(tmp_path)
    cache.add("graphs", GRAPH, make)
    cache.add("engines", ENGINE, make)
    return cache


def said(*argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(argv))
    return str(caught.value)


def test_list_verify_prune(cache, capsys):
    where = ["--cache", str(cache.root)]
    main(["list", *where])
    graph, engine = capsys.readouterr().out.splitlines()
    assert "1.0 MiB  opset 20, float32, model abcdefabcdef, mid.0" in graph
    assert "tensorrt_rtx 1.7, sm89, float32" in engine
    assert engine.endswith("1x16x16")
    main(["verify", *where])
    assert capsys.readouterr().out.count("  ok  ") == 2
    main(["list", "--json", *where])
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["kind"], one["bytes"] >= 2**20) for one in told] == [("graph", True), ("engine", True)]
    assert told[1]["key"] == ENGINE
    damaged = cache.folder("engines", ENGINE)
    (damaged / "data").write_bytes(b"short")
    assert said("verify", *where) == "1"
    assert "fail" in capsys.readouterr().out
    main(["list", *where])
    assert "damaged" in capsys.readouterr().out
    main(["prune", *where])
    assert capsys.readouterr().out == f"removed {damaged}\n"
    main(["prune", "--everything", *where])
    assert list(cache.entries()) == []


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--batches", "0"], "--batches 0"),
        (["--target", "sm89", "--size", "100"], "--size 100: must be a multiple of 16"),
        (["--target", "sm89", "--model", "/no/such/folder"], "no such folder"),
    ],
)
def test_what_cannot_be_built_is_one_line(argv, says, tmp_path):
    pytest.importorskip("tensorrt_rtx_bindings")
    text = said("build", "--cache", str(tmp_path), *argv)
    assert says in text
    assert "\n" not in text
