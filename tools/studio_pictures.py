"""Draw docs/studio/*.webp anew: every screen of the studio at 1440 and 390 pixels, light and dark.

python tools/studio_pictures.py

Starts `turbolens studio --embedded`; needs Chromium and what `make test-studio` installs.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Final
from urllib.parse import urlencode

from PIL import Image
from playwright.sync_api import Page, sync_playwright

OUT: Final = Path(__file__).resolve().parent.parent / "docs" / "studio"
SETTINGS: Final = {"prompt": "a big red circle left of a big red square, sky background", "seed": "7", "steps": "1"}
WIDE: Final = (1440, 900, "light")
NARROW: Final = (390, 844, "dark")


def _save(page: Page, name: str, width: int) -> None:
    page.wait_for_timeout(800)
    page.mouse.move(2, 400)
    path = OUT / f"{name}-{width}.webp"  # small, since the repository holds them
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(path, quality=84, method=6)
    print(path)


def _open(page: Page, address: str, path: str, **query: str) -> None:
    page.goto(f"{address}/{path}?{urlencode({**query, **SETTINGS})}")
    page.wait_for_selector("#main")


def draw(page: Page, address: str, width: int) -> None:
    """Every screen at one width."""
    _open(page, address, "explore")
    page.wait_for_selector("[data-feature]", timeout=60000)
    page.locator("[data-feature^='up.0.0/'] .row-main", has_text="red").click()
    page.evaluate("scrollTo(0, 0)")
    _save(page, "explore", width)
    _open(page, address, "features", q="star")
    _wait_for_thumbs(page)
    _save(page, "features", width)
    _open(page, address, "features", by="place", region="0.050,0.250,0.480,0.750")
    page.wait_for_selector("[data-feature]", timeout=60000)
    _wait_for_thumbs(page)
    _save(page, "place", width)
    _open(page, address, "features/up.0.0/97")
    page.wait_for_selector(".histogram", timeout=120000)
    _wait_for_thumbs(page)
    _save(page, "feature", width)

    _open(page, address, "paint")
    page.get_by_role("button", name="purple", exact=True).click()
    page.wait_for_selector("[data-layer]")
    page.wait_for_timeout(1500)
    box = page.locator(f".canvas.{'plain' if width > 1000 else 'result'} canvas").bounding_box()
    if box is None:
        raise RuntimeError("no canvas to paint on")
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * 0.4)
    page.mouse.down()
    for at in range(20):
        x, y = 0.2 + 0.12 * (at % 2) + 0.005 * at, 0.35 + 0.015 * at
        page.mouse.move(box["x"] + box["width"] * x, box["y"] + box["height"] * y)
    page.mouse.up()
    page.get_by_label("Add a layer by words").fill("sunset")
    page.wait_for_timeout(800)
    page.get_by_label("Add a layer by words").press("Enter")
    page.wait_for_timeout(2500)
    page.evaluate("scrollTo(0, 0)")
    _save(page, "paint", width)
    page.get_by_role("link", name=re.compile("^Compare")).click()
    page.wait_for_selector(".numbers dd", timeout=60000)
    page.wait_for_timeout(1500)
    _save(page, "compare", width)
    page.get_by_role("radio", name=re.compile("^Strength")).click()
    page.wait_for_selector("text=24 of 24", timeout=120000)
    _save(page, "sweep", width)
    page.get_by_role("link", name=re.compile("^History")).click()
    _save(page, "history", width)


def _wait_for_thumbs(page: Page) -> None:
    """Until those that are seen are there."""
    for _ in range(240):
        waiting = """[...document.querySelectorAll(".thumb.loading, canvas.loading, .strip .loading")]
            .filter(one => one.getBoundingClientRect().top < innerHeight).length"""
        if not page.evaluate(waiting) and page.locator(".thumb img").count():
            return
        page.wait_for_timeout(250)


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "turbolens.cli", "studio", "--embedded", "--no-open"]
    studio = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        found = next(filter(None, (re.search(r"http://\S+", line) for line in studio.stdout or ())))
        threading.Thread(target=studio.communicate, daemon=True).start()
        address, _, token = found[0].partition("/?token=")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            for width, height, scheme in (WIDE, NARROW):
                context = browser.new_context(
                    viewport={"width": width, "height": height},
                    color_scheme="light" if scheme == "light" else "dark",
                    has_touch=width < 500,
                )
                page = context.new_page()
                page.goto(f"{address}/?token={token}")
                draw(page, address, width)
                context.close()
            browser.close()
    finally:
        studio.terminate()
        studio.wait(30)


if __name__ == "__main__":
    main()
