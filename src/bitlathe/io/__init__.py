"""Bytes in and bytes out; knows nothing of quantization."""
