"""Many callers at once, each with an edit of its own: our server over its socket beside the usual approach in process.

    python -m benchmarks.many_callers
    python -m benchmarks.many_callers --model random:sdxl-turbo --steps 1 --out many_callers-gpu.json

See `reference_server.py` for the usual approach. Every caller asks for one picture steered by one masked `add`, with
its own prompt, seed, block, feature and mask; a round ends when all have their answers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tyro

import turbolens as tl
from benchmarks.places import RESULTS
from benchmarks.reference_server import AddEdit, ReferenceServer
from turbolens_server.bench.contenders import PROMPT, fresh_prompt, largest_difference
from turbolens_server.bench.results import assemble, save, to_markdown
from turbolens_server.bench.timing import Aim, Contender, measure
from turbolens_server.embedded import start
from turbolens_server.loading.load import load_engine
from turbolens_server.loading.model import load_pipeline
from turbolens_server.steering.masks import Box, BoxMask

CALLERS = 16
STEPS = (1, 4)
AMOUNT = 10.0

Picture = npt.NDArray[np.uint8]
"""[height, width, 3]."""


@dataclasses.dataclass(frozen=True)
class Call:
    """What one caller asks for."""

    seed: int
    block: str
    index: int
    box: tuple[float, float, float, float]
    """Left, top, right, bottom, in fractions of the picture."""


def calls_of(blocks: Sequence[str], callers: int) -> list[Call]:
    """Calls that differ in seed, block, feature and mask."""
    boxes = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 0.5), (0.25, 0.25, 0.75, 0.75), (0, 0, 1, 1))
    return [Call(seed, blocks[seed % len(blocks)], 7 * seed, boxes[seed % len(boxes)]) for seed in range(callers)]


@dataclasses.dataclass(frozen=True)
class Callers:
    """The callers, each in a thread with a connection of its own, before either side."""

    calls: Sequence[Call]
    reference: ReferenceServer
    lenses: Sequence[tl.Lens]
    grids: Mapping[str, tuple[int, int]]
    """Rows and columns, by block."""
    pool: ThreadPoolExecutor

    def by_reference(self, steps: int, at: int, prompt: str) -> Picture:
        """The picture of caller `at` from the usual approach; its features are made too, always."""
        call = self.calls[at]
        mask = BoxMask((Box(*call.box),)).on_grid(*self.grids[call.block])
        edit = AddEdit(call.block, call.index, AMOUNT, mask)
        return self.reference.generate(prompt, call.seed, steps, [edit]).picture

    def by_us(self, steps: int, features: bool, at: int, prompt: str) -> Picture:
        """The picture of caller `at` from our server, which sends its features along if asked."""
        call = self.calls[at]
        edit = tl.add((call.block, call.index), AMOUNT, unit="raw", mask=tl.box(*call.box))
        return (
            self.lenses[at]
            .generate(prompt, seed=call.seed, steps=steps, steer=[edit], features=features or None, format="raw")
            .array
        )

    def together(self, one: Callable[[int, str], Picture]) -> list[Picture]:
        """Everybody's picture, asked for at once, each for a new prompt: no text was encoded before."""
        return list(self.pool.map(one, range(len(self.calls)), [fresh_prompt() for _ in self.calls]))


def run(
    rounds: int, callers: int = CALLERS, steps: Sequence[int] = STEPS, model: str = "mini", device: str = "auto"
) -> dict[str, Any]:
    """Measure every number of steps."""
    engine = load_engine(model=model, device=device)
    info, where, dtype = engine.info, engine.device, engine.components.unet.dtype
    del engine  # a server of its own loads one
    pipeline, _ = load_pipeline(model, where, dtype)
    pipeline.to(where).set_progress_bar_config(disable=True)
    reference = ReferenceServer(pipeline, info.hook_points, {name: sae.bundle for name, sae in info.saes.items()})
    grids = {point.name: point.grid(*info.default_size) for point in info.hook_points}
    calls = calls_of(list(info.saes), callers)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(start(model, device=device, backend="torch-compile"))
        lenses = [stack.enter_context(tl.connect(server.target)) for _ in calls]
        pool = stack.enter_context(ThreadPoolExecutor(callers))
        everyone = Callers(calls, reference, lenses, grids, pool)
        aims = {count: Aim((1 / 3.2 if count == 1 else 1 / 3.4) if where.type == "cpu" else 0.25) for count in steps}
        cases = [_measure_case(everyone, count, rounds, aims[count]) for count in steps]
    return assemble("many_callers", rounds, cases, model=info.model, model_hash=info.model_hash)


def _measure_case(callers: Callers, steps: int, rounds: int, aim: Aim) -> dict[str, Any]:
    count = len(callers.calls)
    print(f"{count} callers, {steps} steps", file=sys.stderr)
    reference = partial(callers.by_reference, steps)
    with_features, alone = (partial(callers.by_us, steps, features) for features in (True, False))
    seats = range(count)
    difference = largest_difference([alone(at, PROMPT) for at in seats], [reference(at, PROMPT) for at in seats])
    rows = measure(
        [
            Contender("reference", partial(callers.together, reference)),
            Contender("server, features too", partial(callers.together, with_features), {"reference": aim}),
            Contender("server, pictures alone", partial(callers.together, alone), {"reference": aim}),
        ],
        rounds,
    )
    return {
        "label": {"callers": count, "steps": steps},
        "rows": rows,
        "pictures_per_s": {row.name: 1000 * count / row.median_ms for row in rows},
        "largest_difference": difference,
    }


def main(
    rounds: int = 12,
    steps: tuple[int, ...] = STEPS,
    model: str = "mini",
    device: str = "auto",
    out: Path = RESULTS / "many_callers.json",
) -> None:
    """Measure and write.

    Args:
        rounds: rounds in which all callers are served once by each contender.
        steps: denoising steps; each number is a case of its own.
        model: as for `turbolens bench`.
        device: as for `turbolens bench`.
        out: JSON file to write.
    """
    result = run(rounds, steps=steps, model=model, device=device)
    print(to_markdown(result))
    save(out, result)


if __name__ == "__main__":
    tyro.cli(main)
