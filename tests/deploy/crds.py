"""Schemas of the custom resources that the charts make, strict: a key that they do not know is an error.

Where the operator's own types are on PyPI, those are taken. Of the others this page has the fields that we use, as they
are in Gateway API 1.4 and KubeRay 1.6.
"""

from __future__ import annotations

from typing import Any

import jsonschema
from cloudcoil.models.cert_manager.v1 import Certificate
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule
from kubeflow_trainer_api.models import TrainerV1alpha1TrainingRuntime, TrainerV1alpha1TrainJob
from pydantic import BaseModel

_MODELS: dict[str, type[BaseModel]] = {
    "Certificate": Certificate,
    "PodMonitor": PodMonitor,
    "PrometheusRule": PrometheusRule,
    "ScaledObject": ScaledObject,
    "TrainJob": TrainerV1alpha1TrainJob,
    "TrainingRuntime": TrainerV1alpha1TrainingRuntime,
}
_NEWER = {"ScaledObject": ("spec", "fallback", "behavior")}
"""What is newer than the types: KEDA 2.17 has it, and the package that fits Python 3.11 is of 2.16."""


def _object(*required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "additionalProperties": False, "properties": properties}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


_TEXT = {"type": "string", "minLength": 1}
_WHOLE = {"type": "integer"}
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_POD = _object("metadata", "spec", metadata={"type": "object"}, spec={"type": "object"})
"""What is inside is checked as a pod of its own."""
_GROUP = _object("template", "groupName", "minReplicas", "maxReplicas", template=_POD, groupName=_TEXT,
                 replicas=_WHOLE, minReplicas=_WHOLE, maxReplicas=_WHOLE, rayStartParams=_TEXTS)  # fmt: skip
_PARENT = _object("name", name=_TEXT, namespace=_TEXT, sectionName=_TEXT, group=_TEXT, kind=_TEXT, port=_WHOLE)
_METHOD = _object(service=_TEXT, method=_TEXT, type={"enum": ["Exact", "RegularExpression"]})
_REFERENCE = _object("group", "kind", "name", group={"type": "string"}, kind=_TEXT, name=_TEXT)
_SPECS: dict[tuple[str, str], dict[str, Any]] = {
    ("gateway.networking.k8s.io/v1", "GRPCRoute"): _object(
        parentRefs=_list(_PARENT), hostnames=_list(_TEXT),
        rules=_list(_object(
            matches=_list(_object(method=_METHOD)), backendRefs=_list(_object("name", name=_TEXT, port=_WHOLE)),
        )),
    ),
    ("gateway.networking.k8s.io/v1", "BackendTLSPolicy"): _object(
        "targetRefs", "validation", targetRefs=_list(_REFERENCE),
        validation=_object("hostname", hostname=_TEXT, caCertificateRefs=_list(_REFERENCE)),
    ),
    ("ray.io/v1", "RayJob"): _object(
        entrypoint=_TEXT, backoffLimit=_WHOLE, shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished=_WHOLE,
        rayClusterSpec=_object(
            "headGroupSpec", headGroupSpec=_object("template", template=_POD, rayStartParams=_TEXTS),
            workerGroupSpecs=_list(_GROUP),
        ),
    ),
}  # fmt: skip


def _without(value: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    name, *rest = path
    if name not in value:
        return value
    if not rest:
        return {key: one for key, one in value.items() if key != name}
    return value | {name: _without(value[name], tuple(rest))}


def _without_pods(value: Any) -> Any:
    """The same with the least of pods in it: they are checked as pods of their own."""
    if isinstance(value, dict):
        if "containers" in value:
            return {"containers": [{"name": one["name"]} for one in value["containers"]]}
        return {name: _without_pods(one) for name, one in value.items()}
    return [_without_pods(one) for one in value] if isinstance(value, list) else value


def check(made: dict[str, Any]) -> None:
    """Raise where an object is not what its custom resource takes."""
    kind = made["kind"]
    if (model := _MODELS.get(kind)) is None:
        jsonschema.validate(made["spec"], _SPECS[made["apiVersion"], kind])
        return
    known = _without_pods(_without(made, _NEWER[kind]) if kind in _NEWER else made)
    read = model.model_validate(known).model_dump(by_alias=True, exclude_unset=True, mode="json")
    assert _same(read, known), f"{kind}: {known} was read as {read}"


def _same(read: Any, given: Any) -> bool:
    """Whether nothing was left out; numbers that may be texts count as those."""
    if isinstance(given, dict):
        return isinstance(read, dict) and all(name in read and _same(read[name], one) for name, one in given.items())
    if isinstance(given, list):
        return isinstance(read, list) and len(read) == len(given) and all(map(_same, read, given))
    return str(read) == str(given)
