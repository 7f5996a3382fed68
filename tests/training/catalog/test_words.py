from __future__ import annotations

from pathlib import Path

import pytest

from turbolens_training.catalog.words import MOST, read_words, words_of_prompts


def test_words_of_prompts_are_content_words_and_pairs_that_stand_together() -> None:
    found = words_of_prompts(["A red fox on the snow, oil painting.", "a Red Fox of 1990", "the owl's snow"])
    assert found[:4] == ["red", "fox", "red fox", "snow"]  # in two prompts each
    assert set(found[4:]) == {"oil", "painting", "oil painting", "owl's", "owl's snow"}  # not "snow oil"


def test_a_word_counts_once_a_prompt_and_only_the_most_frequent_are_kept() -> None:
    assert words_of_prompts(["cat. cat. cat", "dog", "dog"]) == ["dog", "cat"]
    letters = "abcdefghijklmnopqrstuvwxyz"
    many = [f"{a}{b}{c}" for a in letters for b in letters for c in "xyz"]
    assert len(words_of_prompts(many)) == MOST


def test_prompts_without_words_say_so() -> None:
    with pytest.raises(ValueError, match="--words"):
        words_of_prompts(["the", "42"])


def test_words_are_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeff a cat \r\n\r\na\u2028b\na cat".encode())
    assert read_words(tmp_path / "a.txt") == ["a cat", "a\u2028b"]
    (tmp_path / "a.txt").write_text("\n\n")
    with pytest.raises(ValueError, match=r"--words .*a\.txt: holds no word"):
        read_words(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(b"ok\n\xff")
    with pytest.raises(ValueError, match=r"--words .*a\.txt, line 2: not UTF-8"):
        read_words(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="--words"):
        read_words(tmp_path / "none.txt")
