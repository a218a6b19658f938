"""What a search may choose from: groups of linears, the options each of them has, and what those take in the file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod

from bitlathe.autoscheme.allocate import allocate
from bitlathe.errors import PlanError
from bitlathe.formats.base import Format
from bitlathe.plan import KEEP, LayerPlan, Plan

# Group -> option.
Choice = Mapping[str, str]

_KEPT_BITS = 16


@dataclass(frozen=True)
class Space:
    """The choices of a search.

    plan: what holds whatever is chosen; the linears in play have some option there. groups: label -> the linears that get one
    option. rows: linear in play -> option -> its row of the plan, options that do not fit left out. sizes: group -> option ->
    bits that its weights take in the file. shapes: linear -> (outputs, inputs). table: the embeddings, which have a row of the
    plan only where they are quantized.
    """

    plan: Plan
    groups: Mapping[str, tuple[str, ...]]
    rows: Mapping[str, Mapping[str, LayerPlan]]
    sizes: Mapping[str, Mapping[str, int]]
    shapes: Mapping[str, tuple[int, int]]
    table: str = ""

    @cached_property
    def weights(self) -> int:
        """How many weights are in play."""
        return sum(prod(self.shapes[name]) for name in self.rows)

    @property
    def options(self) -> list[str]:
        """Every option that some group has, in the order in which they were asked for."""
        return list(dict.fromkeys(option for rows in self.rows.values() for option in rows))

    @property
    def ends(self) -> tuple[int, int]:
        """Bits in all of the smallest and of the largest choice."""
        least, most = (sum(end(sizes.values()) for sizes in self.sizes.values()) for end in (min, max))
        return least, most

    @property
    def uniform(self) -> dict[str, Choice]:
        """Option -> the choice of it for every group, for those that all groups have."""
        return {
            option: dict.fromkeys(self.groups, option)
            for option in self.options
            if all(option in sizes for sizes in self.sizes.values())
        }

    def rounds(self, linear: str) -> bool:
        """Whether a choice may quantize a linear."""
        return linear in self.rows or linear in self.plan.quantized

    def budget(self, bits: float) -> int:
        """The bits that may be taken in all for so many a weight."""
        return int(bits * self.weights)

    def size(self, choice: Choice) -> int:
        """The bits that a choice takes in all."""
        return sum(self.sizes[group][option] for group, option in choice.items())

    def bits(self, choice: Choice) -> float:
        """Average bits a weight in play, as the file holds them."""
        return self.size(choice) / self.weights

    def linears(self, choice: Choice) -> dict[str, str]:
        """Linear in play -> the option that a choice gives it."""
        chosen = {name: choice[group] for group, names in self.groups.items() for name in names}
        return {name: chosen[name] for name in self.rows}

    def full(self, bits: float) -> Choice:
        """A choice that takes about as much as it may, not looking at the model: every bit is worth a factor of four."""
        numbers = {group: sum(prod(self.shapes[name]) for name in names) for group, names in self.groups.items()}
        losses = {
            group: {option: numbers[group] * 4.0 ** (-size / numbers[group]) for option, size in sizes.items()}
            for group, sizes in self.sizes.items()
        }
        return allocate(losses, self.sizes, self.budget(bits))

    def key(self, choice: Choice) -> str:
        """A hash of which linear gets what."""
        return hashlib.sha256(json.dumps(self.linears(choice)).encode()).hexdigest()

    def reseeded(self, by: int) -> Space:
        """The same with other random signs in the rotations: see `Plan.reseeded`."""
        rows = {name: {option: row.reseeded(by) for option, row in options.items()} for name, options in self.rows.items()}
        return replace(self, plan=self.plan.reseeded(by), rows=rows)

    def facts(self) -> dict[str, str]:
        """What the numbers of every option depend on beside its name, its linear and the activations' range: rotations, dtypes,
        and what is quantized whatever is chosen."""
        fixed = {name: row for name, row in self.plan.linears.items() if name not in self.rows and row.weight is not None}
        return {"plan": self.plan.model_copy(update={"linears": fixed}).model_dump_json()}

    def alone(self, option: str) -> Plan:
        """The plan of an option for every group that has it; the others are kept."""
        return self._with({name: options.get(option, LayerPlan()) for name, options in self.rows.items()})

    @property
    def nothing(self) -> Plan:
        """The plan in which all that is in play is kept."""
        return self._with(dict.fromkeys(self.rows, LayerPlan()))

    def planned(self, choice: Choice) -> Plan:
        """The plan of a choice."""
        return self._with({name: self.rows[name][option] for name, option in self.linears(choice).items()})

    def _with(self, rows: Mapping[str, LayerPlan]) -> Plan:
        linears = {**self.plan.linears, **rows}
        if self.table in rows and rows[self.table].weight is None:
            del linears[self.table]
        return self.plan.model_copy(update={"linears": linears})


def space_of(
    plans: Mapping[str, Plan],
    names: Iterable[str],
    *,
    shapes: Mapping[str, tuple[int, int]],
    fused: Mapping[str, str],
    together: Iterable[tuple[str, ...]],
    formats: Iterable[Format],
) -> Space:
    """The space of the linears `names`.

    plans: option -> the plan in which every linear in play has it. fused: linear -> label of the group that is served as one.
    together: further groups, each some globs over full names; groups that such a glob touches become one. formats: what will be
    written; the size of an option is that in the file of the format that takes most.

    Raises PlanError for a glob that matches nothing, and for a group without an option whose blocks divide its inputs.
    """
    names = list(names)
    groups = _groups(names, fused, together)
    fitting = {name: {option: plan.linears[name] for option, plan in plans.items()} for name in names}
    fitting = {name: {o: row for o, row in rows.items() if row.fits(shapes[name])} for name, rows in fitting.items()}
    formats = list(formats)
    rows: dict[str, dict[str, LayerPlan]] = {}
    sizes: dict[str, dict[str, int]] = {}
    for group, members in groups.items():
        options = [option for option in plans if all(option in fitting[name] for name in members)]
        if not options:
            raise PlanError(
                f"none of the schemes {', '.join(plans)} fits {members[0]} ({shapes[members[0]][1]} inputs): their blocks do "
                "not divide its inputs. Add one that does to --schemes, such as one with smaller groups or _CHANNEL, or keep "
                f"it with --override {members[0]}={KEEP}"
            )
        rows |= {name: {option: fitting[name][option] for option in options} for name in members}
        sizes[group] = {option: sum(_size(rows[name][option], shapes[name], formats) for name in members) for option in options}
    first = {name: next(iter(rows[name].values())) for name in names}
    plan = next(iter(plans.values()))
    plan = plan.model_copy(update={"linears": {**plan.linears, **first}})
    return Space(plan, groups, {name: rows[name] for name in names}, sizes, shapes)


def _size(row: LayerPlan, shape: tuple[int, int], formats: Iterable[Format]) -> int:
    if row.weight is None:
        return _KEPT_BITS * prod(shape)
    return max(format.bits(row, shape) for format in formats)


def _groups(names: list[str], fused: Mapping[str, str], together: Iterable[tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    label = {name: fused.get(name, name) for name in names}
    for globs in together:
        found = set()
        for glob in globs:
            matched = [name for name in names if fnmatchcase(name, glob)]
            if not matched:
                raise PlanError(
                    f"the group glob {glob!r} matches none of the {len(names)} linears that the search chooses for. Names look "
                    f"like {names[0]!r}; a glob must match the whole name, so begin with * to match an ending"
                )
            found |= {label[name] for name in matched}
        label = {name: ",".join(globs) if own in found else own for name, own in label.items()}
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(label[name], []).append(name)
    return {name: tuple(members) for name, members in groups.items()}
