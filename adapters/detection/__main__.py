"""``python -m adapters.detection``: train, evaluate and look at detectors."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

COMMANDS = {
    "predict": "adapters.detection.commands:predict",
    "features": "adapters.detection.commands:features",
    "receptive-field": "adapters.detection.commands:receptive_field",
    "cost": "adapters.detection.commands:cost",
    "export": "adapters.detection.export_command:export",
}
"""What there is beside training and evaluation (`training.cli`): the function of a command."""

TRAINING = ("fit", "validate", "test")
"""The commands of training and evaluation."""

USAGE = """\
usage: python -m adapters.detection COMMAND [--help] [--config FILE] [--OPTION VALUE ...]

  fit              Trains a detector from a config file.
  validate         Evaluates it on the validation set.
  test             Evaluates it on a test set, or writes the detections for a test server."""


def main(words: Sequence[str]) -> int:
    """Runs a command line.

    Returns:
        Exit status: 0, or 2 for what cannot be used.
    """
    if not words or words[0] in ("-h", "--help"):
        lines = [f"  {name:15}  {(_function(name).__doc__ or '').splitlines()[0]}" for name in COMMANDS]
        print("\n".join([USAGE, *lines]), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] not in (*TRAINING, *COMMANDS) and not words[0].startswith("-"):
        print(f"error: unknown command {words[0]!r}: choose one of {[*TRAINING, *COMMANDS]}", file=sys.stderr)
        return 2
    if words[0] not in COMMANDS:
        from adapters.detection.training.cli import run

        return run(words)
    from adapters.detection.commands import run_command

    return run_command(words[0], _function(words[0]), words[1:])


def _function(name: str) -> Callable[..., None]:
    module, _, function = COMMANDS[name].partition(":")
    return getattr(import_module(module), function)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
