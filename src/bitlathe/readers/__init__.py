"""Other programs' readers of our folders, each in one file that imports what it needs at its top.

A row names the package that must be installed, and the formats that it is asked to read. Reading the table imports nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from bitlathe.formats import FORMATS

_OWN = "bitlathe.readers.own:opened"


class Reader(NamedTuple):
    """target: "module:function" that opens a folder. package: what it needs, by its name on PyPI. module: the same, as it is
    imported. formats: those whose folders it reads. ours: what opens the folder so that we compute as the reader does, where
    that is not as the checkpoint says. most: what another order of additions may do to logits, in nats a token."""

    target: str
    package: str
    module: str
    formats: tuple[str, ...]
    ours: str = _OWN
    most: float = 1e-5


READERS: dict[str, Reader] = {
    "bitlathe": Reader(_OWN, "bitlathe", "bitlathe", tuple(FORMATS)),
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
        ours="bitlathe.readers.own:opened_as_llama_cpp",
        most=5e-5,  # a last bit of float32 becomes a step of 8 bits where activations are rounded
    ),
    "mlx": Reader("bitlathe.readers.mlx_:opened", "mlx", "mlx", ("mlx",)),
    "transformers for fp8": Reader(
        "bitlathe.readers.fp8_:opened",
        "transformers",
        "transformers",
        ("fp8",),
        ours="bitlathe.readers.own:opened_weights",  # on a CPU it dequantizes them, and keeps activations as they are
    ),
}
