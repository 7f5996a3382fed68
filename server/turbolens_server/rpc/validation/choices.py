"""Transfers that leave the choice of their features to the server."""

from __future__ import annotations

from turbolens_proto.v1 import steering_pb2
from turbolens_server.engine.info import EngineInfo
from turbolens_server.rpc.validation.checks import Checks
from turbolens_server.rpc.validation.masks import MaskChecks
from turbolens_server.steering.choice import FeatureChoice


def chooses(edit: steering_pb2.Edit) -> bool:
    """Whether an edit leaves the choice of its features to the server."""
    return edit.WhichOneof("kind") == "transfer" and edit.transfer.HasField("choice")


def read_by_step(info: EngineInfo) -> list[str]:
    """SAEs that are read step by step."""
    return [name for name, sae in info.saes.items() if sae.bundle.steps is None]


def check_choice(
    checks: Checks, masks: MaskChecks, path: str, edit: steering_pb2.Edit, place: int, references: int
) -> FeatureChoice:
    """How the features of a transfer are chosen.

    Args:
        checks: where what is wrong goes.
        masks: those of the request.
        path: of the edit.
        edit: one that chooses.
        place: its position in the request.
        references: how many the request has.
    """
    choice, field = edit.transfer.choice, f"{path}.transfer.choice"
    most, most_runs = checks.limits.max_features_per_edit, checks.limits.max_references
    if not 1 <= choice.features <= most:
        checks.bad(f"{field}.features", choice.features, f"must be 1 to {most}")
    for name, count in (("features", len(edit.features)), ("transfer.remove", len(edit.transfer.remove))):
        if count:
            checks.bad(f"{path}.{name}", f"{count} features", "leave them out: the server is to choose them")
    if edit.HasField("condition"):
        checks.wrong(f"{path}.condition", "is of one block, and features are chosen from several; leave it out")
    if references >= most_runs:
        text = f"the picture's own run is one more beside them; with a choice at most {most_runs - 1} are allowed"
        checks.bad(field, f"{references} references", text)
    for i, name in enumerate(choice.saes):
        if not checks.sae(f"{field}.saes[{i}]", name):
            continue
        if name in choice.saes[:i]:
            checks.bad(f"{field}.saes[{i}]", name, "an SAE may be named once")
        elif checks.info.saes[name].bundle.steps is not None:
            checks.bad(f"{field}.saes[{i}]", name, "is a temporal SAE, known after the last step alone")
    named = choice.saes or read_by_step(checks.info)
    if not named:
        checks.wrong(f"{field}.saes", "this server has no SAE that is read step by step")
    own = masks.mask(f"{field}.own_mask", choice.own_mask) if choice.HasField("own_mask") else None
    # In the order in which they are served: which of two equal scores comes first does not depend on the caller.
    saes = tuple(name for name in checks.info.saes if name in named)
    return FeatureChoice(place, choice.features, saes, choice.all_steps, own)
