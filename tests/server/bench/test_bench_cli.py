"""`turbolens bench` from its arguments to its file."""

from __future__ import annotations

import json

import pytest

from turbolens_server.bench.cli import main
from turbolens_server.bench.results import to_markdown

CONTENDERS = [
    "diffusers", "nothing asked", "all features", "eight adds", "a scale a block", "U-Net alone",
    "U-Net and features", "latents only", "features only",
    "new prompt to PNG",
]  # fmt: skip


def test_a_run_on_random_weights_writes_what_it_prints(tmp_path, capsys):
    out = tmp_path / "results" / "bench.json"
    main(["--model", "random:mini", "--rounds", "1", "--batch", "2", "--out", str(out)])
    result = json.loads(out.read_text())
    assert {"cpu", "cores", "gpu", "versions", "commit", "changed", "load_average"} <= result["machine"].keys()
    assert (result["benchmark"], result["model"], result["device"], result["rounds"]) == (
        "bench",
        "random:mini",
        "cpu",
        1,
    )
    (case,) = result["cases"]
    assert case["label"] == {"pictures": 2, "steps": 1}
    assert [row["name"] for row in case["rows"]] == CONTENDERS
    assert all(len(row["ms"]) == 1 and row["ms"][0] > 0 for row in case["rows"])
    assert case["largest_difference"] <= 2, "the contenders must make the same pictures"
    assert 0 < case["sae_share"]["of_picture"] < case["sae_share"]["of_unet"] < 0.1
    assert case["unet_floor_ms"] > 0
    assert to_markdown(result) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "random:nothing"], "no such model"),
        (["--model", "random:mini", "--size", "100"], "--size 100: must be a multiple of 16, from 32"),
        (["--model", "random:mini", "--size", "0"], "--size 0: must be"),
        (
            ["--model", "random:mini", "--backend", "tensorrt", "--device", "cpu"],
            "--backend tensorrt: TensorRT engines",
        ),
        (["--rounds", "0"], "rounds is 0; it must be at least 1"),
        (["--model", __file__], "test_bench_cli.py: one file; the bare pipeline beside it is read from a folder"),
        (["--batch", "0"], "batch is (0,); it must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, text, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code != 0
    said = f"{caught.value} {capsys.readouterr()}"
    assert text in " ".join(said.split()), said


def test_help_explains_with_an_example(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "Example" in capsys.readouterr().out
