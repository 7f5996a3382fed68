"""What the command sends and prints, against the fake server; `test_cli.py` runs it on the real one."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys

import grpc
import pytest
from fake_server import refuse
from google.rpc import error_details_pb2 as details
from PIL import Image

import turbolens as tl
from turbolens import cli
from turbolens.cli import doctor
from turbolens_proto.v1 import feature_service_pb2 as fs
from turbolens_proto.v1 import generation_service_pb2 as gs
from turbolens_proto.v1 import run_pb2 as run


@pytest.fixture
def turbolens(running):
    """Runs the command on the fake server."""
    return lambda *argv: cli.main([*argv, "--server", running.target])


def test_every_edit_given_is_sent(turbolens, fake, tmp_path, capsys):
    out = tmp_path / "a.png"
    turbolens(
        "generate", "--add", "up.0.1/1=8", "--add", "up.0.1/2=-3.5", "--scale", "down.2.1/4=0", "--set", "up.0.1/5=2",
        "a star", "--mask", "0,0,.5,1", "--seed", "7", "--steps", "2", "--out", str(out),
    )  # fmt: skip
    sent = fake.last(gs.GenerateRequest)
    where = tl.box(0, 0, 0.5, 1)
    assert sent.run.source.prompt.text == "a star"
    assert [tl.Edit.from_proto(edit) for edit in sent.run.edits] == [
        tl.add("up.0.1/1", 8, mask=where),
        tl.add("up.0.1/2", -3.5, mask=where),
        tl.scale("down.2.1/4", 0, mask=where),
        tl.set_to("up.0.1/5", 2, mask=where),
    ]
    assert (list(sent.run.seeds), sent.run.sampling.steps) == ([7], 2)
    assert out.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"{out}  seed 7\n"


def test_timesteps_are_sent(turbolens, fake, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    turbolens("generate", "a star", "--timesteps", "999,399")
    assert list(fake.last(gs.GenerateRequest).run.sampling.timesteps) == [999, 399]
    with pytest.raises(SystemExit) as ended:
        turbolens("generate", "a star", "--timesteps", "soon")
    assert ended.value.code == 2
    assert "--timesteps soon: write numbers" in capsys.readouterr().err


def test_edits_take_a_unit_and_a_range_of_steps_where_they_have_one(turbolens, fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    turbolens(
        "generate", "a star", "--replace", "up.0.1/3=4", "--add", "up.0.1/1=8", "--scale", "up.0.1/2=0", "--set",
        "up.0.1/5=2", "--unit", "norm", "--edit-steps", "0,2",
    )  # fmt: skip
    assert [tl.Edit.from_proto(edit) for edit in fake.last(gs.GenerateRequest).run.edits] == [
        tl.add("up.0.1/1", 8, unit="norm", steps=(0, 2)),
        tl.scale("up.0.1/2", 0, steps=(0, 2)),
        tl.set_to("up.0.1/5", 2, unit="norm", steps=(0, 2)),
        tl.replace("up.0.1/3", 4, unit="norm", steps=(0, 2)),
    ]


def test_regions(turbolens, fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    turbolens("generate", "two rings", "--region", "0,0,0.5,1=a red ring", "--region", "0.5,0,1,1=a = b")
    left, right = fake.last(gs.GenerateRequest).run.regions
    assert (left.prompt, left.mask.boxes.boxes[0].right, right.prompt) == ("a red ring", 0.5, "a = b")


def test_gates_are_off_unless_asked_for(turbolens, fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags in ((), ("--gate",)):
        turbolens("generate", "two rings", *flags)
        assert fake.last(gs.GenerateRequest).run.gate == bool(flags)


def test_guidance_and_the_side_of_edits(turbolens, fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    turbolens(
        "generate", "a star", "--steps", "4", "--guidance-scale", "5.5", "--guidance-rescale", "0.7",
        "--negative-prompt", "snow", "--add", "up.0.1/1=8", "--patch", "up.0.1=r", "--reference", "r=a ring",
        "--side", "both",
    )  # fmt: skip
    sent = fake.last(gs.GenerateRequest).run
    assert (sent.sampling.guidance_scale, sent.sampling.guidance_rescale) == (5.5, 0.7)
    assert sent.sampling.negative_prompt == "snow"
    assert [tl.Edit.from_proto(edit).side for edit in sent.edits] == ["both", "both"]


def test_edits_come_from_a_file_too(turbolens, fake, tmp_path):
    kept = [tl.add({"up.0.1/1": 1, "up.0.1/2": -0.5}, 3, mask=tl.polygon((0, 0), (1, 0), (0, 1)), steps=(0, 1))]
    file = tmp_path / "edits.json"
    file.write_text(tl.edits_to_json(kept))
    turbolens("extract", "a star", "--edits", str(file), "--scale", "up.0.1/4=0", "--mask", "0,0,1,.5")
    sent = [tl.Edit.from_proto(edit) for edit in fake.last(fs.ExtractFeaturesRequest).run.edits]
    assert sent == [*kept, tl.ablate("up.0.1/4", mask=tl.box(0, 0, 1, 0.5))]


@pytest.mark.parametrize(
    ("name", "format", "begins"),
    [
        ("a.png", run.IMAGE_FORMAT_PNG, b"\x89PNG"), ("a.JPG", run.IMAGE_FORMAT_JPEG, b"\xff\xd8"),
        ("a.jpeg", run.IMAGE_FORMAT_JPEG, b"\xff\xd8"), ("a.webp", run.IMAGE_FORMAT_WEBP, b"RIFF"),
        ("a.bmp", run.IMAGE_FORMAT_PNG, b"BM"),
    ],
)  # fmt: skip
def test_the_ending_of_the_file_says_what_the_server_is_asked_for(turbolens, fake, tmp_path, name, format, begins):
    turbolens("generate", "a star", "--out", str(tmp_path / name))
    assert fake.last(gs.GenerateRequest).image.format == format
    assert (tmp_path / name).read_bytes().startswith(begins)


def test_a_note_goes_to_stderr(turbolens, tmp_path, capsys):
    turbolens("generate", "x" * 60, "--out", str(tmp_path / "a.png"))
    told = capsys.readouterr()
    assert told.err == "note: cut\n"
    assert "seed 4242" in told.out


def test_extract_for_people_and_programs(turbolens, fake, capsys):
    turbolens("extract", "x", "--seed", "3", "--top", "2", "--sae", "up.0.1", "--sae", "down.2.1", "--json")
    told = json.loads(capsys.readouterr().out)
    assert list(fake.last(fs.ExtractFeaturesRequest).run.features.saes) == ["up.0.1", "down.2.1"]
    assert {sae: len(rows) for sae, rows in told["features"].items()} == {"up.0.1": 2, "down.2.1": 2}
    assert told["features"]["up.0.1"][0].keys() == {"feature", "mean", "label"}
    turbolens("extract", "x", "--seed", "3")
    shown = capsys.readouterr().out
    assert "up.0.1  (seed 3)" in shown
    assert "feature  mean" in shown


@pytest.mark.parametrize(
    ("command", "kind"), [("generate", gs.GenerateRequest), ("extract", fs.ExtractFeaturesRequest)]
)
def test_how_saes_are_read_is_sent(command, kind, turbolens, fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    turbolens(command, "x", "--k", "up.0.1=4", "--k", "down.2.1=2", "--prefix", "up.0.1=64")
    assert list(fake.last(kind).run.sae_options) == [
        run.SaeOptions(sae="up.0.1", k=4, prefix=64),
        run.SaeOptions(sae="down.2.1", k=2),
    ]


def test_features(turbolens, fake, capsys):
    turbolens("features", "search", "blue", "--block", "up.0.1")
    assert "up.0.1/1" in capsys.readouterr().out
    turbolens("features", "list", "up.0.1", "--filter", "mean > 1", "--order-by", "index", "--limit", "3")
    assert len(capsys.readouterr().out.splitlines()) == 4
    sent = fake.last(fs.ListFeaturesRequest)
    assert (sent.filter, sent.order_by) == ("mean > 1", "index")
    turbolens("features", "show", "up.0.1/5")
    shown = capsys.readouterr().out
    assert "night" in shown
    assert "a blue star" in shown


def test_a_refused_request_exits_with_2_and_no_traceback(turbolens, fake, capsys):
    bad = details.BadRequest(
        field_violations=[details.BadRequest.FieldViolation(field="seeds[0]", description="-1 must be at least 0")]
    )
    fake.on["Generate"] = lambda context: refuse(
        context, grpc.StatusCode.INVALID_ARGUMENT, "seeds[0]: -1 must be at least 0", bad
    )
    with pytest.raises(SystemExit) as caught:
        turbolens("generate", "x", "--seed", "-1")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "turbolens: seeds[0]: -1 must be at least 0\n"


def refused(capsys, *argv: str) -> tuple[int, str]:
    """The exit code of a command that fails, and its one line on stderr."""
    with pytest.raises(SystemExit) as caught:
        cli.main(list(argv))
    told = capsys.readouterr().err
    assert told.startswith("turbolens: ")
    assert told.count("\n") == 1
    return caught.value.code, told


@pytest.mark.parametrize(
    ("code", "argv", "says"),
    [
        (1, ["generate", "x", "--out", "/no/such/folder/a.png"], "/no/such/folder"),
        (1, ["generate", "x", "--edits", "/no/such/file.json"], "/no/such/file.json"),
        (2, ["generate", "x", "--out", "a.nonsense"], "nonsense"),
        (2, ["generate", "x", "--add", "up.0.1/3"], "BLOCK/INDEX=NUMBER"),
        (2, ["generate", "x", "--add", "up.0.1/3=much"], "much"),
        (2, ["generate", "x", "--mask", "0,0,1"], "LEFT,TOP,RIGHT,BOTTOM"),
        (2, ["generate", "x", "--edit-steps", "1"], "START,END"),
        (2, ["generate", "x", "--seeds", "1,x"], "such as 7,8 or 10-19"),
        (2, ["generate", "x", "--seeds", "1", "--seed", "1"], "not both"),
        (2, ["generate", "x", "--patch", "up.0.1"], "BLOCK=REFERENCE"),
        (2, ["generate", "x", "--reference", "a star"], "NAME=PROMPT"),
        (2, ["generate", "x", "--reference-seed", "other=3"], "no --reference has this name"),
        (2, ["generate", "x", "--edits", __file__], "--edits"),
        (2, ["extract", "x", "--k", "4"], "SAE=NUMBER"),
        (2, ["extract", "x", "--prefix", "up.0.1=many"], "SAE=NUMBER"),
        (2, ["features", "show", "up.0.1/99"], "0 to 15"),
    ],
)
def test_mistakes_are_one_line_and_told_from_failures(code, argv, says, running, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, told = refused(capsys, *argv, "--server", running.target)
    assert (found, says in told) == (code, True), told


def test_nobody_there_is_one_line(capsys):
    code, told = refused(capsys, "generate", "x", "--server", "localhost:1")
    assert code == 1
    assert "turbolens serve" in told


def test_who_reads_may_stop_reading(running):
    """`turbolens extract ... | head -1` is no error that anybody should see."""
    command = [sys.executable, "-m", "turbolens.cli", "extract", "x", "--server", running.target, "--top", "9999"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""


def test_several_seeds_are_several_files(turbolens, fake, tmp_path, capsys):
    turbolens("generate", "x", "--seeds", "7,9-10", "--out", str(tmp_path / "a.png"), "--json")
    assert list(fake.last(gs.GenerateRequest).run.seeds) == [7, 9, 10]
    made = [{"file": str(tmp_path / f"a-{seed}.png"), "seed": seed} for seed in (7, 9, 10)]
    assert json.loads(capsys.readouterr().out) == made
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-10.png", "a-7.png", "a-9.png"]
    turbolens("extract", "x", "--seeds", "7,8", "--json", "--top", "1")
    assert [run["seed"] for run in json.loads(capsys.readouterr().out)] == [7, 8]


def test_a_png_says_how_it_was_made(turbolens, tmp_path, capsys):
    file = tmp_path / "a.png"
    turbolens("generate", "a star, \u00e9toile", "--seed", "7", "--add", "up.0.1/1=8", "--out", str(file))
    capsys.readouterr()
    cli.main(["provenance", str(file)])
    told = capsys.readouterr().out
    assert "a star, \u00e9toile" in told
    assert "add('up.0.1/1', 8)" in told
    cli.main(["provenance", str(file), "--json"])
    assert tl.Provenance.from_json(capsys.readouterr().out) == tl.Provenance.from_png(file)
    jpeg = tmp_path / "a.jpg"
    turbolens("generate", "x", "--out", str(jpeg))
    capsys.readouterr()
    assert "no PNG" in refused(capsys, "provenance", str(jpeg))[1]
    Image.new("L", (2, 2)).save(file)
    assert refused(capsys, "provenance", str(file)) == (
        2, f"turbolens: {file}: holds no provenance; PNGs of finished pictures that TurboLens saved do\n",
    )  # fmt: skip


@pytest.mark.parametrize(
    "argv",
    [["features", "search", "blue"], ["features", "list", "up.0.1", "--limit", "2"], ["features", "show", "up.0.1/5"]],
)
def test_every_command_that_prints_prints_json(turbolens, argv, capsys):
    turbolens(*argv, "--json")
    told = json.loads(capsys.readouterr().out)
    rows = told if isinstance(told, list) else [told]
    assert all(row["ref"].startswith(("up.0.1/", "down.2.1/")) for row in rows)


def test_doctor(turbolens, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_gpu", lambda: "a GPU")
    turbolens("doctor")
    told = capsys.readouterr().out
    assert "serves fake on cpu" in told
    assert all(line.split()[0] in ("ok", "warn") for line in told.splitlines())
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctor", "--server", "localhost:1"])
    assert caught.value.code == 1
    assert " fail  no TurboLens server answers at localhost:1" in capsys.readouterr().out


def test_doctor_on_a_broken_torch(turbolens, capsys, monkeypatch):
    def broken():
        raise OSError("libcudart.so is missing")

    monkeypatch.setattr(doctor, "_gpu", broken)
    monkeypatch.setattr(doctor, "version", lambda package: "1.0")
    with pytest.raises(SystemExit) as caught:
        turbolens("doctor")
    assert caught.value.code == 1
    told = capsys.readouterr().out
    assert " fail  torch cannot be imported" in told
    assert "serves fake" in told  # and goes on to the rest


@pytest.mark.parametrize("command", ["serve", "train"])
def test_commands_of_other_packages_get_their_words_untouched(monkeypatch, command):
    seen = []

    class EntryPoint:
        def load(self):
            return seen.append

    asked = []
    monkeypatch.setattr(cli, "entry_points", lambda **query: asked.append(query) or [EntryPoint()])
    cli.main([command, "--help", "--model", "x y", "--"])
    assert asked == [{"group": "turbolens.commands", "name": command}]
    assert seen == [["--help", "--model", "x y", "--"]]


@pytest.mark.parametrize(("command", "extra"), [("serve", "server"), ("train", "training")])
def test_commands_that_are_missing_say_what_to_install(monkeypatch, capsys, command, extra):
    monkeypatch.setattr(cli, "entry_points", lambda **_: [])
    told = f"turbolens: {command} is not installed: pip install 'turbolens[{extra}]'\n"
    assert refused(capsys, command, "--help") == (1, told)


@pytest.mark.parametrize("late", [False, True])
def test_a_command_without_what_it_runs_on_says_so_in_one_line(monkeypatch, capsys, late):
    def missing(*_):
        raise ModuleNotFoundError("No module named 'scipy.stats'", name="scipy.stats")

    class EntryPoint:
        def load(self):
            return missing if late else missing()

    monkeypatch.setattr(cli, "entry_points", lambda **_: [EntryPoint()])
    told = "turbolens: train needs scipy.stats, which is not installed: pip install 'turbolens[training]'\n"
    assert refused(capsys, "train") == (1, told)


def test_a_module_of_ours_that_is_missing_is_a_fault_and_shows(monkeypatch):
    def missing():
        raise ModuleNotFoundError(name="turbolens_server.gone")

    class EntryPoint:
        load = staticmethod(missing)

    monkeypatch.setattr(cli, "entry_points", lambda **_: [EntryPoint()])
    with pytest.raises(ModuleNotFoundError):
        cli.main(["serve"])


def complete(*words: str) -> list[str]:
    """What bash offers for the last word."""
    code = """
source <({python} -m turbolens.cli completion bash)
turbolens() {{ {python} -m turbolens.cli "$@"; }}
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _turbolens; printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    quoted = " ".join(map(shlex.quote, ("turbolens", *words)))
    script = code.format(python=sys.executable, words=quoted)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_a_shell_completes_commands_and_flags():
    assert complete("gen") == ["generate", "generate-many"]
    assert complete("generate", "--re") == ["--reference", "--reference-seed", "--region", "--replace"]
    assert complete("features", "s") == ["search", "show"]
    assert complete("features", "list", "--or") == ["--order-by"]
    assert complete("serve", "--max-b") == ["--max-batch"]


@pytest.mark.parametrize(
    "command",
    [["generate"], ["extract"], ["features", "search"], ["features", "list"], ["features", "show"], ["doctor"]],
)
def test_help_teaches_by_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, "--help"])
    assert caught.value.code == 0
    assert "Example: turbolens" in capsys.readouterr().out


def test_references_and_what_reads_them_are_sent(turbolens, fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    turbolens(
        "generate", "a star", "--reference", "other=a blue ring = round", "--reference", "seeded=x",
        "--reference-seed", "seeded=3", "--patch", "up.0.1=other", "--transfer", "down.2.1/4=seeded", "--transfer",
        "8=other", "--multiplier", "2", "--mask", "0,0,.5,1",
    )  # fmt: skip
    sent = tl.Run.from_proto(fake.last(gs.GenerateRequest).run)
    where = tl.box(0, 0, 0.5, 1)
    assert sent.references == {"other": tl.reference("a blue ring = round"), "seeded": tl.reference("x", seed=3)}
    assert sent.steer == (
        tl.patch("up.0.1", "other", mask=where),
        tl.transfer("down.2.1/4", "seeded", multiplier=2, mask=where),
        tl.transfer(tl.choose(8), "other", multiplier=2, mask=where),
    )
