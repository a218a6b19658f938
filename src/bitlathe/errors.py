"""Every error a user can meet, in one tree.

    BitlatheError
    |-- RecipeError         what was asked for is not understood: an unknown scheme, tuner, field, device
    |-- UnsupportedModel    the model's family is not known, or holds a linear its table does not name
    |-- PlanError           the request cannot be honoured for these linears
    |-- FormatError         the format asked for cannot hold the plan
    |-- CheckpointError     the source: missing, duplicate, truncated, wrongly shaped or non-finite tensors
    |-- CalibrationError    no tokenizer, too little text, or a text that cannot be reached
    |-- OutputError         the result's folder: not ours, in use, or no room on its disk
    `-- ResumeError         an unfinished run is there, but of another recipe, model, text or version

Each message names the thing, says what was found, and ends with the way out. Errors of other libraries are turned into one
of these where they enter (`raise ... from error`).
"""


class BitlatheError(Exception):
    """Anything a user can mend; the command line prints its message without a traceback."""


class RecipeError(BitlatheError):
    """What was asked for is not understood."""


class UnsupportedModel(BitlatheError):
    """No architecture table fits the model."""


class PlanError(BitlatheError):
    """The request cannot be honoured for these linears."""


class FormatError(BitlatheError):
    """The format cannot hold the plan."""


class CheckpointError(BitlatheError):
    """The source checkpoint is incomplete or damaged."""


class CalibrationError(BitlatheError):
    """The calibration or evaluation text cannot be used."""


class OutputError(BitlatheError):
    """The output folder cannot be used."""


class ResumeError(BitlatheError):
    """The unfinished run in the output folder is not this one."""
