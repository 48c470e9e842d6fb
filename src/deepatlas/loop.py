"""How a training goes through its stages, what it tells meanwhile (progress with the time that is left, a log of every
term), and the state it is resumed from. Knows no model."""

import csv
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import Adam

from deepatlas import checkpoint
from deepatlas.errors import ModelError
from deepatlas.machine import denormals_are_zero

Stage = tuple[str, int, Callable[[int, int], dict[str, float]]]
"""Name, steps, and what does one: (stage, step) → its terms."""

LOG = logging.getLogger(__name__)
LOG_EVERY = 20
CONVERGED_ALARM = 0.6


class Progress(NamedTuple):
    """Where a training stands."""

    stage: str
    step: int
    steps: int
    done: int
    """Steps of all stages done so far."""
    total: int
    terms: dict[str, float]
    """Means since the last report: every loss term, folded and converged share, seconds of each part of a step."""
    seconds_left: float


class Reporter:
    """Collects the terms of the steps, writes them to the log and tells the caller."""

    def __init__(
        self,
        stages: list[Stage],
        first: tuple[int, int],
        on_progress: Callable[[Progress], None] | None,
        write_row: Callable[[dict], None],
        seconds: float = 0.0,
    ) -> None:
        """``first`` is the stage and the step that the run begins with, ``seconds`` what the log has taken by then."""
        self.before = [sum(s[1] for s in stages[:n]) for n in range(len(stages) + 1)]
        self.costs = [next(cost for kind, cost in COSTS.items() if name.startswith(kind)) for name, _, _ in stages]
        self.steps = [s[1] for s in stages]
        self.on_progress, self.write_row = on_progress, write_row
        self.sums: list[dict[str, float]] = []
        self.seconds = seconds
        self.began, self.start = time.monotonic(), self._cost(*first)

    def _cost(self, number: int, step: int) -> float:
        """What has been spent when a stage has come to a step, in steps of the autoencoder."""
        before = sum(cost * steps for cost, steps in zip(self.costs[:number], self.steps[:number], strict=True))
        return before + (self.costs[number] * step if step else 0.0)

    def step(self, number: int, step: int, name: str, steps: int, terms: dict[str, float]) -> None:
        """A step is done."""
        self.sums.append(terms)
        every = 1 if name.startswith("fitting") else LOG_EVERY  # a fitting step is many steps on a batch of exams
        if (step + 1) % every and step + 1 != steps:
            return
        means = {key: float(np.mean([t[key] for t in self.sums])) for key in self.sums[0]}
        self.sums = []
        done, total = self.before[number] + step + 1, self.before[-1]
        spent = time.monotonic() - self.began
        worked = self._cost(number, step + 1)
        left = spent / max(worked - self.start, 1e-6) * (self._cost(len(self.steps), 0) - worked)
        self.write_row({"stage": name, "step": step + 1, "seconds": round(self.seconds + spent, 1)} | means)
        if means.get("converged", 1.0) < CONVERGED_ALARM:
            LOG.warning(
                "%s step %d: the implicit warp converged at %.0f %% only", name, step + 1, 100 * means["converged"]
            )
        if self.on_progress:
            self.on_progress(Progress(name, step + 1, steps, done, total, means, left))


COSTS = {
    "autoencoder": 1.0,
    "warm start": 0.5,
    "level": 1.5,
    "fitting": 40.0,
    "consolidation": 1.0,
    "registration": 1.0,
    "segmentation": 0.3,
    "semi": 0.8,
    "guided": 1.2,
    "joint": 1.3,
    "fine-tuning": 1.0,
}
"""Rough cost of a step of each kind of stage, to tell the time that is left."""

LOG_COLUMNS = (
    *("stage", "step", "seconds", "loss", "rms_mm", "explicit", "implicit", "edges", "smooth_explicit"),
    *("smooth_implicit", "unsolved", "labels", "folded", "converged", "gradient"),
    *("s_augment", "s_network", "s_objective", "s_backward"),
)


def cut_log(path: Path, stages: list[str], first: tuple[int, int]) -> float:
    """Cut a log where a run goes on, as later steps are done again; the seconds by then.

    Args:
        stages: the names of all, in order.
        first: stage and step that the run begins with.
    """
    seconds = 0.0
    with path.open("r+b") as file:
        end = len(file.readline())
        for line in file:
            try:
                stage, step, spent = line.decode("utf-8").split(",")[:3]
                beyond = not line.endswith(b"\n") or (stages.index(stage), int(step)) > first
                seconds = seconds if beyond else float(spent)
            except ValueError:  # a row that was not written to its end
                beyond = True
            if beyond:
                break
            end += len(line)
        file.truncate(end)
    return seconds


@contextmanager
def csv_log(
    path: Path | None, append: bool, columns: tuple[str, ...] = LOG_COLUMNS
) -> Iterator[Callable[[dict], None]]:
    """A function that adds a row to the log; without a path it does nothing."""
    if path is None:
        yield lambda row: None
        return
    append = append and path.exists()
    with path.open("a" if append else "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        if not append:
            writer.writeheader()

        def write(row: dict) -> None:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
            file.flush()

        yield write


def go_through(
    stages: list[Stage],
    first: tuple[int, int],
    log: Path | None,
    save: Callable[[int, int], None],
    minutes: float,
    on_progress: Callable[[Progress], None] | None,
    enter: Callable[[int], None] = lambda number: None,
    columns: tuple[str, ...] = LOG_COLUMNS,
) -> None:
    """All steps of a training that are still to be done.

    Args:
        first: stage and step to begin with.
        log: the file of all terms, CSV of these columns; none is written without a path.
        save: writes the state to resume from, given the stage and the step to go on with.
        minutes: between two states; one is written at the end of every stage too.
        enter: called where a stage begins.
    """
    resumed = first != (0, 0)
    seconds = cut_log(log, [name for name, _, _ in stages], first) if resumed and log and log.exists() else 0.0
    with csv_log(log, resumed, columns) as write_row, denormals_are_zero():
        report = Reporter(stages, first, on_progress, write_row, seconds)
        saved = time.monotonic()
        for number, (name, steps, step_of) in enumerate(stages):
            if number < first[0]:
                continue
            begin = first[1] if number == first[0] else 0
            if begin == 0:
                enter(number)
            for step in range(begin, steps):
                report.step(number, step, name, steps, step_of(number, step))
                if time.monotonic() - saved > 60 * minutes:
                    save(number, step + 1)
                    saved = time.monotonic()
            save(number + 1, 0)


def check_folder(out: Path, resume: bool) -> None:
    """Refuse a model folder that holds nothing to resume, or something that a new training would replace.

    Raises:
        ModelError: which of the two.
    """
    begun = (out / "training" / "state.json").exists()
    if resume and not begun:
        raise ModelError(f"There is nothing to resume in {out}; start without --resume.")
    if not resume and ((out / "model.json").exists() or begun):
        raise ModelError(f"{out} already holds a model or a training; add --resume, or choose another folder.")


class State(NamedTuple):
    """Where a training stood."""

    stage: int
    step: int
    tensors: dict[str, Tensor]
    level: int = 0


NOT_FINITE_IN_A_ROW = 10


class Descent:
    """Steps down a loss, its gradient clipped; one that is not finite is skipped and counted."""

    def __init__(self, clip: float) -> None:
        self.clip, self.failures = clip, 0

    def step(self, optimiser: torch.optim.Optimizer, loss: Tensor, clipped: torch.nn.Module) -> float:
        """One step; the norm of the gradient that was clipped.

        Raises:
            ModelError: too many gradients in a row were not finite.
        """
        optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(clipped.parameters(), self.clip)
        moved = (p for group in optimiser.param_groups for p in group["params"] if p.grad is not None)
        if all(bool(torch.isfinite(p.grad).all()) for p in moved):
            optimiser.step()
            self.failures = 0
        else:
            self.failures += 1
            LOG.warning("skipped a step: its gradient is not finite")
            if self.failures >= NOT_FINITE_IN_A_ROW:
                raise ModelError(f"{self.failures} gradients in a row were not finite; resume with a lower rate.")
        return float(norm)


def save_state(folder: Path, state: State, settings: dict) -> None:
    """Write a state: tensors first, then where they stand; the one before goes last."""
    name = f"state-{state.stage}-{state.step}.safetensors"
    checkpoint.write_tensors(folder / name, state.tensors)
    about = {"stage": state.stage, "step": state.step, "level": state.level, "file": name, "settings": settings}
    about["shapes"] = {k: list(v.shape) for k, v in state.tensors.items()}
    checkpoint.write_text(folder / "state.json", json.dumps(about))
    for old in folder.glob("state-*.safetensors*"):  # also in part, where a process was killed
        if old.name != name:
            old.unlink()


def read_state(folder: Path, settings: dict) -> State:
    """Read a state back.

    Raises:
        ModelError: it is damaged, or was begun with other settings.
    """
    path = folder / "state.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        stage, step, level = (int(about[key]) for key in ("stage", "step", "level"))
        shapes = {name: tuple(shape) for name, shape in about["shapes"].items()}
        file, begun = str(about["file"]), dict(about["settings"])
    except (AttributeError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is damaged ({error}); remove the folder and train again.") from None
    odd = [key for key in settings if settings[key] != begun.get(key)]
    if odd:
        raise ModelError(f"This training was begun with another {' and '.join(odd)}; resume with the same.")
    return State(stage, step, checkpoint.read_tensors(folder / file, shapes, {"F32"}), level)


def tensors_of(optimiser: Adam, prefix: str) -> dict[str, Tensor]:
    """The state of an optimiser as named tensors; none before its first step."""
    found = optimiser.state_dict()["state"].items()
    return {f"{prefix}{index}.{k}": v for index, values in found for k, v in values.items()}


def optimiser_of(optimiser: Adam, tensors: dict[str, Tensor]) -> None:
    """The way back: names without their prefix."""
    state = optimiser.state_dict()
    indices = sorted({int(name.split(".")[0]) for name in tensors})
    state["state"] = {i: {k: tensors[f"{i}.{k}"] for k in ("step", "exp_avg", "exp_avg_sq")} for i in indices}
    optimiser.load_state_dict(state)
