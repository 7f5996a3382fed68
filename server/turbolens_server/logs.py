"""Logs: structured events through the standard library's logger "turbolens".

As a library the server configures nothing: its events go where the host sends that logger. `turbolens serve` owns its
process and shows them, and what libraries log or warn of, as JSON lines for machines, or in colours for people.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any, Final

import structlog

NAME: Final = "turbolens"
"""The logger's name."""
_PROCESSORS: Final[tuple[structlog.typing.Processor, ...]] = (
    structlog.stdlib.filter_by_level,
    structlog.contextvars.merge_contextvars,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
)


_OF_LIBRARIES: Final[tuple[structlog.typing.Processor, ...]] = (
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_logger_name,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
)


_SHOW_THEIR_OWN: Final = ("diffusers", "transformers", "accelerate", "huggingface_hub")


def through_ours(*to_import: str) -> None:
    """Have libraries that print their lines themselves send them the way of all others; once they are imported.

    Args:
        to_import: libraries to import first. They come with a handler, and their modules, which are imported when
            something asks for them, log on the way.
    """
    for name in to_import:
        importlib.import_module(name)
    for name in _SHOW_THEIR_OWN:
        logger = logging.getLogger(name)
        logger.handlers = []
        logger.propagate = True


def get_logger() -> Any:
    """The server's logger; an event's fields are a dict, the standard library record's `msg`."""
    return structlog.wrap_logger(
        logging.getLogger(NAME), processors=list(_PROCESSORS), wrapper_class=structlog.stdlib.BoundLogger
    )


def configure_logging(style: str, level: str) -> None:
    """Show this process's events on stderr, and of libraries' those of trouble, in the same form.

    An error shows where it came from and never the values there: prompts are among them.

    Args:
        style: "json", "pretty", or "auto": pretty on a terminal.
        level: "debug", "info", "warning" or "error".
    """
    pretty = style == "pretty" or (style == "auto" and sys.stderr.isatty())
    renderer: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
        if pretty
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    handler = logging.StreamHandler(sys.stderr)
    remove_meta = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(processors=[remove_meta, *renderer], foreign_pre_chain=_OF_LIBRARIES)
    )
    logger, root = logging.getLogger(NAME), logging.getLogger()
    logger.handlers, root.handlers = [handler], [handler]  # two lists: what is added to one is not the other's
    logger.propagate = False
    logger.setLevel(level.upper())
    root.setLevel(max(logging.WARNING, logging.getLevelNamesMapping()[level.upper()]))
    logging.captureWarnings(True)
