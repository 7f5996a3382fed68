"""What goes into the engine and what comes out: plain values, no protobuf and no tensors that outlive a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from turbolens_server.steering.choice import Chosen
from turbolens_server.steering.edits import Edit
from turbolens_server.steering.masks import Mask
from turbolens_server.unet.points import hears_text

MAX_REGIONS: Final = 8
"""Of a run; each lengthens the text by as much as a prompt."""
_HEADS: Final = 32
"""Of an attention layer, about at most."""


@dataclasses.dataclass(frozen=True, slots=True)
class SaeOptions:
    """How a job reads one SAE, where it leaves a choice; for wanted features and for edits that need activations."""

    sae: str
    k: int | None = None
    """None: the SAE's own."""
    prefix: int | None = None
    """Only so many first features exist; None: all."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Start:
    """What a walk starts from in place of noise of its seed's."""

    kind: Literal["picture", "latents", "noise"]
    """Pixels or latents of a picture, to be noised; or the first noise itself."""
    values: npt.NDArray[np.uint8] | npt.NDArray[np.float32]
    """[height, width, 3] of a picture; else [channels, height / 8, width / 8] (by the VAE's factor)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Reference:
    """A run beside a job's own, step by step, that its edits may read."""

    name: str
    prompt: str
    seed: int
    start: Start | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Guidance:
    """Classifier-free guidance: each prediction is led away from one that hears another text, or none."""

    scale: float
    """Above 1."""
    rescale: float = 0.0
    """How far it is brought back to the spread of the prediction with the prompt, 0 to 1."""
    negative_prompt: str | None = None
    """What it is led away from; None: nothing, as the model hears it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Region:
    """A phrase that a picture hears under a mask, beside its prompt."""

    mask: Mask
    prompt: str


@dataclasses.dataclass(frozen=True, slots=True)
class Attribute:
    """Which feature of an SAE at z to attribute, and at which step."""

    sae: str
    index: int
    step: int


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One picture to make: a prompt, a seed, and what to do and return on the way.

    A row of a batch is a *lane*: what the U-Net hears and sees of one walk from noise to latents. A job is a walk for
    its picture and one for each reference, each of one lane, or with guidance of two; they share a batch and never
    part, so an edit finds what it reads in the same pass.
    """

    prompt: str
    seed: int
    steps: int
    height: int
    width: int
    edits: tuple[Edit, ...] = ()
    saes: tuple[str, ...] = ()
    """SAEs whose features are wanted."""
    sae_options: tuple[SaeOptions, ...] = ()
    """Of the SAEs that are not read at their own k and whole; each at most once."""
    picture: bool = True
    """Decode the picture; False where only features are wanted."""
    previews: bool = False
    """Decode the estimate of the clean latent at every step but the last."""
    timesteps: tuple[int, ...] = ()
    """Those of its steps and of the skipped ones, falling; empty: as the sampler chooses them."""
    references: tuple[Reference, ...] = ()
    """Unsteered runs that its edits read, by distinct names."""
    start: Start | None = None
    """None: noise."""
    skipped: int = 0
    """Steps that come before its own, and are not taken: a walk from a picture starts where that is noised to."""
    guidance: Guidance | None = None
    """Of its picture and of its references; None: none."""
    regions: tuple[Region, ...] = ()
    """Of its picture's lane with the prompt alone."""
    attribute: Attribute | None = None
    """What to attribute, in its picture's lane with the prompt; None: nothing."""
    gate: bool = False
    """Hear the text through the learned region gates that are served, in all of its lanes."""

    @property
    def lanes(self) -> int:
        """Rows that it takes of a batch."""
        return lanes_of(len(self.references), guided=self.guidance is not None)


def lanes_of(references: int, *, guided: bool) -> int:
    """Rows of a batch that a picture with so many references takes."""
    return (1 + references) * (2 if guided else 1)


@dataclasses.dataclass(frozen=True, slots=True)
class SparseCodes:
    """The active features of one SAE at one step of one picture, in row order of the grid's positions."""

    sae: str
    step: int
    height: int
    width: int
    d_sae: int
    counts: npt.NDArray[np.uint16]
    """[height * width], entries of each position."""
    indices: npt.NDArray[np.int32]
    """[counts.sum()], features, in falling order of activation within a position."""
    values: npt.NDArray[np.float32]
    """[counts.sum()], activations, all positive."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Attribution:
    """What made a feature fire at one step, before the edits of its own hook point; see `sae/attribution.py`."""

    height: int
    """Of the grid."""
    width: int
    pre: npt.NDArray[np.float32]
    """[P] pre-activation: `bias` and the sum of the contributions."""
    activation: npt.NDArray[np.float32]
    """[P] after selection."""
    bias: float
    """b_enc of the feature, the same everywhere."""
    by_source: npt.NDArray[np.float32]
    """[P, sources], summed over heads."""
    by_head: npt.NDArray[np.float32]
    """[P, heads], summed over sources."""
    tokens: tuple[str, ...] = ()
    """The sources of a cross-attention; empty where they are the grid's positions."""


def attribution_values(point: str, positions: int, tokens: int) -> int:
    """About how many numbers an attribution holds; `tokens` of the text with its regions' phrases."""
    return positions * (_HEADS + (tokens if hears_text(point) else positions))


@dataclasses.dataclass(frozen=True, slots=True)
class StepTimes:
    """When a step of a batch ran, by `time.monotonic`."""

    started: float
    ended: float
    taps: tuple[tuple[str, float, float], ...]
    """Hook points where features were read or edited: name, start, end. On a GPU the time in which the host handed the
    work over; the GPU's own is in the step's."""


@dataclasses.dataclass(frozen=True, slots=True)
class StepDone:
    """A denoising step of job `job` ended."""

    job: int
    step: int
    steps: int
    preview: npt.NDArray[np.uint8] | None = None
    """[height, width, 3], where asked."""
    times: StepTimes | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class FeaturesReady:
    """Features of job `job` at one step and SAE."""

    job: int
    codes: SparseCodes


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """What a job came to."""

    job: int
    picture: npt.NDArray[np.uint8] | None
    """[height, width, 3]."""
    latents: npt.NDArray[np.float32]
    """[channels, height / 8, width / 8] (by the VAE's factor), the final latent before the VAE."""
    features: tuple[SparseCodes, ...]
    """In order of step, then of block."""
    tokens_cut: int
    """Tokens of the prompt past the model's limit, which did not reach it; of the negative prompt, where more."""
    batch_size: int
    """Jobs of its batch, itself included."""
    chosen: tuple[Chosen, ...] = ()
    """Features of its edits that were chosen here."""
    backend: str = ""
    """What ran the U-Net."""
    attribution: Attribution | None = None
    """Where asked."""


@dataclasses.dataclass(frozen=True, slots=True)
class NotFinite:
    """Job `job` came to values that are not finite, and ends without a result; its mates go on."""

    job: int
    part: Literal["U-Net", "VAE"]
    step: int | None = None
    """Step of the U-Net after which it showed."""
    dtype: str = ""
    """Precision of the part."""
    edited: bool = False
    """The job has edits."""

    def __str__(self) -> str:
        where = f"the {self.part}" if self.step is None else f"the {self.part} at step {self.step}"
        way_out = "another --vae, or " if self.part == "VAE" else "weaker edits, or " if self.edited else ""
        return f"{where} gave values that are not finite in {self.dtype}; try {way_out}another --dtype"


Event = StepDone | FeaturesReady | Result | NotFinite
OnEvent = Callable[[Event], None]
