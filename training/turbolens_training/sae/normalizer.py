"""Centre and scale updates for training, and fold both exactly into the weights for serving."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from turbolens_server.sae.bundle import SaeWeights


@dataclasses.dataclass(frozen=True)
class Normalizer:
    """x -> (x - mean) / scale, after which the total variance is d_model.

    Centring removes most dead features by itself, and the fixed scale makes the squared error per dimension the
    fraction of variance unexplained, with a variance that is a constant of the data and not of the batch.
    """

    mean: Tensor  # [d_model] float32
    scale: float

    @classmethod
    def fit(cls, tokens: Tensor) -> Normalizer:
        """Mean and root mean square deviation of tokens [N, d_model], in float64."""
        exact = tokens.double()
        mean = exact.mean(0)
        scale = (exact - mean).square().mean().sqrt().item()
        return cls(mean.float(), scale if scale > 0 else 1.0)

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean).div_(self.scale)

    def fold(self, weights: SaeWeights) -> SaeWeights:
        """Weights that do on x what `weights` do on the normalised x, with activations `scale` times as large.

        TopK, ReLU and the decoder are positively homogeneous, so only biases and thresholds change:
        scale * (W_enc ((x - mean) / scale - b_dec) + b_enc) = W_enc (x - (scale b_dec + mean)) + scale b_enc.
        """
        b_dec = weights.b_dec.double() * self.scale + self.mean.double()
        b_enc = weights.b_enc.double() * self.scale
        threshold = None if weights.threshold is None else (weights.threshold.double() * self.scale).float()
        return dataclasses.replace(weights, b_enc=b_enc.float(), b_dec=b_dec.float(), threshold=threshold)
