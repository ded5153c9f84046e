"""L6. The eigenvalue of largest modulus of many linear maps at once: Arnoldi's method with thick restarts.

Every sample builds an orthonormal basis V of its Krylov space, in which its map A is the small matrix H:

    A V = V H + v c^T        v the next basis vector, c = (0, .., 0, beta) until the first restart

An eigenpair H y = theta y gives a Ritz pair (theta, V y) of A with residual |A V y - theta V y| = |c^T y|. Since H is
real but not symmetric, complex conjugate pairs come out as such: nothing rotates for ever, as it does in a power
iteration. A full basis is replaced by an orthonormal basis Q of the eigenvectors wanted most, real and imaginary parts
of a pair side by side, for which the same relation holds:

    A (V Q) = (V Q) (Q^T H Q) + v (Q^T c)^T

The error of theta is, to first order, kappa |c^T y|, with the condition number kappa = 1 / |w^H y| of theta as an
eigenvalue of H (w its left eigenvector, both of unit length): 1 for a normal map, large for one far from normal.

Source: Arnoldi, Quart. Appl. Math. 9 (1951); Wu & Simon, "Thick-restart Lanczos", SIAM J. Matrix Anal. Appl. 22 (2000)
and Stewart, "A Krylov-Schur algorithm for large eigenproblems", ibid. 23 (2001), for restarts that keep a subspace.

Deliberate deviations:
* The subspace that is kept comes from eigenvectors, not from an ordered Schur form, which PyTorch does not have. What
  it thereby fails to be invariant is measured and counted among the errors.
* A pair is never cut in two: samples that would keep half of one keep a vector less, and have a zero in its place.
* Samples share the start vector and leave the race one by one: a sample alone gives the answer it gives in a batch.

Legend: B samples, m history, n <= m columns in use, k columns kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deqkit import linalg
from deqkit.state import Blocks

_CHECK_EVERY = 8  # products between two looks at the Ritz values
_INDEPENDENT = 10.0  # of a product, in units of the working precision, that must be new to the basis


@dataclass
class Dominant:
    """The dominant eigenvalue of every sample; tensors of shape (B,).

    Attributes:
        modulus: |theta|; NaN where a product was not finite.
        error: estimate of how far that is off; NaN likewise.
        done: whether the tolerance was met, or all that the precision of a product gives; False where not finite.
        exact: whether the basis has nothing to add.
    """

    modulus: Tensor
    error: Tensor
    done: Tensor
    exact: Tensor


@dataclass
class _Ritz:
    """Eigenpairs of H by falling modulus, on the host.

    Attributes:
        values: (B, n), complex.
        vectors: (B, n, n), complex columns of unit length.
    """

    values: Tensor
    vectors: Tensor


class Arnoldi:
    """The bases of all samples and their small matrices.

    Args:
        product: A, on (B, d) per leaf.
        start: (B, d) or (1, d) per leaf.
        num_samples: B.
        history: m.
        resolution: relative precision of a product.
    """

    def __init__(
        self, product: Callable[[Blocks], Blocks], start: Blocks, num_samples: int, history: int, resolution: float
    ) -> None:
        self.product, self.history, self.resolution = product, history, resolution
        self.spans_all = history >= sum(b.shape[1] for b in start)  # once it is full
        start = tuple(b.expand(num_samples, -1) for b in start)
        size = linalg.norm(start)
        self.basis = linalg.History(history)
        self.next = linalg.scale(start, linalg.inverse_size(size, start[0].dtype)[0])
        self.matrix = size.new_zeros(num_samples, history, history)  # H
        self.coupling = size.new_zeros(num_samples, history)  # c
        self.lost = torch.zeros_like(size)  # how far the bases that were kept are from invariant
        self.finite = torch.ones_like(size, dtype=torch.bool)

    @property
    def num_columns(self) -> int:
        """Vectors in the basis, n."""
        return self.basis.num_columns

    def extend(self) -> None:
        """One more column, for one product."""
        n = self.num_columns
        self.matrix[:, n] = self.coupling
        self.basis.push(self.next)
        w = self.product(self.next)
        before = linalg.norm(w)
        self.finite = self.finite & torch.isfinite(before)
        w = linalg.where(self.finite, w, tuple(torch.zeros_like(b) for b in w))
        column = torch.zeros_like(self.matrix[:, : n + 1, 0])
        for _ in range(2):  # once is not enough in finite precision
            part = self.basis.dot(w)
            w = self.basis.subtract_combination(w, part)
            column = column + part
        self.matrix[:, : n + 1, n] = column
        beta = linalg.norm(w)
        dtype = w[0].dtype
        new = self.finite & (beta > _INDEPENDENT * torch.finfo(dtype).eps * before)
        self.next = linalg.scale(w, linalg.inverse_size(torch.where(new, beta, 0.0), dtype)[0])
        self.coupling = torch.zeros_like(self.coupling)
        self.coupling[:, n] = torch.where(new, beta, 0.0)

    def ritz(self) -> _Ritz:
        """All eigenpairs of H."""
        n = self.num_columns
        # On the host: what an accelerator has for small matrices without symmetry is slower, where it has anything.
        values, vectors = torch.linalg.eig(self.matrix[:, :n, :n].cpu())
        order = values.abs().sort(dim=1, descending=True, stable=True).indices  # stable: pairs stay together
        return _Ritz(values.gather(1, order), vectors.gather(2, order.unsqueeze(1).expand_as(vectors)))

    def dominant(self, ritz: _Ritz, rtol: float) -> Dominant:
        """The first Ritz value, measured."""
        n = self.num_columns
        h, c, lost = (t.cpu() for t in (self.matrix[:, :n, :n], self.coupling[:, :n], self.lost))
        theta, y = ritz.values[:, 0], ritz.vectors[:, :, 0]
        modulus = theta.abs()
        residual = torch.linalg.vecdot(c.to(y.dtype), y).abs() + lost
        # Its left eigenvector belongs to the smallest singular value of H - theta.
        left = torch.linalg.svd(h - theta[:, None, None] * torch.eye(n, dtype=y.dtype))[0][:, :, -1]
        condition = 1 / torch.linalg.vecdot(left, y).abs().clamp(min=torch.finfo(modulus.dtype).eps)
        noise = self.resolution * torch.linalg.vector_norm(h, dim=1).amax(dim=1)
        finite = self.finite.cpu()
        done = finite & ((condition * residual <= rtol * modulus) | (residual <= noise))
        error = condition * (residual + noise)
        modulus, error = (t.masked_fill(~finite, torch.nan) for t in (modulus, error))
        return Dominant(modulus, error, done, exact=(c == 0).all(dim=1))

    def restart(self, ritz: _Ritz, num_kept: int) -> None:
        """Keep ``num_kept`` of the Ritz vectors, or one more where a pair would be cut in two."""
        n, k = self.num_columns, num_kept
        values, vectors = ritz.values[:, : k + 1], ritz.vectors[:, :, : k + 1]
        wanted = torch.where((values.imag < 0).unsqueeze(1), vectors.imag, vectors.real)
        q = torch.linalg.qr(wanted)[0]
        q[:, :, k].masked_fill_((values[:, k].imag >= 0).unsqueeze(1), 0.0)  # no second half of a pair
        q = q.to(self.matrix.device)
        h, c = self.matrix[:, :n, :n], self.coupling[:, :n]
        image = h @ q
        kept = q.mT @ image
        self.lost = self.lost + torch.linalg.matrix_norm(image - q @ kept)
        basis, nothing = linalg.History(self.history), tuple(torch.zeros_like(b) for b in self.next)
        for i in range(k + 1):
            basis.push(self.basis.subtract_combination(nothing, -q[:, :, i]))
        self.basis = basis
        coupling = (c.unsqueeze(1) @ q).squeeze(1)
        self.matrix, self.coupling = torch.zeros_like(self.matrix), torch.zeros_like(self.coupling)
        self.matrix[:, : k + 1, : k + 1], self.coupling[:, : k + 1] = kept, coupling

    def symmetric_vector(self) -> Blocks:
        """The dominant Ritz vector of a map that is symmetric and not negative, on its device."""
        n = self.num_columns
        h = self.matrix[:, :n, :n]
        y = torch.linalg.eigh((h + h.mT) / 2)[1][:, :, -1]
        return self.basis.subtract_combination(tuple(torch.zeros_like(b) for b in self.next), -y)


def find_dominant(arnoldi: Arnoldi, *, rtol: float, max_steps: int) -> Dominant:
    """Extend and restart the bases until every sample's eigenvalue is known to ``rtol``.

    Now and then an eigenvalue is settled while a larger one has hardly shown: a sample is done when two looks in a row
    say so.

    Args:
        arnoldi: fresh bases.
        rtol: error of the modulus that is wanted, relative to it.
        max_steps: limit of products.
    """
    best, last = None, None
    for step in range(1, max_steps + 1):
        arnoldi.extend()
        full = arnoldi.num_columns == arnoldi.history
        if not (full or step == max_steps or step % _CHECK_EVERY == 0):
            continue
        ritz = arnoldi.ritz()
        new = arnoldi.dominant(ritz, rtol)
        best, last = _settled(best, new, last), new.done
        if bool((best.done | best.modulus.isnan()).all()) or (full and arnoldi.spans_all):
            break
        if full and step < max_steps:
            arnoldi.restart(ritz, min(arnoldi.history // 2, arnoldi.history - 2))
    assert best is not None
    return best


def _settled(old: Dominant | None, new: Dominant, last: Tensor | None) -> Dominant:
    """What is known now: a sample that was done stays as it was; ``last`` tells which seemed to be, one look ago."""
    confirmed = new.done & (new.exact if last is None else new.exact | last)
    if old is None:
        return replace(new, done=confirmed)
    return Dominant(
        torch.where(old.done, old.modulus, new.modulus),
        torch.where(old.done, old.error, new.error),
        old.done | confirmed,
        old.exact | new.exact,
    )
