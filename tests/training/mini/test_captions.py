"""Captions, and the tokenizer that reads them and anything else."""

from __future__ import annotations

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from turbolens_training.mini.captions import SYNONYMS, describe, grammar_words, plain_caption
from turbolens_training.mini.scenes import Scene, Thing, decode_scenes, sample_codes
from turbolens_training.mini.tokenizer import CONTEXT_LENGTH, build_tokenizer


def test_a_plain_caption_reads_like_english():
    scene = Scene((Thing("star", "red", "striped", "small"), Thing("ring", "blue")), "above", "night", "neon")
    expected = "a small striped red star above a big blue ring, night background, neon style"
    assert plain_caption(scene) == expected
    assert plain_caption(Scene()) == "sky background"


def test_complete_captions_name_every_value():
    rng = random.Random(0)
    for scene in decode_scenes(sample_codes(300, torch.Generator().manual_seed(0))):
        words = describe(scene, rng, complete=True).replace(",", " ").replace(";", " ").split()
        values = [scene.background, *(v for t in scene.things for v in (t.shape, t.color, t.size))]
        values += [t.texture for t in scene.things if t.texture == "striped"] + [scene.style] * (scene.style == "neon")
        for value in values:
            assert {*SYNONYMS[value], "stripes" if value == "striped" else value} & set(words), (value, words)


def test_captions_vary():
    scene = Scene((Thing("star", "blue", "striped", "small"),), "left", "snow", "neon")
    assert len({describe(scene, random.Random(i)) for i in range(200)}) > 150


def test_the_empty_prompt_is_an_empty_sky():
    assert "" in {describe(Scene(), random.Random(i)) for i in range(50)}
    assert "" not in {describe(Scene((Thing(),)), random.Random(i)) for i in range(200)}


def test_each_grammar_word_is_one_token():
    tokenizer = build_tokenizer()
    for word in grammar_words():
        assert len(tokenizer(word).input_ids) == 3, word


@given(st.text(max_size=300))
def test_any_text_has_tokens_and_none_is_unknown(text):
    tokenizer = build_tokenizer()
    ids = tokenizer(text, padding="max_length", truncation=True, max_length=CONTEXT_LENGTH).input_ids
    assert len(ids) == CONTEXT_LENGTH
    assert ids[0] == tokenizer.bos_token_id
    body = tokenizer(text, add_special_tokens=False).input_ids
    if "<|" not in text:
        assert tokenizer.unk_token_id not in body
