"""The `turbolens` command."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import tyro
from tyro.conf import Positional

import turbolens as tl
from turbolens._results import format_of

COMMANDS: Final = "turbolens.commands"
_EXTRAS: Final = {
    "serve": "server",
    "studio": "studio",
    "engine": "server",
    "bench": "server",
    "sae": "server",
    "catalog": "training",
    "train": "training",
}
_MAKE: Final[Mapping[str, Callable[..., tl.Edit]]] = {"add": tl.add, "set": tl.set_to, "replace": tl.replace}
# One value a flag: a flag that takes many would swallow the prompt after it, and given twice would forget the first.
Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    prompt: Positional[str]
    """What to draw."""
    server: str = "localhost:50051"
    """`host:port` of a server, or `embedded` for one in this process."""
    seed: int | None = None
    """Seed; left out: the server draws one and says which."""
    steps: int | None = None
    """Denoising steps; left out: the server's default."""
    add: Repeated = ()
    """Edit BLOCK/INDEX=STRENGTH, such as up.0.1/202=8, in the unit; may be repeated."""
    scale: Repeated = ()
    """Edit BLOCK/INDEX=FACTOR; 0 removes the feature; may be repeated."""
    set: Repeated = ()
    """Edit BLOCK/INDEX=VALUE, in the unit; may be repeated."""
    replace: Repeated = ()
    """Edit BLOCK/INDEX=STRENGTH, in the unit, in place of all that the block would have written; may be repeated."""
    patch: Repeated = ()
    """Edit BLOCK=REFERENCE: what the block writes in a reference, in place of its own; may be repeated."""
    transfer: Repeated = ()
    """Edit BLOCK/INDEX=REFERENCE: the feature fires as it does in a reference; may be repeated."""
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
    edit_steps: str | None = None
    """START,END: these edits act from step START, counted from 0, up to and not including END; left out: always."""
    edits_file: Annotated[Path | None, tyro.conf.arg(name="edits")] = None
    """JSON that `tl.edits_to_json` made, for weights, polygons and all else; comes before the edits named here."""
    k: Repeated = ()
    """SAE=K: so many features active at a position, where the SAE allows it; may be repeated."""
    prefix: Repeated = ()
    """SAE=PREFIX: only so many first features exist, where the SAE allows it; may be repeated."""

    def edits(self) -> list[tl.Edit]:
        """The edits, in the order of the file, then add, scale, set, replace, patch, transfer."""
        made = [] if self.edits_file is None else _edits_of(self.edits_file)
        where = None if self.mask is None else _box(self.mask)
        when = None if self.edit_steps is None else _range(self.edit_steps)
        for kind, texts in (("add", self.add), ("scale", self.scale), ("set", self.set), ("replace", self.replace)):
            for text in texts:
                name, equals, amount = text.partition("=")
                if not equals:
                    raise ValueError(f"{text}: write BLOCK/INDEX=NUMBER, such as up.0.1/202=8")
                if kind == "scale":
                    made.append(tl.scale(name, float(amount), mask=where, steps=when))
                else:
                    made.append(_MAKE[kind](name, float(amount), unit=self.unit, mask=where, steps=when))
        for block, reference in _pairs("patch", self.patch, "BLOCK=REFERENCE"):
            made.append(tl.patch(block, reference, mask=where, steps=when))
        for name, reference in _pairs("transfer", self.transfer, "BLOCK/INDEX=REFERENCE"):
            made.append(tl.transfer(name, reference, multiplier=self.multiplier, mask=where, steps=when))
        return made

    def options(self) -> dict[str, Any]:
        """What both calls take beside the prompt."""
        seeds = _numbers("reference-seed", self.reference_seed, "NAME")
        prompts = dict(_pairs("reference", self.reference, "NAME=PROMPT"))
        if unknown := seeds.keys() - prompts.keys():
            raise ValueError(f"--reference-seed {unknown.pop()}: no --reference has this name")
        return {
            "seed": self.seed,
            "steps": self.steps,
            "steer": self.edits(),
            "references": {name: tl.reference(text, seed=seeds.get(name)) for name, text in prompts.items()},
            "k": _numbers("k", self.k, "SAE"),
            "prefix": _numbers("prefix", self.prefix, "SAE"),
        }


def _edits_of(file: Path) -> list[tl.Edit]:
    try:
        return tl.edits_from_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--edits {file}: {error}") from None


def _box(text: str) -> tl.Mask:
    corners = [float(part) for part in text.split(",")]
    if len(corners) != 4:
        raise ValueError(f"--mask {text}: write LEFT,TOP,RIGHT,BOTTOM, such as 0,0,0.5,1")
    return tl.box(*corners)


def _range(text: str) -> tuple[int, int]:
    start, _, end = text.partition(",")
    if not start.isdecimal() or not end.isdecimal():
        raise ValueError(f"--edit-steps {text}: write START,END, such as 0,1 for the first step")
    return int(start), int(end)


def _pairs(option: str, texts: Sequence[str], form: str) -> list[tuple[str, str]]:
    """The two sides of a flag that is said as NAME=VALUE."""
    pairs = [text.partition("=") for text in texts]
    for text, (name, equals, _) in zip(texts, pairs, strict=True):
        if not equals or not name:
            raise ValueError(f"--{option} {text}: write {form}")
    return [(name, value) for name, _, value in pairs]


def _numbers(option: str, texts: Sequence[str], of: str) -> dict[str, int]:
    """The numbers of a flag that is said of each SAE or reference."""
    pairs = _pairs(option, texts, f"{of}=NUMBER")
    for name, number in pairs:
        if not number.isdecimal():
            raise ValueError(f"--{option} {name}={number}: write {of}=NUMBER")
    return {name: int(number) for name, number in pairs}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(_Call):
    """Make a picture.

    Example: turbolens generate "a big red star on the left, night background" --seed 7 --add up.0.1/202=8
    """

    out: Path = Path("picture.png")
    """File to write; its ending says the format: .png, .jpg and .webp come so from the server, others are made here."""

    def run(self) -> None:
        with tl.connect(self.server) as lens:
            picture = lens.generate(self.prompt, **self.options(), format=format_of(self.out) or "png")
        picture.save(self.out)
        for warning in picture.warnings:
            print(f"note: {warning.message}", file=sys.stderr)
        print(f"{self.out}  seed {picture.seed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extract(_Call):
    """Show the strongest features behind a picture.

    Example: turbolens extract "a big red star on the left, night background" --seed 7 --top 5
    """

    top: int = 10
    """Features of each SAE."""
    sae: Repeated = ()
    """Only this SAE; may be repeated; left out: all."""
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        with tl.connect(self.server) as lens:
            found = lens.extract(self.prompt, **self.options(), saes=self.sae or None)
        if self.json:
            rows = {
                sae: [{"feature": r.feature, "mean": r.mean, "label": r.label} for r in block.top(self.top)]
                for sae, block in found.items()
            }
            print(json.dumps({"seed": found.seed, "features": rows}, indent=1))
            return
        for sae, block in found.items():
            print(f"\n{sae}  (seed {found.seed})\n{block.top(self.top)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """Find features by words.

    Example: turbolens features search blue --block up.0.1
    """

    words: Positional[str]
    """What the feature should stand for."""
    block: str | None = None
    """Only this SAE."""
    limit: int = 10
    """At most so many."""
    server: str = "localhost:50051"
    """`host:port` of a server, or `embedded`."""

    def run(self) -> None:
        with tl.connect(self.server) as lens:
            print(lens.search_features(self.words, block=self.block, limit=self.limit))


@dataclasses.dataclass(frozen=True, kw_only=True)
class List:
    """List the features of an SAE.

    Example: turbolens features list up.0.1 --filter 'attribute = "color" AND frequency > 0.01' --limit 20
    """

    sae: Positional[str]
    """The SAE's name."""
    filter: str = ""
    """Comparisons joined by AND."""
    order_by: str = "label_score desc"
    """Fields with an optional "desc"."""
    limit: int = 50
    """At most so many."""
    server: str = "localhost:50051"
    """`host:port` of a server, or `embedded`."""

    def run(self) -> None:
        rows = []
        with tl.connect(self.server) as lens:
            for feature in lens.list_features(self.sae, filter=self.filter, order_by=self.order_by):
                rows.append(feature)
                if len(rows) == self.limit:
                    break
        print(tl.Table(rows, ("ref", "label", "label_score", "frequency", "mean", "max")))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Show:
    """Show what is known of one feature.

    Example: turbolens features show up.0.1/202
    """

    feature: Positional[str]
    """BLOCK/INDEX."""
    server: str = "localhost:50051"
    """`host:port` of a server, or `embedded`."""

    def run(self) -> None:
        with tl.connect(self.server) as lens:
            feature = lens.get_feature(self.feature)
        print(tl.Table([feature], ("ref", "label", "label_score", "frequency", "mean", "max")))
        if feature.labels:
            print(f"\n{tl.Table(feature.labels, ('attribute', 'value', 'region', 'score'))}")
        if feature.examples:
            print(f"\n{tl.Table(feature.examples, ('activation', 'y', 'x', 'step', 'steps', 'seed', 'prompt'))}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doctor:
    """Look at this machine and at a server, and say what is wrong.

    Example: turbolens doctor --server localhost:50051
    """

    server: str = "localhost:50051"
    """`host:port` of a server."""

    def run(self) -> None:
        failed = False

        def line(state: str, what: str) -> None:
            print(f"{state:>5}  {what}")

        line("ok" if sys.version_info >= (3, 11) else "fail", f"Python {platform.python_version()}")
        for package in ("turbolens", "grpcio", "protobuf"):
            line("ok", f"{package} {version(package)}")
        try:
            line("ok", f"torch {version('torch')}: {_gpu()}")
        except PackageNotFoundError:
            line("warn", "no torch: this machine can call a server but not be one (pip install 'turbolens[server]')")
        except (ImportError, OSError) as error:
            failed = True
            line("fail", f"torch cannot be imported, so no server runs here; install it anew ({error})")
        try:
            with tl.connect(self.server, timeout=5) as lens:
                model = lens.model()
            saes = ", ".join(sae.name for sae in model.saes) or "none"
            line("ok", f"{self.server} serves {model.name} on {model.device} ({model.dtype}); SAEs: {saes}")
        except tl.TurboLensError as error:
            failed = True
            line("fail", error.message)
        if failed:
            sys.exit(1)


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU, runs on the CPU"


FeatureCommands = Annotated[
    Annotated[Search, tyro.conf.subcommand("search")]
    | Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Show, tyro.conf.subcommand("show")],
    tyro.conf.subcommand("features", description="Find and look up features."),
]


def _installed(command: str, argv: list[str]) -> None:
    """Run a command that another package brings, such as `serve`."""
    found = list(entry_points(group=COMMANDS, name=command))
    if not found:
        sys.exit(f"turbolens {command} is not installed: pip install 'turbolens[{_EXTRAS[command]}]'")
    found[0].load()(argv)


_HELP: Final = """turbolens: pictures of SDXL Turbo, the features behind them, and steering by those features

  turbolens serve                       serve a model (see turbolens serve --help)
  turbolens studio                      explore, paint and compare in a browser; with --embedded, on a model of its own
  turbolens generate "a blue ring ..."  make a picture, steered or not
  turbolens extract "a blue ring ..."   show the features behind a picture
  turbolens features search blue        find features by words; also: list, show
  turbolens engine build                build a TensorRT engine; also: list, verify, prune
  turbolens train ...                   train the embedded model and SAEs
  turbolens sae import SRC OUT          make bundles of SAEs that another project trained
  turbolens catalog ...                 measure and name the features of bundles: build, import-labels
  turbolens bench                       measure this machine beside the bare diffusers pipeline
  turbolens doctor                      say what is wrong

  --help after any of them explains it; --version says the version
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(_HELP)
        return
    if args[0] == "--version":
        print(version("turbolens"))
        return
    name, rest = args[0], args[1:]
    if name in _EXTRAS:
        _installed(name, rest)
        return
    kinds: dict[str, Any] = {"generate": Generate, "extract": Extract, "features": FeatureCommands, "doctor": Doctor}
    if name not in kinds:
        sys.exit(f"turbolens: no command {name!r}; there are {', '.join((*kinds, *_EXTRAS))}")
    command = tyro.cli(kinds[name], args=rest, prog=f"turbolens {name}")
    try:
        command.run()
    except tl.InvalidRequest as error:
        print(f"turbolens: {error}", file=sys.stderr)
        sys.exit(2)
    except (tl.TurboLensError, ValueError, RuntimeError, OSError) as error:
        sys.exit(f"turbolens: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
