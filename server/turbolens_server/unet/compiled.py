"""The U-Net and the VAE's decoder as native code for this CPU, made ahead of time by PyTorch's inductor.

The U-Net is two chains of packages that end at the hook points (see `segments`): one for a single picture, one for any
larger batch. The decoder is one package, since pictures are decoded one by one. Weights are frozen into the packages,
in the order in which the CPU's matrix library wants them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from turbolens_server.files import first_line
from turbolens_server.unet import attention_taps, conditions, segments, tapped
from turbolens_server.unet.backend import BackendError, Tap, UNetBackend
from turbolens_server.unet.conditions import Conditions
from turbolens_server.unet.graph import GraphSpec
from turbolens_server.unet.segments import STEERED, Segment, cut_at_points, trace

NAME: Final = "torch-compile"
_CHAINS: Final = {"one": 1, "several": 2}
"""Batch that each chain is traced with."""
_DECODER: Final = "decoder.pt2"
_ORDER: Final = "chains.json"
_TOLERANCE: Final = 1e-4
"""Of the largest magnitude: what a compiled output may differ by from the eager one."""
_CHECKED: Final = (1, 2, 3)
"""Batches that a compiled U-Net is held to the eager one with."""

Run = Callable[[list[Tensor]], Sequence[Tensor]]
"""A loaded package."""


def compiler_missing() -> str | None:
    """Why nothing can be compiled here, in words; None where it can."""
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"no C++ compiler ({compiler}) to compile with"


def compiled_key(spec: GraphSpec, model: str, components: str, latent: tuple[int, int], threads: int) -> dict[str, Any]:
    """All that decides what the packages are.

    Args:
        spec: of the hook points and the U-Net's inputs.
        model: hash of the U-Net's weights.
        components: hash of all else that draws, the VAE and the U-Net's configuration among it.
        latent: (height, width) of the latents.
        threads: that will run them; their number is part of the code.
    """
    sources = (attention_taps, conditions, segments, tapped)
    code = "".join(Path(str(source.__file__)).read_text() for source in sources) + Path(__file__).read_text()
    return {
        "model": model,
        "components": components,
        "spec": dataclasses.asdict(spec),
        "latent": list(latent),
        "threads": threads,
        "cpu": _cpu(),
        "torch": torch.__version__,
        "code": hashlib.sha256(code.encode()).hexdigest(),
    }


def _cpu() -> str:
    """This CPU's instruction set, in short."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    digest = hashlib.sha256(" ".join(sorted(flags)).encode()).hexdigest()[:12]
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {digest}"


# Making


class _Decoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        decoded: Tensor = self.vae.decode(latents, return_dict=False)[0]
        return decoded


def compile_into(
    folder: Path,
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
        unet: in float32 on the CPU.
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
        order: dict[str, Any] = {}
        for chain, batch in _CHAINS.items():
            told("the U-Net for one picture" if batch == 1 else "the U-Net for several pictures")
            order[chain] = _compile_chain(folder, chain, unet, spec, _random_inputs(spec, latent, batch), threads)
        told("the VAE's decoder")
        latents = torch.randn(1, vae.config.latent_channels, *latent)
        _package(trace(_Decoder(vae).eval(), [latents]), folder / _DECODER, threads)
        (folder / _ORDER).write_text(json.dumps(order, indent=1) + "\n")
        with torch.inference_mode():
            differences = _differences(CompiledParts.load(folder), unet, vae, spec, latent)
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


def _compile_chain(
    folder: Path, chain: str, unet: Any, spec: GraphSpec, inputs: list[Tensor], threads: int
) -> dict[str, Any]:
    """Compile a chain's segments in order, each for what the compiled ones before it give: their strides count."""
    names, cut = cut_at_points(unet, [point.name for point in spec.points], inputs)
    values = dict(zip(names, inputs, strict=True))
    links = []
    for number, segment in enumerate(cut):
        file = f"{chain}-{number}.pt2"
        taken = [values[name] for name in segment.takes]
        _package(trace(segment.module, taken), folder / file, threads)
        given = _load(folder / file)(taken)
        values |= dict(zip(segment.gives, given, strict=True))
        values[STEERED] = given[-1].contiguous()
        told = {field.name: getattr(segment, field.name) for field in dataclasses.fields(segment)}
        links.append({**told, "module": file})
    return {"inputs": names, "links": links}


def _package(traced: Any, path: Path, threads: int) -> None:
    settings = {
        "freezing": True,
        "cpp.threads": threads,
        "aot_inductor.compile_wrapper_opt_level": "O0",  # it only calls kernels, and takes longest to compile
    }
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(traced, package_path=str(path), inductor_configs=settings)


def _differences(
    parts: CompiledParts, unet: Any, vae: Any, spec: GraphSpec, latent: tuple[int, int]
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


# Running


def _load(path: Path) -> Run:
    package: Any = torch._inductor.aoti_load_package(str(path), run_single_threaded=True)
    run: Run = package.loader.boxed_run
    return run


@dataclasses.dataclass(frozen=True)
class _Chain:
    inputs: tuple[str, ...]
    links: tuple[Segment, ...]

    def run(self, given: Sequence[Tensor], tap: tapped.OnUpdate, at: frozenset[str], stop: str | None) -> Tensor | None:
        values = dict(zip(self.inputs, given, strict=True))
        for link in self.links:
            # The list is emptied by the call, so that what nobody needs any more is freed in the middle of it.
            out = link.module([values[name] for name in link.takes])
            values.update(zip(link.gives, out, strict=True))
            end: Tensor = out[-1]
            if link.point is None:
                return end
            steered = tap(link.point, end, link.grid) if link.point in at else end
            if link.point == stop:
                return None
            values[STEERED] = steered.contiguous()
        raise AssertionError("a chain's last link predicts")


@dataclasses.dataclass(frozen=True)
class CompiledParts:
    """Loaded packages. What has other shapes than they were compiled for is not to be given to them."""

    chains: Mapping[str, _Chain]
    decoder: Run

    @classmethod
    def load(cls, folder: Path) -> CompiledParts:
        """Those of a folder.

        Raises:
            BackendError: they cannot be loaded.
        """
        try:
            told = json.loads((folder / _ORDER).read_text())
            chains = {}
            for name in _CHAINS:
                links = [
                    Segment(
                        tuple(link["takes"]), tuple(link["gives"]), link["point"], tuple(link["grid"]),
                        _load(folder / link["module"]),
                    )
                    for link in told[name]["links"]
                ]  # fmt: skip
                chains[name] = _Chain(tuple(told[name]["inputs"]), tuple(links))
            return cls(chains, _load(folder / _DECODER))
        except Exception as error:
            raise BackendError(f"{folder}: compiled code cannot be loaded ({first_line(error)})") from error

    @property
    def points(self) -> frozenset[str]:
        """Hook points at which updates can be read and steered."""
        return frozenset(link.point for link in self.chains["one"].links if link.point is not None)

    def predict(
        self,
        sample: Tensor,
        timestep: Tensor,
        conditions: Conditions,
        tap: tapped.OnUpdate,
        at: frozenset[str],
        stop: str | None = None,
    ) -> Tensor | None:
        """As :func:`turbolens_server.unet.tapped.tapped_forward`; `stop` is one of the points."""
        given = (sample, timestep.float().expand(len(sample)), *conditions.tensors())
        chain = self.chains["one" if len(sample) == 1 else "several"]
        return chain.run([tensor.contiguous() for tensor in given], tap, at, stop)

    def decode(self, latents: Tensor) -> Tensor:
        """One latent [1, C, h, w] as the VAE itself decodes it."""
        return self.decoder([latents.contiguous()])[0]


class CompiledUNet:
    """The U-Net by its packages; what they were not compiled for, the eager walk runs: regions, gates, further sizes,
    points that the server did not serve when it was compiled."""

    takes_bias = True

    def __init__(self, parts: CompiledParts, plain: UNetBackend, spec: GraphSpec, latent: tuple[int, int]) -> None:
        self.name = NAME
        self._parts = parts
        self._plain = plain
        self._shape = (spec.channels, *latent)
        self._order = [point.name for point in spec.points]

    def predict(self, sample: Tensor, timestep: Tensor, conditions: Conditions, tap: Tap) -> Tensor:
        """See :class:`turbolens_server.unet.backend.UNetBackend`."""
        if not self._fits(sample, conditions, tap):
            return self._plain.predict(sample, timestep, conditions, tap)
        prediction = self._parts.predict(sample, timestep, conditions, tap, tap.at)
        if prediction is None:
            raise AssertionError("a pass that is not stopped predicts")
        return prediction

    def read(self, sample: Tensor, timestep: Tensor, conditions: Conditions, tap: Tap) -> None:
        """See :class:`turbolens_server.unet.backend.UNetBackend`."""
        if not self._fits(sample, conditions, tap):
            self._plain.read(sample, timestep, conditions, tap)
        elif last := next((point for point in reversed(self._order) if point in tap.at), None):
            self._parts.predict(sample, timestep, conditions, tap, tap.at, stop=last)

    def _fits(self, sample: Tensor, conditions: Conditions, tap: Tap) -> bool:
        return (
            conditions.plain
            and tuple(sample.shape[1:]) == self._shape
            and len(sample) <= segments.MOST
            and tap.at <= self._parts.points
        )


class CompiledDecoder:
    """A VAE's decoder by its package; latents of another size go to the VAE."""

    def __init__(self, parts: CompiledParts, vae: Any, latent: tuple[int, int]) -> None:
        self.config, self.dtype = vae.config, vae.dtype
        self._parts = parts
        self._vae = vae
        self._shape = (1, vae.config.latent_channels, *latent)

    def decode(self, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
        """Latents [B, C, h, w] -> (pictures [B, 3, height, width],), as the VAE itself gives them."""
        if tuple(latents.shape) != self._shape:
            decoded: tuple[Tensor] = self._vae.decode(latents, return_dict=return_dict)
            return decoded
        return (self._parts.decode(latents),)
