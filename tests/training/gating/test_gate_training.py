"""Training of gates: what is trained, that a run goes on where it stopped, and what is refused before any work."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from turbolens_server.gating.bundle import load_gates
from turbolens_training import cli
from turbolens_training.gating.config import GateConfig
from turbolens_training.gating.data import TwoThingScenes
from turbolens_training.gating.train import GateTraining, chosen_blocks, points_of, weights_of

SMALL = GateConfig(hidden=8, steps=4, batch=2, warm_up=1, start_bias=0.0, held_out=1, scenes=2)


@pytest.fixture(scope="module")
def run(engine) -> GateTraining:
    run = GateTraining(engine, SMALL)
    run.train_step()
    return run


def test_only_the_gates_are_trained(engine, run):
    before = GateTraining(engine, SMALL)
    moved = [bool((a != b).any()) for a, b in zip(weights_of(run.head), weights_of(before.head), strict=True)]
    assert all(moved)
    assert not any(p.requires_grad or p.grad is not None for p in engine.components.unet.parameters())


def test_the_published_stage_is_the_coarsest_grid_without_the_middle(engine):
    points = points_of(engine)
    assert chosen_blocks(points, ()) == ("down.2.0", "down.2.1", "up.0.0", "up.0.1", "up.0.2")
    assert chosen_blocks(points, ("up.0.1", "mid.0")) == ("mid.0", "up.0.1")
    with pytest.raises(ValueError, match=r"no cross-attention in down.1.0; there is in down.2.0"):
        chosen_blocks(points, ("down.1.0",))


def test_batches_are_functions_of_their_index(engine):
    draw = TwoThingScenes(engine, 0, "training", 2, 0.5)
    one, again, other = draw(3), draw(3), draw(4)
    assert torch.equal(one.sample, again.sample)
    assert torch.equal(one.target, again.target)
    assert not torch.equal(one.sample, other.sample)
    assert one.timesteps.tolist()[0] == 999


def test_without_gates_the_model_predicts_nearly_what_it_should(run):
    errors, heard = run.loss(run.held_out(0), None)
    gated, some = run.loss(run.held_out(0), run.gates)
    assert heard == 1
    assert errors.mean() < 0.1
    assert 0.2 < some < 0.8
    assert not torch.equal(errors, gated)


def test_no_gradient_reaches_a_token_that_is_closed(run):
    """What the hard mask costs: what has been closed is opened again only by what other tokens teach."""
    layer = next(iter(run.gates.layers))
    gating = run.gates.of(torch.randn(1, 5, 256, generator=torch.Generator().manual_seed(0)))
    bias = gating.bias(layer, torch.randn(1, 3, 128, generator=torch.Generator().manual_seed(1)), None)
    leaf = bias.detach().requires_grad_()
    (torch.softmax(leaf, -1) * torch.arange(5)).sum().backward()
    closed = leaf.detach() < -1
    assert closed.any()
    assert (leaf.grad[closed] == 0).all()


def test_a_run_goes_on_where_it_stopped(engine, tmp_path):
    whole = GateTraining(engine, SMALL)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole.train(tmp_path / "whole/state.pt", lambda: False)
    first = GateTraining(engine, SMALL)
    first.train(tmp_path / "parts/state.pt", lambda: first.step == 2)
    assert first.step == 2
    second = GateTraining(engine, SMALL)
    assert second.resume(tmp_path / "parts/state.pt")
    second.train(tmp_path / "parts/state.pt", lambda: False)
    for a, b in zip(weights_of(whole.head), weights_of(second.head), strict=True):
        assert torch.equal(a, b)
    other = GateTraining(engine, dataclasses.replace(SMALL, learning_rate=1.0))
    with pytest.raises(ValueError, match="of a run with another learning_rate; choose another --work"):
        other.resume(tmp_path / "parts/state.pt")


def test_from_the_command_line(tmp_path, capsys):
    out, work = tmp_path / "gates", tmp_path / "work"
    given = ["--steps", "2", "--batch", "2", "--hidden", "8", "--held-out", "1", "--scenes", "2", "--warm-up", "0"]
    command = ["gates", "--out", str(out), "--work", str(work), "--device", "cpu", *given, "--json"]
    cli.main(command)
    told = json.loads(capsys.readouterr().out)
    assert {row["heard"] for row in told["quality"]} == {"with gates", "without"}
    assert [row["heard"] for row in told["binding"]] == ["with gates", "without"]
    bundle = load_gates(out)
    assert bundle.provenance["recipe"]["steps"] == 2
    assert [json.loads(line)["step"] for line in (work / "log.jsonl").read_text().splitlines()] == [2]
    with pytest.raises(SystemExit, match=r"holds gates of an earlier run: choose another folder"):
        cli.main(command)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"steps": 0}, "steps=0, expected at least 1"),
        ({"threshold": 1.5}, "threshold=1.5, expected 0 to 1"),
        ({"closed": 0.0}, "closed=0.0, expected below 0"),
        ({"closed": -1e5}, "at least -60000"),
        ({"learning_rate": 0.0}, "learning_rate=0.0, expected above 0"),
        ({"start_bias": float("nan")}, "start_bias=nan"),
        ({"warm_up": -1}, "warm_up=-1"),
        ({"overwrite": True, "resume": True}, "choose one"),
    ],
)
def test_settings_are_refused_before_any_work(changes, told):
    with pytest.raises(ValueError, match=r"expected|choose one") as error:
        GateConfig(**changes)
    assert told in str(error.value)
