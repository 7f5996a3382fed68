"""Generate the studio's TypeScript types of the contract's JSON, or check that they are fresh.

python tools/ts_types.py            write studio/web/src/contract.ts
python tools/ts_types.py --check    fail where the checked-in file differs
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from turbolens_proto.v1 import model_service_pb2, steering_pb2

OUT: Final = Path(__file__).resolve().parent.parent / "studio" / "web" / "src" / "contract.ts"
ROOTS: Final = (steering_pb2.Edit.DESCRIPTOR, model_service_pb2.Model.DESCRIPTOR)
_HEADER: Final = "// Messages of the contract as JSON; made by tools/ts_types.py from proto/: edit there."
_TEXT: Final = {  # as protobuf's JSON has them: 64-bit numbers and bytes are text
    FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_UINT64,
}  # fmt: skip


def type_of(field: Any, needed: list[Descriptor]) -> str:
    """The TypeScript type of a field; adds the messages that it needs."""
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return f"Record<string, {type_of(field.message_type.fields_by_name['value'], needed)}>"
    if field.message_type is not None:
        needed.append(field.message_type)
        name = f"{field.message_type.name}Json"
    elif field.enum_type is not None:
        name = " | ".join(f'"{value.name}"' for value in field.enum_type.values)
    elif field.type == FieldDescriptor.TYPE_BOOL:
        name = "boolean"
    else:
        name = "string" if field.type in _TEXT else "number"
    if field.is_repeated:
        return f"({name})[]" if " " in name else f"{name}[]"
    return name


def source() -> str:
    """The text of the file: every message that the roots reach, every field optional, as JSON leaves out defaults."""
    waiting, seen, blocks = list(ROOTS), set(), []
    while waiting:
        message = waiting.pop(0)
        if message.full_name in seen:
            continue
        seen.add(message.full_name)
        lines = [f"  {field.json_name}?: {type_of(field, waiting)};" for field in message.fields]
        blocks.append(f"export interface {message.name}Json {{\n" + "".join(f"{line}\n" for line in lines) + "}\n")
    return "// Messages of the contract as JSON; made by tools/ts_types.py from proto/: edit there.\n\n" + "\n".join(
        blocks
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    if not parser.parse_args().check:
        OUT.write_text(source())
    elif OUT.read_text() != source():
        raise SystemExit(f"{OUT.name} is stale: run python tools/ts_types.py")


if __name__ == "__main__":
    main()
