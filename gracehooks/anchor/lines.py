"""What the two sides of the mooring agree on. A line is one packet: the verb, a space, the rest; descriptors ride along."""

from __future__ import annotations

__all__ = ["ADDRESS", "KEEP", "KEPT", "LISTENERS", "MOST", "SERVING"]

#: The environment variable with the (abstract) name of the anchor's socket, without the leading NUL. It has not the
#: prefix of the settings, which takes settings only.
ADDRESS = "_GRACEHOOKS_MOORING"
#: "listeners NAME\\0NAME…" with one descriptor a name; "serving SECONDS", where SECONDS (the stop budget) may be absent.
#: "keep TEXT": what the next master is to know if this one dies. It finds it in the environment variable KEPT.
LISTENERS, SERVING, KEEP = "listeners", "serving", "keep"
KEPT = "_GRACEHOOKS_KEPT"
#: The most descriptors that the kernel takes in one packet (SCM_MAX_FD).
MOST = 253
