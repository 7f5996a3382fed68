"""Regions: phrases that a picture hears under masks, as more tokens of its text and a bias on cross-attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from turbolens_server.engine.choosing import OWN
from turbolens_server.engine.lanes import Lanes
from turbolens_server.engine.text import EncodedTexts, TextEncoder
from turbolens_server.engine.types import Job
from turbolens_server.steering.masks import FloatGrid


def hear_regions(
    text: EncodedTexts, jobs: Sequence[Job], lanes: Lanes, encoder: TextEncoder, strides: Sequence[int]
) -> tuple[EncodedTexts, Mapping[tuple[int, int], Tensor]]:
    """The text of a batch with the phrases of its regions, and who hears them where.

    A lane's tokens are those of its prompt, [T, C], and then those of each of its job's regions. The pooled text stays
    the prompt's. Only a picture's own lane with the prompt hears regions, and the own run that a choice reads; other
    lanes of the job have their tokens and hear none of them.

    Args:
        text: of each lane.
        jobs: with as many regions each.
        lanes: of the jobs.
        encoder: of the phrases.
        strides: pixels per cell of each grid on which the text is heard.

    Returns:
        The text, [B, T (1 + regions), C], and the bias by grid (h, w), [B, h * w, T (1 + regions)]; without regions the
        text as it was and no bias.
    """
    first = jobs[0]
    if not first.regions:
        return text, {}
    phrases = [encoder.encode_all([region.prompt for region in job.regions]) for job in jobs]
    hidden = torch.stack([phrases[lane.job].hidden.flatten(0, 1) for lane in lanes.rows])
    cut = [max(text.tokens_cut[row], *phrases[lane.job].tokens_cut) for row, lane in enumerate(lanes.rows)]
    hearing = {*range(len(jobs)), *(named[OWN] for named in lanes.references if OWN in named)}
    bias = {}
    for stride in strides:
        grid = (first.height // stride, first.width // stride)
        heard = [[region.mask.on_grid(*grid) for region in job.regions] for job in jobs]
        nothing = [np.zeros(grid, np.float32)] * len(first.regions)
        masks = [heard[lane.job] if row in hearing else nothing for row, lane in enumerate(lanes.rows)]
        bias[grid] = region_bias(masks, text.hidden.shape[1]).to(text.hidden)
    return EncodedTexts(torch.cat([text.hidden, hidden], 1), text.pooled, tuple(cut)), bias


def region_bias(masks: Sequence[Sequence[FloatGrid]], tokens: int) -> Tensor:
    """What masks add to the logits of cross-attention: 0 for the prompt's tokens, log m for those of each region.

    A token that is heard with weight m counts as m tokens would: softmax(l + log m) = m exp(l) / sum. At m = 0 it is
    minus infinity, and the region is not heard at all.

    Args:
        masks: [lanes][regions] of grids [h, w], 0 to 1.
        tokens: T, of the prompt and of each region.

    Returns:
        [lanes, h * w, T (1 + regions)] float32.
    """
    weights = torch.from_numpy(np.stack([np.stack(of_lane) for of_lane in masks])).flatten(2).transpose(1, 2)
    everywhere = weights.new_ones(*weights.shape[:2], 1)
    return torch.cat([everywhere, weights], 2).log().repeat_interleave(tokens, 2)
