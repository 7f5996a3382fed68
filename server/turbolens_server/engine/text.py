"""Text encoding exactly as the SDXL pipeline does it, cached by prompt."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from turbolens_server.cuda_graphs import Graphed

_CACHE_SIZE: Final = 512


@dataclasses.dataclass(frozen=True)
class EncodedText:
    """One prompt, encoded."""

    hidden: Tensor  # [1, tokens, cross_attention_dim]
    pooled: Tensor  # [1, D]
    tokens_cut: int
    """Tokens past the model's limit, which did not reach it."""


@dataclasses.dataclass(frozen=True)
class EncodedTexts:
    """The prompts of a batch, encoded."""

    hidden: Tensor  # [B, tokens, cross_attention_dim]
    pooled: Tensor  # [B, D]
    tokens_cut: tuple[int, ...]
    """Of each."""


class TextEncoder:
    """Both text encoders of an SDXL model with a small cache. Not for use by several threads at once."""

    def __init__(self, tokenizers: tuple[Any, Any], encoders: tuple[Any, Any], device: torch.device) -> None:
        self._tokenizers = tokenizers
        self._encoders = [_hidden_and_pooled(encoder) for encoder in encoders]
        if device.type == "cuda":
            self._encoders = [Graphed(encode) for encode in self._encoders]
        self._device = device
        self._cache: collections.OrderedDict[str, EncodedText] = collections.OrderedDict()

    @property
    def max_tokens(self) -> int:
        """Tokens of a prompt that reach the model, its two end markers included."""
        return int(self._tokenizers[0].model_max_length)

    def encode(self, prompt: str) -> EncodedText:
        """Encode one prompt, of any length and script; tokens past the limit are cut."""
        if prompt in self._cache:
            self._cache.move_to_end(prompt)
            return self._cache[prompt]
        encoded = self.encode_together([prompt])
        self._cache[prompt] = text = EncodedText(encoded.hidden, encoded.pooled, encoded.tokens_cut[0])
        if len(self._cache) > _CACHE_SIZE:
            self._cache.popitem(last=False)
        return text

    def encode_together(self, prompts: Sequence[str]) -> EncodedTexts:
        """Encode prompts in one go and keep nothing: for many that are seen once."""
        hidden, pooled = [], torch.empty(0)
        cut = [0] * len(prompts)
        for tokenizer, encoder in zip(self._tokenizers, self._encoders, strict=True):
            limit = tokenizer.model_max_length
            ids = tokenizer(
                list(prompts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
            ).input_ids
            whole = tokenizer(list(prompts), truncation=False, verbose=False).input_ids
            cut = [max(before, len(tokens) - limit) for before, tokens in zip(cut, whole, strict=True)]
            states, pooled = encoder(ids.to(self._device))  # pooled: of the second encoder in the end
            hidden.append(states)
        return EncodedTexts(torch.cat(hidden, -1), pooled, tuple(cut))

    def encode_all(self, prompts: Sequence[str]) -> EncodedTexts:
        """Encode the prompts of a batch, each by itself: what one becomes never depends on its mates."""
        texts = [self.encode(prompt) for prompt in prompts]
        hidden, pooled = torch.cat([text.hidden for text in texts]), torch.cat([text.pooled for text in texts])
        return EncodedTexts(hidden, pooled, tuple(text.tokens_cut for text in texts))


def _hidden_and_pooled(encoder: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Token ids [1, tokens] -> the hidden states that SDXL reads, and the encoder's first output."""

    def encode(ids: Tensor) -> tuple[Tensor, Tensor]:
        out = encoder(ids, output_hidden_states=True)
        return out.hidden_states[-2], out[0]

    return encode
