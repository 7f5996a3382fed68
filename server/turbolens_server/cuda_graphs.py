"""Work recorded once in CUDA graphs and replayed: a launch costs the host far more than most kernels cost a GPU.

SDXL Turbo's U-Net is some 2,000 kernels of a few microseconds each, so a pass launched one by one waits for the host
nine tenths of its time. A recording can be cut in pieces between which other work runs, on what the piece before made
and before what comes after reads it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

T = TypeVar("T")
Cut = Callable[[], None]
"""Ends a piece of a recording and begins the next."""

_WARM_UPS: Final = 2
"""Runs before a recording: kernels are compiled and chosen in the first, which a recording must not see."""


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes a GPU the current one of this thread, which is the one that recordings, streams and events are made on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class Recording(Generic[T]):
    """What was recorded."""

    pieces: tuple[torch.cuda.CUDAGraph, ...]
    result: T
    """What the function returned: tensors that a replay writes anew."""


def record(run: Callable[[Cut], T], pool: Any) -> Recording[T]:
    """Record a function's work on the current device.

    Args:
        run: launches the work, from tensors that stay where they are; it may call what it is given to cut the
            recording at that point.
        pool: of memory, from `torch.cuda.graph_pool_handle()`. Recordings that never run at the same time may share
            one: the later ones reuse what the earlier ones hold, all but their results.
    """
    caller, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(caller)
    graphs: list[torch.cuda.CUDAGraph] = []

    def begin() -> None:
        graphs.append(torch.cuda.CUDAGraph())
        # Other threads may allocate meanwhile; only this one must not.
        graphs[-1].capture_begin(pool=pool, capture_error_mode="thread_local")

    def cut() -> None:
        graphs[-1].capture_end()
        begin()

    with torch.cuda.stream(side), _convolutions_tried():
        for _ in range(_WARM_UPS):
            run(lambda: None)
        torch.cuda.synchronize()
        gc.collect()  # nothing may be freed by chance while the recording runs
        begin()
        try:
            result = run(cut)
        finally:
            graphs[-1].capture_end()
    caller.wait_stream(side)
    return Recording(tuple(graphs), result)


@contextlib.contextmanager
def _convolutions_tried() -> Iterator[None]:
    """cuDNN's own guess of the fastest convolution is often far off; with each tried once, the best is known."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class Graphed:
    """A function of one tensor, recorded at its first call with each shape and type, and replayed from then on.

    May be called by several threads, each on a stream of its own: one call at a time works on the recorded tensors.
    """

    def __init__(self, function: Callable[[Tensor], T]) -> None:
        """`function` returns a tensor or a tuple of them."""
        self._function = function
        self._recordings: dict[tuple[Any, ...], tuple[Tensor, Recording[Any]]] = {}
        self._lock = threading.Lock()
        self._done = torch.cuda.Event()

    def __call__(self, x: Tensor) -> Any:
        key = (*x.shape, x.dtype)
        stream = torch.cuda.current_stream()
        with self._lock, torch.inference_mode():
            stream.wait_event(self._done)
            if key not in self._recordings:
                static = x.clone()
                recording = record(lambda _: self._function(static), torch.cuda.graph_pool_handle())
                self._recordings[key] = static, recording
            static, recording = self._recordings[key]
            static.copy_(x)
            for piece in recording.pieces:
                piece.replay()
            result = tree_map(torch.clone, recording.result)
            self._done.record(stream)
        return result
