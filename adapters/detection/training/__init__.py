"""Training of detectors with Lightning: their config, their module, the figures of the solver, their checkpoints."""

from adapters.detection.training.checkpoints import MovableCheckpoint, load_checkpoint
from adapters.detection.training.config import DetectorConfig
from adapters.detection.training.module import DetectionModule
from adapters.detection.training.run_folder import best_checkpoint, last_checkpoint, make_loggers
from adapters.detection.training.schedule import Schedule
from adapters.detection.training.solver_figures import SolverFigures, SolverSummary, Solves, median_of, summarize
from adapters.detection.training.step_timer import StepTimer

__all__ = [
    "DetectionModule",
    "DetectorConfig",
    "MovableCheckpoint",
    "Schedule",
    "SolverFigures",
    "SolverSummary",
    "Solves",
    "StepTimer",
    "best_checkpoint",
    "last_checkpoint",
    "load_checkpoint",
    "make_loggers",
    "median_of",
    "summarize",
]
