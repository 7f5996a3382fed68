"""The training chart runs the commands of one machine, with settings that they take."""

from __future__ import annotations

import shlex

import pytest
import tyro
import yaml

from tests.deploy import charts
from turbolens_training.activations.config import FillCacheConfig
from turbolens_training.cli import CacheConfig
from turbolens_training.sae.config import SaeConfig

VARIANTS = pytest.mark.parametrize("variant", charts.TRAINING_VARIANTS)
FULL = "run-turbolens-training"


def sae(variant: str) -> SaeConfig:
    """The settings of `turbolens train sae --config FILE`, read by the program itself."""
    from turbolens_training.cli import _as_flags

    text = charts.one_of(charts.training(variant), "ConfigMap")["data"]["sae.yaml"]
    return tyro.cli(SaeConfig, args=_as_flags(yaml.safe_load(text)))


def fill(variant: str) -> FillCacheConfig:
    """The settings of the collecting job."""
    words = shlex.split(charts.one_of(charts.training(variant), "RayJob")["spec"]["entrypoint"])
    assert words[:4] == ["turbolens", "train", "cache", "fill"]
    made = tyro.cli(CacheConfig, args=words[3:]).action
    assert isinstance(made, FillCacheConfig)
    return made


def container(variant: str) -> dict:
    """What each node of the training runs."""
    objects = charts.training(variant)
    holder = charts.one_of(objects, "TrainingRuntime" if variant == "trainjob" else "Job")
    ((only,),) = (pod["containers"] for pod in charts.pods_in(holder))
    return only


@VARIANTS
def test_the_program_takes_every_setting(variant):
    made = sae(variant)
    (mount,) = (one["mountPath"] for one in container(variant)["volumeMounts"] if one["name"] == "work")
    for path in (made.out, made.work, *([made.cache] if made.cache else [])):
        assert str(path).startswith(f"{mount}/")  # what must outlive a pod is on the volume


@VARIANTS
def test_nodes_run_the_command_of_one_machine_under_torchrun(variant):
    only = container(variant)
    assert only["command"] == ["torchrun"]
    at = only["args"].index("--no-python")
    assert only["args"][at + 1 :] == ["turbolens", "train", "sae", "--config", "/etc/turbolens/config/sae.yaml"]
    from torch.distributed.run import get_args_parser

    made = get_args_parser().parse_args(only["args"])
    assert made.training_script == "turbolens"


def test_ranks_find_each_other_by_a_name_that_there_is():
    objects = charts.training("job")
    job, service = charts.one_of(objects, "Job"), charts.one_of(objects, "Service")
    pod = job["spec"]["template"]
    host, port = next(a for a in container("job")["args"] if a.startswith("--rdzv-endpoint="))[16:].split(":")
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"  # index 0 of an indexed Job
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert int(port) == service["spec"]["ports"][0]["port"] == container("job")["ports"][0]["containerPort"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"]


def test_what_is_collected_is_what_is_trained_on():
    """The key of a cache is made of these; and where it is, is the same place."""
    collected, trained = fill("trainjob"), sae("trainjob")
    assert collected.cache == trained.cache
    for name in ("model", "variant", "prompts", "hook_points", "seed", "images", "one_step_share", "multi_steps"):
        assert getattr(collected, name) == getattr(trained, name)
    assert collected.workers == 4


def test_a_run_can_be_stopped_and_taken_up():
    for variant in charts.TRAINING_VARIANTS:
        objects = charts.training(variant)
        (claim,) = {
            volume["persistentVolumeClaim"]["claimName"]
            for one in objects
            for pod in charts.pods_in(one)
            for volume in pod["volumes"]
            if volume["name"] == "work"
        }
        made = [one for one in objects if one["kind"] == "PersistentVolumeClaim"]
        if claim == FULL:
            (volume,) = made
            assert volume["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
            assert volume["spec"]["accessModes"] == ["ReadWriteMany"]
        else:
            assert not made
    pod = charts.one_of(charts.training("job"), "Job")["spec"]["template"]["spec"]
    asked = next(a for a in container("job")["args"] if a.startswith("--shutdown-timeout="))
    assert pod["terminationGracePeriodSeconds"] > int(asked.partition("=")[2])
