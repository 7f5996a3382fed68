"""Learned region gates written out slowly, a position and a token at a time; the tests hold `maths.py` to it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def network(x: Array, w: Mapping[str, Array]) -> Array:
    """A gate's network for one vector x [d]: [h]. The weights have the names of `GateMlp`'s fields."""
    normed = (x - x.mean()) / math.sqrt(x.var() + 1e-5) * w["norm_weight"] + w["norm_bias"]
    inner = w["in_weight"] @ normed + w["in_bias"]
    out: Array = w["out_weight"] @ (inner / (1 + np.exp(-inner))) + w["out_bias"]
    return out


def probability(feature: Array, token: Array, bias: float) -> float:
    """How likely a position hears a token, of the networks' outputs [h] each."""
    return 1 / (1 + math.exp(-(float(feature @ token) / math.sqrt(len(feature)) + bias)))


def opened(likely: list[float], threshold: float, heard: list[bool]) -> list[bool]:
    """Which tokens one position hears."""
    found = [may and p > threshold for p, may in zip(likely, heard, strict=True)]
    if any(found):
        return found
    best = max(p for p, may in zip(likely, heard, strict=True) if may)
    first = next(t for t, (p, may) in enumerate(zip(likely, heard, strict=True)) if may and p == best)
    return [t == first for t in range(len(likely))]


def attention(q: Array, k: Array, v: Array, bias: Array) -> Array:
    """Attention of one head by its definition: q [P, d], k and v [T, d], bias [P, T] added to the logits."""
    out = np.zeros((len(q), v.shape[1]))
    for position in range(len(q)):
        logits = [
            float(q[position] @ key) / math.sqrt(q.shape[1]) + b for key, b in zip(k, bias[position], strict=True)
        ]
        top = max(logits)
        told = [math.exp(logit - top) for logit in logits]
        out[position] = sum(share * value for share, value in zip(told, v, strict=True)) / sum(told)
    return out
