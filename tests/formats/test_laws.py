"""decode(encode(q)) == q and parse(config(plan)) == plan, for every format and every scheme it accepts; bits are counted.

The second law is of what a configuration has to say. A format whose readers find folded rotations in the weights, and clipped
ranges in static scales, gives them back as if they had never been (`told`).
"""

from __future__ import annotations

import json

import pytest

from bitlathe.errors import FormatError
from bitlathe.formats.base import Format
from bitlathe.formats.dense import DTYPES, Dense
from bitlathe.formats.native import Native
from bitlathe.numerics.project import dequantize
from bitlathe.numerics.rotation import Rotation
from bitlathe.numerics.scheme import KV_SCHEMES, LLAMA_CPP, PRESETS, SCHEMES
from bitlathe.plan import LayerPlan, Plan
from format_samples import (
    APART,
    COLUMNS,
    HELD,
    NARROW,
    ROWS,
    ROWS_BESIDE,
    TURNED,
    WIDE,
    WRITTEN,
    Dtype,
    bits_of,
    facts,
    layer_of,
    plan_of,
    row_named,
)

LONG = {"bf16": "bfloat16", "fp16": "float16"}
BF16_ONLY = ("MXFP4", "MXFP8", "NVFP4")  # and their weights alone


def accepted(format: Format) -> list[tuple[str, Dtype]]:
    bf16: list[tuple[str, Dtype]] = [(name, "bf16") for name in PRESETS]
    fp16: list[tuple[str, Dtype]] = [
        (name, "fp16") for name, preset in PRESETS.items() if preset.input or "G32" in name or not name.startswith("W")
    ]
    if format.name in NARROW:
        return [pair for pair in bf16 + fp16 if holds(format, row_named(*pair), (256, 256), pair[1])]
    both = bf16 + [pair for pair in fp16 if format.name == "native" or not pair[0].startswith(BF16_ONLY)]
    return [pair for pair in both if format.name == "native" or pair[0] not in APART]


def holds(format: Format, row: LayerPlan, shape: tuple[int, int], dtype: Dtype = "bf16") -> bool:
    """Whether a plan of this row is made at all, and then held."""
    if not all(scheme is None or scheme.fits(shape) for scheme in (row.weight, row.input)):
        return False
    try:
        format.check(plan_of({"a": row}, dtype), {"a": shape}, {})
    except FormatError:
        return False
    return True


CASES = [(format, name, dtype) for format in HELD for name, dtype in accepted(HELD[format])]


def told(format: Format, plan: Plan) -> Plan:
    """What a configuration of the plan can say: all of it, or only what is not in the weights and scales already."""
    if format.name == "native":
        return plan
    online = {row.online for row in plan.linears.values()}
    rows = {name: row.model_copy(update={"clip": 1.0}) for name, row in plan.linears.items()}
    rotations = tuple(rotation for rotation in plan.rotations if rotation in online)
    return plan.model_copy(update={"linears": rows, "rotations": rotations, "untied": False})


def comes_back(format: Format, plan: Plan) -> None:
    stored = {"dtype": LONG[plan.dtype]} | json.loads(json.dumps(format.config(plan)))  # as a folder is opened
    parsed = format.parse(stored, list(plan.linears))
    assert parsed == told(format, plan)
    assert list(parsed.linears) == list(plan.linears)


def codes_come_back(format: Format, row: LayerPlan, dtype: Dtype) -> None:
    layer = layer_of(row, dtype)
    tensors = format.encode(layer, row, dtype)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    decoded = format.decode(tensors, row, (ROWS, COLUMNS))
    assert (facts(decoded.weight), facts(decoded.input)) == (facts(layer.weight), facts(layer.input))
    inputs = {name: tensor for name, tensor in tensors.items() if name.startswith("input_")}
    assert facts(format.decode_input(inputs, row)) == facts(layer.input)


@pytest.mark.parametrize(("name", "scheme", "dtype"), CASES)
def test_codes_come_back(name: str, scheme: str, dtype: Dtype) -> None:
    codes_come_back(HELD[name], row_named(scheme, dtype), dtype)


# Ragged blocks of 128 rows, one block that is not full, rows that end within a word or within a byte.
SHAPES = ((ROWS, COLUMNS), (32, 1184), (130, 48), (7, 13), (3, 128))


WHERE = [(format, name) for format in WRITTEN for name in PRESETS if format not in NARROW or (format, name, "bf16") in CASES]


@pytest.mark.parametrize(("name", "scheme"), WHERE)
def test_bits_are_those_of_the_tensors(name: str, scheme: str) -> None:
    format, row = WRITTEN[name], row_named(scheme, "bf16")
    held = [shape for shape in SHAPES if holds(format, row, shape)]
    assert held or scheme in APART
    for shape in held:
        tensors = format.encode(layer_of(row, "bf16", shape=shape), row, "bf16")
        stored = sum(tensor.nbytes for name, tensor in tensors.items() if not name.startswith("input_"))
        assert format.bits(row, shape) == 8 * stored, shape


@pytest.mark.parametrize("row", ROWS_BESIDE.values(), ids=ROWS_BESIDE)
@pytest.mark.parametrize("format", [WRITTEN[name] for name in WRITTEN if name not in NARROW])
def test_bits_of_rows_without_a_name(format: Format, row: LayerPlan) -> None:
    tensors = format.encode(layer_of(row, "bf16"), row, "bf16")
    stored = sum(tensor.nbytes for name, tensor in tensors.items() if not name.startswith("input_"))
    assert format.bits(row, (ROWS, COLUMNS)) == 8 * stored


def test_bits_of_a_matrix_that_no_memory_holds() -> None:
    weights, side = 2**60, 2**30
    found = {name: format.bits(row_named("W4A16", "bf16"), (side, side)) for name, format in WRITTEN.items()}
    coded = 4 * weights + 16 * weights // 128
    assert found == {
        "native": coded,
        "compressed-tensors": coded + 2 * 64,
        "dense": 16 * weights,
        "mlx": coded + 16 * weights // 128,
        "fp8": 8 * weights + 32 * weights // 128**2,  # which has one scheme
    }
    # Five codes of three bits take two bytes.
    assert WRITTEN["native"].bits(row_named("W3A16_CHANNEL", "bf16"), (side, 5)) == side * (2 * 8 + 16)


@pytest.mark.parametrize(("name", "scheme", "dtype"), CASES)
def test_plans_come_back(name: str, scheme: str, dtype: Dtype) -> None:
    held = row_named(scheme, dtype)
    plan = plan_of({"a.q": held, "a.k": held, "a.o": None, "lm_head": None}, dtype)
    HELD[name].check(plan, dict.fromkeys(plan.linears, (256, 256)), {"a.q": "a.qk", "a.k": "a.qk"})
    comes_back(HELD[name], plan)


def running(scheme: str, dtype: Dtype) -> LayerPlan:
    """A row of which something happens to the input: it is rounded where the scheme says so, otherwise turned."""
    row = row_named(scheme, dtype)
    return row if row.input is not None else row.model_copy(update={"online": TURNED})


DTYPED: tuple[Dtype, ...] = ("bf16", "fp16")
RUNNING = {f"{name} {dtype}": (running(name, dtype), dtype) for name in PRESETS for dtype in DTYPED}
RUNNING |= {name: (row, "bf16") for name, row in ROWS_BESIDE.items() if row.input is not None}


@pytest.mark.parametrize(("row", "dtype"), RUNNING.values(), ids=RUNNING)
def test_the_native_format_reads_what_dense_cannot_leave_to_weights(row: LayerPlan, dtype: Dtype) -> None:
    """As numbers: which codes they came from is not in the file."""
    weights = LayerPlan(weight=row.weight)
    plan = plan_of({"a.q": row, "a.k": weights, "lm_head": None}, dtype)
    dense, layer = Dense(), layer_of(row, dtype)
    dense.check(plan, dict.fromkeys(plan.linears, (ROWS, COLUMNS)), {})
    read = Native().parse(json.loads(json.dumps(dense.config(plan))), list(plan.linears))
    assert read.model_copy(update={"linears": plan.linears}) == plan
    assert (read.linears["a.k"], read.linears["lm_head"]) == (LayerPlan(), LayerPlan())
    stored = read.linears["a.q"]
    assert stored.model_copy(update={"weight": row.weight}) == row
    tensors, expected = dense.encode(layer, row, dtype), bits_of(dequantize(layer.weight, DTYPES[dtype]))
    decoded = Native().decode(tensors, stored, (ROWS, COLUMNS))
    assert bits_of(dequantize(decoded.weight, DTYPES[dtype])) == expected
    assert facts(decoded.input) == facts(dense.decode_input(tensors, row)) == facts(layer.input)
    alone = dense.encode(layer_of(weights, dtype), weights, dtype)
    assert {name: bits_of(tensor) for name, tensor in alone.items()} == {"weight": expected}


@pytest.mark.parametrize("row", ROWS_BESIDE.values(), ids=ROWS_BESIDE)
@pytest.mark.parametrize("format", WIDE.values(), ids=WIDE)
def test_rows_without_a_name_come_back(format: Format, row: LayerPlan) -> None:
    plan = plan_of({"a.q": row, "a.k": SCHEMES["W4A16"], "lm_head": None})
    format.check(plan, dict.fromkeys(plan.linears, (ROWS, COLUMNS)), {})
    comes_back(format, plan)
    codes_come_back(format, row, "bf16")


@pytest.mark.parametrize("format", WIDE.values(), ids=WIDE)
def test_mixed_plans_come_back_in_order(format: Format) -> None:
    names = ("W4A16", "W4A4G128", "NVFP4A16", "NVFP4", "FP8_BLOCK", "W4A16", "MXFP4", "MXFP8A16", "W8A8", "W8A8_STATIC")
    rows = [row_named(name, "bf16") for name in names]
    comes_back(
        format, plan_of({f"layers.{index}.o": row for index, row in enumerate(rows)} | {"layers.1.down": None, "lm_head": None})
    )


@pytest.mark.parametrize("format", WIDE.values(), ids=WIDE)
def test_rotations_come_back(format: Format) -> None:
    row, kept = row_named("W4A4", "bf16"), LayerPlan()
    whole, blocks = Rotation(space="mid", block=512, kind="hadamard"), Rotation(space="mid", block=32, kind="hadamard")
    residual = Rotation(space="residual", block=256, kind="hadamard")
    for rows in (
        {"0.q": row, "0.down": row.model_copy(update={"online": whole}), "1.down": row.model_copy(update={"online": whole})},
        {"0.q": row.model_copy(update={"online": residual}), "0.down": row.model_copy(update={"online": blocks}), "1.q": kept},
        {
            "0.down": row.model_copy(update={"online": whole}),
            "1.down": row.model_copy(update={"online": blocks}),
            "lm_head": kept,
        },
        {"0.q": row, "0.down": kept.model_copy(update={"online": blocks})},
    ):
        plan = plan_of(rows)
        format.check(plan, dict.fromkeys(plan.linears, (ROWS, 512)), {})
        comes_back(format, plan)
    folded = (Rotation(space="residual", block=128, seed=7), Rotation(space="value", block=64))
    plan = plan_of({"0.q": row, "0.down": row.model_copy(update={"online": whole})})
    plan = plan.model_copy(update={"rotations": (*folded, *plan.rotations), "untied": True})
    format.check(plan, dict.fromkeys(plan.linears, (ROWS, 512)), {})
    comes_back(format, plan)


@pytest.mark.parametrize("format", WIDE.values(), ids=WIDE)
def test_other_programs_keys_are_passed_over(format: Format) -> None:
    plan = plan_of({"a": SCHEMES["W4A16"], "lm_head": None})
    stored = format.config(plan)
    assert stored is not None
    assert (
        format.parse(stored | {"version": "0.20.0", "sparsity_config": {}, "transform_config": {}}, list(plan.linears)) == plan
    )


def test_native_says_every_plan_by_the_least_version() -> None:
    native, weights = Native(), plan_of({"a": SCHEMES["W4A16"], "b": None})
    assert native.config(weights)["format_version"] == 1
    for name in LLAMA_CPP:
        assert native.config(plan_of({"a": SCHEMES[name], "b": row_named("W4A4", "bf16")}))["format_version"] == 3
    assert set(native.config(weights)) == {"quant_method", "format_version", "dtype", "groups", "kept", "rotations"}
    row = row_named("W4A4", "bf16")
    rotations = (Rotation(space="residual", block=32, seed=3), Rotation(space="qk", block=64), Rotation(space="mid", block=48))
    for plan in (
        weights.model_copy(update={"rotations": rotations}),
        weights.model_copy(update={"kv": KV_SCHEMES["KV4"]}),
        weights.model_copy(update={"untied": True}),
        plan_of({"a": row, "b": None}),
        plan_of({"a": row.model_copy(update={"clip": 0.9}), "b": row}),
        plan_of({"a": row.model_copy(update={"online": rotations[2]}), "b": LayerPlan(online=TURNED)}),
        plan_of({"a": LayerPlan(input=row.input), "b": None}),
    ):
        assert native.config(plan)["format_version"] == 2
        comes_back(native, plan)
