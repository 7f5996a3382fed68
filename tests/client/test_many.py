"""Very many prompts: kills and resumption, errors of items, servers that go away, and what reads the tables."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from fake_server import D_SAE, HEIGHT, SAES, WIDTH, activations, refuse
from google.rpc import error_details_pb2
from many_child import PROMPTS

import turbolens as tl
from turbolens._many import tables
from turbolens._many.prompts import items

CHILD = Path(__file__).parent / "many_child.py"


def child(running, out: Path, kind: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(CHILD), running.target, str(out), kind])


def kill_after(process: subprocess.Popen, seen: list, count: int) -> None:
    limit = time.monotonic() + 30
    while len(seen) < count:
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.005)
    process.kill()
    process.wait()


def test_features_killed_twice_are_whole_at_the_end(running, fake, tmp_path):
    out, seen = tmp_path / "features.parquet", []

    def slowly(item):
        seen.append(item.request.run.source.prompt.text)
        time.sleep(0.004)

    fake.on["item"] = slowly
    for at in (150, 400):
        kill_after(child(running, out, "features"), seen, at)
        assert not out.exists()
        time.sleep(0.3)
    before = len(seen)

    with tl.connect(running.target) as lens:
        report = lens.extract_many(PROMPTS, out, seeds=[1, 2], progress=False)
        assert report.resumed > 0
        assert (report.done, report.failed) == (400, 8)
        assert len(seen) - before == 400 - report.resumed
        again = lens.extract_many(PROMPTS, out, seeds=[1, 2], progress=False)
        assert again.resumed == 400
    frame = pd.read_parquet(out)
    good = frame[frame.error.isna()]
    assert frame["item"].is_monotonic_increasing
    assert sorted(frame["item"].unique()) == list(range(400))
    assert not good.duplicated(["item", "seed", "sae"]).any()
    assert len(good) == 392 * 2 * len(SAES)
    assert list(frame[frame.error.notna()].prompt) == [f"bad {i}" for i in range(0, 400, 50)]
    assert not list(tmp_path.glob(".*"))


def test_pictures_killed_twice_are_whole_at_the_end(running, fake, tmp_path):
    out, seen = tmp_path / "pictures", []

    def slowly(context):
        seen.append(1)
        time.sleep(0.01)

    fake.on["Generate"] = slowly
    for at in (80, 200):
        kill_after(child(running, out, "pictures"), seen, at)
        assert not (out / "metadata.jsonl").exists()
        time.sleep(0.2)
    with (out / ".turbolens.jsonl").open("ab") as journal:
        journal.write(b'{"item": 399, "cut o')
    assert child(running, out, "pictures").wait(60) == 0
    made = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    failed = [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()]
    assert len({row["file_name"] for row in made}) == len(made)
    assert {row["item"] for row in failed} == set(range(0, 400, 50))
    assert {p.name for p in out.glob("[0-9]*")} == {row["file_name"] for row in made}
    assert all(tl.Provenance.from_png(out / row["file_name"]).model == "fake" for row in made[:3])


@pytest.mark.parametrize("form", ["pooled", "full"])
def test_tables_hold_what_extract_returns_and_others_read_them(client, tmp_path, form):
    duckdb, polars = pytest.importorskip("duckdb"), pytest.importorskip("polars")
    out = tmp_path / "f.parquet"
    client.extract_many(["a", "b"], out, form=form, seeds=[7], steps=2, progress=False)
    dense = np.stack([activations(7, 0), activations(7, 1)])
    table = pq.read_table(out)
    row = next(r for r in table.to_pylist() if r["item"] == 1 and r["sae"] == "up.0.1")
    if form == "pooled":
        mean, most, active = np.zeros(D_SAE), np.zeros(D_SAE), np.zeros(D_SAE)
        mean[row["feature"]], most[row["feature"]], active[row["feature"]] = row["mean"], row["max"], row["active"]
        np.testing.assert_allclose(mean, dense.mean((0, 1, 2)), rtol=1e-6)
        np.testing.assert_array_equal(most, dense.max((0, 1, 2)))
        np.testing.assert_allclose(active, (dense > 0).mean((0, 1, 2)), rtol=1e-6)
        number = "mean"
    else:
        again = np.zeros((HEIGHT * WIDTH, D_SAE))
        again[row["position"], row["feature"]] = row["activation"]
        np.testing.assert_array_equal(again.reshape(HEIGHT, WIDTH, D_SAE), dense[row["step"]])
        number = "activation"
    sql = f"select feature, avg(v) from (select unnest(feature) feature, unnest({number}) v from '{out}') "
    by_duckdb = dict(duckdb.sql(sql + "where v > 0.5 group by all order by 1").fetchall())
    frame = polars.read_parquet(out).explode("feature", number).filter(polars.col(number) > 0.5)
    by_polars = dict(frame.group_by("feature").agg(polars.col(number).mean()).sort("feature").rows())
    long = pd.read_parquet(out).explode(["feature", number])
    long = long[long[number] > 0.5]
    by_pandas = long[number].astype(float).groupby(long.feature).mean().to_dict()
    assert by_duckdb.keys() == by_polars.keys() == by_pandas.keys()
    for feature, value in by_pandas.items():
        assert by_duckdb[feature] == pytest.approx(value)
        assert by_polars[feature] == pytest.approx(value)


def test_another_job_or_input_is_told_apart(client, running, tmp_path):
    out = tmp_path / "f.parquet"
    client.extract_many(["a", "b"], out, progress=False)
    with pytest.raises(ValueError, match=r"settings: .*overwrite"):
        client.extract_many(["a", "b"], out, steps=2, progress=False)
    with pytest.raises(ValueError, match="other prompts"):
        client.extract_many(["a", "c"], out, progress=False)
    with pytest.raises(ValueError, match="only 1"):
        client.extract_many(["a"], out, progress=False)
    report = client.extract_many(["c"], out, progress=False, overwrite=True)
    assert (report.done, pq.read_table(out).num_rows) == (1, len(SAES))


def test_prompts_come_from_files_and_rows(tmp_path):
    rows = [{"prompt": "ä, b", "seed": 3}, {"prompt": "c"}]
    (tmp_path / "p.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "p.csv").write_text('prompt,seed\n"ä, b",3\nc,\n', encoding="utf-8")
    (tmp_path / "p.txt").write_text("ä, b\nc\n", encoding="utf-8")
    pd.DataFrame(rows).astype({"seed": "Int64"}).to_parquet(tmp_path / "p.parquet")
    for source in (*(tmp_path / f"p.{kind}" for kind in ("jsonl", "csv", "parquet")), iter(rows)):
        assert [(i.prompt, i.seeds) for i in items(source, (1,), "prompt")] == [("ä, b", (3,)), ("c", (1,))]
    assert [i.prompt for i in items(str(tmp_path / "p.txt"), (1,), "prompt")] == ["ä, b", "c"]
    with pytest.raises(ValueError, match=r"prompt 0: no text 'caption'; it has prompt, seed"):
        list(items(rows, (1,), "caption"))


def test_a_stream_that_breaks_is_begun_again(client, fake, tmp_path):
    seen = []

    def sometimes(item):
        seen.append(item.item)
        if len(seen) in (5, 30):
            raise RuntimeError("the server goes away")

    fake.on["item"] = sometimes
    report = client.extract_many((f"p{i}" for i in range(60)), tmp_path / "f.parquet", progress=False)
    assert (report.done, report.failed) == (60, 0)


def test_progress_is_told(client, tmp_path):
    told = []
    client.extract_many(["a", "b", "bad"], tmp_path / "f.parquet", progress=told.append)
    assert [(p.done, p.total, p.failed) for p in told][-1] == (3, 3, 1)


async def test_five_hundred_calls_at_once_are_all_answered(running, fake):
    """A server that takes 40 at a time, as ours does with its queue."""
    at_once, most, lock = [0], [0], threading.Lock()

    def crowded(context):
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        context.add_callback(lambda: at_once.__setitem__(0, at_once[0] - 1))
        if at_once[0] > 40:
            info = error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="turbolens")
            refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "full", info)

    fake.on["ExtractFeatures"] = fake.on["Generate"] = crowded
    async with tl.aio.connect(running.target) as lens:
        found = await asyncio.gather(*(lens.extract(f"p{i}", seed=i) for i in range(300)))
        made = await asyncio.gather(*(lens.generate(f"p{i}", seed=i) for i in range(200)))
    assert [f.seed for f in found] == list(range(300))
    assert [m.seed for m in made] == list(range(200))
    assert most[0] <= 32


def test_memory_does_not_grow_with_the_number_of_prompts(monkeypatch, client, tmp_path):
    monkeypatch.setattr(tables, "_PART_ITEMS", 16)
    held = []
    real = tables.Table.add

    def add(self, *arguments):
        real(self, *arguments)
        held.append(self._items)

    monkeypatch.setattr(tables.Table, "add", add)
    taken = []

    def prompts():
        for i in range(200):
            taken.append(i)
            assert i - len(held) <= 17  # the window
            yield f"p{i}"

    client.extract_many(prompts(), tmp_path / "f.parquet", progress=False)
    assert max(held) < 16
    assert len(taken) == 200


def test_without_pyarrow_one_line_names_the_extra(client, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RuntimeError, match=r"turbolens\[tables\]"):
        client.extract_many(["a"], tmp_path / "f.parquet")
