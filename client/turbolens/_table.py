"""Rows of results: a table in a notebook, in pandas, in Arrow."""

from __future__ import annotations

import functools
import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import pandas
    import pyarrow

OF_FEATURES: Final = ("ref", "label", "label_score", "frequency", "mean", "max")


class Table(list[Any]):
    """A list of rows that notebooks show as a table."""

    def __init__(self, rows: Sequence[Any], columns: Sequence[str] = OF_FEATURES, hint: str = "") -> None:
        """A table of results.

        Args:
            rows: any results, such as features of `lens.list_features`.
            columns: their attributes, dotted where they are deeper; the default is for features.
            hint: of an empty table, why it is.
        """
        super().__init__(rows)
        self._paths = tuple(columns)
        self.hint = hint
        """Of an empty table: why it is, and what would help; shown in its place."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(path.rpartition(".")[2] for path in self._paths)

    def values(self) -> list[list[Any]]:
        """What stands in each row, in order of the columns."""
        return [[functools.reduce(getattr, path.split("."), row) for path in self._paths] for row in self]

    def cells(self) -> list[list[str]]:
        """The same as text."""
        return [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in self.values()]

    def to_pandas(self) -> pandas.DataFrame:
        """As a data frame; needs pandas."""
        return to_pandas(self._by_column())

    def to_arrow(self) -> pyarrow.Table:
        """As an Arrow table; needs pyarrow."""
        return to_arrow(self._by_column())

    def _by_column(self) -> dict[str, list[Any]]:
        plain = [[v if isinstance(v, (int, float)) else str(v) for v in row] for row in self.values()]
        return {name: [row[i] for row in plain] for i, name in enumerate(self.columns)}

    def _repr_html_(self) -> str:
        if self.hint:
            return f"<p>{html.escape(self.hint)}</p>"
        names = "".join(f"<th>{html.escape(name)}</th>" for name in self.columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in self.cells())
        return f"<table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>"

    def __str__(self) -> str:
        if self.hint:
            return self.hint
        rows = [self.columns, *self.cells()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.columns))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def to_pandas(columns: Mapping[str, Any]) -> pandas.DataFrame:
    """Columns of equal length as a data frame."""
    try:
        import pandas
    except ModuleNotFoundError:
        raise ModuleNotFoundError("to_pandas needs pandas: pip install pandas", name="pandas") from None
    return pandas.DataFrame(dict(columns))


def to_arrow(columns: Mapping[str, Any]) -> pyarrow.Table:
    """Columns of equal length as an Arrow table."""
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise ModuleNotFoundError("to_arrow needs pyarrow: pip install pyarrow", name="pyarrow") from None
    return pyarrow.table(dict(columns))


def card(title: str, rows: Mapping[str, object], below: str = "") -> str:
    """A small card for notebooks: HTML."""
    body = "".join(
        f'<tr><th style="text-align:left">{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>'
        for name, value in rows.items()
    )
    return f"<div><b>{html.escape(title)}</b><table>{body}</table>{below}</div>"
