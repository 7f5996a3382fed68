"""Load, faults, fuzz and soak against real servers: what `docs/reliability.md` tells."""
