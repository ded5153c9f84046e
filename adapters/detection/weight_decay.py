"""Which parameters weight decay should leave alone."""

from typing import Any

from torch import nn

__all__ = ["exempt_from_decay"]


def exempt_from_decay(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that the modules of a model exempt from weight decay, whatever their shape.

    A module says so by a method `no_weight_decay` that returns names of its own parameters, as in timm; AutoAssign's
    centre prior does, whose mu and sigma are matrices of one row per class. That norms and biases are exempt is for
    the training to decide.

    Args:
        model: The model.

    Returns:
        The parameters, in the order of the modules and by name.
    """
    exempt = []
    for module in model.modules():
        names: Any = getattr(module, "no_weight_decay", set)
        exempt += [module.get_parameter(name) for name in sorted(names())]
    return exempt
