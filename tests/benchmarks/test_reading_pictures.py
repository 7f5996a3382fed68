"""The measures of features read from pictures, beside SciPy's, and that the page shows what was measured."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import spearmanr

from benchmarks.from_pictures import overlap, rank_correlation, to_markdown
from benchmarks.places import DOCS, RESULTS

few = hnp.arrays(np.float64, 12, elements=st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0]))


@given(few, few)
def test_rank_correlation_is_scipys_over_what_is_active(one, other):
    active = (one > 0) | (other > 0)
    if len({*one[active]}) < 2 or len({*other[active]}) < 2:
        return  # it has none
    assert rank_correlation(one, other) == pytest.approx(spearmanr(one[active], other[active]).statistic)


def test_overlap_counts_what_is_among_the_strongest_of_both():
    one = np.array([5.0, 4, 3, 0, 0])
    assert overlap(one, one, 3) == 1
    assert overlap(one, one[::-1], 3) == pytest.approx(1 / 3)


def test_the_page_shows_what_was_measured():
    told = json.loads((RESULTS / "from_pictures.json").read_text())
    assert to_markdown(told) in (DOCS / "evaluation.md").read_text()
