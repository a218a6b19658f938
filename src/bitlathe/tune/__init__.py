"""Tuners: one algorithm a file, each turning a block's linears into codes.

A tuner is a function from a block, its plan and the hidden states around it to the finished linears. It knows nothing of
files, formats or other tuners.
"""

TUNERS: dict[str, str] = {
    "rtn": "bitlathe.tune.rtn:rtn",
    "signround": "bitlathe.tune.signround:signround",
}
