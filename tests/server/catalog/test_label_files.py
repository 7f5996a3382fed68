"""Labels that others made: from any of their files into a bundle, or one line that says where the file is wrong."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import stat

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turbolens_server.catalog.config import ImportLabelsConfig
from turbolens_server.catalog.label_files import LabelFileError, import_labels
from turbolens_server.catalog.labels import Example, FeatureLabels, Label, read_labels, write_labels
from turbolens_server.catalog.search import nearness
from turbolens_server.files import WriteError
from turbolens_server.sae.bundle import BundleError, FeatureStats, SaeWeights, load_bundle, save_bundle, save_stats

D_SAE = 8
ROWS = [
    {"feature_id": 3, "label": "orange cat, face", "category": "animal", "confidence": "high", "block": "mid.0"},
    {"feature_id": 0, "label": "unlabeled", "category": "unknown", "confidence": "low", "block": "mid.0"},
    {"feature_id": 7, "label": "Bäume bei Nacht", "category": "background", "confidence": "low", "block": "mid.0"},
]
EXAMPLE = Example("a cat", 5, 1, 0, 2, 3, 1.5)


WEIGHTS = SaeWeights(torch.ones(4, D_SAE), torch.zeros(D_SAE), torch.ones(D_SAE, 4), torch.zeros(4))
STATS = FeatureStats(*(np.ones(D_SAE, np.float32) for _ in range(3)), np.array([999]), np.ones(1, np.float32))


def save(folder, weights, stats):
    save_bundle(
        folder, hook_point="mid.0", hook_module="mid_block.attentions.0", model_name=None, model_hash=None,
        architecture="topk", k=2, weights=weights, stats=stats, provenance={"kept": 1},
    )  # fmt: skip


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "mid.0"
    save(folder, WEIGHTS, None)
    write_labels(folder, [FeatureLabels(3, "old", 0.9, (Label("x", "old", "", 0.9),), (EXAMPLE,))])
    return folder


def test_other_weights_take_the_labels_and_statistics_of_the_old_ones_away(bundle):
    save(bundle, WEIGHTS, STATS)
    save(bundle, WEIGHTS, None)
    assert read_labels(bundle, D_SAE)[3].label == "old"
    assert load_bundle(bundle).stats is not None
    save(bundle, dataclasses.replace(WEIGHTS, b_enc=torch.ones(D_SAE)), None)
    assert read_labels(bundle, D_SAE) == {}
    assert load_bundle(bundle).stats is None


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("most", [0, 100, 400])
def test_a_full_disk_takes_nothing_of_a_bundle_away(bundle, tmp_path, full_disk, most):
    """Neither its labels, whatever of them would have fitted, nor its weights for half of others."""
    before = content(bundle)
    file = write(tmp_path / "a.json", ROWS)
    with full_disk(most), pytest.raises(WriteError, match=r"features\.parquet: cannot be written \(File too large"):
        import_labels(config(file, bundle))
    with full_disk(most), pytest.raises(WriteError, match=r"mid\.0: cannot be written"):
        save(bundle, dataclasses.replace(WEIGHTS, b_enc=torch.ones(D_SAE)), STATS)
    with full_disk(0), pytest.raises(WriteError, match=r"feature_stats\.safetensors: cannot be written"):
        save_stats(bundle, STATS)
    assert content(bundle) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "mid.0"]


def test_what_else_lies_in_a_bundles_folder_stays(bundle):
    (bundle / "README.md").write_text("ours")
    (bundle / "more").mkdir()
    (bundle / "more" / "file").write_text("too")
    save(bundle, dataclasses.replace(WEIGHTS, b_enc=torch.ones(D_SAE)), None)
    assert (bundle / "README.md").read_text() == "ours"
    assert (bundle / "more" / "file").read_text() == "too"


def test_whoever_the_umask_allows_may_read_a_bundle(tmp_path):
    before = os.umask(0o022)
    try:
        save(tmp_path / "mid.0", WEIGHTS, STATS)
        write_labels(tmp_path / "mid.0", [])
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "mid.0").iterdir()}
    assert len(modes) == 5
    assert set(modes.values()) == {0o644}
    assert stat.S_IMODE((tmp_path / "mid.0").stat().st_mode) == 0o755


@pytest.mark.parametrize(
    "name", ["cfg.json", "sae_weights.safetensors", "feature_stats.safetensors", "provenance.json"]
)
def test_a_cut_file_of_a_bundle_is_one_line_that_names_it(bundle, name):
    save(bundle, WEIGHTS, STATS)
    path = bundle / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BundleError, match=name) as caught:
        load_bundle(bundle)
    assert "\n" not in str(caught.value)


def write(path, rows):
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def config(file, bundle, **changes) -> ImportLabelsConfig:
    given = {"index": "feature_id", "source": "somebody/labels", "licence": "MIT", **changes}
    return ImportLabelsConfig(file=file, sae=bundle, **given)


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl", "parquet"])
def test_labels_of_every_kind_of_file_arrive(ending, bundle, tmp_path):
    file = write(tmp_path / f"labels.{ending}", ROWS)
    words = ("high=0.9", "medium=0.75", "low=0.6")
    count = import_labels(config(file, bundle, attribute="category", score="confidence", score_words=words))
    assert count == 2
    found = read_labels(bundle, D_SAE)
    assert list(found) == list(range(D_SAE))
    assert found[3].label == "orange cat, face"
    assert found[3].labels == (Label("animal", "orange cat, face", "", pytest.approx(0.9)),)
    assert found[3].examples == (EXAMPLE,)
    assert (found[0].label, found[0].labels) == ("", ())
    assert found[7].label == "Bäume bei Nacht"
    assert found[7].label_score == pytest.approx(0.6)
    provenance = load_bundle(bundle).provenance
    assert provenance["kept"] == 1
    assert {"source": "somebody/labels", "licence": "MIT", "file": file.name, "labelled": 2}.items() <= (
        provenance["labels"].items()
    )
    assert len(provenance["labels"]["file_hash"]) == 64


def test_null_is_no_label_and_no_attribute(bundle, tmp_path):
    rows = [{**ROWS[0], "category": None}, {**ROWS[2], "label": None}]
    assert import_labels(config(write(tmp_path / "a.parquet", rows), bundle, attribute="category")) == 1
    found = read_labels(bundle, D_SAE)
    assert found[3].labels[0].attribute == "label"
    assert found[7].label == ""
    assert load_bundle(bundle).provenance["labels"]["without_label"] == 1


def test_lines_of_json_end_at_line_breaks_alone(bundle, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"feature_id": 1, "label": "a", "note": "x\u2028y"}\r\n')
    assert import_labels(config(tmp_path / "a.jsonl", bundle)) == 1


@pytest.mark.parametrize(("column", "value"), [("label", 5), ("index", "3")])
def test_a_file_of_features_whose_types_are_others_is_refused(bundle, column, value):
    row = {"index": 3, "label": "a", "label_score": 0.5, "labels": [], "examples": [], column: value}
    pq.write_table(pa.Table.from_pylist([row]), bundle / "features.parquet")
    with pytest.raises(BundleError, match=rf"features\.parquet: unreadable \(column '{column}' is of \w+"):
        read_labels(bundle, D_SAE)


def test_without_scores_an_assumed_one_is_recorded(bundle, tmp_path):
    import_labels(config(write(tmp_path / "a.json", ROWS), bundle))
    assert read_labels(bundle, D_SAE)[3].label_score == 0.75
    assert load_bundle(bundle).provenance["labels"]["score"] == "assumed 0.75"


def test_rows_of_other_blocks_are_left_out(bundle, tmp_path):
    rows = [*ROWS, {**ROWS[0], "block": "up.0.1", "label": "not this"}, {**ROWS[0], "block": "x", "feature_id": 5119}]
    assert import_labels(config(write(tmp_path / "a.csv", rows), bundle, block="block")) == 2
    assert read_labels(bundle, D_SAE)[3].label == "orange cat, face"
    with pytest.raises(LabelFileError, match=r"no row for mid\.0"):
        import_labels(config(write(tmp_path / "b.csv", rows[-1:]), bundle, block="block"))


@pytest.mark.parametrize(
    ("rows", "changes", "says"),
    [
        ([{**ROWS[0], "feature_id": D_SAE}], {}, "row 1: index 8 is outside 0 to 7"),
        ([{**ROWS[0], "feature_id": -1}], {}, "index -1 is outside"),
        ([{**ROWS[0], "feature_id": 1.5}], {}, "index 1.5 is no whole number"),
        ([{**ROWS[0], "feature_id": "three"}], {}, "'three' is no whole number"),
        ([{**ROWS[0], "feature_id": True}], {}, "True is no whole number"),
        ([{**ROWS[0], "feature_id": None}], {}, "None is no whole number"),
        ([ROWS[0], ROWS[1], ROWS[0]], {}, "row 3: feature 3 has a row already"),
        (ROWS, {"index": "id"}, "no column 'id'; name one of feature_id, label, category.* with --index"),
        (ROWS, {"attribute": "kind"}, "no column 'kind'.*--attribute"),
        (ROWS, {"score": "confidence"}, "'high' is neither a number"),
        ([{**ROWS[0], "feature_id": "1_0"}], {}, "'1_0' is no whole number"),
        ([{**ROWS[0], "feature_id": "٣"}], {}, "'٣' is no whole number"),
        ([{**ROWS[0], "feature_id": 1e300}], {}, "outside 0 to 7"),
        ([{**ROWS[0], "feature_id": float("inf")}], {}, "inf is no whole number"),
        ([{**ROWS[0], "label": ["a", "b"]}], {}, r"row 1: label \"\['a', 'b'\]\" is no text"),
        ([{**ROWS[0], "label": 5}], {}, "label '5' is no text"),
        ([{**ROWS[0], "label": float("nan")}], {}, "label 'nan' is no text"),
        ([{**ROWS[0], "label": "two\nlines"}], {}, "is no text of one line"),
        ([{**ROWS[0], "label": "half \ud83d"}], {}, "is no text"),
        ([{**ROWS[0], "category": 3}], {"attribute": "category"}, "attribute '3' is no text"),
        ([{**ROWS[0], "block": 3}], {"block": "block"}, "block '3' is no text"),
        ([{**ROWS[0], "confidence": True}], {"score": "confidence"}, "True is neither"),
        ([{**ROWS[0], "confidence": None}], {"score": "confidence"}, "None is neither"),
        ([{**ROWS[0], "confidence": 0.3}], {"score": "confidence"}, "0.3 is neither"),
        ([{**ROWS[0], "confidence": float("nan")}], {"score": "confidence"}, "nan is neither"),
        ([], {}, "holds no row"),
        (["text"], {}, "row 1: a str, expected an object"),
        ({"3": "cat"}, {}, "holds a dict"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(rows, changes, says, bundle, tmp_path):
    before = (bundle / "features.parquet").read_bytes()
    with pytest.raises(LabelFileError, match=says) as caught:
        import_labels(config(write(tmp_path / "a.json", rows), bundle, **changes))
    assert "\n" not in str(caught.value)
    assert (bundle / "features.parquet").read_bytes() == before
    assert "labels" not in load_bundle(bundle).provenance


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"feature_id,label\n1\n", "fewer fields"),
        ("a.csv", b"feature_id,label\n1,a,b\n", "more or fewer"),
        ("a.csv", b'feature_id,label\n1,"a\n', "unreadable"),
        ("a.csv", b"feature_id,label,label\n1,a,b\n", "several columns are called 'label'"),
        ("a.csv", b"\xff\xfe\x00", "unreadable"),
        ("a.csv", b"", "holds no row"),
        ("a.json", b"[", "unreadable"),
        ("a.jsonl", b'{"a": 1}\n{', "unreadable"),
        ("a.parquet", b"PAR1", "unreadable"),
        ("a.txt", b"", "ending"),
    ],
)
def test_broken_files_are_one_line(name, content, says, bundle, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LabelFileError, match=says) as caught:
        import_labels(config(tmp_path / name, bundle))
    assert "\n" not in str(caught.value)
    with pytest.raises(LabelFileError, match="no such file"):
        import_labels(config(tmp_path / "nowhere.csv", bundle))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"assumed_score": 0.2}, "assumed_score"),
        ({"score_words": ("high",)}, "score_words"),
        ({"score_words": ("high=2",)}, "score_words"),
        ({"source": " "}, "source"),
        ({"licence": ""}, "licence"),
    ],
)
def test_settings_that_cannot_be_used(changes, says, bundle, tmp_path):
    with pytest.raises(ValueError, match=says):
        config(tmp_path / "a.csv", bundle, **changes)


@settings(max_examples=30)
@given(content=st.binary(max_size=60), ending=st.sampled_from(["csv", "json", "jsonl", "parquet"]))
def test_hostile_files_never_raise_anything_else(content, ending, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    weights = SaeWeights(torch.ones(4, D_SAE), torch.zeros(D_SAE), torch.ones(D_SAE, 4), torch.zeros(4))
    save_bundle(
        folder / "mid.0", hook_point="mid.0", hook_module="mid_block.attentions.0", model_name=None, model_hash=None,
        architecture="topk", k=2, weights=weights, stats=None, provenance={},
    )  # fmt: skip
    (folder / f"a.{ending}").write_bytes(content)
    with pytest.raises(LabelFileError):
        import_labels(config(folder / f"a.{ending}", folder / "mid.0"))


def test_labels_of_several_words_are_found_by_any_of_them():
    def near(query: str, value: str) -> float:
        return nearness(query.split(), value, {}, 0.0).score

    assert near("orange cat face", "orange cat face") == 1
    assert near("cat", "cat") == 1
    assert 1 > near("cat", "orange cat face") > near("ora", "orange cat face") > near("orenge", "orange cat face") > 0
    assert near("dog", "orange cat face") == 0
    assert np.isclose(nearness(["azure"], "sky blue", {"sky blue": ["azure"]}, 0.0).score, 1)


def test_nothing_is_guessed_of_words_that_labels_have():
    assert nearness(["night"], "right", {}, 0.9).how == "spelling"
    assert nearness(["night"], "right", {}, 0.9, frozenset({"night", "right"})).score == 0
    half = nearness(["red", "sqare"], "square", {}, 0.0, frozenset({"red", "square"}))
    assert (half.how, half.score > 0) == ("spelling", True)
