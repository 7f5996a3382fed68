"""Painting in the studio: from the pointer's release to the new picture on the screen, beside the engine's own time.

python -m benchmarks.live_painting

Needs Chromium and what `make test-studio` installs. Server, studio and browser share this machine's cores, of which
the engine, here and alone, leaves one to the others, as `turbolens studio --embedded` does; each stroke is painted with
live drawing on, so that a picture of an earlier moment of the stroke may still be under way.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from playwright.sync_api import Page, sync_playwright

import turbolens as tl
from benchmarks.places import RESULTS
from benchmarks.report import section
from turbolens_server.bench.contenders import Work
from turbolens_server.bench.results import machine
from turbolens_server.loading.load import load_engine

PROMPT = "a big red circle left of a big red square, sky background"
AIM = 1.3
"""The median, in times of the engine's own."""
_MOVES = 40
_STROKE_S = 0.6


def main(rounds: int = 60, out: Path = RESULTS / "live_painting.json") -> None:
    """Measure and write.

    Args:
        rounds: strokes, each beside one run of the engine and one call of the SDK.
        out: JSON file to write.
    """
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("no Chromium: apt-get install chromium")
    where = machine()
    threads = max(1, (os.cpu_count() or 2) - 1)
    torch.set_num_threads(threads)
    engine = load_engine()
    jobs = Work(1, 1, *engine.info.default_size).jobs()
    server, address = _start(
        ["serve", "--port", "0", "--threads", str(threads), "--backend", "torch", "--log-format", "json"],
        r'"address": "([^"]+)"',
        '"ready"',
    )
    studio, page_address = _start(["studio", "--server", address, "--no-open"], r"(http://\S+)", "http")
    try:
        with sync_playwright() as playwright, tl.connect(address) as lens:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            loaded = _open(page, page_address)
            purple = lens.search_features("purple", block="up.0.0")[:4]
            steer = [tl.add(purple, 4)]
            strokes, engines, calls = [], [], []
            for at in range(rounds + 3):
                strokes.append(_stroke(page, at))
                print(
                    f"stroke {at}: {strokes[-1]['total']:.0f} ms, the server {strokes[-1]['server']:.0f}",
                    file=sys.stderr,
                )
                engines.append(_timed(lambda: engine.run(jobs)))
                calls.append(_timed(lambda: lens.generate(PROMPT, seed=7, steer=steer, format="raw")))
            browser.close()
    finally:
        for process in (studio, server):
            process.terminate()
            process.wait(30)
    result = _result(strokes[3:], engines[3:], calls[3:], loaded, where)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(section(out.stem, out.parent, out.parent))


def _start(command: list[str], shows: str, until: str) -> tuple[subprocess.Popen[str], str]:
    """A command, once it says where it is and that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "turbolens.cli", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    address = ""
    for line in process.stdout or ():
        found = re.search(shows, line)
        address = found[1] if found else address
        if until in line:
            # Whoever writes to a pipe that nobody reads stops at some line.
            threading.Thread(target=process.communicate, daemon=True).start()
            return process, address
    raise SystemExit(f"turbolens {command[0]} did not start")


def _open(page: Page, address: str) -> dict[str, float]:
    """Open the painting screen with a layer; what the first load of the page took, in milliseconds and bytes."""
    page.goto(address)
    page.wait_for_selector("[data-feature]", timeout=60000)
    loaded: dict[str, float] = page.evaluate(
        """() => {
            const page = performance.getEntriesByType("navigation")[0];
            const all = [page, ...performance.getEntriesByType("resource")];
            const files = all.filter(one => !one.name.includes("/api/"));
            return {
                interactive_ms: page.domInteractive - page.startTime,
                loaded_ms: page.loadEventEnd - page.startTime,
                painted_ms: performance.getEntriesByName("first-contentful-paint")[0].startTime,
                compressed_bytes: files.reduce((sum, one) => sum + one.encodedBodySize, 0),
            };
        }"""
    )
    page.get_by_role("link", name=re.compile("^Paint")).click()
    page.get_by_role("button", name="purple", exact=True).click()
    page.wait_for_selector("[data-layer]")
    page.wait_for_timeout(2000)
    return loaded


def _stroke(page: Page, at: int) -> dict[str, float]:
    """One stroke, and what the page measured of it: all of it, and its parts."""
    box = page.locator(".canvas.plain canvas").bounding_box()
    if box is None:
        raise RuntimeError("no canvas to paint on")
    x = box["x"] + box["width"] * (0.15 + 0.6 * ((at * 7) % 11) / 11)
    y = box["y"] + box["height"] * (0.2 + 0.06 * (at % 10))
    page.evaluate("performance.clearMeasures()")
    page.mouse.move(x, y)
    page.mouse.down()
    began = time.monotonic()
    for step in range(1, _MOVES + 1):
        page.mouse.move(x + step * 1.5, y + 12 * np.sin(step / 5))
        page.wait_for_timeout(max(0.0, (began + step * _STROKE_S / _MOVES - time.monotonic()) * 1000))
    page.mouse.up()
    measured: dict[str, float] | None = None
    while measured is None:
        page.wait_for_timeout(25)
        measured = page.evaluate(
            """() => {
                const found = performance.getEntriesByName("stroke to picture")[0];
                return found ? {total: found.duration, ...found.detail} : null;
            }"""
        )
    page.wait_for_timeout(300)
    page.keyboard.press("Control+z")  # every stroke begins from the same mask
    page.wait_for_timeout(600)
    return measured


def _timed(call: Any) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1000


def _result(
    strokes: list[dict[str, float]],
    engines: list[float],
    calls: list[float],
    loaded: dict[str, float],
    where: dict[str, Any],
) -> dict[str, Any]:
    def two(values: Any) -> dict[str, float]:
        return {"p50": float(np.percentile(values, 50)), "p95": float(np.percentile(values, 95))}

    total = np.array([one["total"] for one in strokes])
    parts = {
        "before it is asked for: waiting for a picture of an earlier moment, coding the mask": total
        - [one["all"] for one in strokes],
        "the server: queue, engine, sending raw pixels": np.array([one["server"] for one in strokes]),
        "the studio: checking, coding PNG": np.array([one["studio"] - one["server"] for one in strokes]),
        "socket, decoding, drawing": np.array([one["all"] - one["studio"] for one in strokes]),
    }
    return {
        "benchmark": "live_painting",
        "machine": where,
        "strokes": len(strokes),
        "release_to_picture_ms": two(total),
        "engine_ms": two(engines),
        "sdk_steered_ms": two(calls),
        "ratio_to_engine": float(np.median(total) / np.median(engines)),
        "ratio_to_sdk_steered": float(np.median(total) / np.median(calls)),
        "parts": {
            name: {**two(values), "share": float(values.mean() / total.mean())} for name, values in parts.items()
        },
        "first_load": loaded,
        "aim": AIM,
    }


if __name__ == "__main__":
    tyro.cli(main)
