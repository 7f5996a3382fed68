"""The charts as they are rendered: every profile, and every option in some variant."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
SERVING = ROOT / "deploy/helm/turbolens"
TRAINING = ROOT / "deploy/helm/turbolens-training"
DOCKERFILE = (ROOT / "deploy/docker/Dockerfile").read_text()
BIN = Path(sys.prefix) / "bin"
DIGEST = "sha256:" + "a" * 64
Objects = list[dict[str, Any]]

PROFILES: dict[str, tuple[str, ...]] = {"mini": ("mini",), "gpu": ("gpu",), "fleet": ("gpu", "fleet")}
FETCHED = {
    "name": "sdxl-turbo",
    "repo": "stabilityai/sdxl-turbo",
    "revision": "0" * 40,
    "include": ["*.json", "*/*.fp16.safetensors"],
    "sha256": {"model_index.json": "1" * 64, "unet/diffusion_pytorch_model.fp16.safetensors": "2" * 64},
}
MONITORED = {name: {"enabled": True} for name in ("podMonitor", "rules", "dashboard")}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mini": ("mini", {}),
    "gpu": ("gpu", {}),
    "fleet": ("fleet", {}),
    "secure": (
        "mini",
        {
            "image": {"digest": DIGEST, "pullSecrets": ["registry"]},
            "tls": {
                "enabled": True,
                "existingSecret": "tls",
                "clientCA": {"enabled": True, "existingSecret": "callers"},
            },
            "auth": {"existingSecret": "tokens", "clientSecret": "mine"},
            "autoscaling": {"kind": "hpa", "min": 2, "max": 6},
            "monitoring": MONITORED,
            "studio": {"enabled": True},
        },
    ),
    "gateway": (
        "mini",
        {
            "tls": {
                "enabled": True,
                "certManager": {"enabled": True, "issuer": "ours", "dnsNames": ["lens.example.com"]},
            },
            "gateway": {
                "enabled": True,
                "parentRefs": [{"name": "public", "sectionName": "https"}],
                "hostnames": ["lens.example.com"],
                "backendCA": "our-ca",
            },
            "models": {"volume": {"kind": "image", "image": f"registry.example.com/models@{DIGEST}"}},
            "settings": {"model": "/models/mini", "sae": ["/models/saes"], "batch_wait_ms": 2.5, "warm_up": False},
            "studio": {"enabled": True, "tokenSecret": "studio", "hosts": ["lens.example.com"]},
            "nodeSelector": {"kind": "fast"},
            "tolerations": [{"key": "spot", "operator": "Exists"}],
            "priorityClassName": "high",
            "runtimeClassName": "gvisor",
            "podLabels": {"team": "lens"},
            "podAnnotations": {"team": "lens"},
            "env": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
            "networkPolicy": {"egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}]},
        },
    ),
    "tensorrt": (
        "gpu",
        {
            "gpu": {"resource": "nvidia.com/mig-3g.40gb"},
            "models": {"fetch": [FETCHED], "hubTokenSecret": "hub"},
            "engines": {"build": True, "batches": [1, 8]},
            "settings": {"backend": "tensorrt", "dtype": "float16", "size": 512, "force_sae": True},
        },
    ),
}
TRAINING_VARIANTS: dict[str, dict[str, Any]] = {
    "job": {},
    "trainjob": {"train": {"kind": "trainjob", "cached": True}, "collect": {"enabled": True}},
    "mini": {
        "gpu": {"enabled": False},
        "data": {"model": "mini", "variant": None, "prompts": "scenes", "hook_points": ["up.0.0", "up.0.1"]},
        "train": {"nodes": 2, "settings": {"gates": {"dead": 0.5}, "allow_below_gates": True}},
        "collect": {"enabled": True, "workers": 2, "chunks": 8},
        "volume": {"claim": "ours"},
    },
}


def helm(*arguments: str, values: dict[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
    """Run helm; `values` come on top of all files."""
    given = ("-f", "-") if values is not None else ()
    text = json.dumps(values) if values is not None else None
    return subprocess.run(
        [str(BIN / "helm"), *arguments, *given], input=text, capture_output=True, text=True, check=False
    )


def files(profile: str) -> list[str]:
    """The arguments that name a profile's files."""
    return [part for name in PROFILES[profile] for part in ("-f", str(SERVING / f"profiles/{name}.yaml"))]


def template(profile: str, values: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Render the serving chart."""
    return helm("template", "tl", str(SERVING), "--namespace", "ns", *files(profile), values=values)


def objects_of(done: subprocess.CompletedProcess[str]) -> Objects:
    """The objects that were rendered."""
    assert done.returncode == 0, done.stderr
    return [one for one in yaml.safe_load_all(done.stdout) if one is not None]


@functools.cache
def serving(variant: str) -> Objects:
    """The objects of a variant of the serving chart."""
    return objects_of(template(*VARIANTS[variant]))


@functools.cache
def training(variant: str) -> Objects:
    """The objects of a variant of the training chart."""
    return objects_of(
        helm("template", "run", str(TRAINING), "--namespace", "ns", values=TRAINING_VARIANTS[variant])
    )  # fmt: skip


def everything() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object of every variant of both charts, with what to call it."""
    for name in VARIANTS:
        yield from ((f"{name}/{one['kind']}/{one['metadata']['name']}", one) for one in serving(name))
    for name in TRAINING_VARIANTS:
        yield from ((f"training-{name}/{one['kind']}/{one['metadata']['name']}", one) for one in training(name))


def one_of(objects: Objects, kind: str, name: str | None = None) -> dict[str, Any]:
    """The one object of a kind."""
    (found,) = (one for one in objects if one["kind"] == kind and name in (None, one["metadata"]["name"]))
    return found


def server_pod(objects: Objects) -> dict[str, Any]:
    """The pod of the servers."""
    return one_of(objects, "Deployment", "tl-turbolens")["spec"]["template"]["spec"]


def server(objects: Objects) -> dict[str, Any]:
    """The container of a server."""
    (only,) = server_pod(objects)["containers"]
    return only


def settings(objects: Objects) -> dict[str, Any]:
    """What the server's file of settings says."""
    return tomllib.loads(one_of(objects, "ConfigMap", "tl-turbolens")["data"]["turbolens.toml"])


def pods_in(value: Any) -> Iterator[dict[str, Any]]:
    """Every pod's spec inside an object, whatever holds it."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        for inner in value.values():
            yield from pods_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pods_in(inner)


def containers_of(pod: dict[str, Any]) -> list[dict[str, Any]]:
    """All containers of a pod."""
    return [*pod.get("initContainers", ()), *pod["containers"]]


def entrypoints() -> dict[str, list[str]]:
    """Of each stage of the image that has one."""
    found: dict[str, list[str]] = {}
    stage = ""
    for line in DOCKERFILE.splitlines():
        if match := re.match(r"FROM .+ AS (\S+)", line):
            stage = match[1]
        elif line.startswith("ENTRYPOINT "):
            found[stage] = json.loads(line.removeprefix("ENTRYPOINT "))
    return found
