"""What an SAE must reach before it is exported as a bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from turbolens_server.sae.bundle import BundleError, SaeWeights, check_weights
from turbolens_training.sae.config import Gates


class BelowGatesError(ValueError):
    """SAEs that may not be exported; the text names each with every gate it fails."""


def failures(
    weights: SaeWeights,
    *,
    l0_most: int,
    l0_mean: float,
    k: int | None,
    aim: int,
    explained_variance: float,
    dead: float,
    gates: Gates,
) -> list[str]:
    """Every gate that an SAE fails, in words; none where it may be exported.

    Args:
        weights: as they would be written.
        l0_most: most features active at one position of the held-out data.
        l0_mean: features active at a position of it on average.
        k: features that may be; None for JumpReLU.
        aim: the k of the settings, which a JumpReLU has as well.
        explained_variance: on held-out data.
        dead: share of features that are.
        gates: the thresholds.
    """
    try:
        check_weights(weights, "weights")
    except BundleError as error:
        return [str(error)]  # what follows would measure nonsense
    found = []
    off = (weights.W_dec.double().norm(dim=1) - 1).abs()  # [d_sae]
    if float(off.max()) > gates.norm_tolerance:
        worst = int(off.argmax())
        found.append(f"decoder row {worst} has norm {float(weights.W_dec[worst].norm()):.4f}, expected 1")
    if k is not None and l0_most > k:
        found.append(f"{l0_most} features are active at a position, more than k={k}")
    if not l0_mean <= gates.l0 * aim:  # not-a-number too
        found.append(f"{l0_mean:.1f} features are active on average, more than {gates.l0:g} times k={aim}")
    if not explained_variance >= gates.explained_variance:
        found.append(f"explained variance is {explained_variance:.4f}, below {gates.explained_variance:g}")
    if not dead <= gates.dead:
        found.append(f"{dead:.1%} of the features are dead, more than {gates.dead:.1%}")
    return found


def pass_gates(found: Mapping[str, list[str]], *, allow_below: bool) -> None:
    """Let SAEs through, by hook point, with the gates that each fails.

    Raises:
        BelowGatesError: one fails a gate, and that is not allowed.
    """
    below = {name: reasons for name, reasons in found.items() if reasons}
    if below and not allow_below:
        text = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in below.items())
        raise BelowGatesError(f"not exported: {text} (--allow-below-gates exports it all the same, and says so)")


def record(gates: Gates, found: list[str]) -> dict[str, object]:
    """What a bundle's provenance says of the gates."""
    return {"thresholds": dataclasses.asdict(gates), "below": found}
