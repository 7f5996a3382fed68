"""What is said of times: medians, intervals, verdicts, and turns taken fairly."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbolens_server.bench.timing import Aim, Contender, Estimate, compare, estimate, interleave, judge

samples = st.lists(st.floats(0.1, 1e4), min_size=1, max_size=30)


@given(samples)
def test_the_interval_holds_the_median_and_lies_within_the_samples(values):
    found = estimate(values)
    assert found.median == pytest.approx(statistics.median(values))
    assert min(values) <= found.low <= found.median <= found.high <= max(values)


@given(samples, st.floats(0.01, 100))
def test_an_estimate_scales_with_its_samples(values, factor):
    found, scaled = estimate(values), estimate([factor * value for value in values])
    for name in ("median", "low", "high"):
        assert getattr(scaled, name) == pytest.approx(factor * getattr(found, name))


def test_the_interval_is_that_of_resampling_by_hand():
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6, 5.3]
    rng = np.random.default_rng(7)
    medians = sorted(statistics.median(rng.choice(values, len(values)).tolist()) for _ in range(20_000))
    found = estimate(values)
    assert found.low == pytest.approx(medians[500], abs=0.3)
    assert found.high == pytest.approx(medians[19_500], abs=0.3)


def test_the_interval_covers_the_true_median_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = [found.low <= 1 <= found.high for found in (estimate(rng.normal(1, 0.1, 25).tolist()) for _ in range(200))]
    assert 0.88 <= np.mean(hits) <= 0.99


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="no samples"):
        estimate([])


@pytest.mark.parametrize(
    ("ratio", "added", "aim", "verdict"),
    [
        ((1.00, 0.98, 1.02), (0, 0, 0), Aim(), None),
        ((1.00, 0.98, 1.02), (0, 0, 0), Aim(ratio=1.03), "met"),
        ((1.00, 0.98, 1.04), (0, 0, 0), Aim(ratio=1.03), "undecided"),
        ((1.06, 1.04, 1.08), (0, 0, 0), Aim(ratio=1.03), "missed"),
        ((1.06, 1.04, 1.08), (2, 1, 2.5), Aim(ratio=1.03, added_ms=3), "met"),
        ((1.06, 1.04, 1.08), (4, 2, 5), Aim(ratio=1.03, added_ms=3), "undecided"),
        ((1.06, 1.04, 1.08), (4, 3.5, 5), Aim(ratio=1.03, added_ms=3), "missed"),
    ],
)
def test_a_verdict_needs_the_whole_interval(ratio, added, aim, verdict):
    assert judge(Estimate(*ratio), Estimate(*added), aim, 6) == verdict
    assert judge(Estimate(*ratio), Estimate(*added), aim, 5) == (verdict and "undecided")


def test_ratios_are_taken_within_rounds():
    contenders = [Contender("base", object), Contender("other", object, {"base": Aim(2.5)})]
    # A slow second round hits both: paired, the ratio is 2 in every round.
    rows = compare(contenders, {"base": [10.0, 100.0, 10.0] * 2, "other": [20.0, 200.0, 20.0] * 2})
    (found,) = rows[1].comparisons
    assert (found.ratio.low, found.ratio.median, found.ratio.high) == (2, 2, 2)
    assert (found.added_ms.median, found.verdict) == (10, "met")
    assert rows[1].ms == (20.0, 200.0, 20.0) * 2
    assert rows[0].comparisons == ()


def test_everyone_runs_once_a_round_and_begins_in_turn():
    order: list[str] = []
    settled: list[int] = []
    contenders = [Contender(name, lambda name=name: order.append(name)) for name in "abc"]
    times = interleave(contenders, 3, settle=lambda: settled.append(len(order)))
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(ms) for name, ms in times.items()} == {"a": 3, "b": 3, "c": 3}
    # Waited for before and after each timed run.
    assert settled == [n for ran in range(3, 12) for n in (ran, ran + 1)]


def test_contenders_need_names_of_their_own():
    with pytest.raises(ValueError, match="names of their own"):
        interleave([Contender("a", object), Contender("a", object)], 1)
