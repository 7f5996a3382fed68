"""The simulated fleet: where theory has a formula, where a hand can follow, and what must hold of any load."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks.fleet.simulation import Curve, Fleet, Request, plan, poisson, simulate
from benchmarks.places import RESULTS
from benchmarks.rehearsal.prometheus import decide

STEADY = Curve((1, 8), (0.08, 0.32), (0.02, 0.08))
"""A batch of one takes .1 s, of eight .4 s."""


def latencies(fleet: Fleet, *requests: tuple[float, int]) -> list[float]:
    return simulate(fleet, [Request(*one) for one in requests]).latencies_s.round(6).tolist()


@pytest.mark.parametrize("busy", [0.5, 0.8])
def test_one_server_without_batches_waits_as_pollaczek_and_khinchine_say(busy):
    """Independent arrivals, a fixed time each: the mean wait is busy x time / (2 (1 - busy))."""
    done = simulate(Fleet(STEADY, 1, max_batch=1, max_queue=10**6), poisson(busy / 0.1, 4_000, 0))
    assert done.latencies_s.mean() == pytest.approx(0.1 + busy * 0.1 / (2 * (1 - busy)), rel=0.05)
    assert done.busy == pytest.approx(busy, rel=0.03)


def test_a_hand_can_follow_it():
    alone = Fleet(STEADY, 1, batch_wait_s=0)
    assert latencies(alone, (0.0, 1)) == [0.1]
    # The second and third come while the first runs, and run together: .1 + (.14286 x 3/4 + ...) by the curve.
    together = sum(STEADY.stages(2))
    assert latencies(alone, (0.0, 1), (0.05, 1), (0.06, 1)) == pytest.approx([0.1, 0.05 + together, 0.04 + together])
    # Two servers in turns: nobody waits.
    assert latencies(dataclasses.replace(alone, servers=2), (0.0, 1), (0.05, 1)) == [0.1, 0.1]
    # A call of eight pictures is one batch.
    assert latencies(alone, (0.0, 8)) == [0.4]
    assert latencies(dataclasses.replace(alone, overhead_s=0.01), (0.0, 8)) == [0.41]


def test_two_stages_overlap_where_there_is_a_gpu():
    curve = dataclasses.replace(STEADY, pipelined=True)
    fleet = Fleet(curve, 1, max_batch=1, max_queue=10**6)
    # The second is denoised while the first is decoded: it ends .08 after it.
    assert latencies(fleet, (0.0, 1), (0.0, 1)) == pytest.approx([0.1, 0.18])
    done = simulate(fleet, [Request(0.0, 1) for _ in range(500)])
    assert 500 / done.latencies_s.max() == pytest.approx(curve.pictures_per_s(1), rel=0.01)


@pytest.mark.parametrize("policy", ["round robin", "random", "least loaded", "one queue"])
@pytest.mark.parametrize("pictures", [1, 5, 16])
def test_every_call_is_answered_once_or_refused_whatever_is_lost(policy, pictures):
    fleet = Fleet(STEADY, 3, policy, max_queue=20, cold_start_s=7.0, losses=(5.0, 6.0, 30.0, 31.0, 32.0))
    requests = poisson(40 / pictures, 60.0, 3, pictures)
    done = simulate(fleet, requests)
    assert len(done.latencies_s) + done.refused == len(requests)
    assert done.sent_again > 0
    assert done.latencies_s.min() >= sum(STEADY.stages(1)) - 1e-9
    assert all((one.done is None) == one.refused for one in requests)


def test_with_one_server_all_ways_to_find_it_are_the_same():
    seen = {
        simulate(Fleet(STEADY, 1, policy), poisson(8, 200.0, 4)).latencies_s.tobytes()
        for policy in ("round robin", "random", "least loaded", "one queue")
    }
    assert len(seen) == 1


def test_chance_is_the_worst_way_to_share():
    p99 = {
        policy: simulate(Fleet(STEADY, 4, policy), poisson(28, 400.0, 5)).quantile(0.99)
        for policy in ("random", "round robin", "least loaded")
    }
    assert p99["random"] > 1.2 * max(p99["round robin"], p99["least loaded"])


def test_a_plan_keeps_the_p99_with_as_few_as_can():
    requests = poisson(60, 120.0, 0)
    told = list(plan(Fleet(STEADY, 1), requests, 0.5))
    assert [count for count, _ in told] == list(range(told[0][0], told[-1][0] + 1))
    assert told[-1][1].quantile(0.99) <= 0.5
    for _, outcome in told[:-1]:
        assert outcome.refused or outcome.quantile(0.99) > 0.5
    with pytest.raises(ValueError, match="one call alone takes"):
        list(plan(Fleet(STEADY, 1), requests, 0.05))
    with pytest.raises(ValueError, match="more than 2"):
        list(plan(Fleet(STEADY, 1), requests, 0.5, most=2))


def test_a_curve_comes_from_the_benchmark_of_the_engine():
    curve = Curve.of_bench(RESULTS / "sdxl-turbo-gpu.json")
    assert curve.sizes == (1, 8)
    assert all(np.diff(curve.denoise_s) > 0)
    slower = curve.serving(48.7, 8)
    assert slower.pictures_per_s(8) == pytest.approx(48.7)
    assert slower.stages(1) == pytest.approx(curve.stages(1))


@pytest.mark.parametrize(
    ("replicas", "wait", "pictures", "wanted"),
    [
        (2, 0.0, 6.0, [1, 2]),  # nobody waits; six pictures a second are two servers' work
        (2, 0.52, 6.4, [2, 2]),  # within a tenth of both aims
        (2, 1.5, 9.0, [4, 3]),  # three times the wait: three times the servers, and four is the most
        (3, 0.0, 0.2, [1, 1]),
        (3, 0.25, 0.2, [2, 1]),
    ],
)
def test_an_autoscaler_decides_as_its_documentation_says(replicas, wait, pictures, wanted):
    triggers = [
        {"metricType": "Value", "metadata": {"threshold": "0.5"}},
        {"metricType": "AverageValue", "metadata": {"threshold": "3"}},
    ]
    assert decide(replicas, triggers, [wait, pictures], 1, 4) == wanted
