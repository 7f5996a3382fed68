"""What a rendered chart says of its pods, and the certificate that it asks for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from benchmarks.places import ROOT

CHART: Final = ROOT / "deploy/helm/turbolens"
RELEASE: Final = "lens"
NAMESPACE: Final = "ns"
_ENTRYPOINT: Final = re.compile(r"^FROM \S+ AS server$.*?^ENTRYPOINT (.+?)$", re.M | re.S)


@dataclasses.dataclass(frozen=True)
class Manifests:
    """The objects of one rendering."""

    objects: list[dict[str, Any]]

    def one(self, kind: str, name: str | None = None) -> dict[str, Any]:
        """The one object of a kind."""
        (found,) = (one for one in self.objects if one["kind"] == kind and name in (None, one["metadata"]["name"]))
        return found

    @property
    def deployment(self) -> dict[str, Any]:
        """Of the servers."""
        return self.one("Deployment", f"{RELEASE}-turbolens")

    @property
    def pod(self) -> dict[str, Any]:
        """The spec of its pods."""
        spec: dict[str, Any] = self.deployment["spec"]["template"]["spec"]
        return spec

    @property
    def revision(self) -> str:
        """Changes with whatever makes Kubernetes roll the pods."""
        return hashlib.sha256(json.dumps(self.deployment["spec"]["template"], sort_keys=True).encode()).hexdigest()[:8]

    @property
    def command(self) -> list[str]:
        """What a pod runs: the image's own entry point and the manifest's arguments."""
        match = _ENTRYPOINT.search((ROOT / "deploy/docker/Dockerfile").read_text())
        assert match is not None
        return [*json.loads(match[1]), *self.pod["containers"][0]["args"]]

    def files(self, secrets: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
        """What is mounted, by path: ConfigMaps of the rendering, and Secrets given by name."""
        volumes = {volume["name"]: volume for volume in self.pod["volumes"]}
        found: dict[str, str] = {}
        for mount in self.pod["containers"][0]["volumeMounts"]:
            volume = volumes[mount["name"]]
            if "configMap" in volume:
                data: Mapping[str, str] = self.one("ConfigMap", volume["configMap"]["name"])["data"]
            elif "secret" in volume:
                data = secrets[volume["secret"]["secretName"]]
            else:
                continue
            found |= {f"{mount['mountPath']}/{name}": text for name, text in data.items()}
        return found

    def environment(self) -> dict[str, str]:
        """The container's variables, with what Kubernetes fills in."""
        container = self.pod["containers"][0]
        found = {}
        for one in container["env"]:
            if "value" in one:
                found[one["name"]] = one["value"]
            else:
                what = one["valueFrom"]["resourceFieldRef"]["resource"].removeprefix("limits.")
                found[one["name"]] = container["resources"]["limits"][what]
        return found


def helm_template(release: str, chart: Path, values: Mapping[str, Any]) -> Manifests:
    """Render a chart with helm."""
    command = [str(Path(sys.prefix) / "bin/helm"), "template", release, str(chart), "--namespace", NAMESPACE, "-f", "-"]
    done = subprocess.run(command, input=json.dumps(values), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr)
    return Manifests([one for one in yaml.safe_load_all(done.stdout) if one])


def render(values: Mapping[str, Any]) -> Manifests:
    """Render the chart that serves."""
    return helm_template(RELEASE, CHART, values)


def certificate(names: list[str], folder: Path) -> dict[str, str]:
    """The Secret that cert-manager would make of a Certificate: signed by an authority of our own."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, capture_output=True, check=True)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=rehearsal", "-days", "1")
    openssl("req", *key, "-keyout", "tls.key", "-out", "tls.csr", "-subj", f"/CN={names[0]}")
    (folder / "names").write_text("subjectAltName=" + ",".join(f"DNS:{name}" for name in names))
    openssl("x509", "-req", "-in", "tls.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "1",
            "-extfile", "names", "-out", "tls.crt")  # fmt: skip
    return {name: (folder / name).read_text() for name in ("tls.crt", "tls.key", "ca.crt")}
