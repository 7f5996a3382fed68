"""The account of how good `mini` is: a table, attribute by attribute, and a sheet of pictures to look at."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from turbolens_server.engine.engine import Engine
from turbolens_server.engine.types import Job
from turbolens_server.files import write_files
from turbolens_training.mini.captions import describe
from turbolens_training.mini.evaluate import HELD_OUT_SEED, HeldOut, as_png, psnr, score_attributes, to_image
from turbolens_training.mini.scenes import COUNT, decode_scenes, sample_codes

_BATCH = 8


def held_out(engine: Engine, n: int) -> tuple[HeldOut, list[int]]:
    """Held-out scenes whose first noises are those of the engine's own seeds, so that the exact picture is known."""
    codes = sample_codes(n, torch.Generator().manual_seed(HELD_OUT_SEED))
    rng = random.Random(HELD_OUT_SEED)
    captions = [describe(scene, rng, complete=True) for scene in decode_scenes(codes)]
    seeds = [1_000_000 + i for i in range(n)]
    edge = engine.info.default_size[0] // engine.components.vae_downscale
    noise = [torch.randn(1, 4, edge, edge, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return HeldOut(codes, captions, torch.cat(noise)), seeds


def draw(engine: Engine, captions: list[str], seeds: list[int], steps: int, **job: Any) -> Tensor:
    """Pictures of the engine, [N, 3, H, W] in [-1, 1]."""
    height, width = engine.info.default_size
    jobs = [Job(c, s, steps, height, width, **job) for c, s in zip(captions, seeds, strict=True)]
    pictures = []
    for start in tqdm(range(0, len(jobs), _BATCH), desc=f"{steps} steps", unit="batch", leave=False):
        for result in engine.run(jobs[start : start + _BATCH]):
            if result is None or result.picture is None:
                raise AssertionError("nothing was cancelled, and a picture was asked for")
            pictures.append(torch.from_numpy(result.picture))
    return torch.stack(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def measure(engine: Engine, n: int = 1000, steps: tuple[int, ...] = (1, 4)) -> tuple[dict[str, Any], Tensor]:
    """Score the model on n held-out (caption, seed).

    Returns:
        A JSON-ready report, and pictures for the sheet: [1 + len(steps), 24, 3, H, W], exact ones first.
    """
    held, seeds = held_out(engine, n)
    exact, cover = held.pictures(engine.info.default_size[0])
    some = held.codes[:, COUNT] > 0
    report: dict[str, Any] = {"scenes": n, "model_hash": engine.info.model_hash, "steps": {}}
    sheet = [exact[:24]]
    for count in steps:
        drawn = draw(engine, held.captions, seeds, count)
        sheet.append(drawn[:24])
        report["steps"][str(count)] = {
            "psnr": psnr(drawn, exact).mean().item(),
            "psnr_things": psnr(drawn[some], exact[some], cover[some]).mean().item(),
            "attributes": {
                name: dataclasses.asdict(score)
                for name, score in score_attributes(held.codes, held.noise, drawn).items()
            },
        }
    return report, torch.stack(sheet)


def to_markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    steps = list(report["steps"])
    columns = " | ".join(f"right, {count} step{'s' if count != '1' else ''}" for count in steps)
    lines = [
        "# How well `mini` draws what a caption says",
        "",
        f"On {report['scenes']:,} held-out (caption, seed) pairs; model {report['model_hash'][:12]}. Made by "
        "`turbolens train mini --report`.",
        "",
        "For each attribute the scene is rendered with every value the attribute can take and the same jitter; the "
        "drawn picture is right when the rendering of its own caption is the nearest (squared RGB error over the "
        "whole picture). Every object's attributes count.",
        "",
        f"| attribute | chance | {columns} | cases |",
        "|---|---|" + "---|" * (len(steps) + 1),
    ]
    for name, score in report["steps"][steps[0]]["attributes"].items():
        shares = " | ".join(f"{100 * report['steps'][s]['attributes'][name]['right']:.1f} %" for s in steps)
        lines.append(f"| {name} | {100 * score['chance']:.1f} % | {shares} | {score['count']:,} |")
    for key, title in (("psnr", "PSNR, whole picture"), ("psnr_things", "PSNR, pixels of things")):
        values = " | ".join(f"{report['steps'][s][key]:.1f} dB" for s in steps)
        lines.append(f"| {title} | | {values} | |")
    lines += [
        "",
        f"![Exact pictures, then {' and '.join(steps)} steps](sheet.png)",
        "",
        f"In each group of {1 + len(steps)} rows: the exact picture, then what the model drew in "
        f"{' and '.join(steps)} steps.",
        "",
    ]
    return "\n".join(lines)


def write_report(engine: Engine, folder: Path, n: int = 1000) -> dict[str, Any]:
    """Measure and write `README.md`, `report.json` and `sheet.png` below `folder`; returns the report."""
    report, sheet = measure(engine, n)
    rows = sheet.unflatten(1, (3, 8)).transpose(0, 1).flatten(0, 1)  # [3 * (1 + steps), 8, 3, H, W]
    files: dict[str, bytes | str] = {
        "README.md": to_markdown(report),
        "report.json": json.dumps(report, indent=2) + "\n",
        "sheet.png": as_png(to_image(rows)),
    }
    write_files({folder / name: content for name, content in files.items()})
    return report
