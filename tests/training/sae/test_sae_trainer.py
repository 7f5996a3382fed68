from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from turbolens_training.checkpoints import terminated
from turbolens_training.sae.boards import Kind, open_board
from turbolens_training.sae.config import SaeConfig
from turbolens_training.sae.maths import decode, pre_activations, top_k
from turbolens_training.sae.train import dead_share
from turbolens_training.sae.trainer import SaeTraining

CPU = torch.device("cpu")
CONFIG = SaeConfig(
    d_sae=96, k=4, steps=60, batch=64, warm_up=5, dead_tokens=128, steps_per_chunk=3, tokens_per_image=8, reservoir=256
)


class Sparse:
    """Tokens made of a few of many directions, off centre and far from unit scale."""

    identity = kind = "sparse"

    def __init__(self) -> None:
        self.widths = {"a": 16, "b": 24}

    def tokens(self, index: int, per_image: int) -> dict[str, torch.Tensor]:
        found = {}
        for name, width in self.widths.items():
            directions = torch.randn(40, width, generator=torch.Generator().manual_seed(width))
            g = torch.Generator().manual_seed(index)
            which = torch.randint(40, (10 * per_image, 3), generator=g)
            found[name] = 5 * directions[which].sum(1) + 100
        return found


def flat(state: object) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in flat(value)]
    return [torch.tensor(state)] if isinstance(state, int | float) and not isinstance(state, bool) else []


@pytest.fixture(scope="module")
def whole() -> SaeTraining:
    """A run that never stopped."""
    run = SaeTraining(CONFIG, Sparse(), CPU)
    run.train(60)
    return run


@pytest.mark.parametrize("stop", random.Random(0).sample(range(1, 60), 3))
def test_a_run_resumed_at_any_step_is_bit_equal_to_one_that_never_stopped(
    whole: SaeTraining, stop: int, tmp_path: Path
) -> None:
    first = SaeTraining(CONFIG, Sparse(), CPU)
    first.train(60, checkpoint=tmp_path / "state.pt", stop=lambda: first.step == stop)
    second = SaeTraining(CONFIG, Sparse(), CPU)
    second.resume(tmp_path / "state.pt")
    assert second.step == stop
    second.train(60, checkpoint=tmp_path / "state.pt")

    ours, theirs = flat(whole.state_dict()), flat(second.state_dict())
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    # The comparison means something: AuxK is on.
    assert any(len(trainer["dead"]) for trainer in whole.state_dict()["trainers"].values())
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["block"]) for line in lines] == [(25, "a"), (25, "b"), (50, "a"), (50, "b")]
    assert all(line["l0"] <= CONFIG.k and 0 <= line["dead"] <= 1 for line in lines)


def test_the_log_loses_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    run = SaeTraining(CONFIG, Sparse(), CPU)
    run.train(20, checkpoint=tmp_path / "state.pt")
    (tmp_path / "log.jsonl").write_text('{"step": 10}\n{"step": 30}\n')
    SaeTraining(CONFIG, Sparse(), CPU).resume(tmp_path / "state.pt")
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 10}\n'


def test_a_run_ended_before_its_first_checkpoint_leaves_no_line_in_the_log(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 25}\n{"step": 50}\n')
    assert not SaeTraining(CONFIG, Sparse(), CPU).resume(tmp_path / "state.pt")
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_a_checkpoint_is_due_by_time_too(tmp_path: Path) -> None:
    often = SaeTraining(dataclasses.replace(CONFIG, checkpoint_minutes=1e-9), Sparse(), CPU)
    seldom = SaeTraining(CONFIG, Sparse(), CPU)
    for name, run in (("often", often), ("seldom", seldom)):
        saved: list[int] = []
        run.save = lambda path, run=run, saved=saved: saved.append(run.step)  # type: ignore[method-assign]
        run.train(60, checkpoint=tmp_path / name / "state.pt")
        assert saved == ([25, 50, 60] if name == "often" else [60])


def test_the_log_is_shown_on_a_board_too(tmp_path: Path) -> None:
    class Kept:
        def __init__(self) -> None:
            self.numbers: dict[int, dict[str, float]] = {}

        def add(self, step: int, numbers: Mapping[str, float]) -> None:
            self.numbers[step] = dict(numbers)

        def close(self) -> None: ...

    run = SaeTraining(CONFIG, Sparse(), CPU)
    run.board = board = Kept()
    run.train(60, checkpoint=tmp_path / "state.pt")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert list(board.numbers) == [25, 50]
    for line in lines:
        shown = {what: board.numbers[line["step"]][f"{line['block']}/{what}"] for what in ("explained", "l0", "dead")}
        assert shown == {what: line[what] for what in shown}


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_board_whose_library_is_not_there_is_named(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=f"--board {kind}: is not installed.*pip install {kind}"):
        open_board(kind, tmp_path, {})


def test_each_board_is_written_by_its_own_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    run = SimpleNamespace(log=lambda numbers, step: told.append((step, numbers)), finish=lambda: told.append("end"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda dir, config: told.append(config) or run))
    writer = SimpleNamespace(add_scalar=lambda *given: told.append(given), close=lambda: told.append("end"))
    tensorboard = SimpleNamespace(SummaryWriter=lambda folder: told.append(folder) or writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    for kind in ("wandb", "tensorboard"):
        board = open_board(kind, tmp_path, {"k": 4})
        board.add(25, {"a/l0": 3.0})
        board.close()
    assert told == [{"k": 4}, (25, {"a/l0": 3.0}), "end", str(tmp_path), ("a/l0", 3.0, 25), "end"]


class Signalling(Sparse):
    """Tokens, and a SIGTERM with one of the chunks."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._at = at

    def tokens(self, index: int, per_image: int) -> dict[str, torch.Tensor]:
        if index == self._at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().tokens(index, per_image)


@pytest.mark.parametrize(("chunk", "steps"), [(1, 0), (8, 15)])
def test_sigterm_leaves_a_checkpoint(chunk: int, steps: int, tmp_path: Path) -> None:
    """Also while the reservoirs fill, when there is nothing to keep yet."""
    checkpoint = tmp_path / "state.pt"
    run = SaeTraining(CONFIG, Signalling(chunk), CPU)
    before = signal.getsignal(signal.SIGTERM)
    with terminated() as stop:
        run.train(60, checkpoint=checkpoint, stop=stop)
    assert signal.getsignal(signal.SIGTERM) is before
    assert run.step == steps
    assert checkpoint.exists() == (steps > 0)
    if steps:
        second = SaeTraining(CONFIG, Sparse(), CPU)
        second.resume(checkpoint)
        assert second.step == steps


class Broken(Sparse):
    """Tokens, with a NaN in those of block b from some chunk on."""

    def tokens(self, index: int, per_image: int) -> dict[str, torch.Tensor]:
        found = super().tokens(index, per_image)
        if index >= 6:
            found["b"][:, 3] = torch.nan
        return found


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_its_batch(tmp_path: Path) -> None:
    run = SaeTraining(CONFIG, Broken(), CPU)
    with pytest.raises(ArithmeticError, match=r"b, step \d+: the loss is not finite; its batch is in .*safetensors"):
        run.train(60, checkpoint=tmp_path / "state.pt")
    (path,) = tmp_path.glob("not-finite-b-*.safetensors")
    batch = load_file(path)["batch"]
    assert batch.shape == (CONFIG.batch, 24)
    assert batch.isnan().any()
    assert run.step > 0
    assert all(tensor.isfinite().all() for tensor in run.trainers["b"].export().weights.tensors().values())


def test_a_checkpoint_of_other_settings_or_another_model_is_refused(tmp_path: Path) -> None:
    run = SaeTraining(CONFIG, Sparse(), CPU)
    run.train(3, checkpoint=tmp_path / "state.pt")
    with pytest.raises(ValueError, match="another k"):
        SaeTraining(dataclasses.replace(CONFIG, k=5), Sparse(), CPU).resume(tmp_path / "state.pt")
    other = Sparse()
    other.identity = "another model"
    with pytest.raises(ValueError, match="another source"):
        SaeTraining(CONFIG, other, CPU).resume(tmp_path / "state.pt")


def test_training_explains_the_data_with_unit_rows_and_k_features() -> None:
    run = SaeTraining(CONFIG, Sparse(), CPU)
    run.train(1)
    start = run.trainers["a"].progress().explained
    run.train(60)
    for name, trainer in run.trainers.items():
        progress = trainer.progress()
        assert progress.l0 <= CONFIG.k
        assert progress.explained > max(0.5, start)
        weights = trainer.export().weights
        assert (weights.W_dec.norm(dim=1) - 1).abs().max() < 1e-5
        # Folded weights work on tokens as they come.
        x = Sparse().tokens(10_000, 8)[name]
        error = x - decode(top_k(pre_activations(weights, x), CONFIG.k), weights.W_dec) - weights.b_dec
        assert error.square().sum() < 0.5 * (x - x.mean(0)).square().sum()


def test_the_dead_clock_counts_tokens() -> None:
    run = SaeTraining(CONFIG, Sparse(), CPU)
    run.train(7)
    idle = run.trainers["a"].idle
    assert set(idle.tolist()) <= {64 * n for n in range(8)}
    assert (idle == 0).any()


def test_a_feature_that_never_was_active_is_dead_however_short_the_run() -> None:
    tokens = CONFIG.steps * CONFIG.batch
    idle = torch.tensor([0, CONFIG.dead_tokens - 1, CONFIG.dead_tokens, tokens])
    assert dead_share(torch.zeros(4), idle, CONFIG) == 0.5
    assert dead_share(torch.tensor([0, 0, 0, 1]), idle, CONFIG) == 0.25  # held-out data lift it
    for longer in (tokens, tokens + 1, 10**9):
        assert dead_share(torch.zeros(4), idle, dataclasses.replace(CONFIG, dead_tokens=longer)) == 0.25


def test_the_rate_warms_up_and_decays() -> None:
    config = SaeConfig(steps=100, warm_up=10, decay_share=0.2, learning_rate=1.0)
    assert config.rate(0) == pytest.approx(0.1)
    assert config.rate(50) == 1.0
    assert config.rate(99) == pytest.approx(1 / 20)
