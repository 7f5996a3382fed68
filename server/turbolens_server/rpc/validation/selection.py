"""Which features a run returns, and how SAEs are read for them and for edits."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable

from turbolens_proto.v1 import run_pb2
from turbolens_server.engine.types import SaeOptions
from turbolens_server.rpc.validation.checks import Checks
from turbolens_server.sae.temporal import refuse_steps


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which features to return, and how."""

    saes: tuple[str, ...]
    only: dict[str, frozenset[int]] | None
    """By SAE; None: all features."""
    value_type: run_pb2.ValueType.ValueType
    labels: bool
    """What features stand for comes too."""


def check_sae_options(
    checks: Checks, field: str, every: Iterable[run_pb2.SaeOptions], used: Collection[str]
) -> tuple[SaeOptions, ...]:
    """How SAEs are read; before features are looked at, since a prefix says which there are.

    Args:
        checks: where what is wrong goes.
        field: path of the options.
        every: the options.
        used: SAEs whose features come back or are edited; options of another are a mistake.
    """
    found: dict[str, SaeOptions] = {}
    for i, options in enumerate(every):
        path, name = f"{field}[{i}]", options.sae
        if not checks.sae(f"{path}.sae", name):
            continue
        if name in found:
            checks.bad(f"{path}.sae", name, "an SAE may be named once")
            continue
        if name not in used:
            checks.bad(f"{path}.sae", name, "must be an SAE whose features are asked for or edited")
        k = options.k if options.HasField("k") else None
        prefix = options.prefix if options.HasField("prefix") else None
        refused = checks.info.saes[name].bundle.refused(k, prefix)
        for part, why in refused.items():
            checks.bad(f"{path}.{part}", getattr(options, part), f"{name} {why}")
        if prefix and "prefix" not in refused:
            checks.prefixes[name] = prefix
        found[name] = SaeOptions(name, k, prefix)
    return tuple(found.values())


def check_selection(
    checks: Checks, field: str, selection: run_pb2.FeatureSelection, steps: int, skipped: int
) -> Selection:
    """Which features come back of a run of so many steps, with so many skipped before them."""
    served = checks.info.saes
    names = []
    for i, name in enumerate(selection.saes):
        if checks.sae(f"{field}.saes[{i}]", name) and name not in names:
            names.append(name)
    if not selection.saes:
        # Those that these steps allow; where there are none, all, so that the refusal names what is allowed.
        fitting = [name for name, sae in served.items() if refuse_steps(sae.bundle, steps, skipped) is None]
        names = fitting or list(served)
        if not names:
            checks.wrong(field, "this server has no SAE; start it with --sae")
    only: dict[str, set[int]] = {name: set() for name in names}
    for i, ref in enumerate(selection.only):
        path = f"{field}.only[{i}]"
        if checks.feature(path, ref):
            if ref.sae in only:
                only[ref.sae].add(ref.index)
            else:
                checks.bad(f"{path}.sae", ref.sae, "must be among the selected SAEs")
    checks.known(f"{field}.value_type", selection.value_type, run_pb2.ValueType)
    wanted = {name: frozenset(indices) for name, indices in only.items()} if selection.only else None
    value_type = selection.value_type or run_pb2.VALUE_TYPE_FLOAT16
    return Selection(tuple(name for name in served if name in names), wanted, value_type, selection.labels)


def check_steps_of(checks: Checks, field: str, used: Collection[str], steps: int, skipped: int) -> None:
    """Whether every SAE in use serves runs of so many steps, with so many skipped before them."""
    for name, sae in checks.info.saes.items():
        if name in used and (reason := refuse_steps(sae.bundle, steps, skipped)):
            checks.bad(field, steps, reason)
