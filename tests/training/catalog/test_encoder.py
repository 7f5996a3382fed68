"""Encoders from folders: a random CLIP, and what is refused in one line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from turbolens_server.files import hash_file
from turbolens_training.catalog.encoder import load_encoder


@pytest.mark.parametrize("kind", ["clip_folder", "siglip_folder"])
def test_a_folder_of_clip_or_siglip_embeds_pictures_and_words(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    encoder = load_encoder(str(folder))
    assert encoder.name == folder.name
    assert encoder.hash == hash_file(folder / "model.safetensors")
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (12 + i % 3, 20, 3), np.uint8) for i in range(70)]  # more than a batch
    embedded = encoder.embed_pictures(pictures)
    assert embedded.dtype == torch.float32
    assert torch.allclose(embedded.norm(dim=1), torch.ones(70), atol=1e-5)
    assert torch.allclose(embedded[66:67], encoder.embed_pictures(pictures[66:67]), atol=1e-5)
    texts = encoder.embed_texts(["red star", "a " + "very " * 100 + "long word"])
    assert texts.shape == (2, embedded.shape[1])
    assert torch.allclose(texts[:1], encoder.embed_texts(["red star"]), atol=1e-5)  # whatever it is padded to


def _pickles_alone(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _without_vision(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("vision_model")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def _twice(folder: Path) -> None:
    index = {"weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")


def _another_kind(folder: Path) -> None:
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=9, **small)).save_pretrained(folder)


def _cut_off(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def _no_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_pickles_alone, "model.safetensors is missing"),
        (_without_vision, "model.safetensors lacks"),
        (_twice, "holds both model.safetensors and model.safetensors.index.json"),
        (_another_kind, "a BertModel does not embed both"),
        (_cut_off, "cannot be loaded"),
        (_no_processor, "does not embed a picture and a word"),
    ],
)
def test_what_is_no_encoder_is_refused_in_one_line(spoil, says: str, clip_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "spoilt"
    shutil.copytree(clip_folder, folder)
    spoil(folder)
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        load_encoder(str(folder))
    assert str(caught.value).startswith(f"--encoder {folder}: ")
    assert "\n" not in str(caught.value)
