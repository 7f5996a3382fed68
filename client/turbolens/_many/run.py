"""`extract_many` and `generate_many`, once for both clients: the sync one runs them in a loop of its own."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from turbolens._blocks import RunFeatures
from turbolens._errors import TurboLensError
from turbolens._many import folders, tables
from turbolens._many.job import check_served, describe
from turbolens._many.options import ManyOptions
from turbolens._many.progress import ManyReport, Meter
from turbolens._many.prompts import Item, Prompts, count, items
from turbolens._many.work import Batch, Broken, Sickness, failed, in_order, try_again
from turbolens._run import extract_call, generate_call

if TYPE_CHECKING:
    from turbolens._async import AsyncLens

T = TypeVar("T")
_OF_ALL: Final = ManyOptions.__annotations__.keys()
_WINDOW: Final = (16, 256)
_BATCHES: Final = 4
"""Batches' worth of prompts under way: one runs, one waits, and two are on the way there and back."""


async def extract_many(
    lens: AsyncLens, prompts: Prompts, out: str | Path, form: tables.Form, options: Mapping[str, Any]
) -> ManyReport:
    """See :meth:`Lens.extract_many`."""
    path = Path(out)
    if path.suffix.lower() != ".parquet":
        raise ValueError(f"{path}: features are written as .parquet")
    if form not in ("pooled", "full"):
        raise ValueError(f"form {form!r}; use pooled or full")
    many, options = _split(options)
    seeds = _seeds(many)
    plain = extract_call("", None, seeds, _checked(options))
    model = await lens.model()
    if many.get("overwrite"):
        tables.remove(path)
    job = describe(plain.run, model.message, form=form, seeds=seeds)
    table = tables.Table(path, form, job)
    meter = Meter(many.get("progress"), count(prompts), table.done, table.failed)
    sickness = Sickness()

    patience = many.get("patience", 300.0)
    services = await lens._open()

    def open_stream(requests: AsyncIterator[Any]) -> Any:
        return services.features.ExtractFeaturesBatch(requests, metadata=lens._to.metadata())

    stream = Batch(open_stream, lens._target, patience)

    async def ask(item: Item) -> Any:
        request = extract_call(item.prompt, None, item.seeds, _checked(options)).extract(labels=False)
        return await try_again(lambda: stream.extract(request), patience)

    try:
        source = items(prompts, seeds, many.get("column", "prompt"))
        for item in _skip(source, table.done):
            table.check(item)
        answers = in_order(() if table.complete else source, ask, _window(model.limits.max_batch))
        async with contextlib.aclosing(answers):
            async for item, answer in answers:
                error = answer if isinstance(answer, TurboLensError) else None
                sickness.check(error)
                rows: list[dict[str, Any]] = []
                if error is None:
                    check_served(job, answer.provenance)
                    rows = [
                        {"seed": made.seed, **row}
                        for made in answer.extractions
                        for block in RunFeatures(made.seed, made.features, lambda _: {}).values()
                        for row in tables.rows(form, block)
                    ]
                table.add(item, rows, failed(error) if error else None)
                meter.add(failed=error is not None)
    except Broken as broken:
        raise broken.error from None
    finally:
        if not table.complete:
            table.flush()
        await stream.close()
    if table.complete:
        table.clean()
    else:
        table.finish()
    return meter.end(path)


async def generate_many(lens: AsyncLens, prompts: Prompts, out: str | Path, options: Mapping[str, Any]) -> ManyReport:
    """See :meth:`Lens.generate_many`."""
    if taken := sorted({"features", "only", "float32", "latents"} & options.keys()):
        raise TypeError(f"{', '.join(taken)}: pictures alone are written here; extract_many writes features")
    many, options = _split(options)
    seeds = _seeds(many)
    plain = generate_call("", None, seeds, _checked(options))
    model = await lens.model()
    path = Path(out)
    if many.get("overwrite"):
        folders.remove(path)
    job = describe(plain.run, model.message, format=plain.format, quality=plain.quality, seeds=seeds)
    folder = folders.Folder(path, job, plain.format)
    meter = Meter(many.get("progress"), count(prompts), folder.done, folder.failed)
    sickness = Sickness()

    patience = many.get("patience", 300.0)

    async def ask(item: Item) -> Any:
        return await try_again(lambda: lens.generate(item.prompt, seeds=item.seeds, **_checked(options)), patience)

    source = items(prompts, seeds, many.get("column", "prompt"))
    for item in _skip(source, folder.done):
        folder.check(item)
    async with contextlib.aclosing(in_order(source, ask, _window(model.limits.max_batch))) as answers:
        async for item, answer in answers:
            error = answer if isinstance(answer, TurboLensError) else None
            sickness.check(error)
            if error is None:
                check_served(job, answer[0].provenance.to_proto())
            folder.add(item, [] if error else answer, failed(error) if error else None)
            meter.add(failed=error is not None)
    folder.finish()
    return meter.end(path)


async def run_async(work: Callable[[AsyncLens], Awaitable[T]], lens: AsyncLens) -> T:
    """What `work` comes to with a client; its twin for the sync one is in `_twin`."""
    return await work(lens)


def _skip(source: Iterator[Item], most: int) -> Iterator[Item]:
    """The first items, and no other: what an earlier run has done.

    Raises:
        ValueError: there are fewer.
    """
    for at in range(most):
        item = next(source, None)
        if item is None:
            raise ValueError(f"the output holds {most} prompts and there are only {at}; pass overwrite=True")
        yield item


def _split(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is of the whole, and what is of each run."""
    many = {name: value for name, value in options.items() if name in _OF_ALL}
    return many, {name: value for name, value in options.items() if name not in _OF_ALL}


def _seeds(many: Mapping[str, Any]) -> tuple[int, ...]:
    seeds = tuple(many.get("seeds", (0,)))
    if not seeds:
        raise ValueError("seeds is empty; give at least one")
    return seeds


def _checked(options: Mapping[str, Any]) -> Any:
    if taken := sorted({"request_id", "previews", "labels"} & options.keys()):
        raise TypeError(f"no argument {', '.join(taken)}")
    return dict(options)


def _window(max_batch: int) -> int:
    least, most = _WINDOW
    return min(max(least, _BATCHES * max_batch), most)
