"""L6. The doctor: `diagnose` examines f, and returns a `Diagnosis`."""

from deqkit.diagnosis.doctor import diagnose
from deqkit.diagnosis.records import AdjointTrial, Check, Diagnosis, SolverTrial, Spectrum

__all__ = ["AdjointTrial", "Check", "Diagnosis", "SolverTrial", "Spectrum", "diagnose"]
