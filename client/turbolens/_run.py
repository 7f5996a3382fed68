"""One call as one value: built here from keyword arguments and turned here into requests, for both clients."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, TypedDict, TypeVar

from turbolens._edits import Edit, FeatureLike, FeatureRef, Mask, to_refs
from turbolens._errors import Unimplemented
from turbolens._numbers import number, seconds, switch, text, whole, whole_or_none
from turbolens._start import ImageLike, Start, prompt_of, source_of, start_of
from turbolens_proto.v1 import feature_service_pb2, generation_service_pb2, run_pb2, steering_pb2

Method = TypeVar("Method", bound=Callable[..., Any])
ImageFormat = Literal["png", "jpeg", "webp", "raw"]
FORMATS: Final[dict[ImageFormat, run_pb2.ImageFormat.ValueType]] = {
    "png": run_pb2.IMAGE_FORMAT_PNG,
    "jpeg": run_pb2.IMAGE_FORMAT_JPEG,
    "webp": run_pb2.IMAGE_FORMAT_WEBP,
    "raw": run_pb2.IMAGE_FORMAT_RAW,
}
Selection = bool | Sequence[str] | None
"""Features to return: None or False for none, True for all, or SAEs by name."""
Only = FeatureLike | Sequence[FeatureLike] | None
"""Of these, only the ones named; None for all."""
PerSae = Mapping[str, int] | None
"""A number for each SAE that is named; None for none."""


Prompts = str | Sequence[str]
"""What to draw: one prompt, or several of one call."""
Regions = Sequence[tuple[Mask, str]]
"""Phrases that a picture hears under masks, beside its prompt."""


@dataclasses.dataclass(frozen=True, slots=True)
class Reference:
    """Another run for edits to read; made by :func:`reference`."""

    prompt: str
    seed: int | None = None
    """None: the seed of the picture that reads it."""
    start: Start | None = None
    """None: noise."""

    @classmethod
    def from_proto(cls, message: run_pb2.Reference) -> Reference:
        """From a message."""
        seed = message.seed if message.HasField("seed") else None
        return cls(prompt_of(message.source), seed, Start.from_proto(message.source))

    def to_proto(self) -> run_pb2.Reference:
        """The reference as a message."""
        return run_pb2.Reference(source=source_of(self.prompt, self.start), seed=self.seed)


def reference(
    prompt: str,
    *,
    seed: int | None = None,
    image: ImageLike | None = None,
    start_latents: Any = None,
    strength: float | None = None,
) -> Reference:
    """Another run, made beside each picture and never steered, for :func:`patch` and :func:`transfer` to read.

    Args:
        prompt: what it draws.
        seed: None: the picture's own, so that the two differ by their prompt alone.
        image, start_latents, strength: what it starts from, as of the picture that reads it: it walks as many steps.
    """
    return Reference(text(prompt, "the prompt"), _seed(seed), start_of(image, start_latents, strength))


class AttributeOptions(TypedDict, total=False):
    """What `attribute` takes beside the prompt, the feature, seed and step: what makes the run."""

    image: ImageLike | None
    start_latents: Any
    strength: float | None
    steps: int | None
    width: int | None
    height: int | None
    timesteps: Sequence[int]
    guidance_scale: float
    guidance_rescale: float
    negative_prompt: str | None
    steer: Sequence[Edit]
    references: Mapping[str, Reference]
    regions: Regions
    gate: bool
    k: PerSae
    prefix: PerSae
    timeout: float | None
    request_id: str


class RunOptions(AttributeOptions, total=False):
    """What every call that returns features takes beside the prompt and seeds."""

    only: Only
    float32: bool


class ExtractOptions(RunOptions, total=False):
    """What `extract` and `stream_features` take beside the prompt and seeds."""

    saes: Sequence[str] | None


class GenerateOptions(RunOptions, total=False):
    """What `generate` takes beside the prompt and seeds."""

    features: Selection
    format: ImageFormat
    quality: int | None
    latents: bool


class StreamOptions(GenerateOptions, total=False):
    """What `stream_generate` takes beside the prompt and seeds."""

    previews: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What to run, for each of one prompt or several and of one seed or several."""

    prompt: str
    """The first, where there are several."""
    more_prompts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    """Empty: one, drawn by the server."""
    start: Start | None = None
    """None: noise."""
    steps: int | None = None
    """None, here and below: the server's default."""
    width: int | None = None
    height: int | None = None
    timesteps: tuple[int, ...] = ()
    """Empty: as the server's scheduler chooses them."""
    guidance_scale: float = 0.0
    guidance_rescale: float = 0.0
    negative_prompt: str | None = None
    steer: tuple[Edit, ...] = ()
    references: Mapping[str, Reference] = dataclasses.field(default_factory=dict)
    regions: tuple[tuple[Mask, str], ...] = ()
    gate: bool = False
    """Hear the text through the server's learned region gates."""
    features: tuple[str, ...] | None = None
    """SAEs whose features come back, empty for all of them; None: no features."""
    only: tuple[FeatureRef, ...] = ()
    float32: bool = False
    k: Mapping[str, int] = dataclasses.field(default_factory=dict)
    prefix: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_proto(cls, message: run_pb2.Run) -> Run:
        """From a message, such as a result's provenance has.

        Raises:
            ValueError: it holds an edit that this client does not know.
        """
        sampling, selection = message.sampling, message.features
        return cls(
            prompt=prompt_of(message.source),
            more_prompts=tuple(message.more_prompts),
            seeds=tuple(message.seeds),
            start=Start.from_proto(message.source),
            steps=sampling.steps if sampling.HasField("steps") else None,
            width=sampling.width if sampling.HasField("width") else None,
            height=sampling.height if sampling.HasField("height") else None,
            timesteps=tuple(sampling.timesteps),
            guidance_scale=sampling.guidance_scale,
            guidance_rescale=sampling.guidance_rescale,
            negative_prompt=sampling.negative_prompt if sampling.HasField("negative_prompt") else None,
            steer=tuple(Edit.from_proto(edit) for edit in message.edits),
            references={name: Reference.from_proto(one) for name, one in message.references.items()},
            regions=tuple((Mask(region.mask), region.prompt) for region in message.regions),
            gate=message.gate,
            features=tuple(selection.saes) if message.HasField("features") else None,
            only=tuple(FeatureRef(ref.sae, ref.index) for ref in selection.only),
            float32=selection.value_type == run_pb2.VALUE_TYPE_FLOAT32,
            k={o.sae: o.k for o in message.sae_options if o.HasField("k")},
            prefix={o.sae: o.prefix for o in message.sae_options if o.HasField("prefix")},
        )

    def to_proto(self, *, labels: bool = False) -> run_pb2.Run:
        """The run as a message; `labels` asks for those of the features that come back."""
        return run_pb2.Run(
            source=source_of(self.prompt, self.start),
            more_prompts=self.more_prompts,
            sampling=run_pb2.Sampling(
                steps=self.steps,
                width=self.width,
                height=self.height,
                timesteps=self.timesteps,
                guidance_scale=self.guidance_scale or None,
                guidance_rescale=self.guidance_rescale,
                negative_prompt=self.negative_prompt,
            ),
            seeds=self.seeds,
            edits=[edit.to_proto() for edit in self.steer],
            features=None if self.features is None else self._selection(self.features, labels),
            sae_options=[
                run_pb2.SaeOptions(sae=sae, k=self.k.get(sae), prefix=self.prefix.get(sae))
                for sae in dict.fromkeys((*self.k, *self.prefix))
            ],
            references={name: one.to_proto() for name, one in self.references.items()},
            regions=[run_pb2.Region(mask=mask.message, prompt=phrase) for mask, phrase in self.regions],
            gate=self.gate,
        )

    @property
    def prompts(self) -> tuple[str, ...]:
        """All of them, in order."""
        return (self.prompt, *self.more_prompts)

    @property
    def results(self) -> int:
        """How many pictures, or extractions, it comes to: one for each prompt and seed, prompt by prompt."""
        return len(self.prompts) * max(1, len(self.seeds))

    def _selection(self, saes: Sequence[str], labels: bool) -> run_pb2.FeatureSelection:
        return run_pb2.FeatureSelection(
            saes=saes,
            only=[steering_pb2.FeatureRef(sae=ref.sae, index=ref.index) for ref in self.only],
            value_type=run_pb2.VALUE_TYPE_FLOAT32 if self.float32 else run_pb2.VALUE_TYPE_UNSPECIFIED,
            labels=labels,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A run, what comes back of it, and how long that may take."""

    run: Run
    several: bool
    """Whether the caller named prompts or seeds in a list, and so gets a list."""
    format: ImageFormat = "png"
    quality: int | None = None
    latents: bool = False
    previews: bool = False
    timeout: float | None = None
    request_id: str = ""

    def check(self, results: int) -> None:
        """Whether all came of several prompts, which a server that does not know them passes over.

        Raises:
            Unimplemented: some did not.
        """
        if results != self.run.results:
            told = f"{results} of {self.run.results} results came: the server knows one prompt a request; update it"
            raise Unimplemented(told, code="UNIMPLEMENTED")

    def generate(self, *, labels: bool) -> generation_service_pb2.GenerateRequest:
        """The request for pictures."""
        return generation_service_pb2.GenerateRequest(
            request_id=self.request_id,
            run=self.run.to_proto(labels=labels),
            image=self._image(),
            return_latents=self.latents,
        )

    def stream_generate(self, *, labels: bool) -> generation_service_pb2.StreamGenerateRequest:
        """The request for pictures as they are made."""
        return generation_service_pb2.StreamGenerateRequest(
            request_id=self.request_id,
            run=self.run.to_proto(labels=labels),
            image=self._image(),
            return_latents=self.latents,
            previews=self.previews,
        )

    def extract(self, *, labels: bool) -> feature_service_pb2.ExtractFeaturesRequest:
        """The request for features."""
        run = self.run.to_proto(labels=labels)
        return feature_service_pb2.ExtractFeaturesRequest(request_id=self.request_id, run=run)

    def stream_features(self, *, labels: bool) -> feature_service_pb2.StreamFeaturesRequest:
        """The request for features as they are computed."""
        run = self.run.to_proto(labels=labels)
        return feature_service_pb2.StreamFeaturesRequest(request_id=self.request_id, run=run)

    def attribute(self, feature: FeatureRef, step: int | None) -> feature_service_pb2.AttributeFeatureRequest:
        """The request for what made a feature fire."""
        return feature_service_pb2.AttributeFeatureRequest(
            request_id=self.request_id,
            run=self.run.to_proto(labels=False),
            feature=steering_pb2.FeatureRef(sae=feature.sae, index=feature.index),
            step=step,
        )

    def _image(self) -> run_pb2.ImageOptions:
        return run_pb2.ImageOptions(format=FORMATS[self.format], quality=self.quality)


def generate_call(
    prompt: Prompts, seed: int | None, seeds: Sequence[int] | None, options: StreamOptions | GenerateOptions
) -> Call:
    """A call for pictures.

    Raises:
        TypeError, ValueError: an argument is unknown, or cannot be right for any server.
    """
    given: dict[str, Any] = dict(options)
    features = given.pop("features", None)
    shape = given.get("format", "png")
    if shape not in FORMATS:
        raise ValueError(f"format {shape!r}; use one of {', '.join(FORMATS)}")
    return _call("features", StreamOptions, prompt, seed, seeds, given, features)


def extract_call(prompt: Prompts, seed: int | None, seeds: Sequence[int] | None, options: ExtractOptions) -> Call:
    """A call for features: unless some are named, for all of them.

    Raises:
        TypeError, ValueError: as for :func:`generate_call`.
    """
    given: dict[str, Any] = dict(options)
    saes, only = given.pop("saes", None), given.get("only")
    wanted = True if saes is None and only is None else saes
    return _call("saes", ExtractOptions, prompt, seed, seeds, given, wanted)


def attribute_call(prompt: str, seed: int | None, options: AttributeOptions) -> Call:
    """A call for what made a feature fire.

    Raises:
        TypeError, ValueError: as for :func:`generate_call`.
    """
    return _call("", AttributeOptions, text(prompt, "the prompt"), seed, None, dict(options), None)


_DEFAULTS: Final[Mapping[str, Any]] = {
    "timesteps": (), "guidance_scale": 0.0, "guidance_rescale": 0.0, "steer": (), "references": {}, "regions": (),
    "gate": False, "float32": False,
    "format": "png", "latents": False, "previews": False, "request_id": "",
}  # fmt: skip
"""Of options that are not None where they are left out."""


def takes(options: type) -> Callable[[Method], Method]:
    """Shows the keyword arguments of `options` in a method's signature, for help and completion in notebooks."""
    keywords = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=_DEFAULTS.get(name), annotation=kind.__forward_arg__
        )
        for name, kind in options.__annotations__.items()
    ]

    def show(method: Method) -> Method:
        own = inspect.signature(method)
        known = [parameter for parameter in own.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
        method.__signature__ = own.replace(parameters=[*known, *keywords])  # type: ignore[attr-defined]
        return method

    return show


_OF_A_CALL: Final = ("format", "quality", "latents", "previews", "timeout", "request_id")


def _call(
    argument: str,
    known: type,
    prompt: Prompts,
    seed: int | None,
    seeds: Sequence[int] | None,
    given: dict[str, Any],
    features: Selection,
) -> Call:
    """`argument` is what the caller calls `features`."""
    if unknown := given.keys() - known.__annotations__.keys():
        raise TypeError(f"no argument {', '.join(sorted(unknown))}")
    of_call = {name: given.pop(name) for name in _OF_A_CALL if name in given}
    if of_call.get("quality") is not None:
        of_call["quality"] = whole(of_call["quality"], "quality")
    if of_call.get("timeout") is not None:
        of_call["timeout"] = seconds(of_call["timeout"], "timeout")
    only, float32 = given.pop("only", None), given.pop("float32", False)
    saes, refs = _wanted(features, only, float32, argument)
    first, *more = _prompts(prompt)
    run = Run(
        prompt=first,
        more_prompts=tuple(more),
        seeds=_seeds(seed, seeds),
        start=start_of(given.pop("image", None), given.pop("start_latents", None), given.pop("strength", None)),
        steps=whole_or_none(given.pop("steps", None), "steps"),
        width=whole_or_none(given.pop("width", None), "width"),
        height=whole_or_none(given.pop("height", None), "height"),
        timesteps=tuple(whole(t, "timesteps") for t in given.pop("timesteps", ())),
        guidance_scale=number(given.pop("guidance_scale", 0.0), "guidance_scale"),
        guidance_rescale=number(given.pop("guidance_rescale", 0.0), "guidance_rescale"),
        negative_prompt=_text_or_none(given.pop("negative_prompt", None), "the negative prompt"),
        steer=_edits(given.pop("steer", ())),
        references=_references(given.pop("references", {})),
        regions=_regions(given.pop("regions", ())),
        gate=switch(given.pop("gate", False), "gate"),
        features=saes,
        only=refs,
        float32=float32,
        k=_per_sae("k", given.pop("k", None)),
        prefix=_per_sae("prefix", given.pop("prefix", None)),
    )
    return Call(run=run, several=seeds is not None or not isinstance(prompt, str), **of_call)


def _prompts(prompt: Prompts) -> list[str]:
    if isinstance(prompt, str) or not isinstance(prompt, Sequence):
        return [text(prompt, "the prompt")]
    if not prompt:
        raise ValueError("the list of prompts is empty; give at least one")
    return [text(one, "a prompt") for one in prompt]


def _text_or_none(value: str | None, what: str) -> str | None:
    return None if value is None else text(value, what)


def _seed(seed: int | None) -> int | None:
    one = whole_or_none(seed, "seed")
    if one is not None and one >= 2**63:
        raise ValueError(f"seed {one} is too large; a seed is at least 0 and below 2**63")
    return one


def _seeds(seed: int | None, seeds: Sequence[int] | None) -> tuple[int, ...]:
    """The seeds of a request; none where the server is to draw one.

    Raises:
        TypeError: one is no whole number.
        ValueError: both were given, or an empty list, or one that does not fit 63 bits.
    """
    if seed is not None and seeds is not None:
        raise ValueError("give seed for one picture or seeds for several, not both")
    if seeds is not None and not len(seeds):
        raise ValueError("seeds is empty; give at least one")
    given = seeds if seeds is not None else () if seed is None else (seed,)
    for one in given:
        _seed(whole(one, "seed"))
    return tuple(whole(one, "seed") for one in given)


def _references(references: Mapping[str, Reference]) -> Mapping[str, Reference]:
    if not isinstance(references, Mapping) or not all(isinstance(r, Reference) for r in references.values()):
        raise TypeError('references are named: references={"other": reference("a blue ring")}')
    return dict(references)


def _edits(steer: Sequence[Edit]) -> tuple[Edit, ...]:
    edits = tuple(steer) if isinstance(steer, Iterable) else (steer,)
    if not isinstance(steer, Iterable) or not all(isinstance(edit, Edit) for edit in edits):
        raise TypeError(f'steer is {steer!r}; give a list of edits: steer=[add("up.0.1/202", 8)]')
    return edits


def _regions(regions: Regions) -> tuple[tuple[Mask, str], ...]:
    found = []
    for region in regions if isinstance(regions, Iterable) else (regions,):
        if not (isinstance(region, tuple) and len(region) == 2 and isinstance(region[0], Mask)):
            raise TypeError('regions are masks with phrases: regions=[(box(0, 0, 0.5, 1), "a red ring")]')
        found.append((region[0], text(region[1], "a region's phrase")))
    return tuple(found)


def _wanted(
    features: Selection, only: Only, float32: bool, argument: str
) -> tuple[tuple[str, ...] | None, tuple[FeatureRef, ...]]:
    """SAEs whose features come back, empty for all and None for none, and the features that alone do.

    Raises:
        ValueError: `only` or `float32` says more of features that are not asked for, or a list is empty, which on the
            wire would mean all.
    """
    refs = () if only is None else tuple(to_refs(only))
    if only is not None and not refs:
        raise ValueError("only is empty and would select nothing; leave it out for every feature")
    if features is None and refs:
        features = list(dict.fromkeys(ref.sae for ref in refs))
    if features is None or features is False:
        if refs or float32:
            raise ValueError("only and float32 are about the features that come back; ask for features too")
        return None, ()
    saes = [features] if isinstance(features, str) else [] if features is True else list(features)
    if features is not True and not saes:
        otherwise = "leave it out for none, or pass True for all" if argument == "features" else "leave it out for all"
        raise ValueError(f"{argument} is empty and would select nothing; {otherwise}")
    return tuple(saes), refs


def _per_sae(name: str, given: PerSae) -> dict[str, int]:
    """A number for each SAE that is named.

    Raises:
        TypeError: it is not a mapping, or not of whole numbers.
    """
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f'{name} is {given!r}; say of which SAE: {name}={{"up.0.1": {given!r}}}')
    return {sae: whole(number, f"{name} of {sae}") for sae, number in (given or {}).items()}
