"""What the U-Net hears beside the latents: one value in place of the tensors that every pass takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from turbolens_server.gating.gates import Gating


@dataclasses.dataclass(frozen=True, slots=True)
class Conditions:
    """The conditions of a batch, the same at every step; a row for each lane."""

    hidden: Tensor
    """Hidden states of the text encoders, [B, tokens, cross_attention_dim]."""
    pooled: Tensor
    """Pooled text, [B, D]."""
    time_ids: Tensor
    """SDXL's size conditioning, [B, 6]."""
    guidance: Tensor | None = None
    """Embedding of the guidance scale, [B, time_cond_proj_dim], of a U-Net that is distilled for guidance."""

    bias: Mapping[tuple[int, int], Tensor] = dataclasses.field(default_factory=dict, kw_only=True)
    """Added to the logits of every cross-attention, before its softmax: [B, h * w, tokens] by grid (h, w); empty where
    every position hears every token alike."""
    gating: Gating | None = dataclasses.field(default=None, kw_only=True)
    """Learned region gates, which add to these logits too; None: none."""

    @property
    def plain(self) -> bool:
        """Whether nothing is added to the logits of any cross-attention."""
        return not self.bias and self.gating is None

    def bias_on(self, grid: tuple[int, int]) -> Tensor | None:
        """The bias on one grid; None where there is none."""
        # To look up a size fixes it, and an exported graph is for all of them.
        return self.bias.get(grid) if self.bias else None

    def tensors(self) -> tuple[Tensor, ...]:
        """The fields but the bias and the gates in order, for what compiles or records a pass of plain tensors."""
        always = (self.hidden, self.pooled, self.time_ids)
        return always if self.guidance is None else (*always, self.guidance)
