"""The CLIP tokenizer of `mini`: byte-level BPE whose merges make each grammar word one token.

Any other text falls into bytes, so every UTF-8 string has a tokenization and none is unknown.
"""

from __future__ import annotations

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from turbolens_training.mini.captions import grammar_words

CONTEXT_LENGTH = 77
"""Tokens a prompt is cut or padded to, as in CLIP."""


def build_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """The tokenizer of `mini`; SDXL's second tokenizer pads with ``!`` instead of the end token."""
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = [*alphabet, *(symbol + "</w>" for symbol in alphabet)]
    merges: list[str] = []
    for word in grammar_words():
        pieces = [*word[:-1], word[-1] + "</w>"]
        # Merge from the right end, so that merges of different words meet only where their endings agree.
        while len(pieces) > 1:
            pair = (pieces[-2], pieces[-1])
            merged = pair[0] + pair[1]
            if " ".join(pair) not in merges:
                merges.append(" ".join(pair))
                vocabulary.append(merged)
            pieces[-2:] = [merged]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: index for index, token in enumerate(vocabulary)}
    if len(ids) != len(vocabulary):
        raise AssertionError("two merges made the same token")
    return CLIPTokenizer(
        vocab=ids,
        merges=[tuple(merge.split(" ")) for merge in merges],
        pad_token=pad_token,
        model_max_length=CONTEXT_LENGTH,
    )
