"""The k and prefix of a Matryoshka against the slow twin, and what other SAEs say to them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turbolens_server.sae import sae as sae_module
from turbolens_server.sae.bundle import Bundle, Nesting, SaeWeights
from turbolens_server.sae.sae import Sae
from turbolens_server.sae.twin import encode_dense

D_MODEL, D_SAE, K_MAX, PREFIXES = 16, 40, 8, (10, 20, 40)


def make_bundle(architecture: str) -> Bundle:
    generator = torch.Generator().manual_seed(1)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_MODEL, generator=generator), dim=-1)
    threshold = torch.rand(D_SAE, generator=generator) if architecture == "jumprelu" else None
    weights = SaeWeights(W_dec.T.contiguous(), torch.zeros(D_SAE), W_dec, torch.zeros(D_MODEL), threshold)
    nesting = Nesting(K_MAX, PREFIXES) if architecture == "turbolens-matryoshka" else None
    k = None if architecture == "jumprelu" else 5
    return Bundle("x", "mid.0", architecture, k, weights, None, "", None, {}, nesting=nesting)


@given(k=st.none() | st.integers(1, K_MAX), prefix=st.none() | st.sampled_from(PREFIXES), seed=st.integers(0, 99))
def test_any_k_and_prefix_equal_the_slow_twin(k, prefix, seed):
    bundle = make_bundle("turbolens-matryoshka")
    x = torch.randn(30, D_MODEL, generator=torch.Generator().manual_seed(seed))
    codes = Sae(bundle, torch.device("cpu")).encode(x, k=k, prefix=prefix)
    dense = torch.zeros(30, D_SAE).scatter_add(-1, codes.indices, codes.values)
    assert torch.allclose(dense, encode_dense(bundle, x, k, prefix), atol=1e-5)
    assert ((dense > 0).sum(-1) <= (k or bundle.k)).all()
    assert not dense[:, prefix:].any() or prefix is None


@pytest.mark.parametrize(
    ("architecture", "k", "prefix", "refused"),
    [
        ("turbolens-matryoshka", 9, 30, {"k": "allows 1 to 8", "prefix": "allows 10, 20, 40"}),
        ("turbolens-matryoshka", 0, 0, {"k": "allows 1 to 8", "prefix": "allows 10, 20, 40"}),
        ("topk", 4, 20, {"k": "allows only 5", "prefix": "allows only 40"}),
        ("topk", 5, 40, {}),
        ("jumprelu", 5, 20, {"k": "has no k", "prefix": "allows only 40"}),
        ("jumprelu", None, 40, {}),
    ],
)
def test_what_is_refused_says_what_is_allowed(architecture, k, prefix, refused):
    bundle = make_bundle(architecture)
    assert bundle.refused(k, prefix) == refused
    sae, x = Sae(bundle, torch.device("cpu")), torch.randn(2, D_MODEL)
    if not refused:
        assert torch.equal(sae.encode(x, k=k, prefix=prefix).values, sae.encode(x).values)
        return
    with pytest.raises(ValueError, match=f"prefix={prefix}: the SAE x {refused['prefix']}"):
        sae.encode(x, k=k, prefix=prefix)


def test_a_jumprelu_asks_the_kernels_for_few_sizes_and_gives_what_it_gives_without_them(monkeypatch):
    sizes, encode_jumprelu = [], sae_module.ops.encode_jumprelu

    def record(*arguments):
        sizes.append(arguments[-1])
        return encode_jumprelu(*arguments)

    monkeypatch.setattr(sae_module.ops, "encode_jumprelu", record)
    monkeypatch.setattr(sae_module, "_SLOTS", 2)
    sae, plain = (Sae(make_bundle("jumprelu"), torch.device("cpu")) for _ in range(2))
    sae._fused = True  # as on a GPU; the operators run here too
    widest = set()
    for seed in range(30):
        x = (1 + seed) * torch.randn(1, D_MODEL, generator=torch.Generator().manual_seed(seed))
        ours, theirs = (
            torch.zeros(1, D_SAE).scatter_add(-1, codes.indices, codes.values)
            for codes in (sae.encode(x), plain.encode(x))
        )
        assert torch.allclose(ours, theirs, atol=1e-4)
        widest.add(int((theirs > 0).sum()))
    assert len(widest) > 8
    assert {*sizes} <= {2, 4, 8, 16, 32, D_SAE}
