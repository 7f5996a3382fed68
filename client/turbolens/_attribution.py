"""What made a feature fire: words, positions and heads, as table and picture."""

from __future__ import annotations

import dataclasses
import html
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from turbolens._edits import FeatureRef, Mask
from turbolens._heatmap import colorize
from turbolens._regions import on_grid
from turbolens._table import Table, card, to_pandas
from turbolens_proto.v1 import feature_service_pb2, run_pb2

if TYPE_CHECKING:
    import pandas
    from PIL import Image

    from turbolens._provenance import Provenance
    from turbolens._results import Warning

Position = tuple[int, int]
"""(row, column) of the grid, from the top left."""
Floats = npt.NDArray[np.float32]
_END: Final = "</w>"
_CELL: Final = 12
"""Pixels of a cell of a heat-map in a picture."""
_ROW: Final = 20
_COLOURS: Final = ("#286ebe", "#c8463c")
"""Of bars for and against."""


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """What a feature's pre-activation owes to one source."""

    name: str
    """The word, or "(row, column)" of a position. "<start>" is the marker before a text, "<end>" that after it with
    the padding."""
    contribution: float
    """To the pre-activation, mean over the positions looked at; negative where it spoke against the feature."""
    share: float
    """Of all that spoke for it, 0 to 1; 0 where it spoke against it."""
    places: tuple[int, ...]
    """Which columns of `by_source` these are: a word can be of several tokens."""


class Attribution:
    """A feature's pre-activation in one run as a sum, exactly: at position p,
    `pre[p] = bias + by_source[p].sum() = bias + by_head[p].sum()`.

    The attention pattern is held, and values count from the SAE's b_dec: a source that says what sources say on average
    contributes nothing. Which features of a TopK are then selected depends on the others, so a high sum is no promise
    that the feature is active.
    """

    def __init__(
        self,
        message: feature_service_pb2.AttributeFeatureResponse,
        feature: FeatureRef,
        prompt: str,
        provenance: Provenance,
        warnings: tuple[Warning, ...],
    ) -> None:
        self.feature, self.prompt, self.seed, self.step = feature, prompt, message.seed, message.step
        self.provenance, self.warnings = provenance, warnings
        self.height, self.width = message.height, message.width
        self.tokens = tuple(message.tokens)
        """Of a cross-attention, as the model hears them; empty where the sources are positions of the grid."""
        self.bias = message.bias
        """b_enc of the feature, the same everywhere."""
        self.pre = _array(message.pre)
        """[height, width] pre-activation."""
        self.activation = _array(message.activation)
        """[height, width] activation, after selection."""
        self.by_source = _array(message.by_source)
        """[height * width, sources] contribution of each token, or of each position of the grid."""
        self.by_head = _array(message.by_head)
        """[height * width, heads]."""

    def sources(self, *, at: Position | None = None, region: Mask | None = None) -> Table:
        """Words, or positions of a self-attention, by their contribution, the largest first.

        Args:
            at: at this position of the grid alone.
            region: mean over a mask. Without both: over the positions where the feature is active, or everywhere where
                it is nowhere.

        Raises:
            IndexError: `at` is not on the grid.
            ValueError: both were given, or the mask covers nothing of the grid.
        """
        mean = self.weights(at, region) @ self.by_source
        merged = [(name, places, float(mean[list(places)].sum())) for name, places in self._named()]
        spoke_for = sum(max(value, 0.0) for *_, value in merged)
        rows = [
            Source(name, value, max(value, 0.0) / spoke_for if spoke_for else 0.0, places)
            for name, places, value in sorted(merged, key=lambda one: -one[2])
        ]
        return Table(rows, ("name", "contribution", "share"))

    def heads(self, *, at: Position | None = None, region: Mask | None = None) -> Floats:
        """Contribution of each head, [heads], over the same positions as of :meth:`sources`."""
        mean: Floats = self.weights(at, region) @ self.by_head
        return mean

    def map(self, source: str | Source) -> Floats:
        """Contribution of a source at each position, [height, width]; of a word by its name, all that it stands for.

        Raises:
            KeyError: there is no such source.
        """
        if isinstance(source, Source):
            places = source.places
        else:
            places = tuple(place for name, found in self._named() for place in found if name == source)
        if not places:
            raise KeyError(f"no source {source!r}; there are {', '.join(dict.fromkeys(n for n, _ in self._named()))}")
        summed: Floats = self.by_source[:, list(places)].sum(1).reshape(self.height, self.width)
        return summed

    def to_pandas(self) -> pandas.DataFrame:
        """A row for each position and source: y, x, source, name, contribution; needs pandas."""
        count = self.by_source.shape[1]
        names = [""] * count
        for name, places in self._named():
            for place in places:
                names[place] = name
        cells = np.repeat(np.arange(len(self.by_source)), count)
        columns: dict[str, Any] = {"y": cells // self.width, "x": cells % self.width}
        columns |= {"source": np.tile(np.arange(count), len(self.by_source)), "name": names * len(self.by_source)}
        return to_pandas(columns | {"contribution": self.by_source.ravel()})

    def image(self, *, n: int = 8, at: Position | None = None, region: Mask | None = None) -> Image.Image:
        """The first `n` sources as rows: name, a bar (blue for, red against) and where it contributes."""
        from PIL import Image, ImageDraw, ImageFont

        every = self.sources(at=at, region=region)
        rows = [*every[:n], *(row for row in every[n:] if row is every[-1] and row.contribution < 0)]
        most = max([abs(row.contribution) for row in rows], default=0.0) or 1.0
        scale = max([float(self.map(row).max()) for row in rows], default=0.0) or 1.0
        tall = max(_ROW, self.height * _CELL // 2 + 4)
        size = (360 + self.width * _CELL // 2, tall * len(rows) + _ROW + 8)
        sheet = Image.new("RGB", size, "white")
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
        title = f"{self.feature}, step {self.step}: pre-activation {self.weights(at, region) @ self.pre.ravel():.3g}"
        draw.text((6, 4), title, "black", font)
        for i, row in enumerate(rows):
            top = _ROW + 6 + i * tall
            draw.text((6, top + tall // 2 - 9), row.name[:14], "black", font)
            length = round(160 * abs(row.contribution) / most)
            draw.rectangle(
                (110, top + tall // 2 - 7, 110 + length, top + tall // 2 + 7),
                fill=_COLOURS[row.contribution < 0],
            )
            draw.text((116 + length, top + tall // 2 - 9), f"{row.contribution:+.3g}", "black", font)
            heat = Image.fromarray(colorize(np.clip(self.map(row) / scale, 0, 1)))
            heat = heat.resize((self.width * _CELL // 2, self.height * _CELL // 2), Image.Resampling.NEAREST)
            sheet.paste(heat, (352, top))
        return sheet

    def __repr__(self) -> str:
        best = ", ".join(f"{row.name} {row.share:.0%}" for row in self.sources()[:3] if row.share)
        return f"Attribution({self.feature}, step {self.step}, seed {self.seed}: {best or 'nothing spoke for it'})"

    def _repr_html_(self) -> str:
        rows = {
            "prompt": self.prompt,
            "step, seed": f"{self.step}, {self.seed}",
            "active": f"at {int((self.activation > 0).sum())} of {self.activation.size} positions",
            "heads": ", ".join(f"{value:+.3g}" for value in self.heads()),
        }
        most = max((abs(row.contribution) for row in self.sources()), default=0.0) or 1.0
        bars = "".join(
            f"<tr><td>{html.escape(row.name)}</td><td>{row.contribution:+.3g}</td><td><div style='height:10px;"
            f"width:{120 * abs(row.contribution) / most:.0f}px;background:{_COLOURS[row.contribution < 0]}'>"
            "</div></td></tr>"
            for row in self.sources()[:12]
        )
        return card(str(self.feature), rows, f"<table>{bars}</table>")

    def _named(self) -> list[tuple[str, tuple[int, ...]]]:
        """Every source by its name, with its columns: the tokens of a word together, and those of the padding."""
        if not self.tokens:
            return [(f"({i // self.width}, {i % self.width})", (i,)) for i in range(self.by_source.shape[1])]
        found: list[tuple[str, tuple[int, ...]]] = []
        word, ended = "", False
        places: list[int] = []
        for place, token in enumerate(self.tokens):
            if token == self.tokens[0] and place and ended:
                ended = False  # another text begins: a region's phrase
            if token == self.tokens[0] and not ended:
                found.append(("<start>", (place,)))
            elif ended or token.startswith("<|"):
                if not ended:
                    found.append(("<end>", ()))
                ended = True
                found[-1] = (found[-1][0], (*found[-1][1], place))
            else:
                word, places = word + token.removesuffix(_END), [*places, place]
                if token.endswith(_END):
                    found.append((word, tuple(places)))
                    word, places = "", []
        return found

    def weights(self, at: Position | None = None, region: Mask | None = None) -> Floats:
        """Weight of each position, [height * width], summing to 1; arguments and errors as of :meth:`sources`."""
        if at is not None and region is not None:
            raise ValueError("give at or region, and not both")
        weights = (self.activation > 0).astype(np.float32).ravel()
        if at is not None:
            row, column = at
            if not (0 <= row < self.height and 0 <= column < self.width):
                told = f"the grid has rows 0 to {self.height - 1} and columns 0 to {self.width - 1}"
                raise IndexError(f"{told}, not {at}")
            weights = np.zeros_like(weights)
            weights[row * self.width + column] = 1
        elif region is not None:
            weights = on_grid(region, self.height, self.width).astype(np.float32).ravel()
            if not weights.any():
                raise ValueError("the region covers nothing of the grid")
        elif not weights.any():
            weights += 1
        normal: Floats = weights / weights.sum()
        return normal


def _array(message: run_pb2.Tensor) -> Floats:
    return np.frombuffer(message.data, "<f4").reshape(tuple(message.shape)).astype(np.float32)
