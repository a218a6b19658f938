"""quantize: recipe -> plan -> codes -> bytes, and nothing back."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

from torch import Tensor

from bitlathe.errors import CheckpointError, PlanError
from bitlathe.formats import FORMATS
from bitlathe.formats.base import Format, QuantLayer
from bitlathe.io.writer import Writer
from bitlathe.model.block import Block
from bitlathe.model.edit import coded
from bitlathe.model.hidden import Budget
from bitlathe.model.static import static_scales
from bitlathe.model.walk import Start, Step, walk
from bitlathe.plan import KEEP, Plan
from bitlathe.plan_file import fields_of, read_plan, refuse_both
from bitlathe.prepare import CODES, Prepared, prepare
from bitlathe.recipe import Recipe, merge
from bitlathe.registry import resolve as named
from bitlathe.report import BlockReport, Listener, Note, Searching, peak_memory
from bitlathe.report import Step as Progress
from bitlathe.result import finish, plan_of_finished
from bitlathe.searching import mix, record_of
from bitlathe.starting import best_signs, best_smoothing, refuse_infinite, smooths, start_on
from bitlathe.tune.base import Tuned
from bitlathe.tune.end_to_end import Quantized, changed, end_to_end, rescaled
from bitlathe.tune.rtn import Rtn

# What the run notes of what it smooths, of the draw that it keeps, of the search, and of scales that were tuned at the end.
_SMOOTHING, _SIGNS, _MIX, _SCALES = "smoothing", "signs", "mix", "scales"


def quantize(
    model: str,
    *,
    out: Path | str,
    plan: Plan | Path | str | None = None,
    restart: bool = False,
    listen: Listener | None = None,
    **fields: Any,
) -> Plan:
    """Quantize a model into `out` and return the plan that was carried out.

    model: a folder or a Hub id. fields: any other field of `Recipe`, such as scheme="W4A16" (what every linear gets) or
    bits=4.5 (a search chooses). plan: instead of those two, what `search` returned, or the file of a plan. restart: throw away
    what an earlier run left in `out`, finished or not. listen: called with every event of `bitlathe.report`. A run that was
    interrupted continues when called again.
    Raises a BitlatheError before any weight is read when something asked for cannot be done.
    """
    given = plan if isinstance(plan, Plan) else None
    said = fields_of(given) if given is not None else {} if plan is None else read_plan(str(plan))
    refuse_both(said, fields)
    recipe = merge(said, {"model": model, "out": out, **fields})
    return run(recipe, restart=restart, listen=listen or (lambda event: None), given=given)


def run(recipe: Recipe, *, restart: bool, listen: Listener, given: Plan | None = None) -> Plan:
    """Carry out a recipe. given: the plan that it was made from."""
    began = time.perf_counter()
    ready = prepare(recipe)
    if given is not None and given != ready.plan:
        raise PlanError(
            "the plan was changed in a way that names of schemes and fields of a recipe cannot say, so it would not be carried "
            "out as it is. Write what you want with scheme, overrides, rotate and the other fields of a recipe"
        )
    for note in ready.notes:
        listen(Note(note))
    depth = ready.skeleton.depth
    with Writer(
        recipe.out,
        streams=ready.streams,
        shards=depth + 1,
        fingerprint=ready.fingerprint(),
        room=ready.bytes_needed(),
        restart=restart,
    ) as writer:
        if writer.finished:
            listen(Note(f"{recipe.out} already holds this very result: nothing was done"))
            return plan_of_finished(ready)
        # As if the run had never been interrupted: what is told of time counts the runs before this one.
        began -= max((record["elapsed"] for record in writer.done.values()), default=0.0)
        try:
            ready = _with_signs(_with_smoothing(ready, writer, listen), writer, listen)
            ready = _with_mix(ready, writer, listen)
            _every_turn(ready, writer, listen, began=began)
            ready = _end_to_end(ready, writer, listen)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} ({len(writer.done)} of {depth + 1} parts of the result are finished and safe: the same command "
                "continues)"
            ) from error
        finish(ready, writer, seconds=time.perf_counter() - began)
    return ready.plan


def _with_smoothing(ready: Prepared, writer: Writer, listen: Listener) -> Prepared:
    """The same with channels smoothed, if the recipe wants it and text is read. Written down like the signs."""
    if not smooths(ready):
        return ready
    if _SMOOTHING not in writer.decided:
        factors, told = best_smoothing(ready, writer.work, listen)
        writer.keep(_SMOOTHING, factors)
        writer.decide(_SMOOTHING, told)
    told = writer.decided[_SMOOTHING]
    listen(Note(told))
    return replace(ready.smoothed(writer.kept(_SMOOTHING)), notes=(*ready.notes, told))


def _with_signs(ready: Prepared, writer: Writer, listen: Listener) -> Prepared:
    """The same with the random signs that are kept, of the draws that the recipe asks for.

    They are chosen once in a run and then written down: two draws may be so near to each other that a run which is continued,
    on other threads say, would choose the other one.
    """
    if ready.recipe.rotation_trials == 1:
        return ready
    if _SIGNS not in writer.decided:
        writer.decide(_SIGNS, best_signs(ready, writer.work, listen))
    draw, told = writer.decided[_SIGNS]["draw"], writer.decided[_SIGNS]["told"]
    listen(Note(told))
    return replace(ready.reseeded(draw), notes=(*ready.notes, told))


def _with_mix(ready: Prepared, writer: Writer, listen: Listener) -> Prepared:
    """The same with the plan that a search chooses, where the recipe asks for one. Written down like the signs."""
    if ready.space is None or ready.recipe.bits is None:
        return ready
    if _MIX not in writer.decided:
        writer.decide(_MIX, record_of(mix(ready, [ready.recipe.bits], listen), ready))
    found = writer.decided[_MIX]
    listen(Note(found["told"]))
    plan = ready.space.planned(found["choice"])
    kept = {name: "the search keeps it" for name, option in found["linears"].items() if option == KEEP}
    return replace(ready.planned(plan), kept=ready.kept | kept, notes=(*ready.notes, found["told"]), found=found)


def _every_turn(ready: Prepared, writer: Writer, listen: Listener, *, began: float) -> None:
    start = _start(ready, writer, listen)
    for step in walk(ready.skeleton, ready.weights, start, batch_size=ready.recipe.batch_size):
        listen(_turn(ready, writer, step, listen, began=began))
    tail = start.streams[0] if start.streams else None
    listen(_turn(ready, writer, Step(ready.skeleton.head(ready.weights), tail, None), listen, began=began))


def _end_to_end(ready: Prepared, writer: Writer, listen: Listener) -> Prepared:
    """Tune the scales of what has been written on the whole model, where the tuner asks for it, and write them again.

    What they become is noted first: a run that is killed while it writes writes the same again.
    """
    if not ready.tuner.end_to_end or ready.tokens is None:
        return ready
    if _SCALES not in writer.decided:
        scales, told = _tuned_scales(ready, writer, ready.tokens, listen)
        writer.keep(_SCALES, scales)
        writer.decide(_SCALES, told)
    scales, told = writer.kept(_SCALES), writer.decided[_SCALES]
    listen(Note(told))
    for index in range(ready.skeleton.depth) if scales else ():
        layers = rescaled(_layers_of_block(ready, writer, index), scales)
        writer.put(index, _streams(ready, _kept_tensors(ready, index, layers), layers), writer.done[index])
    return replace(ready, notes=(*ready.notes, told))


def _tuned_scales(ready: Prepared, writer: Writer, tokens: Tensor, listen: Listener) -> tuple[dict[str, Tensor], str]:
    """Linear -> its scales as a file holds them; and what to say of them."""
    recipe = ready.recipe
    budget = Budget(recipe.memory.activations, writer.work)

    def layers_of(block: Block) -> dict[str, QuantLayer]:
        return _stored_layers(ready, writer, block.index, block.linears)

    model = Quantized(ready.skeleton, ready.weights, ready.plan, layers_of, budget, recipe.batch_size)
    multiples, before, after = end_to_end(
        model,
        tokens,
        steps=ready.tuner.end_to_end,
        held=recipe.closed_form.held_out,
        seed=recipe.seed,
        listen=lambda done, of: listen(Searching("scales", done, of)),
    )
    if not multiples:
        return {}, "end to end, no change of the scales is better on text that nothing was learned from: they stay"
    told = f"end to end, tuned scales bring the KL divergence on held-out text from {before:.4g} to {after:.4g}"
    scales: dict[str, Tensor] = {}
    for index in range(ready.skeleton.depth):
        scales |= changed(_layers_of_block(ready, writer, index), multiples)
    return {name: scale.cpu() for name, scale in scales.items()}, told


def _start(ready: Prepared, writer: Writer, listen: Listener) -> Start:
    if ready.tokens is None or not ready.text_streams:
        return Start([], ())
    # What was tuned before an interruption is not tuned again, and asks for none.
    needs = replace(ready.tuner.needs, streams=ready.text_streams)
    if len(writer.done) >= ready.skeleton.depth:
        needs = replace(needs, gradients=0)
    return start_on(ready, writer.work, ready.tokens, needs, listen)


def _turn(ready: Prepared, writer: Writer, step: Step, listen: Listener, *, began: float) -> BlockReport:
    """One block's turn: its codes from the journal or from the tuner, into the block and onto the disk."""
    block, depth = step.block, ready.skeleton.depth
    if block.index in writer.done:
        layers = _stored_layers(ready, writer, block.index, block.linears)
        block.quantize_inputs(ready.plan, {name: layer.input for name, layer in layers.items()})
        block.freeze(layers)
        return BlockReport(**{**writer.done[block.index], "resumed": True})
    started = time.perf_counter()
    schemes = {name: scheme for name, scheme in ready.plan.quantized.items() if name in block.linears}
    kept = _kept_tensors(ready, block.index, schemes)
    refuse_infinite(kept, ready.plan.dtype)
    fixed = static_scales(block, ready.plan, step.inputs, batch_size=ready.recipe.batch_size)
    block.quantize_inputs(ready.plan, fixed)
    tuned = _tune(ready, step, schemes, listen)
    layers = {name: replace(layer, input=fixed.get(name)) for name, layer in tuned.layers.items()}
    written = layers | (_table(ready) if block.index == depth else {})
    note = _note(block.name or "head", tuned, ready.plan.dtype)
    if note is not None:
        listen(Note(note))
    block.freeze(layers)
    ram, vram = peak_memory(ready.weights.device)
    now = time.perf_counter()
    report = BlockReport(
        block=block.index,
        blocks=depth,
        name=block.name or "head",
        linears=len(written),
        loss_before=tuned.before,
        loss_after=tuned.after,
        seconds=now - started,
        peak_ram=ram,
        peak_vram=vram,
        elapsed=now - began,
        note=note,
    )
    writer.put(
        block.index,
        _streams(ready, kept, written),
        report.model_dump(),
    )
    return report


def _streams(ready: Prepared, kept: Mapping[str, Tensor], layers: Mapping[str, QuantLayer]) -> dict[str, dict[str, Tensor]]:
    """What goes into a shard of every format that is written."""
    return {stream: {**kept, **encoded(named(stream, FORMATS, "format")(), layers, ready.plan)} for stream in ready.streams}


def _tune(ready: Prepared, step: Step, schemes: Mapping[str, Any], listen: Listener) -> Tuned:
    if not schemes:
        return Tuned({})
    # Logits are too wide to descend on: the head is rounded to nearest, on the range its inputs ask for.
    at_head = step.block.index == ready.skeleton.depth
    tuner = Rtn(searched=ready.tuner.needs.streams > 0, batch_size=ready.recipe.batch_size) if at_head else ready.tuner

    def on_step(done: int, steps: int, loss: float) -> None:
        listen(Progress(step.block.index, ready.skeleton.depth, done, steps, loss))

    return tuner.tune(step, schemes, on_step)


def _kept_tensors(ready: Prepared, index: int, schemes: Mapping[str, Any]) -> dict[str, Tensor]:
    """What goes into a block's shard beside its codes; the head's shard takes everything outside of the blocks."""
    skeleton = ready.skeleton
    coded = {f"{name}.weight" for name in (*schemes, skeleton.arch.embed) if name in ready.plan.quantized}
    names = [name for name in skeleton.shard(index) if name not in coded]
    return {name: tensor.cpu() for name, tensor in ready.weights.as_held.read(names).items()}


def _table(ready: Prepared) -> dict[str, QuantLayer]:
    """The codes of the embeddings, where the plan quantizes them: those that the text was embedded with."""
    table = ready.skeleton.arch.embed
    if table not in ready.plan.quantized:
        return {}
    weight = f"{table}.weight"
    return {table: QuantLayer(coded(ready.weights.unrounded.read([weight])[weight], ready.plan.quantized[table]))}


def _note(name: str, tuned: Tuned, dtype: str) -> str | None:
    if tuned.after is None:
        return None
    if isfinite(tuned.after):
        told = [f"{name}: {tuned.fallen}"] if tuned.fallen else []
        return ". ".join([*told, *([_starved(name, tuned.starved)] if tuned.starved else [])]) or None
    wider = ". --dtype bf16 holds larger numbers than fp16" if dtype == "fp16" else ""
    return (
        f"{name}: for this calibration text its output is infinite or NaN, so nothing could be learned from it: its linears "
        f"are rounded to nearest{wider}"
    )


def _starved(name: str, linears: tuple[str, ...]) -> str:
    shown = ", ".join(linears[:3]) + (f" and {len(linears) - 3} more" if len(linears) > 3 else "")
    return (
        f"{name}: no token of the calibration text reached {shown}, so nothing could be learned for them and they are rounded "
        "to nearest. More text (--samples) reaches more experts"
    )


def encoded(format: Format, layers: Mapping[str, QuantLayer], plan: Plan) -> dict[str, Tensor]:
    """The tensors of linears in a format, by their full names."""
    return {
        f"{name}.{key}": tensor.cpu()
        for name, layer in layers.items()
        for key, tensor in format.encode(layer, plan.linears[name], plan.dtype).items()
    }


def _layers_of_block(ready: Prepared, writer: Writer, index: int) -> dict[str, QuantLayer]:
    within = f"{ready.skeleton.blocks[index]}."
    return _stored_layers(ready, writer, index, [name for name in ready.plan.quantized if name.startswith(within)])


def _stored_layers(ready: Prepared, writer: Writer, index: int, linears: Iterable[str]) -> dict[str, QuantLayer]:
    """The codes of those of `linears` that are quantized, from a finished shard."""
    tensors = writer.read(CODES, index)
    codes = named(CODES, FORMATS, "format")()
    layers = {}
    for name in linears:
        if name in ready.plan.quantized:
            own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
            own = {key: value.to(ready.weights.device) for key, value in own.items() if key != "bias"}
            layers[name] = codes.decode(own, ready.plan.linears[name], ready.skeleton.linears[name])
    return layers
