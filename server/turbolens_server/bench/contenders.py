"""The engine and the bare pipeline, set up to make the same pictures."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch

from turbolens_proto.v1 import run_pb2
from turbolens_server.cuda_graphs import on_device
from turbolens_server.engine.engine import Engine
from turbolens_server.engine.lanes import Lanes
from turbolens_server.engine.plan import BatchPlan
from turbolens_server.engine.tap import StepTap
from turbolens_server.engine.types import Job, Result
from turbolens_server.images import encode_image
from turbolens_server.loading.model import load_pipeline
from turbolens_server.steering.edits import Edit, Unit, WeightedFeature

PROMPT: Final = "a big red star on the left, night background"
_FRESH: Final = itertools.count()


def fresh_prompt() -> str:
    """A prompt that no cache holds; padded to the same length, it costs what any costs."""
    return f"{PROMPT} {next(_FRESH)}"


@dataclasses.dataclass(frozen=True)
class Work:
    """What every contender makes: pictures of the seeds 0, 1, ..."""

    batch: int
    steps: int
    height: int
    width: int

    def jobs(self, prompt: str = PROMPT, **wanted: Any) -> list[Job]:
        """The engine's jobs, each with the same edits and wanted features (fields of :class:`Job`)."""
        return [Job(prompt, seed, self.steps, self.height, self.width, **wanted) for seed in range(self.batch)]


class BarePipeline:
    """`StableDiffusionXLPipeline` as it comes, on weights of its own that equal the engine's."""

    def __init__(self, engine: Engine, variant: str | None = None) -> None:
        pipeline, _ = load_pipeline(engine.info.model, engine.device, engine.components.unet.dtype, variant)
        self._pipeline = pipeline.to(engine.device)
        self._pipeline.set_progress_bar_config(disable=True)

    def embed(self, prompt: str) -> dict[str, torch.Tensor]:
        """A prompt's encoded text, for a caller who caches it: arguments of :meth:`run`."""
        with torch.inference_mode():
            hidden, _, pooled, _ = self._pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
        return {"prompt_embeds": hidden, "pooled_prompt_embeds": pooled}

    def run(self, work: Work, **text: Any) -> list[Any]:
        """The pictures, as PIL images; `text` is a `prompt`, or what :meth:`embed` gave. One prompt is encoded once."""
        images: list[Any] = self._pipeline(
            **text,
            num_images_per_prompt=work.batch,
            num_inference_steps=work.steps,
            guidance_scale=0.0,
            height=work.height,
            width=work.width,
            generator=[torch.Generator().manual_seed(seed) for seed in range(work.batch)],
        ).images
        return images


def unet_pass(engine: Engine, work: Work, saes: Sequence[str]) -> Callable[[], object]:
    """One pass of the U-Net, with what some SAEs read in it: no text, sampler, copy to the host or picture."""
    with on_device(engine.device), torch.inference_mode():
        text = engine.components.text.encode_all([PROMPT] * work.batch)
        walk = engine.begin(text, range(work.batch), 1, (work.height, work.width))
        (t,) = walk.timesteps
        sample = walk.noise.clone()
    jobs = work.jobs(saes=tuple(saes))
    plan = BatchPlan(jobs, Lanes.of(jobs), engine.info, engine.saes, engine.device, [float(t)], engine.running.pick)

    def run() -> None:
        with on_device(engine.device), torch.inference_mode():
            engine.unet.predict(sample, t, walk.conditions, StepTap(plan, 0))

    return run


def pictures(engine: Engine, jobs: Sequence[Job]) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    """The engine's pictures [height, width, 3] of jobs that want one."""
    made = [result.picture for result in engine.run(jobs) if isinstance(result, Result)]
    return [picture for picture in made if picture is not None]


def to_png(engine: Engine, jobs: Callable[[], Sequence[Job]]) -> list[bytes]:
    """The engine's pictures coded as the server codes them."""
    return [encode_image(picture, run_pb2.IMAGE_FORMAT_PNG, 0).data for picture in pictures(engine, jobs())]


def eight_adds(engine: Engine) -> tuple[Edit, ...]:
    """Eight `add` edits on features of their own, in turn over all SAEs."""
    return tuple(Edit("add", (_feature(engine, number),), amount=1.0, unit=Unit.RAW) for number in range(8))


def scale_each(engine: Engine) -> tuple[Edit, ...]:
    """One `scale` edit on each SAE: it needs the activations of the pass that it steers."""
    return tuple(Edit("scale", (_feature(engine, number),), amount=0.5) for number in range(len(engine.info.saes)))


def _feature(engine: Engine, number: int) -> WeightedFeature:
    """The feature of edit `number`, on the SAEs in turn; which one it is makes no difference to the time."""
    saes = list(engine.info.saes.values())
    sae = saes[number % len(saes)]
    return WeightedFeature(sae.name, number % sae.bundle.d_sae)


def largest_difference(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    """Largest difference of any channel of any pixel, of 255, between two lists of pictures."""
    pairs = zip(ours, theirs, strict=True)
    return max(int(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max()) for a, b in pairs)
