"""Pictures side by side, each with what it is."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from turbolens._start import HasImage

if TYPE_CHECKING:
    from PIL import Image


class Gallery(Sequence["Image.Image"]):
    """Pictures with captions, side by side in a notebook; made by :func:`gallery`."""

    def __init__(self, pictures: Sequence[Image.Image], captions: Sequence[str]) -> None:
        self.pictures = tuple(pictures)
        self.captions = tuple(captions)

    def __getitem__(self, at: Any) -> Any:
        return self.pictures[at]

    def __iter__(self) -> Iterator[Image.Image]:
        return iter(self.pictures)

    def __len__(self) -> int:
        return len(self.pictures)

    def __repr__(self) -> str:
        return f"Gallery({list(self.captions)})"

    def _repr_html_(self) -> str:
        figures = []
        for picture, caption in zip(self.pictures, self.captions, strict=True):
            file = io.BytesIO()
            picture.save(file, "PNG")
            data = base64.b64encode(file.getvalue()).decode()
            figures.append(
                f'<figure style="display:inline-block;margin:4px;vertical-align:top;max-width:{picture.width}px">'
                f'<img src="data:image/png;base64,{data}"><figcaption>{html.escape(caption)}</figcaption></figure>'
            )
        return "".join(figures)


def gallery(pictures: Sequence[Any], captions: Sequence[str] | None = None) -> Gallery:
    """Any pictures side by side.

    Args:
        pictures: of ours, PIL's, or arrays uint8 [height, width, 3].
        captions: one each; None: the seeds of pictures that have one, numbers of the others.

    Raises:
        ValueError: there are more or fewer captions than pictures.
    """
    from PIL import Image

    if captions is None:
        captions = [f"seed {p.seed}" if hasattr(p, "seed") else str(i) for i, p in enumerate(pictures)]
    if len(captions) != len(pictures):
        raise ValueError(f"{len(captions)} captions for {len(pictures)} pictures")
    images = [
        p.image if isinstance(p, HasImage) else p if isinstance(p, Image.Image) else Image.fromarray(np.asarray(p))
        for p in pictures
    ]
    return Gallery(images, captions)
