"""What is shipped of the features of `mini` does not contradict itself."""

from __future__ import annotations

import pytest

from turbolens_server.catalog.co_firing import read_co_firing
from turbolens_server.catalog.labels import read_labels

COLORS = ("red", "yellow", "green", "blue", "purple", "pink", "white", "black")


@pytest.mark.parametrize("sae", ["down.2.1", "mid.0", "up.0.0", "up.0.1"])
def test_statistics_and_examples_of_a_feature_agree(engine, sae):
    bundle = engine.info.saes[sae].bundle
    known = read_labels(bundle.folder, bundle.d_sae)
    for index in range(bundle.d_sae):
        largest = max((example.activation for example in known[index].examples), default=0.0)
        assert bundle.stats.max[index] == largest
        assert (bundle.stats.frequency[index] > 0) == (bundle.stats.mean[index] > 0) == bool(known[index].examples)


@pytest.mark.parametrize("sae", ["down.2.1", "mid.0", "up.0.0", "up.0.1"])
def test_what_fires_together_agrees_with_how_often_each_fires(engine, sae):
    """Two features fire at no larger a share of the positions where either does than the rarer's of the commoner's."""
    bundle = engine.info.saes[sae].bundle
    counted, frequency = read_co_firing(bundle.folder, bundle.d_sae), bundle.stats.frequency
    told = {(i, j): share for i in range(bundle.d_sae) for j, share in counted.of(i)}
    assert {i for i, _ in told} == {i for i in range(bundle.d_sae) if frequency[i] > 0}
    for (i, j), share in told.items():
        rarer, commoner = sorted((frequency[i], frequency[j]))
        assert 0 < share <= rarer / commoner + 1e-6
        assert told.get((j, i), share) == share
    assert all(i != j for i, j in told)


@pytest.mark.parametrize("value", [*COLORS, "plain", "striped"])
def test_every_color_and_texture_is_found_by_features_that_move_most_pictures_to_it(lens, value):
    found = lens.search_features(value)
    assert 1 <= len(found) <= 4  # and nothing that is only spelt alike, or near by meaning
    assert {match.feature.ref.sae for match in found} == {"up.0.0"}
    moved = [effect.moved for match in found for effect in match.feature.effects if effect.value == value]
    assert max(moved) >= (0.6 if value == "black" else 0.75)
    assert not lens.search_features(value, block="mid.0")  # moves nothing
