"""Where models and SAEs are: what ships with the package, local folders, snapshots of hub ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Final

from turbolens_server.files import first_line
from turbolens_server.loading.errors import LoadError
from turbolens_server.loading.places import EMBEDDED, EMBEDDED_SAES, local

_SDXL: Final = "stabilityai/stable-diffusion-xl-base-1.0"
_SETTINGS: Final = ("*.json", "*.txt", "*.model")
_FILE_PATTERNS: Final = ("*.json", "*.txt", "*.safetensors", "*.model")
SAE_PATTERNS: Final = (
    "*.json",
    "*.parquet",
    "*.safetensors",
    "*state_dict.pth",
    "*state_dict.pt",
    "*ae.pt",  # sae.pt too
    "*mean.pt",
)
"""Files of SAE folders of every format."""


def embedded_model() -> Path:
    """Folder of the embedded model."""
    return Path(str(files("turbolens_server.models").joinpath("mini")))


def embedded_saes(name: str = EMBEDDED_SAES[0]) -> Path:
    """Folder of SAE bundles that ship with the embedded model."""
    return Path(str(files("turbolens_server.models").joinpath(name)))


def embedded_gates() -> Path:
    """Folder of the embedded model's learned region gates."""
    return Path(str(files("turbolens_server.models").joinpath("mini-gates")))


def model_folder(model: str, variant: str | None = None) -> Path:
    """The `diffusers` folder of a model: the embedded one's, a local one, or the snapshot of a hub id.

    Of a hub id only what is loaded is fetched: neither the weights of other variants, nor a whole model in one file.

    Raises:
        LoadError: it is none of these.
    """

    def fetch(name: str) -> str:
        from diffusers import StableDiffusionXLPipeline  # not needed for what is here

        folder: str = StableDiffusionXLPipeline.download(name, variant=variant, use_safetensors=True)
        return folder

    folder = embedded_model() if model == EMBEDDED else resolve(model, "--model", fetch)
    if not (folder / "model_index.json").exists():
        files = sorted(folder.glob("*.safetensors"))
        hint = f"; a checkpoint in one file is given by its path: --model {files[0]}" if files else ""
        raise LoadError(f"{folder} is no diffusers folder: model_index.json is missing{hint}")
    return folder


def file_of(name: str) -> Path | None:
    """The file of a model or VAE that is one; None: it is something else."""
    path = Path(name).expanduser()
    return path if path.suffix == ".safetensors" and path.is_file() else None


def config_folder(name: str | None) -> Path:
    """Where configurations, scheduler and vocabularies for a model in one file are; no weights are fetched.

    Raises:
        LoadError: it is no `diffusers` folder, or SDXL base was meant and cannot be had.
    """
    try:
        folder = resolve(name or _SDXL, "--model-config", snapshot(_SETTINGS))
    except LoadError as error:
        if name is not None:
            raise
        raise LoadError(
            "--model is one file, which holds neither configurations nor vocabularies; give a diffusers folder of a "
            "model of its kind by --model-config, whose weights are not needed, or let it be fetched once where there "
            f"is a network: hf download {_SDXL} --include '*.json' '*.txt'"
        ) from error
    if not (folder / "model_index.json").exists():
        raise LoadError(f"--model-config {folder} is no diffusers folder: model_index.json is missing")
    return folder


def snapshot(patterns: Sequence[str]) -> Callable[[str], str]:
    """Fetches the files of a hub id whose names fit."""

    def fetch(name: str) -> str:
        from huggingface_hub import snapshot_download  # likewise

        return str(snapshot_download(name, allow_patterns=list(patterns)))

    return fetch


def resolve(name: str, flag: str, fetch: Callable[[str], str] | None = None) -> Path:
    """A local folder, or the snapshot of a hub id (from the cache where it is complete, else downloaded).

    Args:
        name: the folder or hub id.
        flag: what asked for it, which begins the error.
        fetch: gives the local folder of a hub id; None: with all configurations and safetensors.

    Raises:
        LoadError: it is neither.
    """
    path = embedded_saes(name) if flag == "--sae" and name in EMBEDDED_SAES else local(name, flag)
    if path is not None:
        if not path.is_dir():
            raise LoadError(f"{flag} {name}: is a file, and neither .safetensors nor a folder")
        return path
    try:
        return Path((fetch or snapshot(_FILE_PATTERNS))(name))
    except Exception as error:  # offline, gated, missing: the hub's client raises many kinds
        raise LoadError(
            f"{flag} {name}: not a local folder, and the hub gave nothing ({first_line(error)}); download it where "
            f"there is a network (`hf download {name}`) and pass the folder, or set HF_HOME to a cache that holds it"
        ) from error
