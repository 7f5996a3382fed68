"""What a caller should know of a result that is no error."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Final

from turbolens_proto.v1 import run_pb2
from turbolens_server.engine.info import EngineInfo
from turbolens_server.engine.types import Job, Result
from turbolens_server.steering.edits import Edit
from turbolens_server.steering.kinds import KINDS

_SEED_BITS: Final = 32
"""Bits of a seed that reach the noise: what PyTorch's generator on a CPU takes of it."""


def warnings(jobs: Sequence[Job], results: Sequence[Result | None], info: EngineInfo) -> list[run_pb2.Warning]:
    """What the caller of these jobs should know."""
    found = {
        "PROMPT_CUT": _prompt_cut(jobs, results, info),
        "SEEDS_COLLIDE": _seeds_collide([job.seed for job in jobs]),
        "NO_EFFECT": _no_effect(jobs[0].edits),
        "LATE_START": late_start(info, {job.steps for job in jobs if not (job.timesteps or job.skipped)}),
        "NO_GUIDANCE": _no_guidance(jobs, info),
    }
    return [run_pb2.Warning(code=code, message=message) for code, message in found.items() if message is not None]


def _prompt_cut(jobs: Sequence[Job], results: Sequence[Result | None], info: EngineInfo) -> str | None:
    """Of the longest prompt, which is named where there are others."""
    worst = max(
        (result for result in results if result is not None), key=lambda result: result.tokens_cut, default=None
    )
    if worst is None or not worst.tokens_cut:
        return None
    one = len({job.prompt for job in jobs}) == 1
    which = "the prompt's" if one else f"of {textwrap.shorten(jobs[worst.job].prompt, 60)!r} the"
    told = f"last {worst.tokens_cut} tokens did not reach the model, which reads {info.max_prompt_tokens}"
    if not jobs[worst.job].regions:
        return f"{which} {told}"
    return f"{which} or a region's {told}; what a phrase has no room for goes into one more region of the same mask"


def _no_guidance(jobs: Sequence[Job], info: EngineInfo) -> str | None:
    """Of a picture without guidance, by a model that looks as if it were made for it."""
    if not info.made_for_guidance or all(job.guidance or job.timesteps for job in jobs):
        return None
    steps = jobs[0].steps
    return (
        f"{info.scheduler} is set as for models of tens of steps with guidance, and this was {steps} "
        f"step{'s'[: steps > 1]} without: try guidance_scale=5 and steps=25, or, if the model is distilled, serve it "
        "with --timestep-spacing trailing"
    )


def _seeds_collide(seeds: Sequence[int]) -> str | None:
    """Of two different seeds that draw the same picture; the same seed twice is the caller's wish."""
    first: dict[int, int] = {}
    for seed in seeds:
        other = first.setdefault(seed % 2**_SEED_BITS, seed)
        if other != seed:
            return f"seeds {other} and {seed} draw the same noise: only the low {_SEED_BITS} bits of a seed reach it"
    return None


def _no_effect(edits: Sequence[Edit]) -> str | None:
    """Of the first edit that changes nothing: over the wire an amount that is left out is 0, and nobody can tell."""
    for edit in edits:
        kind = KINDS[edit.kind]
        own = 0 if edit.choice else kind.own(edit.amount)  # what is chosen is added
        if edit.steps is None and own == 0 == kind.put(edit.amount):
            features = ", ".join(f"{feature.sae}/{feature.index}" for feature in edit.features[:3]) or "what is chosen"
            more = ", ..." if len(edit.features) > 3 else ""
            why = "; an amount that is left out is 0" if edit.amount == 0 else ""
            return f"{edit.kind} of {features}{more}: {kind.amount} {edit.amount:g} changes nothing{why}"
    return None


def late_start(info: EngineInfo, steps: set[int] | None = None) -> str | None:
    """That runs of these steps, or of any served where None, start where a picture should be half done."""
    late = {n: t for n, t in info.late_starts.items() if steps is None or n in steps}
    if not late:
        return None
    runs = ", ".join(f"{n} step{'s'[: n > 1]} at timestep {t}" for n, t in sorted(late.items()))
    spacing = f"timestep_spacing={info.timestep_spacing!r} of " if info.timestep_spacing else ""
    return (
        f"{spacing}{info.scheduler} starts {runs} of {info.train_timesteps}, where the model expects half a picture "
        "and gets noise; serve with --timestep-spacing trailing"
    )
