"""Functions that workers call in tests. This module imports nothing that is slow."""

from __future__ import annotations

import os
import sys


def act(what: str) -> object:
    """Do what a text may make a judge do."""
    match what:
        case "power":  # holds the interpreter: no thread and no signal handler of Python runs
            return len(str(9**9**9**9))
        case "loop":
            while True:
                pass
        case "memory":
            return len([0] * 10**11)
        case "exit":
            os._exit(3)
        case "raise":
            raise ValueError("no such text")
        case "torch":
            return "torch" in sys.modules
        case "descriptors":
            return len(os.listdir("/proc/self/fd"))
        case "process":
            return [os.getpid(), os.getppid()]
        case "hash":
            return hash("text")
    return what.upper()
