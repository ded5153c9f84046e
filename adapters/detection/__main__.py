"""``python -m adapters.detection``: train, evaluate and look at detectors."""

import sys

from adapters.detection.training.cli import run

if __name__ == "__main__":
    sys.exit(run())
