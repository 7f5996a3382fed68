from __future__ import annotations

from pathlib import Path

import pytest
import torch

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**SMALL, "image_size": 32, "patch_size": 16}


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with random weights, as `transformers` saves one."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    from turbolens_training.mini.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**SMALL, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SigLIP with random weights; its tokenizer is `mini`'s."""
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    from turbolens_training.mini.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    text = {**SMALL, "vocab_size": len(tokenizer), "projection_size": 16}
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("siglip")
    SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder
