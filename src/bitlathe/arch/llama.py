"""Pre-norm blocks with separate projections: llama, mistral, qwen2, qwen3 (whose q and k norms sit inside the head)."""

from __future__ import annotations

from bitlathe.arch.base import Arch, Linear

LLAMA = Arch(
    linears=(
        Linear("self_attn.q_proj", "residual", "rope", norm="input_layernorm", fused="self_attn.qkv"),
        Linear("self_attn.k_proj", "residual", "rope", norm="input_layernorm", fused="self_attn.qkv"),
        Linear("self_attn.v_proj", "residual", "value", norm="input_layernorm", fused="self_attn.qkv"),
        Linear("self_attn.o_proj", "value", "residual", onto="input_layernorm"),
        Linear("mlp.gate_proj", "residual", "gate_up", norm="post_attention_layernorm", fused="mlp.gate_up"),
        Linear("mlp.up_proj", "residual", "gate_up", norm="post_attention_layernorm", fused="mlp.gate_up"),
        Linear("mlp.down_proj", "mid", "residual", onto="post_attention_layernorm"),
    )
)
