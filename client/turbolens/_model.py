"""What a server says of itself, as plain values; `turbolens/v1/model_service.proto` says what each field is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from turbolens._edits import UNIT_NAMES, Unit
from turbolens._table import Table, card
from turbolens_proto.v1 import model_service_pb2

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Size:
    """A picture size in pixels."""

    width: int
    height: int


@dataclasses.dataclass(frozen=True, slots=True)
class Defaults:
    """What a request gets where it says nothing."""

    steps: int
    width: int
    height: int
    guidance_scale: float
    timesteps: tuple[int, ...]
    guidance_rescale: float
    negative_prompt: str


@dataclasses.dataclass(frozen=True, slots=True)
class HookPoint:
    """A block of the U-Net whose update is read and steered."""

    name: str
    module: str
    d_model: int
    height: int
    width: int


@dataclasses.dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA that is fused into the model's weights."""

    name: str
    weight: float
    hash: str


@dataclasses.dataclass(frozen=True, slots=True)
class Memory:
    """Memory of the device, as counted when loading began; bytes."""

    weights_bytes: int
    sae_bytes: int
    activation_bytes: int
    available_bytes: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class Scheduler:
    """What walks from noise to latents."""

    name: str
    timestep_spacing: str
    previews: bool
    takes_timesteps: bool
    train_timesteps: int
    timesteps: tuple[int, ...]
    embedded_guidance: float


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What a request may hold; every bound is inclusive."""

    max_prompt_chars: int
    max_prompt_tokens: int
    max_steps: int
    max_seeds: int
    max_edits: int
    max_features_per_edit: int
    max_strength: float
    sizes: tuple[Size, ...]
    max_mask_bytes: int
    max_message_bytes: int
    max_batch: int
    max_queue: int
    max_queue_pictures: int
    max_request_id_chars: int
    max_mask_shapes: int
    max_mask_points: int
    max_mask_pixels: int
    max_mask_edge: int
    max_query_chars: int
    max_filter_chars: int
    max_listed: int
    max_found: int
    max_request_features: int
    max_references: int
    max_request_bytes: int
    max_selected: int
    max_saes: int
    max_guidance_scale: float
    max_picture_bytes: int
    max_regions: int


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Sae:
    """A sparse autoencoder as served."""

    name: str
    hook_point: str
    architecture: str
    d_sae: int
    k: int
    hash: str
    units: tuple[Unit, ...]
    labels: int
    provenance_json: str
    forced: bool
    k_max: int
    prefixes: tuple[int, ...]
    steps: int

    @classmethod
    def from_proto(cls, message: model_service_pb2.Sae) -> Sae:
        """From the server's message."""
        return _value(cls, message)

    @property
    def provenance(self) -> dict[str, Any]:
        """Where it comes from: recipe, data and measured quality."""
        told: dict[str, Any] = json.loads(self.provenance_json or "{}")
        return told

    def __repr__(self) -> str:
        return f"Sae({self.name!r}, {self.architecture}, d_sae={self.d_sae}, k={self.k}, labels={self.labels})"


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Gate:
    """Learned region gates as served."""

    hash: str
    layers: tuple[str, ...]
    """The cross-attentions that have one."""
    threshold: float
    closed: float
    """What is added to the logits of a token that is not heard."""
    provenance_json: str
    forced: bool

    @property
    def provenance(self) -> dict[str, Any]:
        """Where they come from: recipe, data and measured quality."""
        told: dict[str, Any] = json.loads(self.provenance_json or "{}")
        return told

    def __repr__(self) -> str:
        return f"Gate({self.hash[:12]!r}, layers={list(self.layers)})"


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Model:
    """The model as served."""

    name: str
    hash: str
    hook_points: tuple[HookPoint, ...]
    saes: tuple[Sae, ...]
    limits: Limits
    defaults: Defaults
    edit_kinds: tuple[str, ...]
    sources: tuple[str, ...]
    backend: str
    device: str
    dtype: str
    versions: Mapping[str, str]
    backend_reason: str
    memory: Memory
    load_seconds: float
    components_hash: str
    scheduler: Scheduler
    loras: tuple[Lora, ...]
    other_hook_points: tuple[HookPoint, ...]
    """Where else in the U-Net an SAE could sit; this server neither reads nor steers there."""
    gate: Gate | None
    """What `gate=True` hears the text through; None where none is served."""
    message: model_service_pb2.Model = dataclasses.field(compare=False)
    """The server's own words."""

    @classmethod
    def from_proto(cls, message: model_service_pb2.Model) -> Model:
        """From the server's message."""
        return _value(cls, message)

    def __repr__(self) -> str:
        return (
            f"Model({self.name!r}, {self.backend} on {self.device}, {self.dtype}, saes={[s.name for s in self.saes]})"
        )

    def _repr_html_(self) -> str:
        size = self.defaults
        rows = {
            "runs": f"{self.backend} on {self.device}, {self.dtype}",
            "pictures": f"{size.width} x {size.height} in {size.steps} of up to {self.limits.max_steps} steps",
            "edits": ", ".join(self.edit_kinds),
            "hash": self.hash[:12],
        }
        saes = Table(self.saes, ("name", "hook_point", "architecture", "d_sae", "k", "labels"))
        return card(self.name, rows, saes._repr_html_())


def _value(kind: type[T], message: Any) -> T:
    """A message as a value of its dataclass, whose fields have the message's names."""
    return kind(**{name: _field(hint, message, name) for name, hint in get_type_hints(kind).items()})


def _field(hint: Any, message: Any, name: str) -> Any:
    if name == "message":
        return message
    if isinstance(hint, UnionType):  # with None
        return _field(get_args(hint)[0], message, name) if message.HasField(name) else None
    held = getattr(message, name)
    if dataclasses.is_dataclass(hint):
        return _value(hint, held)  # type: ignore[arg-type]  # a class, which mypy cannot see
    if get_origin(hint) is tuple:
        (inner, *_) = get_args(hint)
        if dataclasses.is_dataclass(inner):
            return tuple(_value(inner, one) for one in held)  # type: ignore[arg-type]
        return tuple(UNIT_NAMES.get(one, str(one)) for one in held) if inner == Unit else tuple(held)
    if get_origin(hint) is Mapping:
        return dict(held)
    return held
