"""Our GGUF mixes against llama.cpp's own quantizer with its importance matrix, on the same text, by one evaluator.

    python -m benchmarks.gguf MODEL --bin FOLDER_OF_LLAMA_CPP --work DIR [--tuner closed-form|signround|rtn]

The original is written as bf16 by our container, so that both start from the same numbers; llama.cpp's files are read by our
own reader, whose weights are those of the gguf package bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from gguf import GGUFReader

import bitlathe
from bitlathe.formats.base import Source
from bitlathe.formats.gguf_file import GgufFile
from bitlathe.io.checkpoint import find_folder
from bitlathe.io.gguf import FILE, name_of
from bitlathe.plan import Plan

MIXES = ("Q4_K_M", "Q2_K_S")
TEXT = Path(bitlathe.__file__).parent / "data" / "calib.txt"


def tool(folder: Path, name: str, *arguments: str) -> None:
    """Run one of llama.cpp's programs."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    subprocess.run([str(folder / name), *arguments], check=True, env=environment, capture_output=True)


def readable(file: Path, model: Path, out: Path) -> Path:
    """A folder that bitlathe reads a GGUF file of another program from."""
    out.mkdir(parents=True)
    shutil.copy(file, out / FILE)
    types: dict[str, list[str]] = {}
    for tensor in GGUFReader(file).tensors:
        name = name_of(tensor.name)
        if name is not None and tensor.tensor_type.name not in ("F32", "F16", "BF16"):
            types.setdefault(tensor.tensor_type.name, []).append(name.removesuffix(".weight"))
    config = json.loads((model / "config.json").read_text())
    kept = ["lm_head"] if config.get("tie_word_embeddings") else []
    quantization = {"quant_method": "gguf", "dtype": "bf16", "types": types, "kept": kept}
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, out / name)
    return out


def kl(folder: Path, model: Path) -> tuple[float, float]:
    """Of a folder to the original, nats a token, with its standard error."""
    found: Any = bitlathe.evaluate(str(folder), against=str(model), device="cpu")
    return found["kl_mean"]["value"], found["kl_mean"]["error"]


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--bin", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tuner", default="closed-form")
    options = parser.parse_args()
    model, work = find_folder(options.model), options.work
    work.mkdir(parents=True, exist_ok=True)
    config, plain, matrix = json.loads((model / "config.json").read_text()), work / "plain.gguf", work / "imatrix.gguf"
    GgufFile().write(plain, sorted(model.glob("*.safetensors")), Source(config, model, Plan(linears={})))
    tool(options.bin, "llama-imatrix", "-m", str(plain), "-f", str(TEXT), "-o", str(matrix), "-c", "512", "--chunks", "64")
    print("| mix | llama.cpp | ours | ratio |\n|---|---|---|---|")
    for mix in MIXES:
        theirs, ours = work / f"{mix}.gguf", work / f"ours-{mix}"
        tool(options.bin, "llama-quantize", "--imatrix", str(matrix), str(plain), str(theirs), mix)
        common = {"scheme": mix, "formats": ["gguf"], "calib": "builtin", "samples": 64, "seqlen": 512, "device": "cpu"}
        bitlathe.quantize(str(model), out=ours, tuner=options.tuner, signround={"start": "searched"}, **common)
        (before, error), (after, own) = kl(readable(theirs, model, work / f"theirs-{mix}"), model), kl(ours, model)
        print(f"| {mix} | {before:.4f} ± {error:.4f} | {after:.4f} ± {own:.4f} | {after / before:.3f} |", flush=True)


if __name__ == "__main__":
    main()
