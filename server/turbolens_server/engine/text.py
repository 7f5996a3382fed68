"""Text encoding exactly as the SDXL pipeline does it, cached by prompt."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn

from turbolens_server.cuda_graphs import Graphed

T = TypeVar("T")

PROMPTS_KEPT: Final = 512
"""Encoded prompts that are kept for callers who come back with them."""
_TOGETHER: Final = 8
"""Prompts encoded in one go: on a GPU each number is a recording of its own."""


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

    @classmethod
    def joined(cls, texts: Sequence[EncodedTexts]) -> EncodedTexts:
        """Those of several batches as of one."""
        if len(texts) == 1:
            return texts[0]
        hidden, pooled = (torch.cat([getattr(text, name) for text in texts]) for name in ("hidden", "pooled"))
        return cls(hidden, pooled, tuple(cut for text in texts for cut in text.tokens_cut))


Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Token ids of both tokenizers [2, B, tokens] -> hidden states [B, tokens, D] and pooled text [B, D']."""


class Encoders(nn.Module):
    """Both text encoders as one function. On a GPU they run at once: neither fills it."""

    def __init__(self, first: Any, second: Any, device: torch.device) -> None:
        super().__init__()
        self.first, self.second = first, second
        self._device = device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """See :data:`Encode`."""
        side = self._side
        if side is None:
            small = self.first(ids[0], output_hidden_states=True)
        else:
            side.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(side):
                small = self.first(ids[0], output_hidden_states=True)
        large = self.second(ids[1], output_hidden_states=True)
        if side is not None:
            torch.cuda.current_stream(self._device).wait_stream(side)
        return torch.cat([small.hidden_states[-2], large.hidden_states[-2]], -1), large[0]


class TextEncoder:
    """Both text encoders of an SDXL model with a small cache. Not for use by several threads at once."""

    def __init__(
        self,
        tokenizers: tuple[Any, Any],
        encode: Encode,
        device: torch.device,
        *,
        zeros_for_nothing: bool = False,
    ) -> None:
        """`zeros_for_nothing`: no text at all is zeros, as the U-Net was trained, and not the empty text."""
        self._tokenizers = tokenizers
        self._zeros_for_nothing = zeros_for_nothing
        self._encode = Graphed(encode) if device.type == "cuda" else encode
        self._device = device
        self._cache: collections.OrderedDict[str, EncodedText] = collections.OrderedDict()
        self._meanings: collections.OrderedDict[str, Tensor] = collections.OrderedDict()

    def encode_by(self, encode: Encode) -> None:
        """Encode what comes next by another function, and forget what this one's forerunner encoded."""
        if encode is not self._encode:
            self._encode = encode
            self._cache.clear()
            self._meanings.clear()

    @property
    def max_tokens(self) -> int:
        """Tokens of a prompt that reach the model, its two end markers included."""
        return int(self._tokenizers[0].model_max_length)

    @property
    def vocabulary(self) -> frozenset[str]:
        """All that the model's first tokenizer can make of a text."""
        return frozenset(self._tokenizers[0].get_vocab())

    def tokens(self, prompt: str) -> tuple[str, ...]:
        """The tokens of a prompt as the U-Net hears them, by the first tokenizer, end markers and padding included."""
        tokenizer = self._tokenizers[0]
        ids = tokenizer([prompt], truncation=False, verbose=False).input_ids[0]
        return tuple(tokenizer.convert_ids_to_tokens(_fitted(ids, tokenizer.model_max_length, tokenizer.pad_token_id)))

    def encode(self, prompt: str) -> EncodedText:
        """Encode one prompt, of any length and script; tokens past the limit are cut."""
        return self._encode_missing([prompt])[0]

    def encode_together(self, prompts: Sequence[str]) -> EncodedTexts:
        """Encode prompts in one go and keep nothing: for many that are seen once."""
        rows, cut = [], [0] * len(prompts)
        for tokenizer in self._tokenizers:
            limit = tokenizer.model_max_length
            whole = tokenizer(list(prompts), truncation=False, verbose=False).input_ids
            cut = [max(before, len(ids) - limit) for before, ids in zip(cut, whole, strict=True)]
            rows.append([_fitted(ids, limit, tokenizer.pad_token_id) for ids in whole])
        hidden, pooled = self._encode(torch.tensor(rows, device=self._device))
        return EncodedTexts(hidden, pooled, tuple(cut))

    def warm_up(self) -> None:
        """Encode as many prompts at once as will ever be, and each smaller number."""
        for count in range(1, _TOGETHER + 1):
            self.encode_together([""] * count)

    def encode_all(self, prompts: Sequence[str | None]) -> EncodedTexts:
        """Encode the prompts of a batch; those that are not kept from before in one go, a few at a time.

        None is no text, which is not the empty one: see `zeros_for_nothing`.
        """
        zeros = self._zeros_for_nothing
        found = iter(self._encode_missing([prompt or "" for prompt in prompts if prompt is not None or not zeros]))
        heard = [None if prompt is None and zeros else next(found) for prompt in prompts]
        one = next((text for text in heard if text is not None), None) or self.encode("")
        nothing = EncodedText(torch.zeros_like(one.hidden), torch.zeros_like(one.pooled), 0)
        texts = [text or nothing for text in heard]
        hidden, pooled = torch.cat([text.hidden for text in texts]), torch.cat([text.pooled for text in texts])
        return EncodedTexts(hidden, pooled, tuple(text.tokens_cut for text in texts))

    def pooled(self, texts: Sequence[str]) -> Tensor:
        """Pooled text of words that nobody draws, [n, D]; what is kept of them is small and pushes out no prompt."""
        found = {text: self._meanings[text] for text in texts if text in self._meanings}
        for group, encoded in self._encode_groups([text for text in texts if text not in found]):
            found |= {text: row.clone() for text, row in zip(group, encoded.pooled.split(1), strict=True)}
        _keep(self._meanings, found)
        return torch.cat([found[text] for text in texts])

    def _encode_groups(self, texts: Sequence[str]) -> Iterator[tuple[list[str], EncodedTexts]]:
        """Texts without repetition, a few at a time, each group encoded in one go."""
        missing = list(dict.fromkeys(texts))
        for start in range(0, len(missing), _TOGETHER):
            group = missing[start : start + _TOGETHER]
            yield group, self.encode_together(group)

    def _encode_missing(self, prompts: Sequence[str]) -> list[EncodedText]:
        found = {prompt: self._cache[prompt] for prompt in prompts if prompt in self._cache}
        for group, encoded in self._encode_groups([prompt for prompt in prompts if prompt not in found]):
            rows = zip(encoded.hidden.split(1), encoded.pooled.split(1), encoded.tokens_cut, strict=True)
            # Copies: a row is a view of its whole group, which it would keep for as long as itself.
            found |= {
                prompt: EncodedText(hidden.clone(), pooled.clone(), cut)
                for prompt, (hidden, pooled, cut) in zip(group, rows, strict=True)
            }
        _keep(self._cache, found)
        return [found[prompt] for prompt in prompts]


def _keep(cache: collections.OrderedDict[str, T], used: Mapping[str, T]) -> None:
    """Put what was just used at a cache's end, and drop from its front what is too much."""
    for text, encoded in used.items():
        cache[text] = encoded
        cache.move_to_end(text)
    while len(cache) > PROMPTS_KEPT:
        cache.popitem(last=False)


def _fitted(ids: list[int], limit: int, padding: int) -> list[int]:
    """Tokens with both end markers, as tokenizers cut and pad them: the last one stays in any case."""
    return ids + [padding] * (limit - len(ids)) if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]
