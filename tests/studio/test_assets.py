"""The page that is shipped is the one that its sources make, and it is in the wheel."""

from __future__ import annotations

import gzip
import hashlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
WEB, STATIC = ROOT / "studio" / "web", ROOT / "studio" / "turbolens_studio" / "static"
NAMED = ["index.html", "package-lock.json", "package.json", "tsconfig.json", "vite.config.ts"]
MOST_COMPRESSED = 200_000


def source_hash() -> str:
    """As `studio/web/vite.config.ts` makes it."""
    paths = [*NAMED, *(str(path.relative_to(WEB)) for path in (WEB / "src").rglob("*") if path.is_file())]
    digest = hashlib.sha256()
    for path in sorted(path.replace("\\", "/") for path in paths if not path.endswith(".test.ts")):
        digest.update(f"{path}\0".encode() + (WEB / path).read_bytes() + b"\0")
    return digest.hexdigest()


def test_the_built_page_is_of_these_sources():
    built = (STATIC / "source.sha256").read_text().strip()
    assert built == source_hash(), "the studio's page is stale: run `make studio-assets`"


def test_a_first_load_is_small_and_loads_nothing_from_elsewhere():
    files = {path.name: path.read_bytes() for path in STATIC.iterdir()}
    assert {"index.html", "studio.js", "studio.css", "icon.svg"} <= files.keys()
    assert sum(len(gzip.compress(data)) for data in files.values()) < MOST_COMPRESSED
    page = files["index.html"].decode()
    assert not re.search(r'(src|href)="(https?:)?//', page)
    assert "<script>" not in page
    assert "style=" not in page
    assert not re.search(rb"url\((?!['\"]?(data:|#))", files["studio.css"])
