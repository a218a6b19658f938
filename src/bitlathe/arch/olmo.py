"""Post-norm blocks: olmo2 reads the residual stream as it is and normalises what attention and MLP add to it.

So no linear writes the residual stream.
"""

from __future__ import annotations

from bitlathe.arch.base import Arch, Linear

OLMO2 = Arch(
    linears=(
        Linear("self_attn.q_proj", "residual", "rope", fused="self_attn.qkv"),
        Linear("self_attn.k_proj", "residual", "rope", fused="self_attn.qkv"),
        Linear("self_attn.v_proj", "residual", "value", fused="self_attn.qkv"),
        Linear("self_attn.o_proj", "value", "branch"),
        Linear("mlp.gate_proj", "residual", "gate_up", fused="mlp.gate_up"),
        Linear("mlp.up_proj", "residual", "gate_up", fused="mlp.gate_up"),
        Linear("mlp.down_proj", "mid", "branch"),
    )
)
