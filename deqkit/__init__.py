"""Deep equilibrium layers for PyTorch: solve x* = f(x*), differentiate through it, and know how well it went."""

from deqkit import nn, plots
from deqkit.adjoints import (
    JFB,
    Adjoint,
    ImplicitAdjoint,
    NeumannAdjoint,
    PhantomAdjoint,
    ReversibleAdjoint,
    ShineAdjoint,
    UnrolledAdjoint,
)
from deqkit.api import solve
from deqkit.diagnosis import Diagnosis, diagnose
from deqkit.errors import ConvergenceError, ConvergenceWarning
from deqkit.gradient_error import GradientError, gradient_error
from deqkit.loop import StepInfo
from deqkit.monitor import Monitor
from deqkit.regularization import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    Schedule,
    StepSchedule,
    correction_loss,
    jacobian_penalty,
    spectral_norm_penalty,
)
from deqkit.solution import AdjointStats, Solution, Status
from deqkit.solvers import (
    GMRES,
    Anderson,
    Auto,
    BiCGSTAB,
    Broyden,
    FixedPointIteration,
    MixedPrecision,
    NewtonKrylov,
    ReversibleIteration,
    Solver,
)
from deqkit.spectral import Estimate, eigenvalues, frobenius_norm, spectral_norm, spectral_radius

__version__ = "0.1.0"

__all__ = [
    "GMRES",
    "JFB",
    "Adjoint",
    "AdjointStats",
    "Anderson",
    "Auto",
    "BiCGSTAB",
    "Broyden",
    "ConstantSchedule",
    "ConvergenceError",
    "ConvergenceWarning",
    "CosineSchedule",
    "Diagnosis",
    "Estimate",
    "FixedPointIteration",
    "GradientError",
    "ImplicitAdjoint",
    "LinearSchedule",
    "MixedPrecision",
    "Monitor",
    "NeumannAdjoint",
    "NewtonKrylov",
    "PhantomAdjoint",
    "ReversibleAdjoint",
    "ReversibleIteration",
    "ShineAdjoint",
    "Schedule",
    "Solution",
    "Solver",
    "Status",
    "StepInfo",
    "StepSchedule",
    "UnrolledAdjoint",
    "__version__",
    "correction_loss",
    "diagnose",
    "eigenvalues",
    "frobenius_norm",
    "gradient_error",
    "jacobian_penalty",
    "nn",
    "plots",
    "solve",
    "spectral_norm",
    "spectral_norm_penalty",
    "spectral_radius",
]
