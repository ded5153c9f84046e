"""L6. Equilibria as layers: `FixedPoint`, and what a module inside one needs to behave."""

from deqkit.nn.fixed_point import FixedPoint

__all__ = ["FixedPoint"]
