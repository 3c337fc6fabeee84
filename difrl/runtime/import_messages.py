"""Warnings that optional libraries write when they are imported, about parts of theirs that nothing here uses.

diffusers and peft import torchao and bitsandbytes wherever these are installed. A start of difrl would begin with a screen
of warnings about kernels of other machines.
"""

from __future__ import annotations

import logging
from functools import partial

MESSAGES = {
    "torchao": "Failed to load ",
    "torch.utils._pytree": "%s is an Enum subclass",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
}
"""Logger -> beginning of the message that is left out. Its other messages are shown."""


def leave_out_import_messages() -> None:
    """Leave out these warnings from now on. To be called before the libraries are imported."""
    for name, beginning in MESSAGES.items():
        logging.getLogger(name).addFilter(partial(_is_other, beginning))


def _is_other(beginning: str, record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(beginning)
