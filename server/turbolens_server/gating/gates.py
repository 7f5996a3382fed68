"""Learned region gates at work: which cross-attentions have one, and what they do in a batch."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from turbolens_server.gating.maths import (
    GateHead,
    GateMlp,
    gate_bias,
    gate_probabilities,
    open_gates,
    straight_through,
)


class GatesNotApplied(RuntimeError):
    """A pass of the U-Net went by a gate; what came of it is not what was asked for."""


@dataclasses.dataclass(frozen=True)
class Gates:
    """The gates of a U-Net, on its device."""

    heads: Mapping[str, GateHead]
    """By name."""
    layers: Mapping[str, str]
    """The head of each cross-attention that has one, by its hook point: "up.0.1.attn2.3"."""
    threshold: float
    closed: float
    """What is added to the logits of a token that is not heard."""

    def tensors(self) -> list[Tensor]:
        """All weights."""
        return [weight for head in self.heads.values() for weight in (*head.features, *head.tokens, head.bias)]

    def to(self, device: torch.device) -> Gates:
        """The same on a device."""
        heads = {name: _moved(head, device) for name, head in self.heads.items()}
        return dataclasses.replace(self, heads=heads)

    def of(self, text: Tensor) -> Gating:
        """The gates of a batch whose text has these hidden states, [B, T, cross_attention_dim]."""
        return Gating(self, {name: head.tokens(text.float()) for name, head in self.heads.items()})


def _moved(head: GateHead, device: torch.device) -> GateHead:
    features, tokens = (GateMlp(*(weight.to(device) for weight in mlp)) for mlp in (head.features, head.tokens))
    return GateHead(features, tokens, head.bias.to(device))


class Gating:
    """The gates of one batch, and how often each cross-attention asked for its own.

    The networks run in float32 whatever the U-Net runs in. Nothing of a row depends on another.
    """

    def __init__(self, gates: Gates, tokens: Mapping[str, Tensor]) -> None:
        """`tokens` are what the heads' networks make of the text, [B, T, h] by head."""
        self._gates = gates
        self._tokens = tokens
        self.asked: collections.Counter[str] = collections.Counter()
        """How often, by cross-attention."""
        self.told: Callable[[str, Tensor], object] | None = None
        """Called with each cross-attention and what its positions hear, [B, P, T] bool; None: nobody looks."""

    def __contains__(self, layer: str) -> bool:
        """Whether a cross-attention, by its hook point, has a gate."""
        return layer in self._gates.layers

    def opened(self, layer: str, features: Tensor, heard: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Which tokens each position hears in a cross-attention.

        Args:
            layer: its hook point.
            features: what the positions bring to it, after its norm, [B, P, d].
            heard: see :func:`open_gates`.

        Returns:
            The probabilities and the gates, [B, P, T] each.
        """
        name = self._gates.layers[layer]
        head = self._gates.heads[name]
        likely = gate_probabilities(head.features(features.float()), self._tokens[name], head.bias)
        return likely, open_gates(likely, self._gates.threshold, heard)

    def bias(self, layer: str, features: Tensor, added: Tensor | None) -> Tensor:
        """What is added to the logits of a cross-attention, [B, P, T], in the type of `features`.

        Args:
            layer: its hook point.
            features: see :meth:`opened`.
            added: what is added anyway, [B, P, T]; minus infinity where a token may not be heard. None: nothing.
        """
        self.asked[layer] += 1
        likely, found = self.opened(layer, features, None if added is None else added.isfinite())
        if self.told is not None:
            self.told(layer, found)
        gates = straight_through(likely, found) if likely.requires_grad else found.float()
        bias = gate_bias(gates, self._gates.closed).to(features.dtype)
        return bias if added is None else bias + added

    def check(self, passes: int) -> None:
        """Raise GatesNotApplied unless every gate was asked for once in each of so many passes of the U-Net."""
        wrong = {layer: asked for layer in self._gates.layers if (asked := self.asked[layer]) != passes}
        if wrong:
            raise GatesNotApplied(f"of {passes} passes of the U-Net, gates were applied in {wrong}")
