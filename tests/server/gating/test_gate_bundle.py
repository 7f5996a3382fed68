"""Gates as folders: written and read whole, and refused with the reason."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from turbolens_server.gating.bundle import GateError, load_gates, save_gates
from turbolens_server.loading.errors import LoadError
from turbolens_server.loading.load import load_engine


def test_what_is_written_is_read(gate_folder, tmp_path):
    bundle = load_gates(gate_folder)
    save_gates(tmp_path / "again", bundle)
    again = load_gates(tmp_path / "again")
    assert again.hash == bundle.hash
    assert len(again.hash) == 64
    assert again.blocks == bundle.blocks
    assert again.provenance == {"recipe": "random"}
    for name, tensor in bundle.tensors().items():
        assert torch.equal(again.tensors()[name], tensor)


def changed(**entries):
    def change(folder):
        file = folder / "gates.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))

    return change


def with_tensors(change):
    def rewrite(folder):
        tensors = load_file(folder / "gates.safetensors")
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "gates.safetensors")

    return rewrite


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: (folder / "gates.safetensors").unlink(), "gates.safetensors is missing"),
        (lambda folder: (folder / "gates.json").write_text("[]"), "holds a list, expected an object"),
        (lambda folder: (folder / "gates.json").write_text("{"), "unreadable"),
        (lambda folder: (folder / "gates.safetensors").write_bytes(b"x"), "unreadable"),
        (changed(format="other"), "format 'other'"),
        (changed(version=2), "version 2"),
        (changed(threshold=1.5), "threshold is 1.5, expected 0 to 1"),
        (changed(threshold=True), "threshold is True"),
        (changed(closed=0), "closed is 0, expected below 0"),
        (changed(closed=-1e5), "at least -60000"),
        (changed(closed=float("nan")), "closed is nan"),
        (changed(model_hash=3), "model_hash is 3"),
        (changed(blocks={}), "blocks is {}"),
        (changed(blocks={"outer": "mid.0"}), "blocks of head outer are 'mid.0'"),
        (changed(blocks={"outer": ["mid.0"], "mid": ["mid.0"]}), "named twice: mid.0"),
        (changed(blocks={"outer": ["mid.0"]}), "nobody knows ['mid.bias'"),
        (with_tensors(lambda t: t.pop("mid.bias")), "missing are ['mid.bias']"),
        (with_tensors(lambda t: t["mid.bias"].fill_(torch.nan)), "mid.bias holds values"),
        (with_tensors(lambda t: t["mid.tokens.in_weight"][0].fill_(torch.inf)), "mid.tokens.in_weight holds values"),
        (with_tensors(lambda t: t.update({"mid.bias": torch.zeros(1)})), "mid.bias has shape (1,)"),
        (with_tensors(lambda t: t.update({"mid.bias": torch.zeros((), dtype=torch.int64)})), "not floating-point"),
        (
            with_tensors(lambda t: t.update({"mid.tokens.out_bias": torch.zeros(9)})),
            "mid.tokens.out_bias has shape (9,), expected (8,)",
        ),
    ],
)
def test_what_is_wrong_is_named(gate_folder, tmp_path, spoil, told):
    folder = tmp_path / "gates"
    shutil.copytree(gate_folder, folder)
    spoil(folder)
    with pytest.raises(GateError) as error:
        load_gates(folder)
    assert told in str(error.value)


def test_gates_of_another_model_need_force(gate_folder, tmp_path):
    folder = tmp_path / "gates"
    shutil.copytree(gate_folder, folder)
    changed(model_hash="f" * 64)(folder)
    with pytest.raises(LoadError, match=r"trained on the model with hash ffffffffffff, but this one .* --force-gate"):
        load_engine(saes=[], gate=str(folder))
    assert load_engine(saes=[], gate=str(folder), force_gate=True).info.gate.forced


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (changed(blocks={"outer": ["down.1.0"], "mid": ["mid.0"]}), "no cross-attention in down.1.0; it has some in"),
        (
            with_tensors(
                lambda t: t.update(
                    {
                        f"mid.features.{n}": t[f"mid.tokens.{n}"].clone()
                        for n in ("norm_weight", "norm_bias", "in_weight")
                    }
                )
            ),
            "head mid reads positions of 256 and tokens of 256 dimensions, and mid.0 has 128 and 256",
        ),
        (lambda folder: (folder / "gates.json").unlink(), "no gates in"),
    ],
)
def test_gates_that_do_not_fit_the_model_are_refused(gate_folder, tmp_path, spoil, told):
    folder = tmp_path / "gates"
    shutil.copytree(gate_folder, folder)
    spoil(folder)
    with pytest.raises(LoadError) as error:
        load_engine(saes=[], gate=str(folder))
    assert told in str(error.value)
    assert str(error.value).startswith("--gate ")


def test_a_graph_compiled_ahead_takes_no_gates(gate_folder):
    with pytest.raises(LoadError, match=r"the backend onnx takes no gates; use --backend torch"):
        load_engine(backend="onnx", gate=str(gate_folder))
