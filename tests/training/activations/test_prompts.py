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
from turbolens_training.activations.places import PromptError
from turbolens_training.activations.prompt_files import Column
from turbolens_training.activations.prompt_specs import list_prompts, open_prompts
from turbolens_training.activations.prompts import PromptList, PromptSource
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
    twin = PromptList(Column("", None, prompts), seed=3)
    assert source.identity == twin.identity
    assert [draw(source, i) for i in range(60)] == [draw(twin, i) for i in range(60)]
    assert "201 prompts" in source.summary
    assert "2 empty, 2 doubled" in source.summary


def test_an_epoch_is_every_prompt_once_and_the_next_is_another_order() -> None:
    source = PromptList(Column("", None, PROMPTS), seed=0)
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
    assert draw(PromptList(Column("", None, PROMPTS), seed=1), 0) != draw(source, 0)


def test_what_is_held_out_is_never_trained_on() -> None:
    parts = []
    for held_out in (True, False):
        parts.append(
            {
                row
                for i in range(60)
                for row in draw(PromptList(Column("", None, PROMPTS), seed=0), i, held_out=held_out)
            }
        )
    assert parts[0].isdisjoint(parts[1])
    assert parts[0] | parts[1] == set(PROMPTS)
    # The side depends on the prompt alone: a longer file moves nothing over.
    longer = PromptList(Column("", None, [*(f"more {i}" for i in range(100)), *PROMPTS]), seed=9)
    assert parts[0] <= {row for i in range(30) for row in draw(longer, i, held_out=True)}


@given(st.lists(st.text(max_size=8), max_size=60), st.integers(0, 50), st.integers(1, 9))
def test_any_prompts_are_a_chunk_or_one_clear_error(prompts: list[str], index: int, images: int) -> None:
    try:
        source = PromptList(Column("file", None, prompts), seed=0)
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
        ("a.jsonl", b'{"t": "a"}\n{"u": "a"}\n', ":t", r"a\.jsonl, line 2: no 't'; it has u"),
        ("a.jsonl", b'{"t": "a"}\n{"u": "a"}\n', "", r"say which column, as a\.jsonl:COLUMN; it has t, u"),
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


def test_prompts_that_the_model_does_not_read_to_their_end_are_warned_of(tiny_engine: Engine, tmp_path: Path) -> None:
    spec = write(tmp_path, ".txt", [f"{prompt} and a red ring{' and a red ring' * 40}" for prompt in PROMPTS])
    stream = PromptStream(tiny_engine, open_prompts(spec, seed=0), seed=0, split=TRAINING, images=2)
    with pytest.warns(UserWarning, match="longer than the 77 tokens that the model reads"):
        stream.updates(0)


MANY = [f"p {i}" for i in range(100)]


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_a_row_without_text_does_not_decide_for_the_others(tmp_path: Path) -> None:
    """The first caption is null: no other column may be taken in its place, and the count says what was left out."""
    rows = [{"file_name": "x.png", "text": None}, *({"file_name": f"{i}.png", "text": p} for i, p in enumerate(MANY))]
    jsonl = write_jsonl(tmp_path / "a.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in (jsonl, str(tmp_path / "a.parquet")):
        with pytest.raises(PromptError, match=r"say which column, as a\.\w+:COLUMN; it has file_name, text"):
            open_prompts(name, seed=0)
        source = open_prompts(f"{name}:text", seed=0)
        assert source.summary.endswith("100 prompts, 4 of them held out; left out: 1 empty (1 null), 0 doubled")
    alone = write_jsonl(tmp_path / "b.jsonl", [{"n": i, "text": p} for i, p in enumerate([None, *MANY])])
    assert set(list_prompts(alone, 200)[0]) == set(MANY)
    assert "column 'text'" in open_prompts(alone, seed=0).summary


def test_a_dataset_whose_first_row_is_null_is_read(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    name = f"{tmp_path / 'set'}"
    write_jsonl(tmp_path / "set" / "train.jsonl", [{"file": 1, "text": p} for p in [None, *MANY]])
    for spec in (name, f"{name}:text"):
        assert "100 prompts" in open_prompts(spec, seed=0).summary
        assert list_prompts(spec, 3)[0] == MANY[:3]


@pytest.mark.parametrize("place", ["set", "set/train.csv"])
def test_words_that_csv_readers_take_for_nothing_are_words(tmp_path: Path, place: str) -> None:
    """As a dataset the same file lost them; a field without anything is empty in both."""
    pytest.importorskip("datasets")
    words = ["NA", "null", "None", "nan", "N/A", "cat"]
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.csv").write_text(
        "n,text\n" + "".join(f"{n},{word}\n" for n, word in enumerate([*words, ""]))
    )
    found, told = list_prompts(f"{tmp_path / place}:text", 9)
    assert found == words
    assert "left out: 1 empty" in told


def test_a_dataset_is_known_by_all_of_its_rows(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    shared, identities = [f"shared {i}" for i in range(1000)], []
    for number, more in enumerate((["one"], ["other"], ["one", "more"], ["one", None])):
        folder = tmp_path / str(number)
        folder.mkdir()
        pq.write_table(pa.table({"text": shared + more}), folder / "train.parquet")
        identities.append(open_prompts(str(folder), seed=0).identity)
    assert len(set(identities[:3])) == 3
    assert identities[3] == identities[0], "a row that says nothing changes nothing"


def test_two_prompts_are_not_one_with_a_line_break(tmp_path: Path) -> None:
    one, two = (PromptList(Column("", None, [*MANY, *more]), seed=0) for more in (["a\nb"], ["a", "b"]))
    assert one.identity != two.identity


@pytest.mark.parametrize("separator", [";", "\t", "|", ","])
def test_a_table_is_a_table_by_whatever_separates_its_columns(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=separator).writerows(
            [["id", "text"], *([i, f"{p}, so"] for i, p in enumerate(MANY))]
        )
    assert list_prompts(f"{path}:text", 2)[0] == ["p 0, so", "p 1, so"]
    with pytest.raises(PromptError, match="say which column"):
        open_prompts(str(path), seed=0)


def test_what_is_no_column_of_text_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"tags": [["a"]], "n": [1], "none": pa.nulls(1), "raw": [b"a"]}), path)
    for column, kind in (("tags", r"list<\w+: string>"), ("n", "int64"), ("none", "null"), ("raw", "binary")):
        with pytest.raises(PromptError, match=rf"no column '{column}' with text \(it holds {kind}\)"):
            open_prompts(f"{path}:{column}", seed=0)
    (tmp_path / "b.csv").write_text("id;text,more\n1;a,b\n")
    with pytest.raises(PromptError, match=r"b\.csv, line 1: the header has commas and semicolons"):
        open_prompts(f"{tmp_path / 'b.csv'}:text", seed=0)
    (tmp_path / "c.csv").write_text("text,text\na,b\n")
    with pytest.raises(PromptError, match=r"2 columns are called 'text'"):
        open_prompts(f"{tmp_path / 'c.csv'}:text", seed=0)


def test_categories_of_text_are_text(tmp_path: Path) -> None:
    column = pa.array([*MANY, None, MANY[0]]).dictionary_encode()
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert open_prompts(str(tmp_path / "a.parquet"), seed=0).summary.endswith("left out: 1 empty (1 null), 1 doubled")


def test_a_dataset_of_other_separators_is_not_taken_as_lines(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.csv").write_text("id;text\n" + "\n".join(f"{i};{p}" for i, p in enumerate(MANY)))
    with pytest.raises(PromptError, match="its only column is called 'id;text'; separate its columns by commas"):
        open_prompts(str(tmp_path / "set"), seed=0)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_at_line_breaks_alone(tmp_path: Path, end: str) -> None:
    """Not at the separators of Unicode that captions of the web hold, and not with a byte-order mark before them."""
    lines = ["a\u2028b", "c\u0085d\x0b\x0ce", "f\x1cg"]
    (tmp_path / "a.txt").write_bytes(("\ufeff" + end.join(lines) + end).encode())
    assert list_prompts(str(tmp_path / "a.txt"), 9)[0] == lines


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "a picture\nof it\n".encode("utf-16-le"), r"a\.txt, line 1: holds a NUL character; is it UTF-16\?"),
        ("a.txt", "a picture\n".encode("utf-16"), r"a\.txt, line 1: not UTF-8"),
        ("a.jsonl", b'{"t": "a \\ud83d"}', r"a\.jsonl, line 1: 't' holds half of a surrogate pair"),
        ("a.jsonl", b'{"t": ' + b"[" * 100_000, r"a\.jsonl, line 1: not JSON"),
    ],
)
def test_what_is_no_text_is_one_line_that_says_where(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=message) as caught:
        open_prompts(str(tmp_path / name), seed=0)
    assert "\n" not in str(caught.value)
