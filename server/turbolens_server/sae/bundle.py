"""SAE bundles: a folder per SAE that SAELens loads as it is, with what we know of its features beside it.

Folders that other projects made are read by `turbolens_server.sae.formats`.

cfg.json                     SAELens' configuration; ours in `metadata`
sae_weights.safetensors      W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_in], b_dec [d_in];
                             JumpReLU adds threshold [d_sae]. SAELens has no word for `turbolens-matryoshka`,
                             a TopK whose k and width are chosen when it is served, and for `turbolens-temporal`,
                             a TopK over whole runs of `steps` steps (`turbolens_server.sae.temporal`): d_in is
                             steps * d_model, step by step, scales [steps] is added, and where a step is not
                             predicted to be as the one before, predictors [steps - 1, d_model, d_model]; with a
                             threshold [d_sae] it is a JumpReLU over whole runs, and has no k
feature_stats.safetensors    mean, max, frequency [d_sae]; timesteps, update_rms [T]   (optional)
features.parquet             labels and top examples, see `turbolens_server.catalog`     (optional)
co_firing.safetensors        which features fire together, likewise                      (optional)
provenance.json              recipe, data, measured quality                              (optional)
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypeGuard, get_args

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from turbolens_server.files import first_line, hash_file, read_object, whole_folder, write_file, write_files

FORMAT_VERSION: Final = 1
Architecture = Literal["topk", "jumprelu", "turbolens-matryoshka", "turbolens-temporal"]
ARCHITECTURES: Final[tuple[Architecture, ...]] = get_args(Architecture)
_MEANINGS: Final = {
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "rescale_acts_by_decoder_norm": False,
    "reshape_activations": "none",
}
"""What the weights of every bundle mean; other meanings are folded when a bundle is made."""
FEATURES_FILE: Final = "features.parquet"
"""Written and read by `turbolens_server.catalog.labels`."""
CO_FIRING_FILE: Final = "co_firing.safetensors"
"""Likewise by `turbolens_server.catalog.co_firing`."""
_STATS_FILE: Final = "feature_stats.safetensors"
_WEIGHTS_FILE: Final = "sae_weights.safetensors"
_PROVENANCE_FILE: Final = "provenance.json"

_UNKNOWN_SCALE: Final = 1000.0
"""Of activations. SAEs of SDXL's updates are known with activations of thousands."""
_MORE_TENSORS: Final = {"jumprelu": ("threshold",), "turbolens-temporal": ("scales",)}
"""What an architecture has beside the four tensors of all."""
_MAY_HAVE: Final = {"turbolens-temporal": ("predictors", "threshold")}
"""What it may have."""


class BundleError(ValueError):
    """A folder that is no SAE bundle; the text names the file and what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class SaeWeights:
    """The tensors of one SAE in SAELens' layout, float32."""

    W_enc: Tensor  # [d_in, d_sae]
    b_enc: Tensor  # [d_sae]
    W_dec: Tensor  # [d_sae, d_in]
    b_dec: Tensor  # [d_in]
    threshold: Tensor | None = None  # [d_sae], of a JumpReLU, or a temporal that selects as one
    scales: Tensor | None = None  # [T], temporal only: what the change of each step is divided by; d_in is T * d_model
    predictors: Tensor | None = None  # [T - 1, d_model, d_model], of a temporal: each step from the one before

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, without those that are absent."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: tensor for name, tensor in fields.items() if tensor is not None}


@dataclasses.dataclass(frozen=True)
class FeatureStats:
    """What was measured of every feature on the data that the SAE was trained on."""

    mean: npt.NDArray[np.float32]
    """[d_sae] mean activation over the positions where it is active; 0 where it never is."""
    max: npt.NDArray[np.float32]
    """[d_sae] largest activation."""
    frequency: npt.NDArray[np.float32]
    """[d_sae] share of positions where it is active."""
    timesteps: npt.NDArray[np.int64]
    """[T] timesteps at which the update's norm was measured, falling."""
    update_rms: npt.NDArray[np.float32]
    """[T] root mean square over positions of the update's norm at each of them."""

    def norm_at(self, timestep: float) -> float:
        """RMS norm of the update at the measured timestep nearest to `timestep`."""
        return float(self.update_rms[np.abs(self.timesteps - timestep).argmin()])


@dataclasses.dataclass(frozen=True)
class Nesting:
    """How much smaller than itself a Matryoshka SAE may be served."""

    k_max: int | None
    """Largest k it was trained at; every k up to it may be served. None for JumpReLU, which has no k."""
    prefixes: tuple[int, ...]
    """Numbers of first features that are an SAE of their own, rising; the last is the whole."""


@dataclasses.dataclass(frozen=True)
class Bundle:
    """One SAE with everything in its folder."""

    name: str
    """What requests call it; the hook point's name for a default SAE."""
    hook_point: str
    architecture: Architecture
    k: int | None
    """Features active at a position, at most; None where thresholds select. Of a Matryoshka, unless a request says
    otherwise."""
    weights: SaeWeights
    stats: FeatureStats | None
    hash: str
    """SHA-256 of the weights file."""
    model_hash: str | None
    """Hash of the U-Net it was trained on; None where the folder does not say."""
    provenance: dict[str, Any]
    folder: Path | None = None
    nesting: Nesting | None = None
    """Of a Matryoshka; None for the others, which have one k and one width."""

    @property
    def measured(self) -> FeatureStats | None:
        """The statistics, if they were measured; None too where they hold no more than means that others published."""
        return self.stats if self.stats is not None and len(self.stats.update_rms) else None

    @property
    def activation_scale(self) -> float:
        """The largest mean activation of a feature, and no less than 1; a thousand where nobody told."""
        return _UNKNOWN_SCALE if self.stats is None else max(1.0, float(self.stats.mean.max()))

    @property
    def steps(self) -> int | None:
        """Of the runs that a temporal SAE reads, the only ones it serves; None for the others, which read any step."""
        return None if self.weights.scales is None else len(self.weights.scales)

    @property
    def d_in(self) -> int:
        """Width of what it reads: one update, or the updates of all steps of a run."""
        return self.weights.W_enc.shape[0]

    @property
    def d_model(self) -> int:
        """Width of one update."""
        return self.d_in // (self.steps or 1)

    @property
    def d_sae(self) -> int:
        return self.weights.W_enc.shape[1]

    def refused(self, k: int | None, prefix: int | None) -> dict[str, str]:
        """Why a k or a prefix that is asked for cannot be served, by name ("k", "prefix"); empty where they can.

        None is the SAE's own.
        """
        found, nesting = {}, self.nesting
        if k not in (None, self.k) and not (nesting and nesting.k_max and 1 <= k <= nesting.k_max):
            allowed = f"allows {f'1 to {nesting.k_max}' if nesting else f'only {self.k}'}"
            found["k"] = "has no k" if self.k is None else allowed
        if prefix not in (None, self.d_sae) and not (nesting and prefix in nesting.prefixes):
            found["prefix"] = f"allows {', '.join(map(str, nesting.prefixes)) if nesting else f'only {self.d_sae}'}"
        return found


def check_floating(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise BundleError where a tensor holds whole numbers: of a quantized file, whose scales are not read."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise BundleError(f"{where}: {name} is {kind}, expected floating-point weights")


def check_weights(weights: SaeWeights, where: str) -> None:
    """Raise BundleError where shapes disagree or a value is not finite."""
    if weights.W_enc.ndim != 2:
        raise BundleError(f"{where}: W_enc has shape {tuple(weights.W_enc.shape)}, expected (d_in, d_sae)")
    d_in, d_sae = weights.W_enc.shape
    expected = {
        "W_enc": (d_in, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
        "threshold": (d_sae,),
        "scales": (0 if weights.scales is None else weights.scales.numel(),),
    }
    for name, tensor in weights.tensors().items():
        if tuple(tensor.shape) != expected.get(name, tuple(tensor.shape)):
            raise BundleError(f"{where}: {name} has shape {tuple(tensor.shape)}, expected {expected[name]}")
        if not torch.isfinite(tensor).all():
            raise BundleError(f"{where}: {name} holds values that are not finite")
    if weights.scales is not None:
        steps = len(weights.scales)
        if steps < 2 or d_in % steps:
            raise BundleError(f"{where}: scales is of {steps} steps, expected at least 2 that divide d_in={d_in}")
        if not (weights.scales > 0).all():
            raise BundleError(f"{where}: scales holds values that are not positive")
        wanted = (steps - 1, d_in // steps, d_in // steps)
        if weights.predictors is not None and tuple(weights.predictors.shape) != wanted:
            raise BundleError(f"{where}: predictors has shape {tuple(weights.predictors.shape)}, expected {wanted}")


def save_bundle(
    folder: Path,
    *,
    hook_point: str,
    hook_module: str,
    model_name: str | None,
    model_hash: str | None,
    architecture: Architecture,
    k: int | None,
    weights: SaeWeights,
    stats: FeatureStats | None,
    provenance: dict[str, Any],
    name: str | None = None,
    nesting: Nesting | None = None,
    half: bool = False,
) -> None:
    """Write a bundle, whole or not at all; `features.parquet` is the catalog's to add. `half`: weights in float16.

    Of an older bundle in the folder, what was known of its features goes unless the weights are the same: a feature of
    other weights must not be served under an old one's label or statistics.

    Raises:
        BundleError: the weights are none of an SAE.
        WriteError: it cannot be written; the older one stays as it was.
    """
    check_weights(weights, str(folder))
    d_in, d_sae = weights.W_enc.shape
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float16" if half else "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.0.0",
            "model_name": model_name,
            "hook_name": f"unet.{hook_module}",
            "turbolens": {
                "format": FORMAT_VERSION,
                "name": name or hook_point,
                "hook_point": hook_point,
                "model_hash": model_hash,
            },
        },
    }
    if k is not None:
        config |= {"k": k, "rescale_acts_by_decoder_norm": False}
    if nesting is not None and nesting.k_max is not None:
        config |= dataclasses.asdict(nesting)
    elif nesting is not None:  # among what SAELens keeps without reading: to it the bundle is a JumpReLU
        config["metadata"]["turbolens"]["prefixes"] = list(nesting.prefixes)
    if weights.scales is not None:
        config |= {"steps": len(weights.scales)}
    with whole_folder(folder, replace=True) as whole:
        (whole / "cfg.json").write_text(json.dumps(config, indent=2) + "\n")
        kind = torch.float16 if half else torch.float32
        (whole / _WEIGHTS_FILE).write_bytes(save({n: t.to(kind).contiguous() for n, t in weights.tensors().items()}))
        (whole / _PROVENANCE_FILE).write_text(json.dumps(provenance, indent=2) + "\n")
        if stats is not None:
            (whole / _STATS_FILE).write_bytes(_stats_content(stats))
        _keep_others(folder, whole)


def _keep_others(folder: Path, whole: Path) -> None:
    """Take over what a new bundle does not bring itself from the one whose place it takes."""
    before = folder / _WEIGHTS_FILE
    same = before.is_file() and hash_file(before) == hash_file(whole / _WEIGHTS_FILE)
    for path in folder.iterdir() if folder.is_dir() else ():
        if (whole / path.name).exists() or (path.name in (FEATURES_FILE, CO_FIRING_FILE, _STATS_FILE) and not same):
            continue
        if path.is_dir():
            shutil.copytree(path, whole / path.name)
        else:
            shutil.copyfile(path, whole / path.name)


def save_stats(folder: Path, stats: FeatureStats) -> None:
    """Write a bundle's statistics.

    Raises:
        WriteError: they cannot be written; those from before stay.
    """
    write_file(folder / _STATS_FILE, _stats_content(stats))


def _stats_content(stats: FeatureStats) -> bytes:
    return bytes(save({f.name: torch.from_numpy(getattr(stats, f.name)) for f in dataclasses.fields(stats)}))


def amend_bundle(folder: Path, files: Mapping[str, bytes], **entries: Any) -> None:
    """Write files of a bundle together with entries of its provenance, which tell of them.

    Args:
        folder: the bundle.
        files: contents by name.
        entries: of the provenance, in place of those of the same name; None removes one.

    Raises:
        BundleError: the provenance from before is malformed.
        WriteError: one cannot be written; all stay as they were.
    """
    known = {**_read_provenance(folder), **entries}
    kept = {name: entry for name, entry in known.items() if entry is not None}
    contents: dict[Path, bytes | str] = {folder / name: content for name, content in files.items()}
    write_files({**contents, folder / _PROVENANCE_FILE: json.dumps(kept, indent=2) + "\n"})


def _read_provenance(folder: Path) -> dict[str, Any]:
    path = folder / _PROVENANCE_FILE
    return read_object(path, BundleError) if path.exists() else {}


def load_bundle(folder: Path) -> Bundle:
    """Read a bundle.

    Raises:
        BundleError: a file is missing, malformed or disagrees with another.
    """
    for name in ("cfg.json", _WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise BundleError(f"{folder}: {name} is missing")
    config = read_object(folder / "cfg.json", BundleError)
    try:
        tensors = load_file(folder / _WEIGHTS_FILE)
    except Exception as error:  # safetensors raises many kinds for broken files
        raise BundleError(f"{folder / _WEIGHTS_FILE}: unreadable ({first_line(error)})") from error
    architecture = config.get("architecture")
    if architecture not in ARCHITECTURES:
        raise BundleError(f"{folder}: architecture {architecture!r}; served are {', '.join(ARCHITECTURES)}")
    names = {"W_enc", "b_enc", "W_dec", "b_dec", *_MORE_TENSORS.get(architecture, ())}
    if set(tensors) - {*_MAY_HAVE.get(architecture, ())} != names:
        raise BundleError(f"{folder}: sae_weights.safetensors holds {sorted(tensors)}, expected {sorted(names)}")
    for key, value in _MEANINGS.items():
        if config.get(key, value) != value:
            raise BundleError(f"{folder}: cfg.json has {key}={config[key]!r}; fold it into the weights first")
    check_floating(tensors, str(folder / _WEIGHTS_FILE))
    weights = SaeWeights(**{name: tensor.float() for name, tensor in tensors.items()})
    check_weights(weights, str(folder))
    if weights.scales is not None and config.get("steps") != len(weights.scales):
        raise BundleError(
            f"{folder}: cfg.json has steps={config.get('steps')!r}, expected {len(weights.scales)}, as scales has"
        )
    for key, size in zip(("d_in", "d_sae"), weights.W_enc.shape, strict=True):
        if config.get(key, size) != size:
            raise BundleError(f"{folder}: cfg.json has {key}={config[key]!r}, expected {size}, as the weights have")
    thresholded = weights.threshold is not None
    if thresholded and architecture != "jumprelu" and config.get("k") is not None:
        raise BundleError(f"{folder}: cfg.json has k={config['k']!r} beside a threshold in the weights, expected none")
    k = None if thresholded else config.get("k")
    if not thresholded and not (_whole(k) and 0 < k <= weights.W_enc.shape[1]):
        raise BundleError(f"{folder}: cfg.json has k={k!r}, expected 1 to {weights.W_enc.shape[1]}")
    ours = _object(_object(config, "metadata", folder), "turbolens", folder)
    nesting = None
    if architecture == "turbolens-matryoshka":
        nesting = _read_nesting(config, folder, weights.W_enc.shape[1])
    elif architecture == "jumprelu" and "prefixes" in ours:
        nesting = Nesting(None, _prefixes(ours["prefixes"], folder, weights.W_enc.shape[1]))
    called, hook_point, model_hash = ours.get("name"), ours.get("hook_point"), ours.get("model_hash")
    if not hook_point:
        raise BundleError(f"{folder}: cfg.json does not say where it sits (metadata.turbolens.hook_point)")
    for key, text in (("name", called or ""), ("hook_point", hook_point), ("model_hash", model_hash or "")):
        if not isinstance(text, str):
            raise BundleError(f"{folder}: cfg.json has metadata.turbolens.{key}={text!r}, expected text")
    return Bundle(
        name=called or hook_point,
        hook_point=hook_point,
        architecture=architecture,
        k=k,
        weights=weights,
        stats=_load_stats(folder, weights.W_enc.shape[1]),
        hash=hash_file(folder / _WEIGHTS_FILE),
        model_hash=model_hash,
        provenance=_read_provenance(folder),
        folder=folder,
        nesting=nesting,
    )


def _object(config: Mapping[str, Any], key: str, folder: Path) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise BundleError(f"{folder}: cfg.json has {key}={value!r}, expected an object")
    return value


def _whole(value: object) -> TypeGuard[int]:
    """Whether a value of JSON is a whole number; Python takes `true` for one."""
    return isinstance(value, int) and not isinstance(value, bool)


def _read_nesting(config: dict[str, Any], folder: Path, d_sae: int) -> Nesting:
    k, k_max = config["k"], config.get("k_max")
    if not (_whole(k_max) and k <= k_max <= d_sae):
        raise BundleError(f"{folder}: cfg.json has k_max={k_max!r}, expected {k} to {d_sae}")
    return Nesting(k_max, _prefixes(config.get("prefixes"), folder, d_sae, k_max))


def _prefixes(given: object, folder: Path, d_sae: int, least: int = 1) -> tuple[int, ...]:
    widths = [width for width in given if _whole(width)] if isinstance(given, list) else []
    if not (widths and widths == given == sorted({*widths}) and widths[-1] == d_sae and widths[0] >= least):
        raise BundleError(
            f"{folder}: cfg.json has prefixes={given!r}, expected rising sizes from at least {least} up to {d_sae}"
        )
    return tuple(widths)


def _load_stats(folder: Path, d_sae: int) -> FeatureStats | None:
    path = folder / _STATS_FILE
    if not path.exists():
        return None
    try:
        tensors = load_file(path)
        stats = FeatureStats(**{f.name: tensors[f.name].numpy() for f in dataclasses.fields(FeatureStats)})
    except Exception as error:
        raise BundleError(f"{path}: unreadable ({first_line(error)})") from error
    for field in dataclasses.fields(stats):
        values: npt.NDArray[Any] = getattr(stats, field.name)
        wanted = (stats.update_rms.size,) if field.name in ("timesteps", "update_rms") else (d_sae,)
        if values.shape != wanted:
            raise BundleError(f"{path}: {field.name} has shape {values.shape}, expected {wanted}")
        if not np.isfinite(values).all() or (values < 0).any():
            raise BundleError(f"{path}: {field.name} holds values that are not finite, or below 0")
    if (stats.frequency > 1).any():
        raise BundleError(f"{path}: frequency holds values above 1")
    return stats
