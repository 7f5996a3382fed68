"""The command, as a person would use it."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from turbolens.cli import main


@pytest.fixture
def address(server):
    return server.target


def test_help_and_version(capsys):
    main([])
    assert "turbolens generate" in capsys.readouterr().out
    main(["--version"])
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    "command", [["generate"], ["extract"], ["features", "search"], ["doctor"], ["serve"], ["bench"]]
)
def test_every_command_explains_itself_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert "xample" in capsys.readouterr().out


def test_generate_extract_search_list_show(address, tmp_path, capsys):
    out = tmp_path / "a.png"
    main(
        [
            "generate",
            "a big red star on the left, night background",
            "--seed",
            "7",
            "--server",
            address,
            "--out",
            str(out),
        ]
    )
    assert Image.open(out).size == (128, 128)
    main(["extract", "a red star", "--seed", "7", "--server", address, "--json", "--top", "3"])
    text = capsys.readouterr().out
    found = json.loads(text[text.index("{") :])
    assert [len(rows) for rows in found["features"].values()] == [3] * 4
    strongest = found["features"]["up.0.1"][0]["feature"]
    steer = ["--add", f"up.0.1/{strongest}=8", "--mask", "0,0,0.5,1"]
    main(["generate", "a red star", "--seed", "7", "--server", address, "--out", str(out), *steer])
    main(["features", "search", "blue", "--server", address])
    assert "blue" in capsys.readouterr().out
    main(["features", "list", "up.0.1", "--limit", "3", "--server", address])
    assert len(capsys.readouterr().out.strip().splitlines()) == 4
    main(["features", "show", f"up.0.1/{strongest}", "--server", address])
    assert str(strongest) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["generate", "x", "--seed", "-1"], 2, "seeds[0]"),
        (["generate", "x", "--add", "nonsense"], 2, "BLOCK/INDEX"),
        (["generate", "x", "--mask", "1,2"], 2, "--mask"),
        (["features", "show", "mid.0/99999"], 2, "mid.0 has features 0 to "),
        (["generate", "x", "--out", "/no/such/folder/a.png"], 1, "/no/such/folder"),
    ],
)
def test_mistakes_are_one_line(argv, code, says, address, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*argv, "--server", address])
    told = capsys.readouterr().err
    assert caught.value.code == code
    assert says in told
    assert "Traceback" not in told


def test_nobody_there(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--server", "localhost:1"])
    assert caught.value.code == 1
    assert "turbolens serve" in capsys.readouterr().out


def test_an_unknown_command(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["paint"])
    assert caught.value.code == 2
    assert "no command 'paint'" in capsys.readouterr().err
