"""The scheduler that serves: the model's own or another, with the model's noise levels."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any, Final

from turbolens_server.engine.sampler import Abilities, UnsupportedScheduler, check_scheduler
from turbolens_server.files import first_line
from turbolens_server.loading.described import Model
from turbolens_server.loading.errors import LoadError
from turbolens_server.logs import get_logger

_ENDINGS: Final = ("", "Scheduler", "DiscreteScheduler", "MultistepScheduler")
"""So that `LCM`, `EulerAncestral` and `UniPC` are understood."""
_SPACINGS: Final = ("leading", "linspace", "trailing")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a model is denoised here."""

    scheduler: Any
    abilities: Abilities
    components_hash: str
    """Of the model's other parts, with this scheduler."""
    made_for_guidance: bool
    """It looks like a model of many steps with guidance."""


def sampling(
    model: str, parts: Model, name: str | None, spacing: str | None, timesteps: Sequence[int], max_steps: int
) -> Sampling:
    """How a model is denoised, by the scheduler that is asked for; arguments as for `load_engine`.

    Raises:
        LoadError: there is no such scheduler, or it cannot serve.
    """
    try:
        scheduler = choose_scheduler(parts.scheduler, name, spacing)
        abilities = check_scheduler(scheduler, max_steps, timesteps)
    except UnsupportedScheduler as error:
        raise LoadError(f"{model}: {error}") from error
    if max_steps < len(timesteps):
        raise LoadError(f"--timesteps: {len(timesteps)} of them, and requests may have {max_steps}; raise --max-steps")
    leading = scheduler.config.get("timestep_spacing") == "leading"
    made_for_guidance = leading and not timesteps and not parts.embeds_guidance
    if made_for_guidance:
        get_logger().warning(
            "few steps from little noise",
            model=model,
            reason="timesteps are spaced as for models of many steps with guidance",
            way_out="if it is distilled, --timestep-spacing trailing; else --max-steps 50, and guidance in requests",
        )
    other = scheduler is not parts.scheduler
    components_hash = hash_with(parts.components_hash, scheduler) if other else parts.components_hash
    return Sampling(scheduler, abilities, components_hash, made_for_guidance)


def choose_scheduler(own: Any, name: str | None, spacing: str | None) -> Any:
    """A scheduler of `diffusers` for a model.

    Args:
        own: the model's; what another has in common with it is taken from its configuration.
        name: class of another, with or without its ending; None: the model's own.
        spacing: how timesteps are spaced; None: as the configuration says.

    Raises:
        LoadError: there is no such scheduler, or it has no such spacing.
    """
    if name is None and spacing is None:
        return own
    kind = type(own) if name is None else _find(name)
    known = set(kind._get_init_keys(kind))  # a configuration also holds what other schedulers have
    settings = {key: value for key, value in own.config.items() if key in known}
    if spacing is not None:
        if "timestep_spacing" not in known:
            raise LoadError(f"--timestep-spacing {spacing}: {kind.__name__} has no spacing")
        if spacing not in _SPACINGS:
            raise LoadError(f"--timestep-spacing {spacing}: must be one of {', '.join(_SPACINGS)}")
        settings["timestep_spacing"] = spacing
    try:
        return kind.from_config(settings)
    except Exception as error:  # each has its own way to refuse settings, or needs a package
        raise LoadError(
            f"--scheduler {kind.__name__}: cannot be made of the model's settings ({first_line(error)})"
        ) from error


def hash_with(components_hash: str, scheduler: Any) -> str:
    """The hash of a model's other parts with another scheduler than the one in its folder."""
    settings = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    told = json.dumps([components_hash, type(scheduler).__name__, settings], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()


def _find(name: str) -> Any:
    import diffusers  # takes longer than PyTorch's own import

    for ending in _ENDINGS:
        kind = getattr(diffusers, name + ending, None)
        if isinstance(kind, type) and (name + ending).endswith("Scheduler"):
            return kind
    raise LoadError(f"--scheduler {name}: diffusers has no such scheduler; names look like LCM or DPMSolverMultistep")
