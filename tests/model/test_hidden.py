"""Hidden states under a budget: the same values wherever they lie, and a full disk is a message."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bitlathe
from bitlathe.errors import OutputError
from bitlathe.model.hidden import Budget, Hidden
from bitlathe.pipeline import run
from bitlathe.recipe import merge
from bitlathe.report import BlockReport
from families import save_model, write_text

CPU = torch.device("cpu")
SHAPE = (5, 3, 4)
BYTES = 5 * 3 * 4 * 2


def allocate(budget: Budget, dtype: torch.dtype = torch.bfloat16) -> Hidden:
    return budget.allocate(SHAPE, dtype, CPU)


def values(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(
    ("limit", "spilled"),
    [
        (10 * BYTES, [False, False, False]),
        (3 * BYTES, [False, False, False]),
        (3 * BYTES - 1, [False, False, True]),
        (BYTES, [False, True, True]),
        (BYTES - 1, [True, True, True]),
    ],
)
def test_what_the_budget_does_not_hold_is_spilled(tmp_path: Path, limit: int, spilled: list[bool]) -> None:
    budget = Budget(limit, tmp_path / "work")
    assert [allocate(budget).spilled for _ in range(3)] == spilled
    assert (tmp_path / "work").exists() == any(spilled)


def test_the_budget_counts_bytes_of_the_dtype(tmp_path: Path) -> None:
    budget = Budget(3 * BYTES, tmp_path)
    assert not allocate(budget, torch.float32).spilled
    assert allocate(budget, torch.float32).spilled
    assert not allocate(budget, torch.float16).spilled  # what is smaller still fits


@pytest.mark.parametrize("limit", [BYTES * 4, 0], ids=["memory", "file"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_put_in_comes_out(tmp_path: Path, limit: int, dtype: torch.dtype) -> None:
    hidden, x = allocate(Budget(limit, tmp_path), dtype), values(dtype)
    assert len(hidden) == 5
    for batch in hidden.batches(2):
        hidden[batch] = x[batch]
    picked = torch.tensor([4, 0, 2])
    assert torch.equal(hidden[0:5], x)
    assert torch.equal(hidden[picked], x[picked])
    hidden[picked] = x[picked] + 1
    expected = x.clone()
    expected[picked] += 1
    assert torch.equal(hidden[0:5], expected)
    hidden[0:2] = x[0:2].float()  # cast to what is held
    assert hidden[0:2].dtype == dtype
    assert torch.equal(hidden[0:2], x[0:2])


def test_a_batch_of_spilled_states_is_a_copy(tmp_path: Path) -> None:
    """A view of the mapping would change with it, and would hold its pages in memory."""
    hidden, x = allocate(Budget(0, tmp_path)), values()
    hidden[0:5] = x
    batch = hidden[1:3]
    hidden[0:5] = x + 1
    assert torch.equal(batch, x[1:3])


def test_batches_cover_everything_in_order(tmp_path: Path) -> None:
    hidden = allocate(Budget(BYTES, tmp_path))
    assert hidden.batches(2) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert hidden.batches(5) == hidden.batches(100) == [slice(0, 5)]


@pytest.mark.parametrize(("tokens", "at_once"), [(128, 8), (512, 2), (700, 1), (2048, 1)])
def test_a_cpu_is_given_no_more_tokens_than_keep_it_busy(tokens: int, at_once: int) -> None:
    data = torch.zeros(16, tokens, 1)
    assert Hidden(data, torch.device("cpu")).batches(8) == [slice(at, at + at_once) for at in range(0, 16, at_once)]
    assert Hidden(data, torch.device("meta")).batches(8) == [slice(0, 8), slice(8, 16)]


def test_the_file_has_no_name(tmp_path: Path) -> None:
    """So nothing is left of it however the process ends; and two streams do not share one."""
    budget = Budget(0, tmp_path / "work")
    first, second = allocate(budget), allocate(budget)
    assert list((tmp_path / "work").iterdir()) == []
    first[0:5], second[0:5] = values(), values() + 1
    assert torch.equal(first[0:5], values())


class Disk:
    """A disk that refuses to give room, with an error of one's choice."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.number, self.asked = number, 0
        monkeypatch.setattr(os, "posix_fallocate", self.refuse)

    def refuse(self, file: int, offset: int, nbytes: int) -> None:
        self.asked += 1
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    Disk(monkeypatch, number)
    with pytest.raises(OutputError, match=r"no room in .*/work for 120 bytes of hidden states.*memory\.activations.*fewer"):
        allocate(Budget(0, tmp_path / "work"))
    assert list((tmp_path / "work").iterdir()) == []
    assert not allocate(Budget(BYTES, tmp_path)).spilled


def test_another_error_of_the_disk_is_not_called_a_full_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Disk(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        allocate(Budget(0, tmp_path))


# Whole runs


def recipe_in(folder: Path, **changes: Any) -> dict[str, Any]:
    save_model(folder / "m")
    small = {"samples": 6, "seqlen": 24, "batch_size": 2, "iters": 4, "scheme": "W4A16G32"}
    return {
        "model": str(folder / "m"),
        "calib": str(write_text(folder / "text.txt", 400)),
        "out": folder / "q",
        **small,
        **changes,
    }


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("tuner", ["rtn", "signround"])
def test_a_run_that_spills_gives_the_same_bytes(tmp_path: Path, tuner: str) -> None:
    recipe = recipe_in(tmp_path, tuner=tuner)
    run(merge(recipe), restart=False, listen=lambda event: None)
    # One stream of the two fits, then none.
    stream = 6 * 24 * 64 * 2
    for activations in (2 * stream - 1, 1):
        out = tmp_path / f"q{activations}"
        run(merge(recipe, {"out": out, "memory": {"activations": activations}}), restart=False, listen=lambda event: None)
        assert weights(out) == weights(tmp_path / "q")
        assert not (out / ".bitlathe").exists()


def test_a_disk_that_fills_up_stops_the_run_and_more_memory_continues_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_in(tmp_path)

    class Stop(KeyboardInterrupt):
        pass

    def interrupt(event: object) -> None:
        if isinstance(event, BlockReport):
            raise Stop

    with pytest.raises(Stop):
        run(merge(recipe), restart=False, listen=interrupt)
    with monkeypatch.context() as patched:
        disk = Disk(patched, errno.ENOSPC)
        with pytest.raises(OutputError, match=r"memory\.activations"):
            run(merge(recipe, {"memory": {"activations": 1}}), restart=False, listen=lambda event: None)
        assert disk.asked == 1
    told: list[Any] = []
    run(merge(recipe), restart=False, listen=told.append)
    assert [event.resumed for event in told if isinstance(event, BlockReport)] == [True, False, False]
    assert bitlathe.load(tmp_path / "q", "cpu").dtype == torch.bfloat16
