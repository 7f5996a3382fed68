"""`turbolens generate` and `turbolens extract`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import tyro
from tyro.conf import Positional

import turbolens as tl
from turbolens._files import write_whole
from turbolens._results import encoder_of, format_of
from turbolens.cli.server import Calls, numbers, pairs, rows_of

_MAKE: Final[Mapping[str, Callable[..., tl.Edit]]] = {"add": tl.add, "set": tl.set_to, "replace": tl.replace}
# One value a flag: a flag that takes many would swallow the prompt after it, and given twice would forget the first.
Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OfARun(Calls):
    prompt: Positional[str]
    """What to draw."""
    also: Repeated = ()
    """Another prompt, drawn at the same seeds by the same settings; may be repeated."""
    seed: int | None = None
    """Seed; left out: the server draws one and says which."""
    seeds: str | None = None
    """Several seeds, such as 7,8 or 10-19."""
    image: Path | None = None
    """PNG, JPEG or WebP to start from, in place of noise, of a size that is served."""
    strength: float | None = None
    """With --image: how much of the way from noise is walked, the last steps alone; 1 keeps little of the image."""
    steps: int | None = None
    """Denoising steps; left out: the server's default."""
    guidance_scale: float = 0.0
    """Guidance, for models made for it, such as 5 with 25 steps; 0: none."""
    guidance_rescale: float = 0.0
    """How far guided predictions are brought back to the spread that they have without, 0 to 1."""
    negative_prompt: str | None = None
    """What guidance leads away from; left out: nothing."""
    timesteps: str | None = None
    """The steps' own timesteps, falling, such as 399 or 999,749,499,249, for models distilled for certain ones."""
    region: Repeated = ()
    """LEFT,TOP,RIGHT,BOTTOM=PHRASE: a box, in fractions of the picture, where a phrase is heard beside the prompt; may
    be repeated."""
    gate: bool = False
    """Hear the prompt through the server's learned region gates."""
    add: Repeated = ()
    """Edit BLOCK/INDEX=STRENGTH, such as up.0.1/202=8, in the unit, or one for each step: 8,4,0; may be
    repeated."""
    scale: Repeated = ()
    """Edit BLOCK/INDEX=FACTOR; 0 removes the feature; may be repeated."""
    set: Repeated = ()
    """Edit BLOCK/INDEX=VALUE, in the unit; may be repeated."""
    replace: Repeated = ()
    """Edit BLOCK/INDEX=STRENGTH, in the unit, in place of all that the block would have written; may be repeated."""
    patch: Repeated = ()
    """Edit BLOCK=REFERENCE: what the block writes in a reference, in place of its own; may be repeated."""
    transfer: Repeated = ()
    """Edit BLOCK/INDEX=REFERENCE: the feature fires as it does in a reference. N=REFERENCE: the server chooses N
    features to give and N to take. May be repeated."""
    reference: Repeated = ()
    """NAME=PROMPT: another run for patch and transfer to read, of the picture's seed; may be repeated."""
    reference_seed: Repeated = ()
    """NAME=SEED: of a reference that has a seed of its own; may be repeated."""
    multiplier: float = 1.0
    """Of the activations that transfer takes."""
    unit: Literal["mean", "raw", "norm"] = "mean"
    """What 1 is in add, set and replace: the feature's mean, an activation of 1, or the block's update norm."""
    mask: str | None = None
    """Box LEFT,TOP,RIGHT,BOTTOM in fractions of the picture, where these edits act."""
    where: str | None = None
    """BLOCK/INDEX=STRENGTH: these edits act where that feature of their block is above so many of its means."""
    edit_steps: str | None = None
    """START,END: these edits act from step START, counted from 0, up to and not including END; left out: always."""
    side: Literal["cond", "contrast", "both"] = "cond"
    """With guidance: these edits move the prediction with the prompt, both in contrast, or both alike."""
    edits_file: Annotated[Path | None, tyro.conf.arg(name="edits")] = None
    """JSON that `tl.edits_to_json` made, for weights, polygons and all else; comes before the edits named here."""
    k: Repeated = ()
    """SAE=K: so many features active at a position, where the SAE allows it; may be repeated."""
    prefix: Repeated = ()
    """SAE=PREFIX: only so many first features exist, where the SAE allows it; may be repeated."""

    def prompts(self) -> str | list[str]:
        """What to draw, as both calls take it."""
        return [self.prompt, *self.also] if self.also else self.prompt

    def own(self, file: Path, result: tl.Picture | tl.Extraction) -> Path:
        """A result's own file: of several prompts and seeds, the prompt's number and the seed after the name."""
        number = f"-{result.prompt_index + 1}" if self.also else ""
        return file.with_stem(f"{file.stem}{number}{f'-{result.seed}' if self.seeds else ''}")

    def told(self, result: tl.Picture | tl.Extraction) -> dict[str, Any]:
        """Which of the results it is."""
        return ({"prompt": result.prompt} if self.also else {}) | {"seed": result.seed}

    def edits(self) -> list[tl.Edit]:
        """The edits, in the order of the file, then add, scale, set, replace, patch, transfer."""
        made = [] if self.edits_file is None else _edits_of(self.edits_file)
        mask = None if self.mask is None else _box(self.mask)
        where = None
        if self.where is not None:
            ((name, above),) = pairs("where", (self.where,), "BLOCK/INDEX=STRENGTH")
            where = tl.where(name, above=float(above))
        when = None if self.edit_steps is None else _range(self.edit_steps)
        acts: dict[str, Any] = {"mask": mask, "steps": when, "where": where, "side": self.side}
        for kind, texts in (("add", self.add), ("scale", self.scale), ("set", self.set), ("replace", self.replace)):
            for text in texts:
                name, equals, amount = text.partition("=")
                if not equals:
                    raise ValueError(f"{text}: write BLOCK/INDEX=NUMBER, such as up.0.1/202=8")
                each = [float(one) for one in amount.split(",")]
                said = each if len(each) > 1 else each[0]
                if kind == "scale":
                    made.append(tl.scale(name, said, **acts))
                else:
                    made.append(_MAKE[kind](name, said, unit=self.unit, **acts))
        for block, reference in pairs("patch", self.patch, "BLOCK=REFERENCE"):
            made.append(tl.patch(block, reference, **acts))
        for name, reference in pairs("transfer", self.transfer, "BLOCK/INDEX=REFERENCE"):
            what = tl.choose(int(name)) if name.isdecimal() else name
            made.append(tl.transfer(what, reference, multiplier=self.multiplier, **acts))
        return made

    def options(self) -> dict[str, Any]:
        """What both calls take beside the prompt."""
        seeds = numbers("reference-seed", self.reference_seed, "NAME")
        prompts = dict(pairs("reference", self.reference, "NAME=PROMPT"))
        if unknown := seeds.keys() - prompts.keys():
            raise ValueError(f"--reference-seed {unknown.pop()}: no --reference has this name")
        return {
            "seed": self.seed,
            "seeds": None if self.seeds is None else _seeds(self.seeds),
            "image": self.image,
            "strength": self.strength,
            "steps": self.steps,
            "timesteps": () if self.timesteps is None else _timesteps(self.timesteps),
            "guidance_scale": self.guidance_scale,
            "guidance_rescale": self.guidance_rescale,
            "negative_prompt": self.negative_prompt,
            "steer": self.edits(),
            "references": {name: tl.reference(text, seed=seeds.get(name)) for name, text in prompts.items()},
            "regions": [
                (_box(edges, "region"), phrase) for edges, phrase in pairs("region", self.region, "BOX=PHRASE")
            ],
            "gate": self.gate,
            "k": numbers("k", self.k, "SAE"),
            "prefix": numbers("prefix", self.prefix, "SAE"),
        }


def _edits_of(file: Path) -> list[tl.Edit]:
    try:
        return tl.edits_from_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--edits {file}: {error}") from None


def _seeds(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not (last.isdecimal() and int(first) <= int(last))):
            raise ValueError(f"--seeds {text}: write numbers and ranges, such as 7,8 or 10-19")
        found += range(int(first), int(last or first) + 1)
    return found


def _timesteps(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"--timesteps {text}: write numbers, such as 399 or 999,749,499,249")
    return [int(part) for part in parts]


def _box(text: str, flag: str = "mask") -> tl.Mask:
    corners = [float(part) for part in text.split(",")]
    if len(corners) != 4:
        raise ValueError(f"--{flag} {text}: write LEFT,TOP,RIGHT,BOTTOM, such as 0,0,0.5,1")
    return tl.box(*corners)


def _range(text: str) -> tuple[int, int]:
    start, _, end = text.partition(",")
    if not start.isdecimal() or not end.isdecimal():
        raise ValueError(f"--edit-steps {text}: write START,END, such as 0,1 for the first step")
    return int(start), int(end)


def _tell(warnings: Sequence[tl.Warning]) -> None:
    for warning in warnings:
        print(f"note: {warning.message}", file=sys.stderr)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(_OfARun):
    """Make a picture, or several.

    Example: turbolens generate "a big red star on the left, night background" --seed 7 --add up.0.1/202=8
    """

    out: Path = Path("picture.png")
    """File to write; its ending says the format: .png, .jpg and .webp come so from the server, others are made here.
    Of several seeds each file has its own after the name: picture-7.png; of several prompts, their numbers from 1:
    picture-2-7.png. A PNG says how it was made: see `turbolens provenance`."""

    manifest: bool = False
    """Write beside each picture a file that says how it was made, for `turbolens replay`: picture.json. A PNG that is
    kept needs none."""

    def run(self) -> None:
        if (shape := format_of(self.out)) is None:  # refused before a picture is made for nothing
            encoder_of(self.out.suffix.lower())
        if not self.out.parent.is_dir():
            raise FileNotFoundError(f"--out {self.out}: no such folder")
        with self.connect() as lens:
            made = lens.generate(self.prompts(), **self.options(), format=shape or "png")
        pictures = made if isinstance(made, tl.Pictures) else [made]
        files = [self.own(self.out, picture) for picture in pictures]
        for picture, file in zip(pictures, files, strict=True):
            picture.save(file)
            if self.manifest:
                write_whole(file.with_suffix(".json"), tl.manifest(picture).to_json())
        _tell(pictures[0].warnings)
        self.show(
            [{"file": str(file), **self.told(picture)} for picture, file in zip(pictures, files, strict=True)],
            "\n".join(
                f"{file}  seed {picture.seed}{f'  {picture.prompt}' if self.also else ''}"
                for picture, file in zip(pictures, files, strict=True)
            ),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extract(_OfARun):
    """Show the strongest features behind a picture, or several.

    Example: turbolens extract "a big red star on the left, night background" --seed 7 --top 5
    """

    top: int = 10
    """Features of each SAE."""
    sae: Repeated = ()
    """Only this SAE; may be repeated; left out: all."""

    manifest: Path | None = None
    """File to write that says how the features were made, for `turbolens replay`; of several prompts or seeds, each has
    its own, as pictures have."""

    def run(self) -> None:
        with self.connect() as lens:
            found = lens.extract(self.prompts(), **self.options(), saes=self.sae or None)
        every = found if isinstance(found, list) else [found]
        _tell(every[0].warnings)
        if self.manifest is not None:
            for one in every:
                write_whole(self.own(self.manifest, one), tl.manifest(one).to_json())
        told = [
            {**self.told(one), "features": {sae: rows_of(block.top(self.top)) for sae, block in one.items()}}
            for one in every
        ]
        tables = [
            f"\n{sae}  (seed {one.seed}{f', {one.prompt}' if self.also else ''})\n{block.top(self.top)}"
            for one in every
            for sae, block in one.items()
        ]
        self.show(told if isinstance(found, list) else told[0], "\n".join(tables))
