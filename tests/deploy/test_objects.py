"""Every object that the charts make is what Kubernetes and the operators take, and keeps to the rules of a cluster."""

from __future__ import annotations

import itertools
import json
import re

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.deploy import charts, crds

KUBERNETES = ("1.30", "1.37")
NEEDS_NEWER = {"gateway"}
"""Variants with a volume of an image."""
OBJECTS = [pytest.param(one, id=name) for name, one in charts.everything()]


@pytest.mark.parametrize("chart", [charts.SERVING, charts.TRAINING], ids=lambda path: path.name)
def test_helm_finds_no_fault(chart):
    done = charts.helm("lint", "--strict", str(chart))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout


@pytest.mark.parametrize("profile", charts.PROFILES)
def test_a_profile_renders_for_the_oldest_kubernetes_that_the_chart_names(profile):
    arguments = ["template", "tl", str(charts.SERVING), *charts.files(profile)]
    assert charts.objects_of(charts.helm(*arguments, "--kube-version", "1.30.0"))
    assert "1.29" in charts.helm(*arguments, "--kube-version", "1.29.0").stderr


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_takes_every_object(version):
    """Strictly: an unknown field is an error, as it is for `kubectl apply --validate=strict`."""
    seen: set[str] = set()
    for name, one in charts.everything():
        text = json.dumps(one, sort_keys=True)
        if text in seen or (version == KUBERNETES[0] and name.partition("/")[0] in NEEDS_NEWER):
            continue
        seen.add(text)
        try:
            kubernetes_validate.validate(one, version, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            crds.check(one)
            for pod in charts.pods_in(one):
                inside = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "inside"}, "spec": pod}
                kubernetes_validate.validate(inside, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            pytest.fail(f"{name}: {'.'.join(map(str, error.path))}: {error.message}")
    assert len(seen) > 30


def test_a_wrong_field_would_be_seen():
    made = json.loads(json.dumps(charts.one_of(charts.serving("fleet"), "Deployment")))
    made["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]["grpc"]["servce"] = ""
    with pytest.raises(kubernetes_validate.ValidationError, match="servce"):
        kubernetes_validate.validate(made, "1.37", strict=True)
    for kind, variant in (("ScaledObject", "fleet"), ("PodMonitor", "gpu"), ("GRPCRoute", "gateway")):
        made = charts.one_of(charts.serving(variant), kind)
        with pytest.raises((AssertionError, jsonschema.ValidationError), match="nonsense"):
            crds.check(made | {"spec": made["spec"] | {"nonsense": 1}})


@pytest.mark.parametrize("one", OBJECTS)
def test_no_pod_may_more_than_it_needs(one):
    """The `restricted` standard of Kubernetes, a read-only root besides, and no token of the API's."""
    uid = int(re.findall(r"^USER (\d+):\1$", charts.DOCKERFILE, re.M)[-1])
    assert uid > 0
    for pod in charts.pods_in(one):
        context = pod["securityContext"]
        assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (uid, uid, uid)
        assert context["runAsNonRoot"] is True
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        assert pod.keys().isdisjoint({"hostNetwork", "hostPID", "hostIPC"})
        assert all("hostPath" not in volume for volume in pod["volumes"])
        for container in charts.containers_of(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


@pytest.mark.parametrize("one", OBJECTS)
def test_every_container_has_its_share_and_no_more(one):
    for pod in charts.pods_in(one):
        for container in charts.containers_of(pod):
            asked, most = container["resources"]["requests"], container["resources"]["limits"]
            assert asked.keys() >= {"cpu", "memory"}
            assert "memory" in most
            assert not any(name.startswith("nvidia.com/") for name in asked)  # a limit is the request, for those


@pytest.mark.parametrize("one", OBJECTS)
def test_what_is_written_has_a_volume(one):
    written = dict(re.findall(r"\b(HOME|XDG_CACHE_HOME|[A-Z]+_CACHE_DIR|HF_HOME)=(\S+)", charts.DOCKERFILE))
    assert len(written) == 5
    assert all(path.startswith("/cache") for path in written.values())
    for pod in charts.pods_in(one):
        volumes = {volume["name"] for volume in pod["volumes"]}
        mounted = set()
        for container in charts.containers_of(pod):
            mounted |= {mount["name"] for mount in container["volumeMounts"]}
            writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
            assert "/tmp" in writable
            paths = sorted(mount["mountPath"] for mount in container["volumeMounts"])
            # The mount point of one inside another would have to be made on a read-only volume.
            assert not any(b.startswith(f"{a}/") for a, b in itertools.pairwise(paths))
        assert mounted == volumes


@pytest.mark.parametrize("variant", charts.VARIANTS)
def test_everything_selects_the_servers_and_nothing_else(variant):
    objects = charts.serving(variant)
    label = charts.one_of(objects, "Deployment", "tl-turbolens")["spec"]["selector"]["matchLabels"]
    assert label["app.kubernetes.io/component"] == "server"
    for one in objects:
        spec = one.get("spec", {})
        if one["metadata"]["labels"]["app.kubernetes.io/component"] != "server":
            continue
        if one["kind"] == "Service":
            assert spec["selector"] == label
        if one["kind"] in ("PodDisruptionBudget", "PodMonitor"):
            assert spec["selector"]["matchLabels"] == label
        if one["kind"] == "NetworkPolicy":
            assert spec["podSelector"]["matchLabels"] == label
    test = charts.one_of(objects, "Pod", "tl-turbolens-test")["metadata"]["labels"]
    assert test["app.kubernetes.io/component"] == "test"


def test_every_object_has_the_labels_that_tools_look_for():
    for name, one in charts.everything():
        labels = one["metadata"]["labels"]
        assert {"app.kubernetes.io/name", "app.kubernetes.io/instance", "helm.sh/chart"} <= labels.keys(), name


def test_the_notes_give_a_first_call_that_python_takes():
    for variant, (profile, values) in charts.VARIANTS.items():
        done = charts.helm(
            "install", "tl", str(charts.SERVING), "--dry-run=client", "--namespace", "ns",
            *charts.files(profile), values=values,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        notes = done.stdout.partition("NOTES:\n")[2]
        code = re.search(r"^  import turbolens as tl\n.+?(?=^\S)", notes, re.M | re.S)
        assert code is not None, variant
        compile(re.sub("^  ", "", code[0], flags=re.M), variant, "exec")
        assert ("token=" in code[0]) == bool(values.get("auth"))
        assert ("tls=" in code[0]) == bool(values.get("tls"))


def test_the_rules_in_the_chart_are_those_that_are_tested():
    made = charts.one_of(charts.serving("gpu"), "PrometheusRule")["spec"]
    assert made == yaml.safe_load((charts.SERVING / "files/rules.yaml").read_text())
