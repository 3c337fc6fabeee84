"""Mends `import torchvision` beside a CPU build of torch.

torchvision's Linux wheels are CUDA builds. Beside a CPU torch their compiled operators cannot be loaded, and
the import then stops with `operator torchvision::nms does not exist`, because torchvision attaches Python
code to the *schemas* of two of those operators. Everything that imports torchvision fails with it: open_clip,
the image processors of transformers, the pipelines of diffusers. Declaring the two schemas is enough for the
import. The operators themselves stay absent (calling `torchvision.ops.nms` says so); nothing here uses them.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

# torch drops a library's definitions when the Library object dies: this reference keeps them.
_library: torch.library.Library | None = None


def ensure_torchvision() -> bool:
    """Make torchvision importable if it is installed; True if its operator schemas had to be declared here.

    Call it before anything imports torchvision, open_clip, diffusers' pipelines or transformers' image
    processors; `import difrl` does. Calling it again is free. Without torchvision, or where its operators load, nothing is
    declared. Any other failure of `import torchvision` is raised as it is.
    """
    if _library is not None:
        return True
    if importlib.util.find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    else:
        return False
    _declare_operators()
    importlib.import_module("torchvision")
    return True


def _declare_operators() -> None:
    global _library
    # A fragment, because torch allows one full definition of a namespace and that one is torchvision's own.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _library = library
