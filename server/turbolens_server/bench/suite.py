"""What `turbolens bench` measures."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from turbolens_server.bench import contenders as make
from turbolens_server.bench.config import BenchConfig
from turbolens_server.bench.contenders import BarePipeline, Work
from turbolens_server.bench.device import Speed, measure_speed, peak_memory_mib, settle_of
from turbolens_server.bench.results import assemble
from turbolens_server.bench.roofline import floor_ms, sae_ops, total_flops, unet_ops, vae_ops
from turbolens_server.bench.timing import Aim, Contender, measure
from turbolens_server.engine.engine import Engine
from turbolens_server.loading.load import load_engine


def run(config: BenchConfig) -> dict[str, Any]:
    """Measure every case.

    Raises:
        LoadError: the model or an SAE cannot be loaded, or the size does not fit the model.
        ValueError: there is no SAE to measure.
    """
    began = time.perf_counter()
    engine = load_engine(
        model=config.model,
        device=config.device,
        dtype=config.dtype,
        variant=config.variant,
        saes=config.sae or None,
        backend=config.backend,
        max_batch=max(config.batch),
        size=config.size,
    )
    load_s = time.perf_counter() - began
    info = engine.info
    if not info.saes:
        raise ValueError(f"{config.model} comes without SAEs; name some with --sae")
    height, width = info.default_size
    bare = BarePipeline(engine, config.variant)
    speed = measure_speed(engine.device, engine.components.unet.dtype)
    cases = []
    for batch in config.batch:
        for steps in config.steps:
            print(f"{batch} pictures, {steps} steps", file=sys.stderr)
            cases.append(measure_case(engine, bare, Work(batch, steps, height, width), speed, config.rounds))
    return assemble(
        "bench", config.rounds, cases, model=info.model, model_hash=info.model_hash, backend=info.backend,
        device=info.device, dtype=info.dtype, size=[height, width], load_s=load_s, speed=speed,
        gpu_memory_mib=peak_memory_mib(engine.device),
    )  # fmt: skip


def measure_case(engine: Engine, bare: BarePipeline, work: Work, speed: Speed, rounds: int) -> dict[str, Any]:
    """Every contender at one batch size and number of steps; all have their text encoded beforehand but the last."""
    info, parts = engine.info, engine.components
    points = {point.name: point for point in info.hook_points}
    latent = (work.height // parts.vae_downscale, work.width // parts.vae_downscale)
    unet = unet_ops(parts.unet, work.batch, *latent)
    sae = []
    for served in info.saes.values():
        rows, columns = points[served.hook_point].grid(work.height, work.width)
        sae += sae_ops(work.batch * rows * columns, served.bundle.d_in, served.bundle.d_sae)
    flops = {
        "unet": work.steps * total_flops(unet),
        "vae": total_flops(vae_ops(parts.vae, work.batch, *latent)),
        "sae": work.steps * total_flops(sae),
    }
    of_unet, of_picture = flops["sae"] / flops["unet"], flops["sae"] / (flops["unet"] + flops["vae"])

    every = tuple(info.saes)
    floor = floor_ms(unet + sae, speed, parts.unet.dtype)
    limits = _hopper_limits(engine, work, floor)
    text = bare.embed(make.PROMPT)
    plain, latents = work.jobs(), work.jobs(picture=False)
    extract, extract_latents = work.jobs(saes=every), work.jobs(saes=every, picture=False)
    add, scale = work.jobs(edits=make.eight_adds(engine)), work.jobs(edits=make.scale_each(engine))
    difference = make.largest_difference(make.pictures(engine, plain), bare.run(work, **text))
    contenders = [
        Contender("diffusers", lambda: bare.run(work, **text)),
        Contender("nothing asked", lambda: engine.run(plain), {"diffusers": Aim(_picture_aim(engine, work))}),
        Contender(
            "all features",
            lambda: engine.run(extract),
            {"nothing asked": Aim(_extraction_aim(engine, of_picture)), "diffusers": Aim()},
        ),
        Contender("eight adds", lambda: engine.run(add), {"nothing asked": Aim(1.03)}),
        Contender("a scale a block", lambda: engine.run(scale), {"nothing asked": Aim()}),
        Contender("U-Net alone", make.unet_pass(engine, work, ())),
        Contender(
            "U-Net and features",
            make.unet_pass(engine, work, every),
            {"U-Net alone": Aim(_extraction_aim(engine, of_unet))},
            limits.get("U-Net and features"),
        ),
        Contender("latents only", lambda: engine.run(latents)),
        Contender(
            "features only",
            lambda: engine.run(extract_latents),
            {"latents only": Aim(_extraction_aim(engine, of_unet))},
        ),
        Contender(
            "new prompt to PNG",
            lambda: make.to_png(engine, lambda: work.jobs(make.fresh_prompt())),
            limit_ms=limits.get("new prompt to PNG"),
        ),
    ]
    return {
        "label": {"pictures": work.batch, "steps": work.steps},
        "rows": measure(contenders, rounds, settle_of(engine.device)),
        "flops": flops,
        "sae_share": {"of_unet": of_unet, "of_picture": of_picture},
        "unet_floor_ms": work.steps * floor_ms(unet, speed, parts.unet.dtype),
        "unet_and_features_floor_ms": floor,
        "largest_difference": difference,
    }


def _picture_aim(engine: Engine, work: Work) -> float:
    """How many times the bare pipeline's time a picture may take: less where its operations are compiled for a CPU."""
    if engine.device.type == "cpu" and engine.info.backend == "torch-compile":
        return 0.6 if work.batch == 1 else 0.65
    return 1.0


def _extraction_aim(engine: Engine, share: float) -> float:
    """How often a time it may take to extract features: 3 % more, or on a small model 1.5 times their arithmetic."""
    return 1.03 if min(engine.info.default_size) >= 512 else max(1.015, 1 + 1.5 * share)


def _hopper_limits(engine: Engine, work: Work, floor: float) -> dict[str, float]:
    """Milliseconds that SDXL Turbo should take at most on a Hopper GPU; `floor` is of a pass with features."""
    if engine.device.type != "cuda" or torch.cuda.get_device_capability(engine.device)[0] != 9:
        return {}
    if (work.height, work.width, work.steps) != (512, 512, 1):
        return {}
    if work.batch == 1:
        return {"U-Net and features": 9.0, "new prompt to PNG": 25.0}
    return {"U-Net and features": 1.6 * floor}


def describe_case(case: dict[str, Any]) -> str:
    """What of a case is no time."""
    label, flops, share = case["label"], case["flops"], case["sae_share"]
    return (
        f"{label['pictures']} pictures, {label['steps']} steps: U-Net {flops['unet'] / 1e9:.4g} GFLOP, at least "
        f"{case['unet_floor_ms']:.3g} ms here; VAE {flops['vae'] / 1e9:.4g} GFLOP; SAEs {flops['sae'] / 1e9:.4g} "
        f"GFLOP ({100 * share['of_unet']:.2g} % of the U-Net's, {100 * share['of_picture']:.2g} % of a picture's); "
        f"pictures differ from diffusers' by {case['largest_difference']} of 255 at most"
    )
