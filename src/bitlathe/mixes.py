"""llama.cpp's mixes of block types, as its quantizer chooses them for dense decoders (llama-quant.cpp)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from bitlathe.arch import Arch
from bitlathe.numerics.scheme import LLAMA_CPP

# Name of a mix -> the type that most linears get.
MIXES: dict[str, str] = {"Q2_K_S": "Q2_K", "Q3_K_M": "Q3_K", "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K", "Q5_K_M": "Q5_K"}
# What takes the place of a type whose blocks do not divide a row.
_INSTEAD: dict[str, str] = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_MANY_QUERIES = 4  # heads of queries for each of keys, from which values are worth more bits


def mix_named(name: str) -> str | None:
    """The table's spelling of a mix; case and "-" or "_" do not matter. None for what is none."""
    key = name.upper().replace("-", "").replace("_", "")
    return next((mix for mix in MIXES if mix.replace("_", "") == key), None)


def expanded(mix: str, arch: Arch, shapes: Mapping[str, tuple[int, int]], *, depth: int, tied: bool) -> dict[str, str]:
    """Linear or embeddings -> its type. shapes: (outputs, inputs) of them all; tied: the head has that of the embeddings."""
    types = {}
    for name, shape in shapes.items():
        if name == arch.head:
            if tied:
                continue
            wanted = "Q6_K"
        elif name == arch.embed:
            wanted = "Q6_K" if tied else MIXES[mix]
        else:
            block, _, inner = name.removeprefix(f"{arch.blocks}.").partition(".")
            keys = shapes.get(f"{arch.blocks}.{block}.self_attn.k_proj", shape)
            queries = shapes.get(f"{arch.blocks}.{block}.self_attn.q_proj", shape)
            many = queries[0] >= _MANY_QUERIES * keys[0]
            wanted = _type(mix, inner.rpartition(".")[2], int(block), depth, many=many)
        fits = LLAMA_CPP[wanted].fits(shape)
        types[name] = wanted if fits else "Q8_0" if name == arch.head or (tied and name == arch.embed) else _INSTEAD[wanted]
    return types


def told(types: Mapping[str, str], mix: str) -> tuple[str, ...]:
    """What to say of linears whose rows are no whole blocks of the type that a mix would give them. types: those they get."""
    other = Counter(kind for kind in types.values() if kind in _INSTEAD.values())
    if not other:
        return ()
    got = ", ".join(f"{count} {kind}" for kind, count in sorted(other.items()))
    return (
        f"{sum(other.values())} of {len(types)} matrices have rows that are no multiple of 256, the blocks of {mix}: as in "
        f"llama.cpp they get other types instead, {got}",
    )


def _type(mix: str, part: str, index: int, depth: int, *, many: bool) -> str:
    """The type of a linear of block `index` of `depth`, by the last part of its name."""
    eighth = depth // 8
    more = index < eighth or index >= 7 * depth // 8 or (index - eighth) % 3 == 2
    chosen = {
        "Q2_K_S": {"v_proj": "Q4_K" if many else "", "down_proj": "Q4_K" if index < eighth else ""},
        "Q3_K_M": {
            "v_proj": "Q5_K" if index < 2 else "Q4_K",
            "down_proj": "Q5_K" if index < depth // 16 else "Q4_K",
            "o_proj": "Q4_K",
        },
        "Q4_K_S": {"v_proj": "Q5_K" if index < 4 else "", "down_proj": "Q5_K" if index < eighth else ""},
        "Q4_K_M": {"v_proj": "Q6_K" if more else "", "down_proj": "Q6_K" if more else ""},
        "Q5_K_M": {"v_proj": "Q6_K" if more else "", "down_proj": "Q6_K" if more else ""},
    }[mix]
    return chosen.get(part) or MIXES[mix]
