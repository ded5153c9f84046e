"""L6. Equilibria as layers: `FixedPoint`, and what a module inside one needs to behave."""

from deqkit.nn.fixed_point import FixedPoint
from deqkit.nn.warm_start import FixedPointCache, LearnedStart

__all__ = ["FixedPoint", "FixedPointCache", "LearnedStart"]
