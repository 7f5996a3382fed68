"""What serving needs to know of a model, kept beside its compiled code.

The next start reads this instead of the model: to import what the modules are made of, to read them and to count what
they take is most of a start, and compiled code needs none of it. They are read when something first asks for them.

    <cache>/models/<key>.json
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from tokenizers import Tokenizer

from turbolens_server.engine.ancestral import EulerAncestralDiscreteScheduler, Schedule
from turbolens_server.engine.modules import Modules
from turbolens_server.files import WriteError, write_file
from turbolens_server.loading.checks import check_folder
from turbolens_server.loading.described import Model
from turbolens_server.loading.device import versions
from turbolens_server.loading.errors import LoadError
from turbolens_server.loading.hashes import hash_components, hash_unet
from turbolens_server.loading.hub import embedded_model
from turbolens_server.loading.lora import Fused
from turbolens_server.loading.memory import Counted
from turbolens_server.loading.places import EMBEDDED
from turbolens_server.logs import get_logger, through_ours
from turbolens_server.unet.points import HookPoint

_UNET: Final = (
    "addition_time_embed_dim", "block_out_channels", "cross_attention_dim", "in_channels",
    "projection_class_embeddings_input_dim", "sample_size", "time_cond_proj_dim",
)  # fmt: skip
"""Of the U-Net's configuration, and of the VAE's: all that is read where their modules are not."""
_VAE: Final = ("latent_channels", "latents_mean", "latents_std", "scaling_factor")
_SOURCES: Final = (
    "kept.py", "memory.py", "whole.py", "../engine/ancestral.py", "../unet/attention_taps.py", "../unet/tapped.py",
)  # fmt: skip
"""Files that decide what is kept."""


def folder_of_kept(model: str) -> Path | None:
    """The `diffusers` folder of a model of which something can be kept: one that is here, whole."""
    folder = embedded_model() if model == EMBEDDED else Path(model).expanduser()
    return folder if (folder / "model_index.json").is_file() else None


class Place(NamedTuple):
    """Where what is kept of a model is, or would be; known without its modules."""

    path: Path
    hash: str
    components_hash: str


def place_of(cache: Path, folder: Path, settings: Mapping[str, Any]) -> Place | None:
    """Where it is; None of a folder that cannot be served, as reading it will tell.

    Args:
        cache: folder of compiled code.
        folder: of the model.
        settings: that decide what the modules take, and how many steps there are.
    """
    try:
        check_folder(folder, None)
        model, components = hash_unet(folder), hash_components(folder)
    except LoadError:
        return None
    code = "".join((Path(__file__).parent / source).read_text() for source in _SOURCES)
    key = [model, components, versions(), dict(settings), hashlib.sha256(code.encode()).hexdigest()]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return Place(cache / "models" / f"{name}.json", model, components)


def keep(place: Place, model: Model, counted: Counted, max_steps: int) -> None:
    """Keep what the next start needs; where the cache cannot be written, it reads the modules again.

    Args:
        place: to keep it.
        model: with its modules.
        counted: what they take.
        max_steps: most steps of a run.
    """
    read = model.modules.get()
    own = EulerAncestralDiscreteScheduler.like(model.scheduler, max_steps)
    told = {
        "unet": {name: model.unet[name] for name in _UNET},
        "vae": {name: getattr(read.vae.config, name, None) for name in _VAE},
        "points": [dataclasses.astuple(point) for point in model.points.values()],
        "downscale": model.downscale,
        "tokenizers": [
            {
                "rules": tokenizer.backend_tokenizer.to_str(),
                "model_max_length": tokenizer.model_max_length,
                "pad_token_id": tokenizer.pad_token_id,
            }
            for tokenizer in model.tokenizers
        ],
        "zeros_for_nothing": model.zeros_for_nothing,
        "counted": dataclasses.asdict(counted),
        "scheduler": None if own is None else {"config": vars(own.config), "schedules": own.schedules},
    }
    with contextlib.suppress(WriteError):
        write_file(place.path, json.dumps(told))


def find_kept(place: Place, folder: Path, read: Modules) -> Model | None:
    """The model as it is kept; None where nothing is, or it is damaged.

    Args:
        place: of it.
        folder: of the model.
        read: its modules, when they are asked for.
    """
    if not place.path.is_file():
        return None
    try:
        told = json.loads(place.path.read_text())
        counted = Counted(**told["counted"])
        points = [HookPoint(*point) for point in told["points"]]
        first, second = (_Tokenizer(**one) for one in told["tokenizers"])
        return Model(
            hash=place.hash,
            components_hash=place.components_hash,
            fused=Fused(),
            unet=told["unet"],
            vae=types.SimpleNamespace(**told["vae"]),
            points={point.name: point for point in points},
            downscale=told["downscale"],
            tokenizers=(first, second),
            zeros_for_nothing=told["zeros_for_nothing"],
            scheduler=_scheduler(folder, told["scheduler"]),
            modules=read,
            count=lambda **_: counted,
        )
    except Exception as error:  # damaged in any way: it is made again
        get_logger().warning("what was kept of the model is not read", file=str(place.path), why=str(error))
        return None


def _scheduler(folder: Path, told: Mapping[str, Any] | None) -> Any:
    if told is not None:
        schedules = {int(steps): Schedule(*map(tuple, one)) for steps, one in told["schedules"].items()}
        return EulerAncestralDiscreteScheduler(told["config"], schedules)
    import diffusers  # takes longer than PyTorch's own import

    through_ours()
    name = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    return getattr(diffusers, name).from_pretrained(folder, subfolder="scheduler", local_files_only=True)


class _Ids(NamedTuple):
    input_ids: list[list[int]]


class _Tokenizer:
    """What serving calls of a tokenizer of `transformers`, by the one of `tokenizers` that it wraps."""

    def __init__(self, rules: str, model_max_length: int, pad_token_id: int) -> None:
        self.model_max_length, self.pad_token_id = model_max_length, pad_token_id
        self._rules = Tokenizer.from_str(rules)
        self._rules.no_truncation()
        self._rules.no_padding()

    def __call__(self, texts: Sequence[str], *, truncation: bool, verbose: bool) -> _Ids:
        return _Ids([coded.ids for coded in self._rules.encode_batch(list(texts))])

    def get_vocab(self) -> dict[str, int]:
        vocabulary: dict[str, int] = self._rules.get_vocab()
        return vocabulary

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str | None]:
        return [self._rules.id_to_token(one) for one in ids]
