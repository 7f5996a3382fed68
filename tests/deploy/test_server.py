"""The manifests say what the program itself says: settings, ports, probes, grace, and the engines that it looks for."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import socket

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.deploy import charts
from tests.deploy.test_monitoring import questions
from turbolens_server.config import ServerConfig, read_config
from turbolens_server.loading.engine_cli import Build
from turbolens_server.serving import SERVICES, Serving, load_and_serve

VARIANTS = pytest.mark.parametrize("variant", charts.VARIANTS)
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


def config(variant: str, tmp_path) -> ServerConfig:
    """The settings that a pod's command and file come to, read by the program itself."""
    objects = charts.serving(variant)
    path = tmp_path / "turbolens.toml"
    path.write_text(charts.one_of(objects, "ConfigMap", "tl-turbolens")["data"]["turbolens.toml"])
    (mount,) = (m["mountPath"] for m in charts.server(objects)["volumeMounts"] if m["name"] == "config")
    arguments = charts.server(objects)["args"]
    assert arguments == ["--config", f"{mount}/turbolens.toml"]
    name, verb, *flags = charts.entrypoints()["server"]
    assert (name, verb) == ("turbolens", "serve")
    environment = {one["name"]: one.get("value", "1") for one in charts.server(objects)["env"]}
    return read_config([*flags, "--config", str(path)], environment)


@VARIANTS
def test_the_program_takes_every_flag_and_setting(variant, tmp_path):
    made = config(variant, tmp_path)
    assert (made.host, made.log_format) == ("0.0.0.0", "json")
    given = charts.settings(charts.serving(variant))
    assert {name: list(value) if isinstance(value := getattr(made, name), tuple) else value for name in given} == given


def test_wrong_settings_would_be_seen(tmp_path):
    (tmp_path / "wrong.toml").write_text("no_such_setting = 1\n")
    with pytest.raises(ValueError, match="no_such_setting"):
        read_config(["--config", str(tmp_path / "wrong.toml")], {})


@VARIANTS
def test_no_variable_of_a_pod_is_taken_for_a_setting(variant):
    """Only what is one may begin like one; the SDK's own variables are told apart by name."""
    fields = {f"TURBOLENS_{field.name.upper()}" for field in dataclasses.fields(ServerConfig)}
    for variable in charts.server(charts.serving(variant))["env"]:
        assert not variable["name"].startswith("TURBOLENS_") or variable["name"] in fields
    with pytest.raises(ValueError, match="TURBOLENS_PORT"):  # as Kubernetes would set for a Service of this name
        read_config([], {"TURBOLENS_PORT": "tcp://10.0.0.1:50051"})


@VARIANTS
def test_ports_agree(variant):
    objects = charts.serving(variant)
    given = charts.settings(objects)
    ports = {one["name"]: one["containerPort"] for one in charts.server(objects)["ports"]}
    wanted = {"grpc": "port", "health": "health_port", "metrics": "metrics_port"}
    assert ports == {name: given[setting] for name, setting in wanted.items()}
    exposed = [int(port) for port in re.findall(r"^EXPOSE (.+)$", charts.DOCKERFILE, re.M)[-1].split()]
    assert set(exposed) == {*ports.values()}
    for one in objects:
        if one["kind"] == "Service" and one["metadata"]["labels"]["app.kubernetes.io/component"] == "server":
            assert [(port["port"], port["targetPort"]) for port in one["spec"]["ports"]] == [(ports["grpc"], "grpc")]
    policy = charts.one_of(objects, "NetworkPolicy")["spec"]["ingress"]
    assert [[port["port"] for port in rule["ports"]] for rule in policy] == [["grpc"], ["metrics"]]


@VARIANTS
def test_probes_ask_in_the_clear_for_services_that_the_server_tells_of(variant):
    objects = charts.serving(variant)
    server = charts.server(objects)
    asked = {name: server[name]["grpc"] for name in PROBES}
    assert {probe["port"] for probe in asked.values()} == {charts.settings(objects)["health_port"]}
    assert asked["startupProbe"]["service"] in SERVICES
    assert asked["readinessProbe"]["service"] in SERVICES
    assert asked["livenessProbe"]["service"] == ""  # the process: alive while it loads


@VARIANTS
def test_nothing_in_flight_is_killed(variant):
    objects = charts.serving(variant)
    pod = charts.server_pod(objects)
    pause = charts.server(objects)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= pause + charts.settings(objects)["grace_s"] + 10


@VARIANTS
def test_a_start_has_the_time_that_it_takes(variant):
    """The probe waits for it, the rollout does, and an autoscaler takes no pod away sooner than one could start."""
    objects = charts.serving(variant)
    probe = charts.server(objects)["startupProbe"]
    allowed = probe["periodSeconds"] * probe["failureThreshold"]
    spec = charts.one_of(objects, "Deployment", "tl-turbolens")["spec"]
    assert spec["progressDeadlineSeconds"] > allowed + spec["template"]["spec"]["terminationGracePeriodSeconds"]
    if charts.server(objects)["resources"]["limits"].keys() & {"nvidia.com/gpu", "nvidia.com/mig-3g.40gb"}:
        assert allowed >= 300
    longest = allowed + charts.settings(objects)["grace_s"]
    for behavior in (_behavior(one) for one in objects):
        assert behavior is None or behavior["scaleDown"]["stabilizationWindowSeconds"] > longest


def _behavior(one):
    match one["kind"]:
        case "HorizontalPodAutoscaler":
            return one["spec"]["behavior"]
        case "ScaledObject":
            return one["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    return None


@VARIANTS
def test_an_autoscaler_is_not_fought_by_a_number_of_replicas(variant):
    objects = charts.serving(variant)
    scaled = any(_behavior(one) for one in objects)
    assert ("replicas" in charts.one_of(objects, "Deployment", "tl-turbolens")["spec"]) is not scaled


@VARIANTS
def test_what_is_named_in_the_settings_is_mounted(variant):
    objects = charts.serving(variant)
    given = charts.settings(objects)
    mounts = [mount["mountPath"] for mount in charts.server(objects)["volumeMounts"]]
    paths = [given[name] for name in ("tls_cert", "tls_key", "tls_client_ca", "tokens") if name in given]
    paths += [path for path in (given["model"], *given.get("sae", ())) if path.startswith("/")]
    assert all(any(path.startswith(f"{mount}/") for mount in mounts) for path in paths)


def test_engines_are_built_of_what_is_served():
    """Every setting that both commands have is the same for both: the key of an engine is made of them."""
    objects = charts.serving("tensorrt")
    (build,) = (one for one in charts.server_pod(objects)["initContainers"] if one["name"] == "engines")
    assert build["command"] == ["turbolens", "engine", "build"]
    import tyro

    made = tyro.cli(Build, args=build["args"])
    given = charts.settings(objects)
    shared = {field.name for field in dataclasses.fields(Build)} & given.keys()
    assert shared >= {"model", "sae", "variant", "dtype", "size", "force_sae"}
    for name in shared:
        value = getattr(made, name)
        assert (list(value) if isinstance(value, tuple) else value) == given[name], name
    assert made.batches == (1, 8)
    assert build["env"] == charts.server(objects)["env"]
    assert build["volumeMounts"] == charts.server(objects)["volumeMounts"]
    assert build["resources"]["limits"]["nvidia.com/mig-3g.40gb"] == 1


def test_fetched_folders_are_those_of_the_settings():
    objects = charts.serving("tensorrt")
    fetch = next(one for one in charts.server_pod(objects)["initContainers"] if one["name"].startswith("fetch-"))
    assert charts.settings(objects)["model"] == fetch["args"][1] == "/models/sdxl-turbo"
    (mount,) = (one for one in fetch["volumeMounts"] if one["name"] == "models")
    assert not mount.get("readOnly")
    assert fetch["args"][2:4] == [charts.FETCHED["repo"], charts.FETCHED["revision"]]


def test_the_test_makes_a_picture_as_the_command_line_does():
    import tyro

    from turbolens.cli.pictures import Generate

    for variant in charts.VARIANTS:
        objects = charts.serving(variant)
        (container,) = charts.one_of(objects, "Pod", "tl-turbolens-test")["spec"]["containers"]
        assert container["command"] == ["turbolens", "generate"]
        made = tyro.cli(Generate, args=container["args"])
        assert str(made.out).startswith("/tmp/")
        target = {one["name"]: one.get("value") for one in container["env"]}["TURBOLENS_TARGET"]
        service = charts.one_of(objects, "Service", "tl-turbolens")
        assert target == f"{service['metadata']['name']}.ns.svc:{service['spec']['ports'][0]['port']}"


def test_the_studio_takes_what_its_pod_says():
    import tyro

    from turbolens_studio import cli

    name, verb, *flags = charts.entrypoints()["studio"]
    assert (name, verb) == ("turbolens", "studio")
    for variant in ("secure", "gateway"):
        objects = charts.serving(variant)
        pod = charts.one_of(objects, "Deployment", "tl-turbolens-studio")["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        made = tyro.cli(cli.StudioConfig, args=[*flags, *container["args"]])
        assert (made.host, made.port, made.open) == ("0.0.0.0", container["ports"][0]["containerPort"], False)
        variables = {one["name"] for one in container["env"]}
        assert cli.TARGET_VARIABLE in variables
        assert (cli.PAGE_TOKEN_VARIABLE in variables) == (made.allow_host == ("lens.example.com",))


async def test_the_probes_see_a_server_that_loads_and_then_serves(tmp_path):
    probes = [charts.server(charts.serving("mini"))[name]["grpc"]["service"] for name in PROBES]
    up, down = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = dataclasses.replace(config("mini", tmp_path), host="127.0.0.1", health_port=port, metrics_port=0)
    serving = Serving(made)
    await serving.start("127.0.0.1:0")
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            ask = health_pb2_grpc.HealthStub(channel).Check

            async def states():
                return [(await ask(health_pb2.HealthCheckRequest(service=name))).status for name in probes]

            assert await states() == [down, down, up]
            await load_and_serve(serving, made)
            assert await states() == [up, up, up]
            _holds_the_questions_to(serving.metrics.registry)
    finally:
        await serving.stop(0)


def _holds_the_questions_to(registry) -> None:
    """Alerts, dashboard and autoscalers ask for series that this server has, by labels that they have."""
    told = list(registry.collect())
    names = {*(sample.name for metric in told for sample in metric.samples)}
    # A counter or histogram with labels has no sample before the first.
    kinds = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    names |= {f"{metric.name}{end}" for metric in told for end in kinds.get(metric.type, ())}
    for who, question in questions().items():
        asked = set(re.findall(r"(?<![\w:])turbolens_\w+", question))
        assert asked <= names, f"{who}: {asked - names}"
    (build,) = (sample for metric in told for sample in metric.samples if sample.name == "turbolens_build_info")
    assert build.labels["version"]


def test_a_changed_setting_rolls_the_pods():
    def checksum(**values):
        objects = charts.objects_of(charts.template("mini", values))
        return charts.one_of(objects, "Deployment")["spec"]["template"]["metadata"]["annotations"]["checksum/settings"]

    assert checksum() == checksum(replicas=5)
    assert checksum() != checksum(settings={"max_batch": 4})
    assert checksum() != checksum(timing={"graceSeconds": 40})


def test_settings_reach_the_program_as_they_were_written(tmp_path):
    awkward = {"model": 'a "quoted" \\ <path> é', "sae": ["up.0.0=/models/a b", "x"], "batch_wait_ms": 0.5}
    awkward |= {"warm_up": False, "max_queue_pictures": 1_000_000}
    objects = charts.objects_of(charts.template("mini", {"settings": awkward}))
    path = tmp_path / "turbolens.toml"
    path.write_text(charts.one_of(objects, "ConfigMap")["data"]["turbolens.toml"])
    made = read_config(["--config", str(path)], {})
    assert json.loads(json.dumps({name: getattr(made, name) for name in awkward})) == awkward


def test_this_page_would_see_a_setting_that_the_build_no_longer_has():
    assert {"model", "sae", "force_sae", "variant", "dtype", "size", "cache"} <= inspect.signature(
        Build
    ).parameters.keys()
