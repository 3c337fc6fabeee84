"""The base class of errors that the user can mend."""

from __future__ import annotations


class UserError(Exception):
    """An error whose message says what was found, what was expected and what to do.

    The command line prints the message without a traceback. Any other exception is a fault of difrl and keeps its own.
    """

    exit_code = 1
