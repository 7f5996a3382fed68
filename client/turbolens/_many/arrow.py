"""pyarrow, which only tables need."""

from __future__ import annotations

from typing import Any


def pyarrow() -> Any:
    """The module.

    Raises:
        RuntimeError: it is not installed.
    """
    try:
        import pyarrow as module
    except ImportError:
        raise RuntimeError("Parquet needs pyarrow: pip install 'turbolens[tables]'") from None
    return module


def parquet() -> Any:
    """Its Parquet; raises as :func:`pyarrow`."""
    pyarrow()
    import pyarrow.parquet as module

    return module
