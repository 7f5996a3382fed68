"""What a run starts from and how it is sampled: source, sampling, seeds, references."""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Final, NamedTuple

from turbolens_proto.v1 import run_pb2
from turbolens_server.rpc.validation.checks import Checks

MAX_SEED: Final = 2**63 - 1
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def check_source(checks: Checks, field: str, source: run_pb2.Source) -> str:
    """The prompt that a run starts from."""
    if source.WhichOneof("kind") != "prompt":
        checks.wrong(field, "is missing; give a prompt (the empty prompt is one)")
        return ""
    text = source.prompt.text
    if len(text) > checks.limits.max_prompt_chars:
        allowed = f"has {len(text)} characters; at most {checks.limits.max_prompt_chars} are allowed"
        checks.bad(f"{field}.prompt.text", text, allowed)
    return text


class Sampled(NamedTuple):
    """How a run is sampled."""

    steps: int
    height: int
    width: int
    timesteps: tuple[int, ...]
    """Empty: as the scheduler chooses them."""


def check_sampling(checks: Checks, field: str, sampling: run_pb2.Sampling) -> Sampled:
    """Steps, size and timesteps with every default filled in."""
    info = checks.info
    timesteps = _timesteps(checks, field, sampling)
    steps = sampling.steps if sampling.HasField("steps") else len(timesteps) or info.default_steps
    if not 1 <= steps <= info.max_steps:
        checks.bad(f"{field}.steps", steps, f"must be 1 to {info.max_steps}")
        steps = 1
    height = sampling.height if sampling.HasField("height") else info.default_size[0]
    width = sampling.width if sampling.HasField("width") else info.default_size[1]
    if (height, width) not in info.sizes:
        served = ", ".join(f"{w}x{h}" for h, w in info.sizes)
        named = "width" if sampling.HasField("width") else "height"
        checks.bad(f"{field}.{named}", f"{width}x{height}", f"sizes served (width x height): {served}")
        height, width = info.default_size
    if sampling.HasField("guidance_scale") and sampling.guidance_scale != 0:
        allowed = "only 0, the model's one-pass setting, is served"
        checks.bad(f"{field}.guidance_scale", sampling.guidance_scale, allowed)
    if not timesteps and steps == len(info.timesteps):
        timesteps = info.timesteps
    return Sampled(steps, height, width, timesteps)


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


def check_references(
    checks: Checks, field: str, references: Mapping[str, run_pb2.Reference], read: Collection[str]
) -> dict[str, tuple[str, int | None]]:
    """Prompt and seed of each reference, in order of their names, so that one request is always the same job.

    Args:
        checks: where what is wrong goes.
        field: path of the map.
        references: by name; without a seed it has that of each picture.
        read: names that edits read.
    """
    most = checks.limits.max_references
    if len(references) > most:
        checks.bad(field, f"{len(references)} references", f"at most {most} are allowed")
        return {}
    found = {}
    for name, reference in sorted(references.items()):
        path = f"{field}[{name[:64]!r}]"
        if not _NAME.fullmatch(name):
            checks.bad(path, name, 'names are 1 to 64 letters, digits, "_", "-" and "."')
        elif name not in read:
            checks.wrong(path, "is read by no edit")
        prompt = check_source(checks, f"{path}.source", reference.source)
        seed = reference.seed if reference.HasField("seed") else None
        if seed is not None:
            _seed(checks, f"{path}.seed", seed)
        found[name] = prompt, seed
    return found


def _seed(checks: Checks, field: str, seed: int) -> None:
    if not 0 <= seed <= MAX_SEED:
        checks.bad(field, seed, "must be 0 to 2^63 - 1")
