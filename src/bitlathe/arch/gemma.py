"""Norms on both sides of attention and MLP: gemma2 and the text models of gemma3.

The second norm of each pair scales what o_proj and down_proj add to the residual stream, so no linear writes that.
"""

from __future__ import annotations

from bitlathe.arch.base import Arch, Linear

GEMMA = Arch(
    linears=(
        Linear("self_attn.q_proj", "residual", "rope", norm="input_layernorm", fused="self_attn.qkv"),
        Linear("self_attn.k_proj", "residual", "rope", norm="input_layernorm", fused="self_attn.qkv"),
        Linear("self_attn.v_proj", "residual", "value", norm="input_layernorm", fused="self_attn.qkv"),
        Linear("self_attn.o_proj", "value", "branch"),
        Linear("mlp.gate_proj", "residual", "gate_up", norm="pre_feedforward_layernorm", fused="mlp.gate_up"),
        Linear("mlp.up_proj", "residual", "gate_up", norm="pre_feedforward_layernorm", fused="mlp.gate_up"),
        Linear("mlp.down_proj", "mid", "branch"),
    )
)
