"""What a picture takes as PNG, JPEG, WebP and raw: bytes and milliseconds, and of other ways to write a PNG.

    python -m benchmarks.coding

Of pictures that the embedded model draws, at its own size and sixteen side by side as one; and of noise, which nothing
shortens. Every PNG is read back and compared.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import tyro
from PIL import Image

from benchmarks.places import RESULTS
from turbolens_proto.v1 import run_pb2
from turbolens_server.bench import contenders as make
from turbolens_server.bench.contenders import Work
from turbolens_server.bench.results import assemble, save, to_markdown
from turbolens_server.bench.timing import Contender, measure
from turbolens_server.images import encode_image
from turbolens_server.loading.load import load_engine

Picture = npt.NDArray[np.uint8]
"""[height, width, 3]."""
SERVED: Final = "PNG as served"
_KINDS: Final = {
    SERVED: run_pb2.IMAGE_FORMAT_PNG,
    "JPEG, quality 90": run_pb2.IMAGE_FORMAT_JPEG,
    "WebP, quality 90": run_pb2.IMAGE_FORMAT_WEBP,
    "raw": run_pb2.IMAGE_FORMAT_RAW,
}
_STRATEGIES: Final = {
    "level 0": (0, zlib.Z_DEFAULT_STRATEGY),
    "level 1, no matches": (1, zlib.Z_HUFFMAN_ONLY),
    "level 1, runs": (1, zlib.Z_RLE),
    "level 1": (1, zlib.Z_DEFAULT_STRATEGY),
    "level 6": (6, zlib.Z_DEFAULT_STRATEGY),
}


def ways() -> Mapping[str, Callable[[Picture], bytes]]:
    """Every way to code a picture, by name."""

    def served(kind: Any) -> Callable[[Picture], bytes]:
        return lambda picture: encode_image(picture, kind, 90).data

    def whole(level: int, strategy: int) -> Callable[[Picture], bytes]:
        return lambda picture: _png(picture, level, strategy)

    def pillow(level: int) -> Callable[[Picture], bytes]:
        return lambda picture: _pillow(picture, level)

    return {
        **{name: served(kind) for name, kind in _KINDS.items()},
        **{f"PNG, difference to the left, {name}": whole(*how) for name, how in _STRATEGIES.items()},
        **{f"PNG by Pillow, level {level}": pillow(level) for level in (1, 6)},
    }


def _png(picture: Picture, level: int, strategy: int) -> bytes:
    """In one piece, every row as its difference to the pixel on the left."""
    height, width, _ = picture.shape
    rows = np.ones((height, 1 + 3 * width), np.uint8)
    pixels = picture.reshape(height, -1)
    rows[:, 1:4] = pixels[:, :3]
    np.subtract(pixels[:, 3:], pixels[:, :-3], out=rows[:, 4:])
    packer = zlib.compressobj(level, strategy=strategy)
    data = packer.compress(rows.tobytes()) + packer.flush()
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", data), (b"IEND", b""))
    coded = (struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(coded)


def _pillow(picture: Picture, level: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=level)
    return file.getvalue()


def run(rounds: int) -> dict[str, Any]:
    """Measure."""
    engine = load_engine(backend="torch")
    drawn = make.pictures(engine, Work(16, 1, *engine.info.default_size).jobs())
    sheet = np.concatenate([np.concatenate(drawn[at : at + 4], 1) for at in range(0, 16, 4)])
    noise = np.random.default_rng(0).integers(0, 256, drawn[0].shape, np.uint8)
    cases = []
    for name, pictures in (("drawn", drawn), ("sixteen as one", [sheet]), ("noise", [noise] * 16)):
        coded = {way: [code(picture) for picture in pictures] for way, code in ways().items()}
        for way, files in coded.items():
            if way.startswith("PNG"):
                for file, picture in zip(files, pictures, strict=True):
                    assert np.array_equal(np.asarray(Image.open(io.BytesIO(file))), picture), way
        contenders = [
            Contender(way, lambda code=code: [code(p) for p in pictures])  # type: ignore[misc]  # noqa: B023
            for way, code in ways().items()
        ]
        rows = measure(contenders, rounds)
        height, width, _ = pictures[0].shape
        kb = {way: sum(map(len, files)) / len(files) / 1000 for way, files in coded.items()}
        label = {"pictures": name, "size": f"{width}x{height}"}
        cases.append({"label": label, "of": len(pictures), "rows": rows, "kb": kb})
    return assemble("coding", rounds, cases, model=engine.info.model, model_hash=engine.info.model_hash)


def main(rounds: int = 12, out: Path = RESULTS / "coding.json") -> None:
    """Measure and write.

    Args:
        rounds: rounds in which each way is timed once.
        out: JSON file to write.
    """
    result = run(rounds)
    print(to_markdown(result))
    save(out, result)


if __name__ == "__main__":
    tyro.cli(main)
