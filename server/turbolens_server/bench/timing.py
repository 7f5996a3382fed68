"""Contenders timed in interleaved rounds, and what their times say: ratios and differences with intervals.

A slow moment of the machine hits every contender of a round alike, so what counts is the ratio within a round. The
median over rounds is told with its 95 % bootstrap interval.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

_RESAMPLES: Final = 2000
_SEED: Final = 0
"""Of the resampling: the same times always give the same interval."""

_LEAST_ROUNDS: Final = 6
"""With fewer, not even the whole range of the samples holds the median 95 times in 100."""

Verdict = Literal["met", "missed", "undecided"]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A median with its 95 % bootstrap interval."""

    median: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Aim:
    """What a contender should keep to beside another; where both are given, either will do."""

    ratio: float | None = None
    """Most times the other's time."""
    added_ms: float | None = None
    """Most milliseconds more than the other."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """Something to time."""

    name: str
    run: Callable[[], object]
    against: Mapping[str, Aim] = dataclasses.field(default_factory=dict)
    """The contenders, by name, that it is compared with."""
    limit_ms: float | None = None
    """Most milliseconds that it should take, on the machine that this is aimed at."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One contender beside another, over rounds."""

    against: str
    ratio: Estimate
    added_ms: Estimate
    aim: Aim
    verdict: Verdict | None
    """None where nothing is aimed at."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One contender's times."""

    name: str
    ms: tuple[float, ...]
    """Milliseconds, by round."""
    median_ms: float
    comparisons: tuple[Comparison, ...]
    limit_ms: float | None = None
    limit_verdict: Verdict | None = None


def estimate(samples: Sequence[float]) -> Estimate:
    """Median of samples with the 95 % percentile-bootstrap interval of it.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("no samples to estimate from")
    values: npt.NDArray[np.float64] = np.asarray(samples, np.float64)
    resampled = np.random.default_rng(_SEED).choice(values, (_RESAMPLES, len(values)))
    low, high = np.quantile(np.median(resampled, axis=1), [0.025, 0.975])
    return Estimate(float(np.median(values)), float(low), float(high))


def judge(ratio: Estimate, added_ms: Estimate, aim: Aim, rounds: int) -> Verdict | None:
    """Whether an aim is kept by the whole interval, missed by the whole interval, or neither can be said."""
    pairs = [(ratio, aim.ratio), (added_ms, aim.added_ms)]
    limits = [(found, limit) for found, limit in pairs if limit is not None]
    if not limits:
        return None
    if rounds < _LEAST_ROUNDS:
        return "undecided"
    if any(found.high <= limit for found, limit in limits):
        return "met"
    return "missed" if all(found.low > limit for found, limit in limits) else "undecided"


def compare(contenders: Sequence[Contender], times: Mapping[str, Sequence[float]]) -> list[Row]:
    """What the times of interleaved rounds say: `times` holds each contender's milliseconds by round."""
    rows = []
    for contender in contenders:
        own = times[contender.name]
        comparisons = []
        for name, aim in contender.against.items():
            ratio = estimate([mine / other for mine, other in zip(own, times[name], strict=True)])
            added = estimate([mine - other for mine, other in zip(own, times[name], strict=True)])
            comparisons.append(Comparison(name, ratio, added, aim, judge(ratio, added, aim, len(own))))
        limit, took = contender.limit_ms, estimate(own)
        verdict = judge(took, took, Aim(added_ms=limit), len(own))
        rows.append(Row(contender.name, tuple(own), took.median, tuple(comparisons), limit, verdict))
    return rows


def interleave(
    contenders: Sequence[Contender], rounds: int, settle: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Time every contender once a round, after one round that does not count; milliseconds by name and round.

    Each round begins with another contender, so that none always runs in the wake of the same one. `settle` is
    called before and after each: it waits for a device that works on by itself.
    """
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    if len(times) != len(contenders):
        raise ValueError("contenders must have names of their own")
    for contender in contenders:
        contender.run()
    for turn in range(rounds):
        if sys.stderr.isatty():
            print(f"\r  round {turn + 1} of {rounds}", end="\n" if turn + 1 == rounds else "", file=sys.stderr)
        start = turn % len(contenders)
        for contender in (*contenders[start:], *contenders[:start]):
            settle()
            began = time.perf_counter()
            contender.run()
            settle()
            times[contender.name].append(1000 * (time.perf_counter() - began))
    return times


def measure(contenders: Sequence[Contender], rounds: int, settle: Callable[[], None] = lambda: None) -> list[Row]:
    """Time contenders in interleaved rounds and compare them."""
    return compare(contenders, interleave(contenders, rounds, settle))
