"""Checkpoint formats: one a file, each a bijection between codes and the tensors of a file."""

FORMATS: dict[str, str] = {
    "native": "bitlathe.formats.native:Native",
    "compressed-tensors": "bitlathe.formats.compressed_tensors:CompressedTensors",
    "gptq": "bitlathe.formats.gptq:Gptq",
    "awq": "bitlathe.formats.awq:Awq",
    "auto-round": "bitlathe.formats.auto_round:AutoRound",
    "gguf": "bitlathe.formats.gguf:Gguf",
    "dense": "bitlathe.formats.dense:Dense",
    "mlx": "bitlathe.formats.mlx:Mlx",
    "fp8": "bitlathe.formats.fp8:Fp8",
}

# Where config.json holds a format's configuration beside "quantization_config".
CONFIG_KEYS: dict[str, tuple[str, ...]] = {"mlx": ("quantization",)}

ALIASES: dict[str, str] = {"fake": "dense"}
