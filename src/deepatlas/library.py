"""A model's library of structures, extended from files and renamed."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deepatlas import cascade, classifier, files
from deepatlas.checkpoint import Model
from deepatlas.classifier import Taught
from deepatlas.embedding import Embedded, embed
from deepatlas.errors import DeepAtlasError, LabelError, StructureError, memory_as_such
from deepatlas.locate import define
from deepatlas.outputs import reason
from deepatlas.refine import refine, settled
from deepatlas.volume import Volume


class Defined(NamedTuple):
    """A model that learned structures from files."""

    model: Model
    defined: list[str]
    undrawn: list[str]
    """Structures that no exam shows."""
    failed: dict[str, str]
    """Exam → why it could not be used."""
    looks: list[Taught]
    """What learning the looks of structures came to."""


def define_files(
    model: Model,
    exams: Path,
    labels: Path,
    names: dict[str, int],
    required: bool = False,
    exclude: dict[str, list[str]] | None = None,
    refined: bool = False,
    learn: bool = False,
    on_done: Callable[[int, int, str], None] | None = None,
) -> Defined:
    """Store structures from labelled exams on disk, see `deepatlas.locate.define`.

    Args:
        exams, labels: an exam and its label map, or folders; in a folder the label map of an exam has its name, or
            its name and `_seg`. Exams without a label map take no part.
        required: refuse where a structure is not drawn in any exam, instead of leaving it out.
        exclude: for each structure, the exams whose label is known to be wrong; there it counts as not drawn.
        refined: fit each exam's map first, see `deepatlas.refine`.
        learn: also how structures look that enough exams show, see `deepatlas.classifier`.
        on_done: called after each exam, and each structure whose look was learned, as `on_done(done, total, name)`.

    Raises:
        ExamError, LabelError: nothing can be used. StructureError: nothing (or not everything required) is drawn.
    """
    for name in names:
        check_name(name, model)
    pairs = pair(exams, labels)
    failed: dict[str, str] = {}
    label_paths = dict(pairs)

    def labels_of(exam_path: Path) -> Volume:
        drawn = files.read_labels(label_paths[exam_path])
        return without_faults(drawn, files.exam_name(exam_path), names, exclude)

    read: list[Path] = []
    drawn: set[int] = set()
    for exam_path, label_path in pairs:
        try:
            drawn |= set(np.unique(labels_of(exam_path).array).tolist())
            read.append(exam_path)
        except DeepAtlasError as error:
            _note(failed, pairs, error, exam_path, label_path)
    undrawn = [name for name, number in names.items() if number not in drawn]
    if read and (len(undrawn) == len(names) or (required and undrawn)):
        raise StructureError(
            f"Expected a label map with number {names[undrawn[0]]} for {undrawn[0]}, found none; "
            "check the label map and the table of names."
        )
    maps: list[Embedded] = []

    def labelled() -> Iterator[tuple[Volume, Volume]]:
        for done, (exam_path, label_path) in enumerate(pairs, start=1):
            if exam_path in read:
                try:
                    with memory_as_such():
                        exam, labels = files.read_exam(exam_path), labels_of(exam_path)
                        files.check_same_grid(labels, exam, label_path.name)
                        maps.append((refine if refined else settled)(model, exam, embed(model, exam)))
                    yield exam, labels
                except (DeepAtlasError, MemoryError) as error:
                    _note(failed, pairs, error, exam_path, label_path)
            if on_done is not None:
                on_done(done, len(pairs), files.exam_name(exam_path))
        if len(failed) == len(pairs):
            first = next(iter(failed.values()))
            raise LabelError(f"Expected labelled exams, but all {len(pairs)} failed; the first: {first}")

    wanted = {name: number for name, number in names.items() if name not in undrawn}
    made = define(model, labelled(), wanted, embedded=_in_order(maps), required=required)
    present = {n: k for n, k in wanted.items() if made.structures.get(n) is not model.structures.get(n)}
    undrawn = [name for name in names if name not in present]
    if not present:
        raise StructureError(
            f"{undrawn[0]}: no labelled exam has a voxel of number {names[undrawn[0]]} within the patient; "
            "check the label map and the table of names."
        )
    usable = [path for path in read if files.exam_name(path) not in failed]
    again = partial(_read_again, usable, labels_of, refined, failed)
    made = _in_finer_models([made], present, again)
    looks: list[Taught] = []
    if learn:
        known = [made.structures[name] for name in present]
        looks = classifier.taught(known, again([made], on_done), on_done=on_done)
        made = made.with_structures(*(one.structure for one in looks))
    return Defined(made, list(present), undrawn, failed, looks)


def _read_again(
    exams: list[Path],
    labels_of: Callable[[Path], Volume],
    refined: bool,
    failed: dict[str, str],
    models: list[Model],
    on_done: Callable[[int, int, str], None] | None = None,
) -> Iterator[tuple[Volume, Volume, Embedded]]:
    """Exams that were read before, their label maps and their coordinates by the last of models, each within the one
    before it. What does not show its cube is passed over, what cannot be read any more is noted."""
    for done, path in enumerate(exams, start=1):
        try:
            with memory_as_such():
                exam, drawn = files.read_exam(path), labels_of(path)
                top = (refine if refined else settled)(models[0], exam, embed(models[0], exam))
                embedded = cascade.embed_by(models, exam, top)
        except (DeepAtlasError, MemoryError) as error:
            failed[files.exam_name(path)] = reason(error, path)
            embedded = None
        if embedded is not None:
            yield exam, drawn, embedded
        if on_done is not None:
            on_done(done, len(exams), files.exam_name(path))


def _in_finer_models(
    models: list[Model],
    names: dict[str, int],
    again: Callable[[list[Model]], Iterator[tuple[Volume, Volume, Embedded]]],
) -> Model:
    """The last of models, each within the one before it, with structures made anew in the finer models whose cubes
    they lie in.

    Args:
        again: reads the exams again, see `_read_again`.
    """
    model, finer = models[-1], {}
    for key, one in model.finer.items():
        within = {n: k for n, k in names.items() if cascade.holds(model, one, model.structures[n])}
        maps: list[Embedded] = []

        def labelled(one: Model = one, maps: list[Embedded] = maps) -> Iterator[tuple[Volume, Volume]]:
            for exam, drawn, embedded in again([*models, one]):
                maps.append(embedded)
                yield exam, drawn

        for name in set(names) & set(one.structures):
            one = one.without(name)
        if within:
            one = define(one, labelled(), within, embedded=_in_order(maps), required=False)
        known = {n: within[n] for n in within if n in one.structures}
        finer[key] = _in_finer_models([*models, one], known, again)
    return replace(model, finer=finer)


def without_faults(labels: Volume, exam: str, names: dict[str, int], exclude: dict[str, list[str]] | None) -> Volume:
    """The label map without the structures that are known to be wrong in this exam."""
    faulty = [names[name] for name, exams in (exclude or {}).items() if exam in exams and name in names]
    return Volume(np.where(np.isin(labels.array, faulty), 0, labels.array), labels.affine) if faulty else labels


def pair(exams: Path, labels: Path) -> list[tuple[Path, Path]]:
    """Exams and their label maps, by name; a single exam and a single label map belong together under any name.

    Where both are in one folder, an exam is no label map of its own, but `X_seg` is that of `X`.

    Raises:
        ExamError: a folder is missing or empty. LabelError: no exam has a label map.
    """
    exam_paths, label_paths = files.find_inputs(exams), files.find_exams(labels)
    if exams.is_file() and labels.is_file():
        return [(exam_paths[0], label_paths[0])]
    by_name = {
        files.exam_name(path).removesuffix("_seg"): path
        for path in label_paths
        if files.exam_name(path).endswith("_seg")
    }
    themselves = {path.resolve() for path in exam_paths}
    by_name |= {files.exam_name(path): path for path in label_paths if path.resolve() not in themselves}
    pairs = [(path, by_name[files.exam_name(path)]) for path in exam_paths if files.exam_name(path) in by_name]
    if not pairs:
        raise LabelError(
            f"Expected a label map named like an exam, such as {exam_paths[0].name}, found none in {labels}; "
            "rename the label maps."
        )
    return pairs


def check_name(name: str, model: Model) -> None:
    """Refuse a name by which a structure could not be asked for.

    Raises:
        StructureError: it has a comma, or is that of a region of the model or of one finer than it.
    """
    if "," in name:
        raise StructureError(f"Expected a name without commas, which part names in lists, got {name!r}; change it.")
    if name in model.regions:
        raise StructureError(
            f"Expected a name that no region has, got {name}, a region of {model.name}, which would hide the "
            "structure; choose another name."
        )
    for finer in model.finer.values():
        check_name(name, finer)


def renamed(model: Model, old: str, new: str) -> Model:
    """The model with a structure under another name, in the same place of its library.

    Raises:
        StructureError: the old name is unknown, or the new one is empty, in use or that of a region.
    """
    model.structure(old)
    check_name(new, model)
    if not new.strip() or new in model.structures:
        raise StructureError(f"Expected a new name for {old}, got {new!r}, which is empty or in use; choose another.")
    structures = {new if name == old else name: one for name, one in model.structures.items()}
    structures[new] = structures[new].renamed(new)
    finer = {key: renamed(one, old, new) if old in one.structures else one for key, one in model.finer.items()}
    segmented = {new if name == old else name: channel for name, channel in model.segmented.items()}
    return replace(model, structures=structures, finer=finer, segmented=segmented)


def _in_order(maps: list[Embedded]) -> Iterator[Embedded]:
    """The maps as they are appended, each handed over once."""
    while True:
        yield maps.pop(0)


def _note(failed: dict[str, str], pairs: list, error: DeepAtlasError | MemoryError, exam: Path, labels: Path) -> None:
    """Note a failure; the only exam is refused."""
    if len(pairs) == 1 and isinstance(error, DeepAtlasError):
        raise error
    failed[files.exam_name(exam)] = reason(error, exam, labels)
