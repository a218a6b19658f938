"""Pre-norm blocks with experts: qwen2_moe (with a shared expert), qwen3_moe, olmoe.

Some of a model's blocks may have the MLP of a dense model instead. The names are those of the tensors on disk, one linear for
each projection of each expert.
"""

from __future__ import annotations

from bitlathe.arch.base import Arch, Linear
from bitlathe.arch.llama import LLAMA

_NORM = "post_attention_layernorm"

MOE = Arch(
    experts="mlp.experts",
    shared="mlp.shared_expert",
    linears=(
        *LLAMA.linears,
        Linear("mlp.gate", "residual", "routing", norm=_NORM, router=True),
        Linear("mlp.experts.*.gate_proj", "residual", "gate_up", norm=_NORM, fused="mlp.experts"),
        Linear("mlp.experts.*.up_proj", "residual", "gate_up", norm=_NORM, fused="mlp.experts"),
        Linear("mlp.experts.*.down_proj", "mid", "residual", fused="mlp.experts"),
        Linear("mlp.shared_expert_gate", "residual", "routing", norm=_NORM, router=True),
        Linear("mlp.shared_expert.gate_proj", "residual", "gate_up", norm=_NORM, fused="mlp.shared_expert.gate_up"),
        Linear("mlp.shared_expert.up_proj", "residual", "gate_up", norm=_NORM, fused="mlp.shared_expert.gate_up"),
        Linear("mlp.shared_expert.down_proj", "mid", "residual"),
    ),
)
