"""Checkpoint formats: one a file, each a bijection between codes and the tensors of a file."""

FORMATS: dict[str, str] = {
    "native": "bitlathe.formats.native:Native",
    "compressed-tensors": "bitlathe.formats.compressed_tensors:CompressedTensors",
    "gguf": "bitlathe.formats.gguf:Gguf",
    "dense": "bitlathe.formats.dense:Dense",
}

ALIASES: dict[str, str] = {"fake": "dense"}
