"""Candidate words: what pictures may show, from a file or from the prompts themselves."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from turbolens_training.activations.places import PromptError
from turbolens_training.activations.prompt_files import read_lines

MOST: Final = 1000
"""Words and phrases taken of prompts. The server embeds up to 2,000 distinct labels for search by meaning."""
_WORD: Final = r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*"
_RUN: Final = re.compile(rf"{_WORD}(?:\s+{_WORD})*")
"""Words with nothing but space between: a phrase does not reach over a comma."""
_FUNCTION_WORDS: Final = """
a about above across after against all along also am among an and another any are around as at be because been
before behind being below beneath beside between both but by can could did do does doing down during each either
every few for from had has have having he her here hers him his how i if in inside into is it it's its itself just
like many may me more most much my near no nor not of off on one only onto or other our out outside over own per
several she should so some something such than that the their them then there these they this those through to
together too toward towards two under until up upon very was we were what when where which while who whose will
with within without would you your
"""
_FUNCTION: Final = frozenset(_FUNCTION_WORDS.split())


def read_words(path: Path) -> list[str]:
    """The lines of a text file that say something, each once.

    Raises:
        ValueError: it is unreadable or says nothing.
    """
    try:
        words = list(dict.fromkeys(word for line in read_lines(path) if (word := line.strip())))
    except OSError as error:
        raise ValueError(f"--words {path}: unreadable ({error})") from error
    except PromptError as error:
        raise ValueError(f"--words {error}") from error
    if not words:
        raise ValueError(f"--words {path}: holds no word")
    return words


def words_of_prompts(prompts: Iterable[str]) -> list[str]:
    """The content words of prompts, and pairs of them that stand together, in lower case.

    At most `MOST`, those of the most prompts first; of equals the first come first.

    Raises:
        ValueError: there is none.
    """
    counts: collections.Counter[str] = collections.Counter()
    for prompt in prompts:
        counts.update(list(dict.fromkeys(_candidates(prompt.lower()))))  # each once, and ties in a fixed order
    if not counts:
        raise ValueError("the prompts hold no content word; give candidates by --words")
    return [word for word, _ in counts.most_common(MOST)]


def _candidates(prompt: str) -> Iterator[str]:
    for run in _RUN.findall(prompt):
        words = [word if len(word) > 1 and word not in _FUNCTION else None for word in run.split()]
        for at, word in enumerate(words):
            if word is None:
                continue
            yield word
            if at and (before := words[at - 1]):
                yield f"{before} {word}"
