"""A loaded model as lm-eval asks one: likelihoods of continuations and of whole texts, and greedy continuations.

Requests and metrics are lm-eval's (the extra `tasks`); the numbers come from the model as `bitlathe.load` gives it, its logits
taken to float32 before probabilities are made of them. How many sequences run at a time is found out here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitlathe.errors import CalibrationError, CheckpointError, RecipeError
from bitlathe.model.calib import refuse_strange_tokens

# Most sequences in a step.
_SEQUENCES = 64
# What the logits of a step may take on a CPU, where nothing says that memory runs out; a GPU may take half of what is free.
_BYTES = 2**30
# Tokens whose probabilities are held in float32 at a time.
_TOKENS = 512


@dataclass(frozen=True)
class Beginning:
    """Which token a text begins with. token: stands where there is no context. everywhere: it also begins every other text."""

    token: int
    everywhere: bool


def beginning_of(tokenizer: PreTrainedTokenizerBase, source: Path) -> Beginning:
    """What the tokenizer in `source` does by itself: its begin-of-text token everywhere, or only where there is no context.

    Without such a token that of the end of a text stands there. Raises CalibrationError for a tokenizer with neither.
    """
    token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if not isinstance(token, int):
        raise CalibrationError(
            f"the tokenizer in {source} has neither a begin-of-text nor an end-of-text token, and a task needs one where there "
            "is no context. Name one as bos_token in its tokenizer_config.json"
        )
    return Beginning(token, everywhere=tokenizer("a")["input_ids"][:1] == [token])


class Harness(TemplateLM):
    """One model. folder: it came from there, for messages. room: tokens, padding included, that a step may hold."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, beginning: Beginning, folder: Path
    ) -> None:
        super().__init__()
        self._device = model.device
        self._model, self.tokenizer, self._beginning, self._folder = model, tokenizer, beginning, folder
        config = model.config.get_text_config()
        self.max_length: int = config.max_position_embeddings
        self._vocabulary: int = config.vocab_size
        space = torch.cuda.mem_get_info(model.device)[0] // 2 if model.device.type == "cuda" else _BYTES
        self.room = space // (self._vocabulary * model.dtype.itemsize)

    @property
    def eot_token_id(self) -> int:
        """The token that `prefix_token_id` falls back on; it has one already."""
        return self._beginning.token

    @property
    def prefix_token_id(self) -> int:
        """What stands where there is no context."""
        return self._beginning.token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:  # noqa: FBT001
        """The tokens of a text, with the one it begins with unless it is there already or add_special_tokens is False."""
        tokens = self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        begins = self._beginning.everywhere and add_special_tokens is not False and tokens[:1] != [self._beginning.token]
        return [self._beginning.token, *tokens] if begins else tokens

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: FBT001, FBT002
        """The log-likelihood of every text, nats, each token once, in windows of the model's length."""
        windows = []
        for place, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            rolled = get_rolling_token_windows(tokens, self.prefix_token_id, max_seq_len=self.max_length, context_len=1)
            windows += [(place, *make_disjoint_window(pair)) for pair in rolled]
        found = [0.0] * len(requests)
        answers = self._loglikelihood_tokens([(("", ""), context, following) for _, context, following in windows])
        for (place, _, _), (likelihood, _) in zip(windows, answers, strict=True):
            found[place] += likelihood
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        # The choices of a question often differ in their last token alone: what leads up to it runs once.
        asked: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for place, (_, context, following) in enumerate(requests):
            if len(following) > self.max_length:
                raise CalibrationError(
                    f"a task asks for a continuation of {len(following)} tokens, and the model's window ends at "
                    f"{self.max_length}: leave that task out"
                )
            if following:
                asked.setdefault(tuple([*context, *following][-self.max_length - 1 : -1]), []).append((place, following))
        # Nothing to be said is certain.
        found = [(0.0, True)] * len(requests)
        rows = sorted(asked.items(), key=lambda row: -len(row[0]))
        for place, likelihood, greedy in self._in_steps(rows, self._answers, lambda row: len(row[0])):
            found[place] = likelihood, greedy
        if any(isnan(likelihood) for likelihood, _ in found):
            raise CheckpointError(
                f"{self._folder} makes NaN predictions, so there is nothing to measure. It holds damaged weights: fetch it "
                "again, or quantize it again from a sound original"
            )
        return found

    @torch.inference_mode()
    def _answers(self, rows: Sequence[tuple[tuple[int, ...], list[tuple[int, list[int]]]]]) -> list[tuple[int, float, bool]]:
        """One step: (place of the request, log-likelihood, whether it is what the model would say). The longest row first."""
        tokens_NT = torch.zeros(len(rows), len(rows[0][0]), dtype=torch.long)
        for row, (tokens, _) in zip(tokens_NT, rows, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        refuse_strange_tokens(tokens_NT, self._vocabulary, self._folder)
        # What is causal does not see the padding behind it.
        logits_NTV = self._model(input_ids=tokens_NT.to(self._device), use_cache=False).logits
        return [
            (place, *_likelihood(logits_TV[: len(tokens)][-len(following) :], following))
            for logits_TV, (tokens, asked) in zip(logits_NTV, rows, strict=True)
            for place, following in asked
        ]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: FBT001, FBT002
        """What the model says after every context, up to the first of the texts it is to stop at."""
        found = [""] * len(requests)
        kinds: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            kinds.setdefault(repr(request.args[1]), []).append(place)
        for places in kinds.values():
            settings: dict[str, Any] = dict(normalize_gen_kwargs(requests[places[0]].args[1]))
            stops = [text for text in (*settings.pop("until"), self.tokenizer.eos_token) if text]
            longest: int = settings.pop("max_gen_toks")
            if not settings.get("do_sample"):
                settings.pop("temperature", None)
            room = self.max_length - longest
            if room < 1:
                raise CalibrationError(
                    f"a task asks for {longest} new tokens, and the model's window ends at {self.max_length}: leave it out"
                )
            rows = [(place, self.tok_encode(requests[place].args[0])[-room:] or [self.prefix_token_id]) for place in places]
            rows.sort(key=lambda row: -len(row[1]))
            settings |= {"max_new_tokens": longest, "stop_strings": stops}
            widths = {place: len(tokens) + longest for place, tokens in rows}
            steps = self._in_steps(rows, partial(self._said, settings=settings), lambda row, known=widths: known[row[0]])
            for place, text in steps:
                found[place] = min((text.partition(stop)[0] for stop in stops), key=len)
        return found

    @torch.inference_mode()
    def _said(self, rows: Sequence[tuple[int, list[int]]], *, settings: dict[str, Any]) -> list[tuple[int, str]]:
        """One step: (place of the request, new text). The longest row first, as the others are padded on the left."""
        width = len(rows[0][1])
        tokens_NT, mask_NT = torch.zeros(2, len(rows), width, dtype=torch.long)
        for row, (_, tokens) in enumerate(rows):
            tokens_NT[row, width - len(tokens) :], mask_NT[row, width - len(tokens) :] = torch.tensor(tokens), 1
        refuse_strange_tokens(tokens_NT, self._vocabulary, self._folder)
        with torch.random.fork_rng():
            # A task that samples gets the same draws for every model.
            torch.manual_seed(0)
            generate: Any = self._model.generate  # a method that is annotated as a buffer of the module
            said = generate(
                input_ids=tokens_NT.to(self._device),
                attention_mask=mask_NT.to(self._device),
                pad_token_id=self.prefix_token_id,
                tokenizer=self.tokenizer,
                **settings,
            )
        texts = self.tokenizer.batch_decode(said[:, width:], skip_special_tokens=True)
        return [(place, text) for (place, _), text in zip(rows, texts, strict=True)]

    def _in_steps(
        self, rows: Sequence[Any], step: Callable[[Sequence[Any]], list[Any]], length: Callable[[Any], int]
    ) -> Iterator[Any]:
        """What `step` gives for rows, some at a time, the longest first: half as many whenever the GPU's memory runs out."""
        start = 0
        with tqdm(total=len(rows), desc=str(self._folder), disable=None, leave=False) as bar:
            while start < len(rows):
                widest = length(rows[start])
                part = rows[start : start + max(1, min(_SEQUENCES, self.room // widest))]
                done = _if_it_fits(step, part)
                if done is not None:
                    start += len(part)
                    bar.update(len(part))
                    yield from done
                elif len(part) == 1:
                    raise RecipeError(
                        f"{self._folder} runs out of memory on one sequence of {widest} tokens. Leave the task out, or "
                        "measure it on a device with more memory"
                    )
                else:
                    self.room = len(part) // 2 * widest


def _if_it_fits(step: Callable[[Sequence[Any]], list[Any]], part: Sequence[Any]) -> list[Any] | None:
    """What a step gives; None where memory ran out, all that it held given back."""
    try:
        return step(part)
    except torch.OutOfMemoryError:
        pass
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _likelihood(logits_TV: Tensor, following: list[int]) -> tuple[float, bool]:
    """The log-likelihood of the tokens that follow, nats, and whether each of them is the likeliest."""
    wanted_T = torch.tensor(following, device=logits_TV.device)
    total, greedy = 0.0, True
    for start in range(0, len(following), _TOKENS):
        part, wanted = logits_TV[start : start + _TOKENS], wanted_T[start : start + _TOKENS]
        total += part.float().log_softmax(-1).gather(-1, wanted[:, None]).double().sum().item()
        greedy = greedy and bool((part.argmax(-1) == wanted).all())
    return total, greedy
