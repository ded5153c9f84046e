"""L6. What the Jacobian of f looks like at a point: how far it stretches, how fast a plain iteration converges."""

from deqkit.spectral.eigenvalues import eigenvalues
from deqkit.spectral.estimates import Estimate, frobenius_norm, spectral_norm, spectral_radius

__all__ = ["Estimate", "eigenvalues", "frobenius_norm", "spectral_norm", "spectral_radius"]
