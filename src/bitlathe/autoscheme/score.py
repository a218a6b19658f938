"""What every option of every linear is predicted to lose, from one pass forward and one back.

The KL divergence of a model whose weights and activations are slightly off is, to second order, half the squared change of its
logits in the metric of its own predictions (its Fisher information): sampling each token's label from the model and taking
gradients gives that metric without a Hessian. With g_t the gradient by a linear's output, x_t its input, T tokens:

    weights       1/2T sum_ij F_ij dW_ij^2,             F_ij = sum_t g_ti^2 x_tj^2
    activations   1/2T sum_ti g_ti^2 ((q(x_t) - x_t) W^T)_i^2

F is made once for all options of the weights, by one matrix product. Rounding errors of different weights are taken for
independent, which is why the diagonal serves. What dW is comes from the codes that would be written: rounded to nearest on the
searched range. (The diagonal: Optimal Brain Damage, LeCun et al., 1990.)
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite

import torch
from torch import Tensor

from bitlathe.autoscheme.ground import Ground, Listen
from bitlathe.autoscheme.kept import Kept, Score
from bitlathe.errors import CheckpointError
from bitlathe.io.writer import require_room
from bitlathe.model.block import Block
from bitlathe.model.edit import coded
from bitlathe.model.fisher import from_labels
from bitlathe.model.hidden import Budget, Hidden
from bitlathe.model.moments import Moments
from bitlathe.model.static import static_scales
from bitlathe.model.walk import Tape, begin, record, walk_back
from bitlathe.numerics.activation import StaticScale, fake_quantize_input
from bitlathe.numerics.project import dequantize, fake_quantize, search
from bitlathe.plan import LayerPlan

HEAD, TABLE = "head", "embeddings"
# What stands for the option of a linear that is quantized but not in play.
FIXED = "fixed"


def score(ground: Ground, kept: Kept, listen: Listen) -> None:
    """Score every option of the linears in play that `kept` has no scores of, and keep them there.

    At most two blocks of weights are in memory, and the hidden states that each block receives under the budget. A search that
    was killed goes through the model again, and scores only what is left.
    """
    left = _left(ground, kept)
    if not left:
        return
    weights, depth = ground.scored, ground.skeleton.depth
    stream = ground.tokens.numel() * ground.skeleton.model.config.hidden_size * weights.dtype.itemsize
    # What each block is given, what the last one makes, and a gradient.
    require_room(kept.work, (depth + 2) * stream - ground.memory)
    budget = Budget(ground.memory, kept.work)
    start = begin(ground.skeleton, weights, ground.tokens, budget, streams=1)
    listen("forward", 0, depth)
    inputs = record(ground.skeleton, weights, start, budget, batch_size=ground.batch_size)
    (last,) = start.streams
    gradient = budget.allocate(last.shape, weights.dtype, weights.device)
    listen("forward", depth, depth)
    table = _Table(ground) if TABLE in left else None
    _from_head(ground, kept, last, gradient, scored=HEAD in left, table=table)
    seen: dict[str, _Seen] = {}

    def watch(block: Block) -> _Seen | None:
        part = part_of(block.index)
        if part in left:
            seen[part] = _Seen(ground, block, inputs[block.index])
        return seen.get(part)

    tape = Tape(start.calls, inputs, gradient)
    for block in walk_back(ground.skeleton, weights, tape, batch_size=ground.batch_size, watch=watch):
        part = part_of(block.index)
        if part in seen:
            kept.put(part, *seen.pop(part).found())
        listen("score", depth - block.index, depth)
        del block  # before the next one comes
    if table is not None:
        kept.put(TABLE, table.found(gradient), {})


def _left(ground: Ground, kept: Kept) -> set[str]:
    """The parts of the model that have linears or options without a score."""
    parts = {name: part_of(index) for index, name in enumerate(ground.skeleton.blocks)}
    wanted: dict[str, dict[str, Iterable[str]]] = {part: {} for part in (*parts.values(), HEAD)}
    for name, rows in ground.space.rows.items():
        if name == ground.skeleton.arch.embed:
            wanted[TABLE] = {name: rows}
            continue
        path = name.split(".")
        above = (".".join(path[:end]) for end in range(len(path)))
        wanted[next((parts[module] for module in above if module in parts), HEAD)][name] = rows
    return {part for part, linears in wanted.items() if not kept.has(part, linears)}


def part_of(index: int) -> str:
    """What a block is called in what is kept."""
    return f"block-{index:04d}"


def _from_head(ground: Ground, kept: Kept, last: Hidden, gradient: Hidden, *, scored: bool, table: _Table | None) -> None:
    """Put the gradient by the last hidden states into `gradient`; with `scored`, score the head; tell `table` of it."""
    head = ground.skeleton.head(ground.scored)
    seen = _Seen(ground, head, last) if scored else None

    def see(name: str, x: Tensor, y: Tensor) -> None:
        for one in (seen, table):
            if one is not None:
                one(name, x, y)

    from_labels(head, last, gradient, seed=ground.seed, see=see)
    if seen is not None:
        kept.put(HEAD, *seen.found())


class _Seen:
    """What is seen of a block's linears in play, and the scores that follow from it."""

    def __init__(self, ground: Ground, block: Block, inputs: Hidden) -> None:
        self.ground, self.block, self.rows = ground, block, ground.space.rows
        self.names = [name for name in block.linears if name in self.rows]
        self.tokens = ground.tokens.numel()
        self.moments = Moments()
        self.fixed = self._fixed(inputs)
        self.fisher: dict[str, Tensor] = {}
        self.lost: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def __call__(self, name: str, x: Tensor, gradient: Tensor) -> None:
        """Take in what the linear `name` reads [..., inputs] and the gradient by what it makes [..., outputs]."""
        if not x.numel() or not self.ground.space.rounds(name):
            return
        self.moments.see(name, x)
        if name not in self.rows:
            return
        squares = gradient.square().flatten(0, -2)
        fisher = (squares.T @ x.square().flatten(0, -2)).float()
        self.fisher[name] = self.fisher[name] + fisher if name in self.fisher else fisher
        weight = self.block.linear(name).weight
        same: dict[LayerPlan, Tensor] = {}
        for option, row in self.rows[name].items():
            if row.input is None:
                continue
            key = row.model_copy(update={"weight": None})
            if key not in same:
                error = fake_quantize_input(x, row.input, clip=row.clip, fixed=self.fixed.get((name, option))) - x
                changed = torch.nn.functional.linear(error, weight).flatten(0, -2)
                same[key] = (squares * changed.square()).sum(dtype=torch.float32)
            self.lost[name, option] = self.lost.get((name, option), 0) + same[key]

    def found(self) -> tuple[dict[str, dict[str, Score]], dict[str, Tensor]]:
        """Linear -> option -> score, and what the codes of every option follow from."""
        peaks = self.block.peaks(self.names)
        scores = {name: self._scores(name, peaks[name]) for name in self.names}
        tensors = {}
        for name in self.block.linears:
            mean = self.moments.mean(name)
            if mean is not None:
                tensors[f"{name}|moments"] = mean
        for (name, option), fixed in self.fixed.items():
            tensors[f"{name}|{option}|scale"] = fixed.scale
            if fixed.zero is not None:
                tensors[f"{name}|{option}|zero"] = fixed.zero
        return scores, tensors

    @torch.no_grad()
    def _scores(self, name: str, peak: Tensor) -> dict[str, Score]:
        weight, importance, fisher = self.block.weight(name), self.moments.mean(name), self.fisher.get(name)
        scores = {}
        for option, row in self.rows[name].items():
            loss = 0.0
            if row.weight is not None and fisher is not None:
                learned = search(weight, row.weight, importance, peak=peak)
                error = fake_quantize(weight, row.weight, learned, peak=peak, dtype=self.ground.dtype).float() - weight.float()
                loss = (fisher * error.square_()).sum(dtype=torch.float64).item()
            lost = self.lost.get((name, option))
            inputs = 0.0 if lost is None else 0.5 * lost.item() / self.tokens
            scores[option] = _finite(name, Score(weights=0.5 * loss / self.tokens, inputs=inputs))
        return scores

    def _fixed(self, inputs: Hidden) -> dict[tuple[str, str], StaticScale]:
        """Linear and option -> the static scale of its inputs, measured on the text."""
        space, linears = self.ground.space, self.block.linears
        rows = {option: {n: self.rows[n][option] for n in self.names if option in self.rows[n]} for option in space.options}
        rows[FIXED] = {name: space.plan.linears[name] for name in linears if name not in self.rows}
        fixed = {}
        for option, own in rows.items():
            plan = space.plan.model_copy(update={"linears": dict.fromkeys(linears, LayerPlan()) | own})
            found = static_scales(self.block, plan, inputs, batch_size=self.ground.batch_size)
            fixed |= {(name, option): scale for name, scale in found.items()}
        return fixed


def _finite(name: str, found: Score) -> Score:
    if not isfinite(found.loss):
        raise CheckpointError(
            f"what {name} reads of the calibration text, or the gradient there, is infinite or NaN, so nothing can be said of "
            "it. The checkpoint is damaged, or its numbers overflow: download it again, or try --dtype bf16"
        )
    return found


class _Table:
    """What is seen of the embeddings, and of a head that shares their weight, and the scores that follow from it.

    A token reads one row: with g_t the gradient by what the first block is given, F_vj = sum of g_tj^2 over the tokens that are
    v, times the square of what a family multiplies its embeddings by; and the head's F in addition.
    """

    def __init__(self, ground: Ground) -> None:
        self.ground, self.name = ground, ground.skeleton.arch.embed
        weight = f"{self.name}.weight"
        self.weight = ground.scored.read([weight])[weight]
        self.fisher = torch.zeros(self.weight.shape, device=self.weight.device)
        self.shared = bool(ground.skeleton.tied)

    @torch.no_grad()
    def __call__(self, _name: str, x: Tensor, gradient: Tensor) -> None:
        """Take in what the head reads [1, tokens, width] and the gradient by what it makes [1, tokens, vocabulary]."""
        if self.shared:
            self.fisher += gradient.square().flatten(0, -2).T @ x.square().flatten(0, -2)

    @torch.no_grad()
    def found(self, gradient: Hidden) -> dict[str, dict[str, Score]]:
        """The scores. gradient: by the hidden states before the first block."""
        tokens = self.ground.tokens
        scale = self._scale()
        for window in range(len(tokens)):
            squares = gradient[window : window + 1][0].float().square() * scale**2
            self.fisher.index_add_(0, tokens[window].to(squares.device), squares)
        scores = {}
        for option, row in self.ground.space.rows[self.name].items():
            loss = 0.0
            if row.weight is not None:
                error = dequantize(coded(self.weight, row.weight), self.ground.dtype).float() - self.weight.float()
                loss = 0.5 * (self.fisher * error.square_()).sum(dtype=torch.float64).item() / tokens.numel()
            scores[option] = _finite(self.name, Score(weights=loss, inputs=0.0))
        return {self.name: scores}

    def _scale(self) -> float:
        """What embeddings are multiplied by on their way into the model."""
        front = self.ground.skeleton.front(self.ground.scored)
        window = self.ground.tokens[:1].to(self.weight.device)
        embedded, own = front.embed(window)[0].double(), self.weight[window].double()
        return ((embedded * own).sum() / own.square().sum()).item()
