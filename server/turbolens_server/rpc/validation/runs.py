"""What a run starts from and how it is sampled: source, sampling, seeds, references."""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Final, NamedTuple

from turbolens_proto.v1 import run_pb2
from turbolens_server.engine.types import Guidance, lanes_of
from turbolens_server.rpc.validation.checks import Checks
from turbolens_server.rpc.validation.sources import Started, check_prompt, check_source, sizes_served, steps_of

MAX_SEED: Final = 2**63 - 1
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Sampled(NamedTuple):
    """How a run is sampled."""

    steps: int
    skipped: int
    """Steps before these, which are not taken."""
    height: int
    width: int
    timesteps: tuple[int, ...]
    """Of all, the skipped ones too; empty: as the scheduler chooses them."""
    guidance: Guidance | None


def check_sampling(
    checks: Checks, field: str, sampling: run_pb2.Sampling, source: run_pb2.Source, size: tuple[int, int] | None
) -> Sampled:
    """Steps, size, timesteps and guidance with every default filled in.

    Args:
        checks: where what is wrong goes.
        field: path of the sampling.
        sampling: as it came.
        source: of the run, which may walk the last steps alone.
        size: (height, width) in pixels of what it starts from; None: of nothing.
    """
    info = checks.info
    timesteps = _timesteps(checks, field, sampling)
    steps = sampling.steps if sampling.HasField("steps") else len(timesteps) or info.default_steps
    if not 1 <= steps <= info.max_steps:
        checks.bad(f"{field}.steps", steps, f"must be 1 to {info.max_steps}")
        steps = 1
    own = size or info.default_size
    height = sampling.height if sampling.HasField("height") else own[0]
    width = sampling.width if sampling.HasField("width") else own[1]
    if (height, width) not in info.sizes:
        named = "width" if sampling.HasField("width") else "height"
        checks.bad(f"{field}.{named}", f"{width}x{height}", sizes_served(info))
        height, width = info.default_size
    elif size not in (None, (height, width)):
        named = "width" if width != own[1] else "height"
        checks.bad(f"{field}.{named}", f"{width}x{height}", f"it starts from {own[1]}x{own[0]}; leave it out")
    if not timesteps and steps == len(info.timesteps):
        timesteps = info.timesteps
    taken = steps_of(source, steps)
    return Sampled(taken, steps - taken, height, width, timesteps, _guidance(checks, field, sampling))


def _guidance(checks: Checks, field: str, sampling: run_pb2.Sampling) -> Guidance | None:
    """Guidance, where a run asks for it."""
    scale, rescale, most = sampling.guidance_scale, sampling.guidance_rescale, checks.limits.max_guidance_scale
    negative = sampling.negative_prompt if sampling.HasField("negative_prompt") else None
    wanted = scale not in (0, 1)
    if wanted and not 1 < scale <= most:
        checks.bad(f"{field}.guidance_scale", scale, f"must be 0 or 1 for none, or more than 1 and at most {most:g}")
    elif wanted and not checks.info.takes_guidance:
        own = f"this U-Net hears its guidance, set to {checks.info.embedded_guidance:g} when the server was started"
        checks.bad(f"{field}.guidance_scale", scale, f"must be 0: {own}")
    if not 0 <= rescale <= 1:
        checks.bad(f"{field}.guidance_rescale", rescale, "must be 0 to 1")
    if negative is not None:
        check_prompt(checks, f"{field}.negative_prompt", negative)
    for name, given in (("guidance_rescale", bool(rescale)), ("negative_prompt", negative is not None)):
        if given and not wanted:
            checks.wrong(f"{field}.{name}", "does nothing without guidance; give a guidance_scale of more than 1")
    return Guidance(scale, rescale, negative) if wanted else None


def check_lanes(checks: Checks, field: str, references: int, guidance: Guidance | None) -> None:
    """Whether a picture, its references and what guidance doubles have room in one batch."""
    lanes, most = lanes_of(references, guided=guidance is not None), checks.limits.max_lanes
    if lanes > most:
        beside = f" and its {references} references" if references else ""
        told = f"with it, the picture{beside} takes {lanes} lanes, and a batch holds {most}"
        checks.wrong(field, f"{told}: serve with --max-batch {lanes}, or ask for less")


def _timesteps(checks: Checks, field: str, sampling: run_pb2.Sampling) -> tuple[int, ...]:
    given, info, field = tuple(sampling.timesteps), checks.info, f"{field}.timesteps"
    if not given:
        return ()
    last = info.train_timesteps - 1
    if not info.takes_timesteps:
        checks.wrong(field, f"the scheduler {info.scheduler} chooses its own; leave them out")
    elif sampling.HasField("steps") and sampling.steps != len(given):
        checks.bad(field, list(given), f"must be as many as sampling.steps, which is {sampling.steps}")
    elif not all(0 <= t <= last for t in given) or any(b >= a for a, b in itertools.pairwise(given)):
        checks.bad(field, list(given), f"must fall, within {last} to 0")
    else:
        return given
    return ()


def check_seeds(checks: Checks, field: str, seeds: Sequence[int]) -> list[int]:
    """The seeds; one that is drawn here where there are none."""
    for i, seed in enumerate(seeds):
        _seed(checks, f"{field}[{i}]", seed)
    return list(seeds) or [secrets.randbelow(2**31)]


def check_prompts(checks: Checks, run: run_pb2.Run, first: str, seeds: int) -> list[str]:
    """The prompts, each heard at as many seeds, of which `first` is the source's."""
    more = [check_prompt(checks, f"run.more_prompts[{i}]", text) for i, text in enumerate(run.more_prompts)]
    pictures, most = (1 + len(more)) * seeds, checks.limits.max_seeds
    if pictures > most:
        shown = f"{1 + len(more)} prompts at {seeds} seed{'s'[: seeds > 1]}, {pictures} pictures"
        checks.bad("run.more_prompts", shown, f"at most {most} are allowed")
    return [first, *more]


class Beside(NamedTuple):
    """A reference of a run."""

    source: Started
    seed: int | None
    """None: that of each picture."""


def check_references(
    checks: Checks, field: str, references: Mapping[str, run_pb2.Reference], read: Collection[str], sampled: Sampled
) -> dict[str, Beside]:
    """Each reference, in order of their names, so that one request is always the same job.

    Args:
        checks: where what is wrong goes.
        field: path of the map.
        references: by name, no more than are allowed; without a seed one has that of each picture.
        read: names that edits read.
        sampled: how the run is sampled that they are beside.
    """
    found = {}
    for name, reference in sorted(references.items()):
        path = f"{field}[{name[:64]!r}]"
        if not _NAME.fullmatch(name):
            checks.bad(path, name, 'names are 1 to 64 letters, digits, "_", "-" and "."')
        elif name not in read:
            checks.wrong(path, "is read by no edit")
        source = check_source(checks, f"{path}.source", reference.source)
        _check_beside(checks, f"{path}.source", reference.source, source, sampled)
        seed = reference.seed if reference.HasField("seed") else None
        if seed is not None:
            _seed(checks, f"{path}.seed", seed)
        found[name] = Beside(source, seed)
    return found


def _check_beside(checks: Checks, field: str, message: run_pb2.Source, source: Started, sampled: Sampled) -> None:
    """Whether a reference can walk beside the run: as many steps, at the same size."""
    steps, size = sampled.steps + sampled.skipped, (sampled.height, sampled.width)
    taken = steps_of(message, steps)
    if taken != sampled.steps:
        text = f"walks {taken} of {steps} steps and the run {sampled.steps}; start it as the run is, at its strength"
        checks.wrong(field, text)
    if source.size not in (None, size):
        shown = f"{source.size[1]}x{source.size[0]}" if source.size else ""
        checks.bad(field, shown, f"the run is of {size[1]}x{size[0]}")


def _seed(checks: Checks, field: str, seed: int) -> None:
    if not 0 <= seed <= MAX_SEED:
        checks.bad(field, seed, "must be 0 to 2^63 - 1")
