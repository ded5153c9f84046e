"""L6. What to change about f, by the check that it failed."""

from __future__ import annotations

from collections.abc import Callable

from deqkit.diagnosis.records import Check


def remedy(check: Check) -> str:
    """What to do about a failed check."""
    return _REMEDIES[check.name](check)


def _deterministic(check: Check) -> str:
    if check.evidence.get("draws_random_numbers"):
        return "A stochastic f has no fixed point: use deqkit.nn.VariationalDropout, or eval()"
    return "An f that changes from call to call has no fixed point: look for state that it keeps"


def _independent(check: Check) -> str:
    norm = any("BatchNorm" in name for name in check.evidence.get("modules", ()))
    instead = "use GroupNorm or LayerNorm in its place, or eval() with trained statistics" if norm else "part them in f"
    return (
        f"Samples are solved one by one, so none may depend on another: {instead}; if they are one system, batch_dims=0"
    )


def _differentiable(check: Check) -> str:
    if check.evidence.get("without_gradient"):
        return "Look for detach(), .data, .item(), numpy or no_grad() in f: no gradient can be had without a graph"
    return "Look for infinite slopes (sqrt, norm or a power at 0), and for a backward pass of f's own"


_REMEDIES: dict[str, Callable[[Check], str]] = {
    "runs": lambda check: "Mend that first: nothing else could be looked at",
    "structure": lambda check: "Make f return what it is given: the same structure, shapes, dtype and device",
    "keeps x": lambda check: "Let f return a new tensor: x += .., relu_() and copy_() destroy the state",
    "finite": lambda check: "Look at the inputs and the scale of these samples: no solver can mend them",
    "deterministic": _deterministic,
    "independent samples": _independent,
    "stateless": lambda check: (
        "A solve calls f many times, and side effects pile up: use eval(), or keep state out of f"
    ),
    "grad mode": lambda check: "A solve runs without gradients: let f compute the same either way",
    "affine": lambda check: "Mend that first",
    "differentiable": _differentiable,
    "trainable": lambda check: "Training would destroy these: look for infinite slopes (sqrt, norm or a power at 0)",
    "derivative": lambda check: "Look for a partial detach(), a backward pass of f's own, or a kink",
}
