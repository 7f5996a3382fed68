"""What is written otherwise before it is compiled comes to the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from turbolens_server.unet.rewriting import group_norm, rewritten
from turbolens_server.unet.segments import trace


@torch.inference_mode()
@pytest.mark.parametrize("shape", [(2, 12, 64, 70), (1, 12, 5000), (3, 4, 64, 64), (2, 12, 3, 3), (1, 64, 64, 64)])
@pytest.mark.parametrize("affine", [True, False])
def test_a_group_norm_written_out_is_the_group_norm(shape, affine):
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, shape[1], eps=1e-3, affine=affine)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = 100 + torch.randn(shape)  # far from 0, where a variance by the mean of squares is lost
    expected = norm(x.double()) if not affine else norm.double()(x.double())
    found = group_norm(x, 4, *(None if part is None else part.float() for part in (norm.weight, norm.bias)), 1e-3)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=2e-4)


@torch.inference_mode()
@pytest.mark.parametrize("batch", [1, 2])
def test_the_group_norms_that_gain_are_not_left_to_the_compiler(batch):
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.SiLU()).eval()
    for edge, left in ((66, 0), (8, 1)):
        x = torch.randn(batch, 3, edge, edge)
        exported = rewritten(trace(module, [x]))
        assert sum("group_norm" in str(node.target) for node in exported.graph.nodes) == left
        torch.testing.assert_close(exported.module()(x), module(x), rtol=1e-4, atol=1e-5)
