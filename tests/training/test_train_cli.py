from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from diffusers import LCMScheduler
from transformers import CLIPTokenizer

from turbolens_server.catalog.labels import read_labels
from turbolens_server.engine.types import Job
from turbolens_server.engine.walk import Walk
from turbolens_server.loading.errors import LoadError
from turbolens_server.loading.hub import embedded_model, embedded_saes
from turbolens_server.loading.load import load_engine
from turbolens_server.loading.places import EMBEDDED_SAES
from turbolens_training import cli
from turbolens_training.activations import sources
from turbolens_training.catalog import cli as catalog
from turbolens_training.evaluation import dose, evaluate, riebench
from turbolens_training.sae import train
from turbolens_training.sae.config import Gates, SaeConfig


def test_sae_labels_and_dose_from_the_command_line(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole chain at its smallest; what comes out is served."""
    saes, work = tmp_path / "saes", tmp_path / "work"
    common = ["--model", str(tiny_folder), "--work", str(work), "--device", "cpu"]
    small = "--d-sae 64 --k 4 --steps 12 --batch 64 --images 4 --reservoir 128 --held-out-chunks 3 --warm-up 2"
    train = ["sae", *common, "--out", str(saes), *small.split(), "--one-step-share", "0.5"]
    with pytest.raises(SystemExit, match=r"not exported: down.2.1: explained variance.*--allow-below-gates"):
        cli.main(train)
    assert not saes.exists()
    cli.main([*train, "--allow-below-gates"])  # goes on from the checkpoint: trained already
    told = capsys.readouterr().out
    assert f"4 SAEs are in {saes}; held-out pictures of captioned scenes" in told
    assert f"turbolens catalog build --model {tiny_folder} --sae {saes}" in told
    assert f"turbolens serve --model {tiny_folder} --sae {saes}" in told
    catalog.main(
        ["build", *common, "--saes", str(saes), "--images", "32", "--least-active", "2", "--effect-scenes", "0"]
    )
    assert f"{saes / 'mid.0'}: statistics and examples of 64 features" in capsys.readouterr().out
    dose = ["--model", str(tiny_folder), "--device", "cpu", "--saes", str(saes), "--out", str(work / "dose"), "--json"]
    fast = ["--scenes", "2", "--choice-scenes", "2", "--singles", "1", "--strengths", "0", "8"]
    cli.main(["dose", *dose, *fast, "--concepts", "color=blue", "background=night"])

    told = json.loads(capsys.readouterr().out)
    assert told["table"] == str(work / "dose" / "dose.md")
    assert {row["strength"] for row in told["curves"]} <= {0.0, 8.0}
    engine = load_engine(model=str(tiny_folder), saes=[str(saes)])
    assert list(engine.info.saes) == [point.name for point in engine.info.hook_points]
    for name, info in engine.info.saes.items():
        assert info.bundle.k == 4
        assert info.bundle.model_hash == engine.info.model_hash
        assert info.bundle.provenance["recipe"]["d_sae"] == 64
        assert info.bundle.provenance["metrics"][0]["block"] == name
        assert info.bundle.provenance["synonyms"]["plain"] == ["solid"]
        assert "explained variance" in info.bundle.provenance["gates"]["below"][0]
        assert info.bundle.provenance["gates"]["thresholds"]["dead"] == Gates().dead
        assert not {"gates", "allow_below_gates"} & info.bundle.provenance["recipe"].keys()
        assert str(tmp_path) not in json.dumps(info.bundle.provenance)
        assert info.bundle.stats is not None
        known = read_labels(saes / name, 64)
        assert len(known) == 64
        assert any(feature.examples for feature in known.values())
    (result,) = engine.run([Job("a star", 0, 1, *engine.info.default_size, saes=tuple(engine.info.saes))])
    assert result is not None
    assert all(codes.counts.max() <= 4 for codes in result.features)
    assert {path.name for path in work.iterdir()} >= {"state.pt", "quality.md", "labels.json", "dose"}
    rows = json.loads((work / "dose" / "dose.json").read_text())
    assert {row["strength"] for row in rows} <= {0.0, 8.0}
    assert {path.name for path in saes.iterdir()} == set(engine.info.saes)


def test_bundles_of_an_earlier_run_are_replaced_only_by_name(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saes, work = tmp_path / "saes", tmp_path / "work"
    small = "--d-sae 32 --k 4 --steps 3 --batch 32 --images 4 --reservoir 64 --held-out-chunks 1 --allow-below-gates"
    train = ["sae", "--model", str(tiny_folder), "--hook-points", "mid.0", "--device", "cpu", "--out", str(saes)]
    train += small.split()
    cli.main([*train, "--work", str(work), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["saes"] == str(saes)
    assert {row["block"] for row in told["quality"]} == {"mid.0"}
    weights = saes / "mid.0" / "sae_weights.safetensors"
    first = weights.read_bytes()
    other = [*train, "--work", str(tmp_path / "other"), "--seed", "1"]
    for argv in (other, [*other, "--resume"], [*train, "--work", str(work)]):  # there is nothing to resume in `other`
        with pytest.raises(SystemExit, match=r"holds SAEs of an earlier run \(mid.0\).*--overwrite.*--resume"):
            cli.main(argv)
        assert weights.read_bytes() == first
    cli.main([*train, "--work", str(work), "--resume"])
    assert weights.read_bytes() == first
    cli.main([*train, "--work", str(work), "--seed", "1", "--overwrite"])  # anew, though `work` holds another run
    assert weights.read_bytes() != first
    with pytest.raises(SystemExit):
        cli.main([*train, "--overwrite", "--resume"])


def test_settings_come_from_a_file_and_flags_come_on_top(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[object] = []
    monkeypatch.setattr(cli, "run", ran.append)
    file = tmp_path / "saes.yaml"
    file.write_text("architecture: matryoshka\nk: 6\nnested_k: [2, 8]\nprefixes: [32, 128]\nlearning-rate: 1.0e-3\n")
    cli.main(["sae", "--config", str(file), "--k", "5", "--work", str(tmp_path)])
    expected = SaeConfig(
        architecture="matryoshka", k=5, nested_k=(2, 8), prefixes=(32, 128), learning_rate=1e-3, work=tmp_path
    )
    assert ran == [expected]
    file.write_text(
        "gates: {dead: 0.1, norm_tolerance: 1.0e-2}\nallow_below_gates: true\nmulti_steps: [4]\ncache: null\n"
    )
    cli.main(["sae", f"--config={file}", "--gates.dead", "0.2"])
    file.write_text("allow_below_gates: false\n")
    cli.main(["sae", f"--config={file}"])
    cli.main(["sae", f"--config={file}", "--allow-below-gates"])
    gates = Gates(dead=0.2, norm_tolerance=1e-2)
    assert ran[1:] == [
        SaeConfig(gates=gates, allow_below_gates=True, multi_steps=(4,)),
        SaeConfig(),
        SaeConfig(allow_below_gates=True),
    ]
    for text, message in (("d_sea: 3", "d-sea"), ("k: many", "many"), ("k: 0", "k=0"), ("- k", "expected a mapping")):
        file.write_text(text)
        with pytest.raises(SystemExit) as stopped:
            cli.main(["sae", "--config", str(file)])
        assert message in f"{stopped.value} {''.join(capsys.readouterr())}"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("mini", "sae", "sweep", "dose", "eval", "riebench", "rebuild"))


@pytest.mark.parametrize(
    ("command", "module", "expected"),
    [
        ("sae --variant fp16", sources, {"variant": "fp16"}),
        ("sweep --variant fp16", sources, {"variant": "fp16"}),
        ("cache fill --variant fp16", sources, {"variant": "fp16"}),
        ("dose --variant fp16 --force-sae", dose, {"variant": "fp16", "force_sae": True}),
        ("eval --variant fp16 --force-sae", evaluate, {"variant": "fp16", "force_sae": True}),
        ("riebench --items items.json --variant fp16 --force-sae", riebench, {"variant": "fp16", "force_sae": True}),
        ("eval", evaluate, {"variant": None, "force_sae": False}),
    ],
)
def test_every_command_takes_the_weight_files_and_saes_that_are_served(
    command: str, module: ModuleType, expected: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(**arguments: object) -> None:
        assert expected.items() <= arguments.items()
        raise LoadError("asked for as expected")

    monkeypatch.setattr(module, "load_engine", load)
    monkeypatch.chdir(tmp_path)
    Path("runs/sae/bundles").mkdir(parents=True)
    item = {"id": "1", "editing_type_id": 6, "original_prompt": "a star", "editing_prompt": "a blue star"}
    Path("items.json").write_text(json.dumps([item]))
    with pytest.raises(SystemExit, match="asked for as expected"):
        cli.main(command.split())


def test_a_bad_model_is_one_line() -> None:
    with pytest.raises(SystemExit, match="turbolens train: "):
        cli.main(["sae", "--model", "/nowhere", "--device", "cpu"])


def test_a_null_in_the_file_of_settings_is_named(tmp_path: Path) -> None:
    """As text it would be prompts from a file called None."""
    (tmp_path / "a.yaml").write_text("prompts: null\n")
    with pytest.raises(SystemExit, match="prompts is null"):
        cli.main(["sae", "--config", str(tmp_path / "a.yaml")])


@pytest.mark.parametrize(
    "command",
    [
        ["mini", "--out", "{}"], ["sae", "--out", "{}"], ["sae", "--work", "{}"], ["sae", "--cache", "{}"],
        ["sweep", "--work", "{}"], ["sweep", "--out", "{}"], ["cache", "fill", "--cache", "{}"],
        ["cache", "import-tars", ".", "--cache", "{}"], ["dose", "--out", "{}"], ["eval", "--out", "{}"],
        ["riebench", "--items", "items.csv", "--out", "{}"], ["rebuild", "--docs", "{}"], ["build", "--work", "{}"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_where_nothing_can_be_written_is_told_before_the_work(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    main = catalog.main if command[0] == "build" else cli.main
    with pytest.raises(SystemExit, match="file/below: cannot be written"):
        main([part.format(tmp_path / "file/below") for part in command])


def test_steps_that_the_models_sampler_cannot_take_are_told_before_the_first_picture(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model, copy_function=os.link)
    for file in (model / "scheduler/scheduler_config.json", model / "model_index.json"):
        text = file.read_text()
        file.unlink()
        file.write_text(text.replace("EulerDiscreteScheduler", "LCMScheduler"))
    LCMScheduler(original_inference_steps=10).save_pretrained(model / "scheduler")
    monkeypatch.setattr(Walk, "step", None)
    with pytest.raises(SystemExit, match="LCMScheduler cannot take 11 steps"):
        cli.main(["sae", "--model", str(model), "--multi-steps", "2", "11", "--work", str(tmp_path / "work")])


@pytest.mark.parametrize(
    ("command", "refused"),
    [
        ("sae --prompts nowhere.txt", "no such file or folder"),
        ("sweep --prompts nowhere.txt", "no such file or folder"),
        ("cache fill --prompts nowhere.txt", "no such file or folder"),
        ("sae --shards nowhere", "nowhere"),
        ("sae --shards runs --prompts a.txt", "shards is all the data"),
        ("sweep --splice-scenes 0", "splice_scenes=0"),
        ("cache fill --chunks 0", "chunks=0"),
        ("dose --concepts shape=cow", "no such concept: shape=cow"),
        ("dose --scenes 0", "scenes=0"),
        ("dose --strengths 4", "strengths=(4.0,), expected 0"),
        ("eval --concepts shape=cow", "no such concept: shape=cow"),
        ("eval --parts quality cows", "no cows"),
        ("eval --parts quality --prompts nowhere.txt", "no such file or folder"),
        ("eval --batch 0", "batch=0"),
        ("eval --features 4 0", "features="),
        ("riebench --items items.json --limit 0", "limit=0"),
        ("riebench --items items.json", "items.json"),
    ],
)
def test_what_the_settings_alone_say_is_told_before_the_model_is_loaded(
    command: str, refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (sources, dose, evaluate, riebench):
        monkeypatch.setattr(module, "load_engine", None)
    monkeypatch.chdir(tmp_path)
    Path("runs/sae/bundles").mkdir(parents=True)
    with pytest.raises(SystemExit) as ended:
        cli.main(command.split())
    told = f"{ended.value} {capsys.readouterr().err}".replace("│", "")
    assert refused in " ".join(told.split())


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("sae --k 0 --batch 0 --gates.dead 2", ["gates.dead=2.0"]),  # a group of settings comes first
        ("sae --k 0 --steps 0 --architecture topk --run-steps 3", ["k=0", "steps=0", "run_steps is a setting of"]),
        ("sweep --splice-scenes 0 --points topk:5", ["splice_scenes=0", "points: 'topk:5'"]),
        ("dose --scenes 0 --strengths 4", ["scenes=0", "strengths=(4.0,)"]),
        ("sae --model ./no --prompts ./nowhere.txt", ["--model ./no", "--prompts ./nowhere.txt"]),
        (
            "eval --model ./no --sae no --prompts ./nowhere.txt",
            ["--model ./no", "--saes no", "--prompts ./nowhere.txt"],
        ),
        ("riebench --items i.json --sae ./a --masks m", ["--sae ./a", "--items i.json", "--masks m"]),
        ("cache verify nowhere", ["--path nowhere"]),
        ("build --model ./no --sae no --images 0", ["images=0"]),
        ("build --model ./no --sae no --prompts ./no.txt", ["--model ./no", "--saes no", "--prompts ./no.txt"]),
    ],
)
def test_all_that_is_wrong_is_told_at_once_and_without_torch(command: str, says: list[str], tmp_path: Path) -> None:
    main = "catalog.cli" if command.startswith("build") else "cli"
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('torch' in sys.modules))\n"
        f"from turbolens_training.{main} import main; main({command.split()!r})"
    )
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=tmp_path)
    told = " ".join(ended.stderr.replace("│", "").split())
    assert all(line in told for line in says), told
    assert ended.stdout == "False\n"
    assert ended.returncode in (1, 2)
    assert "Traceback" not in told


def test_a_rebuild_checks_all_of_its_steps_before_the_first(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "train_saes", None)
    folders = [part for name in ("saes", "work", "docs") for part in (f"--{name}", str(tmp_path / name))]
    with pytest.raises(SystemExit, match="scenes=0, expected at least 1"):
        cli.main(["rebuild", "--model", str(tiny_folder), "--scenes", "0", *folders])


def test_a_rebuild_makes_every_set_that_ships(tmp_path: Path) -> None:
    config = cli.RebuildConfig(saes=tmp_path / "models/mini-saes", work=tmp_path / "work", steps=2000)
    made = cli.beside(config, config.work)
    assert [training.out.name for training, _ in made] == list(EMBEDDED_SAES[1:])
    for training, catalog_of_set in made:
        assert training.out == catalog_of_set.saes == tmp_path / "models" / training.out.name
        assert training.overwrite
        assert training.steps <= 2000


def test_folders_of_other_seeds_are_looked_for_before_the_first_part(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "PARTS", {"quality": None, "stability": None})
    folders = f"--saes {embedded_saes()} --seeds {tmp_path / 'nowhere'} --out {tmp_path / 'out'}"
    with pytest.raises(SystemExit, match=r"nowhere has no bundle of .*up\.0\.1"):
        cli.main(f"eval {folders} --parts quality stability".split())


@pytest.mark.parametrize("command", ["eval --parts quality splice", "dose", "build --effect-scenes 0"])
def test_what_is_measured_against_the_truth_refuses_models_that_have_none(command: str, tmp_path: Path) -> None:
    """One of another vocabulary reads other captions; its pictures would be scored as if they were scenes."""
    saes = shutil.copytree(embedded_saes(), tmp_path / "saes")
    model = shutil.copytree(embedded_model(), tmp_path / "other")
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(model / "tokenizer")
    before = {path: path.read_bytes() for path in saes.rglob("*") if path.is_file()}
    main = catalog.main if command.startswith("build") else cli.main
    out = ["--work" if command.startswith("build") else "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="other: what is measured here needs a model that draws"):
        main([*command.split(), "--model", str(model), "--sae", str(saes), *out])
    assert {path: path.read_bytes() for path in saes.rglob("*") if path.is_file()} == before
