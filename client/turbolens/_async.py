"""The async client. The sync one is made from this file by `tools/unasync.py`: edit here only."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Unpack, overload

import grpc

from turbolens._attribution import Attribution, Position
from turbolens._channel import TLS, Connection, Metadata, Token, async_channel, connection, pairs
from turbolens._contrast import contrast
from turbolens._edits import FeatureLike, Features, Mask, replace, to_ref
from turbolens._embedded import Embedded
from turbolens._errors import Closed, InvalidRequest, Overloaded, Unavailable, from_rpc_error, out_of_time
from turbolens._features import NEARNESS, Feature, Match, Near, Nearness
from turbolens._gallery import Gallery, gallery
from turbolens._labels import Labels
from turbolens._leave_out import leave_out
from turbolens._many.options import ExtractManyOptions, GenerateManyOptions
from turbolens._many.progress import ManyReport
from turbolens._many.prompts import Prompts as ManyPrompts
from turbolens._many.run import extract_many, generate_many, run_async
from turbolens._many.tables import Form
from turbolens._model import Model, Sae
from turbolens._numbers import seconds, text, whole, whole_or_none
from turbolens._provenance import Provenance
from turbolens._replay import TOLERANCE, Replay, compare, otherwise, read_manifest
from turbolens._results import Event, Extraction, Picture, Pictures, event_of, warnings_of
from turbolens._retry import ATTEMPTS, Attempts, name_request, warn_of_skew
from turbolens._run import (
    AttributeOptions,
    Call,
    ExtractOptions,
    GenerateOptions,
    Prompts,
    RunOptions,
    StreamOptions,
    attribute_call,
    extract_call,
    generate_call,
    takes,
)
from turbolens._sweep import Sweep, SweptKind, sweep
from turbolens._table import Table
from turbolens._waiting import async_home, async_messages
from turbolens._window import CALLS, RUNS, async_window
from turbolens_proto.v1 import admin_service_pb2, feature_service_pb2, model_service_pb2
from turbolens_proto.v1.admin_service_pb2_grpc import AdminServiceStub
from turbolens_proto.v1.feature_service_pb2_grpc import FeatureServiceStub
from turbolens_proto.v1.generation_service_pb2_grpc import GenerationServiceStub
from turbolens_proto.v1.model_service_pb2_grpc import ModelServiceStub

_READY_S: Final = 0.5
"""Between questions to a server that does not say when it will be ready."""


class Services(NamedTuple):
    """A channel and the server's services behind it; grpcio's stubs have no types."""

    channel: Any
    models: Any
    features: Any
    generation: Any
    admin: Any


def _services(channel: Any) -> Services:
    stubs = (ModelServiceStub, FeatureServiceStub, GenerationServiceStub, AdminServiceStub)
    return Services(channel, *(stub(channel) for stub in stubs))


class AsyncLens:
    """A connection to a TurboLens server; made by :func:`turbolens.aio.connect`."""

    def __init__(
        self,
        to: Connection,
        *,
        timeout: float | None = 60.0,
        attempts: int = ATTEMPTS,
        embedded: Embedded | None = None,
    ) -> None:
        self._to = to
        self._target = to.target.removeprefix("dns:///")
        self._timeout = math.inf if timeout is None else seconds(timeout, "timeout")
        self._attempts = attempts
        self._embedded = embedded
        self._closed = False
        self._services: Services | None = None
        self._at_home: Callable[[], bool]
        self._model: Model | None = None
        self._labels = Labels()
        self._window = async_window(RUNS)
        self._calls = async_window(CALLS)

    async def model(self) -> Model:
        """The model, its hook points and SAEs, and every limit; asked once."""
        if self._model is None:
            services = await self._open()
            answer = await self._call(services.models.GetModel, model_service_pb2.GetModelRequest(), None)
            self._model = Model.from_proto(answer.model)
            warn_of_skew(self._model.versions.get("turbolens", ""))
        return self._model

    async def wait_ready(self, timeout: float | None = 300.0) -> Model:
        """Wait until the server answers and has its model, which it then tells. It is asked anew: another may have been
        started in its place.

        Args:
            timeout: seconds; None: no limit.

        Raises:
            Unavailable: it did not come.
            TurboLensError: it answered that it will not serve this caller.
        """
        until = time.monotonic() + (math.inf if timeout is None else seconds(timeout, "timeout"))
        self._model = None
        while True:
            try:
                return await self.model()
            except (Unavailable, Overloaded) as error:
                wait = error.retry_after or _READY_S
                if time.monotonic() + wait > until:
                    raise
            await asyncio.sleep(wait)

    @overload
    async def generate(
        self, prompt: str, *, seed: int | None = None, **options: Unpack[GenerateOptions]
    ) -> Picture: ...

    @overload
    async def generate(self, prompt: str, *, seeds: Sequence[int], **options: Unpack[GenerateOptions]) -> Pictures: ...

    @overload
    async def generate(
        self,
        prompt: list[str] | tuple[str, ...],
        *,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Pictures: ...

    @takes(GenerateOptions)
    async def generate(
        self,
        prompt: Prompts,
        *,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Any:
        """Make a picture, or one for each of several prompts and seeds.

        Args:
            prompt: any text; the empty prompt is one. Several, in a list, are drawn at every seed each, all by the
                same options.
            seed: of one picture, of which only the low 32 bits reach the noise, as in PyTorch on a CPU; None: the
                server draws one and the result says which.
            seeds: of several pictures.
            options: any of these:

                image: a picture to start from, in place of noise: a result, a PIL image, uint8 [height, width, 3], the
                    bytes or the path of a PNG, JPEG or WebP; of a size that is served.
                start_latents: [channels, height, width] to start from: such as `picture.latents`, with a strength, or
                    without one the first noise itself.
                strength: how much of the way from noise is walked: the last `int(steps * strength)` steps, which are
                    the run's, counted from 0. 1 keeps little of the picture.
                steps: denoising steps; None: the server's default.
                width, height: pixels; None: the server's default.
                timesteps: of the steps, falling, for models distilled for certain ones; empty: as the server chooses.
                guidance_scale: above 1, each prediction is led away from one without the prompt, for models made for
                    that, such as SDXL base; 0 or 1: not at all.
                guidance_rescale: how far a guided prediction is brought back to the spread that it has without, 0 to 1.
                negative_prompt: what guidance leads away from; None: nothing, as the model hears it.
                steer: edits, such as `add(match, 8, mask=box(0, 0, .5, 1))`.
                references: other runs that edits read, by names of your own: `{"other": reference("a blue ring")}`.
                regions: phrases heard under masks, beside the prompt: `[(box(0, 0, .5, 1), "a red ring")]`.
                gate: hear the text through the server's learned region gates.
                features: features to return: True for all, or SAEs by name.
                only: of these, only the ones named, one or several; without `features`, from the SAEs that they belong
                    to.
                float32: return activations in float32; float16 holds none above 65,504, where the call fails.
                k: features active at a position, by SAE, where it allows other than its own: `{"up.0.1": 4}`.
                prefix: so many first features alone exist, by SAE, where it allows that: `{"up.0.1": 64}`.
                format: "png", "jpeg", "webp" or "raw".
                quality: of JPEG and WebP, 1 to 100.
                latents: return the final latent too.
                timeout: seconds, or infinity, which is no limit; None: the connection's.
                request_id: for the server's log; empty: the server makes one.

        Returns:
            A :class:`Picture`; :class:`Pictures`, in order and prompt by prompt, where `seeds` or several prompts were
            given.

        Raises:
            InvalidRequest: with a violation for every field that cannot be served.
            TurboLensError: anything else that went wrong.
        """
        call = generate_call(prompt, seed, seeds, options)
        services = await self._open()
        async with self._window:
            request = call.generate(labels=self._labels.wanted(call.run))
            answer = await self._call(services.generation.Generate, request, call.timeout)
        call.check(len(answer.generations))
        self._learn(call, [chunk for made in answer.generations for chunk in made.features])
        account, warnings = Provenance.from_proto(answer.provenance), warnings_of(answer.warnings)
        made = [Picture(g, call.run, account, warnings, self._labels.of, call.quality) for g in answer.generations]
        return Pictures(made) if call.several else made[0]

    @overload
    async def extract(
        self, prompt: str, *, seed: int | None = None, **options: Unpack[ExtractOptions]
    ) -> Extraction: ...

    @overload
    async def extract(
        self, prompt: str, *, seeds: Sequence[int], **options: Unpack[ExtractOptions]
    ) -> list[Extraction]: ...

    @overload
    async def extract(
        self,
        prompt: list[str] | tuple[str, ...],
        *,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        **options: Unpack[ExtractOptions],
    ) -> list[Extraction]: ...

    @takes(ExtractOptions)
    async def extract(
        self,
        prompt: Prompts,
        *,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        **options: Unpack[ExtractOptions],
    ) -> Any:
        """The features of a run, without its picture.

        The first features of an SAE bring its labels with them, which are kept for the connection.

        Args:
            prompt: any text, or several in a list, as of :meth:`generate`.
            seed: of one run; None: the server draws one and the result says which.
            seeds: of several runs.
            options: those of :meth:`generate` but for the picture's, and `saes`, the names of the SAEs; without `saes`
                and `only`, all features come.

        Returns:
            An :class:`Extraction`; a list of them, in order and prompt by prompt, where `seeds` or several prompts were
            given.

        Raises:
            InvalidRequest: with a violation for every field that cannot be served.
            TurboLensError: anything else that went wrong.
        """
        call = extract_call(prompt, seed, seeds, options)
        services = await self._open()
        async with self._window:
            request = call.extract(labels=self._labels.wanted(call.run))
            answer = await self._call(services.features.ExtractFeatures, request, call.timeout)
        call.check(len(answer.extractions))
        self._learn(call, [chunk for made in answer.extractions for chunk in made.features])
        account, warnings = Provenance.from_proto(answer.provenance), warnings_of(answer.warnings)
        made = [Extraction(e, call.run, account, warnings, self._labels.of) for e in answer.extractions]
        return made if call.several else made[0]

    @takes(AttributeOptions)
    async def attribute(
        self,
        prompt: str,
        feature: FeatureLike,
        *,
        seed: int | None = None,
        step: int | None = None,
        **options: Unpack[AttributeOptions],
    ) -> Attribution:
        """What made a feature fire in a run: which words, positions and heads, as an exact sum.

        Args:
            prompt: any text; the empty prompt is one.
            feature: of an SAE at the z of an attention layer, such as `"up.0.1.attn2.0.z/12"`.
            seed: of the run; None: the server draws one and the result says which.
            step: from 0; None: the last.
            options: those of :meth:`generate` that make the run: with `steer`, a steered run is explained.

        Raises:
            InvalidRequest: with a violation for every field that cannot be served: the feature's hook point is no z, or
                the backend does not show attention.
            TurboLensError: anything else that went wrong.
        """
        call, ref = attribute_call(prompt, seed, options), to_ref(feature)
        request = call.attribute(ref, whole_or_none(step, "step"))
        services = await self._open()
        async with self._window:
            answer = await self._call(services.features.AttributeFeature, request, call.timeout)
        account, warnings = Provenance.from_proto(answer.provenance), warnings_of(answer.warnings)
        return Attribution(answer, ref, prompt, account, warnings)

    @takes(AttributeOptions)
    async def leave_out(
        self,
        prompt: str,
        feature: FeatureLike,
        *,
        seed: int | None = None,
        step: int | None = None,
        at: Position | None = None,
        region: Mask | None = None,
        **options: Unpack[AttributeOptions],
    ) -> Table:
        """Which word made a feature fire, by what its pre-activation loses when each is left out of the prompt.

        A run for each word. Slower than :meth:`attribute`, and through the whole model: a text encoder hands words on
        to the tokens after them, so the token that a layer hears need not be the word that it is about.

        Args:
            prompt: any text.
            feature: as of :meth:`attribute`.
            seed: of all runs; None: the server draws one.
            step: from 0; None: the last.
            at: at this position of the grid alone.
            region: mean over a mask. Without both: over the positions where the feature is active with the whole
                prompt, or everywhere where it is nowhere.
            options: as of :meth:`attribute`.

        Returns:
            A list of :class:`LeftOut`, what drops most first; a word that stands twice is left out at one place a row.

        Raises:
            IndexError: `at` is not on the grid.
            ValueError: both were given, or the mask covers nothing of the grid.
            InvalidRequest: as of :meth:`attribute`.
        """
        given = (seed, step, at, region, options)
        return await run_async(lambda lens: leave_out(lens, prompt, to_ref(feature), *given), self)

    async def replay(self, file: str | Path, *, tolerance: int = TOLERANCE) -> Replay:
        """Make a result again and say whether it is equal, equal within tolerance, or what differs.

        Args:
            file: a PNG that :meth:`Picture.save` wrote, or a manifest (`tl.manifest(result).to_json()`).
            tolerance: largest difference of a pixel, of 255, that counts as equal.

        Raises:
            ValueError: the file does not say how it was made.
            TurboLensError: the server did not answer; a refusal is told in the result.
        """
        before = read_manifest(Path(file))
        model = await self.model()
        call, services, at = before.call(), await self._open(), before.place
        try:
            async with self._window:
                if before.kind == "picture":
                    answer = await self._call(services.generation.Generate, call.generate(labels=False), None)
                else:
                    answer = await self._call(services.features.ExtractFeatures, call.extract(labels=False), None)
        except InvalidRequest as error:
            return Replay("refused", otherwise(before.provenance, model, model.backend), str(error), None)
        account, warnings = Provenance.from_proto(answer.provenance), warnings_of(answer.warnings)
        differs = otherwise(before.provenance, model, account.backend)
        call.check(len(answer.generations if before.kind == "picture" else answer.extractions))
        about = (call.run, account, warnings, self._labels.of)
        made: Picture | Extraction
        if before.kind == "picture":
            made = Picture(answer.generations[at], *about, call.quality)
        else:
            made = Extraction(answer.extractions[at], *about)
        return compare(before, made, differs, tolerance)

    @takes(StreamOptions)
    async def stream_generate(
        self,
        prompt: Prompts,
        *,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        **options: Unpack[StreamOptions],
    ) -> AsyncIterator[Event]:
        """Make pictures and hear of every step: Queued, Step, Features, PictureReady, Done.

        Arguments as for :meth:`generate`; `previews=True` decodes a preview at every step but the last. Leaving the
        loop early cancels the run.
        """
        call = generate_call(prompt, seed, seeds, options)
        request = call.stream_generate(labels=self._labels.wanted(call.run))
        services = await self._open()
        async for event in self._events(services.generation.StreamGenerate, request, call):
            yield event

    @takes(ExtractOptions)
    async def stream_features(
        self,
        prompt: Prompts,
        *,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        **options: Unpack[ExtractOptions],
    ) -> AsyncIterator[Event]:
        """The features of a run as they are computed: Queued, Features, Done. Arguments as for :meth:`extract`."""
        call = extract_call(prompt, seed, seeds, options)
        request = call.stream_features(labels=self._labels.wanted(call.run))
        services = await self._open()
        async for event in self._events(services.features.StreamFeatures, request, call):
            yield event

    @takes(ExtractManyOptions)
    async def extract_many(
        self, prompts: ManyPrompts, out: str | Path, *, form: Form = "pooled", **options: Unpack[ExtractManyOptions]
    ) -> ManyReport:
        """The features of very many prompts, as a Parquet table; needs `turbolens[tables]`.

        Killed and called again with the same arguments, it goes on where it was: nothing is lost, and nothing is there
        twice. Memory does not grow with the number of prompts.

        Args:
            prompts: a file (.txt, .jsonl, .csv, .parquet), or texts, or mappings with a prompt and perhaps a seed.
            out: a .parquet file, in order of the prompts. While the run lasts, a hidden folder of parts is beside it.
            form: "pooled": a row for each prompt, seed and SAE, with lists of the features active anywhere and of
                their means over steps and positions, maxima, and shares of positions where they are active. "full": a
                row for each step too, with every activation and its position. A prompt that cannot be made has one row,
                whose `error` says why.
            options: those of :meth:`extract` but for `seed`, and:

                seeds: every prompt is run with each, unless its row has a `seed`; left out: 0.
                column: of rows, the one that is the prompt; left out: `prompt`.
                progress: True: a line on stderr; a function: called with a :class:`Progress`; None: a line where
                    stderr is a terminal.
                overwrite: begin anew, whatever is there.
                patience: seconds for which a server that is away or full is asked again; left out: 300.

        Raises:
            ValueError: `out` is there and was made from other prompts, settings or models; the text says in what.
            TurboLensError: the server stayed away, or fails; what was made is kept.
        """
        return await run_async(lambda lens: extract_many(lens, prompts, out, form, options), self)

    @takes(GenerateManyOptions)
    async def generate_many(
        self, prompts: ManyPrompts, out: str | Path, **options: Unpack[GenerateManyOptions]
    ) -> ManyReport:
        """The pictures of very many prompts, as files in a folder with a `metadata.jsonl`, a line for each picture.

        Goes on where it was, as :meth:`extract_many` does. `failed.jsonl` has the prompts that cannot be made, and why.

        Args:
            prompts: as for :meth:`extract_many`.
            out: a folder.
            options: those of :meth:`generate` but for `seed`, features and latents, and those of the whole of
                :meth:`extract_many`.

        Raises:
            ValueError, TurboLensError: as for :meth:`extract_many`.
        """
        return await run_async(lambda lens: generate_many(lens, prompts, out, options), self)

    @takes(ExtractOptions)
    async def contrast(
        self,
        prompts: ManyPrompts,
        others: ManyPrompts,
        *,
        seeds: Sequence[int] = (0,),
        limit: int = 20,
        **options: Unpack[ExtractOptions],
    ) -> Table:
        """Which features tell two sets of prompts apart, the surest and strongest first.

        A prompt counts once, by its features' mean over steps, positions and seeds.

        Args:
            prompts: texts, or a file as of :meth:`extract_many`; at least three, better ten or more.
            others: what they are held against.
            seeds: of every prompt.
            limit: at most so many features.
            options: those of :meth:`extract` but for `seed`.

        Returns:
            A list of :class:`Difference`, with effect size and a p corrected for many tests.

        Raises:
            ValueError: a set has fewer than three prompts.
        """
        most = whole(limit, "limit")
        return await run_async(lambda lens: contrast(lens, prompts, others, tuple(seeds), most, options), self)

    @takes(RunOptions)
    async def sweep(
        self,
        prompt: str,
        features: Sequence[Features],
        strengths: Sequence[float],
        *,
        kind: SweptKind = "add",
        at: Sequence[tuple[int, int] | None] = (None,),
        seeds: Sequence[int] = (0,),
        edit: Mapping[str, Any] | None = None,
        **options: Unpack[RunOptions],
    ) -> Sweep:
        """One edit at many settings: every feature at every strength, range of steps and seed.

        Args:
            prompt: what to draw.
            features: of any blocks; each a feature, or a group as an edit takes it.
            strengths: or factors or values, as the kind has them.
            kind: "add", "scale", "set" or "replace".
            at: ranges of steps at which the edit acts; None: all.
            seeds: of the pictures.
            edit: more of the edit, such as `{"mask": box(0, 0, .5, 1), "unit": "norm"}`.
            options: those of :meth:`generate` but for `seed` and the picture's; `steer` is in every picture, plain ones
                included.

        Returns:
            A table of what each moved, whose `grid()` is a labelled picture.
        """
        given = (tuple(features), tuple(strengths), kind, tuple(at), tuple(seeds), dict(edit or {}), options)
        return await run_async(lambda lens: sweep(lens, prompt, *given), self)

    async def search_features(self, query: str, *, block: str | None = None, limit: int = 10) -> Table:
        """Features for words, best first; each goes straight into an edit.

        Args:
            query: a word or a few.
            block: only this SAE; None: all.
            limit: at most so many, up to 100.

        Returns:
            A list of :class:`Match`; of an empty one `hint` says why, and what would help.
        """
        request = feature_service_pb2.SearchFeaturesRequest(
            query=text(query, "the query"), saes=[block] if block else [], page_size=whole(limit, "limit")
        )
        services = await self._open()
        answer = await self._call(services.features.SearchFeatures, request, None)
        matches = [Match(Feature.from_proto(m.feature), m.score, m.reason) for m in answer.matches]
        return Table(matches, ("ref", "feature.label", "score", "reason"), answer.hint)

    async def nearest_features(self, feature: FeatureLike, *, limit: int = 10, by: Nearness = "decoder") -> Table:
        """The features of the same SAE that write most alike, or that fire together most, nearest first.

        Args:
            feature: in any of its forms, such as `"up.0.1/202"`.
            limit: at most so many, up to 100; of what fires together a catalog keeps the first 16.
            by: "decoder": the cosine of their decoder directions; "co-firing": positions where both are active, as a
                share of those where either is (Jaccard), as counted when the catalog was made.

        Returns:
            A list of :class:`Near`.

        Raises:
            NotFound: there is no such SAE or feature.
            InvalidRequest: nobody counted what fires together.
        """
        if by not in NEARNESS:
            raise ValueError(f"by {by!r}; use one of {', '.join(NEARNESS)}")
        ref = to_ref(feature)
        request = feature_service_pb2.NearestFeaturesRequest(
            name=f"saes/{ref.sae}/features/{ref.index}", page_size=whole(limit, "limit"), by=NEARNESS[by]
        )
        services = await self._open()
        answer = await self._call(services.features.NearestFeatures, request, None)
        near = [Near.from_proto(one) for one in answer.features]
        return Table(near, ("ref", "feature.label", *(("jaccard",) if by == "co-firing" else ()), "cosine"))

    async def get_feature(self, feature: FeatureLike, index: int | None = None) -> Feature:
        """What is known of one feature, top examples included: `get_feature("up.0.1", 202)`, or any form of a feature.

        Raises:
            NotFound: there is no such SAE or feature.
        """
        ref = to_ref(feature if index is None else (str(feature), index))
        request = feature_service_pb2.GetFeatureRequest(name=f"saes/{ref.sae}/features/{ref.index}")
        services = await self._open()
        answer = await self._call(services.features.GetFeature, request, None)
        return Feature.from_proto(answer.feature)

    async def examples(self, feature: FeatureLike, *, limit: int = 4) -> Gallery:
        """The pictures that lift a feature most, made again with its activations at that step laid over them.

        Args:
            feature: any form of a feature.
            limit: at most so many; each is a picture to make.

        Raises:
            NotFound: there is no such SAE or feature.
        """
        known = await self.get_feature(feature)
        shown, captions = [], []
        for example in known.examples[: whole(limit, "limit")]:
            picture = await self.generate(example.prompt, seed=example.seed, steps=example.steps, only=known.ref)
            block = picture.features[known.ref.sae].at(example.step)
            shown.append(block.overlay(known.ref, picture, scale=True))
            captions.append(f"{example.activation:.3g}: {example.prompt} (seed {example.seed})")
        return gallery(shown, captions)

    async def icon(self, feature: FeatureLike) -> Picture | None:
        """What a feature draws by itself: it replaces its block on the empty prompt, at the strength where that shows.

        Args:
            feature: any form of a feature.

        Returns:
            None where it draws nothing that was seen, or nobody looked.

        Raises:
            NotFound: there is no such SAE or feature.
        """
        known = await self.get_feature(feature)
        if known.icon_strength is None:
            return None
        return await self.generate("", seed=0, steer=[replace(known.ref, known.icon_strength)])

    async def list_features(self, sae: str, *, filter: str = "", order_by: str = "") -> AsyncIterator[Feature]:
        """Every feature of an SAE that matches, page by page.

        Args:
            sae: its name.
            filter: comparisons joined by AND, such as `attribute = "color" AND frequency > 0.01`.
            order_by: fields with an optional "desc", such as `frequency desc, index`.
        """
        token = ""
        while True:
            request = feature_service_pb2.ListFeaturesRequest(
                parent=f"saes/{sae}", page_size=1000, page_token=token, filter=filter, order_by=order_by
            )
            services = await self._open()
            answer = await self._call(services.features.ListFeatures, request, None)
            for message in answer.features:
                yield Feature.from_proto(message)
            token = answer.next_page_token
            if not token:
                return

    async def load_saes(self, source: str, *, force: bool = False, timeout: float | None = None) -> tuple[Sae, ...]:
        """Have a server serve more SAEs, at its `admin_port`; requests that it was sent before keep theirs.

        Args:
            source: as `--sae` of `turbolens serve` takes it; a folder is one of the server's machine.
            force: serve them though they were trained on another model.
            timeout: seconds; None: the connection's.

        Returns:
            All SAEs that are served now.

        Raises:
            InvalidRequest: they cannot be served; what was served goes on.
        """
        return await self._change("LoadSaes", admin_service_pb2.LoadSaesRequest(source=source, force=force), timeout)

    async def unload_sae(self, name: str, *, timeout: float | None = None) -> tuple[Sae, ...]:
        """Have a server serve an SAE no more, likewise.

        Raises:
            NotFound: there is none of that name.
        """
        return await self._change("UnloadSae", admin_service_pb2.UnloadSaeRequest(name=name), timeout)

    async def reload_sae(self, name: str, *, timeout: float | None = None) -> tuple[Sae, ...]:
        """Have a server read an SAE, its statistics and its labels again from where they came from, likewise.

        Raises:
            NotFound: there is none of that name.
            InvalidRequest: it cannot be served as it is now.
        """
        return await self._change("ReloadSae", admin_service_pb2.ReloadSaeRequest(name=name), timeout)

    async def _change(self, method: str, request: Any, timeout: float | None) -> tuple[Sae, ...]:
        services = await self._open()
        answer = await self._call(getattr(services.admin, method), request, timeout)
        self._model = None  # it has others now
        return tuple(Sae.from_proto(sae) for sae in answer.saes)

    async def close(self) -> None:
        """Close the connection, and the server that was started for it."""
        self._closed = True
        if self._services is not None:
            await self._services.channel.close()
        if self._embedded is not None:
            await asyncio.to_thread(self._embedded.close)

    async def __aenter__(self) -> AsyncLens:
        try:
            await self._open()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncLens({self._target!r})"

    async def _open(self) -> Services:
        """The services; the first time, of a server that is started for it."""
        if self._closed:
            raise Closed(f"the connection to {self._target} is closed; make another")
        if self._services is None:
            to = self._to
            if self._embedded:
                target = await asyncio.to_thread(self._embedded.start)
                to = dataclasses.replace(to, target=target)
            self._services = self._services or _services(async_channel(to))
            self._at_home = async_home()
        if not self._at_home():
            raise Closed(f"the connection to {self._target} belongs to another event loop; make one in each")
        return self._services

    async def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        name_request(request)
        async with self._calls:
            attempts = Attempts(self._timeout if timeout is None else timeout, self._attempts)
            while True:
                try:
                    return await method(request, timeout=attempts.left_s(), metadata=self._to.metadata())
                except grpc.RpcError as refusal:
                    error = from_rpc_error(refusal, self._target)
                    if (wait := attempts.wait_s(error)) is None:
                        raise error from None
                await asyncio.sleep(wait)

    async def _events(self, method: Any, request: Any, call: Call) -> AsyncIterator[Event]:
        name_request(request)
        attempts = Attempts(self._timeout if call.timeout is None else call.timeout, self._attempts)
        while True:
            told = False
            try:
                async for event in self._attempt(method, request, call, attempts.left_s()):
                    told = True
                    yield event
                return
            except Overloaded as error:
                if told or (wait := attempts.wait_s(error)) is None:
                    raise
            await asyncio.sleep(wait)

    async def _attempt(self, method: Any, request: Any, call: Call, timeout: float | None) -> AsyncIterator[Event]:
        messages = method(request, metadata=self._to.metadata())
        heard: set[int] = set()
        try:
            async for message in async_messages(messages, timeout):
                kind = message.WhichOneof("event")
                if kind in ("features", "picture"):
                    heard.add(getattr(message, kind).seed_index)
                if kind == "features":
                    self._labels.learn([message.features.features])
                if kind == "done":
                    call.check(len(heard))
                    self._labels.have(call.run)
                yield event_of(message, call.run, self._labels.of)
        except TimeoutError:
            raise out_of_time(self._target) from None
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._target) from None
        finally:
            messages.cancel()

    def _learn(self, call: Call, chunks: Sequence[Any]) -> None:
        self._labels.learn(chunks)
        self._labels.have(call.run)


def connect(
    target: str | Sequence[str] | None = None,
    *,
    token: Token | None = None,
    metadata: Metadata = (),
    tls: TLS | bool | None = None,
    timeout: float | None = 60.0,
    attempts: int = ATTEMPTS,
    **settings: Any,
) -> AsyncLens:
    """Connect to a server, or start one in this process.

    Args:
        target: "host:port", several of them in a list or separated by commas, over which calls take turns, or
            "embedded" for a server of its own in this process, which starts when the connection is entered by `with`,
            or at the first call. None: TURBOLENS_TARGET, else localhost:50051.
        token: that the server knows this caller by, or a function that gives the current one. None: TURBOLENS_TOKEN,
            else none.
        metadata: pairs that every call brings, for proxies on the way; keys in lower case.
        tls: for a server behind TLS; True: with the system's certificates; False: in the clear even with a token. None:
            by TURBOLENS_TLS_CA, TURBOLENS_TLS_CERT and TURBOLENS_TLS_KEY, files in PEM, where one is set.
        timeout: seconds that a call may take, attempts and the waits between them included, unless it says otherwise;
            of a stream, seconds that it may be waited for, however long its reader takes in between. None: no limit.
        attempts: of a call at a server that is full and says when to come back; 1: none but the first.
        settings: of the embedded server, such as `model` or `sae`.

    Raises:
        ValueError: the target cannot be one, a token or metadata cannot travel, or a token would in the clear.
    """
    if target == "embedded":
        if tls is not None or token is not None:
            raise TypeError("tls, token: the embedded server is reached inside this process, where there is neither")
        to = Connection(target, more=pairs(metadata))
        return AsyncLens(to, timeout=timeout, attempts=attempts, embedded=Embedded(settings))
    if settings:
        raise TypeError(f"{', '.join(settings)}: only an embedded server takes settings")
    return AsyncLens(connection(target, token, metadata, tls), timeout=timeout, attempts=attempts)
