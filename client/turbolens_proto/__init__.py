"""Generated from proto/turbolens/v1; see tools/protos.py."""
