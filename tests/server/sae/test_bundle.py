"""What a bundle's own files say wrongly is one line that names the file, before anything is served."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from turbolens_server.loading.hub import embedded_model
from turbolens_server.sae.bundle import BundleError, load_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of one of those that are shipped."""
    folder = tmp_path / "up.0.0"
    shutil.copytree(embedded_model().parent / "mini-saes/up.0.0", folder)
    load_bundle(folder)
    return folder


@pytest.mark.parametrize("name", ["mean", "max", "frequency", "timesteps", "update_rms"])
@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda values: values[:-1], "has shape"), (lambda values: values[None], "has shape"),
        (lambda values: torch.where(values == values[0], torch.nan, values.double()), "not finite"),
        (lambda values: -values - 1, "below 0"),
    ],
    ids=["short", "rank", "nan", "negative"],
)  # fmt: skip
def test_statistics_that_cannot_be_are_never_served(
    bundle: Path, name: str, spoil: Callable[[torch.Tensor], torch.Tensor], line: str
) -> None:
    file = bundle / "feature_stats.safetensors"
    tensors = load_file(file)
    save_file({**tensors, name: spoil(tensors[name]).contiguous()}, file)
    with pytest.raises(BundleError, match=rf"feature_stats.safetensors: .*{line}"):
        load_bundle(bundle)


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ({"k": True}, "k=True, expected 1 to 256"), ({"k": 10.0}, r"k=10.0, expected 1 to 256"),
        ({"d_sae": "256"}, "d_sae='256', expected 256"), ({"d_in": 64}, "d_in=64, expected 128, as the weights have"),
        ({"reshape_activations": "hook_z"}, "reshape_activations='hook_z'; fold it"),
        ({"metadata": "x"}, "metadata='x', expected an object"),
        ({"metadata": {"turbolens": ["x"]}}, "turbolens=.'x'., expected an object"), ({"metadata": None}, "hook_point"),
        ({"metadata": {"turbolens": {"hook_point": 3}}}, "hook_point=3, expected text"),
        ({"metadata": {"turbolens": {"hook_point": "mid.0", "name": 3}}}, "name=3, expected text"),
        ({"metadata": {"turbolens": {"hook_point": "mid.0", "model_hash": 3}}}, "model_hash=3, expected text"),
    ],
    ids=str,
)  # fmt: skip
def test_a_setting_of_another_kind_is_named(bundle: Path, entry: dict[str, object], line: str) -> None:
    file = bundle / "cfg.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entry))
    with pytest.raises(BundleError, match=line):
        load_bundle(bundle)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_weights_that_are_not_finite_are_named(bundle: Path, name: str, value: float) -> None:
    file = bundle / "sae_weights.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file)
    with pytest.raises(BundleError, match=f"{name} holds values that are not finite"):
        load_bundle(bundle)


def test_weights_of_whole_numbers_are_refused(bundle: Path) -> None:
    """Those of a quantized file, without its scales, would be other weights."""
    file = bundle / "sae_weights.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "W_dec": (127 * tensors["W_dec"]).to(torch.int8)}, file)
    with pytest.raises(BundleError, match=r"sae_weights.safetensors: W_dec is int8, expected floating-point"):
        load_bundle(bundle)


def test_a_frequency_is_a_share(bundle: Path) -> None:
    file = bundle / "feature_stats.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "frequency": 100 * tensors["frequency"] + 1.5}, file)
    with pytest.raises(BundleError, match=r"feature_stats.safetensors: frequency holds values above 1"):
        load_bundle(bundle)


@pytest.mark.parametrize(
    ("text", "line"),
    [("{", "unreadable"), ("[]", "holds a list"), ("[" * 200_000, "unreadable")],
    ids=["cut", "list", "deep"],
)
def test_a_broken_provenance_names_its_file(bundle: Path, text: str, line: str) -> None:
    (bundle / "provenance.json").write_text(text)
    with pytest.raises(BundleError, match=rf"provenance.json: {line}"):
        load_bundle(bundle)
