"""Post-norm blocks: olmo2 reads the residual stream as it is and normalises what attention and MLP add to it."""

from __future__ import annotations

from bitlathe.arch.base import Arch, Linear

OLMO2 = Arch(
    linears=(
        Linear("self_attn.q_proj", "residual", "qk", fused="self_attn.qkv"),
        Linear("self_attn.k_proj", "residual", "qk", fused="self_attn.qkv"),
        Linear("self_attn.v_proj", "residual", "value", fused="self_attn.qkv"),
        Linear("self_attn.o_proj", "value", "residual"),
        Linear("mlp.gate_proj", "residual", "gate_up", fused="mlp.gate_up"),
        Linear("mlp.up_proj", "residual", "gate_up", fused="mlp.gate_up"),
        Linear("mlp.down_proj", "mid", "residual"),
    )
)
