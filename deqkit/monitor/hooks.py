"""L6. Where a Monitor listens: the modules that solve, and what is hung on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Hook:
    """A forward hook that hands a module's last solution on. Copies and pickles of the module get one without effect.

    Args:
        receive: called as ``receive(name, module, args, solution)``, args being what f got besides the state, where the
            module has said so by `listen`, else None; itself None for nothing.
        name: what the module is called.
    """

    def __init__(self, receive: Callable[..., None] | None = None, name: str = "") -> None:
        self.receive, self.name = receive, name
        self.args: tuple[Any, ...] | None = None

    def listen(self, args: tuple[Any, ...]) -> None:
        """Remember what else f got in the solve of the forward call that is running."""
        self.args = None if torch.compiler.is_compiling() else args

    def __call__(self, module: Any, inputs: Any, output: Any) -> None:
        """After a forward call of ``module``."""
        if self.receive is None:
            return
        args, self.args = self.args, None
        solution = module.last_solution
        # What is called here would break a graph that is being traced. Only a solve of a fixed number of steps can be
        # part of one.
        if solution is None or (torch.compiler.is_compiling() and not (solution.rtol or solution.atol)):
            return
        self.receive(self.name, module, args, solution)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with a ``last_solution``, by their names in the model; one that is the model itself is "solve"."""
    while isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module
    found = {}
    for name, module in model.named_modules():
        # Not hasattr of the module: what torch.compile wraps it in has whatever it has.
        if hasattr(type(module), "last_solution") or "last_solution" in vars(module):
            found[name.replace("_orig_mod", "").replace("..", ".").strip(".") or "solve"] = module
    return found
