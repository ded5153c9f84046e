"""L6. Is f a function of its arguments, and the same for every sample? One check per property, with its evidence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from deqkit import linalg
from deqkit.diagnosis.modules import describe, drawing_modules, meeting_modules, random_state
from deqkit.diagnosis.records import Check
from deqkit.diagnosis.subject import Subject, largest, relative_change
from deqkit.state import Blocks, Evaluator, StateLayout

_ROUNDING = 100  # units of the resolution in which two results may differ and count as equal
_COARSEST = 0.05  # and no more than this, in half precision
_COARSE = 0.1  # of a difference of f, of which no more may be rounding


def tolerance(subject: Subject) -> float:
    """Relative change up to which two values of f are the same but for rounding."""
    return min(_ROUNDING * subject.resolution, _COARSEST)


def guarded(name: str, check: Callable[[Subject], Check], subject: Subject) -> Check:
    """The outcome of a check; what f raises on the way is one."""
    try:
        return check(subject)
    except Exception as error:
        return Check(name, "failed", f"f raised {in_words(error)}", {"exception": type(error).__name__})


def in_words(error: BaseException, limit: int = 200) -> str:
    """The kind of an exception and the first line of its message."""
    lines = str(error).strip().splitlines()
    first = f": {lines[0]}" if lines else ""
    return f"{type(error).__name__}{first if len(first) <= limit else first[:limit] + '...'}"


def runs(subject: Subject) -> Check:
    """Whether f can be called on x0, as a solve calls it: without gradient."""
    try:
        with torch.no_grad():
            out = subject.raw(subject.start)
    except Exception as error:
        where = "under torch.no_grad(), as solve calls it" if _runs_with_gradient(subject) else "when called on x0"
        return Check("runs", "failed", f"f raised {in_words(error)}, {where}", {"exception": type(error).__name__})
    kind = type(out).__name__
    return Check("runs", "passed", "f(x0) can be evaluated without gradient", {"returns": kind})


def _runs_with_gradient(subject: Subject) -> bool:
    try:
        with torch.enable_grad():
            subject.raw(tuple(b.clone().requires_grad_() for b in subject.start))
    except Exception:
        return False
    return True


def structure(subject: Subject) -> Check:
    """Whether f keeps structure, shapes, dtypes and device."""
    with torch.no_grad():
        out = subject.raw(subject.start)
    try:
        subject.layout.pack_output(out)
    except (TypeError, ValueError) as error:
        return Check("structure", "failed", str(error))
    leaves = len(subject.layout.leaves)
    what = f"{leaves} tensors" if leaves > 1 else "a tensor"
    return Check("structure", "passed", f"f returns {what} of x0's shape, dtype and device")


def input_kept(subject: Subject) -> Check:
    """Whether f leaves x and the tensors in args as they are."""
    given = tuple(b.clone() for b in subject.start)
    tensors = [t for t in tree_leaves(subject.args) if isinstance(t, Tensor) and t.layout == torch.strided]
    before = [t.detach().clone() for t in tensors]
    with torch.no_grad():
        subject.raw(given)
    changed = largest(relative_change(subject.start, given))
    if changed:
        return Check("keeps x", "failed", f"f changed x in place, by {changed:.1e} relative", {"change": changed})
    lost = [i for i, (t, old) in enumerate(zip(tensors, before, strict=True)) if not _equal(t, old)]
    if lost:
        return Check("keeps x", "failed", f"f changed {len(lost)} of the tensors in args in place", {"tensors": lost})
    return Check("keeps x", "passed", "f changes neither x nor args in place")


def finite(subject: Subject) -> Check:
    """Whether x0 and f(x0) are finite."""
    for what, blocks in (("x0", subject.start), ("f(x0)", subject.value)):
        bad = torch.stack([~torch.isfinite(b).all(dim=1) for b in blocks]).any(dim=0)
        if bool(bad.any()):
            which = f"{what} is NaN or infinite in {subject.names(bad)} of {bad.numel()}"
            return Check("finite", "failed", which, {"where": what, "samples": bad.nonzero().flatten().tolist()})
    size = linalg.norm(subject.value)
    return Check("finite", "passed", f"|f(x0)| is {float(size.median()):.2g} (median)", {"sizes": size.tolist()[:100]})


def deterministic(subject: Subject) -> Check:
    """Whether two calls at one point give one value."""
    drew = draws_random_numbers(subject)
    with torch.no_grad():
        first, second = subject.evaluator(subject.probe), subject.evaluator(subject.probe)
        change = largest(relative_change(first, second))
    culprits: list[str] = []
    if drew:
        with torch.no_grad():
            culprits = drawing_modules(subject.modules, lambda: subject.evaluate(subject.probe), subject.device)
    evidence = {"change": change, "draws_random_numbers": drew, "modules": culprits}
    where = f" in {listed(culprits)}" if culprits else ""
    if change > tolerance(subject):
        source = f": random numbers are drawn{where}" if drew else ""
        finding = f"two calls at the same point differ by {change:.1e} relative{source}"
        return Check("deterministic", "failed", finding, evidence)
    exactly = "bit for bit" if change == 0 else f"but for rounding ({change:.1e} relative)"
    if drew:
        finding = f"two calls agree {exactly}, although random numbers are drawn{where}"
        return Check("deterministic", "noted", finding, evidence)
    return Check("deterministic", "passed", f"two calls at the same point agree {exactly}", evidence)


def draws_random_numbers(subject: Subject) -> bool:
    """Whether a call of f moves a random generator of PyTorch's."""
    with torch.no_grad():
        before = random_state(subject.device)
        subject.evaluator(subject.probe)
    return not all(torch.equal(a, b) for a, b in zip(before, random_state(subject.device), strict=True))


def stateless(subject: Subject) -> Check:
    """Whether a call leaves buffers, parameters and modes of the modules behind f as they were."""
    if not subject.modules:
        return Check("stateless", "skipped", "no module was found behind f")
    before = {name: _state_of(module) for name, module in subject.modules.items()}
    with torch.no_grad():
        subject.evaluate(subject.probe)
    changed: dict[str, list[str]] = {}
    for name, module in subject.modules.items():
        after = _state_of(module)
        keys = [k for k, old in before[name].items() if k not in after or not _equal(after[k], old)]
        if keys:
            changed[describe(name, module)] = keys
    if changed:
        what = [f"{', '.join(keys)} of {name}" for name, keys in changed.items()]
        return Check("stateless", "failed", f"every call of f changes {listed(what, 2)}", {"changed": changed})
    counted = f"{len(subject.modules)} module{'s' if len(subject.modules) > 1 else ''}"
    return Check("stateless", "passed", f"a call leaves the state of {counted} behind f as it was")


def _state_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the module's own buffers and parameters, and its mode."""
    tensors = {**module._buffers, **module._parameters}
    copies = {name: t.detach().clone() for name, t in tensors.items() if t is not None and not is_lazy(t)}
    return copies | {"training": torch.tensor(module.training)}


def grad_mode(subject: Subject) -> Check:
    """Whether the value of f is the same with gradients enabled."""
    with torch.enable_grad():
        x = tuple(b.clone().requires_grad_() for b in subject.probe)
        with_grad = tuple(b.detach() for b in subject.evaluate(x))
    change = largest(relative_change(subject.value_at_probe, with_grad))
    if change > tolerance(subject):
        finding = f"f gives another value with gradients enabled, by {change:.1e} relative"
        return Check("grad mode", "failed", finding, {"change": change})
    return Check("grad mode", "passed", "f has the same value with and without gradients", {"change": change})


def independent(subject: Subject) -> Check:
    """Whether no sample depends on another: not on its value, not on whether it is there."""
    count = subject.layout.num_samples
    if subject.batch_dims == 0 or count < 2:
        why = "batch_dims=0: one system" if subject.batch_dims == 0 else "there is one sample only"
        return Check("independent samples", "skipped", why)
    limit, base = tolerance(subject), subject.value_at_probe
    for moved in sorted({0, count // 2, count - 1}):
        others = torch.arange(count, device=subject.device) != moved
        x = linalg.where(others, subject.probe, subject.beside(subject.probe, 1.0))
        with torch.no_grad():
            change = relative_change(base, subject.evaluate(x))[others]
        if largest(change) > limit:
            return _coupled(subject, moved, others, x, change)
    # With a sample fewer, the others would be dealt other random numbers.
    without = None if draws_random_numbers(subject) else _without_a_sample(subject)
    evidence = {"moved": 0.0, "left_out": without}
    if without is not None and without > limit:
        finding = f"leaving one sample out changes the others by {without:.1e} relative"
        return Check("independent samples", "failed", finding, evidence | {"modules": [], "share": 1.0})
    tried = "; nor on whether it is there" if without is not None else ""
    return Check("independent samples", "passed", f"no sample depends on the value of another{tried}", evidence)


def _coupled(subject: Subject, moved: int, others: Tensor, x: Blocks, change: Tensor) -> Check:
    def call_at(point: Blocks) -> Callable[[], Any]:
        return lambda: subject.evaluate(point)

    modules: list[str] = []
    if subject.batch_dims == 1:
        with torch.no_grad():
            modules = meeting_modules(
                subject.modules, (call_at(subject.probe), call_at(x)), others, tolerance(subject)
            )  # fmt: skip
    share = float((change > tolerance(subject)).float().mean())
    where = f"; they meet in {listed(modules)}" if modules else ""
    finding = f"moving sample {moved} changes {share:.0%} of the others, by up to {largest(change):.1e} relative{where}"
    evidence = {"moved": largest(change), "share": share, "modules": modules, "left_out": None}
    return Check("independent samples", "failed", finding, evidence)


def _without_a_sample(subject: Subject) -> float | None:
    """The change of the others when the last sample along the first batch dim is left out; None if that can't be done.

    Tensors in args of the batch shape lose that sample, too; if f then does not run or differs, no tensor does.
    """
    axis = next((d for d, n in enumerate(subject.layout.batch_shape) if n > 1), None)
    if axis is None:
        return None

    def shorter(leaf: Tensor) -> Tensor:
        return leaf.narrow(axis, 0, leaf.shape[axis] - 1)

    def shorter_if_batched(leaf: Any) -> Any:
        dims, batch = subject.batch_dims, subject.layout.batch_shape
        return shorter(leaf) if isinstance(leaf, Tensor) and leaf.shape[:dims] == batch else leaf

    x = tree_map(shorter, subject.layout.unpack(subject.probe))
    expected = tree_map(shorter, subject.layout.unpack(subject.value_at_probe))
    layout = StateLayout(x, subject.batch_dims)
    changes: list[float] = []
    for args in (tree_map(shorter_if_batched, subject.args), subject.args):
        try:
            with torch.no_grad():
                out = Evaluator(subject.call, layout, args)(layout.pack(x))
        except Exception:  # f closes over something of the batch's size
            continue
        changes.append(largest(relative_change(layout.pack(expected), out)))
    return min(changes, default=None)


def affine(subject: Subject) -> Check:
    """Whether f is A x + b: differences are in proportion to their lengths, on either side of a point."""
    by = subject.direction(1.0)
    with torch.no_grad():
        base = subject.value_at_probe
        ahead, behind, far = (subject.evaluate(subject.moved(subject.probe, by, t)) for t in (1.0, -1.0, 3.0))
    slope = tuple(a - b for a, b in zip(ahead, behind, strict=True))
    bend = tuple(a + b - 2 * c for a, b, c in zip(ahead, behind, base, strict=True))
    lag = tuple(a - c - 1.5 * s for a, c, s in zip(far, base, slope, strict=True))
    scale = torch.stack([linalg.norm(b) for b in (ahead, behind, far, base)]).sum(dim=0)
    size = linalg.norm(slope)
    size = torch.where(size > 0, size, scale)  # of a constant f
    curvature, rounding = torch.maximum(linalg.norm(bend), linalg.norm(lag)) / size, tolerance(subject) * scale / size
    known = torch.isfinite(curvature) & (rounding <= _COARSE)
    if not bool(known.any()):
        finding = "whether f is affine in x cannot be told in this precision"
        return Check("affine", "noted", finding, {"affine": False})
    worst = largest(curvature[known])
    evidence = {"affine": bool((curvature <= rounding)[known].all()), "curvature": worst}
    if evidence["affine"]:
        return Check("affine", "noted", "f is affine in x: linear solvers apply", evidence)
    finding = f"f is not affine in x (second difference {worst:.1e}): linear solvers left out"
    return Check("affine", "noted", finding, evidence)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def listed(names: list[str], limit: int = 3) -> str:
    """For example "a, b, c and 2 more"."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
