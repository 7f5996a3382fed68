"""What leaves the studio and comes back: pictures that hold how they were made, steering files, Python, zips."""

from __future__ import annotations

import base64
import io
import zipfile
from typing import Any, Final

import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import turbolens as tl
from turbolens_studio.wire import Run
from turbolens_studio.workshop import Made

PNG_KEY: Final = "turbolens"
"""Of the text in a PNG that is its provenance, as the SDK writes it."""
_STEERING: Final = "steering.json"
_MAX_TEXT: Final = 16 * 2**20
_MAX_DEPTH: Final = 64


class ForeignFile(ValueError):
    """A file that the studio did not write, or that is broken or too new; the text says which."""


def as_json(run: Run) -> bytes:
    """A steering file."""
    return _steering(run).to_json().encode()


def as_yaml(run: Run) -> bytes:
    """A steering file that is easier to edit."""
    return str(yaml.safe_dump(_steering(run).to_plain(), sort_keys=False)).encode()


def _steering(run: Run) -> tl.steering.Steering:
    return tl.steering.Steering(run.edits, prompt=run.prompt, seed=run.seed, steps=run.steps)


def as_png(made: Made) -> bytes:
    """The picture with its provenance in a text chunk, as the SDK saves pictures."""
    chunks, file = PngInfo(), io.BytesIO()
    chunks.add_text(PNG_KEY, made.provenance.to_json())
    Image.fromarray(made.pixels).save(file, "PNG", pnginfo=chunks)
    return file.getvalue()


def as_python(run: Run, target: str) -> str:
    """A program that makes the picture again through the SDK."""
    uses_png = any(edit.mask is not None and edit.mask.message.WhichOneof("shape") == "png" for edit in run.edits)
    lines = (["import base64", ""] if uses_png else []) + ["import turbolens as tl", ""]
    lines.append(f"with tl.connect({target!r}) as lens:")
    settings = f"{run.prompt!r}, seed={run.seed}" + (f", steps={run.steps}" if run.steps is not None else "")
    if not run.edits:
        lines.append(f"    picture = lens.generate({settings})")
    else:
        lines.append("    steer = [")
        lines += [f"        {_call(edit)}," for edit in run.edits]
        lines += ["    ]", f"    picture = lens.generate({settings}, steer=steer)"]
    lines.append('picture.save("picture.png")')
    return "\n".join(lines) + "\n"


def _call(edit: tl.Edit) -> str:
    terms = [(str(ref), weight) for ref, weight in edit.features]
    if any(weight is not None for _, weight in terms):
        features = repr({name: 1.0 if weight is None else weight for name, weight in terms})
    else:
        features = repr(terms[0][0] if len(terms) == 1 else [name for name, _ in terms])
    said = [features, repr(list(edit.amounts) or edit.amount)]
    said += [f"unit={edit.unit!r}"] if edit.unit != "mean" else []
    said += [f"mask={_mask(edit.mask)}"] if edit.mask is not None else []
    said += [f"steps={edit.steps}"] if edit.steps is not None else []
    said += [f"where=tl.{edit.where!r}"] if edit.where is not None else []
    return f"tl.{'set_to' if edit.kind == 'set' else edit.kind}({', '.join(said)})"


def _mask(mask: tl.Mask) -> str:
    message = mask.message
    match message.WhichOneof("shape"):
        case "boxes":
            return f"tl.boxes({', '.join(str((b.left, b.top, b.right, b.bottom)) for b in message.boxes.boxes)})"
        case "polygons" if len(message.polygons.polygons) == 1:
            return f"tl.polygon({', '.join(str((p.x, p.y)) for p in message.polygons.polygons[0].points)})"
        case "png":
            return f"tl.mask(base64.b64decode({base64.b64encode(message.png).decode()!r}))"
        case shape:
            raise ValueError(f"a mask of {shape} has no words in the SDK")


def as_zip(run: Run, made: Made, before: Made, target: str) -> bytes:
    """Everything: steering file, edits for the command line, masks, pictures before and after, and the program."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(_STEERING, as_json(run))
        archive.writestr("provenance.json", made.provenance.to_json())
        archive.writestr("edits.json", tl.edits_to_json(run.edits))
        archive.writestr("replay.py", as_python(run, target))
        archive.writestr("before.png", as_png(before))
        archive.writestr("after.png", as_png(made))
        for at, edit in enumerate(run.edits):
            if edit.mask is not None and edit.mask.message.WhichOneof("shape") == "png":
                archive.writestr(f"masks/{at}.png", edit.mask.message.png)
    return file.getvalue()


def read_any(data: bytes) -> dict[str, Any]:
    """The settings in a PNG that the studio or the SDK saved, in a zip or a steering file, in JSON or YAML.

    Raises:
        ForeignFile: it is none, or broken, or of a newer schema.
    """
    if data.startswith(b"\x89PNG"):
        return _settings_of(_text_of_png(data))
    if data.startswith(b"PK"):
        text = _text_of_zip(data)
    else:
        try:
            text = data.decode()
        except UnicodeDecodeError:
            raise ForeignFile("neither a PNG, a zip nor a steering file") from None
    try:
        steering = _read_steering(text)
    except ValueError as error:
        raise ForeignFile(str(error)) from None
    except RecursionError:
        raise ForeignFile("lists within lists, too deep for a steering file") from None
    if steering.references:
        raise ForeignFile("edits that read other runs, which the studio cannot show yet")
    run = Run(steering.prompt or "", steering.seed or 0, steering.steps, steering.edits)
    return run.settings()


def _read_steering(text: str) -> tl.steering.Steering:
    if text.lstrip().startswith("{"):
        return tl.steering.Steering.from_json(text)
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            # A few lines of aliases to aliases stand for more than any memory holds.
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("YAML with aliases, which steering files do without")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise RecursionError
        return tl.steering.Steering.from_plain(yaml.safe_load(text))
    except yaml.YAMLError:
        raise ValueError("no steering file: neither JSON nor YAML") from None


def _settings_of(provenance: str) -> dict[str, Any]:
    try:
        run = tl.Provenance.from_json(provenance).run
    except ValueError as error:
        raise ForeignFile(f"a PNG whose account of itself cannot be read ({str(error)[:120]})") from None
    if run.references:
        raise ForeignFile("a picture whose edits read other runs, which the studio cannot show yet")
    return Run(run.prompt, run.seeds[0], run.steps, tuple(run.steer)).settings()


def _text_of_png(data: bytes) -> str:
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.load()
            text = getattr(image, "text", {}).get(PNG_KEY)
    except (OSError, SyntaxError, ValueError) as error:
        raise ForeignFile(f"a broken PNG ({str(error)[:80]})") from None
    if text is None:
        raise ForeignFile("a PNG that does not say how it was made; those that the studio and the SDK save do")
    return str(text)


def _text_of_zip(data: bytes) -> str:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if archive.getinfo(_STEERING).file_size > _MAX_TEXT:
                raise ForeignFile(f"a zip whose {_STEERING} is too large")
            return archive.read(_STEERING).decode()
    except KeyError:
        raise ForeignFile(f"a zip without {_STEERING}") from None
    except (zipfile.BadZipFile, UnicodeDecodeError, OSError) as error:
        raise ForeignFile(f"a broken zip ({error})") from None
