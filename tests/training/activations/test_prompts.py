from __future__ import annotations

import csv
import json
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbolens_server.engine.engine import Engine
from turbolens_training.activations.prompts import PromptError, PromptList, PromptSource, open_prompts
from turbolens_training.activations.stream import HELD_OUT, TRAINING, PromptStream

PROMPTS = [f"a picture, of thing {i}" for i in range(200)]
RNG = random.Random(0)


def draw(source: PromptSource, index: int, images: int = 7, *, held_out: bool = False) -> list[str]:
    return source.draw(index, images, RNG, held_out=held_out)


def write(folder: Path, suffix: str, prompts: list[str]) -> str:
    path = folder / f"prompts{suffix}"
    rows = [{"id": i, "caption": prompt, "url": "http://x"} for i, prompt in enumerate(prompts)]
    if suffix == ".txt":
        path.write_text("\n".join(prompts), "utf-8")
        return str(path)
    if suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return f"{path}:caption"


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl", ".parquet"])
def test_every_kind_of_file_gives_the_same_prompts(tmp_path: Path, suffix: str) -> None:
    prompts = [*PROMPTS, "", "  ", 'Ein "Mädchen" mit 🦊', PROMPTS[3], f" {PROMPTS[4]} "]
    source = open_prompts(write(tmp_path, suffix, prompts), seed=3)
    twin = PromptList("", prompts, seed=3)
    assert source.identity == twin.identity
    assert [draw(source, i) for i in range(60)] == [draw(twin, i) for i in range(60)]
    assert "201 prompts" in source.summary
    assert "2 empty, 2 doubled" in source.summary


def test_an_epoch_is_every_prompt_once_and_the_next_is_another_order() -> None:
    source = PromptList("", PROMPTS, seed=0)
    rows = [draw(source, i, 1)[0] for i in range(400)]
    size = rows.index(rows[0], 1) if rows.count(rows[0]) > 1 else 0
    training = set(rows)
    count = len(training)
    assert size  # seen again
    assert Counter(rows[:count]) == Counter(training)
    assert Counter(rows[count : 2 * count]) == Counter(training)
    assert rows[:count] != rows[count : 2 * count]
    # A chunk may span the end of an epoch, and is a slice of the same sequence whatever its size.
    assert draw(source, 1, count - 3) == rows[count - 3 : 2 * (count - 3)]
    assert draw(PromptList("", PROMPTS, seed=1), 0) != draw(source, 0)


def test_what_is_held_out_is_never_trained_on() -> None:
    parts = []
    for held_out in (True, False):
        parts.append({row for i in range(60) for row in draw(PromptList("", PROMPTS, seed=0), i, held_out=held_out)})
    assert parts[0].isdisjoint(parts[1])
    assert parts[0] | parts[1] == set(PROMPTS)
    # The side depends on the prompt alone: a longer file moves nothing over.
    longer = PromptList("", [*(f"more {i}" for i in range(100)), *PROMPTS], seed=9)
    assert parts[0] <= {row for i in range(30) for row in draw(longer, i, held_out=True)}


@given(st.lists(st.text(max_size=8), max_size=60), st.integers(0, 50), st.integers(1, 9))
def test_any_prompts_are_a_chunk_or_one_clear_error(prompts: list[str], index: int, images: int) -> None:
    try:
        source = PromptList("file", prompts, seed=0)
    except PromptError as error:
        assert "\n" not in str(error)
        return
    for held_out in (True, False):
        drawn = draw(source, index, images, held_out=held_out)
        assert len(drawn) == images
        assert set(drawn) <= {prompt.strip() for prompt in prompts} - {""}


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("a.txt", b"fine\n\xff\xfe\n", "", r"a\.txt, line 2: not UTF-8"),
        ("a.txt", b"fine\n", ":caption", "a text file has no columns"),
        ("a.txt", b"one\ntwo\n", "", "2 distinct prompts are too few"),
        ("a.csv", b"id,text\n1,a\n2,b,c\n", ":text", r"a\.csv, line 3: 3 fields, the header has 2"),
        ("a.csv", b'id,text\n1,"a\n', ":text", r"a\.csv, line 2: "),
        ("a.csv", b"id,text\n1,a\n", "", "say which column, as a.csv:COLUMN; it has id, text"),
        ("a.csv", b"", "", "say which column, as a.csv:COLUMN; it has none"),
        ("a.csv", b"id,text\n1,a\n", ":words", "no column 'words'.* it has id, text"),
        ("a.jsonl", b'{"t": "a"}\n{"t": \n', "", r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"t": "a"}\n[1]\n', "", r"a\.jsonl, line 2: expected an object, found list"),
        ("a.jsonl", b'{"t": "a"}\n{"t": 3}\n', "", r"a\.jsonl, line 2: 't' is int"),
        ("a.jsonl", b'{"t": "a"}\n{"u": "a"}\n', "", r"a\.jsonl, line 2: no 't'; it has u"),
        ("a.parquet", b"PAR1 no", ":t", "cannot be read as Parquet"),
        ("a.xml", b"<a/>", "", r"\.xml: not one of \.txt, \.csv, \.jsonl, \.parquet"),
    ],
)
def test_a_bad_file_is_one_line_that_says_where(
    tmp_path: Path, name: str, content: bytes, column: str, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=message) as caught:
        open_prompts(f"{tmp_path / name}{column}", seed=0)
    assert "\n" not in str(caught.value)


def test_a_name_of_nothing_is_refused() -> None:
    with pytest.raises(PromptError, match="no such file or folder"):
        open_prompts("nowhere.txt", seed=0)


@pytest.mark.parametrize("saved", [True, False])
def test_a_dataset_folder_is_streamed(tmp_path: Path, saved: bool) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"caption": prompt, "n": i} for i, prompt in enumerate([*PROMPTS, "", PROMPTS[0]])]
    if saved:
        table = datasets.table.InMemoryTable(pa.Table.from_pylist(rows))
        datasets.Dataset(table, fingerprint="0").save_to_disk(tmp_path / "set")
    else:
        (tmp_path / "set").mkdir()
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set" / "train.parquet")
    name = str(tmp_path / "set")

    source = open_prompts(name, seed=0)
    chunks = [draw(source, i) for i in range(40)]
    assert draw(source, 2) == chunks[2], "going back"
    assert draw(open_prompts(name, seed=0), 31) == chunks[31], "going on in another process"
    assert open_prompts(name, seed=0).identity == source.identity
    assert draw(open_prompts(name, seed=1), 0) != chunks[0]
    training = {row for chunk in chunks for row in chunk}
    held_out = {row for i in range(4) for row in draw(source, i, held_out=True)}
    assert training.isdisjoint(held_out)
    assert training | held_out == set(PROMPTS)
    rows_drawn = [row for chunk in chunks for row in chunk]
    assert len(set(rows_drawn[: len(training)])) == len(training), "no prompt twice before all came once"
    with pytest.raises(PromptError, match=r"no column 'words' with text, as set:COLUMN; it has caption"):
        open_prompts(f"{name}:words", seed=0)


def test_a_dataset_without_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(PromptError, match=r"--prompts owner/name: the dataset cannot be opened") as caught:
        open_prompts("owner/name:caption", seed=0)
    assert "\n" not in str(caught.value)


def test_a_stream_of_a_file_is_a_function_of_its_index(tiny_engine: Engine, tmp_path: Path) -> None:
    spec = write(tmp_path, ".txt", PROMPTS)

    def stream(split: str) -> PromptStream:
        return PromptStream(tiny_engine, open_prompts(spec, seed=0), seed=0, split=split, images=2)

    ours, again = stream(TRAINING).updates(3), stream(TRAINING).updates(3)
    assert (ours.captions, ours.seeds) == (again.captions, again.seeds)
    assert ours.by_block["mid.0"].equal(again.by_block["mid.0"])
    held_out = stream(HELD_OUT).updates(3)
    assert not set(held_out.captions) & set(ours.captions)
    assert not set(held_out.seeds) & set(ours.seeds)
    assert stream(TRAINING).identity.startswith(tiny_engine.info.model_hash)
    assert stream(TRAINING).identity != tiny_engine.info.model_hash
