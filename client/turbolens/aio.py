"""The async twin of `turbolens.connect`, with the same names: `async with turbolens.aio.connect(...) as lens:`."""

from turbolens._async import AsyncLens, connect

__all__ = ["AsyncLens", "connect"]
