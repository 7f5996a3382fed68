"""The page of results says what the results say, and nothing else on it moves."""

from __future__ import annotations

import json

import pytest

from benchmarks.places import DOCS
from benchmarks.report import marked, rewrite, section
from turbolens_server.bench.results import assemble
from turbolens_server.bench.timing import Aim, Contender, compare

PAGE = "before\n<!-- result a -->\nold\n<!-- end -->\nbetween\n<!-- result b -->\nold\n<!-- end -->\nafter\n"


def result() -> dict:
    contenders = [Contender("base", object), Contender("ours", object, {"base": Aim(ratio=1.03, added_ms=3)})]
    rows = compare(contenders, {"base": [10.0] * 6, "ours": [10.1, 10.2] * 3})
    case = {"label": {"pictures": 1}, "rows": rows, "pictures_per_s": {"base": 100.0, "ours": 99.0}}
    return assemble("many_callers", 6, [case])


def test_only_what_lies_between_the_marks_is_rewritten():
    assert marked(PAGE) == ["a", "b"]
    changed = rewrite(PAGE, {"b": "new"})
    assert changed == PAGE.replace("<!-- result b -->\nold", "<!-- result b -->\n\nnew\n")
    assert rewrite(changed, {"b": "new"}) == changed


def test_a_result_without_a_place_is_refused():
    with pytest.raises(ValueError, match="no marks for c"):
        rewrite(PAGE, {"c": "new"})


def test_a_section_holds_table_machine_and_plot(tmp_path):
    (tmp_path / "callers.json").write_text(json.dumps(result()))
    text = section("callers", tmp_path, tmp_path / "plots")
    assert "| 1 | ours | 10.2 | base | 1.015 (1.010 to 1.020) | 0.1 (0.1 to 0.2) | ≤ 1.03 or 3 ms | met |" in text
    assert "6 interleaved rounds" in text
    assert "base 100.0 pictures/s" in text
    plot = (tmp_path / "plots" / "callers.svg").read_bytes()
    assert b"ours / base" in plot
    section("callers", tmp_path, tmp_path / "plots")
    assert (tmp_path / "plots" / "callers.svg").read_bytes() == plot, "the same result must give the same file"


def test_each_way_to_code_a_picture_is_told_by_time_and_size(tmp_path):
    rows = compare([Contender("PNG", object), Contender("raw", object)], {"PNG": [4.0] * 6, "raw": [1.0] * 6})
    case = {"label": {"pictures": "drawn", "size": "8x8"}, "of": 4, "rows": rows, "kb": {"PNG": 1.25, "raw": 3.0}}
    (tmp_path / "coding.json").write_text(json.dumps(assemble("coding", 6, [case])))
    text = section("coding", tmp_path, tmp_path)
    assert "| drawn | 8x8 | PNG | 1.00 | 1.2 |\n| drawn | 8x8 | raw | 0.25 | 3.0 |" in text


def test_stages_are_told_by_number_of_pictures(tmp_path):
    rows = [compare([Contender("U-Net", object)], {"U-Net": [ms] * 6}) for ms in (15.0, 60.0)]
    cases = [{"label": {"pictures": n, "steps": 1}, "rows": each} for n, each in zip((1, 8), rows, strict=True)]
    (tmp_path / "stages.json").write_text(json.dumps(assemble("stages", 6, cases, backend="torch")))
    text = section("stages", tmp_path, tmp_path)
    assert "| stage, ms | 1 pictures | 8 pictures |" in text
    assert "| U-Net | 15.0 | 60.0 |" in text


def test_what_was_not_measured_is_said_to_be_so(tmp_path):
    assert section("nothing", tmp_path, tmp_path) == "Not measured yet."


def test_the_page_has_a_place_for_every_result_that_make_writes():
    expected = {"nothing_asked", "mini-cpu", "many_callers", "served", "references", "sdxl-turbo-gpu", "sdxl-turbo-cpu"}
    expected |= {"many_callers-gpu", "kernels", "train_beside_saelens", "train_beside_published", "start"}
    expected |= {"coding", "stages"}
    assert set(marked((DOCS / "performance.md").read_text())) == expected
    assert marked((DOCS / "studio.md").read_text()) == ["live_painting"]
