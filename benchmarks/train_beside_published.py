"""The whole of `turbolens train sae` beside the pipeline by which SDXL Turbo's SAEs were published (arXiv 2410.22366).

    python -m benchmarks.train_beside_published

The authors' pipeline has three stages. *Collect*: `diffusers`' pipeline with hooks on the blocks, a batch of prompts at
a time; what each block gives and its update go as pickled float32 into a tar of the block, the pictures into one more.
*Read*: the tokens of up to 50 batches at a time, shuffled. *Train*: here by SAELens' trainer, tuned as in
`train_beside_saelens`. Beside it the same, lean: no picture is decoded, and only updates are kept, in half precision.

All get the same prompts and seeds, and take the same steps of as many tokens. Rounds are slices of one run each. The
authors' stages come one after the other, so a round is a slice of collecting and, later, one of reading and training;
beside each of them ours does half of its own slice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from benchmarks.places import RESULTS
from benchmarks.train_beside_saelens import MINI, MINI_RATE_OF_SAELENS, Theirs, explained_variance
from turbolens_server.bench.results import assemble, save, to_markdown
from turbolens_server.bench.timing import Aim, Contender, compare, interleave
from turbolens_server.loading.model import load_pipeline
from turbolens_server.sae.bundle import SaeWeights
from turbolens_server.unet.points import HookPoint
from turbolens_training.activations.prompts import ScenePrompts
from turbolens_training.activations.reference_tars import read_tar
from turbolens_training.activations.sources import TokenSource, open_model, open_streams
from turbolens_training.activations.stream import PromptStream
from turbolens_training.sae.config import SaeConfig
from turbolens_training.sae.trainer import SaeTraining

READ_TOGETHER: Final = 50
"""Batches of pictures whose tokens are shuffled together, as the authors' configurations have it."""
CONFIG: Final = dataclasses.replace(
    MINI, device="cpu", one_step_share=1.0, reservoir=8192, warm_up=20, held_out_chunks=4
)
"""As the published SAEs, all pictures are made in one step; and fewer of them, so that a run takes minutes."""
Backend = Literal["torch", "torch-compile"]
AIMS: Final = {"published": Aim(0.6), "published, lean": Aim(1.0)}


class Published:
    """The authors' pipeline: collects some chunks at each call of `collect`, trains some steps at each of `train`."""

    def __init__(
        self, stream: PromptStream, pipeline: Any, points: Sequence[HookPoint], config: SaeConfig, folder: Path, *,
        lean: bool,
    ) -> None:  # fmt: skip
        """Write into `folder`, which is there; `lean`: updates alone, in half precision."""
        self._stream = stream
        self._pipeline = pipeline
        self._points = points
        self._config = config
        self._folder = folder
        self._lean = lean
        self._collected = self._trained = 0
        names = [point.name for point in points] + ([] if lean else ["images"])
        self._tars = {name: tarfile.open(self._path(name), "w") for name in names}  # noqa: SIM115  (closed to be read)
        self._trainers: dict[str, Theirs] = {}
        self._batches: dict[str, Iterator[Tensor]] = {}

    def collect(self, chunks: int) -> None:
        """Draw the pictures of the next chunks, and write."""
        for index in range(self._collected, self._collected + chunks):
            prompts, seeds = self._stream.drawn(index)
            with self._hooked() as seen:
                images = self._pipeline(
                    list(prompts),
                    num_inference_steps=1,
                    guidance_scale=0.0,
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                    output_type="latent" if self._lean else "pil",
                ).images
            told = json.dumps({"prompt": list(prompts), "seed": index, "seed_per_sample": seeds}).encode()
            for block, (before, after) in seen.items():
                files = {"diff.pth": _pickled((after - before).half() if self._lean else after - before)}
                if not self._lean:
                    files["output.pth"] = _pickled(after)
                self._write(block, index, {"gen_args.json": told, **files})
            if not self._lean:
                buffer = io.BytesIO()
                np.save(buffer, np.stack([np.asarray(image) for image in images]))
                self._write("images", index, {"images.npy": buffer.getvalue(), "gen_args.json": told})
        self._collected += chunks

    def train(self, steps: int) -> None:
        """Take the next steps of every block's SAE, on tokens from the disk."""
        if not self._trainers:
            for tar in self._tars.values():
                tar.close()
            for point in self._points:
                self._batches[point.name] = self._read(point.name)
                first = next(self._batches[point.name])
                self._trainers[point.name] = Theirs(self._config, first, {}, _schedule(self._config))
        for step in range(self._trained, self._trained + steps):
            for block, trainer in self._trainers.items():
                trainer.step(next(self._batches[block]), step)
        self._trained += steps

    def weights(self) -> dict[str, SaeWeights]:
        """By block; the training is at its end."""
        return {block: trainer.weights() for block, trainer in self._trainers.items()}

    @property
    def written(self) -> int:
        """Bytes, so far."""
        return sum(self._path(name).stat().st_size for name in self._tars)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name.replace('.', '_')}.tar"

    def _write(self, name: str, index: int, files: Mapping[str, bytes]) -> None:
        for file, content in files.items():
            entry = tarfile.TarInfo(f"sample_{index}.{file}")
            entry.size = len(content)
            self._tars[name].addfile(entry, io.BytesIO(content))

    def _read(self, block: str) -> Iterator[Tensor]:
        """Batches of a block's tokens, again and again."""
        generator = torch.Generator().manual_seed(self._config.seed)
        while True:
            samples = read_tar(self._path(block))
            while group := list(itertools.islice(samples, READ_TOGETHER)):
                tokens = torch.cat([sample.updates[0].flatten(0, 1).float() for sample in group])
                batches = tokens[torch.randperm(len(tokens), generator=generator)].split(self._config.batch)
                yield from (batch for batch in batches if len(batch) == self._config.batch)

    @contextlib.contextmanager
    def _hooked(self) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Yields what blocks got and gave, each [B, steps, d_model, h, w], by block; whole at the end."""
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {point.name: [] for point in self._points}
        modules = {point.name: self._pipeline.unet.get_submodule(point.module) for point in self._points}

        def hook(block: str) -> Callable[[Any, Any, Any], None]:
            return lambda _, got, gave: seen[block].append((got[0].clone(), gave[0].clone()))

        handles = [module.register_forward_hook(hook(block)) for block, module in modules.items()]
        stacked: dict[str, tuple[Tensor, Tensor]] = {}
        try:
            yield stacked
        finally:
            for handle in handles:
                handle.remove()
        for block, steps in seen.items():
            got, gave = (torch.stack(tensors, 1) for tensors in zip(*steps, strict=True))
            stacked[block] = (got, gave)


def _pickled(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def _schedule(config: SaeConfig) -> dict[str, Any]:
    decay = round(config.decay_share * config.steps)
    return {"lr": MINI_RATE_OF_SAELENS, "lr_warm_up_steps": config.warm_up, "lr_decay_steps": decay}


class _Timed:
    """A source that tells how long each chunk took."""

    def __init__(self, source: TokenSource) -> None:
        self._source = source
        self.widths, self.identity, self.kind = source.widths, source.identity, source.kind
        self.seconds: list[float] = []

    def tokens(self, index: int, per_image: int) -> dict[str, Tensor]:
        began = time.perf_counter()
        found = self._source.tokens(index, per_image)
        self.seconds.append(time.perf_counter() - began)
        return found


class Ours:
    """A run of `turbolens train sae`, some steps at each call, with its checkpoint at the end."""

    def __init__(self, stream: PromptStream, config: SaeConfig, folder: Path) -> None:
        self.source = _Timed(stream)
        self._run = SaeTraining(config, self.source, torch.device("cpu"))
        self._steps = config.steps
        self._checkpoint = folder / "state.pt"

    def train(self, steps: int) -> None:
        """Take the next steps."""
        self._run.train(self._run.step + steps)
        if self._run.step == self._steps:
            self._run.save(self._checkpoint)

    def weights(self) -> dict[str, SaeWeights]:
        """By block."""
        return {block: trainer.export().weights for block, trainer in self._run.trainers.items()}

    @property
    def written(self) -> int:
        """Bytes; the run is at its end."""
        return self._checkpoint.stat().st_size


def measure_runs(
    config: SaeConfig, rounds: int, chunks: int, backends: Sequence[Backend], folder: Path
) -> dict[str, Any]:
    """One run of each, in slices.

    Args:
        config: `steps` is set here.
        rounds: that count.
        chunks: of a round.
        backends: of our runs.
        folder: to write into.
    """
    steps = chunks * config.steps_per_chunk
    config = dataclasses.replace(config, steps=(rounds + 1) * steps)
    engines = {backend: open_model(dataclasses.replace(config, backend=backend)) for backend in backends}
    streams = {backend: open_streams(engine, config, ScenePrompts()) for backend, engine in engines.items()}
    stream, held_out = streams[backends[0]]
    points = engines[backends[0]].info.hook_points
    pipeline, _ = load_pipeline(config.model, torch.device("cpu"), torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    theirs: dict[str, Published] = {}
    ours: dict[str, Ours] = {}
    for name in AIMS:
        (folder / name).mkdir()
        theirs[name] = Published(stream, pipeline, points, config, folder / name, lean=name.endswith("lean"))
    for backend in backends:
        name = "TurboLens" if backend == backends[0] else f"TurboLens, {backend}"
        (folder / name).mkdir()
        ours[name] = Ours(streams[backend][0], config, folder / name)

    def stage(run: Callable[[Published], None]) -> list[Contender]:
        """Theirs in one stage, and half of ours."""
        whole = [Contender(name, functools.partial(run, one)) for name, one in theirs.items()]
        return whole + [Contender(name, functools.partial(one.train, steps // 2), AIMS) for name, one in ours.items()]

    # What fills our reservoirs is drawn before the rounds that count.
    chunk = config.images * config.tokens_per_image
    filling = -(-config.reservoir // chunk)
    for one in theirs.values():
        one.collect(filling)
    collecting = stage(lambda one: one.collect(chunks))
    made = interleave(collecting, rounds)
    trained = interleave(stage(lambda one: one.train(steps)), rounds)
    whole = {name: [a + b for a, b in zip(made[name], trained[name], strict=True)] for name in made}

    judged = [held_out.tokens(index, config.tokens_per_image) for index in range(config.held_out_chunks)]
    tokens = {block: torch.cat([of_chunk[block] for of_chunk in judged]) for block in judged[0]}
    every: dict[str, Published | Ours] = {**theirs, **ours}
    explained = {
        name: {block: explained_variance(w, config.k, tokens[block]) for block, w in one.weights().items()}
        for name, one in every.items()
    }
    drawn = filling + (rounds + 1) * chunks
    pictures = {name: statistics.median(made[name]) for name in theirs}
    pictures |= {name: 1000 * chunks * statistics.median(one.source.seconds[filling:]) for name, one in ours.items()}
    return {
        "label": {"prompts": drawn * config.images, "steps": config.steps},
        "rows": compare(collecting, whole),
        "tokens": {"round": chunks * chunk, "run": drawn * chunk, "held out": len(tokens[points[0].name])},
        "bytes": {name: one.written for name, one in every.items()},
        "pictures_ms": pictures,
        "explained": explained,
    }


def run(rounds: int, chunks: int, backends: Sequence[Backend], config: SaeConfig = CONFIG) -> dict[str, Any]:
    """Measure; see :func:`measure_runs`."""
    with tempfile.TemporaryDirectory() as folder:
        case = measure_runs(config, rounds, chunks, backends, Path(folder))
    return assemble("train_beside_published", rounds, [case])


def main(rounds: int = 8, chunks: int = 2, out: Path = RESULTS / "train_beside_published.json") -> None:
    """Measure and write.

    Args:
        rounds: slices of each run that count.
        chunks: batches of prompts of a slice; even.
        out: JSON file to write.
    """
    result = run(rounds, chunks, ("torch", "torch-compile"))
    print(to_markdown(result))
    save(out, result)


if __name__ == "__main__":
    tyro.cli(main)
