"""Every call of the SDK, and each kind of answer, on a real server; run with each pair of versions that the SDK allows
by `make test-versions`, where this environment has the SDK alone."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import turbolens as tl

PROMPT = "a big red star on the left, night background"
SAE = "mid.0"
EDIT = tl.add((SAE, 3), 40.0, unit="raw")


def test_the_model_tells_of_itself(lens):
    model = lens.model()
    assert model.name == "mini"
    assert SAE in [sae.name for sae in model.saes]


def test_pictures_and_features_come_back_and_are_the_same_twice(lens):
    first, again = (lens.generate(PROMPT, seed=3, features=[SAE]) for _ in range(2))
    assert np.array_equal(first.array, again.array)
    assert np.array_equal(first.features[SAE].to_dense(), again.features[SAE].to_dense())
    assert lens.extract(PROMPT, seed=3)[SAE].top(3)


def test_an_edit_moves_a_picture(lens):
    plain, steered = (lens.generate(PROMPT, seed=3, steer=steer).array.astype(int) for steer in ([], [EDIT]))
    assert np.abs(plain - steered).max() > 0


def test_streams_come_to_their_end(lens):
    kinds = [type(event) for event in lens.stream_generate(PROMPT, seed=3, steps=2)]
    assert {tl.Step, tl.PictureReady} < set(kinds)
    assert kinds[-1] is tl.Done
    assert [type(event) for event in lens.stream_features(PROMPT, seed=3)][-1] is tl.Done


def test_many_are_asked_for_at_once(lens, tmp_path):
    report = lens.extract_many([PROMPT, "a small blue ring"], tmp_path / "out.parquet")
    assert report.done == 2


def test_questions_are_answered(lens):
    found = lens.search_features("star")
    assert len(found) > 0
    assert lens.get_feature(SAE, 3).ref.index == 3
    assert len(lens.nearest_features(found[0])) > 0


def test_errors_have_their_details(lens):
    with pytest.raises(tl.InvalidRequest) as caught:
        lens.generate(PROMPT, seed=3, steps=4096)
    (violation,) = caught.value.violations
    assert violation.field == "run.sampling.steps"
    assert caught.value.request_id
    with pytest.raises(tl.NotFound):
        lens.get_feature(SAE, 999_999)


async def test_more_calls_at_once_than_a_connection_holds(target):
    """The server takes 100 at a time on one; the SDK holds the others back."""
    async with tl.aio.connect(target) as lens:
        found = await asyncio.gather(*(lens.search_features("star") for _ in range(150)), return_exceptions=True)
    assert [one for one in found if isinstance(one, Exception)] == []


def test_threads_share_a_client(lens):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda seed: lens.generate(PROMPT, seed=seed).seed, range(16)))
    assert made == list(range(16))


def test_a_child_that_was_forked_calls_too(target):
    code = (
        "import os, sys, turbolens as tl\n"
        "lens = tl.connect(sys.argv[1]); lens.model()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    tl.connect(sys.argv[1]).model(); os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0; lens.model()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, target], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_command_calls(target, tmp_path):
    command = [sys.executable, "-m", "turbolens.cli", "features", "search", "star", "--json", "--server", target]
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
