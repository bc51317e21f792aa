"""Puts dlops' modules in place of torch's in a whole model, and back."""

from torch import nn

from dlops import nn as dnn

# Exactly these classes are swapped. A subclass may compute something else, so it is left alone.
COUNTERPARTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: dnn.Conv2d,
    nn.MaxPool2d: dnn.MaxPool2d,
    nn.Unfold: dnn.Unfold,
    nn.Fold: dnn.Fold,
}


def convert(module: nn.Module) -> nn.Module:
    """Makes every torch.nn.Conv2d, MaxPool2d, Unfold and Fold in ``module`` dlops' own, in place.

    Parameters, buffers, hooks, names and identity of the modules stay: a converted module is the
    same object with another class, so optimisers, state_dicts and shared references go on working.
    Subclasses of torch's modules and already converted ones are left alone.

    Args:
        module: the model, or a single layer.

    Returns:
        ``module`` itself.

    Example::

        >>> import torch, dlops
        >>> model = dlops.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)))
        >>> type(model[0])
        <class 'dlops.nn.Conv2d'>
    """
    return _swap(module, COUNTERPARTS)


def revert(module: nn.Module) -> nn.Module:
    """The reverse of :func:`convert`, in place.

    Args:
        module: the model, or a single layer.

    Returns:
        ``module`` itself.
    """
    return _swap(module, {ours: native for native, ours in COUNTERPARTS.items()})


def _swap(module: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> nn.Module:
    for child in module.modules():
        other = classes.get(type(child))
        if other is not None:
            child.__class__ = other
    return module
