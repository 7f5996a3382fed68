"""Slow, readable twins of the SAE and steering maths, for tests: dense, and one position at a time where clearer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from turbolens_server.sae.bundle import Bundle
from turbolens_server.steering.resolve import ResolvedEdit
from turbolens_server.steering.twin import move_dense


def encode_dense(bundle: Bundle, x: Tensor, k: int | None = None, prefix: int | None = None) -> Tensor:
    """Dense activations [N, d_sae] of updates x [N, d_in]: ReLU(TopK(W_enc (x - b_dec) + b_enc)), or JumpReLU.

    Of a Matryoshka at another k than its own, and at a prefix: 0 past it.
    """
    w = bundle.weights
    return _selected(bundle, (x.float() - w.b_dec) @ w.W_enc + w.b_enc, k, prefix)


def _selected(bundle: Bundle, pre: Tensor, k: int | None = None, prefix: int | None = None) -> Tensor:
    """Dense activations of pre-activations [N, d_sae]."""
    threshold = bundle.weights.threshold
    if threshold is not None:
        within = torch.arange(pre.shape[-1]) < (prefix or bundle.d_sae)
        return torch.where((pre > threshold) & within, pre, 0).relu()
    k = k or bundle.k
    if k is None:
        raise ValueError("a TopK bundle has a k")
    values, indices = pre[:, :prefix].topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, indices, values).relu()


def decode_dense(bundle: Bundle, z: Tensor) -> Tensor:
    """Reconstruction [N, d_in] of dense activations z [N, d_sae]."""
    return z @ bundle.weights.W_dec + bundle.weights.b_dec


def steer_dense(
    bundle: Bundle, x: Tensor, edits: Sequence[ResolvedEdit], k: int | None = None, prefix: int | None = None
) -> Tensor:
    """Steer updates x [P, d_in] of one picture by edits of one SAE's features."""
    return move_dense(x, encode_dense(bundle, x, k, prefix), bundle.weights.W_dec, edits)


def contributions_by_ablation(pattern: Tensor, values: Tensor, bundle: Bundle, feature: int) -> Tensor:
    """What a feature's pre-activation loses when one head hears b_dec in place of one source, its pattern held.

    Args:
        pattern: [heads, P, sources].
        values: [sources, d_model].
        bundle: of an SAE at z.
        feature: its index.

    Returns:
        [heads, P, sources].
    """
    w, heads = bundle.weights, len(pattern)
    width = values.shape[1] // heads

    def pre(heard: Tensor) -> Tensor:  # of values [heads, sources, width]
        z = torch.cat([pattern[head] @ heard[head] for head in range(heads)], dim=-1)
        return (z - w.b_dec) @ w.W_enc[:, feature] + w.b_enc[feature]

    own = torch.stack([values[:, head * width : (head + 1) * width] for head in range(heads)])
    lost = torch.zeros_like(pattern)
    for head in range(heads):
        for source in range(len(values)):
            without = own.clone()
            without[head, source] = w.b_dec[head * width : (head + 1) * width]
            lost[head, :, source] = pre(own) - pre(without)
    return lost


def encode_run_dense(bundle: Bundle, updates: Tensor) -> Tensor:
    """Dense activations [N, d_sae] of a temporal SAE for the updates of whole runs [T, N, d_model]."""
    w, scales = bundle.weights, _scales(bundle)
    W_enc, b_dec = w.W_enc.unflatten(0, (len(scales), -1)), w.b_dec.unflatten(0, (len(scales), -1))
    pre = w.b_enc.repeat(updates.shape[1], 1)
    last = torch.zeros_like(updates[0])
    for step, update in enumerate(updates):
        changed = (update - _expected(bundle, last, step)) / scales[step]
        pre += (changed - b_dec[step]) @ W_enc[step]
        last = update
    return _selected(bundle, pre)


def decode_run_dense(bundle: Bundle, z: Tensor) -> Tensor:
    """Reconstruction [T, N, d_model] of dense activations z [N, d_sae] of whole runs: the changes, summed up."""
    w, scales = bundle.weights, _scales(bundle)
    W_dec, b_dec = w.W_dec.unflatten(1, (len(scales), -1)), w.b_dec.unflatten(0, (len(scales), -1))
    updates, update = [], torch.zeros(len(z), W_dec.shape[2])
    for step, scale in enumerate(scales):
        update = _expected(bundle, update, step) + scale * (z @ W_dec[:, step] + b_dec[step])
        updates.append(update)
    return torch.stack(updates)


def steer_run_dense(bundle: Bundle, updates: Tensor, edits: Sequence[Sequence[ResolvedEdit]]) -> Tensor:
    """Steer the updates of one picture's run [T, P, d_model] by the `add` and `replace` edits of each step.

    An update moves as its reconstruction would, were the edited activations those of the whole run.
    """
    nothing = decode_run_dense(bundle, torch.zeros(1, bundle.d_sae))  # [T, 1, d_model], the biases' part
    steered = updates.clone()
    for step, at_step in enumerate(edits):
        for edit in sorted(at_step, key=lambda edit: edit.kind != "replace"):
            for position, m in enumerate(edit.mask.tolist()):
                if edit.kind == "replace":
                    steered[step, position] *= 1 - m
                z = torch.zeros(1, bundle.d_sae)
                z[0, edit.features] = m * edit.amounts
                steered[step, position] += (decode_run_dense(bundle, z) - nothing)[step, 0]
    return steered


def _expected(bundle: Bundle, last: Tensor, step: int) -> Tensor:
    """What the update [N, d_model] of the step before lets expect of a step; before the first it is 0."""
    if step == 0 or bundle.weights.predictors is None:
        return last
    return torch.stack([sum(x * row for x, row in zip(one, bundle.weights.predictors[step - 1], strict=True))
                        for one in last])  # fmt: skip


def _scales(bundle: Bundle) -> Tensor:
    if bundle.weights.scales is None:
        raise ValueError("only a temporal SAE has scales")
    return bundle.weights.scales
