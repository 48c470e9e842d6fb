"""How commands read what they are given, and refuse it."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from deepatlas.cli.speech import say, some
from deepatlas.errors import LabelError, ModelError, StructureError

if TYPE_CHECKING:
    from deepatlas.checkpoint import Model
    from deepatlas.embedding import Embedded
    from deepatlas.files import Exam


def choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(choices)}.", param_hint=option)


def check_device(device: str) -> None:
    """Refuse a device that is not there."""
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ModelError(f"Expected a device of this machine, got {device!r}; take --device cpu.") from None


def load(folder: Path, device: str) -> "Model":
    """A model with its network on a device."""
    from deepatlas import checkpoint

    check_device(device)
    model = checkpoint.load(folder)
    _move(model, device)
    return model


def _move(model: "Model", device: str) -> None:
    model.network.to(device)
    for finer in model.finer.values():
        _move(finer, device)


def mapped(
    model: "Model", exam: "Exam", refined: bool = False, copies: int = 0, orient: bool = False
) -> tuple["Embedded", list[str]]:
    """An exam with its map, made with the care that was asked for, and what is to be said about it."""
    from deepatlas import consistency, orientation
    from deepatlas.embedding import embed, familiar, likeness_of
    from deepatlas.refine import refine, settled

    notes = []
    if orient:
        embedded, found = orientation.embed_upright(model, exam)
        if found.turned:
            axes = " ".join(orientation.words(found.turn))
            notes.append(
                f"its header is wrong: what it calls right, front, head is {axes}; taken as that, but its mirror image "
                "may look the same: check left and right"
            )
        if found.mirrored:
            notes.append("it looks like a mirror image; nothing was done about it, check left and right")
    else:
        embedded = embed(model, exam)
    if copies:
        embedded = consistency.agree(model, embedded, copies).embedded
    # fitted, an exam of another kind would look familiar
    embedded = (refine if refined and familiar(model, embedded) else settled)(model, exam, embedded)
    return embedded._replace(alike=likeness_of(model, embedded)), notes


def recognised(model: "Model", exam: "Exam", refined: bool = False) -> "Embedded":
    """An exam with its map, refused where it is unlike those that the model learned from."""
    from deepatlas.embedding import check_familiar

    embedded, _ = mapped(model, exam, refined)
    check_familiar(model, embedded, exam.name)
    return embedded


def own(folder: Path) -> Path:
    """A model folder that may be changed: not one that came with the program."""
    from deepatlas import checkpoint

    if any(folder.resolve().is_relative_to(path.resolve()) for path in checkpoint.shipped()):
        raise ModelError(
            f"{folder.name} came with the program and is not changed; copy {folder} and give the copy, "
            "or define with -o NEW_FOLDER."
        )
    return folder


def names_in(structures: str | None) -> list[str]:
    """Names from a list with commas, each once."""
    return list(dict.fromkeys(filter(None, (name.strip() for name in (structures or "").split(",")))))


def table_of_names(path: Path, structures: str | None) -> dict[str, int]:
    """The table of label names, or the part of it that was asked for."""
    from deepatlas import files

    table = files.read_names(path)
    wanted = names_in(structures) or list(table)
    unknown = [name for name in wanted if name not in table]
    if unknown:
        raise StructureError(f"{path.name} has no structure {unknown[0]!r}; it has: {', '.join(table)}.")
    return {name: table[name] for name in wanted}


def label_faults(path: Path | None, names: Path, exams: Callable[[], Iterable[str]]) -> dict[str, list[str]] | None:
    """The table of label faults to leave out, structure → exams, held against the table of names.

    One table may serve several folders, so exams that are not there are only said.

    Args:
        exams: tells the names of the exams that are there; asked only where there is a table.
    """
    from deepatlas import files

    if path is None:
        return None
    faults = read_json(path, dict)
    files.check_exclusions(faults, files.read_names(names))
    there = set(exams())
    if unknown := sorted({exam for listed in faults.values() for exam in listed} - there):
        say(f"{path.name}: not among the exams here: {some(unknown)}.")
    return faults


def exam_names(folder: Path) -> list[str]:
    """Names of an exam or of those in a folder."""
    from deepatlas import files

    return [files.exam_name(path) for path in files.find_exams(folder)]


def read_json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LabelError(f"Expected JSON in {path}, but it cannot be read ({error}); mend the file.") from None
    if not isinstance(value, kind):
        raise LabelError(f"Expected a JSON {kind.__name__} in {path.name}, got {type(value).__name__}; mend the file.")
    return value
