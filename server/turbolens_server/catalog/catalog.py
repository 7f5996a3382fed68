"""What is known of every feature of every SAE served."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from turbolens_proto.v1 import feature_service_pb2 as pb
from turbolens_proto.v1 import steering_pb2
from turbolens_server.catalog.labels import FeatureLabels, read_labels
from turbolens_server.catalog.query import QueryError, Row, make_token, parse_filter, parse_order, read_token, sort_rows
from turbolens_server.catalog.search import commonness, cosines, nearness, sureness, words_of
from turbolens_server.engine.info import SaeInfo
from turbolens_server.rpc.errors import Violation, invalid, not_found
from turbolens_server.sae.bundle import BundleError

Embed = Callable[[Sequence[str]], npt.NDArray[np.float32]]
_LIST_DEFAULT: Final = 100
MAX_LISTED: Final = 1000
_SEARCH_DEFAULT: Final = 10
MAX_FOUND: Final = 100
MAX_QUERY_CHARS: Final = 200
_MOST_EMBEDDED: Final = 2000
"""Distinct labels whose meaning is embedded at the start; of more than that, search goes by their words alone."""
_SECOND_MEANING: Final = 0.5
"""What a label that is not the feature's best counts for: the feature stands for something else first."""
_NAME: Final = re.compile(r"saes/(?P<sae>[^/]+)(?:/features/(?P<index>[0-9]+))?")


class Catalog:
    """Statistics and labels of all features, in memory; immutable after construction."""

    def __init__(self, saes: Mapping[str, SaeInfo], embed: Embed) -> None:
        """Read the labels of every bundle; `embed` is the model's text encoder, asked once for the labels' words.

        Raises:
            BundleError: a labels file or a bundle's synonyms are malformed.
        """
        self._saes = saes
        self._labels = {name: read_labels(s.bundle.folder, s.bundle.d_sae) for name, s in saes.items()}
        self._rows = {name: _rows(sae, self._labels[name]) for name, sae in saes.items()}
        self._synonyms = {name: _synonyms(sae) for name, sae in saes.items()}
        self._values = {
            name: {label.value for known in labels.values() for label in known.labels}
            for name, labels in self._labels.items()
        }
        self._common = {name: _common(sae) for name, sae in saes.items()}
        """By SAE and feature: how far it can be relied on to be there, 1 where nobody measured."""
        values = sorted(set().union(*self._values.values()))
        values = values if len(values) <= _MOST_EMBEDDED else []
        vectors = embed(values) if values else np.zeros((0, 1), np.float32)
        self._vectors = dict(zip(values, vectors, strict=True))
        self._center: npt.NDArray[np.float32] = vectors.mean(0) if values else np.zeros(1, np.float32)

    def label_counts(self) -> dict[str, int]:
        """Features with a label, by SAE."""
        return {name: sum(bool(row.label) for row in rows) for name, rows in self._rows.items()}

    def labels_of(self, sae: str) -> Mapping[int, str]:
        """What the features of an SAE stand for, those that have a label."""
        return {row.index: row.label for row in self._rows[sae] if row.label}

    def get_feature(self, name: str) -> pb.Feature:
        """One feature by resource name, with its top examples.

        Raises:
            RpcError: NOT_FOUND.
        """
        match = _NAME.fullmatch(name)
        if match is None or match["index"] is None:
            raise not_found(f"{name[:80]!r} is no feature; names look like saes/up.0.1/features/202")
        rows = self._sae_rows(match["sae"])
        if len(match["index"]) > 9 or int(match["index"]) >= len(rows):
            raise not_found(f"{match['sae']} has features 0 to {len(rows) - 1}, not {match['index'][:20]}")
        index = int(match["index"])
        feature = _feature(match["sae"], rows[index])
        known = self._labels[match["sae"]].get(index)
        feature.examples.extend(pb.FeatureExample(**dataclasses.asdict(e)) for e in (known.examples if known else ()))
        return feature

    def list_features(self, request: pb.ListFeaturesRequest) -> pb.ListFeaturesResponse:
        """A page of an SAE's features.

        Raises:
            RpcError: NOT_FOUND for the SAE, INVALID_ARGUMENT for size, token, filter and order.
        """
        match = _NAME.fullmatch(request.parent)
        if match is None or match["index"] is not None:
            raise not_found(f"{request.parent[:80]!r} is no SAE; parents look like saes/up.0.1")
        rows = self._sae_rows(match["sae"])
        violations = _page_size(request.page_size)
        question = (request.parent, request.filter, request.order_by)
        start = 0
        for field, read in (
            ("page_token", lambda: read_token(request.page_token, *question)),
            ("filter", lambda: parse_filter(request.filter)),
            ("order_by", lambda: parse_order(request.order_by)),
        ):
            try:
                read()
            except QueryError as error:
                violations.append(Violation(field, str(error)))
        if violations:
            raise invalid(violations)
        start = read_token(request.page_token, *question)
        found = sort_rows(list(filter(parse_filter(request.filter), rows)), parse_order(request.order_by))
        end = start + min(request.page_size or _LIST_DEFAULT, MAX_LISTED)
        return pb.ListFeaturesResponse(
            features=[_feature(match["sae"], row) for row in found[start:end]],
            next_page_token=make_token(end, *question) if end < len(found) else "",
            total_size=len(found),
        )

    def check_search(self, request: pb.SearchFeaturesRequest) -> None:
        """Refuse a search before any work.

        Raises:
            RpcError: INVALID_ARGUMENT.
        """
        violations = _page_size(request.page_size)
        if not request.query.strip():
            violations.append(Violation("query", "is empty; give a word or a few"))
        elif len(request.query) > MAX_QUERY_CHARS:
            violations.append(Violation("query", f"has {len(request.query)} characters; at most {MAX_QUERY_CHARS}"))
        for i, sae in enumerate(request.saes):
            if sae not in self._saes:
                have = ", ".join(self._saes) or "none"
                violations.append(Violation(f"saes[{i}]", f"got {sae[:60]!r}; this server has {have}"))
        if violations:
            raise invalid(violations)

    def search(self, request: pb.SearchFeaturesRequest, embedded: npt.NDArray[np.float32]) -> pb.SearchFeaturesResponse:
        """Features for words, best first: how near a label is to the words, times how sure the label is, times how
        common the feature is among its SAE's, where that was measured."""
        query = words_of(request.query)
        meaning = cosines(embedded, self._vectors, self._center)
        found: list[tuple[float, str, str, Row]] = []
        for sae in dict.fromkeys(request.saes or self._saes):
            near = {v: nearness(query, v, self._synonyms[sae], meaning.get(v, 0.0)) for v in self._values[sae]}
            for row in self._rows[sae]:
                best = max(
                    (
                        (near[lb.value].score * sureness(lb.score) * (1.0 if rank == 0 else _SECOND_MEANING), lb)
                        for rank, lb in enumerate(row.labels)
                    ),
                    key=lambda pair: pair[0],
                    default=None,
                )
                if best is not None and best[0] > 0:
                    score, label = best[0] * self._common[sae][row.index], best[1]
                    reason = f"{label.attribute}={label.value}: {near[label.value].how}"
                    found.append((score, reason, sae, row))
        found.sort(key=lambda entry: -entry[0])
        most = min(request.page_size or _SEARCH_DEFAULT, MAX_FOUND)
        return pb.SearchFeaturesResponse(
            matches=[
                pb.FeatureMatch(feature=_feature(sae, row), score=score, reason=reason)
                for score, reason, sae, row in found[:most]
            ]
        )

    def _sae_rows(self, sae: str) -> list[Row]:
        if sae not in self._rows:
            raise not_found(f"no SAE {sae[:60]!r}; this server has {', '.join(self._rows) or 'none'}")
        return self._rows[sae]


def _synonyms(sae: SaeInfo) -> dict[str, list[str]]:
    """Other words for labels' values, which a bundle may bring."""
    found = sae.bundle.provenance.get("synonyms", {})
    lists = found.values() if isinstance(found, dict) else [None]
    if not all(isinstance(words, list) and all(isinstance(word, str) for word in words) for words in lists):
        raise BundleError(f'{sae.name}: provenance.json has synonyms of another form than {{"blue": ["azure"]}}')
    return dict(found)


def _common(sae: SaeInfo) -> npt.NDArray[np.float32]:
    measured = sae.bundle.measured
    return np.ones(sae.bundle.d_sae, np.float32) if measured is None else commonness(measured.frequency)


def _rows(sae: SaeInfo, labels: Mapping[int, FeatureLabels]) -> list[Row]:
    stats, rows = sae.bundle.stats, []
    for index in range(sae.bundle.d_sae):
        known = labels.get(index)
        frequency = mean = largest = 0.0
        if stats is not None:
            frequency, mean, largest = (float(v[index]) for v in (stats.frequency, stats.mean, stats.max))
        label, score, every = (known.label, known.label_score, known.labels) if known else ("", 0.0, ())
        rows.append(Row(index, label, score, frequency, mean, largest, every))
    return rows


def _feature(sae: str, row: Row) -> pb.Feature:
    return pb.Feature(
        name=f"saes/{sae}/features/{row.index}",
        ref=steering_pb2.FeatureRef(sae=sae, index=row.index),
        label=row.label,
        label_score=row.label_score,
        frequency=row.frequency,
        mean=row.mean,
        max=row.max,
        labels=[
            pb.FeatureLabel(attribute=lb.attribute, value=lb.value, region=lb.region, score=lb.score)
            for lb in row.labels
        ],
    )


def _page_size(size: int) -> list[Violation]:
    return [Violation("page_size", f"got {size}; must not be negative")] if size < 0 else []
