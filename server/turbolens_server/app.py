"""`turbolens serve`."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

from turbolens_server.config import ConfigError, ServerConfig, checked, given_settings
from turbolens_server.loading.errors import LoadError
from turbolens_server.loading.places import problems
from turbolens_server.logs import configure_logging, get_logger, through_ours
from turbolens_server.telemetry import send_traces


def main(argv: list[str]) -> None:
    """Entry point: serve until told to stop.

    What can be seen to be wrong before anything is loaded is told together, a line for each. Settings that cannot be
    are exit code 2; a start that fails is 1, and so is a GPU that is lost, for whoever watches the process to start
    another.
    """
    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, _end_at_once)  # until there is something to finish
    try:
        given = given_settings(argv)
    except ConfigError as error:
        _refuse(2, error.args)
    wrong, elsewhere = list(given.problems()), problems(given)
    if wrong or elsewhere:
        _refuse(2 if wrong else 1, [*wrong, *elsewhere])
    config = checked(given)
    gc.disable()  # until all is loaded, which then stays: collections on the way find nothing, and take a quarter of it
    configure_logging(config.log_format, config.log_level)
    last_spans = _send_traces() if config.traces else None
    # Imported late: a command's help and a mistyped setting must not wait for torch.
    from turbolens_server.sae.bundle import BundleError

    try:
        code = asyncio.run(_serve(config))
    except (ConfigError, LoadError, BundleError) as error:
        sys.exit(f"turbolens serve: {error}")
    if last_spans is not None:
        last_spans()
    if code is not None:
        # A thread that reads weights cannot be stopped, and ending the interpreter under it, or beside a lost GPU, can
        # crash or hang in native code. Nothing needs saving.
        logging.shutdown()
        os._exit(code)


def _refuse(code: int, lines: Iterable[str]) -> NoReturn:
    print("\n".join(f"turbolens serve: {line}" for line in lines), file=sys.stderr)
    sys.exit(code)


def _send_traces() -> Callable[[], object]:
    try:
        return send_traces()
    except ModuleNotFoundError as error:
        print(f"turbolens serve: traces needs {error.name}: pip install 'turbolens[traces]'", file=sys.stderr)
        sys.exit(2)


def _end_at_once(sign: int, _: object = None) -> None:
    """End without waiting for anything, with the exit code that says by which signal."""
    logging.shutdown()
    os._exit(128 + sign)


async def _serve(config: ServerConfig) -> int | None:
    """Serve until told to stop, or until the GPU is lost.

    Returns:
        The exit code where the process cannot end in the ordinary way: 0 where it was told to stop while the model was
        loading, which then goes on in its thread, or 130 where that was by Ctrl-C; 1 where the GPU is lost; else None.
    """
    from turbolens_server.serving import Serving, load_and_serve

    through_ours()
    log = get_logger()
    told = asyncio.Event()
    signs: list[signal.Signals] = []
    loop = asyncio.get_running_loop()

    def stop(sign: signal.Signals) -> None:
        if told.is_set():
            log.warning("ended", why="told to stop a second time")
            _end_at_once(sign)
        signs.append(sign)
        told.set()

    for sign in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sign, stop, sign)
    serving = Serving(config)
    try:
        port = await serving.start(f"{config.host}:{config.port}")
    except RuntimeError as error:
        sys.exit(f"turbolens serve: cannot listen on {config.host}:{config.port} ({error}); is the port taken?")
    log.info("listening", address=f"{config.host}:{port}")
    loading = asyncio.create_task(load_and_serve(serving, config))
    ends = {asyncio.create_task(end.wait()) for end in (told, serving.device_lost)}
    try:
        await asyncio.wait({loading, *ends}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        log.info("stopping", grace_s=config.grace_s)
    finally:
        for end in ends:
            end.cancel()
        left_loading = loading.cancel()
        await serving.stop(0 if left_loading or loading.exception() else config.grace_s)
    log.info("stopped")
    if serving.device_lost.is_set():
        return 1
    interrupted = signs == [signal.SIGINT]
    return (128 + signal.SIGINT if interrupted else 0) if left_loading else None
