"""No connection between levels: the "no CSC" rows of i-FPN's tables 3 and 4 (arXiv 2012.13563)."""

from collections.abc import Sequence

from torch import Tensor, nn

from adapters.detection.necks.norms import Masks

__all__ = ["NoConnection"]


class NoConnection(nn.Module):
    """Every level keeps to itself.

    With residual blocks, G(Z) = ReLU(Z + F(Z)) then adds B at every step, and has no fixed point until F has learnt to
    take it away again: expect solves that end at `max_steps`, unless a norm follows.

    Args:
        channels: Not used.
        num_levels: Not used.
        share: Not used: there is no weight.
    """

    def __init__(self, channels: int, num_levels: int, *, share: bool | None = None):
        super().__init__()

    def forward(self, levels: Sequence[Tensor], masks: Masks | None = None) -> list[Tensor]:
        """The levels as they are."""
        return list(levels)
