"""conv2d (im2col), max_pool2d and focal loss as C++ and CUDA kernels for PyTorch.

``dlops.functional`` and ``dlops.nn`` mirror ``torch.nn.functional`` and ``torch.nn``;
``dlops.convert(model)`` puts dlops' layers in place of torch's in a whole model.
"""

from dlops import _load

_C = _load.extension()

from dlops import functional, nn  # noqa: E402
from dlops._version import __version__  # noqa: E402
from dlops.convert import convert, revert  # noqa: E402


def build_info() -> dict[str, object]:
    """What this binary was built with, and what it found on this machine."""
    return _C.build_info()


__all__ = ["__version__", "build_info", "convert", "functional", "nn", "revert"]
