"""`turbolens train`: the embedded model and everything that is made from it."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import tyro
import yaml

from turbolens_training.activations.config import DataConfig, FillCacheConfig, ImportTarsConfig, VerifyCacheConfig
from turbolens_training.activations.places import missing, unwritable
from turbolens_training.catalog.config import BuildConfig
from turbolens_training.evaluation.config import DoseConfig, EvalConfig, RegionsConfig, RieBenchConfig, WordsConfig
from turbolens_training.gating.config import GateConfig
from turbolens_training.mini.config import MiniConfig
from turbolens_training.sae.config import SaeConfig
from turbolens_training.sae.shipped import BESIDE, BESIDE_IMAGES
from turbolens_training.sae.sweep.config import SweepConfig
from turbolens_training.settings import Telling
from turbolens_training.variants.config import NestedConfig, TemporalConfig


@dataclasses.dataclass(frozen=True)
class RebuildConfig(Telling):
    """Make everything that depends on the model anew, in order: SAEs, their catalog, the dose table, the reports.

    Tests take their expectations from the reports.
    """

    model: str = "mini"
    """Model to start from: `mini`, or a `diffusers` folder."""
    saes: Annotated[Path, tyro.conf.arg(aliases=["--sae"])] = Path("server/turbolens_server/models/mini-saes")
    """Folder that the bundles are written to."""
    work: Path = Path("runs")
    """Folder of checkpoints and reports."""
    docs: Path = Path("docs")
    """Folder that the reports are written below."""
    seed: int = 0
    """Seed of everything."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: a GPU when there is one."""
    steps: int = SaeConfig.steps
    """Training steps of the SAEs."""
    images: int = BuildConfig.images
    """Pictures that the catalog is made from."""
    scenes: int = DoseConfig.scenes
    """Scenes for each curve of the dose table."""
    allow_below_gates: bool = False
    """Go on with SAEs that fail a gate of the export; their provenance says which."""

    @property
    def writes(self) -> tuple[Path, ...]:
        """Folders that the command writes to."""
        return (self.saes, self.work, self.docs)


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Updates kept on disk."""

    action: Annotated[
        Annotated[FillCacheConfig, tyro.conf.subcommand("fill")]
        | Annotated[VerifyCacheConfig, tyro.conf.subcommand("verify")]
        | Annotated[ImportTarsConfig, tyro.conf.subcommand("import-tars")],
        tyro.conf.OmitSubcommandPrefixes,
        tyro.conf.OmitArgPrefixes,
    ]


Command = (
    Annotated[MiniConfig, tyro.conf.subcommand("mini")]
    | Annotated[SaeConfig, tyro.conf.subcommand("sae")]
    | Annotated[GateConfig, tyro.conf.subcommand("gates")]
    | Annotated[SweepConfig, tyro.conf.subcommand("sweep")]
    | Annotated[CacheConfig, tyro.conf.subcommand("cache")]
    | Annotated[DoseConfig, tyro.conf.subcommand("dose")]
    | Annotated[EvalConfig, tyro.conf.subcommand("eval")]
    | Annotated[RegionsConfig, tyro.conf.subcommand("regions")]
    | Annotated[RieBenchConfig, tyro.conf.subcommand("riebench")]
    | Annotated[NestedConfig, tyro.conf.subcommand("nested")]
    | Annotated[TemporalConfig, tyro.conf.subcommand("temporal")]
    | Annotated[WordsConfig, tyro.conf.subcommand("words")]
    | Annotated[RebuildConfig, tyro.conf.subcommand("rebuild")]
)


def main(argv: list[str]) -> None:
    """Entry point of `turbolens train`."""
    if argv[:1] == ["sae"] and any(argument.partition("=")[0] == "--config" for argument in argv):
        command: Command = _with_file(argv[1:])
    else:
        command = tyro.cli(Command, args=argv, prog="turbolens train", description=__doc__)
    # What runs is imported here: a command's help must not wait for torch.
    from turbolens_server.files import WriteError
    from turbolens_server.loading.errors import LoadError

    own = command.action if isinstance(command, CacheConfig) else command
    if lines := [*_missing(own), *unwritable(own.writes)]:
        sys.exit("\n".join(f"turbolens train: {line}" for line in lines))
    try:
        run(command)
    except (LoadError, ValueError, ArithmeticError, WriteError) as error:
        sys.exit(f"turbolens train: {error}")


def _missing(command: object) -> list[str]:
    """What a command is to read and cannot, a line each."""
    match command:
        case SaeConfig():
            return missing(model=command.model, prompts=command.prompts, shards=command.shards)
        case DataConfig():
            return missing(model=command.model, prompts=command.prompts)
        case DoseConfig() | WordsConfig():
            return missing(model=command.model, saes=command.saes)
        case EvalConfig():
            return missing(model=command.model, saes=command.saes, prompts=command.prompts)
        case RieBenchConfig():
            return missing(model=command.model, saes=command.saes, items=command.items, masks=command.masks)
        case RebuildConfig() | RegionsConfig() | GateConfig() | NestedConfig() | TemporalConfig():
            return missing(model=command.model)
        case VerifyCacheConfig() | ImportTarsConfig():
            return missing(path=command.path)
        case _:
            return []


def _with_file(argv: list[str]) -> SaeConfig:
    """The settings of `--config FILE.yaml`, with the other flags on top; both are read and checked alike."""
    files = argparse.ArgumentParser(prog="turbolens train sae", add_help=False, allow_abbrev=False)
    files.add_argument("--config", type=Path, required=True)
    known, flags = files.parse_known_args(argv)
    try:
        settings = yaml.safe_load(known.config.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        sys.exit(f"turbolens train: --config {known.config}: unreadable ({error})")
    if not isinstance(settings, dict):
        sys.exit(f"turbolens train: --config {known.config}: expected a mapping of settings to values")
    written = _as_flags(settings)
    prog = f"turbolens train sae --config {known.config}"
    return tyro.cli(SaeConfig, args=flags, default=tyro.cli(SaeConfig, args=written, prog=prog), prog=prog)


_MAY_BE_NONE: Final = {field.name for field in dataclasses.fields(SaeConfig) if field.default is None}


def _as_flags(settings: Mapping[str, object], group: str = "") -> list[str]:
    """Settings of a file as they would be written on the command line; a mapping is a group, as `gates` is."""
    flags = []
    for name, value in settings.items():
        plain = f"{group}{str(name).replace('_', '-')}"
        match value:
            case None:  # as text it would be "None", such as a file of that name
                if plain.replace("-", "_") not in _MAY_BE_NONE:
                    sys.exit(f"turbolens train: --config: {plain} is null; leave it out, or say what it is")
            case dict():
                flags += _as_flags(value, f"{plain}.")
            case bool():
                flags.append(f"--{plain}" if value else f"--no-{plain}")
            case list():
                flags += [f"--{plain}", *map(str, value)]
            case _:
                flags += [f"--{plain}", str(value)]
    return flags


def run(command: Command) -> None:
    """Run one command."""
    match command:
        case MiniConfig():
            from turbolens_training.mini import cli as mini

            mini.run(command)
        case SaeConfig():
            from turbolens_training.sae.train import train_saes

            train_saes(command)
        case GateConfig():
            from turbolens_training.gating.train import train_gates

            train_gates(command)
        case SweepConfig():
            from turbolens_training.sae.sweep.sweep import sweep

            sweep(command)
        case CacheConfig(FillCacheConfig() as action):
            from turbolens_training.activations.cache_cli import fill

            fill(action)
        case CacheConfig(VerifyCacheConfig() as action):
            from turbolens_training.activations.cache_cli import verify

            verify(action)
        case CacheConfig(ImportTarsConfig() as action):
            from turbolens_training.activations.cache_cli import import_reference

            import_reference(action)
        case DoseConfig():
            from turbolens_training.evaluation.dose import measure_dose

            measure_dose(command)
        case EvalConfig():
            from turbolens_training.evaluation.evaluate import evaluate

            evaluate(command)
        case WordsConfig():
            from turbolens_training.evaluation.words import measure_words

            measure_words(command)
        case RegionsConfig():
            from turbolens_training.evaluation.regions import measure_regions

            measure_regions(command)
        case RieBenchConfig():
            from turbolens_training.evaluation.riebench import run_riebench

            run_riebench(command)
        case NestedConfig():
            from turbolens_training.variants.nested import measure_nested

            measure_nested(command)
        case TemporalConfig():
            from turbolens_training.variants.temporal import measure_temporal

            measure_temporal(command)
        case RebuildConfig():
            rebuild(command)


def beside(config: RebuildConfig, work: Path) -> list[tuple[SaeConfig, BuildConfig]]:
    """How each set of SAEs beside `mini-saes` is trained, and its catalog made."""
    told: dict[str, Any] = {"model": config.model, "seed": config.seed, "device": config.device, "json": config.json}
    found = []
    for name, settings in BESIDE.items():
        folder, own = config.saes.parent / name, work / name
        resume = (own / "state.pt").exists()
        scaled = {**settings, "steps": min(config.steps, settings.get("steps", config.steps))}
        training = SaeConfig(
            **told, **scaled, out=folder, work=own, allow_below_gates=config.allow_below_gates, resume=resume,
            overwrite=not resume,
        )  # fmt: skip
        images = min(config.images, BESIDE_IMAGES)
        found.append((training, BuildConfig(**told, saes=folder, work=own, images=images)))
    return found


def rebuild(config: RebuildConfig) -> None:
    """SAEs, catalog, dose table, reports; checkpoints go by the model's hash: a new model never takes up an old run."""
    from turbolens_server.loading.load import load_engine
    from turbolens_training.catalog.build import build

    model_hash = load_engine(model=config.model, device=config.device, saes=[]).info.model_hash
    work = config.work / f"rebuild-{model_hash[:12]}"
    model, seed, device, saes = config.model, config.seed, config.device, config.saes
    allow, steps = config.allow_below_gates, config.steps
    resume = (work / "state.pt").exists()
    # All are made, and so checked, before the first runs.
    sets = beside(config, work)
    training = SaeConfig(
        model, out=saes, work=work, seed=seed, device=device, steps=steps, allow_below_gates=allow,
        resume=resume, overwrite=not resume, json=config.json,
    )  # fmt: skip
    images = config.images
    told: dict[str, Any] = {"model": model, "saes": saes, "seed": seed, "device": device, "json": config.json}
    catalog = BuildConfig(**told, work=work, images=images, icons=True)
    dose = DoseConfig(**told, out=work / "dose", scenes=config.scenes)
    run(training)
    build(catalog)
    run(dose)
    for training_of_set, catalog_of_set in sets:
        run(training_of_set)
        build(catalog_of_set)
    from turbolens_training.evaluation.summary import summarize
    from turbolens_training.mini.report import write_report

    summarize(work, config.docs / "saes")
    write_report(load_engine(model=config.model, device=config.device, saes=[]), config.docs / "mini")
    for report in (config.docs / "saes", config.docs / "mini"):
        config.tell(report / "README.md", report=report / "README.md")
