"""Pre-norm blocks whose projections are stored fused: phi3."""

from __future__ import annotations

from bitlathe.arch.base import Arch, Linear

PHI3 = Arch(
    linears=(
        Linear("self_attn.qkv_proj", "residual", "qkv", norm="input_layernorm"),
        Linear("self_attn.o_proj", "value", "residual", onto="input_layernorm"),
        Linear("mlp.gate_up_proj", "residual", "gate_up", norm="post_attention_layernorm"),
        Linear("mlp.down_proj", "mid", "residual", onto="post_attention_layernorm"),
    )
)
