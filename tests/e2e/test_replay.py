"""Results of every kind, made again by another server of the same model, and what is told where they differ."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

import turbolens as tl
from turbolens._png import with_text
from turbolens.cli import main
from turbolens_server.embedded import start
from turbolens_server.unet.torch_unet import TorchUNet

PROMPT = "a big red star on the left, night background"
OTHER = {"other": tl.reference("a blue ring", seed=3)}
OWN = {"own": tl.reference("a big yellow star on the left, night background")}

RINGS = [
    (tl.box(0, 0, 0.5, 1), "a red ring"),
    (tl.mask(np.linspace(0, 1, 16)[None].repeat(16, 0)), "a blue ring"),
]


def kinds(lens):
    """Name, arguments and whether features are asked for instead of a picture."""
    up = [row.ref for row in lens.extract(PROMPT, seed=7)["up.0.1"].top(3)]
    left = tl.box(0, 0, 0.5, 1)
    drawn = lens.generate("a blue ring", seed=1, latents=True)
    noise = np.random.default_rng(0).normal(size=drawn.latents.shape)
    pictures = {
        "plain": {},
        "empty prompt": {"prompt": ""},
        "two steps": {"steps": 2},
        "four steps": {"steps": 4},
        "large seed": {"seed": 2**62 + 5},
        "one of several": {"seeds": [4, 5, 6]},
        "one of several prompts": {"prompt": ["a star", PROMPT], "seeds": [4, 5]},
        "what was chosen, by prompt": {
            "prompt": ["a blue ring", PROMPT], "steer": [tl.transfer(tl.choose(2), "own")], "references": OWN
        },
        "jpeg": {"format": "jpeg", "quality": 70},
        "webp": {"format": "webp"},
        "raw": {"format": "raw"},
        "add": {"steer": [tl.add(up[0], 8, mask=left)]},
        "weights": {"steer": [tl.add({up[0]: 1, up[1]: -0.5}, 4, unit="norm")]},
        "scale": {"steer": [tl.ablate(up)]},
        "set": {"steer": [tl.set_to(up[0], 2, unit="raw", mask=tl.polygon((0.5, 0), (1, 1), (0, 1)))], "steps": 2},
        "replace": {"steer": [tl.replace(up[0], 6, steps=(1, 2))], "steps": 2},
        "mask": {"steer": [tl.add(up[0], 8, mask=tl.mask(np.linspace(0, 1, 16)[None].repeat(16, 0)))]},
        "patch": {"steer": [tl.patch("up.0.0", "other")], "references": OTHER},
        "transfer": {"steer": [tl.transfer(up[:2], "own", multiplier=2, remove=[up[2]])], "references": OWN},
        "unit of a reference": {
            "steer": [tl.add(up[0], 1, unit="reference", reference="own")], "references": OWN
        },
        "transfer of what was chosen": {
            "steer": [tl.transfer(tl.choose(6, own_mask=left), "own", multiplier=1.5)], "references": OWN, "steps": 2
        },
        "amounts by step": {"steer": [tl.add(up[0], [8, 2])], "steps": 2},
        "condition": {"steer": [tl.add(up[0], 8, where=tl.where(up[1], above=0.5))]},
        "group and its ablation": {"steer": [tl.add({up[0]: 1, up[1]: -1}, 6), tl.ablate(list(up))]},
        "guided": {"guidance_scale": 4.5, "guidance_rescale": 0.7, "negative_prompt": "snow background", "steps": 2},
        "sides": {
            "guidance_scale": 3, "steer": [tl.add(up[0], 4, side="contrast"), tl.patch("up.0.0", "other", side="both")],
            "references": OTHER,
        },
        "from a picture": {"image": drawn, "strength": 0.5, "steps": 4, "steer": [tl.add(up[0], 4, steps=(0, 1))]},
        "from latents": {"start_latents": drawn.latents, "strength": 0.75, "steps": 4},
        "from given noise": {"start_latents": noise, "prompt": "a star"},
        "reference beside a picture": {
            "image": drawn, "strength": 0.5, "steps": 2, "steer": [tl.patch("up.0.0", "other")],
            "references": {"other": tl.reference("a blue ring", image=drawn, strength=0.5)},
        },
        "regions": {"regions": RINGS},
        "regions and all else": {
            "regions": RINGS, "guidance_scale": 3, "references": OTHER | OWN, "steps": 2,
            "steer": [tl.add(up[0], 4, mask=left), tl.patch("up.0.0", "other"), tl.transfer(tl.choose(3), "own")],
        },
        "features beside it": {"features": ["up.0.1"], "steer": [tl.add(up[0], 8)]},
    }  # fmt: skip
    features = {
        "features": {},
        "features of two steps": {"steps": 2, "saes": ["mid.0"], "float32": True},
        "features of a steered run": {"steer": [tl.add("mid.0/0", 5, unit="raw")], "only": up},
        "features of a picture": {"image": drawn, "strength": 0.5, "steps": 2},
        "features of a guided run": {"guidance_scale": 4.5, "saes": ["up.0.1"]},
        "features under regions": {"regions": RINGS, "saes": ["up.0.1"]},
        "features of one of several": {"seeds": [1, 2]},
        "features of one of several prompts": {"prompt": ["a star", PROMPT]},
        "features of a transfer of what was chosen": {
            "steer": [tl.transfer(tl.choose(4, all_steps=True), "own")],
            "references": OWN,
        },
    }
    for name, arguments in pictures.items():
        yield name, arguments, lens.generate
    for name, arguments in features.items():
        yield name, arguments, lens.extract


def test_manifests_of_every_kind_are_replayed_after_a_restart(lens, tmp_path):
    files = []
    for name, given, ask in kinds(lens):
        prompt, arguments = given.get("prompt", PROMPT), {k: v for k, v in given.items() if k != "prompt"}
        made = ask(prompt, **({"seed": 7} if "seeds" not in arguments else {}) | arguments)
        one = made[-1] if isinstance(made, list) else made
        file = tmp_path / f"{name}.json"
        file.write_text(tl.manifest(one).to_json())
        files.append(file)
        if isinstance(one, tl.Picture):
            one.save(tmp_path / f"{name}.png")
            files.append(tmp_path / f"{name}.png")
    assert len(files) >= 40
    with start() as again, tl.connect(again.target) as fresh:
        verdicts = {file.name: fresh.replay(file) for file in files}
    assert {name: str(replay) for name, replay in verdicts.items()} == dict.fromkeys(verdicts, "equal")


def test_what_differs_is_told(lens, tmp_path, capsys, server):
    picture = lens.generate(PROMPT, seed=7)
    file = tmp_path / "a.png"
    account = dataclasses.replace(
        picture.provenance,
        model="another",
        model_hash="f" * 64,
        sae_hashes={"up.0.1": "e" * 64, "gone": "d" * 64},
        versions={**picture.provenance.versions, "torch": "1.0"},
        backend="tensorrt",
    )

    def saved(pixels):
        picture.provenance = account
        picture.save(file)
        with Image.open(file) as image:
            image.load()  # the texts stand after the pixels
            told = image.info
        Image.fromarray(pixels).save(file)
        data = file.read_bytes()
        for key in ("turbolens", "turbolens-picture"):
            data = with_text(data, key, told[key])
        file.write_bytes(data)

    array = picture.array.copy()
    saved(array)
    equal = lens.replay(file)
    assert equal.verdict == "equal"
    assert [line.partition(":")[0] for line in equal.differs] == [
        "model", "the U-Net's weights", "SAE gone", "SAE up.0.1", "version of torch", "backend",
    ]  # fmt: skip
    array[0, 0, 0] ^= 2
    saved(array)
    assert lens.replay(file).verdict == "equal within tolerance"
    assert lens.replay(file, tolerance=1).verdict == "different"
    saved(255 - array)
    with pytest.raises(SystemExit) as left:
        main(["replay", str(file), "--server", server.target, "--json", "--out", str(tmp_path / "b.png")])
    assert left.value.code == 1
    assert json.loads(capsys.readouterr().out)["verdict"] == "different"
    main(["replay", str(tmp_path / "b.png"), "--server", server.target])
    assert capsys.readouterr().out.strip().endswith(": equal")


def test_what_cannot_be_made_again_is_told(lens, tmp_path):
    found = tl.manifest(lens.extract(PROMPT, seed=7, saes=["mid.0"])).to_json()
    file = tmp_path / "f.json"
    file.write_text(found.replace('"mid.0"', '"mid.9"'))
    refused = lens.replay(file)
    assert refused.verdict == "refused"
    assert "mid.9" in refused.detail
    told = json.loads(found)
    told["sha256"] = "0" * 64
    first = next(iter(told["strongest"]["mid.0"]))
    for factor, verdict in ((1.001, "equal within tolerance"), (2, "different")):
        told["strongest"]["mid.0"][first] *= factor
        file.write_text(json.dumps(told))
        assert lens.replay(file).verdict == verdict


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\x89PNG", b'{"schema": "turbolens.manifest/1"}'])
def test_files_of_others_are_refused(lens, tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="x: "):
        lens.replay(tmp_path / "x")


def test_a_result_of_another_backend_is_equal_within_tolerance_and_says_so(tmp_path):
    class Other(TorchUNet):
        def predict(self, *given):
            return super().predict(*given) * 1.001

    with start() as running, tl.connect(running.target) as one:
        one.generate(PROMPT, seed=7).save(tmp_path / "a.png")
        engine = running._serving._readiness.ready.engine
        unet = Other(engine.components.unet, name="torch-compile")
        engine.use(dataclasses.replace(engine.running, unet=unet, reason="by hand"))
        again = one.replay(tmp_path / "a.png")
        assert one.generate(PROMPT, seed=7).provenance.backend == "torch-compile"
    assert again.verdict == "equal within tolerance"
    assert again.differs == ("backend: torch then, torch-compile now",)
