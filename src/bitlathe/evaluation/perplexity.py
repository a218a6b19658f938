"""Perplexity, KL divergence and top-1 agreement, block by block: neither model has to fit in memory.

Both models run in float32 on the same windows of text. A quantized checkpoint is measured through its codes: what a linear
multiplies by is the dequantized weight in the checkpoint's own 16-bit dtype.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bitlathe.errors import CalibrationError, CheckpointError, RecipeError
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.io.sizes import parse_size
from bitlathe.model.block import Block
from bitlathe.model.calib import characters_for, refuse_strange_tokens, text_of, tokenizer_of, windows_of
from bitlathe.model.dequantized import as_original
from bitlathe.model.hidden import Budget, Hidden
from bitlathe.model.skeleton import Skeleton
from bitlathe.model.source import device_named, open_model
from bitlathe.model.walk import begin, walk
from bitlathe.model.weights import Weights

# Windows of a Hub dataset that are read when no number of windows is asked for.
_WINDOWS = 128
# Tokens whose logits are held at a time.
_TOKENS = 512
# Resamplings of the windows behind a standard error (bootstrap; Efron, 1979).
_RESAMPLES = 200


@dataclass(frozen=True)
class Tokenwise:
    """What was measured, token by token, in float64.

    nll: negative log-likelihood of the next token, nats [windows, tokens - 1]. kl: KL(original || model) of the prediction
    after each token, nats [windows, tokens]. agree: 1 where both rank the same token first [windows, tokens]. The last two are
    None without an original.
    """

    nll: Tensor
    kl: Tensor | None
    agree: Tensor | None

    @classmethod
    def empty(cls, windows: int, tokens: int, *, compared: bool) -> Tokenwise:
        """Room for so much text, to be filled part by part."""
        kl, agree = (torch.empty(windows, tokens, dtype=torch.float64) if compared else None for _ in range(2))
        return cls(torch.empty(windows, tokens - 1, dtype=torch.float64), kl, agree)

    def take(self, row: int, part: slice, nll: Tensor) -> None:
        """Put in the likelihoods of a part of a window."""
        self.nll[row, part] = nll.double().cpu()

    def compare(self, row: int, part: slice, kl: Tensor, agree: Tensor) -> None:
        """Put in the comparison of a part of a window."""
        assert self.kl is not None and self.agree is not None
        self.kl[row, part], self.agree[row, part] = kl.double().cpu(), agree.double().cpu()


def evaluate(
    folder: str | Path,
    *,
    against: str | Path | None = None,
    text: str = "builtin",
    seqlen: int = 2048,
    windows: int | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Measure the model in `folder`, and against another one how far its predictions are from it.

    folder, against: a folder or Hub id, original or quantized; `against` is read as floats where another program published it
    in FP8 (see `as_original`), for then it is the original. text: a file, a Hub dataset, or "builtin"; its tokens in a row,
    without special tokens, are cut into windows of `seqlen`. windows: how many of them, from the start; None is all.

    Returns {"model", "text", "windows", "seqlen", "perplexity": {"value", "error"}} and, with `against`, {"against",
    "perplexity_against", "kl_mean", "kl_median", "kl_99", "kl_max", "top1_agreement"} likewise, KL in nats per token, agreement
    as a fraction. "error" is the standard error over windows (tokens of one window are not independent); a maximum's is that of
    the maximum over so much text, and grows with it. Raises a BitlatheError when a model or the text cannot be used.
    """
    if seqlen < 2 or (windows is not None and windows < 1):
        raise RecipeError(
            f"nothing can be measured with seqlen {seqlen} and windows {windows}. Ask for at least 1 window, of at least 2 "
            "tokens: the second is the first that is predicted"
        )
    place = device_named(device)
    model = Checkpoint(folder)
    original = None if against is None else as_original(Checkpoint(against))
    tokenizer = tokenizer_of(model.path)
    documents = text_of(text, "evaluation", characters=characters_for(windows or _WINDOWS, seqlen))
    tokens = windows_of(tokenizer, documents, seqlen=seqlen, count=windows)
    if original is not None and _vocabulary(original) != _vocabulary(model):
        raise CalibrationError(
            f"{model.path} has a vocabulary of {_vocabulary(model)} and {original.path} one of {_vocabulary(original)}: their "
            "predictions cannot be compared. Give the model that the first was made from"
        )
    found = measure(model, original, tokens, device=place)
    result = {"model": str(folder), "text": text, "windows": len(tokens), "seqlen": seqlen}
    return result | ({} if against is None else {"against": str(against)}) | found


def measure(model: Checkpoint, original: Checkpoint | None, tokens_NT: Tensor, *, device: torch.device) -> dict[str, Any]:
    """The statistics of `evaluate` over the windows `tokens_NT` [windows, tokens]."""
    with tempfile.TemporaryDirectory(prefix="bitlathe-") as folder:
        budget = Budget(parse_size("4GiB"), Path(folder))
        first = _through(model, tokens_NT, budget, device)
        second = None if original is None else _through(original, tokens_NT, budget, device)
        ours, theirs = _compare(tokens_NT, first, second)
    _refuse_nothing_said(model, ours)
    if original is None or theirs is None:
        return statistics(ours)
    _refuse_nothing_said(original, theirs)
    return statistics(ours) | {"perplexity_against": statistics(theirs)["perplexity"]}


def _refuse_nothing_said(checkpoint: Checkpoint, found: Tokenwise) -> None:
    bad = int((~torch.isfinite(found.nll).all(dim=1)).sum())
    if bad:
        raise CheckpointError(
            f"{checkpoint.path} makes infinite or NaN predictions in {bad} of {len(found.nll)} windows, so there is nothing to "
            "measure. It holds damaged weights: fetch it again, or quantize it again from a sound original"
        )


def _through(checkpoint: Checkpoint, tokens_NT: Tensor, budget: Budget, device: torch.device) -> tuple[Hidden, Block]:
    """The hidden states after the last block, and the head that turns them into logits."""
    skeleton, weights = open_model(checkpoint, device=device, dtype=torch.float32)
    refuse_strange_tokens(tokens_NT, skeleton.model.config.vocab_size, checkpoint.path)
    start = begin(skeleton, weights, tokens_NT, budget, streams=1)
    _run(skeleton, weights, start)
    return start.streams[0], skeleton.head(weights)


def _run(skeleton: Skeleton, weights: Weights, start: Any) -> None:
    for _ in walk(skeleton, weights, start, batch_size=8):
        pass


@torch.no_grad()
def _compare(
    tokens_NT: Tensor, model: tuple[Hidden, Block], original: tuple[Hidden, Block] | None
) -> tuple[Tokenwise, Tokenwise | None]:
    """A few tokens at a time, because logits are too wide to keep."""
    windows, length = tokens_NT.shape
    ours = Tokenwise.empty(windows, length, compared=original is not None)
    theirs = None if original is None else Tokenwise.empty(windows, length, compared=False)
    for row in range(windows):
        for start in range(0, length, _TOKENS):
            part = slice(start, min(start + _TOKENS, length))
            following = tokens_NT[row, part.start + 1 : part.stop + 1]
            log_q = _log_probabilities(model, row, part)
            ours.take(row, part, nll(log_q, following))
            if original is not None and theirs is not None:
                log_p = _log_probabilities(original, row, part)
                theirs.take(row, part, nll(log_p, following))
                kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
                ours.compare(row, part, kl, log_q.argmax(-1) == log_p.argmax(-1))
    return ours, theirs


def _log_probabilities(model: tuple[Hidden, Block], row: int, part: slice) -> Tensor:
    hidden, head = model
    return F.log_softmax(head(hidden[row : row + 1][:, part])[0].float(), dim=-1)


def nll(log_probabilities: Tensor, following: Tensor) -> Tensor:
    """Of the tokens that follow; the last token of a window has none."""
    return F.nll_loss(log_probabilities[: len(following)], following.to(log_probabilities.device), reduction="none")


def statistics(found: Tokenwise) -> dict[str, Any]:
    """Every figure with its standard error over windows."""
    figures = {"perplexity": (found.nll, lambda nll: nll.mean().exp())}
    if found.kl is not None and found.agree is not None:
        figures |= {
            "kl_mean": (found.kl, torch.mean),
            "kl_median": (found.kl, partial(_quantile, at=0.5)),
            "kl_99": (found.kl, partial(_quantile, at=0.99)),
            "kl_max": (found.kl, torch.max),
            "top1_agreement": (found.agree, torch.mean),
        }
    return {
        name: {"value": figure(values).item(), "error": _standard_error(values, figure)}
        for name, (values, figure) in figures.items()
    }


def _quantile(values: Tensor, *, at: float) -> Tensor:
    # torch.quantile refuses more than 16 million values.
    return values.flatten().kthvalue(1 + round(at * (values.numel() - 1))).values


def _standard_error(values_NT: Tensor, figure: Any) -> float | None:
    """Bootstrap over windows; None for a single one, which says nothing of its own spread."""
    windows = len(values_NT)
    if windows < 2:
        return None
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(windows, (_RESAMPLES, windows), generator=generator)
    return torch.stack([figure(values_NT[draw]) for draw in draws]).std().item()


def _vocabulary(checkpoint: Checkpoint) -> int | None:
    return checkpoint.config.get("vocab_size")
