"""How much of the range of a channel a weight takes over from the activations it multiplies.

A channel x_c that is read by columns w_c may become x_c / s_c, read by w_c s_c: their product stays, what rounding does to
either does not. (SmoothQuant, arXiv:2211.10438: s = max|x|^a / max|w|^(1-a); AWQ, arXiv:2306.00978: s = mean|x|^a, a searched.)
Here the magnitudes are root mean squares, and s is a power of two: no float is rounded on the way, so a model that was smoothed
and not quantized computes what it computed before.
"""

from __future__ import annotations

import torch
from torch import Tensor

# a: 0 makes columns of a weight alike, 1 would make channels of activations alike.
_STRENGTHS = (0.0, 0.25, 0.5, 0.75)
# Magnitudes are taken to be at least this part of the largest: a channel that is hardly there asks for nothing.
_LEAST = 2.0**-12
# Factors lie between 2^-8 and 2^8 times their geometric mean, which is 1: fp16 has 2^15 above 1 and 2^14 below.
_MOST = 8


def factors(x_squares: Tensor, w_squares: Tensor) -> list[Tensor]:
    """What to try: factors s [channels], float32 powers of two.

    x_squares, w_squares: [channels], the mean squares of what is read, and of the columns that read it. None where either holds
    nothing but zeros, or numbers that are not finite.
    """
    logs = []
    for squares in (x_squares, w_squares):
        largest = squares.max()
        if not torch.isfinite(largest) or largest <= 0:
            return []
        logs.append(squares.float().clamp(min=float(largest) * _LEAST**2).log2() / 2)
    of_x, of_w = logs
    wanted = [strength * of_x - (1 - strength) * of_w for strength in _STRENGTHS]
    return [torch.exp2((each - each.mean()).round().clamp(-_MOST, _MOST)) for each in wanted]
