"""How commands talk: results go to stdout, progress and errors to stderr."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from deepatlas.loop import Progress

SOME_FAILED = 3
UNLIKE = "unlike every exam that the model learned from: nothing was placed in it"


def say(line: str) -> None:
    """A line about the work, not a result."""
    typer.echo(line, err=True)


def some(names: list[str], most: int = 10) -> str:
    """Names for a line: all of them, or the first and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def complain(message: str) -> None:
    say(f"error: {' '.join(message.split())}")


def end(failed: dict[str, str]) -> None:
    """Say which exams failed, and end with the exit code for that."""
    for name, reason in failed.items():
        say(f"failed: {name}: {' '.join(reason.split())}")
    if failed:
        raise typer.Exit(SOME_FAILED)


@contextmanager
def counting(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A function that shows how far a folder is: a bar on a terminal, plain lines elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done, total, name: say(f"{title} {done}/{total} {name}")
        return
    with _bar() as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total, description=f"{title} {name}")


def each_exam(paths: list[Path], work: Callable[[Path], None], folder: Path | None, title: str) -> None:
    """Do something with every exam of a folder, or with the only one, which is refused where it fails."""
    from deepatlas import files, outputs

    if folder is None:
        work(paths[0])
        return
    with counting(title) as count:
        failed = outputs.each(paths, work, count)
    outputs.write_failed(folder / "failed.json", failed, [files.exam_name(path) for path in paths])
    end(failed)


@contextmanager
def training() -> Iterator[Callable[["Progress"], None]]:
    """A function that shows how far a training is: a bar on a terminal, a line every half minute elsewhere."""
    if not sys.stderr.isatty():
        spoken = [-30.0]

        def line(at: "Progress") -> None:
            if time.monotonic() - spoken[0] >= 30 or at.done == at.total:
                spoken[0] = time.monotonic()
                say(f"{at.done}/{at.total} {_training_words(at)}, {at.seconds_left:.0f} s left")

        with _log():
            yield line
        return
    with _bar() as bar, _log():
        task = bar.add_task("Training", total=None, start=False)

        def move(at: "Progress") -> None:
            bar.start_task(task)
            bar.update(task, completed=at.done, total=at.total, description=_training_words(at))

        yield move


@contextmanager
def _log() -> Iterator[None]:
    """What the training notes, such as how far the map jumps at a change of level, goes to stderr."""
    log, handler = logging.getLogger("deepatlas"), logging.StreamHandler(sys.stderr)
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def _training_words(at: "Progress") -> str:
    return f"{at.stage} {at.step}/{at.steps}, loss {at.terms.get('loss', float('nan')):.4f}"


def _bar():
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
