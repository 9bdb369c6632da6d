"""What a loop measures while it runs."""

import torch
from torch import Tensor


class DivergenceWatch:
    """Counts non-finite steps and divergences on the device, without a synchronisation.

    A divergence is a non-finite loss, or a loss above twice its exponential moving average (decay
    0.99) for 32 steps running; the average stands still while the loss is above it.
    """

    FIELDS = ("ema", "steps", "over", "skipped", "streak", "worst_streak", "divergences")

    def __init__(self, device: torch.device):
        self.state = torch.zeros(len(self.FIELDS), dtype=torch.float64, device=device)

    def update(self, loss: Tensor, finite: Tensor) -> None:
        """``loss`` 0-d, ``finite`` 0-d bool: whether this step's loss and gradient norm were finite."""
        ema, steps, over, skipped, streak, worst, events = self.state.unbind()
        loss = loss.double()
        high = finite & (steps > 0) & (loss > 2 * ema)
        new_over = torch.where(high, over + 1, torch.zeros_like(over))
        moved = torch.where(steps > 0, 0.99 * ema + 0.01 * loss, loss)
        bad = (~finite).double()
        new_streak = (streak + 1) * bad
        self.state = torch.stack(
            [
                torch.where(finite & ~high, moved, ema),
                steps + finite,
                new_over,
                skipped + bad,
                new_streak,
                torch.maximum(worst, new_streak),
                events + bad + (new_over == 32),
            ]
        )

    def read(self) -> dict[str, float]:
        """The counters on the host (synchronises)."""
        return dict(zip(self.FIELDS, self.state.tolist(), strict=True))
