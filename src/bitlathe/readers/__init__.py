"""Other programs' readers of our folders, each in one file that imports what it needs at its top.

A row names the package that must be installed, and the formats that it is asked to read. Reading the table imports nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from bitlathe.formats import FORMATS


class Reader(NamedTuple):
    """target: "module:function" that opens a folder. package: what it needs, by its name on PyPI. module: the same, as it is
    imported. formats: those whose folders it reads. computes: why its logits are not those of the weights alone, "" where
    they are."""

    target: str
    package: str
    module: str
    formats: tuple[str, ...]
    computes: str = ""


READERS: dict[str, Reader] = {
    "bitlathe": Reader("bitlathe.readers.own:opened", "bitlathe", "bitlathe", tuple(FORMATS)),
    "transformers": Reader("bitlathe.readers.plain:opened", "transformers", "transformers", ("dense", "compressed-tensors")),
    "transformers with bitlathe.hf": Reader(
        "bitlathe.readers.taught:opened", "transformers", "transformers", ("native", "dense", "compressed-tensors")
    ),
    "gptqmodel": Reader("bitlathe.readers.gptq_model:opened", "gptqmodel", "gptqmodel", ("gptq", "awq")),
    "auto-round": Reader("bitlathe.readers.auto_round_:opened", "auto-round", "auto_round", ("auto-round",)),
    "gguf": Reader("bitlathe.readers.gguf_:opened", "gguf", "gguf", ("gguf",)),
    "transformers for GGUF": Reader("bitlathe.readers.gguf_hf:opened", "transformers", "transformers", ("gguf",)),
    "llama.cpp": Reader(
        "bitlathe.readers.llama:opened",
        "llama-cpp-python",
        "llama_cpp",
        ("gguf",),
        "llama.cpp rounds activations to 8 bits in its products",
    ),
    "mlx": Reader("bitlathe.readers.mlx_:opened", "mlx", "mlx", ("mlx",)),
    "transformers for fp8": Reader(
        "bitlathe.readers.fp8_:opened",
        "transformers",
        "transformers",
        ("fp8",),
        "transformers dequantizes the weights on a CPU, and then keeps activations as they are",
    ),
}
