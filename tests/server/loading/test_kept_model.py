"""A start with compiled code reads what was kept of a model, and the model itself when something asks for it."""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from turbolens_server.engine.running import Running
from turbolens_server.engine.text import Encoders
from turbolens_server.engine.types import Job
from turbolens_server.loading import load
from turbolens_server.loading.errors import LoadError
from turbolens_server.loading.kept import Place, find_kept, folder_of_kept
from turbolens_server.loading.load import load_engine
from turbolens_server.unet.compiled import NAME
from turbolens_server.unet.torch_unet import TorchUNet


@pytest.fixture(scope="module")
def starts(small_model, tmp_path_factory):
    """A start that finds nothing and one after it, as functions of the cache; and the cache of both."""
    folder, saes = small_model
    cache = tmp_path_factory.mktemp("cache")

    def start(**settings):
        return load_engine(model=str(folder), saes=[str(saes)], cache=cache, ahead_of_modules=True, **settings)

    return start, cache


@pytest.fixture(scope="module")
def plain(starts):
    return starts[0]()


@pytest.fixture
def stand_in(monkeypatch, plain):
    """What stands in for compiled code, which takes minutes to make: the same model's modules, read apart."""
    read = plain.components.modules.get()
    encode = Encoders(*read.encoders, plain.device)

    def find(shape, modules, cache, reason):
        return Running(TorchUNet(read.unet, name=NAME), read.vae, reason, encode)

    monkeypatch.setattr(load, "find_packages", find)


def test_what_is_kept_tells_all_that_the_modules_tell(starts, plain, stand_in):
    ahead = starts[0]()
    assert not ahead.components.modules.are_read
    told, expected = (dataclasses.replace(one.info, saes={}, load_s=0.0, memory=None) for one in (ahead, plain))
    assert told == dataclasses.replace(expected, backend=NAME, backend_reason=load.KEPT)
    assert dataclasses.replace(ahead.info.memory, available=0) == dataclasses.replace(plain.info.memory, available=0)
    assert ahead.components.points == plain.components.points
    assert list(ahead.components.points) == list(plain.components.points)
    assert ahead.components.scheduler.config == plain.components.scheduler.config


def test_a_picture_and_its_features_need_no_modules(starts, plain, stand_in):
    ahead = starts[0]()
    job = Job("a blue star", 3, 2, *plain.info.default_size, saes=tuple(plain.info.saes))
    (a,), (b,) = ahead.run([job]), plain.run([job])
    assert not ahead.components.modules.are_read
    assert np.array_equal(a.picture, b.picture)
    assert np.array_equal(a.features[0].values, b.features[0].values)


def test_the_model_is_read_once_when_something_asks(starts, stand_in):
    ahead = starts[0]()
    unet = ahead.components.unet
    assert ahead.components.modules.are_read
    assert ahead.components.unet is unet
    assert next(unet.parameters()).dtype == torch.float32


@given(st.lists(st.text(max_size=40), min_size=1, max_size=4))
def test_tokens_are_those_of_the_models_own_tokenizers(starts, plain, texts):
    (file,) = starts[1].glob("models/*.json")
    kept = find_kept(Place(file, "", ""), folder_of_kept(plain.info.model), plain.components.modules)
    for ours, theirs in zip(kept.tokenizers, plain.components.text._tokenizers, strict=True):
        found, expected = (one(texts, truncation=False, verbose=False).input_ids for one in (ours, theirs))
        assert found == expected
        assert ours.convert_ids_to_tokens(found[0]) == theirs.convert_ids_to_tokens(expected[0])
        assert ours.get_vocab() == theirs.get_vocab()
        assert (ours.model_max_length, ours.pad_token_id) == (theirs.model_max_length, theirs.pad_token_id)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"counted": {"weights": 1}}'])
def test_what_is_damaged_is_made_again(starts, plain, stand_in, content):
    (file,) = starts[1].glob("models/*.json")
    whole = file.read_text()
    file.write_text(content)
    assert starts[0]().components.modules.are_read
    assert file.read_text() == whole
    assert not starts[0]().components.modules.are_read


def test_another_batch_is_counted_anew(plain, stand_in, tmp_path):
    settings = {"model": plain.info.model, "cache": tmp_path, "ahead_of_modules": True}
    assert [load_engine(**settings).components.modules.are_read for _ in range(2)] == [True, False]
    assert load_engine(**settings, max_batch=3).components.modules.are_read
    smaller = load_engine(**settings, max_batch=3)
    assert not smaller.components.modules.are_read
    assert smaller.info.memory.activations < plain.info.memory.activations


def test_without_compiled_code_the_modules_run(starts, plain):
    assert starts[0]().info.backend == "torch"


@pytest.mark.usefixtures("stand_in")
def test_weights_that_were_damaged_since_are_read_and_named(small_model, tmp_path):
    folder, cache = shutil.copytree(small_model[0], tmp_path / "model"), tmp_path / "cache"
    start = functools.partial(load_engine, model=str(folder), saes=[], cache=cache, ahead_of_modules=True)
    start()
    assert not start().components.modules.are_read
    (file,) = (folder / "vae").glob("*.safetensors")
    tensors = load_file(file)
    name = min(tensors)
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(LoadError, match=f"{re.escape(name)} holds values that are not finite"):
        start()


@pytest.mark.parametrize("settings", [{"backend": "torch"}, {"dtype": "bfloat16"}, {"vae": "VAE"}])
def test_what_is_not_compiled_is_read(starts, plain, stand_in, settings, small_model):
    if "vae" in settings:
        settings = {"vae": str(small_model[0] / "vae")}
    assert starts[0](**settings).components.modules.are_read


def test_what_serves_ahead_of_its_modules_imports_nothing_that_they_are_made_of():
    heavy = ("transformers", "diffusers", "torch._dynamo", "torch._inductor", "peft", "pandas")
    code = f"import sys, turbolens_server.serving; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
