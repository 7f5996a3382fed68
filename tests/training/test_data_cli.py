"""Where the data comes from, from the command line; the tiny model makes no pictures that are not needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from turbolens_server.sae.bundle import load_bundle
from turbolens_training import cli
from turbolens_training.activations import sources
from turbolens_training.activations.cache import ShardCache, find_caches
from turbolens_training.activations.config import DataConfig

SMALL = (
    "--d-sae 32 --k 4 --steps 6 --batch 16 --images 4 --reservoir 40 --warm-up 2 --hook-points mid.0 --device cpu "
    "--allow-below-gates"
)


def test_prompts_of_a_file_over_a_cache_and_then_the_cache_alone(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = tmp_path / "captions.csv"
    captions.write_text("id,text\n" + "".join(f"{i},a picture of thing {i}\n" for i in range(100)))
    cache, model = tmp_path / "cache", ["--model", str(tiny_folder)]
    data = ["--prompts", f"{captions}:text", "--cache", str(cache), "--held-out-chunks", "2"]
    first = ["--out", str(tmp_path / "a"), "--work", str(tmp_path / "work-a")]
    cli.main(["sae", *SMALL.split(), *model, *data, *first])
    assert "100 prompts" in capsys.readouterr().err
    bundle = load_bundle(tmp_path / "a" / "mid.0")
    assert bundle.provenance["data"]["kind"] == "prompts of captions.csv, column 'text'"
    assert str(tmp_path) not in str(bundle.provenance)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mid.0"]

    fill = ["--images", "4", "--hook-points", "mid.0", "--device", "cpu", "--chunks", "3"]
    cli.main(["cache", "fill", *model, *data, *fill])
    folders = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(folders) == sorted(found.folder for found in find_caches(cache))
    training, held_out = (ShardCache(folder) for folder in folders)
    assert held_out.shards() == [0, 1]
    cli.main(["cache", "verify", str(cache)])

    cli.main(["sae", *SMALL.split(), *model, "--shards", str(training.folder), "--out", str(tmp_path / "b"),
              "--work", str(tmp_path / "work-b")])  # fmt: skip
    assert load_bundle(tmp_path / "b" / "mid.0").provenance["data"]["kind"] == f"activation cache {training.key}"

    broken = next((training.folder / "shards" / "00000000").glob("*.f16"))
    broken.write_bytes(b"\0" * broken.stat().st_size)
    with pytest.raises(SystemExit, match=r"1 problem$"):
        cli.main(["cache", "verify", str(cache)])
    assert str(broken) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sae", "--prompts", "nowhere.txt"], "--prompts nowhere.txt: no such file"),
        (["sae", "--shards", "/nowhere"], "--shards /nowhere: no such file or folder"),
        (["sae", "--hook-points", "up.9.9"], "no hook point up.9.9; it has"),
        (["cache", "verify", "/nowhere"], "--path /nowhere: no such file or folder"),
        (["cache", "import-tars", "/nowhere"], "--path /nowhere: no such file or folder"),
    ],
)
def test_what_cannot_be_read_is_one_line(arguments: list[str], message: str, tiny_folder: Path) -> None:
    model = ["--model", str(tiny_folder), "--device", "cpu"] if arguments[0] == "sae" else []
    with pytest.raises(SystemExit) as caught:
        cli.main([*arguments, *model])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_shards_beside_other_data_are_a_misuse(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["sae", "--shards", "/nowhere", "--cache", "/nowhere"])
    assert caught.value.code == 2
    assert "leave out cache and prompts" in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize("backend", ["auto", "torch-compile"])
def test_pictures_are_made_by_the_backend_that_is_asked_for(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(sources, "load_engine", lambda **settings: asked.append(settings))
    sources.open_model(DataConfig(backend=backend))
    assert [settings["backend"] for settings in asked] == [backend]
