"""The base class of errors that the user can mend."""

from __future__ import annotations


class UserError(Exception):
    """An error whose message has three parts: the finding, the expectation and what to do.

    The command line prints the message without a traceback. Other exceptions are faults of difrl and are printed with theirs.
    """

    exit_code = 1
    """Exit status of the command line."""


class MissingFile(UserError, FileNotFoundError):
    """A file or folder that the user named and that does not exist."""
