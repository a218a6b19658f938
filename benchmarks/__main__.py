"""python -m benchmarks [--model M] [--calib T] [--text T] [--only NAME,NAME]: print the tables of docs/benchmarks.md.

quality: KL and perplexity of every tuner at 4, 3 and 2 bits. overhead: the tuning loop against the passes it consists of.
mix: KL of mixes against that of uniform schemes. mix-scores: rank correlation of scores with true KL. mix-cost: scoring against
a forward pass. depth: peak memory of two models that differ in depth alone. startup: how soon the package and its help answer.
rotation-w4a4, rotation-fp4: KL of quantized weights and activations with and without rotation, tuned and not; with "-outliers"
after the name the same on the model with outliers added. rotation-float: how far rotations alone move float logits.
rotation-cost: forward passes with a rotation online against the same without. columns: solvers' compiled loops against torch.
"""

from __future__ import annotations

import argparse
import platform

import torch
import transformers

from benchmarks import columns, depth, mix, overhead, quality, rotation, startup
from bitlathe.version import VERSION

TABLES = {
    "quality": lambda a: quality.table(a.model, a.calib, a.text, device=a.device, seeds=a.seeds),
    "overhead": lambda a: overhead.table(a.model, a.calib, device=a.device),
    "columns": lambda a: columns.table(device=a.device),
    "depth": lambda a: depth.table(),
    "startup": lambda a: startup.table(),
    "mix": lambda a: mix.gains(_source(a)),
    "mix-scores": lambda a: mix.foretold(_source(a)),
    "mix-cost": lambda a: mix.cost(_source(a)),
    "rotation-float": lambda a: rotation.unmoved(a.model, device=a.device),
    "rotation-cost": lambda a: rotation.cost(a.model, device=a.device),
    "rotation-w4a4": lambda a: rotation.accuracy(_source(a), ("W4A4",), rotation.WHOLE),
    "rotation-w4a4-outliers": lambda a: rotation.with_outliers(_source(a), ("W4A4",), rotation.WHOLE),
    "rotation-fp4": lambda a: rotation.accuracy(_source(a), ("MXFP4", "NVFP4"), rotation.BLOCKS),
    "rotation-fp4-outliers": lambda a: rotation.with_outliers(_source(a), ("MXFP4", "NVFP4"), rotation.BLOCKS),
}


def _source(given: argparse.Namespace) -> rotation.Source:
    return rotation.Source(given.model, given.calib, given.text, given.device)


def main() -> None:
    """Print the tables asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin", help="folder or Hub id (default: the bundled model)")
    parser.add_argument("--calib", default="builtin", help="calibration text (default: the bundled one)")
    parser.add_argument("--text", default="builtin", help="evaluation text (default: the bundled one)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds the medians are over (default: 1)")
    parser.add_argument("--only", default=",".join(TABLES), help="tables to print, with commas (default: all)")
    arguments = parser.parse_args()
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(f"bitlathe {VERSION}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"Python {platform.python_version()}, {place}")
    for name in arguments.only.split(","):
        print(f"\n## {name}\n", flush=True)
        for line in TABLES[name](arguments):
            print(line, flush=True)


if __name__ == "__main__":
    main()
