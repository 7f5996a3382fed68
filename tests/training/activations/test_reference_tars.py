"""Tars as the reference's collecting script writes them, made here by hand."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from turbolens_training.activations.cache import CacheError
from turbolens_training.activations.reference_tars import import_tars, read_tar, tar_block

BLOCKS = {"down.2.1": "unet.down_blocks.2.attentions.1", "mid.0": "unet.mid_block.attentions.0"}


def pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def write_tar(path: Path, samples: list[dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, files in enumerate(samples):
            for name, content in files.items():
                info = tarfile.TarInfo(f"sample_{number}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def sample(diff: Tensor, prompts: list[str], **arguments: object) -> dict[str, bytes]:
    args = {"prompt": prompts, "num_inference_steps": diff.shape[1], "guidance_scale": 0.0, "seed": 5, **arguments}
    return {"diff.pth": pickled(diff), "gen_args.json": json.dumps(args).encode(), "output.pth": pickled(diff + 1)}


def tensors(steps: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, steps, 6, 3, 4, generator=g) for _ in range(3)]  # [B, steps, d_model, h, w]


def write_folder(folder: Path, steps: int = 4, names: dict[str, str] = BLOCKS) -> None:
    folder.mkdir(exist_ok=True)
    for module in names.values():
        write_tar(folder / f"{module}.tar", [sample(diff, [f"p{i}", "q"]) for i, diff in enumerate(tensors(steps))])
    write_tar(folder / "images.tar", [{"images.npy": b""}])


def test_tars_become_a_cache_of_the_same_updates(tmp_path: Path) -> None:
    write_folder(tmp_path / "tars")
    cache = import_tars(tmp_path / "tars", tmp_path / "cache")
    assert cache.shards() == [0, 1, 2]
    assert not list(cache.problems())
    shard, diff = cache.read(1), tensors(4)[1]
    assert shard.captions == ("p1", "q")
    assert shard.seeds == (5, 5)
    assert shard.timesteps == (999, 749, 499, 249)
    assert set(shard.by_block) == set(BLOCKS)
    for at_steps in shard.by_block.values():
        for step, update in enumerate(at_steps):
            for position in range(12):
                there = diff[:, step, :, position // 4, position % 4]
                assert torch.equal(update[:, position], there.half())
    assert import_tars(tmp_path / "tars", tmp_path / "cache").key == cache.key


def test_both_names_of_tars_and_both_shapes_are_read(tmp_path: Path) -> None:
    assert tar_block(Path("x/unet.up_blocks.0.attentions.1.tar")) == "up.0.1"
    assert tar_block(Path("x/up_0_1.tar")) == "up.0.1"
    assert tar_block(Path("mid_0.tar")) == "mid.0"
    assert tar_block(Path("images.tar")) is None
    diff = tensors(1)[0]
    write_tar(tmp_path / "down_2_1.tar", [sample(diff[:, 0], ["a", "b"], seed_per_sample=[7, 8])])
    (read,) = read_tar(tmp_path / "down_2_1.tar")
    assert read.seeds == (7, 8)
    assert torch.equal(read.updates[0], diff[:, 0].flatten(2).transpose(1, 2))


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"diff.pth": pickle.dumps(Harmful())}, r"sample_0\.diff\.pth: not a plain tensor"),
        ({"diff.pth": b"junk"}, r"sample_0\.diff\.pth: not a plain tensor"),
        ({"diff.pth": pickled({"a": 1})}, r"expected a tensor"),
        ({"diff.pth": None}, r"sample_0: lacks diff\.pth"),
        ({"gen_args.json": b"{}"}, r"gen_args\.json: no prompts and seed"),
        ({"gen_args.json": b"[1"}, r"gen_args\.json: no prompts and seed"),
        ({"gen_args.json": b'{"prompt": ["a"], "seed": 1}'}, r"1 prompts and 2 seeds for 2 pictures"),
        ({"gen_args.json": b'{"prompt": "ab", "seed": 1}'}, r"no prompts and seed in it .*no lists"),
        ({"gen_args.json": b'{"prompt": ["a", null], "seed": 1}'}, r"gen_args\.json: a prompt is None, expected text"),
        ({"gen_args.json": b'{"prompt": ["a", 5], "seed": 1}'}, r"a prompt is 5, expected text"),
        (
            {"gen_args.json": b'{"prompt": ["a", "b"], "seed": 9223372036854775808}'},
            r"a seed is 9223372036854775808, expected",
        ),
        ({"gen_args.json": b'{"prompt": ["a", "b"], "seed": -1}'}, r"a seed is -1, expected a whole number from 0"),
        ({"gen_args.json": b'{"prompt": ["a", "b"], "seed": 1.5}'}, r"a seed is 1\.5, expected a whole number"),
        ({"gen_args.json": b'{"prompt": ["a", "b"], "seed": null}'}, r"a seed is None, expected a whole number"),
        ({"diff.pth": pickled(torch.zeros(2, 1001, 1, 1, 1))}, r"1001 steps, expected floats of 1 to 1000"),
        ({"diff.pth": pickled(torch.zeros(2, 1, 1, 1, 1, dtype=torch.int64))}, r"int64 of 1 steps, expected floats"),
    ],
)
def test_a_bad_sample_is_one_line_and_runs_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes | None], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    mixed = {**sample(tensors(1)[0], ["a", "b"]), **files}
    write_tar(tmp_path / "mid_0.tar", [{name: content for name, content in mixed.items() if content is not None}])
    with pytest.raises(CacheError, match=message) as caught:
        list(read_tar(tmp_path / "mid_0.tar"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "harmed").exists()


def test_tars_that_disagree_or_are_cut_short_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path)
    path = tmp_path / "unet.mid_block.attentions.0.tar"
    write_tar(path, [sample(tensors(4)[0], ["other", "q"])])
    with pytest.raises(CacheError, match=r"mid_block\.attentions\.0\.tar: has no sample_0 of the same prompts"):
        import_tars(tmp_path, tmp_path / "cache")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(CacheError, match=r"cannot be read as a tar|not a plain tensor"):
        list(read_tar(path))
    with pytest.raises(CacheError, match="no tar named after a block"):
        import_tars(tmp_path / "cache", tmp_path / "cache")


def test_a_cache_is_known_by_every_byte_of_its_tars(tmp_path: Path) -> None:
    """Two tars of one length that differ in their last prompt alone are two caches."""
    keys = set()
    for name in ("one", "two"):
        write_folder(tmp_path / name)
        for module in BLOCKS.values():
            path = tmp_path / name / f"{module}.tar"
            content = path.read_bytes()
            assert content.count(b'"p2"') == 1
            path.write_bytes(content if name == "one" else content.replace(b'"p2"', b'"x2"'))
        keys.add(import_tars(tmp_path / name, tmp_path / "cache").key)
    assert len(keys) == 2


def test_a_tar_that_ends_before_the_others_is_refused(tmp_path: Path) -> None:
    """The first one too, whose end would otherwise be the end of all."""
    write_folder(tmp_path)
    first = tmp_path / "unet.down_blocks.2.attentions.1.tar"
    write_tar(first, [sample(diff, [f"p{i}", "q"]) for i, diff in enumerate(tensors(4)[:2])])
    with pytest.raises(CacheError, match=r"mid_block\.attentions\.0\.tar: has a sample_2 that .*down_blocks.* lacks"):
        import_tars(tmp_path, tmp_path / "cache")


def test_a_tar_cut_between_two_files_is_no_shorter_tar(tmp_path: Path) -> None:
    write_folder(tmp_path)
    path = tmp_path / "unet.mid_block.attentions.0.tar"
    with tarfile.open(path) as tar:
        end = next(member.offset for member in tar if member.name.startswith("sample_2"))
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(CacheError, match=r"mid_block\.attentions\.0\.tar: .* cut off"):
        import_tars(tmp_path, tmp_path / "cache")


def test_two_tars_of_one_block_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path)
    write_tar(tmp_path / "mid_0.tar", [sample(tensors(1)[0], ["a", "b"])])
    with pytest.raises(CacheError, match=r"attentions\.0\.tar: is of mid\.0, as mid_0\.tar is"):
        import_tars(tmp_path, tmp_path / "cache")
