"""Write what the Helm chart's schema says of the server's settings: name, type, choices and help of each.

python tools/chart.py [--check]
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import json
import sys
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

from turbolens_server.config import ServerConfig

SCHEMA: Final = Path(__file__).parents[1] / "deploy/helm/turbolens/values.schema.json"
DECIDED: Final = frozenset(
    {
        "host", "port", "health_port", "metrics_port", "grace_s", "log_format", "tls_cert", "tls_key",
        "tls_client_ca", "tokens",
    }
)  # fmt: skip
"""Settings that follow from other values of the chart, or that the image gives."""
_TYPES: Final = {str: "string", int: "integer", float: "number", bool: "boolean"}


def _schema(hint: Any) -> dict[str, Any]:
    """JSON schema of a field's type."""
    if get_origin(hint) is Literal:
        return {"enum": list(get_args(hint))}
    if get_origin(hint) is tuple:
        return {"type": "array", "items": _schema(get_args(hint)[0])}
    if alternatives := [part for part in get_args(hint) if part is not type(None)]:
        return _schema(alternatives[0])
    return {"type": _TYPES[hint]}


def settings() -> dict[str, Any]:
    """A property for each setting that a user of the chart may give."""
    hints = get_type_hints(ServerConfig)
    (described,) = ast.parse(inspect.getsource(ServerConfig)).body
    assert isinstance(described, ast.ClassDef)
    help_of = {
        ast.unparse(field.target): " ".join(ast.literal_eval(text.value).split())
        for field, text in itertools.pairwise(described.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
    names = [field.name for field in dataclasses.fields(ServerConfig) if field.name not in DECIDED]
    return {name: {**_schema(hints[name]), "description": help_of[name]} for name in names}


def main() -> None:
    """Write the schema, or say that it is not what it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where it would")
    check = parser.parse_args().check
    schema = json.loads(SCHEMA.read_text())
    schema["$defs"]["settings"]["properties"] = settings()
    text = json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
    if check and SCHEMA.read_text() != text:
        sys.exit(f"{SCHEMA.name} does not know the server's settings as they are; run make chart")
    if not check:
        SCHEMA.write_text(text)


if __name__ == "__main__":
    main()
