"""Prompts encoded together, alone, from the cache, and as the tokenizers themselves would cut and pad them."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

PROMPTS = [f"a {color} star, night background" for color in ("red", "green", "blue", "white", "yellow")]


@pytest.fixture
def text(engine):
    fresh = copy.copy(engine.components.text)
    fresh._cache, fresh._meanings = type(fresh._cache)(), type(fresh._meanings)()
    return fresh


@torch.inference_mode()
def test_a_prompt_is_the_same_alone_together_and_kept(text):
    alone = [text.encode_together([prompt]) for prompt in PROMPTS]
    first = text.encode_all([PROMPTS[0], *PROMPTS, *PROMPTS])  # doubled, and more than go together
    assert len(first.hidden) == 11
    for row, expected in zip((1, 2, 3, 4, 5), alone, strict=True):
        assert torch.allclose(first.hidden[row], expected.hidden[0], atol=1e-5)
        assert torch.allclose(first.pooled[row], expected.pooled[0], atol=1e-5)
        assert torch.equal(first.hidden[row], first.hidden[row + 5])
    assert torch.equal(first.hidden[0], first.hidden[1])
    again = text.encode_all(PROMPTS[::-1])
    assert torch.equal(again.hidden, first.hidden[1:6].flip(0))
    assert torch.equal(text.encode(PROMPTS[2]).hidden[0], first.hidden[3])


@torch.inference_mode()
def test_a_prompt_that_is_kept_keeps_none_of_those_it_came_with(text):
    text.encode_all(PROMPTS)
    for kept in text._cache.values():
        for tensor in (kept.hidden, kept.pooled):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


@torch.inference_mode()
def test_searches_push_no_prompt_out(text, monkeypatch):
    monkeypatch.setattr("turbolens_server.engine.text.PROMPTS_KEPT", 5)
    text.encode_all(PROMPTS)
    words = [f"word {number}" for number in range(9)]
    first = text.pooled([*words, words[0]])
    assert len(first) == 10
    assert torch.equal(first[0], first[9])
    assert torch.allclose(first[3:4], text.encode_together([words[3]]).pooled, atol=1e-5)
    asked = []
    encode = text.encode_together
    monkeypatch.setattr(text, "encode_together", lambda prompts: (asked.extend(prompts), encode(prompts))[1])
    text.encode_all(PROMPTS)
    text.pooled(words[-5:])  # asked again, as for the next page of what was found
    assert not asked


@torch.inference_mode()
def test_what_another_function_encoded_is_forgotten(text):
    before, meaning = text.encode(PROMPTS[0]).hidden, text.pooled([PROMPTS[0]])
    first = text._encode
    text.encode_by(lambda ids: tuple(2 * part for part in first(ids)))
    assert torch.equal(text.encode(PROMPTS[0]).hidden, 2 * before)
    assert torch.equal(text.pooled([PROMPTS[0]]), 2 * meaning)
    kept = text.encode(PROMPTS[0]).hidden
    text.encode_by(text._encode)  # the same again: nothing to forget
    assert text.encode(PROMPTS[0]).hidden is kept


@given(prompt=st.text(max_size=400))
def test_tokens_are_cut_and_padded_as_the_tokenizers_do(engine, prompt):
    text, seen = copy.copy(engine.components.text), []
    text._encode = lambda ids: (seen.append(ids), (torch.zeros(1, 1, 1), torch.zeros(1, 1)))[1]
    cut = text.encode_together([prompt]).tokens_cut[0]
    for ids, tokenizer in zip(seen[0], text._tokenizers, strict=True):
        limit = tokenizer.model_max_length
        expected = tokenizer(prompt, padding="max_length", max_length=limit, truncation=True).input_ids
        assert ids[0].tolist() == expected
        assert cut >= len(tokenizer(prompt, verbose=False).input_ids) - limit
