"""A device, measured and waited for."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

_TRIES = 5


@dataclasses.dataclass(frozen=True)
class Speed:
    """What a device was measured to do."""

    tflops: float
    """10^12 multiplications and additions a second, of a large matrix product."""
    gb_s: float
    """10^9 bytes a second, read and written by a large copy."""


def settle_of(device: torch.device) -> Callable[[], None]:
    """What waits until a device has done all that it was given; a CPU always has."""

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return settle


def measure_speed(device: torch.device, dtype: torch.dtype) -> Speed:
    """Measure a device with a large matrix product and a large copy: the best of several tries of each."""
    side, values = (8192, 2**28) if device.type == "cuda" else (1024, 2**24)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source, target = (torch.zeros(values, dtype=dtype, device=device) for _ in range(2))
    settle = settle_of(device)
    product = _best_seconds(lambda: left @ right, settle)
    copy = _best_seconds(lambda: target.copy_(source), settle)
    return Speed(2 * side**3 / product / 1e12, 2 * values * dtype.itemsize / copy / 1e9)


def peak_memory_mib(device: torch.device) -> float | None:
    """Most GPU memory that tensors of this process ever took; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None


def _best_seconds(run: Callable[[], object], settle: Callable[[], None]) -> float:
    """Seconds of the fastest of several tries, after one that does not count."""
    run()
    taken = []
    for _ in range(_TRIES):
        settle()
        began = time.perf_counter()
        run()
        settle()
        taken.append(time.perf_counter() - began)
    return min(taken)
