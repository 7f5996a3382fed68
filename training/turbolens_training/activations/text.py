"""Captions to text encodings, a batch at a time: the server's encoder works prompt by prompt and caches."""

from __future__ import annotations

import torch
from torch import Tensor

from turbolens_server.engine.text import TextEncoder


def encode_captions(text: TextEncoder, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Hidden states [B, tokens, cross_attention_dim] and pooled text [B, D], as `TextEncoder.encode` gives them."""
    hidden, pooled = [], torch.empty(0)
    for tokenizer, encoder in zip(text._tokenizers, text._encoders, strict=True):
        limit = tokenizer.model_max_length
        ids = tokenizer(
            captions, padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        ).input_ids
        out = encoder(ids.to(text._device), output_hidden_states=True)
        pooled = out[0]  # of the second encoder in the end
        hidden.append(out.hidden_states[-2])
    return torch.cat(hidden, -1), pooled
