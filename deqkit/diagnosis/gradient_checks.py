"""L6. Can f be differentiated, towards what, and is its derivative that of its values?"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from deqkit import linalg
from deqkit.adjoints.base import Evaluation
from deqkit.adjoints.dependencies import grad_of_present
from deqkit.diagnosis.checks import tolerance
from deqkit.diagnosis.records import Check
from deqkit.diagnosis.subject import Subject, largest, relative_change
from deqkit.diagnosis.untouched import seed
from deqkit.state import Blocks

_STEPS = (1.0, 0.1, 10.0)  # of a finite difference, in units of the cube root of the precision
_AGREES = 1e-4  # relative difference after which no other step is tried
_WRONG, _WRONG_IN_FLOAT64 = 1e-2, 1e-4  # beyond which a derivative is wrong; kinks of f cost what the first allows


def evaluated(subject: Subject, *, same_draws: bool = True) -> Evaluation:
    """One evaluation of f at the probing point, with its graph."""
    if same_draws:
        seed(subject.device)
    with torch.enable_grad():
        return Evaluation.of(subject.evaluator, subject.probe)


def products(at: Evaluation, u: Blocks) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """J^T u, and the gradients of <u, f(x)> towards what f depends on besides x."""
    inputs = (*at.x, *at.dependencies.tensors)
    found = list(grad_of_present(at.fx, inputs, u, create_graph=False))
    return found[: len(at.x)], found[len(at.x) :]


def differentiable(subject: Subject) -> Check:
    """Whether f(x) has a graph that leads to x, and the gradient is finite and the same every time."""
    at, u = evaluated(subject, same_draws=False), subject.draw()
    to_x, _ = products(at, u)
    missing = [leaf.name for leaf, g in zip(subject.layout.leaves, to_x, strict=True) if g is None]
    if len(missing) == len(to_x) and not _depends_on_x(subject):
        return Check("differentiable", "noted", "f(x) does not depend on x", {"without_gradient": missing})
    if len(missing) == len(to_x):
        attached = any(b.requires_grad for b in at.fx)
        why = "its graph does not lead to x" if attached else "it has no graph: detached, or made without gradients"
        finding = f"f(x) cannot be differentiated towards x: {why}"
        return Check("differentiable", "failed", finding, {"without_gradient": missing})
    found = _filled(to_x, at.x)
    bad = torch.stack([~torch.isfinite(g).all(dim=1) for g in found]).any(dim=0)
    bad = bad & torch.isfinite(linalg.norm(at.fx))  # elsewhere it follows: see `finite`
    if bool(bad.any()):
        which = f"the gradient towards x is NaN or infinite in {subject.names(bad)}"
        return Check("differentiable", "failed", which, {"samples": bad.nonzero().flatten().tolist()})
    second = evaluated(subject, same_draws=False)
    again, _ = products(second, u)
    change = largest(relative_change(found, _filled(again, at.x)))
    if largest(relative_change(at.fx, second.fx)) > tolerance(subject):
        change = 0.0  # of another value there is another gradient: see `deterministic`
    evidence = {"change": change, "without_gradient": missing, "size": linalg.norm(found).tolist()[:100]}
    if change > tolerance(subject):
        finding = f"two gradients at the same point differ by {change:.1e} relative"
        return Check("differentiable", "failed", finding, evidence)
    if missing:
        finding = f"f(x) does not depend on {', '.join(missing)}"
        return Check("differentiable", "noted", finding, evidence)
    return Check("differentiable", "passed", "the gradient towards x is finite and the same every time", evidence)


def _depends_on_x(subject: Subject) -> bool:
    with torch.no_grad():
        elsewhere = subject.evaluate(subject.beside(subject.probe, 1.0))
    return largest(relative_change(subject.value_at_probe, elsewhere)) > 0


def trainable(subject: Subject) -> Check:
    """What besides x gets a gradient, and whether that is finite."""
    at = evaluated(subject)
    tensors, complete = at.dependencies.tensors, at.dependencies.complete
    if not tensors:
        finding = "f depends on no tensor that requires a gradient: there is nothing to train"
        if not complete:
            finding = (
                "f closes over tensors with a graph of their own only: no adjoint can be compared; pass them in args"
            )
        return Check("trainable", "noted", finding, {"tensors": 0, "complete": complete})
    _, gradients = products(at, subject.draw())
    names = _parameter_names(subject)
    whole = bool(torch.isfinite(linalg.norm(at.fx)).all())  # else it follows: see `finite`
    bad = [
        names.get(id(t), "a tensor in args or a closure")
        for t, g in zip(tensors, gradients, strict=True)
        if whole and g is not None and g.layout == torch.strided and not bool(torch.isfinite(g).all())
    ]
    if bad:
        finding = f"the gradient is NaN or infinite towards {', '.join(bad[:3])}"
        return Check("trainable", "failed", finding, {"tensors": len(tensors), "not_finite": bad})
    reached = {id(t) for t in tensors}
    left = [name for key, name in names.items() if key not in reached]
    numbers = sum(t.numel() for t in tensors)
    finding = f"{len(tensors)} tensor{'s' if len(tensors) > 1 else ''} ({numbers:,} numbers) get a gradient"
    if left:
        finding += f"; not reached: {', '.join(left[:3])}" + (f" and {len(left) - 3} more" if len(left) > 3 else "")
    evidence = {"tensors": len(tensors), "numbers": numbers, "not_reached": left, "complete": complete}
    return Check("trainable", "passed", finding, evidence)


def derivative(subject: Subject) -> Check:
    """Whether J^T agrees with differences of f: <u, J v> = <J^T u, v>, v random and u the difference along v."""
    if subject.resolution > 1e-4:
        return Check("derivative", "skipped", "differences of f mean nothing in half precision")
    at, unit = evaluated(subject), subject.resolution ** (1 / 3)
    direction, error = subject.direction(1.0), math.inf
    for step in _STEPS:
        with torch.no_grad():
            ahead, behind = (subject.moved(subject.probe, direction, s * step * unit) for s in (1.0, -1.0))
            rise = tuple(a - b for a, b in zip(subject.evaluate(ahead), subject.evaluate(behind), strict=True))
            run = tuple(a - b for a, b in zip(ahead, behind, strict=True))
        known = torch.isfinite(linalg.norm(rise)) & torch.isfinite(linalg.norm(run))
        u = linalg.where(known, rise, tuple(torch.zeros_like(b) for b in rise))
        # Over the batch together, so that it is right of an f that couples samples, too.
        along = float(linalg.dot(_filled(products(at, u)[0], at.x), run)[known].double().sum())
        expected = float(linalg.dot(u, u).double().sum())
        error = min(error, abs(along - expected) / ((abs(along) + expected) or 1.0))
        if error <= _AGREES:
            break
    limit = _WRONG_IN_FLOAT64 if subject.resolution < 1e-10 else _WRONG
    evidence = {"error": error, "tolerance": limit}
    if not error <= limit:
        finding = f"autograd's derivative differs from that of f's values by {error:.1e} relative"
        return Check("derivative", "failed", finding, evidence)
    return Check("derivative", "passed", f"autograd agrees with differences of f to {error:.1e} relative", evidence)


def saved_bytes(subject: Subject) -> int:
    """What a step of an unrolled solve keeps in memory for its backward pass: all that is saved but parameters."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.layout == torch.strided:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        at = evaluated(subject)
    for shared in (*at.dependencies.tensors, *tree_leaves(subject.args)):
        if isinstance(shared, Tensor) and shared.layout == torch.strided:
            storages.pop(shared.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def _filled(gradients: list[Tensor | None], like: Blocks) -> Blocks:
    return tuple(torch.zeros_like(b) if g is None else g for g, b in zip(gradients, like, strict=True))


def _parameter_names(subject: Subject) -> dict[int, str]:
    """Parameters of the modules behind f that ask for a gradient, by identity."""
    return {
        id(p): f"{name}.{key}"
        for name, module in subject.modules.items()
        for key, p in module._parameters.items()
        if p is not None and p.requires_grad
    }
