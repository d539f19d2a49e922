"""What the two sides of the mooring agree on. A line is one packet: the verb, a space, the rest; descriptors ride along."""

from __future__ import annotations

__all__ = ["ADDRESS", "LISTENERS", "MOST", "SERVING"]

#: The environment variable with the (abstract) name of the anchor's socket, without the leading NUL. It has not the
#: prefix of the settings, which takes settings only.
ADDRESS = "_GRACEHOOKS_MOORING"
#: "listeners NAME\\0NAME…" with one descriptor a name; "serving SECONDS", where SECONDS (the stop budget) may be absent.
LISTENERS, SERVING = "listeners", "serving"
#: The most descriptors that the kernel takes in one packet (SCM_MAX_FD).
MOST = 253
