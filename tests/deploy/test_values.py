"""What the charts refuse, and that the refusal names the value."""

from __future__ import annotations

import pytest

from tests.deploy import charts

TLS = {"enabled": True, "existingSecret": "tls"}
GPU = {"gpu": {"enabled": True}, "settings": {"model": "mini", "device": "cuda"}}

# name of the case: the values, and what the message says.
WRONG = {
    "type": ({"replicas": "three"}, "/replicas"),
    "negative": ({"replicas": -1}, "/replicas"),
    "unknown": ({"replica": 3}, "'replica'"),
    "unknown-inside": ({"autoscaling": {"maximum": 3}}, "'maximum'"),
    "unknown-setting": ({"settings": {"modle": "mini"}}, "'modle'"),
    "setting-type": ({"settings": {"max_batch": "eight"}}, "/settings/max_batch"),
    "setting-choice": ({"settings": {"backend": "tensorflow"}}, "/settings/backend"),
    "setting-of-the-chart": ({"settings": {"port": 1}}, "'port'"),
    "setting-in-env": ({"env": [{"name": "TURBOLENS_PORT", "value": "1"}]}, "/env/0/name"),
    "port": ({"ports": {"grpc": 80}}, "/ports/grpc"),
    "kind": ({"autoscaling": {"kind": "vpa"}}, "/autoscaling/kind"),
    "size": ({"cache": {"size": "20 GB"}}, "/cache/size"),
    "digest": ({"image": {"digest": "latest"}}, "/image/digest"),
    "model-image-by-tag": ({"models": {"volume": {"image": "models:latest"}}}, "/models/volume/image"),
    "fetch-branch": ({"models": {"fetch": [charts.FETCHED | {"revision": "main"}]}}, "/models/fetch/0/revision"),
    "fetch-unchecked": ({"models": {"fetch": [charts.FETCHED | {"sha256": {}}]}}, "/models/fetch/0/sha256"),
    "no-limit": ({"resources": {"limits": {"memory": None}}}, "/resources/limits"),
}
CONTRADICTIONS = {
    "gpu-on-cpu": ({"gpu": {"enabled": True}, "settings": {"device": "cpu"}}, "gpu.enabled is true"),
    "cuda-without-gpu": ({"settings": {"device": "cuda"}}, "settings.device is cuda"),
    "engines-without-gpu": ({"engines": {"build": True}}, "engines.build needs gpu.enabled"),
    "engines-unused": (GPU | {"engines": {"build": True}}, "settings.backend"),
    "engines-forgotten": (
        GPU | {"engines": {"build": True}, "settings": {"backend": "tensorrt"}},
        "engines.build needs cache.kind",
    ),
    "min-above-max": ({"autoscaling": {"kind": "hpa", "min": 5, "max": 2}}, "autoscaling.min is 5"),
    "keda-of-nothing": ({"autoscaling": {"kind": "keda"}}, "autoscaling.prometheus"),
    "blind-autoscaler": ({"autoscaling": {"kind": "hpa"}, "ports": {"metrics": 0}}, "ports.metrics"),
    "hasty": (
        {"autoscaling": {"kind": "hpa", "scaleDownSeconds": 60}, "timing": {"startupSeconds": 600}},
        "autoscaling.scaleDownSeconds is 60",
    ),
    "claim-unnamed": ({"cache": {"kind": "claim"}}, "cache.claim"),
    "one-node-volume": ({"cache": {"kind": "new"}}, "cache.accessMode is ReadWriteOnce"),
    "surge-on-one-volume": ({"cache": {"kind": "new"}, "replicas": 1}, "rollout.maxSurge"),
    "rollout-stuck": ({"rollout": {"maxSurge": 0, "maxUnavailable": 0}}, "rollout.maxSurge and rollout.maxUnavailable"),
    "fetch-nowhere": ({"models": {"fetch": [charts.FETCHED]}}, "models.fetch needs models.volume.kind"),
    "image-unnamed": ({"models": {"volume": {"kind": "image"}}}, "models.volume.image"),
    "two-certificates": ({"tls": TLS | {"certManager": {"enabled": True, "issuer": "a"}}}, "take one back"),
    "no-certificate": ({"tls": {"enabled": True}}, "tls.existingSecret"),
    "no-issuer": ({"tls": {"enabled": True, "certManager": {"enabled": True}}}, "tls.certManager.issuer"),
    "tls-off": ({"tls": {"existingSecret": "tls"}}, "tls.enabled is false"),
    "token-for-nobody": ({"auth": {"clientSecret": "a"}}, "auth.clientSecret"),
    "token-in-the-clear": (
        {"auth": {"existingSecret": "a", "clientSecret": "b"}},
        "auth.clientSecret needs tls.enabled",
    ),
    "same-port": ({"ports": {"health": 50051}}, "ports."),
    "gateway-of-nothing": ({"gateway": {"enabled": True}}, "gateway.parentRefs"),
    "gateway-trusts-nobody": (
        {"gateway": {"enabled": True, "parentRefs": [{"name": "a"}]}, "tls": TLS},
        "gateway.backendCA",
    ),
    "gateway-and-mtls": (
        {"gateway": {"enabled": True, "parentRefs": [{"name": "a"}]}, "tls": TLS | {"clientCA": {"enabled": True}}},
        "tls.clientCA.enabled",
    ),
    "monitor-of-nothing": ({"monitoring": {"podMonitor": {"enabled": True}}, "ports": {"metrics": 0}}, "ports.metrics"),
}
TRAINING = {
    "too-many-ranks": ({"train": {"nodes": 8}}, "train.nodes x train.ranksPerNode is 8"),
    "two-places": ({"train": {"settings": {"out": "/tmp"}}}, "out is the chart's own"),
    "empty-cache": ({"train": {"cached": True}}, "train.cached"),
    "kind": ({"train": {"kind": "mpi"}}, "/train/kind"),
    "unknown": ({"trian": {}}, "'trian'"),
}


@pytest.mark.parametrize(("values", "told"), (WRONG | CONTRADICTIONS).values(), ids=(WRONG | CONTRADICTIONS).keys())
def test_what_cannot_be_meant_is_refused_by_name(values, told):
    done = charts.template("mini", values)
    assert done.returncode != 0
    assert told in done.stderr


def test_an_image_volume_needs_a_kubernetes_that_has_them():
    values = charts.VARIANTS["gateway"][1]
    done = charts.helm("template", "tl", str(charts.SERVING), "--kube-version", "1.30.0", values=values)
    assert "models.volume.kind is image" in done.stderr


@pytest.mark.parametrize(("values", "told"), TRAINING.values(), ids=TRAINING.keys())
def test_so_does_the_training_chart(values, told):
    done = charts.helm("template", "run", str(charts.TRAINING), values=values)
    assert done.returncode != 0
    assert told in done.stderr
