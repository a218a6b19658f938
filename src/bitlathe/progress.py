"""What a run shows while it runs, on standard error: a line for every finished block, and a bar for the one at work."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bitlathe.io.sizes import human
from bitlathe.report import BlockReport, Event, Listener, Note, Searching, Step
from bitlathe.tables import duration

# What goes through the whole model, in words, and what of it is counted.
_SEARCHES: dict[str, tuple[str, str]] = {
    "forward": ("search: forward", "blocks"),
    "score": ("search: scores", "blocks"),
    "measure": ("search: measuring", "blocks"),
    "smoothing": ("smoothing", "blocks"),
    "gradients": ("gradients, there and back", "passes"),
    "scales": ("scales, end to end", "steps"),
}


class Display:
    """Open it, and give what it returns to `bitlathe.quantize` as `listen`."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[told]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> Listener:
        self._bar.start()
        return self._see

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def _see(self, event: Event) -> None:
        match event:
            case Step(block, blocks, step, steps, loss):
                self._show(f"block {block + 1}/{blocks}", step, steps, f"steps, loss {loss:.3g}")
            case Searching(what, done, of):
                words, counted = _SEARCHES[what]
                self._show(words, done, of, counted)
                if done == of:
                    self._clear()
            case BlockReport():
                self._clear()
                self._console.print(block_line(event))
            case Note():
                self._console.print(event.text, markup=False)

    def _show(self, words: str, done: int, of: int, told: str) -> None:
        tasks = self._bar.task_ids
        task = tasks[0] if tasks else self._bar.add_task(words, total=of, told=told)
        self._bar.update(task, description=words, completed=done, total=of, told=told)

    def _clear(self) -> None:
        for task in self._bar.task_ids:
            self._bar.remove_task(task)


def block_line(report: BlockReport) -> str:
    """A finished block in one line."""
    # The head comes after the last block and is counted with none of them.
    place = f"block {report.block + 1}/{report.blocks}" if report.block < report.blocks else report.name
    linears = f"{report.linears} linears" if report.linears else "kept"
    if report.resumed:
        return f"{place}: {linears}, from the interrupted run"
    known = report.loss_before is not None and report.loss_after is not None
    loss = f", loss {report.loss_before:.3g} -> {report.loss_after:.3g}" if known else ""
    vram = f", {human(report.peak_vram)} VRAM" if report.peak_vram else ""
    return f"{place}: {linears}{loss}, {duration(report.seconds)}, peak {human(report.peak_ram)} RAM{vram}"
