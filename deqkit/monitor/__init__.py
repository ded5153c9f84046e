"""L6. How solves go over a training: figures collected while it runs, written where its other figures go."""

from deqkit.monitor.monitor import Monitor

__all__ = ["Monitor"]
