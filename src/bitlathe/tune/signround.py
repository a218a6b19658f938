"""SignRound: learn which way each weight is rounded, and each block's range, by the sign of the gradient.

Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs", arXiv:2309.05516. Offsets
start at 0 and ranges at 1; the step size falls linearly from `lr` to 0; the loss is the mean squared error of the block's
output on the inputs it will really receive against the original block's output on the original inputs. Tokens of extreme norm
are left out of it (see `counting`): a few of them would own the fit.

The original keeps the state with the lowest loss of one minibatch, which is luck as much as merit. Here a few sequences are
held out, and the state that is best on them is kept. `start="searched"` begins at the range that loses least where the inputs
are large, and lets it become up to twice as wide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from bitlathe.formats.base import QuantLayer
from bitlathe.model.block import Block
from bitlathe.model.hidden import Hidden
from bitlathe.model.layers import TunedLinear
from bitlathe.model.moments import counting, moments_of
from bitlathe.model.walk import Step
from bitlathe.numerics.project import Learned, quantize, search
from bitlathe.numerics.scheme import Scheme
from bitlathe.tune.base import Listen, Needs, Tuned, block_error, draws, held_out
from bitlathe.tune.options import SignRoundOptions, TuneOptions

# Only the sign of a gradient is used. The factor of a mean, one over millions, would put it below what fp16 holds; with none,
# sums over tokens could go beyond.
_FACTOR = 2.0**-6
# How much wider than the searched one a range may become.
_WIDER = 2.0


class SignRound:
    """Signed gradient descent on rounding offsets and ranges: `iters` steps of `batch_size` sequences for each block."""

    needs, end_to_end = Needs(streams=2), 0

    def __init__(self, *, iters: int, batch_size: int, seed: int, options: SignRoundOptions) -> None:
        self.iters, self.batch_size, self.seed, self.options = iters, batch_size, seed, options

    @classmethod
    def of(cls, options: TuneOptions) -> SignRound:
        """The tuner that a recipe's options ask for."""
        return cls(iters=options.iters, batch_size=options.batch_size, seed=options.seed, options=options.signround)

    def tune(self, step: Step, schemes: Mapping[str, Scheme], listen: Listen) -> Tuned:
        """See `Tuner.tune`."""
        block, inputs, targets = step.block, step.inputs, step.targets
        assert inputs is not None and targets is not None
        peaks = block.peaks(schemes)
        weights = {name: block.weight(name) for name in schemes}
        starts = self._starts(block, inputs, schemes, peaks)
        most = _WIDER if self.options.start == "searched" else 1.0
        tuned = {
            name: TunedLinear(block.linear(name), scheme, starts[name], peak=peaks[name], dtype=block.held, most=most)
            for name, scheme in schemes.items()
        }
        block.swap(tuned)
        before, after, reached = self._descend(block, list(tuned.values()), inputs, targets, listen)
        layers = {
            name: QuantLayer(quantize(weights[name], scheme, tuned[name].learned, peak=peaks[name]))
            for name, scheme in schemes.items()
        }
        starved = tuple(name for name, linear in tuned.items() if self.iters and linear.offset not in reached)
        return Tuned(layers, before, after, starved)

    def _starts(
        self, block: Block, inputs: Hidden, schemes: Mapping[str, Scheme], peaks: Mapping[str, Tensor]
    ) -> dict[str, Learned]:
        """Where the descent starts, linear by linear."""
        starts = {name: start_of(block.weight(name), scheme) for name, scheme in schemes.items()}
        if self.options.start == "plain":
            return starts
        moments = moments_of(block, inputs, schemes, batch_size=self.batch_size)
        for name, plain in starts.items():
            if plain.high is not None:
                found = search(block.weight(name), schemes[name], moments.mean(name), peak=peaks[name])
                starts[name] = replace(plain, low=found.low, high=found.high)
        return starts

    def _descend(
        self, block: Block, tuned: list[TunedLinear], inputs: Hidden, targets: Hidden, listen: Listen
    ) -> tuple[float, float, set[Tensor]]:
        """Leave the best state in `tuned`; the error of the state it started from and its own, on the held-out sequences; and
        the parameters that were reached, which those of an expert are only by tokens that chose it."""
        aside = held_out(len(inputs), self.options.held_out)
        # Where too little is left to hold anything out, the first sequence serves for both.
        held = inputs.batches(self.batch_size, first=max(aside, 1))
        batches = draws(aside, len(inputs), self.batch_size, seed=self.seed * 1_000_003 + block.index)
        bounded = [row for linear in tuned for row in linear.bounded()]
        parameters = [parameter for parameter, _, _ in bounded]
        forward = torch.compile(block) if self.options.compile else block
        lr = self.options.lr or 1.0 / max(self.iters, 1)
        best = before = block_error(block, inputs, targets, batches=held)
        state = [parameter.detach().clone() for parameter in parameters]
        reached: set[Tensor] = set()
        in_vain = 0
        for iteration in range(self.iters):
            batch = next(batches)
            x = inputs[batch]
            output = forward(x)
            gradients = torch.autograd.grad(output, parameters, _gradient(x, output, targets[batch]), allow_unused=True)
            reached.update(parameter for parameter, gradient in zip(parameters, gradients, strict=True) if gradient is not None)
            _step(bounded, gradients, lr=lr * (1 - iteration / self.iters))
            if (iteration + 1) % self.options.check_every == 0 or iteration + 1 == self.iters:
                error = block_error(block, inputs, targets, batches=held)
                listen(iteration + 1, self.iters, error)
                in_vain += 1
                if error < best:
                    best, state, in_vain = error, [parameter.detach().clone() for parameter in parameters], 0
                if 0 < self.options.patience <= in_vain:
                    break
        for parameter, kept in zip(parameters, state, strict=True):
            parameter.data.copy_(kept)
        return before, best, reached


def start_of(weight: Tensor, scheme: Scheme) -> Learned:
    """Offsets at 0 and the whole range: where the descent starts."""
    blocks = scheme.blocks((weight.shape[0], weight.shape[1]))
    offset = torch.zeros_like(weight, dtype=torch.float32)
    if scheme.block == (0, 0):
        # One scale a tensor is shared by its fused group, so no member may move it.
        return Learned(offset=offset)
    ones = torch.ones(blocks, device=weight.device)
    return Learned(offset=offset, low=ones.clone() if scheme.two_ended else None, high=ones)


@torch.no_grad()
def _gradient(x: Tensor, output: Tensor, wanted: Tensor) -> Tensor:
    """What the mean squared error is by the block's output [batch, tokens, channels], in its dtype and but for a factor.

    0 for tokens that are extreme in the block's inputs `x` or in what is wanted (see `counting`). Both are judged: there is a
    block that makes them so, others pass them on with the errors they carry, and one takes their norm away again.
    """
    error = output.float() - wanted.float()
    return error.mul_(counting(x, wanted)[..., None] * _FACTOR).to(output.dtype)


@torch.no_grad()
def _step(bounded: list[tuple[nn.Parameter, float, float]], gradients: tuple[Tensor | None, ...], *, lr: float) -> None:
    for (parameter, low, high), gradient in zip(bounded, gradients, strict=True):
        if gradient is not None:
            parameter.sub_(gradient.sign_(), alpha=lr).clamp_(low, high)
