"""`turbolens catalog build` on an SAE of another project, on prompts: measured, and true of what is served."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from turbolens_server.catalog.labels import FeatureLabels, Label, read_labels, write_labels
from turbolens_server.engine.types import Job
from turbolens_server.files import hash_file
from turbolens_server.loading.hashes import hash_unet
from turbolens_server.loading.load import load_engine
from turbolens_server.sae.bundle import FeatureStats, SaeWeights, amend_bundle, load_bundle, save_bundle, save_stats
from turbolens_training.catalog import cli

D_SAE = 24


@pytest.fixture
def bundle(tmp_path: Path, tiny_folder: Path) -> Path:
    """As `turbolens sae import` makes one of a published folder: means, and nothing else known."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(D_SAE, 64, generator=generator), dim=1)
    unknown = np.zeros(D_SAE, np.float32)
    stats = FeatureStats(unknown + 7, unknown.copy(), unknown.copy(), np.zeros(0, np.int64), np.zeros(0, np.float32))
    folder = tmp_path / "saes" / "mid.0"
    save_bundle(
        folder, hook_point="mid.0", hook_module="mid_block.attentions.0", model_name="tiny",
        model_hash=hash_unet(tiny_folder), architecture="topk", k=3,
        weights=SaeWeights(rows.T.contiguous(), torch.zeros(D_SAE), rows, torch.zeros(64)), stats=stats, provenance={},
    )  # fmt: skip
    write_labels(folder, [FeatureLabels(4, "a cat", 0.8, (Label("label", "a cat", "", 0.8),))])
    return folder


def test_prompts_give_statistics_and_examples_and_labels_stay(bundle: Path, tiny_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red star\n\na blue ring on snow\na cat\nnothing at all\n  a green square \n")
    common = ["--model", str(tiny_folder), "--device", "cpu", "--work", str(tmp_path / "work")]
    cli.main(
        ["build", *common, "--saes", str(bundle.parent), "--prompts", str(prompts), "--batch", "2", "--steps", "1", "2"]
    )
    found = load_bundle(bundle)
    assert found.stats is not None
    assert (found.stats.mean == 7).all()  # strengths are told in the published means
    assert len(found.stats.update_rms) == 2
    assert found.stats.timesteps.tolist() == [999, 499]
    assert found.stats.frequency.sum() == pytest.approx(3, abs=0.01)
    assert found.provenance["catalog"] == {"prompts": "prompts.txt", "pictures": 5, "seed": 0, "means": "published"}
    known = read_labels(bundle, D_SAE)
    assert known[4].label == "a cat"
    assert len({example.prompt for feature in known.values() for example in feature.examples}) == 5

    # An example is true: the server, given its prompt, seed and steps, finds that activation at that place.
    engine = load_engine(model=str(tiny_folder), saes=[str(bundle.parent)])
    columns = engine.info.hook_points[0].grid(*engine.info.default_size)[1]
    for index, feature in list(known.items())[:6]:
        strengths = [example.activation for example in feature.examples]
        assert strengths == sorted(strengths, reverse=True)
        assert len({example.prompt for example in feature.examples}) == len(feature.examples)
        for example in feature.examples[:1]:
            job = Job(example.prompt, example.seed, example.steps, *engine.info.default_size, saes=("mid.0",))
            (result,) = engine.run([job])
            codes = next(codes for codes in result.features if codes.step == example.step)
            ends = codes.counts.cumsum()
            at = example.y * columns + example.x
            row = slice(int(ends[at] - codes.counts[at]), int(ends[at]))
            values = dict(zip(codes.indices[row].tolist(), codes.values[row].tolist(), strict=True))
            assert values[index] == pytest.approx(example.activation, rel=1e-3)


def test_captions_are_read_as_training_reads_them(bundle: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """A column of a table, without its null; no byte-order mark, and no line of CSV as a prompt."""
    (tmp_path / "a.csv").write_bytes('\ufeffid,text\n1,a cat\u2028asleep\n2,\n3,"a dog, running"\n'.encode())
    argv = ["build", "--model", str(tiny_folder), "--saes", str(bundle), "--work", str(tmp_path), "--steps", "1"]
    cli.main([*argv, "--prompts", f"{tmp_path / 'a.csv'}:text"])
    examples = [example for feature in read_labels(bundle, D_SAE).values() for example in feature.examples]
    assert {example.prompt for example in examples} == {"a cat\u2028asleep", "a dog, running"}
    assert load_bundle(bundle).provenance["catalog"] == {
        "prompts": "a.csv:text",
        "pictures": 2,
        "seed": 0,
        "means": "published",
    }
    with pytest.raises(SystemExit, match=r"a\.csv: say which column"):
        cli.main([*argv, "--prompts", str(tmp_path / "a.csv")])


def test_an_encoder_labels_and_is_named_in_the_provenance(
    bundle: Path, tiny_folder: Path, clip_folder: Path, tmp_path: Path
) -> None:
    prompts, words = tmp_path / "prompts.txt", tmp_path / "words.txt"
    prompts.write_text("".join(f"a {color} star number {i}\n" for i in range(3) for color in ("red", "blue")))
    words.write_text("red\nstar\nred\n")
    common = ["--model", str(tiny_folder), "--saes", str(bundle), "--prompts", str(prompts), "--steps", "1"]
    encoder = ["--encoder", str(clip_folder)]
    # So large a chance that random weights, too, find words.
    cli.main(["build", *common, *encoder, "--words", str(words), "--chance", "0.9"])
    known = read_labels(bundle, D_SAE)
    named = [row for row in known.values() if row.labels and row.labels[0].attribute == "zero-shot"]
    assert named
    assert {label.value for row in named for label in row.labels} <= {"red", "star"}
    assert all(row.label == row.labels[0].value and row.label_score == row.labels[0].score for row in named)
    assert all(row.examples for row in named)
    told = load_bundle(bundle).provenance["zero_shot"]
    assert told["encoder"] == clip_folder.name
    assert told["encoder_hash"] == hash_file(clip_folder / "model.safetensors")
    assert (told["words"], told["candidates"], told["labelled"]) == ("words.txt", 2, len(named))
    assert known[4].label in ("a cat", "red", "star")

    # Again without words: those of the prompts, so sure that nothing is found; what the encoder had named is gone.
    cli.main(["build", *common, *encoder, "--chance", "1e-300"])
    assert {row.label for row in read_labels(bundle, D_SAE).values()} <= {"", "a cat"}
    told = load_bundle(bundle).provenance["zero_shot"]
    assert (told["words"], told["labelled"]) == ("of the prompts", 0)
    assert told["candidates"] == len(["red", "star", "red star", "star number", "number", "blue", "blue star"])


def test_a_bundle_of_another_model_is_built_only_by_force_and_says_so(
    bundle: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    config = json.loads((bundle / "cfg.json").read_text())
    config["metadata"]["turbolens"]["model_hash"] = "another"
    (bundle / "cfg.json").write_text(json.dumps(config))
    (tmp_path / "prompts.txt").write_text("a red star\n")
    argv = ["build", "--model", str(tiny_folder), "--saes", str(bundle), "--prompts", str(tmp_path / "prompts.txt")]
    with pytest.raises(SystemExit, match="pass --force-sae"):
        cli.main(argv)
    cli.main([*argv, "--steps", "1", "--force-sae"])
    found = load_bundle(bundle)
    assert found.model_hash == "another"
    assert found.provenance["catalog"]["forced_on"] == hash_unet(tiny_folder)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--saes", "/nowhere"], "--saes /nowhere: no such file or folder"),
        (["--prompts", "/nowhere.txt"], "--prompts"),
        (["--images", "0"], "images=0"),
        (["--steps", "0"], "steps=(0,)"),
        (["--examples", "-1"], "examples=-1"),
        (["--model", "/nowhere"], "no such folder"),
        (["--encoder", "clip"], "needs prompts"),
        (["--prompts", "{prompts}", "--encoder", "/nowhere"], "--encoder /nowhere: no such folder"),
        (["--prompts", "{prompts}", "--encoder", "/nowhere", "--words", "/nowhere.txt"], "--words /nowhere.txt"),
        (["--prompts", "{prompts}", "--encoder", "/nowhere", "--examples", "2"], "examples=2"),
        (["--words", "words.txt"], "needs an encoder"),
        (["--chance", "1"], "chance=1.0"),
    ],
)
def test_what_cannot_be_built_says_why(
    argv: list[str], says: str, bundle: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("a cat")
    argv = [argument.format(prompts=tmp_path / "a.txt") for argument in argv]
    with pytest.raises(SystemExit) as caught:
        cli.main(["build", "--model", str(tiny_folder), "--saes", str(bundle), *argv])
    told = capsys.readouterr().err if caught.value.code == 2 else str(caught.value.code)  # 2: a setting, told by tyro
    assert says in told
    assert "Traceback" not in told


def test_only_bundles_are_built(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "saes" / "theirs").mkdir()
    (tmp_path / "saes" / "theirs" / "ae.pt").write_bytes(b"")
    with pytest.raises(SystemExit, match="sae import"):
        cli.main(["build", "--saes", str(bundle.parent)])


@pytest.mark.parametrize("scenes", [True, False])
def test_statistics_and_examples_are_of_the_same_passes(
    scenes: bool, bundle: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """Statistics from before, of other pictures, neither hide what the examples show nor forbid to add by the mean."""
    nothing = np.zeros(D_SAE, np.float32)
    save_stats(bundle, FeatureStats(nothing, nothing.copy(), nothing.copy(), np.array([999]), np.ones(1, np.float32)))
    (tmp_path / "prompts.txt").write_text("a red star\na blue ring on snow\na cat\n")
    prompts = [] if scenes else ["--prompts", str(tmp_path / "prompts.txt")]
    argv = ["build", "--model", str(tiny_folder), "--saes", str(bundle), "--work", str(tmp_path), *prompts]
    cli.main([*argv, "--images", "4", "--batch", "2", "--steps", "1", "2", "--effect-scenes", "0"])
    stats, known = load_bundle(bundle).stats, read_labels(bundle, D_SAE)
    assert stats is not None
    assert stats.max.max() > 0
    for index, feature in known.items():
        largest = max((example.activation for example in feature.examples), default=0.0)
        assert largest == stats.max[index]
        assert bool(feature.examples) == (stats.frequency[index] > 0) == (stats.mean[index] > 0)
        assert stats.mean[index] <= stats.max[index]


def test_published_means_are_kept_however_often_the_catalog_is_built(
    bundle: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a red star\n")
    argv = ["build", "--model", str(tiny_folder), "--saes", str(bundle), "--prompts", str(tmp_path / "prompts.txt")]
    for _ in range(2):
        cli.main([*argv, "--steps", "1"])
        found = load_bundle(bundle)
        assert found.stats is not None
        assert (found.stats.mean == 7).all()
        assert found.provenance["catalog"]["means"] == "published"


def test_labels_are_imported_by_the_same_command(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels.json").write_text(json.dumps([{"index": 2, "label": "a dog"}]))
    amend_bundle(bundle, {}, zero_shot={"encoder": "clip"})
    argv = ["import-labels", str(tmp_path / "labels.json"), "--sae", str(bundle), "--source", "x", "--licence", "MIT"]
    cli.main(argv)
    assert "1 labels of x" in capsys.readouterr().out
    assert read_labels(bundle, D_SAE)[2].label == "a dog"
    assert "zero_shot" not in load_bundle(bundle).provenance  # its labels were replaced
    with pytest.raises(SystemExit, match="no column"):
        cli.main([*argv, "--label", "name"])
    with pytest.raises(SystemExit):
        cli.main([*argv, "--assumed-score", "3"])
    assert "assumed_score=3.0" in capsys.readouterr().err
