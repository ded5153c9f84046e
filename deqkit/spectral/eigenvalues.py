"""L6. The dominant eigenvalues of df/dx for one sample, as points in the complex plane.

A large state goes through ARPACK's implicitly restarted Arnoldi method (Lehoucq, Sorensen & Yang, "ARPACK users'
guide", SIAM 1998) as `scipy.sparse.linalg.eigs`, a small one through its dense Jacobian. Both take J^T, whose
eigenvalues are those of J.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deqkit.errors import ConvergenceWarning
from deqkit.solvers.base import as_int
from deqkit.spectral.estimates import as_number, at_least
from deqkit.spectral.jacobian import Jacobian, exact_arithmetic, make_generator
from deqkit.state import Blocks

_DENSE = 64  # numbers in a sample up to which its whole Jacobian is no more work


def eigenvalues(
    f: Callable[..., Any],
    x: Any,
    args: tuple[Any, ...] = (),
    *,
    num: int = 10,
    sample: int | tuple[int, ...] = 0,
    batch_dims: int = 1,
    rtol: float = 1e-6,
    max_products: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The eigenvalues of df/dx of largest modulus, for one sample.

    Args:
        f: see `spectral_radius`.
        x: see there.
        args: see there.
        num: how many; a state of fewer numbers has all of its own returned.
        sample: which sample: an index into the batch dims, or one into the flattened batch.
        batch_dims: see there.
        rtol: relative accuracy that is asked of ARPACK, within the precision of f. Not used for small states.
        max_products: about how many vector-Jacobian products may be taken; what is not known by then is left out, with
            a warning. None leaves it to ARPACK. Not used for small states.
        generator: draws the start vector; None for a fixed one.

    Returns:
        (num,) complex128 on the CPU, by falling modulus; a pair may be cut in two by ``num``. NaN where the Jacobian is
        not finite. For a complex state, those of the real Jacobian of real and imaginary parts.

    Raises:
        TypeError: f, args, x or a setting has the wrong type.
        ValueError: a setting is out of range, or f does not keep the shape of x.
        IndexError: there is no such sample.
        ImportError: scipy is absent, and the state is not small.
    """
    num = at_least("num", num, 1)
    if max_products is not None:
        max_products = at_least("max_products", max_products, 1)
    if not as_number("rtol", rtol) > 0:
        raise ValueError(f"rtol must be positive, got {rtol}")
    jacobian = Jacobian(f, x, args, batch_dims)
    row = _row(sample, tuple(jacobian.layout.batch_shape))
    generator = make_generator(generator, jacobian.layout.device)
    with exact_arithmetic(jacobian.layout.device, gradients=False):
        if jacobian.num_reals <= max(3 * num, _DENSE):
            found = _dense(jacobian, row)
        else:
            start = _join(jacobian.draw(torch.randn, generator, 1), 0)
            found = _arpack(jacobian, row, num, max(rtol, jacobian.resolution), start, max_products)
    order = found.abs().sort(descending=True, stable=True).indices
    return found[order][:num]


def _dense(jacobian: Jacobian, row: int) -> Tensor:
    size = jacobian.num_reals
    transposed = torch.zeros(size, size, dtype=torch.float64)
    for i, unit in enumerate(torch.eye(size, dtype=torch.float64)):
        transposed[:, i] = _product(jacobian, row, unit)
    return torch.linalg.eigvals(transposed) if bool(torch.isfinite(transposed).all()) else _unknown(size)


def _arpack(jacobian: Jacobian, row: int, num: int, rtol: float, start: Tensor, limit: int | None) -> Tensor:
    try:
        from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigs
    except ImportError as error:
        raise ImportError(
            f"deqkit.eigenvalues needs scipy for samples of more than {_DENSE} numbers: "
            f"pip install 'deqkit[diagnostics]'"
        ) from error
    first = _product(jacobian, row, start)
    if not bool(torch.isfinite(first).all()):  # which ARPACK would not survive, as it would not a Jacobian of zeros
        return _unknown(num)
    if not bool(first.any()):
        return torch.zeros(num, dtype=torch.complex128)
    size = start.numel()
    operator: Any = LinearOperator(
        (size, size),
        matvec=lambda u: _product(jacobian, row, torch.from_numpy(u).flatten()).numpy(),  # pyright: ignore
        dtype=float,  # pyright: ignore
    )
    find: Any = eigs
    basis = min(size, max(2 * num + 1, 20))
    restarts = None if limit is None else max(1, (limit - basis) // (basis - num))
    try:
        found = find(
            operator, k=num, v0=start.numpy(), tol=rtol, ncv=basis, maxiter=restarts, return_eigenvectors=False
        )  # fmt: skip
    except ArpackNoConvergence as stopped:
        found = stopped.eigenvalues
        warnings.warn(
            f"eigenvalues: only {len(found)} of {num} are known to rtol={rtol:g}; the others are left out. Ask for "
            f"more or fewer of them, or loosen rtol.",
            ConvergenceWarning,
            stacklevel=3,
        )
    return torch.from_numpy(found).to(torch.complex128)


def _product(jacobian: Jacobian, row: int, u: Tensor) -> Tensor:
    """J^T u for one sample, float64 on the CPU."""
    parts = u.split([b.shape[1] for b in jacobian.x])
    blocks = tuple(torch.zeros_like(b) for b in jacobian.x)
    for block, part in zip(blocks, parts, strict=True):
        block[row] = part.to(block)
    return _join(jacobian.transposed(blocks), row)


def _join(blocks: Blocks, row: int) -> Tensor:
    return torch.cat([b[row].detach().to("cpu", torch.float64) for b in blocks])


def _unknown(num: int) -> Tensor:
    return torch.full((num,), torch.nan, dtype=torch.complex128)


def _row(sample: Any, batch_shape: tuple[int, ...]) -> int:
    """The row of a sample."""
    if isinstance(sample, tuple):
        index = tuple(as_int("sample", i) for i in sample)
        inside = len(index) == len(batch_shape) and all(-n <= i < n for i, n in zip(index, batch_shape, strict=True))
        row = 0
        for i, n in zip(index, batch_shape, strict=False):
            row = row * n + i % max(n, 1)
    else:
        row, num_samples = as_int("sample", sample), math.prod(batch_shape)
        inside = -num_samples <= row < num_samples
        row %= max(num_samples, 1)
    if not inside:
        raise IndexError(f"there is no sample {sample} in a batch of shape {batch_shape}")
    return row
