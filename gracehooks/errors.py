"""The errors, sorted by whose turn it is: the operator's, the caller's, the new code's.

A message says what happened, what gracehooks did, and what to do next.
"""

from __future__ import annotations

__all__ = ["ConfigError", "GracehooksError", "JobRejected", "PreflightError"]


class GracehooksError(Exception):
    """The base of every error that gracehooks raises itself."""


class ConfigError(GracehooksError, ValueError):
    """The operator's turn: a setting has an unknown name, a wrong type or a value out of its range.

    Raised before the first worker starts; on a reload the running configuration goes on.
    """


class PreflightError(GracehooksError):
    """The operator's turn: an upgrade cannot begin (a directory or an interpreter is gone, an option forbids it).

    Nothing was forked and nothing was changed when it is raised.
    """


class JobRejected(GracehooksError, RuntimeError):  # noqa: N818 - the name is the user's contract
    """The caller's turn: the worker is at its end and takes no further job, or the process is no worker.

    The work was not begun; hand it to a queue, or answer the request with an error.
    """
