"""Make `import torchvision` work beside a CPU build of torch.

torchvision's Linux wheels are CUDA builds. Beside a CPU torch their compiled operators cannot be loaded, and the import
stops with `operator torchvision::nms does not exist`: torchvision attaches Python code to the schemas of two of
those operators. Everything that imports torchvision fails with it: open_clip, the image processors of transformers, the
pipelines of diffusers. Declaring the two schemas is enough for the import. The operators themselves stay absent, and
`torchvision.ops.nms` raises an error; nothing here uses them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _TorchvisionHook(MetaPathFinder):
    """Declare the schemas right before torchvision attaches code to them. It finds no module itself."""

    library: object = None  # torch drops a library's definitions when the Library object dies

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # torchvision has loaded its compiled operators by then, if they can be loaded.
        if name == "torchvision._meta_registrations" and self.library is None:
            import torch

            if not hasattr(torch.ops.torchvision, "nms"):
                # A fragment, because torch allows one full definition of a namespace and that one is torchvision's own.
                self.library = library = torch.library.Library("torchvision", "FRAGMENT")
                for schema in _SCHEMAS:
                    library.define(schema)
        return None


_hook = _TorchvisionHook()


def install_torchvision_hook() -> None:
    """Make later imports of torchvision work where its compiled operators cannot be loaded.

    `import rewards` calls it, and so does `import difrl`. It imports nothing, calling it again is free, and every other
    failure of `import torchvision` stays as it is.
    """
    if _hook not in sys.meta_path:
        sys.meta_path.insert(0, _hook)
