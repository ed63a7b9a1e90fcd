"""Which losses stand out of those before them."""

import math
import statistics
from dataclasses import dataclass, field


@dataclass
class LossWindow:
    """The last `size` finite losses, and whether another one is a spike beside them.

    A spike lies more than `sigma` standard deviations above their mean. Before the window is full
    nothing is one. Spikes are taken into the window too: a level that stays is soon no spike.
    """

    size: int
    sigma: float
    losses: list[float] = field(default_factory=list)

    def is_spike(self, loss: float) -> bool:
        """Whether `loss` [nats a token], not in the window yet, is one."""
        if len(self.losses) < self.size or not math.isfinite(loss):
            return False
        mean = statistics.fmean(self.losses)
        return loss > mean + self.sigma * statistics.pstdev(self.losses, mean)

    def add(self, loss: float) -> None:
        """Takes in a loss; one that is not finite leaves no trace."""
        if math.isfinite(loss):
            self.losses.append(loss)
            del self.losses[: -self.size]
