"""How much of the range of a channel a weight takes over from the activations it multiplies.

A channel x_c that is read by columns w_c may become x_c / s_c, read by w_c s_c: their product stays, what rounding does to
either does not. (SmoothQuant, arXiv:2211.10438: s = max|x|^a / max|w|^(1-a); AWQ, arXiv:2306.00978: s = mean|x|^a, a
searched.) Here the magnitudes are root mean squares, and s is a power of two: no float is rounded on the way unless it is too
small for its dtype, so a model that was smoothed and not quantized computes what it computed before.
"""

from __future__ import annotations

import torch
from torch import Tensor

# a: 0 makes columns of a weight alike, 1 would make channels of activations alike.
_STRENGTHS = (0.0, 0.25, 0.5, 0.75)
# Magnitudes are taken to be at least this part of the largest: a channel that is hardly there asks for nothing.
_LEAST = 2.0**-12
# Factors lie between 2^-m and 2^m times their geometric mean, which is 1: fp16 has few powers below its weights, and none above
# what activations may become.
_MOST = {"bf16": 8, "fp16": 4}
_LARGEST = {"bf16": 2.0**120, "fp16": 2.0**14}


def factors(x_squares: Tensor, w_squares: Tensor, largest: Tensor, *, dtype: str) -> list[Tensor]:
    """What to try: factors s [channels], float32 powers of two.

    x_squares, w_squares: [channels], the mean squares of what is read, and of the columns that read it. largest: [channels],
    the largest magnitude of what is read; dtype: "bf16" or "fp16", which is to hold it when it is divided by s. None where
    either holds nothing but zeros, or numbers that are not finite.
    """
    logs = []
    for squares in (x_squares, w_squares):
        most = squares.max()
        if not torch.isfinite(most) or most <= 0:
            return []
        logs.append(squares.float().clamp(min=float(most) * _LEAST**2).log2() / 2)
    of_x, of_w = logs
    wanted = [strength * of_x - (1 - strength) * of_w for strength in _STRENGTHS]
    found = [torch.exp2((each - each.mean()).round().clamp(-_MOST[dtype], _MOST[dtype])) for each in wanted]
    return [each for each in found if (largest / each).max() <= _LARGEST[dtype]]
