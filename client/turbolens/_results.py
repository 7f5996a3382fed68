"""What calls return."""

from __future__ import annotations

import builtins
import dataclasses
import html
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import numpy.typing as npt

from turbolens._blocks import BlockFeatures, LabelsOf, RunFeatures
from turbolens._files import write_whole
from turbolens._png import with_text
from turbolens._provenance import PNG_KEYWORD, Chosen, Provenance
from turbolens._run import FORMATS, ImageFormat, Run
from turbolens_proto.v1 import feature_service_pb2, generation_service_pb2, run_pb2

if TYPE_CHECKING:
    from PIL import Image

PNG_PICTURE: Final = "turbolens-picture"
"""Of the text in a PNG that says which of the run's pictures it is, and how it was coded."""
FileFormat = Literal["png", "jpeg", "webp"]


_ENDINGS: Final[dict[str, FileFormat]] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


def format_of(path: Path) -> FileFormat | None:
    """The format that a file's ending names, of those that a server codes; None: another."""
    return _ENDINGS.get(path.suffix.lower())


def encoder_of(suffix: str) -> str:
    """The format of a file's ending, as PIL calls it.

    Raises:
        ValueError: it is of no format that pictures can be written in.
    """
    from PIL import Image

    name = Image.registered_extensions().get(suffix)
    if name is None or name not in Image.SAVE:
        raise ValueError(f"{suffix or 'no ending'} is no format of pictures; use .png, .jpg or .webp")
    return name


@dataclasses.dataclass(frozen=True, slots=True)
class Warning:
    """Something to know about a result that was not an error."""

    code: str
    message: str


class Coded:
    """A coded picture."""

    def __init__(self, message: run_pb2.Image) -> None:
        self._message = message

    @property
    def bytes(self) -> builtins.bytes:
        """The bytes as the server coded them."""
        return self._message.data

    @property
    def image(self) -> Image.Image:
        """The picture as a PIL image."""
        from PIL import Image

        size = (self._message.width, self._message.height)
        if self._message.format == run_pb2.IMAGE_FORMAT_RAW:
            return Image.frombytes("RGB", size, self._message.data)
        return Image.open(io.BytesIO(self._message.data)).convert("RGB")

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """The picture as uint8 [height, width, 3]."""
        return np.asarray(self.image)

    def save(self, path: str | Path) -> None:
        """Write the picture: the server's own bytes where the file's ending is their format, else coded anew.

        Raises:
            ValueError: the ending is of no format of pictures.
            OSError: it cannot be written; a file that was there stays as it was.
        """
        path = Path(path)
        write_whole(path, self.coded_as(path.suffix.lower()))

    def coded_as(self, suffix: str) -> builtins.bytes:
        """The picture in the format of a file's ending."""
        if suffix in _ENDINGS and FORMATS[_ENDINGS[suffix]] == self._message.format:
            return self._message.data
        file = io.BytesIO()
        self.image.save(file, encoder_of(suffix))
        return file.getvalue()

    def _repr_png_(self) -> builtins.bytes:
        return Coded.coded_as(self, ".png")


class Picture(Coded):
    """One picture, and what was asked for beside it."""

    def __init__(
        self,
        message: generation_service_pb2.Generation,
        run: Run,
        provenance: Provenance | None,
        warnings: tuple[Warning, ...],
        labels_of: LabelsOf,
        quality: int | None = None,
    ) -> None:
        super().__init__(message.image)
        self.prompt_index = message.prompt_index
        """Position of its prompt in the call's; 0 where that had one."""
        self.prompt = run.prompts[message.prompt_index]
        self.seed = message.seed
        self.provenance = provenance
        """Everything needed to make it again; None in a stream, whose `Done` event has it."""
        self.warnings = warnings
        self.features = RunFeatures(message.seed, message.features, labels_of)
        """By SAE; empty where none were asked for."""
        self.quality = quality
        """Of the coding, as asked for; None: the server's default."""
        self.batch_size = message.batch_size
        """Pictures that the server ran together with it, itself included."""
        self._latents = message.latents if message.HasField("latents") else None

    @property
    def chosen(self) -> tuple[Chosen, ...]:
        """What the server chose for it, where an edit left it the choice; of a stream, its `Done` event knows."""
        return () if self.provenance is None else self.provenance.chosen_for(self.seed, self.prompt_index)

    @property
    def format(self) -> ImageFormat:
        """How the server coded it."""
        return next(name for name, value in FORMATS.items() if value == self._message.format)

    @property
    def latents(self) -> npt.NDArray[np.float32] | None:
        """The final latent, float32 [channels, height, width]; None where it was not asked for."""
        if self._latents is None:
            return None
        return np.frombuffer(self._latents.data, "<f4").reshape(tuple(self._latents.shape)).astype(np.float32)

    def save(self, path: str | Path) -> None:
        """Write the picture, as :meth:`Coded.save` does; a PNG says how it was made: :meth:`Provenance.from_png`.

        Of a stream, no picture knows that.
        """
        super().save(path)

    def coded_as(self, suffix: str) -> builtins.bytes:
        coded = super().coded_as(suffix)
        told = self.provenance if _ENDINGS.get(suffix) == "png" else None
        if told is None:
            return coded
        about = {"seed": str(self.seed), "prompt": self.prompt_index, "format": self.format, "quality": self.quality}
        return with_text(with_text(coded, PNG_KEYWORD, told.to_json()), PNG_PICTURE, json.dumps(about))

    def __repr__(self) -> str:
        size = f"{self._message.width}x{self._message.height}"
        return f"Picture({self.prompt!r}, seed={self.seed}, {size}, features={list(self.features)})"


class Pictures(list[Picture]):
    """Pictures of several prompts or seeds; notebooks show them side by side."""

    def _repr_html_(self) -> str:
        import base64

        def tag(picture: Picture) -> str:
            data = base64.b64encode(picture._repr_png_()).decode()
            return (
                f'<img src="data:image/png;base64,{data}" title="{html.escape(picture.prompt)}, seed {picture.seed}">'
            )

        return "".join(map(tag, self))


class Extraction(RunFeatures):
    """The features of one run: `extraction["down.2.1"].top(10)`."""

    def __init__(
        self,
        message: feature_service_pb2.Extraction,
        run: Run,
        provenance: Provenance,
        warnings: tuple[Warning, ...],
        labels_of: LabelsOf,
    ) -> None:
        super().__init__(message.seed, message.features, labels_of)
        self.prompt_index = message.prompt_index
        """Position of its prompt in the call's; 0 where that had one."""
        self.prompt = run.prompts[message.prompt_index]
        self.provenance = provenance
        self.warnings = warnings
        self.batch_size = message.batch_size
        """Runs that the server ran together with it, itself included."""

    @property
    def chosen(self) -> tuple[Chosen, ...]:
        """What the server chose for it, where an edit left it the choice."""
        return self.provenance.chosen_for(self.seed, self.prompt_index)


@dataclasses.dataclass(frozen=True, slots=True)
class Queued:
    """The request waits."""

    request_id: str
    position: int
    """Requests ahead of it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """A denoising step of one picture ended."""

    seed_index: int
    """Position of the picture: of its seed, or of several prompts, prompt by prompt."""
    step: int
    steps: int
    preview: Coded | None


@dataclasses.dataclass(frozen=True, slots=True)
class Features:
    """Features of one SAE at one step of one picture."""

    seed_index: int
    seed: int
    block: BlockFeatures


@dataclasses.dataclass(frozen=True, slots=True)
class PictureReady:
    """A picture is ready."""

    seed_index: int
    picture: Picture


@dataclasses.dataclass(frozen=True, slots=True)
class Done:
    """The run ended well."""

    provenance: Provenance
    warnings: tuple[Warning, ...]


Event = Queued | Step | Features | PictureReady | Done


def warnings_of(messages: Any) -> tuple[Warning, ...]:
    """Warnings from their messages."""
    return tuple(Warning(message.code, message.message) for message in messages)


def event_of(
    message: generation_service_pb2.StreamGenerateResponse | feature_service_pb2.StreamFeaturesResponse,
    run: Run,
    labels_of: LabelsOf,
) -> Event:
    """A stream's message as an event."""
    kind = message.WhichOneof("event")
    if kind is None:
        raise ValueError("the server sent an event that this client does not know; update the client")
    inner: Any = getattr(message, kind)
    if kind == "queued":
        return Queued(inner.request_id, inner.position)
    if kind == "step":
        preview = Coded(inner.preview) if inner.HasField("preview") else None
        return Step(inner.seed_index, inner.step, inner.steps, preview)
    if kind == "features":
        sae = inner.features.sae
        return Features(inner.seed_index, inner.seed, BlockFeatures([inner.features], labels_of(sae)))
    if kind == "picture":
        return PictureReady(inner.seed_index, Picture(inner.generation, run, None, (), labels_of))
    return Done(Provenance.from_proto(inner.provenance), warnings_of(inner.warnings))
