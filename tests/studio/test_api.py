"""What the page asks for, of a studio over the real server."""

from __future__ import annotations

import base64
import io
import json
import struct
import time
import zipfile

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from starlette.testclient import TestClient
from visitor import ACCESS, PROMPT, TOKEN

import turbolens as tl
from turbolens_server.embedded import start
from turbolens_studio.app import build_app
from turbolens_studio.connection import Connection
from turbolens_studio.sample import together_with
from turbolens_studio.uploads import as_mask, read_picture

PLAIN = {"prompt": PROMPT, "seed": "7", "steps": 1, "edits": []}


def grey_png(array) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.asarray(array, np.uint8)).save(file, "PNG")
    return file.getvalue()


def as_bytes(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def a_text(key: str, text: str) -> PngInfo:
    chunks = PngInfo()
    chunks.add_text(key, text)
    return chunks


LEFT = np.concatenate([np.full((128, 64), 255), np.zeros((128, 64))], 1)
MASK = base64.b64encode(grey_png(LEFT)).decode()


def adding(strength: float, *, mask: str | None = MASK) -> dict:
    edit = {"features": [{"feature": {"sae": "up.0.1", "index": 202}}], "add": {"strength": strength}}
    return {**PLAIN, "edits": [edit | ({"mask": {"png": mask}} if mask else {})]}


def frames_of(socket, kind: str = "done"):
    """Frames until one of a kind, as (header, parts)."""
    found = []
    while True:
        data = socket.receive_bytes()
        (length,) = struct.unpack_from("<I", data)
        header = json.loads(data[4 : 4 + length])
        found.append((header, [data[4 + length + at :][:size] for at, size in header["parts"]]))
        if header["kind"] == kind:
            return found


@pytest.fixture
def live(page):
    with page.websocket_connect("/api/live", headers={"host": "localhost"}) as socket:
        assert frames_of(socket, "state")[-1][0]["state"] == "ready"
        yield socket


def ask(socket, *runs, rev=1, lane="paint"):
    socket.send_text(json.dumps({"kind": "run", "lane": lane, "rev": rev, "runs": runs}))


def test_a_picture_and_its_features_come_as_the_sdk_has_them(live, lens):
    ask(live, {**PLAIN, "features": True})
    header, parts = next(frame for frame in frames_of(live) if frame[0]["kind"] == "picture")
    wanted = lens.generate(PROMPT, seed=7, features=True, float32=True)
    assert (np.asarray(Image.open(io.BytesIO(parts[0]))) == wanted.array).all()
    assert [about["sae"] for about in header["features"]] == list(wanted.features)
    for about, data in zip(header["features"], parts[1:], strict=True):
        n, block = about["count"], wanted.features[about["sae"]]
        assert (np.frombuffer(data, "<u4", n) == block.rows).all()
        assert (np.frombuffer(data, "<u4", n, 4 * n) == block.indices).all()
        assert (np.frombuffer(data, "<f4", n, 8 * n) == block.values).all()
    top = wanted.features["up.0.1"].top(1)[0]
    assert header["known"][str(top.ref)]["label"] == top.label


def test_a_sweep_answers_each_run_and_the_same_run_is_not_made_twice(live):
    runs = [{**PLAIN, "seed": str(seed)} for seed in (11, 12, 11)]
    ask(live, *runs, rev=5, lane="sweep")
    pictures = {h["index"]: h for h, _ in frames_of(live) if h["kind"] == "picture"}
    assert sorted(pictures) == [0, 1, 2]
    assert pictures[0]["name"] == pictures[2]["name"] != pictures[1]["name"]
    assert {header["rev"] for header in pictures.values()} == {5}
    ask(live, *runs, rev=6, lane="sweep")
    assert all(h["cached"] for h, _ in frames_of(live) if h["kind"] == "picture")


def test_what_is_given_up_is_answered_whether_it_runs_or_waits(live):
    ask(live, *({**PLAIN, "seed": str(seed)} for seed in range(21, 27)), rev=1)
    ask(live, {**PLAIN, "seed": "27"}, rev=2)  # waits for the sweep to end
    live.send_text(json.dumps({"kind": "cancel", "lane": "paint"}))
    ask(live, {**PLAIN, "seed": "28"}, rev=3)
    ends = {header["rev"]: header["kind"] for header, _ in frames_of(live) if header["kind"] in ("cancelled", "done")}
    assert ends == {1: "cancelled", 2: "cancelled", 3: "done"}


def test_what_the_server_refuses_names_its_field(live):
    ask(live, adding(5000))
    error = frames_of(live, "error")[-1][0]["error"]
    assert error["code"] == "INVALID_ARGUMENT"
    assert error["violations"][0]["field"].endswith("edits[0].add.strength")


def test_steps_that_an_sae_of_whole_runs_does_not_serve_are_refused_here_too():
    edit = {"features": [{"feature": {"sae": "run", "index": 3}}], "add": {"strength": 8}}
    with start(sae=("run=mini-temporal",)) as server:
        app = build_app(Connection(server.target), ACCESS)
        client = TestClient(app, base_url="http://localhost", headers={"authorization": f"Bearer {TOKEN}"})
        with client, client.websocket_connect("/api/live", headers={"host": "localhost"}) as socket:
            while frames_of(socket, "state")[-1][0]["state"] != "ready":
                pass
            ask(socket, {**PLAIN, "steps": 2, "edits": [edit]})
            (violation,) = frames_of(socket, "error")[-1][0]["error"]["violations"]
            ask(socket, {**PLAIN, "steps": 4, "edits": [edit]}, rev=2)
            assert frames_of(socket, "picture")
    assert violation["field"].endswith("sampling.steps")
    assert violation["description"].endswith("the temporal SAE run serves runs of 4 steps alone")


@pytest.mark.parametrize(
    ("run", "field"),
    [
        ({**PLAIN, "seed": "-1"}, "seed"),
        ({**PLAIN, "seed": str(2**63)}, "seed"),
        ({**PLAIN, "prompt": None}, "prompt"),
        ({**PLAIN, "steps": "two"}, "steps"),
        ({**PLAIN, "edits": [{"add": "much"}]}, "edits"),
        ({**PLAIN, "only": ["up.0.1"]}, "only"),
        ({**PLAIN, "speed": 3}, "speed"),
    ],
)
def test_what_is_no_run_names_its_field_too(live, run, field):
    ask(live, run)
    assert frames_of(live, "error")[-1][0]["error"]["violations"][0]["field"] == field


def test_broken_messages_are_answered_and_the_socket_lives_on(live):
    for text in ("{", "[]", '{"lane": "x", "kind": "dance"}', '{"lane": "x", "kind": "run", "runs": []}'):
        live.send_text(text)
        assert frames_of(live, "error")[-1][0]["error"]["message"]
    ask(live, PLAIN)
    assert frames_of(live)[-1][0]["kind"] == "done"


def test_seeds_beyond_what_a_page_counts_in_stay_exact(live, lens):
    seed = 2**63 - 1
    ask(live, {**PLAIN, "seed": str(seed)})
    _, parts = next(frame for frame in frames_of(live) if frame[0]["kind"] == "picture")
    assert (np.asarray(Image.open(io.BytesIO(parts[0]))) == lens.generate(PROMPT, seed=seed).array).all()


def test_lists_filter_sort_and_page(page, lens):
    known = [f for sae in lens.model().saes for f in lens.list_features(sae.name)]

    def listed(**query):
        return page.get("/api/features", params=query).json()

    assert listed()["total"] == len(known)
    rare = listed(sort="rare", count=5)["features"]
    assert [f["frequency"] for f in rare] == sorted(f.frequency for f in known if f.frequency)[:5]
    colors = listed(attribute="color", block="up.0.0", score=0.8, least=0.01)
    common = [f for f in known if f.ref.sae == "up.0.0" and f.label_score >= 0.8 and f.frequency >= 0.01]
    assert colors["total"] == sum(any(label.attribute == "color" for label in f.labels) for f in common)
    pages = [listed(block="mid.0", sort="index", start=at, count=100)["features"] for at in (0, 100, 200)]
    assert [f["index"] for one in pages for f in one] == list(range(256))
    by_words = listed(q="night", block="up.0.1", count=3)["features"]
    assert [f["index"] for f in by_words] == [
        m.ref.index for m in lens.search_features("night", block="up.0.1", limit=3)
    ]
    assert by_words[0]["reason"].startswith("background=night: word")
    for wrong in ({"sort": "age"}, {"count": 0}, {"start": "x"}):
        assert page.get("/api/features", params=wrong).status_code == 400


def test_a_feature_with_all_that_is_known_and_one_that_is_not_there(page, lens):
    one, wanted = page.get("/api/features/up.0.1/202").json(), lens.get_feature("up.0.1", 202)
    assert one["label"] == wanted.label
    assert [example["seed"] for example in one["examples"]] == [str(example.seed) for example in wanted.examples]
    assert page.get("/api/features/up.0.1/9999").status_code == 404
    picture = Image.open(io.BytesIO(page.get("/api/thumbs/up.0.1/202").content))
    assert picture.size == (128, 128)


def test_features_near_to_one_are_the_sdks(page, lens):
    near = page.get("/api/nearest/up.0.0/123").json()["features"]
    wanted = lens.nearest_features("up.0.0/123", limit=12)
    assert [(one["index"], one["cosine"]) for one in near] == [(one.ref.index, one.cosine) for one in wanted]


def test_a_region_finds_what_is_special_about_it(page):
    """The left half holds a circle, the right half a square."""
    left = page.post("/api/contrast", json={"run": PLAIN, "region": MASK}).json()["features"]
    assert all(one["inside"] > one["outside"] for one in left)
    assert [one["effect"] for one in left] == sorted((one["effect"] for one in left), reverse=True)
    assert any("left" in one["label"] or "circle" in one["label"] for one in left[:8])
    empty = base64.b64encode(grey_png(np.zeros((128, 128)))).decode()
    assert page.post("/api/contrast", json={"run": PLAIN, "region": empty}).status_code == 400
    assert page.post("/api/contrast", json={"run": PLAIN, "region": "nothing"}).status_code == 400


def test_a_region_is_told_apart_as_by_the_sdk(page, lens):
    told = page.post("/api/contrast", json={"run": PLAIN, "region": MASK}).json()["features"]
    found = lens.extract(PROMPT, seed=7, float32=True).inside(tl.mask(LEFT / 255), limit=len(told))
    assert [(one["sae"], one["index"]) for one in told] == [(one.ref.sae, one.ref.index) for one in found]
    assert [one["effect"] for one in told] == pytest.approx([one.effect for one in found])


def test_features_that_fire_together_are_counted_by_cells():
    runs = [(np.array([0, 0, 1, 1, 2]), np.array([0, 1, 0, 2, 1]), np.ones(5, np.float32))]
    assert together_with(runs, 0, 4) == [(2, 1 / 2), (1, 1 / 3)]
    assert together_with(runs, 3, 4) == []


def test_a_sample_is_measured_once_and_says_how_far_it_is(page):
    first = page.get("/api/sampled/up.0.1/202").json()
    assert first["state"] in ("measuring", "measured")
    deadline = time.monotonic() + 120
    while (told := page.get("/api/sampled/up.0.1/202").json())["state"] == "measuring":
        assert time.monotonic() < deadline, told
        time.sleep(0.05)
    assert told["active"] == sum(told["counts"]) > 0
    assert told["cells"] == told["runs"] * 64
    assert page.get("/api/sampled/up.0.0/123").json()["state"] == "measured"


def test_two_runs_in_numbers_and_their_difference(page, lens):
    pair = {"a": PLAIN, "b": adding(4)}
    told = page.post("/api/compare", json={**pair, "mask": MASK}).json()
    steer = [tl.add("up.0.1/202", 4, mask=tl.mask(LEFT / 255))]
    a, b = (lens.generate(PROMPT, seed=7, steer=edits).array.astype(float) for edits in ([], steer))
    apart = np.abs(a - b)
    assert told["mean"] == pytest.approx(apart.mean())
    assert told["inside"] == pytest.approx(apart[:, :64].mean())
    assert told["outside"] == pytest.approx(apart[:, 64:].mean())
    assert told["psnr"] == pytest.approx(10 * np.log10(255**2 / ((a - b) ** 2).mean()))
    drawn = np.asarray(Image.open(io.BytesIO(page.post("/api/difference", json={**pair, "gain": 4}).content)))
    assert (drawn == np.clip(apart * 4, 0, 255)).all()
    same = {"a": PLAIN, "b": adding(0)}
    assert page.post("/api/compare", json=same).json()["equal"] is True
    assert not np.asarray(Image.open(io.BytesIO(page.post("/api/difference", json={**same, "gain": 8}).content))).any()


def saved(page, run: dict, kind: str) -> bytes:
    answer = page.post("/api/export", json={"run": run, "as": kind})
    assert answer.status_code == 200, answer.text
    return answer.content


def test_what_is_saved_opens_to_the_same_run(page, lens):
    run = adding(4)
    steer = [tl.add("up.0.1/202", 4, mask=tl.mask(grey_png(LEFT)))]
    wanted = lens.generate(PROMPT, seed=7, steps=1, steer=steer)
    for kind in ("png", "json", "yaml", "zip"):
        opened = page.post("/api/open", content=saved(page, run, kind)).json()
        assert tl.edits_from_json(json.dumps(opened["edits"])) == steer
        assert (opened["prompt"], opened["seed"], opened["steps"]) == (PROMPT, "7", 1)
    with zipfile.ZipFile(io.BytesIO(saved(page, run, "zip"))) as archive:
        assert (np.asarray(Image.open(io.BytesIO(archive.read("after.png")))) == wanted.array).all()
        assert archive.read("masks/0.png") == grey_png(LEFT)
        assert tl.edits_from_json(archive.read("edits.json").decode()) == steer
        assert tl.Provenance.from_json(archive.read("provenance.json").decode()) == wanted.provenance


def test_pictures_of_the_sdk_and_the_studio_tell_each_other_how_they_were_made(page, lens, tmp_path):
    steer = [tl.add("up.0.1/202", 4, mask=tl.mask(grey_png(LEFT)))]
    made = lens.generate(PROMPT, seed=2**60 + 1, steps=2, steer=steer)
    made.save(tmp_path / "sdk.png")
    opened = page.post("/api/open", content=(tmp_path / "sdk.png").read_bytes()).json()
    assert tl.edits_from_json(json.dumps(opened["edits"])) == steer
    assert (opened["prompt"], opened["seed"], opened["steps"]) == (PROMPT, str(2**60 + 1), 2)
    (tmp_path / "studio.png").write_bytes(saved(page, opened, "png"))
    assert tl.Provenance.from_png(tmp_path / "studio.png") == made.provenance


def test_the_saved_program_makes_the_same_picture(page, lens, server, tmp_path, monkeypatch):
    run = adding(4)
    features = [{"feature": {"sae": "up.0.0", "index": 97}, "weight": 0.5}]
    run["edits"].append({"features": features, "set": {"value": 2, "unit": "UNIT_RAW"}})
    program = saved(page, run, "python").decode()
    assert f"tl.connect({server.target!r})" in program
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "steer.py", "exec"), {})
    steer = tl.edits_from_json(json.dumps(run["edits"]))
    assert (np.asarray(Image.open("picture.png")) == lens.generate(PROMPT, seed=7, steps=1, steer=steer).array).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"hello", "no schema"),
        (b"{hello", "not JSON"),
        (b"a: [", "neither JSON nor YAML"),
        (b"a: &a [1]\nb: [*a, *a]", "aliases"),
        (b"[" * 10_000, "too deep"),
        (b'{"schema": ' + b"[" * 100_000, "too deep"),
        (b"{}", "no schema"),
        (b'{"schema": "elsewhere/1"}', "of schema"),
        (b'{"schema": "turbolens.steering/99"}', "version"),
        (b'{"schema": "turbolens.steering/1", "prompt": 3}', "prompt"),
        (grey_png(np.zeros((4, 4))), "does not say how it was made"),
        (as_bytes(Image.new("L", (4, 4)), "PNG", pnginfo=a_text("turbolens", "{}x")), "cannot be read"),
        (grey_png(np.zeros((4, 4)))[:30], "broken"),
        (b"PK\x03\x04 and no more", "broken zip"),
        (b"\xff\xfe\x00", "neither"),
    ],
)
def test_files_that_are_not_ours_broken_or_too_new_are_refused_with_the_reason(page, data, reason):
    answer = page.post("/api/open", content=data)
    assert answer.status_code == 400
    assert reason in answer.json()["error"]["message"]


def quarters(mode: str) -> Image.Image:
    """Upright: black above white, with the left half of the white cut off."""
    array = np.zeros((60, 40, 3), np.uint8)
    array[30:, 20:] = 255
    return Image.fromarray(array).convert(mode)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation):
    image = quarters("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    turned = image if orientation == 1 else image.transpose(Image.Transpose(turns[orientation]))
    mask = as_mask(read_picture(as_bytes(turned, "PNG", exif=exif)), 40, 60)
    assert (mask == np.asarray(image.convert("L"))).all()


def test_uploads_of_all_kinds_have_their_right_tones():
    wanted = np.asarray(quarters("L"))
    kinds = [*((mode, "PNG") for mode in ("RGB", "L", "1", "P")), ("CMYK", "TIFF"), ("RGB", "WEBP"), ("RGB", "BMP")]
    for mode, kind in kinds:
        options = {"lossless": True} if kind == "WEBP" else {}
        assert (as_mask(read_picture(as_bytes(quarters(mode), kind, **options)), 40, 60) == wanted).all(), (mode, kind)
    sixteen = Image.fromarray(wanted.astype(np.uint16) * 257)
    assert (as_mask(read_picture(as_bytes(sixteen, "PNG")), 40, 60) == wanted).all()
    clear = quarters("RGB").convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(np.arange(60)[:, None] < 45, 255, 0).astype(np.uint8).repeat(40, 1)))
    cut = wanted * (np.arange(60)[:, None] < 45)
    assert (as_mask(read_picture(as_bytes(clear, "PNG")), 40, 60) == cut).all()


def test_uploads_that_are_none_or_too_large_are_refused(page):
    vast = as_bytes(Image.new("L", (9000, 9000)), "PNG")
    for data, reason in ((b"no picture", "no picture"), (vast, "at most"), (b"\x89PNG\r\n\x1a\n", "no picture")):
        answer = page.post("/api/mask", content=data)
        assert answer.status_code == 400
        assert reason in answer.json()["error"]["message"]
    large = as_bytes(Image.new("L", (8000, 6500), 255), "PNG")
    assert (np.asarray(Image.open(io.BytesIO(page.post("/api/mask", content=large).content))) == 255).all()
