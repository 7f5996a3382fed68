"""Questions about features: checked, asked of the catalog, and its answers as messages."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from turbolens_proto.v1 import feature_service_pb2 as pb
from turbolens_proto.v1 import steering_pb2
from turbolens_server.catalog.catalog import Catalog
from turbolens_server.catalog.query import (
    Feature,
    QueryError,
    make_token,
    parse_filter,
    parse_order,
    read_token,
    sort_features,
)
from turbolens_server.rpc.errors import Violation, invalid, not_found

T = TypeVar("T")
MAX_LISTED: Final = 1000
MAX_FOUND: Final = 100
MAX_QUERY_CHARS: Final = 200
MAX_SAES: Final = 64
"""SAEs that a request or a search may name."""
_LIST_DEFAULT: Final = 100
_SEARCH_DEFAULT: Final = 10
_NAME: Final = re.compile(r"saes/(?P<sae>[^/]+)(?:/features/(?P<index>[0-9]+))?")


def get_feature(catalog: Catalog, request: pb.GetFeatureRequest) -> pb.GetFeatureResponse:
    """One feature by resource name, with its top examples and direction.

    Raises:
        RpcError: NOT_FOUND.
    """
    feature = _feature_of(catalog, request.name)
    message = _message(feature)
    message.direction.extend(catalog.direction(feature.sae, feature.index))
    message.examples.extend(pb.FeatureExample(**dataclasses.asdict(example)) for example in feature.examples)
    return pb.GetFeatureResponse(feature=message)


def list_features(catalog: Catalog, request: pb.ListFeaturesRequest) -> pb.ListFeaturesResponse:
    """A page of an SAE's features.

    Raises:
        RpcError: NOT_FOUND for the SAE, INVALID_ARGUMENT for size, token, filter and order.
    """
    match = _NAME.fullmatch(request.parent)
    if match is None or match["index"] is not None:
        raise not_found(f"{request.parent[:80]!r} is no SAE; parents look like saes/up.0.1")
    features = _features_of(catalog, match["sae"])
    violations = _page_size(request.page_size)
    question = (request.parent, request.filter, request.order_by)
    start = _read(violations, "page_token", lambda: read_token(request.page_token, *question))
    holds = _read(violations, "filter", lambda: parse_filter(request.filter))
    order = _read(violations, "order_by", lambda: parse_order(request.order_by))
    if start is None or holds is None or order is None or violations:
        raise invalid(violations)
    found = sort_features(filter(holds, features), order)
    end = start + min(request.page_size or _LIST_DEFAULT, MAX_LISTED)
    return pb.ListFeaturesResponse(
        features=[_message(feature) for feature in found[start:end]],
        next_page_token=make_token(end, *question) if end < len(found) else "",
        total_size=len(found),
    )


def check_search(request: pb.SearchFeaturesRequest, saes: Sequence[str]) -> None:
    """Refuse a search before any work; `saes` are those served.

    Raises:
        RpcError: INVALID_ARGUMENT.
    """
    violations = _page_size(request.page_size)
    if not request.query.strip():
        violations.append(Violation("query", "is empty; give a word or a few"))
    elif len(request.query) > MAX_QUERY_CHARS:
        violations.append(Violation("query", f"has {len(request.query)} characters; at most {MAX_QUERY_CHARS}"))
    if len(request.saes) > MAX_SAES:
        violations.append(Violation("saes", f"got {len(request.saes)} names; at most {MAX_SAES}"))
    for i, sae in enumerate(request.saes[:MAX_SAES]):
        if sae not in saes:
            have = ", ".join(saes) or "none"
            violations.append(Violation(f"saes[{i}]", f"got {sae[:60]!r}; this server has {have}"))
    if violations:
        raise invalid(violations)


def search(
    catalog: Catalog, request: pb.SearchFeaturesRequest, embedded: npt.NDArray[np.float32]
) -> pb.SearchFeaturesResponse:
    """Features for words, best first; `embedded` are the words by the text encoder."""
    most = min(request.page_size or _SEARCH_DEFAULT, MAX_FOUND)
    found = catalog.search(request.query, request.saes, most, embedded)
    return pb.SearchFeaturesResponse(
        matches=[
            pb.FeatureMatch(feature=_message(match.feature), score=match.score, reason=match.reason) for match in found
        ],
        hint="" if found else catalog.hint(request.query, request.saes),
    )


def nearest(catalog: Catalog, request: pb.NearestFeaturesRequest) -> pb.NearestFeaturesResponse:
    """The features of the same SAE that write most alike, or that fire together most.

    Raises:
        RpcError: NOT_FOUND for the feature, INVALID_ARGUMENT for the size, or where nobody counted what is asked for.
    """
    feature = _feature_of(catalog, request.name)
    violations = _page_size(request.page_size)
    if request.by not in pb.Nearness.values():
        violations.append(Violation("by", f"got {request.by}; must be one of {', '.join(pb.Nearness.keys())}"))
    if violations:
        raise invalid(violations)
    most = min(request.page_size or _SEARCH_DEFAULT, MAX_FOUND)
    by = catalog.co_firing if request.by == pb.NEARNESS_CO_FIRING else catalog.nearest
    found = by(feature.sae, feature.index, most)
    if found is None:
        told = f"the catalog of {feature.sae} has no counts of what fires together; turbolens catalog build makes them"
        raise invalid([Violation("by", told)])
    return pb.NearestFeaturesResponse(
        features=[
            pb.NearFeature(feature=_message(near.feature), cosine=near.cosine, jaccard=near.jaccard) for near in found
        ]
    )


def _feature_of(catalog: Catalog, name: str) -> Feature:
    match = _NAME.fullmatch(name)
    if match is None or match["index"] is None:
        raise not_found(f"{name[:80]!r} is no feature; names look like saes/up.0.1/features/202")
    features = _features_of(catalog, match["sae"])
    if len(match["index"]) > 9 or int(match["index"]) >= len(features):
        raise not_found(f"{match['sae']} has features 0 to {len(features) - 1}, not {match['index'][:20]}")
    return features[int(match["index"])]


def _features_of(catalog: Catalog, sae: str) -> Sequence[Feature]:
    if sae not in catalog.saes:
        raise not_found(f"no SAE {sae[:60]!r}; this server has {', '.join(catalog.saes) or 'none'}")
    return catalog.features(sae)


def _read(violations: list[Violation], field: str, read: Callable[[], T]) -> T | None:
    """What a field says; None where it cannot be read, which is then among the violations."""
    try:
        return read()
    except QueryError as error:
        violations.append(Violation(field, str(error)))
        return None


def _page_size(size: int) -> list[Violation]:
    return [Violation("page_size", f"got {size}; must not be negative")] if size < 0 else []


def _message(feature: Feature) -> pb.Feature:
    """A feature without its examples."""
    return pb.Feature(
        name=f"saes/{feature.sae}/features/{feature.index}",
        ref=steering_pb2.FeatureRef(sae=feature.sae, index=feature.index),
        label=feature.label,
        label_score=feature.label_score,
        frequency=feature.frequency,
        mean=feature.mean,
        max=feature.max,
        labels=[
            pb.FeatureLabel(attribute=lb.attribute, value=lb.value, region=lb.region, score=lb.score)
            for lb in feature.labels
        ],
        effects=[pb.FeatureEffect(**dataclasses.asdict(effect)) for effect in feature.effects],
        icon_strength=feature.icon_strength,
    )
