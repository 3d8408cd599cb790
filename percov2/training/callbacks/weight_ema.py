"""Exponential moving average of the weights."""

from __future__ import annotations

from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightEMA(WeightAveraging):
    """Averages the parameters after every optimiser step; validation and export see the averages.

    Lightning's own EMA callback adds two products, which moves even frozen weights by rounding;
    this one interpolates, so a weight that does not change stays the same to the last bit.
    Buffers (the quantiser's codebook, for instance) are copied, not averaged.

    Args:
        decay: of the average, in [0, 1).
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}: it must lie in [0, 1)")
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        super().__init__(use_buffers=False, multi_avg_fn=average)
