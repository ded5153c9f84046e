"""L6. Equilibria as layers: `FixedPoint`, and what a module inside one needs to behave."""

from deqkit.nn.contractive import ContractiveConv2d, ContractiveLinear
from deqkit.nn.fixed_point import FixedPoint
from deqkit.nn.module_check import ModuleFinding, check_module
from deqkit.nn.monotone import MonotoneConv2d, MonotoneLinear
from deqkit.nn.norm_caps import spectral_norm, weight_norm
from deqkit.nn.parametrization import hold, hold_in_checkpoint
from deqkit.nn.variational_dropout import VariationalDropout
from deqkit.nn.warm_start import FixedPointCache, LearnedStart

__all__ = [
    "ContractiveConv2d",
    "ContractiveLinear",
    "FixedPoint",
    "FixedPointCache",
    "LearnedStart",
    "ModuleFinding",
    "MonotoneConv2d",
    "MonotoneLinear",
    "VariationalDropout",
    "check_module",
    "hold",
    "hold_in_checkpoint",
    "spectral_norm",
    "weight_norm",
]
