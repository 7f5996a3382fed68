"""What a start's benchmark makes of peaks of memory."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.start import _memory, memory_table


@pytest.mark.parametrize(("mib", "verdict"), [(70.0, "met"), (75.0, "met"), (76.0, "missed")])
def test_the_peak_is_held_to_three_quarters_of_that_before(mib, verdict):
    peaks = {"before": [100.0] * 6, "compiled": [mib] * 6, "torch": [110.0] * 6}
    before, compiled, torch = (_memory("first picture", name, peaks) for name in ("before", "compiled", "torch"))
    assert "ratio" not in before
    assert (compiled["verdict"], torch["verdict"]) == (verdict, None)
    rows = [
        {**row, "ratio": dataclasses.asdict(row["ratio"])} if "ratio" in row else row
        for row in (before, compiled, torch)
    ]
    lines = memory_table(rows).splitlines()
    assert lines[2] == "| first picture | before | 100 |  |  |  |"
    assert lines[3].startswith(f"| first picture | compiled | {mib:.0f} | {mib / 100:.3f} ")
    assert lines[3].endswith(f"| ≤ 0.75 | {verdict} |")
    assert lines[4].endswith("|  |  |")


def test_few_starts_decide_nothing():
    few = {"before": [100.0] * 2, "compiled": [10.0] * 2}
    assert _memory("first picture", "compiled", few)["verdict"] == "undecided"
