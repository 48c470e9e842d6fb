"""``deepatlas regseg``: the 2019 system, registration and segmentation that teach each other."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deepatlas.cli.options import ModelOption, OutOption, OverwriteOption
from deepatlas.cli.speech import counting, each_exam, training
from deepatlas.errors import ExamError, LabelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deepatlas.atlas_grid import AtlasGrid
    from deepatlas.common_grid import Cases, Frame
    from deepatlas.volume import Volume

ImagesOption = Annotated[Path, typer.Option("-i", "--images", help="Folder of images, any modality.")]
LabelsOption = Annotated[Path, typer.Option("-l", "--labels", help="Folder of label maps named as the images.")]


def train(
    images: ImagesOption,
    labels: LabelsOption,
    output: Annotated[Path, typer.Option("-o", "--output", help="Model folder to write.")],
    labeled: Annotated[
        Path | None, typer.Option("--labeled", help="Use the labels of these only: one exam name a line.")
    ] = None,
    leave_out: Annotated[
        Path | None, typer.Option("--leave-out", help="Images not to train on: one exam name a line.")
    ] = None,
    names: Annotated[
        Path | None, typer.Option("--names", help="JSON, class to number; by default every number there is.")
    ] = None,
    scaling: Annotated[
        str, typer.Option(help='Intensities to 0 ... 1: "percentile", or "LOW:HIGH" such as "-256:256" for CT.')
    ] = "percentile",
    spacing: Annotated[float | None, typer.Option(help="Of the common grid in mm; else the median.", min=0.1)] = None,
    start: Annotated[
        str | None, typer.Option(help="A coordinate map (CT): images are laid on its atlas, however they were cut.")
    ] = None,
    roi: Annotated[str | None, typer.Option(help="With --start: its region or structure that the grid covers.")] = None,
    registration: Annotated[int | None, typer.Option(help="Steps of the registration alone.", min=0)] = None,
    segmentation: Annotated[int | None, typer.Option(help="Steps of the segmentation alone.", min=0)] = None,
    joint: Annotated[int | None, typer.Option(help="Registration steps of the alternation.", min=0)] = None,
    seed: Annotated[int, typer.Option(help="Of all chance.", min=0)] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a training that was stopped.")] = False,
) -> None:
    """Train both networks from a folder of images and whichever labels exist."""
    from dataclasses import replace

    import numpy as np

    from deepatlas import checkpoint, common_grid, files, regseg
    from deepatlas.atlas_grid import AtlasGrid
    from deepatlas.config import REGSEG_CT, RegSeg
    from deepatlas.loop import check_folder

    if (start is None) != (roi is None):
        raise typer.BadParameter("--start and --roi belong together.", param_hint="--roi")
    check_folder(output, resume)  # before minutes of reading
    atlas = AtlasGrid.of(checkpoint.load(checkpoint.find(start)), roi) if start else None
    left = set(files.read_list(leave_out)) if leave_out else set()
    paths = {files.exam_name(path): path for path in files.find_inputs(images)}
    if left - paths.keys():
        raise ExamError(f"Expected images to leave out, found no {sorted(left - paths.keys())[0]}; correct the list.")
    paths = {name: path for name, path in paths.items() if name not in left}
    if not paths:
        raise ExamError(f"Expected images to train on in {images}, but all of them are left out; shorten the list.")
    drawn = {files.exam_name(path): path for path in files.find_exams(labels)}
    wanted = files.read_list(labeled) if labeled else [name for name in paths if name in drawn]
    for name in wanted:
        if name not in paths or name not in drawn:
            lacking = "labels" if name in paths else "image to train on"
            raise LabelError(f"Expected an image and labels of {name}, but it has no {lacking}; correct the list.")
    drawn = {name: drawn[name] for name in wanted}
    steps = {"registration": registration, "segmentation": segmentation, "joint": joint}
    settings = replace(
        REGSEG_CT if atlas else RegSeg(), seed=seed, **{key: value for key, value in steps.items() if value is not None}
    )
    grids, numbers = _seen(paths, drawn)
    classes = files.read_names(names) if names else {f"class_{n}": n for n in sorted(numbers - {0})}
    if not classes:
        raise LabelError("Expected labelled images, found no label above 0; give --labels that hold some.")
    if atlas:
        frame = atlas.frame(spacing or float(np.median([image.spacing_mm.max() for image in grids])), scaling)
    else:
        frame = common_grid.frame_for(grids, spacing, scaling)
    cases = _placed(paths, drawn, frame, tuple(classes.values()), atlas)
    cases, laid = (cases, atlas) if atlas else common_grid.laid_together(cases)
    with training() as report:
        regseg.train(cases, frame, classes, regseg.schedule(cases, settings), output, None, resume, report, laid)
    typer.echo(f"{output}: trained on {len(cases.names)} images, {int(cases.labelled.sum())} of them with labels.")


def _seen(paths: dict[str, Path], drawn: dict[str, Path]) -> "tuple[list[Volume], set[int]]":
    """The grids of all images, without the images, and the numbers in the label maps."""
    import numpy as np

    from deepatlas import files
    from deepatlas.volume import Volume

    grids, numbers = [], set()
    with counting("Looking") as count:
        for done, (name, path) in enumerate(paths.items(), start=1):
            image = files.read_image(path)
            grids.append(Volume(np.broadcast_to(np.float32(0), image.shape), image.affine))
            if name in drawn:
                numbers |= set(np.unique(files.read_labels(drawn[name], like=image).array).tolist())
            count(done, len(paths), name)
    return grids, numbers


def _placed(
    paths: dict[str, Path],
    drawn: dict[str, Path],
    frame: "Frame",
    numbers: tuple[int, ...],
    atlas: "AtlasGrid | None",
) -> "Cases":
    """All images on the grid, read one by one; those that do not lie on the region of an atlas are named."""
    from deepatlas import common_grid, files

    def read(count) -> "Iterator[tuple[str, Volume, Volume | None]]":
        for done, (name, path) in enumerate(paths.items(), start=1):
            yield name, files.read_image(path), files.read_labels(drawn[name]) if name in drawn else None
            count(done, len(paths), name)

    with counting("Reading") as count:
        if not atlas:
            parts = (({name: image}, {name: labels} if labels else {}) for name, image, labels in read(count))
            return common_grid.joined([common_grid.cases_of(*part, frame, numbers) for part in parts])
        cases, left = atlas.cases(read(count), frame, numbers)
    for name, why in left.items():
        typer.echo(f"{name} is left out: {why}", err=True)
    return cases


def register(
    model: ModelOption,
    fixed: Annotated[Path, typer.Option("-f", "--fixed", help="The image whose grid is kept.")],
    moving: Annotated[Path, typer.Option("-v", "--moving", help="The image that is laid over it.")],
    output: OutOption,
    labels: Annotated[Path | None, typer.Option("-l", help="Label map of the moving image, to be moved too.")] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Register two images. Writes moved.nii.gz, displacement.nii.gz (ITK, LPS), jacobian.nii.gz, linear.tfm (ITK) and
    report.json."""
    import numpy as np

    from deepatlas import checkpoint, files, outputs, regseg, transforms

    outputs.claim(outputs.registration_paths(output), overwrite)
    loaded = regseg.load(checkpoint.find(model))
    still, laid = files.read_image(fixed), files.read_image(moving)
    drawn = files.read_labels(labels, like=laid) if labels else None
    at_fixed, at_moving = loaded.place(still), loaded.place(laid)
    there = regseg.register_placed(loaded, at_fixed, at_moving)
    back = regseg.register_placed(loaded, at_moving, at_fixed)
    places = loaded.frame.points_mm(still, at_fixed.pose)[at_fixed.inside]
    apart = transforms.inverse_consistency_mm(there, back, places)
    moved = np.linalg.norm(there.points(places) - places, axis=-1)
    about = {
        "fixed": still.name,
        "moving": laid.name,
        "model": loaded.name,
        "folded": round(transforms.folded(there, still), 6),
        "displacement_mm": _spread(moved),
        "inverse_consistency_mm": _spread(apart),
    }
    outputs.write_registration(output, there, still, laid, drawn, outside=float(laid.array.min()))
    checkpoint.write_text(output / "report.json", json.dumps(about, indent=1))
    typer.echo(
        f"{output}: {about['folded']:.2%} folds, there and back differs by {about['inverse_consistency_mm']['median']} "
        "mm in the median."
    )


def _spread(values) -> dict[str, float]:
    import numpy as np

    return {"median": round(float(np.median(values)), 3), "p95": round(float(np.percentile(values, 95)), 3)}


def segment(
    model: ModelOption,
    inputs: Annotated[Path, typer.Option("-i", "--input", help="An image or a folder of them.")],
    output: OutOption,
    overwrite: OverwriteOption = False,
) -> None:
    """Segment images on their own grids: OUT/<exam>_seg.nii.gz."""
    from deepatlas import checkpoint, files, outputs, regseg

    paths = files.find_inputs(inputs)
    targets = {path: outputs.answer_paths(output, files.exam_name(path))[0] for path in paths}
    outputs.claim(targets.values(), overwrite)
    loaded = regseg.load(checkpoint.find(model))

    def work(path: Path) -> None:
        image = files.read_image(path)
        files.write_labels(targets[path], regseg.segment(loaded, image), image)

    each_exam(paths, work, output if inputs.is_dir() else None, "Segmenting")
    typer.echo(f"{output}: {', '.join(f'{name} {number}' for name, number in loaded.classes.items())}.")


def evaluate(
    model: ModelOption,
    images: ImagesOption,
    labels: LabelsOption,
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON to write.")],
    exams: Annotated[Path | None, typer.Option("--exams", help="Only these: one exam name a line.")] = None,
    pairs: Annotated[
        Path | None, typer.Option("--pairs", help="CSV of moving,fixed; by default --count random ones.")
    ] = None,
    count: Annotated[int | None, typer.Option(help="Random pairs; by default 200.", min=1)] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random pairs; by default 0.", min=0)] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Score segmentation of labelled images and registration of pairs of them."""
    from deepatlas import checkpoint, files, outputs, regseg, regseg_scores

    if pairs and (count, seed) != (None, None):
        raise typer.BadParameter("pairs of a table are not drawn at random.", param_hint="--pairs, --count, --seed")
    outputs.check_file(output, (".json",))
    outputs.claim([output], overwrite)
    loaded = regseg.load(checkpoint.find(model))
    drawn = {files.exam_name(path): path for path in files.find_exams(labels)}
    paths = {files.exam_name(path): path for path in files.find_inputs(images)}
    wanted = files.read_list(exams) if exams else [name for name in paths if name in drawn]
    for name in wanted:
        if name not in paths or name not in drawn:
            raise ExamError(f"Expected an image and labels of {name}, found one of them at most; correct the list.")
    both = {}
    for name in wanted:
        image = files.read_image(paths[name])
        both[name] = (image, files.read_labels(drawn[name], like=image))
    chosen = regseg_scores.read_pairs(pairs) if pairs else regseg_scores.random_pairs(wanted, count or 200, seed or 0)
    unknown = {name for pair in chosen for name in pair} - both.keys()
    if unknown:
        raise ExamError(f"Expected pairs of the labelled exams, got {sorted(unknown)[0]}; correct the list of pairs.")
    regseg_scores.check_classes(loaded, both, chosen)
    with counting("Scoring") as told:
        about = regseg_scores.scores(loaded, both, chosen, told)
    checkpoint.write_text(output, json.dumps(about, indent=1))
    segmented, laid = about["segmentation"], about["registration"]
    typer.echo(
        f"segmentation Dice {_told(segmented['mean'])} over {len(both)} exams, registration Dice "
        f"{_told(laid['mean'])} over {len(chosen)} pairs, {laid['folded']:.3%} folded."
    )


def _told(mean: float | None) -> str:
    return "unknown" if mean is None else f"{mean:.3f}"
