"""Tuners: one algorithm a file, each turning a block's linears into codes.

A tuner turns a block, the schemes of its linears and the hidden states around it into finished linears (`base.Tuner`). It knows
nothing of files, and of other tuners only what it starts from.
"""

TUNERS: dict[str, str] = {
    "closed-form": "bitlathe.tune.closed_form:ClosedForm",
    "rtn": "bitlathe.tune.rtn:Rtn",
    "signround": "bitlathe.tune.signround:SignRound",
}
