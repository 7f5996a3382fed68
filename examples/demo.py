"""See TurboLens work: serve the embedded model, look behind a picture, steer it, draw a contact sheet.

python examples/demo.py --out demo
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

import turbolens as tl

PROMPT = "a big red circle left of a big red square, sky background"
SEED = 7
CONCEPTS = ("purple", "star", "neon", "sunset", "small")
STRENGTHS = (-2.0, 2.0, 4.0, 6.0)
MASKED = "purple"
GROUP = 4
"""Features of a concept that are moved together."""
TILE, GAP, CAPTION = 160, 10, 34
PAPER, INK = "#ffffff", "#1b1f24"


@contextmanager
def running_server(log: Path) -> Iterator[str]:
    """`turbolens serve` on a free port, stopped at the end; yields its address."""
    command = [sys.executable, "-m", "turbolens.cli", "serve", "--port", "0", "--log-format", "json"]
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file)
        try:
            deadline = time.monotonic() + 300
            while not (found := re.search(r'"address": "([^"]+)"', log.read_text())):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the server did not start; it said:\n{log.read_text()}")
                time.sleep(0.1)
            yield found[1]
        finally:
            process.terminate()
            process.wait(60)


def wait_until_ready(lens: tl.Lens) -> None:
    """Ask for the model until it is loaded."""
    deadline = time.monotonic() + 300
    while True:
        try:
            lens.model()
        except tl.Unavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return


def show(call: str) -> None:
    """Print an SDK call."""
    print(textwrap.indent(textwrap.dedent(call).strip(), "    "))


def change(a: tl.Picture, b: tl.Picture) -> npt.NDArray[np.float64]:
    """Mean absolute difference of each pixel, [height, width], of 255."""
    difference: npt.NDArray[np.float64] = np.abs(a.array.astype(np.float64) - b.array).mean(-1)
    return difference


def concept_features(lens: tl.Lens, words: str, base: tl.Picture) -> tuple[list[tl.Match], float]:
    """The block whose features for some words move the picture most, and by how much of 255.

    A word finds features in every block; which block carries the concept is seen by trying.
    """
    best: tuple[list[tl.Match], float] = ([], -1.0)
    for sae in lens.model().saes:
        found = lens.search_features(words, block=sae.name)[:GROUP]
        if not found:
            continue
        tried = lens.generate(base.prompt, seed=base.seed, steer=[tl.add(found, 6)])
        moved = float(change(base, tried).mean()) * float(np.mean([match.score for match in found]))
        best = max(best, (found, moved), key=lambda pair: pair[1])
    return best


class Sheet:
    """Labelled rows of pictures."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, list[tuple[str, Image.Image]]]] = []

    def row(self, title: str, tiles: list[tuple[str, Image.Image]]) -> None:
        self._rows.append((title, tiles))

    def draw(self) -> Image.Image:
        columns = max(len(tiles) for _, tiles in self._rows)
        width = GAP + columns * (TILE + GAP)
        height = GAP + len(self._rows) * (26 + TILE + CAPTION + GAP)
        sheet = Image.new("RGB", (width, height), PAPER)
        draw = ImageDraw.Draw(sheet)
        y = GAP
        for title, tiles in self._rows:
            draw.text((GAP, y), title, INK, font=ImageFont.load_default(16))
            y += 26
            for i, (caption, picture) in enumerate(tiles):
                x = GAP + i * (TILE + GAP)
                sheet.paste(picture.resize((TILE, TILE), Image.Resampling.BICUBIC), (x, y))
                for j, line in enumerate(textwrap.wrap(caption, 26)[:2]):
                    draw.text((x, y + TILE + 3 + 15 * j), line, "#57606a", font=ImageFont.load_default(12))
            y += TILE + CAPTION + GAP
        return sheet


def explore(lens: tl.Lens, out: Path) -> None:
    """Everything that the demo shows."""
    sheet = Sheet()
    print("\n1. A picture, and the features behind it")
    show(f"""
        base = lens.generate("{PROMPT}", seed={SEED})
        feats = lens.extract(base.prompt, seed={SEED})
        feats["up.0.1"].top(5)
    """)
    base = lens.generate(PROMPT, seed=SEED)
    base.save(out / "base.png")
    feats = lens.extract(PROMPT, seed=SEED)
    print(feats["up.0.1"].top(5))

    tiles = [("the picture", base.image)]
    for sae, own in feats.items():
        strongest = next((row for row in own.top(20) if row.label), own.top(1)[0])
        tiles.append((f"{strongest.ref}: {strongest.label or 'no label'}", own.overlay(strongest, base)))
        if sae == "up.0.1":
            tiles[-1][1].resize((512, 512), Image.Resampling.BICUBIC).save(out / "heatmap.png")
    sheet.row(f'"{PROMPT}", seed {SEED}, and where each block fires most', tiles)

    print("\n2. Concepts found by words, added at several strengths (in means of the feature)")
    chosen = {}
    for words in CONCEPTS:
        features, _ = concept_features(lens, words, base)
        if not features:
            print(f"   no feature for {words!r}")
            continue
        chosen[words] = features
        block = features[0].ref.sae
        show(f"""
            found = lens.search_features("{words}", block="{block}")
            {words} = [match for match in found if "{words}" in match.feature.label][:{GROUP}]
            lens.generate(base.prompt, seed={SEED}, steer=[tl.add({words}, 4)])
        """)
        tiles = [("0 (the picture itself)", base.image)]
        for strength in STRENGTHS:
            steered = lens.generate(PROMPT, seed=SEED, steer=[tl.add(features, strength)])
            tiles.append((f"{strength:+g}", steered.image))
        labels = ", ".join(dict.fromkeys(match.feature.label for match in features if match.feature.label))
        sheet.row(f'"{words}" in {block}: {labels[:90]}', tiles)

    print("\n3. One edit, masked to the left half")
    features = chosen.get(MASKED) or next(iter(chosen.values()))
    words = next(name for name, matches in chosen.items() if matches is features)
    show(f"lens.generate(base.prompt, seed={SEED}, steer=[tl.add({words}, 5, mask=tl.box(0, 0, 0.5, 1))])")
    masked = lens.generate(PROMPT, seed=SEED, steer=[tl.add(features, 5, mask=tl.box(0, 0, 0.5, 1))])
    difference = change(base, masked)
    width = difference.shape[1]
    inside, far = difference[:, : width // 2].mean(), difference[:, 3 * width // 4 :].mean()
    print(f"   mean change inside the mask {inside:.2f} of 255, in the far quarter {far:.2f}")
    shown = np.repeat(np.clip(difference * 4, 0, 255).astype(np.uint8)[..., None], 3, -1)
    tiles = [
        ("the picture", base.image),
        (f"{words} +5, left half only", masked.image),
        (f"change x4: {inside:.1f} inside, {far:.1f} in the far quarter", Image.fromarray(shown)),
    ]
    sheet.row(f'"{words}" on the left half only', tiles)
    sheet.draw().save(out / "contact-sheet.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the pictures")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    print("Starting the server on the embedded model: turbolens serve")
    with running_server(out / "server.log") as address, tl.connect(address) as lens:
        wait_until_ready(lens)
        show(f'lens = tl.connect("{address}")')
        explore(lens, out)
    print(f"\nLook at {out / 'contact-sheet.png'}")
    print("Then paint with these features yourself, in a browser: make studio")


if __name__ == "__main__":
    main()
