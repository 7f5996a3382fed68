"""The server. Importing it switches off what its dependencies would send to their makers: see :mod:`.privacy`."""

from turbolens_server.privacy import switch_off_telemetry

switch_off_telemetry()
