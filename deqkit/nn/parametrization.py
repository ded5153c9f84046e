"""L6. Parametrised weights that a solve computes once, and modules with such weights that can be pickled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from deqkit import held
from deqkit.solution import Solution


class HeldParametrizationList(ParametrizationList):
    """The parametrisations of one tensor, whose value is held while a solve is under way (see `deqkit.held`).

    An ordinary list becomes one by its class alone, as `torch.nn.utils.parametrize` does it with modules: its
    parameters, its name in the state dict and its behaviour outside of a solve stay what they were.
    """

    def forward(self) -> Tensor:
        """The value of the tensor."""
        # A parametrisation may have parameters of its own, which make the weight as much as the original one does.
        source = [*self.parameters(), *(b for b in self._buffers.values() if b is not None)]
        return held.weight(self, source, super().forward)


def register(module: nn.Module, name: str, parametrization: nn.Module) -> nn.Module:
    """Parametrise a tensor of ``module``, in place; held in a solve, and ``module`` can still be pickled."""
    # unsafe: what would be checked are shape and dtype of a parametrisation that keeps both.
    parametrize.register_parametrization(module, name, parametrization, unsafe=True)
    hold_parametrizations(module)
    _make_copyable(module)
    return module


def hold_parametrizations(module: nn.Module) -> None:
    """Have all parametrised tensors in ``module`` held while a solve is under way, whoever parametrised them."""
    for part in module.modules():
        if type(part) is ParametrizationList:
            part.__class__ = HeldParametrizationList


@contextlib.contextmanager
def hold(*modules: nn.Module, solution: Solution | None = None) -> Iterator[None]:
    """Hold parametrised weights and masks of variational dropout for everything within the block.

    A solve does so by itself, from its first evaluation of f to its backward pass. The block is for what has to see
    the same f outside of a solve, or in several solves. Around all of it:

        >>> with deqkit.nn.hold():
        ...     sol = deqkit.solve(f, x0)
        ...     penalty = deqkit.jacobian_penalty(f, sol.value)  # with the masks of the solve

    or afterwards:

        >>> x = layer(x0, inputs)
        >>> with deqkit.nn.hold(solution=layer.last_solution):
        ...     penalty = deqkit.jacobian_penalty(layer.module, x, (inputs,))

    Each weight is computed at its first use within the block, each mask drawn at its first use. Weights carry gradients
    if these are enabled where the block starts, or where a weight is used. The losses of several solves in one block
    share the graph of the weights: add them up and call backward() once. A change of the parameters (a step of the
    optimiser, `load_state_dict`, a move) is noticed; one of the masks is made by leaving the block. Blocks may be
    nested, the inner ones then change nothing. Other threads are not affected.

    Args:
        *modules: modules whose parametrisations stem from elsewhere than `deqkit.nn`, such as
            `torch.nn.utils.parametrizations.orthogonal`: they are held from here on, in every solve and block. (Those
            in the module of a `FixedPoint` are anyway.)
        solution: take the masks that this solve has drawn, and not those of a block around.

    Raises:
        TypeError: something else than modules or a `Solution` was given.
    """
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(f"hold takes modules, got {type(module).__name__}")
        hold_parametrizations(module)
    held.watch_optimizers()
    scope = held.opened()
    if solution is not None:
        if not isinstance(solution, Solution):
            raise TypeError(f"solution must be a deqkit.Solution, got {type(solution).__name__}")
        scope = held.Scope(scope.with_grad, scope.weights, solution.masks)
    with held.Entered(scope):
        yield


def hold_in_checkpoint() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For activation checkpointing inside f: the ``context_fn`` with which the recomputation sees the same f.

    Only needed where f itself calls `torch.utils.checkpoint.checkpoint` around modules with variational dropout:

        >>> checkpoint(block, x, use_reentrant=False, context_fn=deqkit.nn.hold_in_checkpoint)

    Returns:
        The contexts of the forward pass and of the recomputation.
    """
    scope = held.current()
    return held.Entered(scope), held.Entered(scope)


def _make_copyable(module: nn.Module) -> None:
    """Give the class that `parametrize` has made for ``module`` alone a way through pickle and copy.

    By itself it refuses to be pickled, and a deep copy shares the class: to take the parametrisations off one of both
    would take the weight away from the other.
    """
    made: Any = type(module)
    made.__reduce_ex__ = _reduce
    if "__deepcopy__" in vars(made):  # which is that of `parametrize`, and goes before __reduce_ex__
        del made.__deepcopy__


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    base = parametrize.type_before_parametrizations(module)
    return _rebuild, (base, tuple(module.parametrizations)), base.__getstate__(module)  # pyright: ignore


def _rebuild(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """A module of the class that `parametrize` makes; its state follows."""
    module = base.__new__(base)
    nn.Module.__init__(module)
    for name in names:
        module.register_parameter(name, nn.Parameter(torch.empty(0)))
        parametrize.register_parametrization(module, name, nn.Identity(), unsafe=True)
    _make_copyable(module)
    return module
