"""What made a feature of an SAE at z fire: its pre-activation as a sum over heads and sources.

An attention layer's z is, of each head, the mean of the sources' values by its attention pattern: under a fixed
pattern, linear in them. The sources are the tokens of the text in cross-attention and the positions of the grid in
self-attention. Kissane et al. (arXiv 2406.17759) call this direct feature attribution. Here values are counted from
b_dec, the SAE's own zero: since a pattern sums to 1, what does not differ from it explains nothing, and

    pre[p] = b_enc + sum over heads h and sources s of  pattern[h, p, s] (v[s, h] - b_dec[h]) . W_enc[h]

exactly. It is the pre-activation that is a sum; of a TopK, which features are selected depends on the others too. The
slow twin is in :mod:`turbolens_server.sae.twin`.
"""

from __future__ import annotations

from torch import Tensor


def contributions(pattern: Tensor, values: Tensor, W_enc: Tensor, b_dec: Tensor) -> Tensor:
    """What each head adds to a feature's pre-activation from each source, [heads, P, sources] float32.

    Args:
        pattern: [heads, P, sources], each [heads, P] a distribution over the sources.
        values: of the sources, [sources, d_model], heads side by side.
        W_enc: the feature's column, [d_model].
        b_dec: [d_model].
    """
    heads = len(pattern)
    told = ((values.float() - b_dec) * W_enc.float()).unflatten(-1, (heads, -1)).sum(-1)  # [sources, heads]
    added: Tensor = pattern.float() * told.T[:, None]
    return added
