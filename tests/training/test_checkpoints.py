"""The last whole checkpoint is taken, whatever became of the files beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from turbolens_server.files import WriteError
from turbolens_training.checkpoints import CheckpointError, add_rows, cut_log, previous, read_states, save_state


def state(step: int) -> dict[str, object]:
    return {"step": step, "x": torch.arange(5000.0) + step}


def steps(path: Path) -> list[int]:
    return [found["step"] for found in read_states(path, "cpu", ["x"])]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a run that saved at steps 1, 2 and 3."""
    for step in (1, 2, 3):
        save_state(tmp_path / "work" / "state.pt", state(step))
    return tmp_path / "work" / "state.pt"


def test_the_last_two_are_kept(path: Path) -> None:
    assert steps(path) == [3, 2]
    assert sorted(file.name for file in path.parent.iterdir()) == ["state.previous.pt", "state.pt"]
    assert steps(path.with_name("other.pt")) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: content[:9000] + bytes([content[9000] ^ 1]) + content[9001:],  # one bit of a number
        lambda content: b"junk" * 100,
    ],
    ids=["half", "all but a byte", "empty", "a bit", "junk"],
)
def test_a_damaged_checkpoint_is_left_out_and_told(
    path: Path, damage: Callable[[bytes], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    path.write_bytes(damage(path.read_bytes()))
    assert steps(path) == [2]
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "state.pt: damaged (" in told
    assert "going on from state.previous.pt, of step 2" in told
    previous(path).write_bytes(damage(previous(path).read_bytes()))
    with pytest.raises(CheckpointError, match=r"state\.pt: damaged .*previous\.pt: damaged .*delete it") as caught:
        steps(path)
    assert "\n" not in str(caught.value)


def test_a_run_killed_between_two_names_is_whole(path: Path) -> None:
    path.replace(previous(path))
    assert steps(path) == [3]


def test_a_file_of_another_kind_is_no_checkpoint(path: Path) -> None:
    torch.save([1, 2], path)
    torch.save({"step": 1}, previous(path))
    with pytest.raises(CheckpointError, match=r"state\.pt: no checkpoint of such a run; .*previous\.pt: no checkpoint"):
        steps(path)


def test_a_full_disk_leaves_the_checkpoints_as_they_were(path: Path, full_disk) -> None:
    with (
        full_disk(1000),
        pytest.raises(WriteError, match=r"state\.pt: cannot be written .*; the last checkpoint is as"),
    ):
        save_state(path, state(4))
    assert steps(path) == [3, 2]
    assert len(list(path.parent.iterdir())) == 2


def test_what_a_killed_run_left_is_removed(path: Path) -> None:
    (path.parent / ".state.pt-0123abcd").write_text("half")
    save_state(path, state(4))
    assert steps(path) == [4, 3]
    assert len(list(path.parent.iterdir())) == 2


def test_a_log_is_cut_to_the_checkpoint_and_to_whole_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.jsonl"
    cut_log(log, 3)
    add_rows(log, [{"step": 10}, {"step": 20}, {"step": 30}])
    with log.open("ab") as file:
        file.write(b'{"step": 15, "bl\xff')
    cut_log(log, 20)
    assert log.read_text() == '{"step": 10}\n{"step": 20}\n'
    assert capsys.readouterr().err == f"{log}: 1 line not whole, left out\n"
    cut_log(log, 20)
    assert capsys.readouterr().err == ""


def test_a_line_after_one_that_was_cut_off_is_a_line_of_its_own(tmp_path: Path, full_disk) -> None:
    log = tmp_path / "log.jsonl"
    add_rows(log, [{"step": 1}])
    with full_disk(20), pytest.raises(WriteError, match=r"log\.jsonl: cannot be written"):
        add_rows(log, [{"step": 2, "name": "x" * 30}])
    add_rows(log, [{"step": 3}])
    lines = log.read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 1}
    assert json.loads(lines[-1]) == {"step": 3}
