"""What makes pictures as native code for this CPU; `compiling` makes it.

The U-Net is two chains of packages that end at the hook points: one for a single picture, one for any larger batch. The
text encoders are likewise two packages. The decoder is one, since each picture is decoded by itself. Nothing here needs
the modules that they were made of, nor what those are made with.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from turbolens_server.files import first_line
from turbolens_server.kernels import select_native
from turbolens_server.kernels.select import Pick
from turbolens_server.unet import native
from turbolens_server.unet.backend import BackendError, OnUpdate, Tap, UNetBackend
from turbolens_server.unet.conditions import Conditions
from turbolens_server.unet.native import Run
from turbolens_server.unet.spec import GraphSpec

NAME: Final = "torch-compile"
CHAINS: Final = {"one": 1, "several": 2}
"""Batch that each chain, and each package of the text encoders, is traced with."""
DECODER: Final = "decoder"
TEXT: Final = "text-{}"
"""By chain."""
ORDER: Final = "chains.json"
MOST: Final = 63
"""Most rows of a batch whose size stays open."""
STEERED: Final = "steered"
"""What a segment calls the update that the one before it ended with, after the tap."""
_SMALL: Final = 32 * 32
"""Positions of latents up to which pictures are decoded side by side; of larger ones each takes memory, and is work
enough for several cores."""
_SOURCES: Final = ("attention_taps", "compiled", "compiling", "conditions", "native", "rewriting", "segments", "tapped")
"""Files here that decide what is compiled."""

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Both text encoders."""


def compiler_missing() -> str | None:
    """Why nothing can be compiled here, in words; None where it can."""
    compiler = native.compiler()
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
    code = "".join(Path(__file__).with_name(f"{name}.py").read_text() for name in _SOURCES) + select_native.SOURCE
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


@dataclasses.dataclass(frozen=True)
class Segment:
    """A graph between two hook points."""

    takes: tuple[str, ...]
    """Names of the values that it is called with."""
    gives: tuple[str, ...]
    """Of those that it returns; where the chain goes on, the last is the update, and else the prediction."""
    point: str | None
    """The hook point that it ends at; None: the pass's end."""
    grid: tuple[int, int]
    """Rows and columns of the update."""
    module: Any = dataclasses.field(compare=False)
    """Calls with `takes` and returns `gives`, as a tuple."""


@dataclasses.dataclass(frozen=True)
class _Chain:
    inputs: tuple[str, ...]
    links: tuple[Segment, ...]

    def run(self, given: Sequence[Tensor], tap: OnUpdate, at: frozenset[str], stop: str | None) -> Tensor | None:
        values = dict(zip(self.inputs, given, strict=True))
        for link in self.links:
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
    text: Mapping[str, Run]
    """By chain; empty where the text encoders are not among them."""
    decoder: Run
    workers: Executor
    """Threads with a core each; they begin when they are needed."""
    pick: Pick
    """Selects features."""

    @classmethod
    def load(cls, folder: Path) -> CompiledParts:
        """Those of a folder.

        Raises:
            BackendError: they cannot be loaded.
        """
        try:
            told = json.loads((folder / ORDER).read_text())
            cores = torch.get_num_threads()
            chains = {}
            for name in CHAINS:
                links = [
                    Segment(
                        tuple(link["takes"]), tuple(link["gives"]), link["point"], tuple(link["grid"]),
                        native.load(folder / link["module"]),
                    )
                    for link in told[name]["links"]
                ]  # fmt: skip
                chains[name] = _Chain(tuple(told[name]["inputs"]), tuple(links))
            files = {name: folder / TEXT.format(name) for name in CHAINS}
            text = {name: native.load(file) for name, file in files.items() if file.exists()}
            pick = select_native.load(folder / native.SELECT)
            return cls(chains, text, native.load(folder / DECODER, cores), native.workers(cores, "core"), pick)
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
        tap: OnUpdate,
        at: frozenset[str],
        stop: str | None = None,
    ) -> Tensor | None:
        """As :func:`turbolens_server.unet.tapped.tapped_forward`; `stop` is one of the points."""
        given = (sample, timestep.float().expand(len(sample)), *conditions.tensors())
        chain = self.chains[_chain_of(len(sample))]
        return chain.run([tensor.contiguous() for tensor in given], tap, at, stop)

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [2, B, tokens] -> hidden states [B, tokens, D] and pooled text [B, D']."""
        hidden, pooled = self.text[_chain_of(ids.shape[1])]([ids.transpose(0, 1).contiguous()])
        return hidden, pooled

    def decode(self, latents: Tensor) -> Tensor:
        """One latent [1, C, h, w] as the VAE itself decodes it."""
        return self.decoder([latents.contiguous()])[0]


def side_by_side(batch: int, latent: tuple[int, ...]) -> int:
    """Pictures of a batch that are decoded at once where they are compiled, from latents of (height, width)."""
    cores = torch.get_num_threads()
    return cores if cores <= batch and math.prod(latent) <= _SMALL else 1


def _chain_of(batch: int) -> str:
    return "one" if batch == 1 else "several"


class CompiledText:
    """The text encoders by their packages; more texts at once, and other lengths, go to the encoders themselves."""

    def __init__(self, parts: CompiledParts, encoders: Callable[[], Encode], spec: GraphSpec) -> None:
        """`encoders` gives these; it is asked when something first needs them."""
        self._parts = parts
        self._encoders = encoders
        self._tokens = spec.tokens

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [2, B, tokens] -> hidden states [B, tokens, D] and pooled text [B, D']."""
        _, batch, tokens = ids.shape
        if tokens != self._tokens or batch > MOST:
            return self._encoders()(ids)
        return self._parts.encode(ids)


class CompiledUNet:
    """The U-Net by its packages; what they were not compiled for, the eager walk runs: regions, gates, further sizes,
    points that the server did not serve when it was compiled."""

    takes_bias = True

    def __init__(
        self, parts: CompiledParts, plain: Callable[[], UNetBackend], spec: GraphSpec, latent: tuple[int, int]
    ) -> None:
        """`plain` gives what walks eagerly; it is asked when something first needs it."""
        self.name = NAME
        self._parts = parts
        self._plain = plain
        self._shape = (spec.channels, *latent)
        self._order = [point.name for point in spec.points]

    def predict(self, sample: Tensor, timestep: Tensor, conditions: Conditions, tap: Tap) -> Tensor:
        """See :class:`turbolens_server.unet.backend.UNetBackend`."""
        if not self._fits(sample, conditions, tap):
            return self._plain().predict(sample, timestep, conditions, tap)
        prediction = self._parts.predict(sample, timestep, conditions, tap, tap.at)
        if prediction is None:
            raise AssertionError("a pass that is not stopped predicts")
        return prediction

    def read(self, sample: Tensor, timestep: Tensor, conditions: Conditions, tap: Tap) -> None:
        """See :class:`turbolens_server.unet.backend.UNetBackend`."""
        if not self._fits(sample, conditions, tap):
            self._plain().read(sample, timestep, conditions, tap)
        elif last := next((point for point in reversed(self._order) if point in tap.at), None):
            self._parts.predict(sample, timestep, conditions, tap, tap.at, stop=last)

    def _fits(self, sample: Tensor, conditions: Conditions, tap: Tap) -> bool:
        return (
            conditions.plain
            and tuple(sample.shape[1:]) == self._shape
            and len(sample) <= MOST
            and tap.at <= self._parts.points
        )


class CompiledDecoder:
    """A VAE's decoder by its package; latents of another size go to the VAE. Small pictures are made side by side, one
    on each core: in each of their many short loops several cores would wait for each other."""

    def __init__(self, parts: CompiledParts, vae: Callable[[], Any], config: Any, latent: tuple[int, int]) -> None:
        """`vae` gives the VAE, of this configuration; it is asked when something first needs it."""
        self.config, self.dtype = config, torch.float32
        self._parts = parts
        self._vae = vae
        self._shape = (1, config.latent_channels, *latent)

    def workers_for(self, latents: Tensor) -> Executor | None:
        """Threads to decode the latents of a batch in, one by one each; None where one at a time has all cores."""
        fits = tuple(latents.shape[1:]) == self._shape[1:]
        return self._parts.workers if fits and side_by_side(len(latents), self._shape[2:]) > 1 else None

    def decode(self, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
        """Latents [B, C, h, w] -> (pictures [B, 3, height, width],), as the VAE itself gives them."""
        if tuple(latents.shape) != self._shape:
            decoded: tuple[Tensor] = self._vae().decode(latents, return_dict=return_dict)
            return decoded
        return (self._parts.decode(latents),)
