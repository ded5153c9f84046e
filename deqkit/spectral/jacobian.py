"""L6. Products with the Jacobian of f at one point, along the graph of a single evaluation.

J^T u is an ordinary vector-Jacobian product. J v is the derivative, in the direction v, of the map u -> J^T u, which is
linear: wherever u lies, the derivative of <J^T u, v> towards u is J v (J. Townsend, "A new trick for calculating
Jacobian vector products", 2017). It works for every f that can be differentiated twice in reverse mode, and needs none
of the forward-mode formulas.

A complex state is one of pairs of reals here as everywhere: J is the real Jacobian of the pairs. For a holomorphic f
its eigenvalues are those of the complex Jacobian and their conjugates, its norms those of the complex Jacobian
(spectral norm) or sqrt(2) times them (Frobenius norm).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from deqkit import linalg
from deqkit.adjoints.base import cut, vjp
from deqkit.solvers.base import as_int
from deqkit.state import Blocks, Evaluator, StateLayout, without_autocast


class Jacobian:
    """df/dx at one point. f is called once, when this is made; every product walks its graph.

    Args:
        f: the map, ``f(x, *args)``.
        x: the point.
        args: further arguments of f.
        batch_dims: leading dims that index independent samples.
        through_x: whether products with a graph are functions of whatever x was computed from, too.

    Raises:
        TypeError: f is not callable, args is no tuple, or x holds something else than floating or complex tensors.
        ValueError: batch_dims is negative, or f does not keep the structure and the shapes of x.
        NotImplementedError: called inside a transform of `torch.func`.
    """

    def __init__(
        self,
        f: Callable[..., Any],
        x: Any,
        args: tuple[Any, ...],
        batch_dims: int,
        *,
        through_x: bool = False,
    ) -> None:
        if torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore
            raise NotImplementedError("torch.func does not go through products with df/dx: use torch.autograd instead")
        if not callable(f):
            raise TypeError(f"f must be callable, got {type(f).__name__}")
        if not isinstance(args, tuple):
            raise TypeError(f"args must be a tuple of further arguments of f, got {type(args).__name__}: args=(b,)")
        if as_int("batch_dims", batch_dims) < 0:
            raise ValueError(f"batch_dims must not be negative, got {batch_dims}")
        self.layout = StateLayout(x, batch_dims)
        self.num_products = 0
        self._slope: tuple[Blocks, Blocks] | None = None
        evaluator = Evaluator(f, self.layout)  # made here, where it sees the caller's autocast
        self.resolution = evaluator.resolution
        with exact_arithmetic(self.layout.device, gradients=True):
            point = self.layout.pack(tree_map(_usable, x))
            pairs = zip(point, cut(point), strict=True)
            self.x = tuple(b.view_as(b) if through_x and b.requires_grad else constant for b, constant in pairs)
            self.fx = self._evaluate(evaluator.with_args(tree_map(_usable, args)))

    @torch.compiler.disable(reason="a compiled f has no second derivative")
    def _evaluate(self, f: Evaluator) -> Blocks:
        """f(x), without a call for a batch without samples."""
        return f(self.x) if self.layout.num_samples else self.x

    @property
    def num_reals(self) -> int:
        """D, the real numbers in one sample."""
        return sum(b.shape[1] for b in self.x)

    def transposed(self, u: Blocks, *, create_graph: bool = False) -> Blocks:
        """J^T u, of u's shapes; as a differentiable function of what f depends on with ``create_graph``."""
        self.num_products += 1
        with exact_arithmetic(self.layout.device, gradients=True):
            return vjp(self.fx, self.x, u, create_graph=create_graph)

    def times(self, v: Blocks) -> Blocks:
        """J v, of v's shapes, without a graph."""
        self.num_products += 1
        with exact_arithmetic(self.layout.device, gradients=True):
            if self._slope is None:
                u = tuple(torch.zeros_like(b, requires_grad=True) for b in self.fx)
                self._slope = u, vjp(self.fx, self.x, u, create_graph=True)
            u, image = self._slope
            try:
                return tuple(b.detach() for b in vjp(image, u, v))
            except RuntimeError as error:
                error.add_note(
                    "J v is taken as the derivative of J^T u: f must be differentiable twice in reverse mode. Compiled "
                    "functions and fused attention are not (see torch.nn.attention.sdpa_kernel for one that is)."
                )
                raise

    def draw(self, sampler: Callable[..., Tensor], generator: torch.Generator | None, num_samples: int) -> Blocks:
        """Random blocks of ``num_samples`` rows by ``sampler(shape, ...)``, on the generator's device; None: global."""
        device = self.layout.device if generator is None else generator.device
        return tuple(sampler((num_samples, b.shape[1]), generator=generator, device=device).to(b) for b in self.x)


class Gram:
    """J J^T, divided per sample by a number that keeps what it gives within the range of the dtypes.

    Attributes:
        scale: that number, (B,): the length of the first J^T u.
    """

    def __init__(self, jacobian: Jacobian) -> None:
        self.jacobian = jacobian
        self.scale: Tensor | None = None

    def __call__(self, u: Blocks) -> Blocks:
        """J (J^T u) / scale."""
        v = self.jacobian.transposed(u)
        size = linalg.norm(v)
        if self.scale is None:
            self.scale = torch.where(size > 0, size, 1.0)
        unit = linalg.scale(v, linalg.inverse_size(size, v[0].dtype)[0])
        length = (size / self.scale).to(v[0].dtype).unsqueeze(1)
        return tuple(b * length for b in self.jacobian.times(unit))  # NaN where it is not finite


@contextmanager
def exact_arithmetic(device: torch.device, *, gradients: bool) -> Iterator[None]:
    """Autocast and inference mode off and gradients as told, whatever the caller has set."""
    with torch.inference_mode(False), torch.set_grad_enabled(gradients), without_autocast(device):
        yield


def random_signs(shape: tuple[int, ...], *, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """+1 or -1, each with probability one half: no other entries of mean 0 and variance 1 give so small a variance."""
    return torch.randint(0, 2, shape, generator=generator, device=device).mul_(2).sub_(1)


def make_generator(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """The caller's generator, or a fresh one with a fixed seed: the same question always gets the same answer.

    Raises:
        TypeError: not a generator.
    """
    check_generator(generator)
    return torch.Generator(device).manual_seed(0) if generator is None else generator


def check_generator(generator: Any) -> None:
    """Refuse what is neither a generator nor None.

    Raises:
        TypeError: see above.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")


def _usable(value: Any) -> Any:
    """A tensor made in inference mode as one that autograd can save; anything else as it is."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value
