"""Deep equilibrium layers for PyTorch: solve x* = f(x*), differentiate through it, and know how well it went."""

from deqkit import nn
from deqkit.adjoints import JFB, Adjoint, ImplicitAdjoint, NeumannAdjoint, PhantomAdjoint, UnrolledAdjoint
from deqkit.api import solve
from deqkit.errors import ConvergenceError, ConvergenceWarning
from deqkit.gradient_error import GradientError, gradient_error
from deqkit.loop import StepInfo
from deqkit.solution import AdjointStats, Solution, Status
from deqkit.solvers import GMRES, Anderson, Auto, Broyden, FixedPointIteration, NewtonKrylov, Solver
from deqkit.spectral import Estimate, eigenvalues, frobenius_norm, spectral_norm, spectral_radius

__version__ = "0.1.0"

__all__ = [
    "GMRES",
    "JFB",
    "Adjoint",
    "AdjointStats",
    "Anderson",
    "Auto",
    "Broyden",
    "ConvergenceError",
    "ConvergenceWarning",
    "Estimate",
    "FixedPointIteration",
    "GradientError",
    "ImplicitAdjoint",
    "NeumannAdjoint",
    "NewtonKrylov",
    "PhantomAdjoint",
    "Solution",
    "Solver",
    "Status",
    "StepInfo",
    "UnrolledAdjoint",
    "__version__",
    "eigenvalues",
    "frobenius_norm",
    "gradient_error",
    "nn",
    "solve",
    "spectral_norm",
    "spectral_radius",
]
