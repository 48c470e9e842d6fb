"""Commands about places: points, mark, boxes, roi, crop, uncrop, coverage, register."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deepatlas.cli.options import (
    DeviceOption,
    ExamsOption,
    ModelFolder,
    ModelOption,
    OutOption,
    OverwriteOption,
    RefineOption,
)
from deepatlas.cli.reading import choice, load, mapped, names_in, own, read_json, recognised
from deepatlas.cli.speech import UNLIKE, counting, each_exam, end, say
from deepatlas.errors import MarkupError, RegionError

POINT_FILES = (".json", ".mrk.json", ".csv")

if TYPE_CHECKING:
    from deepatlas.atlas import Region
    from deepatlas.checkpoint import Model

FrameOption = Annotated[str, typer.Option("--frame", help="Of a table that does not say it, and of what is written.")]
RoiOption = Annotated[str, typer.Option("--roi", help="A region or a structure of the model.")]


def points(
    model: ModelOption,
    target: Annotated[Path, typer.Option("-t", "--to", help="An exam, or a folder of them.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="A file like the first; a folder for a folder.")],
    source: Annotated[Path | None, typer.Option("-f", "--from", help="The exam they were marked on.")] = None,
    marked: Annotated[
        Path | None, typer.Option("-p", "--points", help="JSON, CSV or Slicer's .mrk.json, in mm.")
    ] = None,
    frame: FrameOption = "RAS",
    refined: RefineOption = False,
    pairwise: Annotated[
        bool, typer.Option("--pairwise", help="Fit both exams to each other, for models that know few exams.")
    ] = False,
    overwrite: OverwriteOption = False,
    device: DeviceOption = "cpu",
) -> None:
    """Find points that were marked on one exam in others, or the model's landmarks. One outside the view is null."""
    import numpy as np
    import torch

    from deepatlas import checkpoint, files, markups, outputs, pairs, places
    from deepatlas.embedding import familiar

    choice("--frame", frame, markups.FRAMES)
    if (source is None) != (marked is None):
        raise typer.BadParameter("--from and --points belong together.", param_hint="--points")
    if pairwise and source is None:
        raise typer.BadParameter("There is no other exam to fit to; give --from and --points.", param_hint="--pairwise")
    wanted = markups.read_points(marked, frame) if marked else {}
    paths = files.find_inputs(target)
    slicer = marked is not None and marked.name.lower().endswith(".mrk.json")
    suffix = ".mrk.json" if slicer else marked.suffix if marked else ".json"
    targets = outputs.targets(target, paths, output, suffix, (".json", ".csv"))
    outputs.claim(targets.values(), overwrite)
    loaded = load(checkpoint.find(model), device)
    drawn_on = files.read_exam(source) if source else None
    marked_on = recognised(loaded, drawn_on, refined) if source else None
    if marked_on is None and not loaded.landmarks:
        raise MarkupError(f"The model {loaded.name} knows no landmark; teach it with `deepatlas mark`, or give points.")
    library = torch.tensor(list(loaded.landmarks.values())).reshape(-1, 3).T[None]
    wanted = wanted or dict.fromkeys(loaded.landmarks)

    def work(path: Path) -> None:
        image = files.read_exam(path)
        exam = mapped(loaded, image, refined)[0]
        if marked_on is None:
            found = places.from_atlas(exam, library)
        elif pairwise:
            pair = pairs.fitted(loaded, (drawn_on, image), (marked_on, exam))
            found = pair.carry(np.stack(list(wanted.values())))
        else:
            found = places.carry(marked_on, exam, np.stack(list(wanted.values())))
        valid = found.valid & familiar(loaded, exam)
        sure = places.confidence(loaded, exam, found.points_mm)
        placed = {name: mm if ok else None for name, mm, ok in zip(wanted, found.points_mm, valid, strict=True)}
        confidence = {name: float(value) for name, value, ok in zip(wanted, sure, valid, strict=True) if ok}
        checkpoint.write_text(targets[path], markups.points_text(placed, targets[path], confidence, frame))
        typer.echo(f"{targets[path]}: {int(valid.sum())} of {len(wanted)} points lie in {files.exam_name(path)}.")

    each_exam(paths, work, output if target.is_dir() else None, "Carrying")


def mark(
    model: ModelFolder,
    inputs: ExamsOption,
    marked: Annotated[
        Path, typer.Option("-p", "--points", help="Points of the exam, in mm; a folder for a folder, by exam name.")
    ],
    frame: FrameOption = "RAS",
    refined: RefineOption = False,
    device: DeviceOption = "cpu",
) -> None:
    """Store landmarks in a model's library: points of one exam, or of several, of which the median is taken.

    They replace those of the same names. `deepatlas points` without --from finds them.
    """
    from deepatlas import checkpoint, files, markups, places

    choice("--frame", frame, markups.FRAMES)
    folder = own(checkpoint.find(model))
    paths = files.find_inputs(inputs)
    tables = {path: _points_of(path, marked) for path in paths} if inputs.is_dir() else {paths[0]: marked}
    tables = {path: table for path, table in tables.items() if table is not None}
    if not tables:
        raise MarkupError(f"Expected points named like an exam, such as {files.exam_name(paths[0])}.json, in {marked}.")
    for name in _points_without_exam(paths, marked) if inputs.is_dir() else ():
        say(f"{name}: left out, there is no exam of that name in {inputs}.")
    loaded = load(folder, device)
    points = {path: markups.read_points(table, frame) for path, table in tables.items()}
    found = places.landmarks(
        (files.exam_name(path), recognised(loaded, files.read_exam(path), refined), table)
        for path, table in points.items()
    )
    checkpoint.save_structures(replace(loaded, landmarks=loaded.landmarks | found.c_atlas), folder)
    for name, exam in found.outside:
        say(f"{name}: left out in {exam}, where it lies outside the patient.")
    for name, count in found.exams.items():
        typer.echo(f"{name}: from {count} exam{'s' * (count > 1)}.")
    count = len(found.c_atlas)
    typer.echo(f"{folder}: {count} landmarks from {len(tables)} exam{'s' * (len(tables) > 1)}.")


def _points_of(exam: Path, folder: Path) -> Path | None:
    """The file of a folder that holds the points of an exam."""
    from deepatlas import files

    places = [folder / f"{files.exam_name(exam)}{suffix}" for suffix in POINT_FILES]
    return next((place for place in places if place.exists()), None)


def _points_without_exam(exams: list[Path], folder: Path) -> list[str]:
    """The files of points in a folder whose exam is not there."""
    from deepatlas import files

    known = {f"{files.exam_name(exam)}{suffix}" for exam in exams for suffix in POINT_FILES}
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [name for name in found if name.endswith(POINT_FILES) and name not in known]


def boxes(
    model: ModelOption,
    inputs: ExamsOption,
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON or Slicer's .mrk.json; a folder for a folder.")],
    roi: Annotated[str | None, typer.Option("--roi", help="Regions or structures, separated by commas.")] = None,
    source: Annotated[Path | None, typer.Option("-f", "--from", help="The exam that --box was drawn on.")] = None,
    drawn: Annotated[
        Path | None, typer.Option("--box", help="Boxes drawn on --from: JSON or Slicer's .mrk.json.")
    ] = None,
    aligned: Annotated[bool, typer.Option("--aligned", help="Along the patient's axes instead of turned.")] = False,
    frame: FrameOption = "RAS",
    refined: RefineOption = False,
    overwrite: OverwriteOption = False,
    device: DeviceOption = "cpu",
) -> None:
    """Find the boxes around structures, regions, or boxes drawn on another exam. What is not there is null."""
    from deepatlas import checkpoint, files, markups, outputs, regions

    choice("--frame", frame, markups.FRAMES)
    if (source is None) != (drawn is None):
        raise typer.BadParameter("--from and --box belong together.", param_hint="--box")
    paths = files.find_inputs(inputs)
    targets = outputs.targets(inputs, paths, output, ".json", (".json",))
    outputs.claim(targets.values(), overwrite)
    loaded = load(checkpoint.find(model), device)
    wanted = [regions.region_of(loaded, name) for name in names_in(roi)]
    marked = markups.read_boxes(drawn, frame) if drawn else {}
    marked_on = recognised(loaded, files.read_exam(source), refined) if source else None
    for name, box in marked.items():
        regions.drawn_in_patient(name, marked_on, box)
    if not (wanted or marked):
        wanted = [regions.region_of(loaded, name) for name in [*loaded.regions, *loaded.structures]]

    def work(path: Path) -> None:
        exam = mapped(loaded, files.read_exam(path), refined)[0]
        shown = {region.name: regions.show(loaded, region, exam).box for region in wanted}
        shown |= {name: regions.carry(loaded, name, box, marked_on, exam).box for name, box in marked.items()}
        if aligned:
            shown = {name: box and markups.aligned_box(*box.limits_mm) for name, box in shown.items()}
        checkpoint.write_text(targets[path], markups.boxes_text(shown, targets[path], frame))
        there = sum(box is not None for box in shown.values())
        typer.echo(f"{targets[path]}: {there} of {len(shown)} boxes lie in {files.exam_name(path)}.")

    each_exam(paths, work, output if inputs.is_dir() else None, "Looking")


def roi(
    model: ModelFolder,
    name: Annotated[str | None, typer.Option("--name", help="What the region is to be called.")] = None,
    structures: Annotated[str | None, typer.Option(help="The box around these, separated by commas.")] = None,
    margin: Annotated[float, typer.Option(help="Wider by so many mm on every side.", min=0.0)] = 0.0,
    exam: Annotated[Path | None, typer.Option("-i", "--input", help="The exam that --box was drawn on.")] = None,
    box: Annotated[Path | None, typer.Option("--box", help="A box drawn on it: JSON or Slicer's .mrk.json.")] = None,
    listed: Annotated[
        str | None, typer.Option("--list", help='All of a list instead: "whole-body" or "head-neck".')
    ] = None,
    refined: RefineOption = False,
    device: DeviceOption = "cpu",
) -> None:
    """Define a region of the atlas: around structures, or by a box drawn on an exam. It replaces one of that name."""
    from deepatlas import checkpoint, files, markups, regions

    if listed is not None:
        if any(given is not None for given in (name, structures, exam, box)) or margin or refined:
            raise typer.BadParameter("Give a list alone, or a region of your own.", param_hint="--list")
        _add_list(own(checkpoint.find(model)), listed, device)
        return
    if name is None:
        raise typer.BadParameter("Give the region a name.", param_hint="--name")
    if (structures is None) == (box is None) or (box is None) != (exam is None):
        raise typer.BadParameter("Give either --structures, or -i with --box.", param_hint="--structures")
    if not name.strip() or "," in name:
        raise typer.BadParameter(f"{name!r} cannot be asked for; leave out commas.", param_hint="--name")
    if not margin < 1000:
        raise typer.BadParameter("Give a margin in mm below 1000.", param_hint="--margin")
    folder = own(checkpoint.find(model))
    loaded = load(folder, device)
    if structures is not None:
        region = regions.from_structures(loaded, name, names_in(structures), margin)
    else:
        drawn = markups.read_boxes(box)
        if len(drawn) > 1:
            raise MarkupError(f"{box.name}: expected one box, got {len(drawn)}; keep the one that is {name}.")
        embedded = recognised(loaded, files.read_exam(exam), refined)
        region = regions.from_box(loaded, name, embedded, next(iter(drawn.values())).wider(margin))
    if name in loaded.structures:
        raise RegionError(f"{name} is a structure of the model, and so a region already; choose another name.")
    checkpoint.save_structures(loaded.with_regions(region), folder)
    typer.echo(_extent(loaded, region))


def _add_list(folder: Path, name: str, device: str) -> None:
    """Add the regions of a shipped list that the model's library allows."""
    from deepatlas import checkpoint, regions

    loaded = load(folder, device)
    made, lacking = regions.from_list(loaded, name)
    if not made:
        raise RegionError(f"{loaded.name} knows no structure that the list {name} is made around; define some first.")
    checkpoint.save_structures(loaded.with_regions(*made), folder)
    for region in made:
        typer.echo(_extent(loaded, region))
    for region, around in lacking.items():
        taken = region in loaded.structures
        why = "a structure has that name" if taken else f"it needs one of {', '.join(around)}"
        typer.echo(f"{region}: left out, {why}.")


def _extent(model: "Model", region: "Region") -> str:
    edges = (region.box_atlas[1] - region.box_atlas[0]).double() * model.atlas_to_mm[:3, :3].norm(dim=0)
    instead = ", instead of the one before" if region.name in model.regions else ""
    return f"{region.name}: {' × '.join(f'{edge:.0f}' for edge in edges)} mm in the seed exam{instead}."


def crop(
    model: ModelOption,
    inputs: ExamsOption,
    roi: RoiOption,
    output: Annotated[Path, typer.Option("-o", "--output", help="NIfTI file; a folder for a folder.")],
    spacing: Annotated[float | None, typer.Option(help="mm between voxels of the crop.", min=0.1, max=50)] = None,
    size: Annotated[int | None, typer.Option(help="Or: voxels along each edge.", min=2, max=512)] = None,
    labels: Annotated[Path | None, typer.Option("-l", help="Crop this label map instead, drawn on the exam.")] = None,
    refined: RefineOption = False,
    overwrite: OverwriteOption = False,
    device: DeviceOption = "cpu",
) -> None:
    """Cut a region out of an exam, turned upright, on a regular grid; a JSON beside it says where it came from."""
    import numpy as np

    from deepatlas import checkpoint, files, outputs, regions
    from deepatlas.volume import Volume

    if spacing is not None and size is not None:
        raise typer.BadParameter("Give --spacing or --size, not both.", param_hint="--size")
    paths = files.find_inputs(inputs)
    if labels is not None and inputs.is_dir():
        raise typer.BadParameter("A label map goes with a single exam.", param_hint="-l")
    targets = outputs.targets(inputs, paths, output, ".nii.gz", files.SUFFIXES)
    beside = {path: target.with_name(f"{files.exam_name(target)}.json") for path, target in targets.items()}
    outputs.claim([*targets.values(), *beside.values()], overwrite)
    loaded = load(checkpoint.find(model), device)
    region = regions.region_of(loaded, roi)

    def work(path: Path) -> None:
        exam = files.read_exam(path)
        shown = regions.show(loaded, region, mapped(loaded, exam, refined)[0])
        if shown.to_mm is None:
            raise RegionError(f"{path.name}: {roi} is not in this scan (coverage {shown.coverage:.0%}).")
        shape, affine = regions.view_grid(shown, spacing or float(np.min(exam.spacing_mm)), size)
        source = exam if labels is None else files.read_labels(labels, like=exam)
        part = files.as_exam(Volume(regions.crop(source, shape, affine, labels=labels is not None), affine))
        (files.write_image if labels is None else files.write_labels)(targets[path], part.array, part)
        about = regions.crop_record(exam, region, shown, shape, affine)
        checkpoint.write_text(beside[path], json.dumps(about, indent=1))
        typer.echo(f"{targets[path]}: {roi}, {shown.status.replace('_', ' ')}, coverage {shown.coverage:.0%}.")

    each_exam(paths, work, output if inputs.is_dir() else None, "Cropping")


def uncrop(
    inputs: Annotated[Path, typer.Option("-i", "--input", help="A result on the crop's grid.")],
    record: Annotated[Path, typer.Option("--crop", help="The JSON that was written beside the crop.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="NIfTI file to write, on the exam's own grid.")],
    overwrite: OverwriteOption = False,
) -> None:
    """Paste a result on a crop back on the exam's own grid: whole numbers as labels, others linearly; 0 elsewhere."""
    from deepatlas import files, outputs, regions

    about = read_json(record, dict)
    outputs.check_file(output, files.SUFFIXES)
    outputs.claim([output], overwrite)
    like = regions.recorded_exam(about, record.name)
    result = files.read_values(inputs)
    regions.check_on_crop(result, about)
    full = regions.paste(result, like.shape, like.affine)
    (files.write_labels if full.dtype.kind in "iu" and full.min() >= 0 else files.write_image)(output, full, like)
    typer.echo(f"{output}: on the grid of {like.name}.")


def coverage(
    model: ModelOption,
    inputs: ExamsOption,
    roi: Annotated[str, typer.Option("--roi", help="Regions or structures, separated by commas.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Table to write, .csv.")],
    at_least: Annotated[
        float | None, typer.Option(help="Print the exams that show at least this share of each.", min=0.0, max=1.0)
    ] = None,
    overwrite: OverwriteOption = False,
    device: DeviceOption = "cpu",
) -> None:
    """Say how much of a region or a structure each exam shows."""
    import csv
    import io

    from deepatlas import checkpoint, files, outputs, regions
    from deepatlas.embedding import familiar

    paths = files.find_inputs(inputs)
    outputs.check_file(output, (".csv",))
    outputs.claim([output], overwrite)
    loaded = load(checkpoint.find(model), device)
    wanted = [regions.region_of(loaded, name) for name in names_in(roi)]
    if not wanted:
        raise typer.BadParameter("Name at least one region.", param_hint="--roi")
    rows: list[tuple[str, str, float, str]] = []

    def work(path: Path) -> None:
        exam = mapped(loaded, files.read_exam(path))[0]
        if not familiar(loaded, exam):
            say(f"{files.exam_name(path)}: {UNLIKE}")
        for region in wanted:
            shown = regions.show(loaded, region, exam)
            rows.append((files.exam_name(path), region.name, shown.coverage, shown.status))

    if inputs.is_file():
        work(paths[0])
    with counting("Looking") as count:
        failed = outputs.each(paths, work, count) if inputs.is_dir() else {}
    outputs.write_failed(output.with_name(f"{output.name}.failed.json"), failed)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerows([("exam", "roi", "coverage", "status"), *((e, r, f"{c:.4f}", s) for e, r, c, s in rows)])
    checkpoint.write_text(output, table.getvalue().rstrip("\n"))
    if at_least is not None:
        lacking = {exam for exam, _, share, _ in rows if share < at_least}
        for exam in dict.fromkeys(row[0] for row in rows):
            if exam not in lacking:
                typer.echo(exam)
    end(failed)


def register(
    model: ModelOption,
    fixed: Annotated[Path, typer.Option("-f", "--fixed", help="The exam whose grid is kept.")],
    moving: Annotated[Path, typer.Option("-v", "--moving", help="The exam that is laid over it.")],
    output: OutOption,
    linear: Annotated[bool, typer.Option("--linear", help="Stop at the linear map.")] = False,
    kind: Annotated[str, typer.Option(help='Of the linear map: "rigid", "similarity" or "affine".')] = "affine",
    labels: Annotated[Path | None, typer.Option("-l", help="Label map of the moving exam, to be moved too.")] = None,
    refined: Annotated[bool, typer.Option("--refine", help="Fit maps and deformation to the images.")] = False,
    overwrite: OverwriteOption = False,
    device: DeviceOption = "cpu",
) -> None:
    """Register two exams, also of different fields of view. Writes moved.nii.gz, displacement.nii.gz (ITK, LPS),
    jacobian.nii.gz, linear.tfm (ITK) and report.json."""
    from deepatlas import checkpoint, files, outputs
    from deepatlas import register as registering
    from deepatlas.config import FINE
    from deepatlas.prepare import prepare

    choice("--kind", kind, registering.KINDS)
    outputs.claim(outputs.registration_paths(output), overwrite)
    loaded = load(checkpoint.find(model), device)
    still, laid = files.read_exam(fixed), files.read_exam(moving)
    drawn = files.read_labels(labels, like=laid) if labels else None
    maps = [recognised(loaded, exam, refined) for exam in (still, laid)]
    fine = tuple(prepare(exam, FINE.size, loaded.region) for exam in (still, laid)) if refined else None
    there = registering.register(*maps, kind, not linear, fine)
    back = registering.register(*maps[::-1], kind, not linear, fine and fine[::-1])
    about = registering.describe(there, back, *maps, (still.name, laid.name)) | {"linear": kind, "refined": refined}
    outputs.write_registration(output, there, still, laid, drawn, linear)
    checkpoint.write_text(output / "report.json", json.dumps(about, indent=1))
    typer.echo(
        f"{output}: {about['overlap']:.0%} of {still.name} has a counterpart in {laid.name}; "
        f"{about['folded']:.2%} of it folds, there and back differs by {about['inverse_consistency_mm']['median']} mm."
    )
