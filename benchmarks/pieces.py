"""What each piece of closed-form tuning buys in KL divergence and costs in time, each added to those before it:

    python -m benchmarks.pieces --model small --calib calib.txt --text eval.txt --schemes W4A16,W2A16G32

"loops" is the share of the time that goes by in the loops over columns (`numerics.columns`); how fast these are is told by
`python -m benchmarks --only columns`.
W4A4 is rotated (R1, R2, R4).
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import time
from typing import Any

import bitlathe

_NONE = {"passes": 0, "refits": 0, "held_out": 0, "gradients": 0}
# Piece -> the effort, and what is changed of closed-form's options.
PIECES: dict[str, tuple[str, dict[str, int]]] = {
    "searched rounding": ("fast", {}),
    "errors fed back": ("normal", _NONE),
    "coordinate descent": ("normal", _NONE | {"passes": 2}),
    "scales refitted": ("normal", _NONE | {"passes": 2, "refits": 2}),
    "what was lost made up for": ("normal", {"gradients": 0}),
    "two-sided feedback": ("normal", {}),
    "scales end to end": ("best", {}),
}
ROTATED = {"W4A4": {"rotate": "R1,R2,R4"}}


def measure(given: argparse.Namespace, scheme: str, piece: str) -> tuple[float, float, float, float]:
    """KL divergence, its standard error, seconds, and the share of them in the loops over columns."""
    effort, changes = PIECES[piece]
    options = changes | ({"end_to_end": given.steps} if effort == "best" else {})
    asked: dict[str, Any] = {
        "scheme": scheme,
        "effort": effort,
        "closed_form": options,
        "calib": given.calib,
        "samples": given.samples,
        "seqlen": given.seqlen,
        **ROTATED.get(scheme, {}),
    }
    with tempfile.TemporaryDirectory(prefix="bitlathe-pieces-") as folder:
        profile, began = cProfile.Profile(), time.perf_counter()
        profile.enable()
        bitlathe.quantize(given.model, out=f"{folder}/q", **asked)
        profile.disable()
        seconds = time.perf_counter() - began
        found = bitlathe.evaluate(
            f"{folder}/q", against=given.model, text=given.text, seqlen=given.seqlen, windows=given.windows
        )
    spent = pstats.Stats(profile).get_stats_profile().func_profiles
    loops = spent["loop_over"].cumtime if "loop_over" in spent else 0.0
    return found["kl_mean"]["value"], found["kl_mean"]["error"], seconds, loops / seconds


def main() -> None:
    """Print the table, a scheme after the other."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pieces", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--model", default="builtin", help="folder or Hub id (default: the bundled model)")
    parser.add_argument("--calib", default="builtin", help="calibration text (default: the bundled one)")
    parser.add_argument("--text", default="builtin", help="evaluation text (default: the bundled one)")
    parser.add_argument("--schemes", default="W4A16,W3A16,W2A16G32,W4A4,MXFP4,NVFP4", help="with commas")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows (default: 32)")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens of a window (default: 512)")
    parser.add_argument("--windows", type=int, default=24, help="evaluation windows (default: 24)")
    parser.add_argument("--steps", type=int, default=64, help="of the tuning end to end (default: 64)")
    given = parser.parse_args()
    print("| scheme | piece | KL mean | standard error | seconds | loops |\n|---|---|---|---|---|---|", flush=True)
    for scheme in given.schemes.split(","):
        for piece in PIECES:
            kl, error, seconds, share = measure(given, scheme, piece)
            print(f"| {scheme} | {piece} | {kl:.5f} | {error:.5f} | {seconds:.0f} | {share:.0%} |", flush=True)


if __name__ == "__main__":
    main()
