"""One process, one device, one engine: lists of jobs in, pictures and features out."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from turbolens_server.cuda_graphs import on_device
from turbolens_server.engine.batcher import BatchKey, batch_key
from turbolens_server.engine.choosing import choose
from turbolens_server.engine.decode import Picture, decode_rows
from turbolens_server.engine.encode import PictureEncoder
from turbolens_server.engine.guidance import Sides, embed_guidance
from turbolens_server.engine.info import EngineInfo, MemoryNeed, SaeInfo
from turbolens_server.engine.lanes import Lanes
from turbolens_server.engine.modules import Modules
from turbolens_server.engine.plan import BatchPlan
from turbolens_server.engine.regions import hear_regions
from turbolens_server.engine.running import Running, Seat
from turbolens_server.engine.sampler import NOISE, RowStart, Sampler
from turbolens_server.engine.tap import StepTap
from turbolens_server.engine.text import EncodedTexts, TextEncoder
from turbolens_server.engine.types import (
    Attribution,
    FeaturesReady,
    Guidance,
    Job,
    NotFinite,
    OnEvent,
    Result,
    SparseCodes,
    Start,
    StepDone,
    StepTimes,
)
from turbolens_server.engine.walk import Walk
from turbolens_server.sae.sae import Sae
from turbolens_server.steering.choice import Chosen
from turbolens_server.unet.backend import UNetBackend
from turbolens_server.unet.conditions import Conditions
from turbolens_server.unet.points import HookPoint, hears_text

P = ParamSpec("P")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Components:
    """The parts of a loaded model."""

    text: TextEncoder
    modules: Modules
    scheduler: Any
    vae_downscale: int
    points: Mapping[str, HookPoint]
    """Every hook point that the U-Net has, in order of execution."""
    decoder: Any
    """What decodes pictures at first: the VAE, on a GPU its recording, or its compiled decoder."""

    @property
    def unet(self) -> Any:
        """As `diffusers` made it, and likewise the VAE; see :class:`Modules`."""
        return self.modules.get().unet

    @property
    def vae(self) -> Any:
        return self.modules.get().vae


Cancelled: TypeAlias = Callable[[int], bool]
"""Whether nobody waits for a row of the batch any more."""


@dataclasses.dataclass
class Denoised:
    """A batch between its last step and its pictures."""

    jobs: Sequence[Job]
    latents: Tensor  # [B, C, h, w]
    live: list[bool]
    """Rows that are neither cancelled nor failed."""
    features: list[list[SparseCodes]]
    """Of each row, in order of step, then of block."""
    tokens_cut: tuple[int, ...]
    chosen: list[tuple[Chosen, ...]]
    """Of each row, the features that were chosen for it."""
    running: Running
    """What has run it so far, and goes on."""
    attributions: list[Attribution | None]
    """Of each row, where asked."""


class _FailedFirst(Exception):
    """A run that something is to be chosen by came to values that are not finite."""

    def __init__(self, event: NotFinite) -> None:
        super().__init__(str(event))
        self.event = event


def _silent(_: object) -> None:
    """The event callback of callers who want none."""


def _never(_: int) -> bool:
    """The cancellation check of callers who never cancel."""
    return False


def pipelined_on(device: torch.device) -> bool:
    """Whether the stages gain from a thread each: a GPU fills one's gaps with the other, a CPU has none to fill."""
    return device.type == "cuda"


def _on_own_device(method: Callable[Concatenate[Engine, P], T]) -> Callable[Concatenate[Engine, P], T]:
    """The method with the engine's device as the current one: it may be called in any thread, each of which has its
    own current device."""

    @functools.wraps(method)
    def call(engine: Engine, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with on_device(engine.device):
            return method(engine, *args, **kwargs)

    return call


class Engine:
    """Runs batches of jobs in two stages: `denoise`, from prompts to latents, and `decode`, from latents to pictures.

    Each stage belongs to one thread at a time. Both may be the same thread, as in `run`; on a GPU they are two, so
    that a batch is decoded while the next one is denoised. Between calls nothing is kept but
    encoded prompts and prepared timesteps.
    """

    def __init__(self, components: Components, unet: UNetBackend, info: EngineInfo, device: torch.device) -> None:
        self._info = info
        self._parts = components
        self._seat = Seat(Running(unet, components.decoder, info.backend_reason))
        self._device = device
        self._dtype: torch.dtype = getattr(torch, info.dtype)
        self._gates = None if info.gate is None else info.gate.gates.to(device)
        self._saes = {name: Sae(sae.bundle, device, self._dtype) for name, sae in info.saes.items()}
        self._sampler = Sampler(components.scheduler, device, info.timesteps)
        width = None if info.takes_guidance else components.unet.config.time_cond_proj_dim
        self._guidance = None if width is None else embed_guidance(info.embedded_guidance, width).to(device)
        self._time_ids: dict[tuple[int, int], Tensor] = {}
        self.pipelined = pipelined_on(device)
        """Whether each stage should have a thread of its own."""
        self._decode_stream = torch.cuda.Stream(device) if self.pipelined else None

    def serving(self, saes: Sequence[SaeInfo], memory: MemoryNeed) -> Engine:
        """The same model with other SAEs beside this engine, which stays as it is; they share all but those."""
        other = copy.copy(self)
        other._info = dataclasses.replace(self.info, saes={sae.name: sae for sae in saes}, memory=memory)
        with on_device(self._device):
            other._saes = {
                sae.name: self._saes[sae.name]
                if self.info.saes.get(sae.name) is sae
                else Sae(sae.bundle, self._device, self._dtype)
                for sae in saes
            }
        return other

    @property
    def info(self) -> EngineInfo:
        """What it serves, by what runs it now."""
        info, running = self._info, self._seat.running
        if (info.backend, info.backend_reason) != (running.unet.name, running.reason):
            self._info = info = dataclasses.replace(info, backend=running.unet.name, backend_reason=running.reason)
        return info

    def use(self, running: Running) -> None:
        """Run what comes next by this, here and in every engine of the same model; in the thread of `denoise`, where no
        batch is between its first step and its last."""
        self._seat.running = running
        if running.text is not None:
            self._parts.text.encode_by(running.text)

    @property
    def running(self) -> Running:
        """What runs it now."""
        return self._seat.running

    @property
    def components(self) -> Components:
        """The model's parts, for training and tests."""
        return self._parts

    @property
    def unet(self) -> UNetBackend:
        """What runs the U-Net."""
        return self._seat.running.unet

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._device

    @property
    def saes(self) -> Mapping[str, Sae]:
        """The SAEs by name, ready to run."""
        return self._saes

    @_on_own_device
    @torch.inference_mode()
    def embed_text(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Pooled text embeddings of the model's own encoder, unit norm, [n, d]; in the thread of `denoise`."""
        pooled = self._parts.text.pooled(texts).float().cpu()
        return torch.nn.functional.normalize(pooled, dim=-1).numpy()

    def run(
        self, jobs: Sequence[Job], *, on_event: OnEvent | None = None, cancelled: Cancelled | None = None
    ) -> list[Result | None]:
        """Both stages of a batch of jobs that share a batch key, one after the other.

        Args:
            jobs: at least one; each has its own prompt, seed, edits and wanted features.
            on_event: called in this thread as steps end, features are computed and pictures are ready.
            cancelled: asked for each job before each step; a job once cancelled gives None. Its slot stays in the
                batch, so that its mates' results do not change; a batch with no job left stops at the next step.

        Returns:
            One result for each job, in order.

        Raises:
            FloatingPointError: a job came to values that are not finite; the others have run to their end.
        """
        failed: list[NotFinite] = []

        def emit(event: StepDone | FeaturesReady | Result | NotFinite) -> None:
            if isinstance(event, NotFinite):
                failed.append(event)
            (on_event or _silent)(event)

        denoised = self.denoise(jobs, on_event=emit, cancelled=cancelled)
        results = self.decode(denoised, on_event=emit, cancelled=cancelled)
        if failed:
            raise FloatingPointError(f"job {failed[0].job}: {failed[0]}")
        return results

    @_on_own_device
    @torch.inference_mode()
    def denoise(
        self, jobs: Sequence[Job], *, on_event: OnEvent | None = None, cancelled: Cancelled | None = None
    ) -> Denoised:
        """The first stage: encode the prompts and walk from noise to latents; arguments as for `run`."""
        if len({batch_key(job) for job in jobs}) != 1:
            raise ValueError(
                "jobs of one batch share steps, height, width, the number of regions, gates and whether they attribute"
            )
        emit, is_cancelled = on_event or _silent, cancelled or _never
        parts, first, running = self._parts, jobs[0], self._seat.running
        live = [not is_cancelled(row) for row in range(len(jobs))]
        jobs = list(jobs)
        chosen: list[tuple[Chosen, ...]] = [()] * len(jobs)
        for row in [row for row, alive in enumerate(live) if alive]:
            try:
                jobs[row], chosen[row] = choose(jobs[row], self.info, self._read)
            except _FailedFirst as failed:
                live[row] = False
                emit(dataclasses.replace(failed.event, job=row))

        lanes = Lanes.of(jobs)
        # Apart, as in `diffusers`: how many texts are encoded in one go shows in their last bits.
        sides = (lanes.rows[: len(lanes.seeds)], lanes.rows[len(lanes.seeds) :])
        text = EncodedTexts.joined([parts.text.encode_all([lane.prompt for lane in rows]) for rows in sides if rows])
        size = (first.height, first.width)
        text, bias = hear_regions(text, jobs, lanes, parts.text, self.info.region_strides)
        walk = self.begin(
            text,
            lanes.seeds,
            first.steps,
            size,
            first.timesteps,
            lanes.guidance,
            first.skipped,
            lanes.starts,
            bias,
            gate=first.gate,
        )
        plan = BatchPlan(jobs, lanes, self.info, self._saes, self._device, walk.timesteps.tolist(), running.pick)
        features: list[list[SparseCodes]] = [[] for _ in jobs]
        attributions: list[Attribution | None] = [None] * len(jobs)
        for step, t in enumerate(walk.timesteps):
            live = [alive and not is_cancelled(row) for row, alive in enumerate(live)]
            if not any(live):
                break
            tap, started = StepTap(plan, step), time.monotonic()
            estimate = walk.step(t, tap)
            # Reading this waits for the device: a step that is told of has been taken.
            finite = torch.isfinite(walk.latents).flatten(1).all(1).tolist()
            if walk.conditions.gating is not None:
                walk.conditions.gating.check(step + 1)
            times = StepTimes(started, time.monotonic(), tuple(tap.times))
            whole = [all(finite[walk] for walk in lanes.walks_of(row)) for row in range(len(jobs))]
            for row in [row for row, alive in enumerate(live) if alive and not whole[row]]:
                live[row] = False
                emit(NotFinite(row, "U-Net", step, self.info.dtype, edited=bool(jobs[row].edits)))
            for row, codes in tap.collect():
                if live[row]:
                    features[row].append(codes)
                    emit(FeaturesReady(row, codes))
            for row, attribution in tap.attributions():
                attributions[row] = self._named(attribution, jobs[row])
            previews = [row for row, job in enumerate(jobs) if job.previews and step < first.steps - 1]
            shown = {} if estimate is None else dict(decode_rows(running.decoder, estimate, previews, live))
            for row in range(len(jobs)):
                if live[row]:
                    emit(StepDone(row, step, first.steps, shown.get(row), times))
        cut = [max(text.tokens_cut[lane] for lane in (row, lanes.second.get(row, row))) for row in range(len(jobs))]
        return Denoised(jobs, walk.latents[: len(jobs)], live, features, tuple(cut), chosen, running, attributions)

    def _named(self, attribution: Attribution, job: Job) -> Attribution:
        """With the tokens that a cross-attention's sources are: the prompt's, then those of each region's phrase."""
        if job.attribute is None or not hears_text(self.info.saes[job.attribute.sae].hook_point):
            return attribution
        texts = [job.prompt, *(region.prompt for region in job.regions)]
        tokens = tuple(token for text in texts for token in self._parts.text.tokens(text))
        return dataclasses.replace(attribution, tokens=tokens)

    def _read(self, jobs: Sequence[Job], steps: int) -> list[list[SparseCodes]]:
        """The features of jobs over their first steps."""
        taken: list[int] = []

        def count(event: StepDone | FeaturesReady | Result | NotFinite) -> None:
            if isinstance(event, NotFinite):
                raise _FailedFirst(event)
            if isinstance(event, StepDone):
                taken.append(event.step)

        alike: dict[BatchKey, list[int]] = {}  # the picture's own run may have regions, which references have not
        for at, job in enumerate(jobs):
            alike.setdefault(batch_key(job), []).append(at)
        features: list[list[SparseCodes]] = [[] for _ in jobs]
        for rows in alike.values():
            taken.clear()
            some = [jobs[row] for row in rows]
            read = self.denoise(some, on_event=count, cancelled=lambda _: max(taken, default=-1) + 1 >= steps)
            for row, found in zip(rows, read.features, strict=True):
                features[row] = found
        return features

    @_on_own_device
    @torch.inference_mode()
    def decode(
        self, denoised: Denoised, *, on_event: OnEvent | None = None, cancelled: Cancelled | None = None
    ) -> list[Result | None]:
        """The second stage: decode the pictures that were asked for and copy what is returned to the host.

        `denoise` has waited for its last step, so its latents may be read on another stream than theirs; and reading
        pictures here waits for this stream alone.
        """
        emit, is_cancelled = on_event or _silent, cancelled or _never
        jobs, latents = denoised.jobs, denoised.latents
        live = [alive and not is_cancelled(row) for row, alive in enumerate(denoised.live)]
        results: list[Result | None] = [None] * len(jobs)
        with contextlib.nullcontext() if self._decode_stream is None else torch.cuda.stream(self._decode_stream):
            on_host = latents.float().cpu().numpy()
            wanted = [row for row, job in enumerate(jobs) if live[row] and job.picture]
            others: list[tuple[int, Picture | None]] = [
                (row, None) for row, job in enumerate(jobs) if live[row] and not job.picture
            ]
            # Each goes to its caller as it is made: it is coded while the next one is decoded.
            for row, picture in itertools.chain(others, decode_rows(denoised.running.decoder, latents, wanted, live)):
                if jobs[row].picture and picture is None:
                    emit(NotFinite(row, "VAE", dtype=str(denoised.running.decoder.dtype).removeprefix("torch.")))
                    continue
                kept = tuple(denoised.features[row])
                cut, chosen, made_by = denoised.tokens_cut[row], denoised.chosen[row], denoised.running.unet.name
                attribution = denoised.attributions[row]
                result = Result(row, picture, on_host[row], kept, cut, len(jobs), chosen, made_by, attribution)
                results[row] = result
                emit(result)
        return results

    @_on_own_device
    def free_memory(self) -> None:
        """Give back what is kept for later batches, after one that found no room."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @_on_own_device
    def warm_up(self, max_batch: int) -> tuple[Job, float]:
        """Run what will be served once, so that the first caller does not wait for it.

        On a GPU every batch size counts: kernels are chosen and memory is reserved for each. A CPU does neither, so
        one picture is enough to touch all weights.

        Returns:
            A job, and the seconds that it took: more than it will, as it was among the first.

        Raises:
            FloatingPointError: the model gives values that are not finite.
        """
        largest = 1
        if self._device.type == "cuda":
            largest = max_batch
            _ = self._encoder  # in half precision its weights are a copy of its own
            with torch.inference_mode():
                self._parts.text.warm_up()
        for height, width in self.info.sizes:
            for steps, names in self._by_steps(self._saes).items():
                job = Job("", 0, steps, height, width, saes=names)
                for size in range(1, largest + 1):
                    began = time.monotonic()
                    self.run([job] * size)
        return job, (time.monotonic() - began) / largest

    def try_saes(self, names: Iterable[str]) -> None:
        """Read each of these SAEs in a run, so that what is wrong with one shows; in the thread of `denoise`."""
        for steps, some in self._by_steps(names).items():
            self.denoise([Job("", 0, steps, *self.info.default_size, saes=some, picture=False)])

    def _by_steps(self, names: Iterable[str]) -> dict[int, tuple[str, ...]]:
        """SAEs by the steps of the runs that they are read in; those of most runs are always there."""
        found: dict[int, tuple[str, ...]] = {self.info.default_steps: ()}
        for name in names:
            steps = self._saes[name].bundle.steps or self.info.default_steps
            found[steps] = (*found.get(steps, ()), name)
        return found

    @_on_own_device
    @torch.inference_mode()
    def begin(
        self,
        text: EncodedTexts,
        seeds: Sequence[int],
        steps: int,
        size: tuple[int, int] | None = None,
        timesteps: Sequence[int] = (),
        guidance: Sequence[Guidance | None] = (),
        skipped: int = 0,
        starts: Sequence[Start | None] = (),
        bias: Mapping[tuple[int, int], Tensor] | None = None,
        *,
        gate: bool = False,
    ) -> Walk:
        """A batch before its first step, a walk for each seed; in the thread of `denoise`.

        Args:
            text: one for each walk, and then one for the second lane of each that has guidance.
            seeds: one for each walk.
            steps: of the walks.
            size: (height, width) of the pictures in pixels; None: the model's own.
            timesteps: of the skipped steps and of these, falling; empty: as the sampler chooses them.
            guidance: of each walk; empty: none.
            skipped: steps before those of the walks, which then start from pictures or latents.
            starts: of each walk; empty: noise.
            bias: of regions, see :class:`Conditions`; None: none.
            gate: through the learned region gates.

        Raises:
            ValueError: there are no gates.
        """
        height, width = size or self.info.default_size
        parts, dtype = self._parts, text.hidden.dtype
        shape = (self.info.latent_channels, height // parts.vae_downscale, width // parts.vae_downscale)
        lanes = len(text.hidden)
        time_ids = self._time_ids_of((height, width), dtype).expand(lanes, -1)
        embedded = None if self._guidance is None else self._guidance.to(dtype).expand(lanes, -1)
        coded = {start: self._row_start(start, dtype) for start in starts if start is not None}
        rows = [NOISE if start is None else coded[start] for start in starts]
        state = self._sampler.start(steps, seeds, shape, dtype, timesteps, skipped, rows)
        if gate and self._gates is None:
            raise ValueError("no learned region gates are served")
        gating = self._gates.of(text.hidden) if gate and self._gates is not None else None
        conditions = Conditions(text.hidden, text.pooled, time_ids, embedded, bias=bias or {}, gating=gating)
        return Walk(self.unet, state, conditions, Sides(guidance or [None] * len(seeds), self._device))

    @functools.cached_property
    def _encoder(self) -> PictureEncoder:
        return PictureEncoder(self._parts.vae)

    def _row_start(self, start: Start, dtype: torch.dtype) -> RowStart:
        """What the sampler is told of a start: a picture is coded once, and drawn from for each seed."""
        if start.kind == "picture":
            coded = self._encoder.distribution(start.values, dtype)
            if isinstance(coded, Tensor):
                return RowStart(clean=lambda _: self._encoder.scaled(coded, dtype))
            return RowStart(clean=lambda generator: self._encoder.scaled(coded.sample(generator), dtype))
        latents = torch.from_numpy(start.values)[None].to(self._device, dtype)
        return RowStart(noise=latents) if start.kind == "noise" else RowStart(clean=lambda _: latents)

    def _time_ids_of(self, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """SDXL's size conditioning, [1, 6]: the picture as large as it is and not cropped."""
        if size not in self._time_ids:
            self._time_ids[size] = torch.tensor([[*size, 0, 0, *size]], dtype=dtype, device=self._device)
        return self._time_ids[size]
