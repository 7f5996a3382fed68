"""Pictures and latents that runs start from: what is wrong is named, and nothing is unpacked that need not be."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from tests import messages
from tests.server.rpc.fake_engine import an_info
from turbolens_proto.v1 import run_pb2
from turbolens_server.rpc.admission import bytes_of
from turbolens_server.rpc.errors import RpcError
from turbolens_server.rpc.validation import RequestLimits, sources, validate_generate
from turbolens_server.rpc.validation.sources import taken_steps

INFO, LIMITS = an_info(), RequestLimits()
PIXELS = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)


def coded(pixels=PIXELS, kind="PNG", **more) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **more)
    return file.getvalue()


def from_picture(data=None, *, strength=0.5, steps=2, sampling=None, references=None, edits=(), **image):
    run = run_pb2.Run(seeds=[7], sampling=run_pb2.Sampling(steps=steps, **(sampling or {})))
    source = run.source.picture
    source.prompt, source.strength = "x", strength
    source.picture.CopyFrom(run_pb2.Image(data=coded() if data is None else data, **image))
    request = messages.generate(edits=edits)
    run.edits.extend(request.run.edits)
    for name, reference in (references or {}).items():
        run.references[name].CopyFrom(reference)
    request.run.CopyFrom(run)
    return request


def from_latents(values=None, *, strength=None, steps=2, kind=run_pb2.VALUE_TYPE_FLOAT32, shape=None):
    values = np.zeros((4, 8, 8), np.float32) if values is None else values
    data = values.astype("<f4" if kind == run_pb2.VALUE_TYPE_FLOAT32 else "<f2").tobytes()
    tensor = run_pb2.Tensor(shape=shape or values.shape, type=kind, data=data)
    source = run_pb2.LatentsSource(latents=tensor, prompt="x", strength=strength)
    request = messages.generate()
    request.run.CopyFrom(
        run_pb2.Run(seeds=[7], source=run_pb2.Source(latents=source), sampling=run_pb2.Sampling(steps=steps))
    )
    return request


def violations(request, info=INFO) -> dict[str, str]:
    with pytest.raises(RpcError) as caught:
        validate_generate(request, info, LIMITS)
    return {v.field: v.description for v in caught.value.violations}


def moving() -> bytes:
    frames = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    return file.getvalue()


def bomb() -> bytes:
    """A PNG that says 67 megapixels, of a kilobyte."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 2**13, 2**13, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")
    )


SOURCE = "run.source.picture"


@pytest.mark.parametrize(
    ("request_", "field", "says"),
    [
        (from_picture(b"nothing"), f"{SOURCE}.picture.data", "not a readable PNG or JPEG or WEBP"),
        (from_picture(coded(kind="BMP")), f"{SOURCE}.picture.data", "not a readable"),
        (from_picture(coded(kind="JPEG"), format=1), f"{SOURCE}.picture.data", "not a readable PNG"),
        (from_picture(coded()[:300]), f"{SOURCE}.picture.data", "not a readable"),
        (from_picture(coded(np.zeros((64, 64, 4), np.uint8))), f"{SOURCE}.picture.data", "mode RGBA"),
        (from_picture(moving()), f"{SOURCE}.picture.data", "moves; give one picture"),
        (from_picture(coded(np.zeros((32, 32, 3), np.uint8))), f"{SOURCE}.picture", "got '32x32'; sizes served"),
        (from_picture(bomb()), f"{SOURCE}.picture", "got '8192x8192'"),
        (from_picture(bytes(9 * 2**20)), f"{SOURCE}.picture.data", "at most 8388608"),
        (from_picture(PIXELS.tobytes(), format=4), f"{SOURCE}.picture", "got '0x0'"),
        (from_picture(PIXELS.tobytes()[1:], format=4, width=64, height=64), f"{SOURCE}.picture.data", "= 12288"),
        (from_picture(format=9), f"{SOURCE}.picture.format", "IMAGE_FORMAT_PNG"),
        (from_picture(strength=0.0), f"{SOURCE}.strength", "more than 0 and at most 1"),
        (from_picture(strength=1.1), f"{SOURCE}.strength", "more than 0 and at most 1"),
        (from_picture(strength=float("nan")), f"{SOURCE}.strength", "more than 0"),
        (from_picture(strength=0.3, steps=3), f"{SOURCE}.strength", "one of 3 steps; raise it, or sampling.steps to 4"),
        (from_picture(sampling={"width": 64, "height": 32}), "run.sampling.height", "starts from 64x64; leave it out"),
        (
            from_picture(
                references={"r": run_pb2.Reference(source=run_pb2.Source(prompt=run_pb2.PromptSource(text="y")))},
                edits=[{"patch": {"hook_points": ["mid.0"]}, "reference": "r"}],
            ),
            "run.references['r'].source",
            "walks 2 of 2 steps and the run 1; start it as the run is",
        ),
        (from_latents(np.zeros((4, 8, 7))), "run.source.latents.latents.shape", "[4, 8, 8], [4, 4, 8]"),
        (from_latents(shape=(4, 8)), "run.source.latents.latents.shape", "must be one of"),
        (from_latents(kind=0, shape=(4, 4, 8)), "run.source.latents.latents.data", "must be 256"),
        (from_latents(np.full((4, 8, 8), np.nan)), "run.source.latents.latents.data", "finite"),
        (from_latents(np.full((4, 8, 8), 2e4)), "run.source.latents.latents.data", "within -10000 to 10000"),
        (from_latents(strength=0.0), "run.source.latents.strength", "more than 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(request_, field, says):
    found = violations(request_)
    assert field in found, found
    assert says in found[field]


def test_a_bomb_is_refused_by_its_header_alone(monkeypatch):
    text = coded()

    def unpacked(*_, **__):
        raise AssertionError("it was unpacked")

    monkeypatch.setattr(Image.Image, "convert", unpacked)
    monkeypatch.setattr(Image.Image, "load", unpacked)
    assert SOURCE + ".picture" in violations(from_picture(bomb()))
    at = text.index(b"IDAT") - 4
    packed = b"note\0\0" + zlib.compress(bytes(10**7))
    chunk = struct.pack(">I", len(packed)) + b"zTXt" + packed + struct.pack(">I", zlib.crc32(b"zTXt" + packed))
    seen = []
    monkeypatch.setattr(sources, "pixels_only", lambda data: seen.append(data) or b"")
    violations(from_picture(text[:at] + chunk + text[at:]))
    assert seen, "what is not pixels stays packed"


def test_a_scheduler_that_noises_no_picture_says_so():
    info = an_info(takes_pictures=False, scheduler="IPNDM")
    assert "IPNDM does not say how" in violations(from_picture(), info)["run.source.picture"]
    assert validate_generate(from_latents(), info, LIMITS).jobs[0].start.kind == "noise"


@pytest.mark.parametrize(("kind", "name"), [(0, "PNG"), (0, "JPEG"), (0, "WEBP"), (1, "PNG"), (2, "JPEG"), (4, "RAW")])
def test_pixels_are_those_of_the_file(kind, name):
    data = PIXELS.tobytes() if name == "RAW" else coded(kind=name)
    valid = validate_generate(from_picture(data, format=kind, width=64, height=64, steps=4), INFO, LIMITS)
    (job,) = valid.jobs
    expected = PIXELS if name == "RAW" else np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(job.start.values, expected)
    assert (job.prompt, job.steps, job.skipped, job.height, job.width) == ("x", 2, 2, 64, 64)
    assert valid.run.sampling.steps == 4
    assert valid.run.source.picture.picture.data == data


def test_pixels_that_a_run_starts_from_are_counted_once_for_all_its_pictures():
    """A small file can be many pixels; they are held until the answer is."""
    request = from_picture()
    plain, several = messages.generate(prompt="x", seeds=range(1)), from_picture()
    several.run.seeds[:] = range(3)
    counts = [bytes_of(validate_generate(one, INFO, LIMITS).jobs, INFO) for one in (plain, request, several)]
    pixels = 64 * 64 * 3
    assert counts[1] == counts[0] + pixels
    assert counts[2] == 3 * counts[0] + pixels


def test_a_run_takes_the_size_of_its_picture():
    wide = np.zeros((32, 64, 3), np.uint8)
    (job,) = validate_generate(from_picture(coded(wide), strength=1.0), INFO, LIMITS).jobs
    assert (job.height, job.width, job.steps, job.skipped) == (32, 64, 2, 0)


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_latents_come_in_either_precision(kind):
    values = np.linspace(-2, 2, 256, dtype=np.float16).reshape(4, 8, 8).astype(np.float32)
    (job,) = validate_generate(from_latents(values, kind=kind, strength=0.5), INFO, LIMITS).jobs
    assert job.start.kind == "latents"
    assert np.array_equal(job.start.values, values)
    assert (job.steps, job.skipped) == (1, 1)


@given(st.integers(1, 60), st.floats(0, 1) | st.sampled_from([float("nan"), float("inf")]))
def test_of_any_strength_a_run_walks_one_step_at_least_and_all_at_most(steps, strength):
    taken = taken_steps(steps, strength)
    assert 1 <= taken <= steps
    if np.isfinite(strength) and int(steps * strength) >= 1:
        assert taken == min(int(steps * strength), steps)  # as diffusers counts


@example(b"", 0, 0, 0, 5e-324)  # one by it is infinite
@example(b"", 0, 0, 0, 1.7e308)  # times two it is infinite
@given(st.binary(max_size=200), st.integers(-1, 6), st.integers(-2, 70), st.integers(-2, 70), st.floats())
def test_no_bytes_bring_validation_down(data, kind, width, height, strength):
    request = from_picture(strength=strength)
    picture = request.run.source.picture.picture
    picture.data, picture.width, picture.height = data, width, height
    picture.format = kind
    assert violations(request)
