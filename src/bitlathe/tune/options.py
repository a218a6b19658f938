"""What can be set about a tuner beyond what all of them share. No torch here: recipes read it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class RtnOptions(BaseModel):
    """Options of `rtn`.

    scale: "searched" tries several ranges for every block and takes the one with the least error weighted by E[x^2] of its
    inputs; "min-max" is the weights' own range, for which no text is read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: Literal["searched", "min-max"] = "searched"


class SignRoundOptions(BaseModel):
    """Options of `signround`.

    start: "plain" begins at each block's whole range and can only shrink it; "searched" at the range that `rtn` would take,
    which may then become anything from nothing to twice as wide. lr: first learning rate in grid steps, decaying linearly to 0;
    None is 1/iters. compile: run the tuning step through torch.compile. held_out: how many sequences choose the best state and
    are not trained on. check_every: steps between two looks at them. patience: looks in a row that find nothing better, after
    which a block is done; 0 takes all steps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: Literal["plain", "searched"] = "plain"
    lr: float | None = Field(default=None, gt=0)
    compile: bool = False
    held_out: int = Field(default=8, ge=0)
    check_every: int = Field(default=20, gt=0)
    patience: int = Field(default=3, ge=0)


class ClosedFormOptions(BaseModel):
    """Options of `closed-form`.

    passes: of coordinate descent after the errors were fed back. refits: of the scales, each with a pass of its own. held_out:
    how many sequences judge and are not learned from. gradients: how many sequences tell, by gradients, which errors of a
    linear's output matter, three times as many with `best`. slices: in how many parts its rows then make up for each other.
    end_to_end: steps of `best` in which the scales are tuned on what the whole model says.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    passes: int = Field(default=2, ge=0)
    refits: int = Field(default=2, ge=0)
    held_out: int = Field(default=8, ge=0)
    gradients: int = Field(default=16, ge=0)
    slices: int = Field(default=16, gt=0)
    end_to_end: int = Field(default=64, ge=0)


# Of closed-form: round to nearest on searched ranges; all of it; or, at the end, the whole model's scales tuned by descent too.
Effort = Literal["fast", "normal", "best"]


class TuneOptions(BaseModel):
    """What a tuner may take from a recipe; see `Recipe` for the fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    effort: Effort
    iters: int
    batch_size: int
    seed: int
    rtn: RtnOptions
    signround: SignRoundOptions
    closed_form: ClosedFormOptions
