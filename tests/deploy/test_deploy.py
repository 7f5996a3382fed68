"""The image and the manifests say what the program itself says: flags, ports, names, grace, and who it runs as."""

from __future__ import annotations

import fnmatch
import itertools
import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from turbolens_server.config import ServerConfig, read_config
from turbolens_server.serving import SERVICES, Serving, load_and_serve

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy/docker/Dockerfile").read_text()
ENTRYPOINT = json.loads(re.findall(r"^ENTRYPOINT (.+)$", DOCKERFILE, re.M)[-1])
BASE = ROOT / "deploy/kubernetes/base"
GPU = ROOT / "deploy/kubernetes/overlays/gpu"
FOLDERS = pytest.mark.parametrize("folder", [BASE, GPU], ids=["base", "gpu"])


def read(path: Path) -> dict:
    """The one object of a file."""
    return yaml.safe_load(path.read_text())


def key(item: dict) -> str:
    return "mountPath" if "mountPath" in item else "name"


def merged(base, patch):
    """A strategic merge, as far as our patches go: named entries of lists are merged, null removes."""
    if isinstance(base, dict) and isinstance(patch, dict):
        both = base | {name: merged(base.get(name), value) for name, value in patch.items()}
        return {name: value for name, value in both.items() if value is not None}
    if isinstance(base, list) and isinstance(patch, list) and isinstance(patch[0], dict):
        theirs = {item[key(item)]: item for item in base}
        ours = {item[key(item)]: merged(theirs.get(item[key(item)], {}), item) for item in patch}
        return list((theirs | ours).values())
    return patch


def deployment(folder: Path) -> dict:
    """The Deployment as a folder's kustomization makes it, but for the image and the hash in the ConfigMap's name."""
    made = read(BASE / "deployment.yaml")
    return made if folder == BASE else merged(made, read(folder / "deployment.yaml"))


def container(pod: dict) -> dict:
    (only,) = pod["containers"]
    return only


def pods() -> dict[str, dict]:
    """Every pod that there is."""
    made = {folder.name: deployment(folder)["spec"]["template"]["spec"] for folder in (BASE, GPU)}
    return made | {"fetch-models": read(GPU / "fetch-models.yaml")["spec"]["template"]["spec"]}


def command(folder: Path) -> list[str]:
    """What a pod runs, with its settings read where they lie in the repository."""
    pod = deployment(folder)["spec"]["template"]["spec"]
    generated = read(folder / "kustomization.yaml")["configMapGenerator"][0]
    (volume,) = (v["name"] for v in pod["volumes"] if v.get("configMap", {}).get("name") == generated["name"])
    (mount,) = (m["mountPath"] for m in container(pod)["volumeMounts"] if m["name"] == volume)
    mounted = {f"{mount}/{name}": str(folder / name) for name in generated["files"]}
    assert container(pod).keys().isdisjoint({"command"})  # the image's own
    assert not mounted.keys().isdisjoint(container(pod)["args"])
    return [*ENTRYPOINT, *(mounted.get(argument, argument) for argument in container(pod)["args"])]


def settings(folder: Path) -> ServerConfig:
    name, verb, *flags = command(folder)
    assert (name, verb) == ("turbolens", "serve")
    return read_config(flags, {})


def test_the_program_takes_every_flag_and_setting():
    base, gpu = settings(BASE), settings(GPU)
    for config in (base, gpu):
        assert (config.host, config.log_format) == ("0.0.0.0", "json")
    assert (base.model, base.sae) == ("mini", ())
    assert (gpu.device, gpu.variant) == ("cuda", "fp16")
    pod = deployment(GPU)["spec"]["template"]["spec"]
    (models,) = (m["mountPath"] for m in container(pod)["volumeMounts"] if m["name"] == "models")
    fetched = container(pods()["fetch-models"])["args"][0]
    for path in (gpu.model, *gpu.sae):
        assert path.startswith(f"{models}/")
        assert f"--local-dir {path}" in fetched


def test_wrong_flags_would_be_seen():
    with pytest.raises(SystemExit):
        read_config([*command(BASE)[2:], "--no-such-flag", "1"], {})


@FOLDERS
def test_ports_agree(folder):
    port = settings(folder).port
    server = container(deployment(folder)["spec"]["template"]["spec"])
    (service,) = read(BASE / "service.yaml")["spec"]["ports"]
    (allowed,) = read(BASE / "networkpolicy.yaml")["spec"]["ingress"][0]["ports"]
    assert [int(exposed) for exposed in re.findall(r"^EXPOSE (\d+)$", DOCKERFILE, re.M)] == [port]
    assert server["ports"] == [{"name": "grpc", "containerPort": port}]
    assert (service["port"], service["targetPort"], allowed["port"]) == (port, "grpc", "grpc")
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["grpc"]["port"] == port


@FOLDERS
def test_probes_ask_for_services_that_the_server_tells_of(folder):
    server = container(deployment(folder)["spec"]["template"]["spec"])
    assert server["startupProbe"]["grpc"]["service"] in SERVICES
    assert server["readinessProbe"]["grpc"]["service"] in SERVICES
    assert server["livenessProbe"]["grpc"]["service"] == ""  # the process: alive while it loads


@FOLDERS
def test_nothing_in_flight_is_killed(folder):
    pod = deployment(folder)["spec"]["template"]["spec"]
    pause = float(container(pod)["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= pause + settings(folder).grace_s + 10


def test_a_first_start_on_a_gpu_has_the_time_that_it_takes():
    spec = deployment(GPU)["spec"]
    probe = container(spec["template"]["spec"])["startupProbe"]
    allowed = probe["periodSeconds"] * probe["failureThreshold"]
    assert 300 <= allowed < spec["progressDeadlineSeconds"]


@pytest.mark.parametrize("name", ["base", "gpu", "fetch-models"])
def test_no_pod_may_more_than_it_needs(name):
    pod = pods()[name]
    uid, gid = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.M)[-1]
    assert int(uid) > 0
    assert f"--uid {uid}" in DOCKERFILE
    context = pod["securityContext"]
    assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (int(uid), int(gid), int(gid))
    assert context["runAsNonRoot"] is True
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container(pod)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False


@pytest.mark.parametrize("name", ["base", "gpu", "fetch-models"])
def test_what_is_written_has_a_volume(name):
    pod = pods()[name]
    volumes = {volume["name"] for volume in pod["volumes"]}
    writable = {m["mountPath"] for m in container(pod)["volumeMounts"] if not m.get("readOnly")}
    assert {m["name"] for m in container(pod)["volumeMounts"]} == volumes
    assert {"/cache", "/tmp"} <= writable
    environment = dict(re.findall(r"\b(HOME|XDG_CACHE_HOME|[A-Z]+_CACHE_DIR|HF_HOME)=(\S+)", DOCKERFILE))
    assert len(environment) == 5
    assert all(Path(path).is_relative_to("/cache") for path in environment.values())


def test_kubernetes_sets_no_settings_of_ours():
    """For a Service named turbolens it would set TURBOLENS_PORT to an address."""
    with pytest.raises(ValueError, match="TURBOLENS_PORT"):
        read_config([], {"TURBOLENS_PORT": "tcp://10.0.0.1:50051"})
    for folder in (BASE, GPU):
        assert deployment(folder)["spec"]["template"]["spec"]["enableServiceLinks"] is False


def test_everything_selects_the_same_pods():
    spec = deployment(BASE)["spec"]
    label = {"app.kubernetes.io/name": "turbolens"}
    assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"] == label
    assert read(BASE / "service.yaml")["spec"]["selector"] == label
    assert read(BASE / "poddisruptionbudget.yaml")["spec"]["selector"]["matchLabels"] == label
    assert read(BASE / "networkpolicy.yaml")["spec"]["podSelector"]["matchLabels"] == label
    fetch = read(GPU / "fetch-models.yaml")["spec"]["template"]
    assert "labels" not in fetch.get("metadata", {})  # no Service finds it


def test_the_gpu_overlay_changes_what_the_base_has():
    base, patch = read(BASE / "deployment.yaml"), read(GPU / "deployment.yaml")
    assert (patch["kind"], patch["metadata"]["name"]) == (base["kind"], base["metadata"]["name"])
    pod, changed = (one["spec"]["template"]["spec"] for one in (base, patch))
    assert container(changed)["name"] == container(pod)["name"]
    assert container(merged(pod, changed))["resources"]["limits"]["nvidia.com/gpu"] == 1
    claims = {claim["metadata"]["name"] for claim in yaml.safe_load_all((GPU / "volumes.yaml").read_text())}
    for one in (merged(pod, changed), pods()["fetch-models"]):
        wanted = {v["persistentVolumeClaim"]["claimName"] for v in one["volumes"] if "persistentVolumeClaim" in v}
        assert wanted
        assert wanted <= claims
    (ours,), (theirs,) = (read(folder / "kustomization.yaml")["images"] for folder in (GPU, BASE))
    assert ours["name"] == theirs["newName"]
    assert container(pods()["fetch-models"])["image"] == f"{ours['name']}:{ours['newTag']}"
    assert container(pod)["image"] == theirs["name"]


@FOLDERS
def test_a_kustomization_names_every_file_beside_it(folder):
    made = read(folder / "kustomization.yaml")
    named = {*made["resources"], *(patch["path"] for patch in made.get("patches", ()))}
    named |= {name for generator in made["configMapGenerator"] for name in generator["files"]}
    assert all((folder / name).exists() for name in named)
    by_hand = {"kustomization.yaml", "fetch-models.yaml"}
    assert {path.name for path in folder.iterdir()} - by_hand == {name for name in named if "/" not in name}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
@FOLDERS
def test_kustomize_itself_makes_the_same_deployment(folder):
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True)
    (made,) = (one for one in yaml.safe_load_all(done.stdout) if one["kind"] == "Deployment")

    def in_order(value):
        if isinstance(value, dict):
            return {name: in_order(one) for name, one in value.items()}
        if isinstance(value, list) and isinstance(value[0], dict) and key(value[0]) in value[0]:
            return sorted(map(in_order, value), key=lambda one: one[key(one)])
        return value

    ours = in_order(deployment(folder))
    theirs = in_order(made)
    pod = theirs["spec"]["template"]["spec"]
    images = {BASE: "registry.example.com/turbolens:0.1.0-cpu", GPU: "registry.example.com/turbolens:0.1.0-cuda"}
    assert container(pod)["image"] == images[folder]
    container(pod)["image"] = "turbolens"
    for volume in pod["volumes"]:
        if "configMap" in volume:
            volume["configMap"]["name"] = re.sub("-[a-z0-9]{10}$", "", volume["configMap"]["name"])
    assert theirs == ours


def test_the_image_gets_what_it_is_built_from():
    copied = [
        name
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.M)
        for name in line.split()[:-1]
    ]  # fmt: skip
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == let_in
    assert all((ROOT / name).exists() for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {*project["tool"]["setuptools"]["packages"]["find"]["where"]} <= let_in
    assert {project["project"]["readme"], *project["project"]["license-files"]} <= let_in
    assert "--constraint constraints.txt '.[server]'" in DOCKERFILE


def test_an_installed_package_has_every_file_that_the_repository_has():
    """Setuptools takes a folder for a package where its name could be one; what lies in others has to be named."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    missing = []
    for where in tool["packages"]["find"]["where"]:
        for path in (ROOT / where).rglob("*"):
            *folders, name = path.relative_to(ROOT / where).parts
            if path.is_dir() or path.suffix in (".py", ".pyi", ".pyc") or ".egg-info/" in str(path):
                continue
            package = list(itertools.takewhile(str.isidentifier, folders))
            inside = "/".join([*folders[len(package) :], name])
            wanted = tool["package-data"].get("*" if package == folders else ".".join(package), ())
            if not any(fnmatch.fnmatch(inside, pattern) for pattern in wanted):
                missing.append(str(path))
    assert not missing


async def test_the_probes_see_a_server_that_loads_and_then_serves():
    config = settings(BASE)
    probes = [
        container(pods()["base"])[f"{name}Probe"]["grpc"]["service"] for name in ("startup", "readiness", "liveness")
    ]
    up, down = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    serving = Serving(config)
    port = await serving.start("127.0.0.1:0")
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            ask = health_pb2_grpc.HealthStub(channel).Check

            async def states():
                return [(await ask(health_pb2.HealthCheckRequest(service=name))).status for name in probes]

            assert await states() == [down, down, up]
            await load_and_serve(serving, config)
            assert await states() == [up, up, up]
    finally:
        await serving.stop(0)
