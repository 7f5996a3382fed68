"""Steering files: edits, the references that they read and named groups of features, in JSON or YAML.

The schema is `turbolens.steering/1`, which the studio writes and reads too:

    schema: turbolens.steering/1
    groups:
      warm: {up.0.1/202: 1.0, up.0.0/3: 0.5}
    references:
      other: {prompt: a big yellow star, seed: 7}
    edits:
      - {group: warm, add: {strength: 8}, steps: {start: 0, end: 1}}
      - {features: [up.0.1/7], scale: {factor: 0}}
      - {patch: {hookPoints: [up.0.0]}, reference: other}

and, where the file is of one picture, its `prompt`, `seed` and `steps`. An edit is the contract's `Edit` as JSON; its
features may be named by a group, a list, or a mapping to weights. A group stands for its features, and for their
weights where the kind of edit has any.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from turbolens._edits import Edit, FeatureRef, Features, edits_from_json, edits_to_json, terms_of, to_ref
from turbolens._files import write_whole
from turbolens._numbers import number, text, whole_or_none
from turbolens._run import Reference, reference

SCHEMA: Final = "turbolens.steering/1"
"""Kind and version of a steering file."""
_KIND, _VERSION = SCHEMA.split("/")
_FIELDS: Final = ("schema", "prompt", "seed", "steps", "references", "groups", "edits")
_YAML: Final = (".yaml", ".yml")
_WITHOUT_WEIGHTS: Final = "scale"
Group = Mapping[FeatureRef, float]


@dataclasses.dataclass(frozen=True, slots=True)
class Steering:
    """What a steering file holds: `lens.generate(prompt, **steering.options())` applies it."""

    edits: tuple[Edit, ...] = ()
    groups: Mapping[str, Group] = dataclasses.field(default_factory=dict)
    """By name, features and their weights."""
    references: Mapping[str, Reference] = dataclasses.field(default_factory=dict)
    prompt: str | None = None
    """Of the picture that it was made on; None: of none, here and below."""
    seed: int | None = None
    steps: int | None = None

    def options(self) -> dict[str, Any]:
        """The arguments that it stands for, beside the prompt and the seed."""
        return {"steer": list(self.edits), "references": dict(self.references), "steps": self.steps}

    @classmethod
    def from_json(cls, content: str) -> Steering:
        """From the text of a file in JSON.

        Raises:
            ValueError: it is none, or of a newer schema; the text says where it is wrong.
        """
        try:
            return cls.from_plain(json.loads(content))
        except json.JSONDecodeError as error:
            raise ValueError(f"no steering file: not JSON ({error})") from None

    @classmethod
    def from_plain(cls, value: Any) -> Steering:
        """From dicts and lists.

        Raises:
            ValueError: as for :meth:`from_json`.
        """
        if not isinstance(value, dict) or not isinstance(value.get("schema"), str):
            raise ValueError("no steering file: it names no schema")
        kind, _, version = value["schema"].partition("/")
        if kind != _KIND:
            raise ValueError(f"of schema {value['schema'][:60]!r}, expected {SCHEMA!r}")
        if version != _VERSION:
            raise ValueError(f"of version {version[:20]!r}; this client reads version {_VERSION}")
        if unknown := [str(name) for name in value if name not in _FIELDS]:
            raise ValueError(f"{unknown[0][:60]}: no field of a steering file; there are {', '.join(_FIELDS)}")
        at = "prompt"
        try:
            prompt = None if value.get("prompt") is None else text(value["prompt"], "it")
            at = "seed"
            seed = reference("", seed=_decimal(value.get("seed"))).seed
            at = "steps"
            steps = whole_or_none(value.get("steps"), "it")
            at = "groups"
            groups = {name: _group(group) for name, group in _named(value.get("groups")).items()}
            at = "references"
            references = {name: _reference(one) for name, one in _named(value.get("references")).items()}
            at = "edits"
            edits = edits_from_json(json.dumps([_long(edit, groups) for edit in _listed(value.get("edits"))]))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{at}: {error}") from None
        made = cls(tuple(edits), groups, references, prompt, seed, steps)
        if missing := [edit.reference for edit in edits if edit.reference and edit.reference not in references]:
            raise ValueError(f"references: no {missing[0]!r}, which an edit reads")
        return made

    def to_plain(self) -> dict[str, Any]:
        """As dicts and lists; features of an edit that are a group's are written by its name."""
        edits = json.loads(edits_to_json(self.edits))
        for edit, plain in zip(self.edits, edits, strict=True):
            if (group := self._group_of(edit)) is not None:
                del plain["features"]
                plain["group"] = group
        told: dict[str, Any] = {"schema": SCHEMA}
        told |= {} if self.prompt is None else {"prompt": self.prompt}
        told |= {} if self.seed is None else {"seed": str(self.seed)}  # as the contract's JSON: 53 bits are not enough
        told |= {} if self.steps is None else {"steps": self.steps}
        if self.references:
            told["references"] = {
                name: {"prompt": one.prompt} | ({} if one.seed is None else {"seed": str(one.seed)})
                for name, one in self.references.items()
            }
        if self.groups:
            told["groups"] = {
                name: {str(ref): weight for ref, weight in group.items()} for name, group in self.groups.items()
            }
        return told | {"edits": edits}

    def to_json(self) -> str:
        """As the text of a file in JSON."""
        return json.dumps(self.to_plain(), indent=2) + "\n"

    def lines(self) -> list[str]:
        """What it says, a line each, so that two can be compared."""
        said = [f"{name}: {getattr(self, name)!r}" for name in ("prompt", "seed", "steps")]
        said += [f"reference {name}: {one.prompt!r}, seed {one.seed}" for name, one in sorted(self.references.items())]
        for name, group in sorted(self.groups.items()):
            said += [f"group {name}: {ref} {weight:g}" for ref, weight in sorted(group.items(), key=str)]
        return said + [f"edit: {edit!r}" for edit in self.edits]

    def _group_of(self, edit: Edit) -> str | None:
        for name, group in self.groups.items():
            if edit.features and edit.features == _of_group(group, edit.kind):
                return name
        return None


def load(file: str | Path) -> Steering:
    """Read a steering file; `.yaml` and `.yml` need PyYAML.

    Raises:
        ValueError: it is none; the text says where it is wrong.
        OSError: it cannot be read.
    """
    path = Path(file)
    content = path.read_text(encoding="utf-8")
    try:
        if path.suffix.lower() not in _YAML:
            return Steering.from_json(content)
        yaml = _yaml()
        try:
            return Steering.from_plain(yaml.safe_load(content))
        except yaml.YAMLError as error:
            raise ValueError(f"no steering file: not YAML ({error})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def save(
    file: str | Path,
    edits: Sequence[Edit] | Steering,
    *,
    groups: Mapping[str, Features] | None = None,
    references: Mapping[str, Reference] | None = None,
) -> None:
    """Write a steering file, as YAML where its ending says so.

    Args:
        file: where.
        edits: edits, or all that :func:`load` read.
        groups: by name, what an edit's features are written as where it has just these.
        references: what edits read, as in `lens.generate`.

    Raises:
        ValueError: an edit reads a reference that is not there.
    """
    if isinstance(edits, Steering):
        steering = edits
    else:
        named = {name: _weighted(group) for name, group in (groups or {}).items()}
        steering = Steering(tuple(edits), named, dict(references or {}))
    plain = steering.to_plain()
    Steering.from_plain(plain)  # what cannot be read again is not written
    path = Path(file)
    if path.suffix.lower() in _YAML:
        write_whole(path, _yaml().safe_dump(plain, sort_keys=False))
    else:
        write_whole(path, steering.to_json())


def group(features: Features) -> Group:
    """Features with their weights, to use in several edits: `tl.add(group, 8)`, `tl.ablate(list(group))`."""
    return _weighted(features)


def diff(before: Steering, after: Steering) -> list[str]:
    """What differs, a line each, that of `before` after a "-" and that of `after` after a "+"; empty: nothing."""
    lines = difflib.ndiff(before.lines(), after.lines())
    return [line for line in lines if line.startswith(("-", "+"))]


def _weighted(features: Features) -> Group:
    return {ref: 1.0 if weight is None else weight for ref, weight in terms_of(features)}


def _of_group(group: Group, kind: str) -> tuple[tuple[FeatureRef, float | None], ...]:
    return tuple((ref, None if kind == _WITHOUT_WEIGHTS else weight) for ref, weight in group.items())


def _decimal(seed: Any) -> Any:
    return int(seed) if isinstance(seed, str) and seed.isascii() and seed.isdecimal() else seed


def _named(value: Any) -> dict[str, Any]:
    if value is not None and not (isinstance(value, dict) and all(isinstance(name, str) and name for name in value)):
        raise ValueError("is no mapping of names")
    return value or {}


def _listed(value: Any) -> list[Any]:
    if value is not None and not isinstance(value, list):
        raise ValueError("is no list")
    return value or []


def _group(value: Any) -> Group:
    named = dict.fromkeys(value, 1.0) if isinstance(value, list) else value
    if not isinstance(named, dict) or not named:
        raise ValueError("a group is a mapping of features to weights, or a list of features; at least one")
    return {to_ref(like): number(weight, f"the weight of {like}") for like, weight in named.items()}


def _reference(value: Any) -> Reference:
    if not isinstance(value, dict) or "prompt" not in value or value.keys() - {"prompt", "seed"}:
        raise ValueError("a reference is a prompt, and perhaps a seed")
    return reference(value["prompt"], seed=_decimal(value.get("seed")))


def _long(edit: Any, groups: Mapping[str, Group]) -> Any:
    """An edit as the contract has it."""
    if not isinstance(edit, dict):
        return edit
    plain = dict(edit)
    features = plain.get("features")
    if "group" in plain:
        name = plain.pop("group")
        if features is not None:
            raise ValueError("an edit has features or a group, not both")
        if name not in groups:
            raise ValueError(f"no group {str(name)[:60]!r}; there are {', '.join(groups) or 'none'}")
        kind = _WITHOUT_WEIGHTS if _WITHOUT_WEIGHTS in plain else ""
        plain["features"] = [_term(ref, weight) for ref, weight in _of_group(groups[name], kind)]
    elif isinstance(features, dict):
        plain["features"] = [_term(to_ref(like), number(w, f"the weight of {like}")) for like, w in features.items()]
    elif isinstance(features, list):
        plain["features"] = [_term(to_ref(one), None) if isinstance(one, str) else one for one in features]
    return plain


def _term(ref: FeatureRef, weight: float | None) -> dict[str, Any]:
    return {"feature": {"sae": ref.sae, "index": ref.index}} | ({} if weight is None else {"weight": weight})


def _yaml() -> Any:
    try:
        import yaml
    except ModuleNotFoundError:
        raise RuntimeError("steering files in YAML need PyYAML: pip install 'turbolens[yaml]'") from None
    return yaml
