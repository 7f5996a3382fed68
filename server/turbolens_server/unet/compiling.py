"""Native code for this CPU of a model's parts, made ahead of time by PyTorch's inductor; `compiled` runs it.

Weights are frozen into the packages, in the order in which the CPU's matrix library wants them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from turbolens_server.files import first_line
from turbolens_server.unet import native, tapped
from turbolens_server.unet.backend import BackendError
from turbolens_server.unet.compiled import CHAINS, DECODER, ORDER, STEERED, TEXT, CompiledParts
from turbolens_server.unet.conditions import Conditions
from turbolens_server.unet.rewriting import rewritten
from turbolens_server.unet.segments import cut_at_points, trace
from turbolens_server.unet.spec import GraphSpec

_TOLERANCE: Final = 1e-4
"""Of the largest magnitude: what a compiled output may differ by from the eager one."""
_CHECKED: Final = (1, 2, 3)
"""Batches that a compiled U-Net is held to the eager one with."""


class _Text(nn.Module):
    """Text encoders with the batch in front, as `trace` wants it: ids [B, 2, tokens]."""

    def __init__(self, encoders: nn.Module) -> None:
        super().__init__()
        self.encoders = encoders

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        encoded: tuple[Tensor, Tensor] = self.encoders(ids.transpose(0, 1))
        return encoded


class _Decoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        decoded: Tensor = self.vae.decode(latents, return_dict=False)[0]
        return decoded


def compile_into(
    folder: Path,
    encoders: nn.Module | None,
    unet: Any,
    vae: Any,
    spec: GraphSpec,
    latent: tuple[int, int],
    threads: int,
    told: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Compile, hold to the eager model, and write.

    Args:
        folder: to write into.
        encoders: `engine.text.Encoders` of the model, in float32 on the CPU; None: they stay as they are.
        unet: likewise.
        vae: likewise.
        spec: as for :func:`compiled_key`, and likewise `latent` and `threads`.
        told: what is being compiled, in words.

    Returns:
        Seconds that it took, and the largest differences found.

    Raises:
        BackendError: it cannot be compiled, or the outcome differs from the eager model.
    """
    began = time.monotonic()
    try:
        told("what runs it")
        native.build(folder)
        order: dict[str, Any] = {}
        for chain, batch in CHAINS.items():
            told("the U-Net for one picture" if batch == 1 else "the U-Net for several pictures")
            order[chain] = _compile_chain(folder, chain, unet, spec, _random_inputs(spec, latent, batch), threads)
        if encoders is not None:
            told("the text encoders")
            for chain, batch in CHAINS.items():
                ids = [_random_ids(encoders, spec, batch)]
                _package(trace(_Text(encoders).eval(), ids), folder / TEXT.format(chain), threads)
        told("the VAE's decoder")
        latents = torch.randn(1, vae.config.latent_channels, *latent)
        _package(trace(_Decoder(vae).eval(), [latents]), folder / DECODER, threads)
        (folder / ORDER).write_text(json.dumps(order, indent=1) + "\n")
        with torch.inference_mode():
            differences = _differences(CompiledParts.load(folder), encoders, unet, vae, spec, latent)
    except BackendError:
        raise
    except Exception as error:  # inductor and compilers have many kinds
        raise BackendError(f"cannot be compiled ({type(error).__name__}: {first_line(error)}); use torch") from error
    if worst := [f"{name} by {found:.1e}" for name, found in differences.items() if not found <= _TOLERANCE]:
        raise BackendError(f"compiled, it differs from the model: {', '.join(worst)} of its largest value; use torch")
    return {"seconds": round(time.monotonic() - began, 1), "differences": differences}


def _random_inputs(spec: GraphSpec, latent: tuple[int, int], batch: int) -> list[Tensor]:
    names = ("sample", "timestep", "text", "pooled", "time_ids")
    generator = torch.Generator().manual_seed(batch)
    inputs = [torch.randn(spec.input_shape(name, batch, *latent), generator=generator) for name in names]
    inputs[1] = torch.full((batch,), 999.0)
    inputs[4] = inputs[4].abs() * 64
    return inputs


def _random_ids(encoders: Any, spec: GraphSpec, batch: int) -> Tensor:
    """Of both tokenizers, [batch, 2, tokens]."""
    configs = [encoder.config for encoder in (encoders.first, encoders.second)]
    generator = torch.Generator().manual_seed(batch)
    known = min(config.vocab_size for config in configs)
    return torch.randint(known, (batch, 2, spec.tokens), generator=generator)


def _compile_chain(
    folder: Path, chain: str, unet: Any, spec: GraphSpec, inputs: list[Tensor], threads: int
) -> dict[str, Any]:
    """Compile a chain's segments in order, each for what the compiled ones before it give: their strides count."""
    names, cut = cut_at_points(unet, [point.name for point in spec.points], inputs)
    values = dict(zip(names, inputs, strict=True))
    links = []
    for number, segment in enumerate(cut):
        file = f"{chain}-{number}"
        taken = [values[name] for name in segment.takes]
        _package(trace(segment.module, taken), folder / file, threads)
        given = native.load(folder / file)(taken)
        values |= dict(zip(segment.gives, given, strict=True))
        values[STEERED] = given[-1].contiguous()
        told = {field.name: getattr(segment, field.name) for field in dataclasses.fields(segment)}
        links.append({**told, "module": file})
    return {"inputs": names, "links": links}


def _package(traced: Any, folder: Path, threads: int) -> None:
    """Compile into a folder: of a package in one file every process that loads it would unpack a copy of its own."""
    settings: dict[str, Any] = {
        "freezing": True,
        "aot_inductor.compile_wrapper_opt_level": "O0",  # it only calls kernels, and takes longest to compile
    }
    # A number that is said stands in every loop, also where a picture is decoded on one core. Where it is that of all
    # cores of the machine it need not be said, and loops take as many as their caller has.
    if not threads == os.cpu_count() == torch.get_num_threads():
        settings["cpp.threads"] = threads
    with tempfile.TemporaryDirectory() as scratch:
        path = str(Path(scratch) / "package.pt2")
        with torch.no_grad():
            torch._inductor.aoti_compile_and_package(rewritten(traced), package_path=path, inductor_configs=settings)
        with zipfile.ZipFile(path) as package:
            for name in package.namelist():
                if not name.endswith((".cpp", "/")):
                    at = folder / Path(*Path(name).parts[1:])  # below a folder called as the file is
                    at.parent.mkdir(parents=True, exist_ok=True)
                    at.write_bytes(package.read(name))


def _differences(
    parts: CompiledParts, encoders: nn.Module | None, unet: Any, vae: Any, spec: GraphSpec, latent: tuple[int, int]
) -> dict[str, float]:
    """Largest difference from the eager model of each output, of its largest magnitude."""
    at = frozenset(point.name for point in spec.points)
    found: dict[str, float] = {}
    for batch in _CHECKED:
        sample, timestep, *heard = _random_inputs(spec, latent, batch)
        given = (sample, timestep, Conditions(*heard))
        ours = _seen(functools.partial(parts.predict, *given, at=at))
        theirs = _seen(functools.partial(tapped.tapped_forward, unet, *given, at=at))
        for output, a, b in zip(("prediction", *sorted(at)), ours, theirs, strict=True):
            found[f"{output}, batch {batch}"] = _apart(a, b)
        if encoders is None:
            continue
        ids = _random_ids(encoders, spec, batch).transpose(0, 1)
        for output, a, b in zip(("text", "pooled text"), parts.encode(ids), encoders(ids), strict=True):
            found[f"{output}, batch {batch}"] = _apart(a, b)
    latents = torch.randn(1, vae.config.latent_channels, *latent, generator=torch.Generator().manual_seed(0))
    found["picture"] = _apart(parts.decode(latents), _Decoder(vae)(latents))
    return found


def _seen(run: Callable[..., Tensor | None]) -> list[Tensor]:
    """The prediction of a pass, and the updates by name, each made half as large on its way."""
    updates: dict[str, Tensor] = {}

    def tap(point: str, update: Tensor, _: tuple[int, int]) -> Tensor:
        updates[point] = update
        return update / 2

    prediction = run(tap=tap)
    assert prediction is not None
    return [prediction, *(updates[point] for point in sorted(updates))]


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())
