"""Puts dlops' modules in place of torch's in a whole model, and back."""

import warnings

from torch import nn
from torch.nn.utils import parametrize

from dlops import nn as dnn

# Exactly these classes are swapped. A subclass may compute something else, so it is left alone.
COUNTERPARTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: dnn.Conv2d,
    nn.LazyConv2d: dnn.LazyConv2d,
    nn.MaxPool2d: dnn.MaxPool2d,
    nn.Unfold: dnn.Unfold,
    nn.Fold: dnn.Fold,
}
NATIVES = {ours: native for native, ours in COUNTERPARTS.items()}


def convert(module: nn.Module) -> nn.Module:
    """Makes every torch.nn.Conv2d, MaxPool2d, Unfold and Fold in ``module`` dlops' own, in place.

    Parameters, buffers, hooks, names and identity of the modules stay: a converted module is the
    same object with another class, so optimisers, state_dicts and shared references go on working.
    Lazy and parametrized modules are converted as well; already converted ones stay. What a forward
    calls in ``torch.nn.functional`` stays torch's.

    Args:
        module: the model, or a single layer.

    Returns:
        ``module`` itself.

    Warns:
        UserWarning: subclasses of these modules were left alone, as they may compute something
            else; the warning names them.

    Example::

        >>> import torch, dlops
        >>> model = dlops.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)))
        >>> type(model[0])
        <class 'dlops.nn.Conv2d'>
    """
    _swap(module, COUNTERPARTS)
    left = [
        f"{name or 'the module itself'} ({type(child).__module__}.{type(child).__qualname__})"
        for name, child in module.named_modules()
        if isinstance(child, tuple(COUNTERPARTS)) and not isinstance(child, tuple(NATIVES))
    ]
    if left:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        warnings.warn(
            "dlops.convert left subclasses of torch's modules as they are, because they may "
            f"compute something else: {', '.join(left[:5])}{more}",
            stacklevel=2,
        )
    return module


def revert(module: nn.Module) -> nn.Module:
    """The reverse of :func:`convert`, in place.

    Args:
        module: the model, or a single layer.

    Returns:
        ``module`` itself.
    """
    _swap(module, NATIVES)
    return module


def _swap(module: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    for child in module.modules():
        cls = type(child)
        if cls in classes:
            child.__class__ = classes[cls]
        elif parametrize.is_parametrized(child) and cls.__bases__[0] in classes:
            # torch.nn.utils.parametrize made this class, for this one module.
            child.__class__ = type(cls.__name__, (classes[cls.__bases__[0]],), dict(cls.__dict__))
