"""Features that are read from a finished picture, beside those of the run that drew it.

A scene of `mini` is drawn from its caption, in four steps, and its picture is read again: coded, noised at a strength,
and walked from there with no caption, with the next scene's or with its own. Over several noises the means are
averaged. Both are compared at the same steps: how many of the k strongest features are the same, and the rank
correlation (Spearman) of the means of all features that are active in either. Beside it stands what any other scene's
run comes to.

    python -m benchmarks.from_pictures            writes benchmarks/results/from_pictures.json and prints its table
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from benchmarks.places import RESULTS
from turbolens_server.bench.results import machine
from turbolens_server.engine.engine import Engine
from turbolens_server.engine.types import Job, Result, Start
from turbolens_server.loading.load import load_engine
from turbolens_training.mini.report import held_out

STEPS: Final = 4
STRENGTHS: Final = (0.25, 0.5, 0.75, 1.0)
NOISES: Final = (1, 2, 4, 8)
K: Final = 20
Means = npt.NDArray[np.float64]
"""Mean activations over positions, [steps, features of all SAEs]."""


def means(engine: Engine, result: Result) -> Means:
    """Those of a run, SAE after SAE."""
    steps = sorted({codes.step for codes in result.features})
    rows = []
    for step in steps:
        parts = []
        for name, sae in engine.info.saes.items():
            (codes,) = (one for one in result.features if (one.sae, one.step) == (name, step))
            total = np.bincount(codes.indices, weights=codes.values, minlength=sae.bundle.d_sae)
            parts.append(total / (codes.height * codes.width))
        rows.append(np.concatenate(parts))
    return np.stack(rows)


def overlap(one: Means, other: Means, k: int = K) -> float:
    """Share of the k strongest of [F] that are among the k strongest of the other."""
    return len({*np.argsort(-one)[:k]} & {*np.argsort(-other)[:k]}) / k


def rank_correlation(one: Means, other: Means) -> float:
    """Spearman's, of the features [F] active in either."""
    active = (one > 0) | (other > 0)
    return float(np.corrcoef(_ranks(one[active]), _ranks(other[active]))[0, 1])


def _ranks(values: Means) -> Means:
    """Ranks from the smallest; equal ones share their mean."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    ranks: Means = (last - (count - 1) / 2)[place]
    return ranks


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    heard: str
    strength: float
    noises: int
    overlap: float
    rank_correlation: float
    spread: float
    """Standard deviation of a strong feature's mean between noises, as a share of it; 0 of one."""


def _run(engine: Engine, jobs: Sequence[Job], batch: int = 8) -> list[Result]:
    made: list[Result] = []
    for at in range(0, len(jobs), batch):
        made += [one for one in engine.run(jobs[at : at + batch]) if one is not None]
    return made


def measure(engine: Engine, scenes: int) -> tuple[list[Row], dict[str, float]]:
    """The table, and what other scenes' runs come to."""
    size, saes = engine.info.default_size, tuple(engine.info.saes)
    held, seeds = held_out(engine, scenes)
    drawn = _run(engine, [Job(c, s, STEPS, *size, saes=saes) for c, s in zip(held.captions, seeds, strict=True)])
    own = [means(engine, one) for one in drawn]
    pictures = [Start("picture", one.picture) for one in drawn if one.picture is not None]
    rows = []
    captions = {
        "nothing": [""] * scenes,
        "the next scene's caption": [*held.captions[1:], held.captions[0]],
        "its caption": held.captions,
    }
    for heard, told in captions.items():
        for strength in STRENGTHS:
            taken = int(STEPS * strength)
            jobs = [
                Job(
                    caption, 10_000 + noise, taken, *size, saes=saes, picture=False,
                    start=start, skipped=STEPS - taken,
                )
                for caption, start in zip(told, pictures, strict=True)
                for noise in range(NOISES[-1])
            ]  # fmt: skip
            read = np.stack([means(engine, one).mean(0) for one in _run(engine, jobs)])
            read = read.reshape(scenes, NOISES[-1], -1)
            for n in NOISES:
                pairs = [(read[i, :n].mean(0), own[i][STEPS - taken :].mean(0)) for i in range(scenes)]
                rows.append(
                    Row(
                        heard, strength, n,
                        float(np.mean([overlap(*pair) for pair in pairs])),
                        float(np.mean([rank_correlation(*pair) for pair in pairs])),
                        float(np.mean([_spread(read[i, :n]) for i in range(scenes)])),
                    )
                )  # fmt: skip
    others = [(own[i].mean(0), own[(i + 1) % scenes].mean(0)) for i in range(scenes)]
    chance = {
        "overlap": float(np.mean([overlap(*pair) for pair in others])),
        "rank_correlation": float(np.mean([rank_correlation(*pair) for pair in others])),
    }
    return rows, chance


def _spread(runs: Means) -> float:
    """Over the k strongest features of runs [n, F]."""
    if len(runs) == 1:
        return 0.0
    top = np.argsort(-runs.mean(0))[:K]
    return float((runs[:, top].std(0, ddof=1) / runs[:, top].mean(0)).mean())


def to_markdown(told: dict[str, Any]) -> str:
    """The table of results."""
    lines = [
        f"| hears | strength | noises | overlap of {K} | rank correlation | spread |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in told["rows"]:
        spread = f"{row['spread']:.2f}" if row["noises"] > 1 else ""
        lines.append(
            f"| {row['heard']} | {row['strength']:g} | {row['noises']} | {row['overlap']:.2f} "
            f"| {row['rank_correlation']:.2f} | {spread} |"
        )
    chance = told["another_scene"]
    return "\n".join(
        [*lines, f"| another scene's run | | | {chance['overlap']:.2f} | {chance['rank_correlation']:.2f} | |"]
    )


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=24, help="held-out scenes")
    scenes = parser.parse_args().scenes
    rows, chance = measure(load_engine(), scenes)
    told = {
        "machine": machine(), "scenes": scenes, "steps": STEPS, "k": K, "another_scene": chance,
        "rows": [dataclasses.asdict(row) for row in rows],
    }  # fmt: skip
    (RESULTS / "from_pictures.json").write_text(json.dumps(told, indent=1) + "\n")
    print(to_markdown(told))


if __name__ == "__main__":
    main()
