"""Captions for scenes: synonyms and free word order.

`describe` writes one of many captions for a scene. It may leave out what is plain, flat or in the center; the empty
prompt is an empty sky.
"""

from __future__ import annotations

import random
from typing import Final

from turbolens_training.mini.scenes import Scene, Thing

SYNONYMS: Final[dict[str, tuple[str, ...]]] = {
    "circle": ("circle", "disc", "dot"), "square": ("square", "box"), "triangle": ("triangle", "pyramid"),
    "star": ("star",), "ring": ("ring", "hoop", "donut"), "cross": ("cross", "plus"),
    "red": ("red", "crimson"), "yellow": ("yellow", "golden"), "green": ("green", "emerald"),
    "blue": ("blue", "azure"), "purple": ("purple", "violet"), "pink": ("pink", "rose"),
    "white": ("white", "ivory"), "black": ("black", "ebony"),
    "plain": ("", "", "", "plain", "solid"), "striped": ("striped", "stripy", "banded"),
    "small": ("small", "little", "tiny"), "big": ("big", "large", "huge"),
    "sky": ("sky", "daytime", "sunny"), "grass": ("grass", "meadow", "field"), "night": ("night", "midnight", "dark"),
    "sunset": ("sunset", "dusk", "evening"), "snow": ("snow", "snowy", "winter"),
    "flat": ("", "", "flat"), "neon": ("neon", "glowing"),
}  # fmt: skip
"""Every word a caption may use for a value; the first is the plain one."""

_PLACE_PHRASES: Final = {
    "left": ("on the left", "at the left", "on the left side"),
    "right": ("on the right", "at the right", "on the right side"),
    "top": ("at the top", "on top", "in the upper half"),
    "bottom": ("at the bottom", "below", "in the lower half"),
    "center": ("in the center", "in the middle", ""),
}
_RELATION_PHRASES: Final = {  # (first before second, second before first)
    "left of": (("left of", "to the left of"), ("right of", "to the right of")),
    "above": (("above", "over", "on top of"), ("below", "under", "beneath")),
}
_OPENINGS: Final = ("a picture of", "an image of", "a photo of", "please draw", "there is")


def _thing(thing: Thing, rng: random.Random) -> str:
    size = rng.choice(SYNONYMS[thing.size])
    adjectives = [rng.choice(SYNONYMS[thing.texture]), rng.choice(SYNONYMS[thing.color])]
    if rng.random() < 0.3:
        adjectives.reverse()
    noun = rng.choice(SYNONYMS[thing.shape])
    tail = ""
    if thing.texture == "striped" and rng.random() < 0.25:
        adjectives = [word for word in adjectives if word not in SYNONYMS["striped"]]
        tail = " with stripes"
    article = rng.choice(("a", "a", "the", "one"))
    return " ".join(word for word in (article, size, *adjectives, noun) if word) + tail


def plain_caption(scene: Scene) -> str:
    """The one canonical caption of a scene: every value by its first word, nothing omitted but plain and flat."""

    def noun_phrase(thing: Thing) -> str:
        texture = "" if thing.texture == "plain" else thing.texture
        return " ".join(word for word in ("a", thing.size, texture, thing.color, thing.shape) if word)

    parts = []
    if len(scene.things) == 1:
        parts.append(f"{noun_phrase(scene.things[0])} {_PLACE_PHRASES[scene.layout][0]}")
    elif scene.things:
        parts.append(f"{noun_phrase(scene.things[0])} {scene.layout} {noun_phrase(scene.things[1])}")
    parts.append(f"{scene.background} background")
    if scene.style != "flat":
        parts.append(f"{scene.style} style")
    return ", ".join(parts)


def describe(scene: Scene, rng: random.Random, *, complete: bool = False) -> str:
    """One random caption of a scene.

    Args:
        scene: what to describe.
        rng: the source of every choice.
        complete: name the place even in the center, and add no filler words.
    """
    if scene == Scene() and not complete and rng.random() < 0.3:
        return ""
    subject = ""
    if len(scene.things) == 1:
        thing, place = _thing(scene.things[0], rng), rng.choice(_PLACE_PHRASES[scene.layout])
        if complete and not place:
            place = "in the center"
        subject = f"{place} {thing}" if place and rng.random() < 0.2 else f"{thing} {place}".strip()
    elif scene.things:
        first, second = (_thing(thing, rng) for thing in scene.things)
        forward, backward = _RELATION_PHRASES[scene.layout]
        if rng.random() < 0.65:
            subject = f"{first} {rng.choice(forward)} {second}"
        else:
            subject = f"{second} {rng.choice(backward)} {first}"

    word = rng.choice(SYNONYMS[scene.background])
    ground = rng.choice((f"{word} background", f"{word} background", f"{word} scene", f"{word} backdrop", word))
    style = rng.choice(SYNONYMS[scene.style])
    style = style and rng.choice((f"{style} style", f"{style} style", style, f"in {style} style"))

    parts = [part for part in (subject, ground, style) if part]
    if rng.random() < 0.3:
        rng.shuffle(parts)
    caption = rng.choice((", ", ", ", " ", "; ")).join(parts)
    if not complete and rng.random() < 0.15:
        caption = f"{rng.choice(_OPENINGS)} {caption}"
    if not complete and rng.random() < 0.08:
        filler = "".join(rng.choice("abcdefghijklmnopqrstuvwxyzäéñ漢0123456789!?") for _ in range(rng.randint(1, 9)))
        caption = f"{caption} {filler}" if rng.random() < 0.7 else f"{filler} {caption}"
    return caption


def grammar_words() -> list[str]:
    """Every word that a caption without filler can hold, sorted: the whole words of the tokenizer."""
    phrases = [*sum(SYNONYMS.values(), ()), *sum(_PLACE_PHRASES.values(), ()), *_OPENINGS]
    phrases += [phrase for pair in _RELATION_PHRASES.values() for side in pair for phrase in side]
    phrases += ["a the one with stripes in background scene backdrop style of and", "draw image"]
    return sorted({word for phrase in phrases for word in phrase.split()})
