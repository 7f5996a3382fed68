"""From a request to jobs, or to the list of everything that is wrong with it, before any model work.

Pure functions of the request, of what the engine serves and of the limits.
"""

from turbolens_server.rpc.validation.checks import (
    MAX_REFERENCES,
    MAX_REQUEST_ID_CHARS,
    RequestLimits,
)
from turbolens_server.rpc.validation.requests import (
    ValidRequest,
    validate_attribute,
    validate_extract,
    validate_generate,
)
from turbolens_server.rpc.validation.selection import Selection

__all__ = [
    "MAX_REFERENCES",
    "MAX_REQUEST_ID_CHARS",
    "RequestLimits",
    "Selection",
    "ValidRequest",
    "validate_attribute",
    "validate_extract",
    "validate_generate",
]
