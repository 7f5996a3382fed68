"""The pages of the methods can be typed in: their Python runs as written, their commands are ones that there are."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import tyro

from turbolens.cli import main
from turbolens_server.config import read_config
from turbolens_training import cli
from turbolens_training.sae.config import OF_THE_MACHINE, SaeConfig
from turbolens_training.sae.shipped import BESIDE

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("attention", "gates", "nested", "regions", "temporal")
COMMAND = re.compile(r"^ {4}turbolens ((?:.*\\\n)*.*)$", re.MULTILINE)
INLINE = re.compile(r"`turbolens ([^`]*)`")


def commands(page: str) -> list[list[str]]:
    """What a page says to type, as arguments."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    found = [*COMMAND.findall(text), *INLINE.findall(text)]
    return [shlex.split(line.replace("\\\n", " "), comments=True) for line in found]


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs_as_it_is_written(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {"__name__": page})
    if page == "attention":
        assert (tmp_path / "why.png").stat().st_size
        assert re.search(r"^night +\d", capsys.readouterr().out, re.MULTILINE), "no word was left out"


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_are_ones_that_there_are(page, server, gate_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    kinds = set()
    for kind, *rest in commands(page):
        kinds.add(kind)
        match kind:
            case "train":
                tyro.cli(cli.Command, args=rest)
            case "serve":
                read_config(rest, {})
            case "attribute" | "generate" if page != "regions":
                continue  # below, where the server has what they ask for
            case "generate":
                main([kind, *rest, "--server", server.target, "--out", "a.png"])
                assert (tmp_path / "a.png").stat().st_size
            case other:
                raise AssertionError(f"{page}: turbolens {other} is not looked at")
    assert "train" in kinds
    capsys.readouterr()


def test_calls_of_the_pages_that_need_a_server_of_their_own(tmp_path, monkeypatch, capsys):
    from turbolens_server.embedded import start

    monkeypatch.chdir(tmp_path)
    with start(sae=("mini-saes", "mini-attention"), gate="mini") as running:
        for page, kind in (("attention", "attribute"), ("gates", "generate")):
            for found, *rest in commands(page):
                if found == kind:
                    main([found, *rest, "--server", running.target])
        said = capsys.readouterr().out
    assert (tmp_path / "why.png").stat().st_size
    assert "night" in said


@pytest.mark.parametrize(("page", "name"), [("attention", "mini-attention"), ("nested", "mini-nested"),
                                            ("temporal", "mini-temporal")])  # fmt: skip
def test_a_page_trains_what_ships(page, name):
    (rest,) = [rest[1:] for kind, *rest in commands(page) if (kind, rest[0]) == ("train", "sae")]
    typed = dataclasses.asdict(tyro.cli(SaeConfig, args=rest))
    ships = dataclasses.asdict(SaeConfig(**BESIDE[name]))
    assert {name: (typed[name], value) for name, value in ships.items()
            if name not in OF_THE_MACHINE and typed[name] != value} == {}  # fmt: skip
