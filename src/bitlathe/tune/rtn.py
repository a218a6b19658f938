"""Round to nearest, on the plain range or on one searched to lose least where activations are large."""

from __future__ import annotations

from collections.abc import Mapping

from bitlathe.formats.base import QuantLayer
from bitlathe.model.moments import moments_of
from bitlathe.model.walk import Step
from bitlathe.numerics.project import quantize, search
from bitlathe.numerics.scheme import Scheme
from bitlathe.tune.base import Listen, Needs, Tuned, rounding_error
from bitlathe.tune.options import TuneOptions

# Sequences on which the error before and after is measured.
_PROBE = 8


class Rtn:
    """Round to nearest.

    searched: choose every block's range by the error of its weights weighted with E[x^2] of the input channels (the
    "importance matrix" of llama.cpp); otherwise the range is the weights' own and no text is needed.
    """

    end_to_end = 0

    def __init__(self, *, searched: bool, batch_size: int) -> None:
        self.searched, self.batch_size = searched, batch_size
        self.needs = Needs(streams=int(searched))

    @classmethod
    def of(cls, options: TuneOptions) -> Rtn:
        """The tuner that a recipe's options ask for."""
        return cls(searched=options.rtn.scale == "searched", batch_size=options.batch_size)

    def tune(self, step: Step, schemes: Mapping[str, Scheme], listen: Listen) -> Tuned:
        """See `Tuner.tune`."""
        block, inputs = step.block, step.inputs
        peaks = block.peaks(schemes)
        weights = {name: block.weight(name) for name in schemes}
        plain = {name: QuantLayer(quantize(weights[name], scheme, peak=peaks[name])) for name, scheme in schemes.items()}
        if inputs is None or not self.searched:
            return Tuned(plain)
        moments = moments_of(block, inputs, schemes, batch_size=self.batch_size)
        batches = inputs.batches(self.batch_size, first=_PROBE)
        layers = {}
        for number, (name, scheme) in enumerate(schemes.items()):
            found = search(weights[name], scheme, moments.mean(name), peak=peaks[name])
            layers[name] = QuantLayer(quantize(weights[name], scheme, found, peak=peaks[name]))
            listen(number + 1, len(schemes), 0.0)
        before, after = (rounding_error(block, each, inputs, batches=batches) for each in (plain, layers))
        return Tuned(layers, before, after, tuple(name for name in schemes if moments.mean(name) is None))
