"""The small languages of ListFeatures: filters, orders and page tokens."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable
from typing import Any, Final

from turbolens_server.catalog.labels import Effect, Example, Label

NUMBERS: Final = ("index", "label_score", "frequency", "mean", "max")
TEXTS: Final = ("label", "attribute", "value")
MAX_CHARS: Final = 1000
_TERM: Final = re.compile(
    r'\s*(?P<field>\w+)\s*(?P<op><=|>=|!=|=|<|>|:)\s*(?:"(?P<quoted>[^"]*)"|(?P<bare>[^\s"]+))\s*'
)
_COMPARE: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "=": lambda a, b: a == b, "!=": lambda a, b: a != b, "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b, ">": lambda a, b: a > b, ">=": lambda a, b: a >= b,
}  # fmt: skip


class QueryError(ValueError):
    """A filter, order or page token that cannot be read; the text says where and what is allowed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Feature:
    """What is known of one feature."""

    sae: str
    index: int
    label: str
    """In words; empty where nothing fits."""
    label_score: float
    frequency: float
    """Share of positions where it is active, and below its activations there; 0 where nobody measured."""
    mean: float
    max: float
    labels: tuple[Label, ...]
    """Best first."""
    examples: tuple[Example, ...]
    """Strongest first."""
    effects: tuple[Effect, ...] = ()
    """Largest first."""
    icon_strength: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Term:
    field: str
    op: str
    value: Any

    def holds(self, have: Any) -> bool:
        if self.op == ":":
            return str(self.value).lower() in re.findall(r"\w+", str(have).lower())
        if isinstance(have, str):
            have, value = have.lower(), str(self.value).lower()
            return _COMPARE[self.op](have, value)
        return _COMPARE[self.op](have, self.value)


def parse_filter(text: str) -> Callable[[Feature], bool]:
    """A conjunction of comparisons as a predicate; the empty filter holds for all.

    Comparisons on `attribute` and `value` must all hold for one and the same label of the feature.

    Raises:
        QueryError: with the place and what is allowed.
    """
    _check_length(text)
    terms: list[_Term] = []
    rest = text
    while rest.strip():
        match = _TERM.match(rest)
        if match is None:
            raise QueryError(
                f"cannot read {rest.strip()[:40]!r}; write comparisons like frequency > 0.01, joined by AND"
            )
        terms.append(_term(match))
        rest = rest[match.end() :]
        if rest.strip():
            joined = re.match(r"AND\b", rest)
            if joined is None or not rest[joined.end() :].strip():
                raise QueryError(f"expected AND and a comparison at {rest.strip()[:40]!r}")
            rest = rest[joined.end() :]
    own = [term for term in terms if term.field not in ("attribute", "value")]
    of_label = [term for term in terms if term.field in ("attribute", "value")]

    def holds(feature: Feature) -> bool:
        if not all(term.holds(getattr(feature, term.field)) for term in own):
            return False
        if not of_label:
            return True
        return any(all(term.holds(getattr(label, term.field)) for term in of_label) for label in feature.labels)

    return holds


def _check_length(text: str) -> None:
    if len(text) > MAX_CHARS:
        raise QueryError(f"has {len(text)} characters; at most {MAX_CHARS} are allowed")


def _term(match: re.Match[str]) -> _Term:
    field, op = match["field"], match["op"]
    text = match["quoted"] if match["quoted"] is not None else match["bare"]
    if field in TEXTS:
        if op not in ("=", "!=", ":"):
            raise QueryError(f"{field} is text: use =, != or : (contains the word), not {op}")
        return _Term(field, op, text)
    if field not in NUMBERS:
        raise QueryError(f"no field {field!r}; there are {', '.join((*TEXTS, *NUMBERS))}")
    if op == ":":
        raise QueryError(f"{field} is a number: use =, !=, <, <=, > or >=")
    try:
        return _Term(field, op, float(text))
    except ValueError as error:
        raise QueryError(f"{field} is a number, {text!r} is not") from error


def parse_order(text: str) -> list[tuple[str, bool]]:
    """`frequency desc, index` as [(field, falling)]; the empty order is by index.

    Raises:
        QueryError: with what is allowed.
    """
    _check_length(text)
    order = []
    for part in (text or "index").split(","):
        words = part.split()
        fields = (*NUMBERS, "label")
        if not 1 <= len(words) <= 2 or words[0] not in fields or (len(words) == 2 and words[1] not in ("asc", "desc")):
            raise QueryError(
                f"cannot order by {part.strip()!r}; use a field of {', '.join(fields)}, with desc after it"
            )
        order.append((words[0], words[1:] == ["desc"]))
    return order


def sort_features(features: Iterable[Feature], order: list[tuple[str, bool]]) -> list[Feature]:
    """Features in order; ties by index."""
    rows = sorted(features, key=lambda row: row.index)
    for field, falling in reversed(order):
        rows.sort(key=lambda row, field=field: getattr(row, field), reverse=falling)  # type: ignore[misc]
    return rows


def _fingerprint(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def make_token(start: int, *question: str) -> str:
    """An opaque token for the page that begins at row `start` of the answer to a question."""
    return base64.urlsafe_b64encode(f"{_fingerprint(*question)}:{start}".encode()).decode()


def read_token(token: str, *question: str) -> int:
    """The row at which a page begins.

    Raises:
        QueryError: the token is broken, or of another question.
    """
    if not token:
        return 0
    try:
        mark, _, start = base64.urlsafe_b64decode(token.encode()).decode().partition(":")
        row = int(start)
    except ValueError as error:
        raise QueryError("not a token of this server") from error
    if mark != _fingerprint(*question) or row < 0:
        raise QueryError("a token of another parent, filter or order; start again without one")
    return row
