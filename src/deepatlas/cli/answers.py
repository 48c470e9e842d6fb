"""Commands that answer about exams: locate, embed, atlas, evaluate."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deepatlas.cli.options import (
    DeviceOption,
    ExamOption,
    ExamsOption,
    ListOption,
    ModelOption,
    NamesOption,
    OutOption,
    OverwriteOption,
    RefineOption,
)
from deepatlas.cli.reading import load, names_in, read_json
from deepatlas.cli.speech import counting, end
from deepatlas.errors import DeepAtlasError, StructureError

if TYPE_CHECKING:
    from deepatlas.locate import Found


def locate(
    model: ModelOption,
    inputs: ExamsOption,
    output: OutOption,
    structures: ListOption = None,
    refined: RefineOption = False,
    overwrite: OverwriteOption = False,
    device: DeviceOption = "cpu",
) -> None:
    """Find structures in an exam, or in every exam of a folder, on the exam's own grid.

    Writes `<exam>_seg.nii.gz` and `<exam>.json`; what failed stands in `failed.json`.
    """
    from deepatlas import checkpoint, files, outputs
    from deepatlas.locate import embed as embed_exam
    from deepatlas.locate import locate as find
    from deepatlas.refine import refine

    paths = files.find_exams(inputs)
    loaded = load(checkpoint.find(model), device)
    wanted = names_in(structures) or list(loaded.structures)
    if not wanted:
        raise StructureError(f"The model {loaded.name} knows no structure yet; teach it with `deepatlas define`.")
    outputs.check_numbers((name, loaded.structure(name).label) for name in wanted)
    outputs.claim((p for path in paths for p in outputs.answer_paths(output, files.exam_name(path))), overwrite)
    lines: list[str] = []

    def work(path: Path) -> None:
        exam = files.read_exam(path)
        embedded = embed_exam(loaded, exam)
        found = find(loaded, exam, wanted, refine(loaded, exam, embedded) if refined else embedded)
        outputs.write_answer(output, exam, found, loaded)
        lines.extend(_answer_lines(exam.name, found, alone=len(paths) == 1))
        lines.extend(f"{exam.name}: mended: {repair}" for repair in exam.repairs)

    with counting("Locating") as count:
        failed = outputs.each(paths, work, count)
    for line in lines:
        typer.echo(line)
    outputs.write_failed(output / "failed.json", failed, [files.exam_name(path) for path in paths])
    if failed and inputs.is_file():
        raise DeepAtlasError(*failed.values())
    end(failed)


def embed(
    model: ModelOption,
    inputs: ExamOption,
    output: OutOption,
    mm: Annotated[bool, typer.Option("--mm", help="In mm of the seed exam instead of atlas units.")] = False,
    overwrite: OverwriteOption = False,
    device: DeviceOption = "cpu",
) -> None:
    """Write the map itself: the coordinate of every voxel, `<exam>_coords.nii.gz`, float32, three channels (R, A, S).

    Voxels beyond the patient's box, which are air or table, hold the coordinate of the nearest point of the box.
    """
    from deepatlas import checkpoint, dense, files, outputs

    target = output / f"{files.exam_name(inputs)}_coords.nii.gz"
    exam = files.read_exam(inputs)
    loaded = load(checkpoint.find(model), device)
    outputs.claim([target], overwrite)
    files.write_image(target, dense.coordinates(loaded, exam, mm), exam)
    typer.echo(f"{target}: coordinates in {'mm of the seed exam' if mm else 'atlas units, -1 to +1'}.")


def atlas(
    model: ModelOption,
    output: Annotated[Path, typer.Option("-o", "--output", help="NIfTI file to write.")],
    inputs: Annotated[Path | None, typer.Option("-i", "--input", help="Align the atlas to this exam.")] = None,
    overwrite: OverwriteOption = False,
    device: DeviceOption = "cpu",
) -> None:
    """Write the learned atlas, HU from -256 to 256: alone or aligned to an exam.

    Alone it lies in mm of its seed exam, aligned on the exam's own grid.
    """
    from deepatlas import checkpoint, dense, files, outputs

    exam = files.read_exam(inputs) if inputs else None
    loaded = load(checkpoint.find(model), device)
    outputs.claim([output], overwrite)
    if exam is None:
        exam = files.as_exam(dense.atlas_volume(loaded), "atlas")
        files.write_image(output, exam.array, exam)
        typer.echo(f"{output}: the atlas, in mm of its seed exam {loaded.seed_exam}.")
    else:
        files.write_image(output, dense.aligned_atlas(loaded, exam), exam)
        typer.echo(f"{output}: the atlas aligned to {exam.name}.")


def evaluate(
    predictions: Annotated[Path, typer.Option("-p", "--predictions", help="Folder of <exam>_seg.nii.gz.")],
    truth: Annotated[Path, typer.Option("-t", "--truth", help="Folder of label maps, <exam>.nii.gz.")],
    names: NamesOption,
    output: Annotated[Path, typer.Option("-o", "--output", help="Results, .json; a CSV goes beside it.")],
    against: Annotated[Path | None, typer.Option(help="Results to compare with: paired differences.")] = None,
    exclude: Annotated[
        Path | None, typer.Option(help='JSON of label faults to leave out: {"larynx": ["pt_206"]}.')
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Score label maps against ground truth: Dice and HD95 per exam and structure, means with intervals."""
    from deepatlas import evaluate as scoring
    from deepatlas import files, outputs

    table = files.read_names(names)
    left_out = read_json(exclude, dict) if exclude else None
    other = scoring.read_results(against) if against else None
    outputs.claim([output], overwrite)
    results = scoring.evaluate(predictions, truth, table, left_out)
    if other is not None:
        results["against"] = scoring.against(results, other)
    scoring.write_results(results, output)
    typer.echo(scoring.table(results), nl=False)


def _answer_lines(name: str, found: dict[str, "Found"], alone: bool) -> list[str]:
    """What was found in an exam: a line per structure for a single exam, else one line."""
    if not alone:
        states = [one.status for one in found.values()]
        counts = [f"{states.count(state)} {state.replace('_', ' ')}" for state in ("present", "cut_off", "absent")]
        return [f"{name}: {', '.join(counts)}"]
    width = max(map(len, found))
    lines = []
    for one in found.values():
        line = f"{one.name:<{width}}  {one.status.replace('_', ' '):<7}  coverage {one.coverage:4.0%}"
        if one.mask is not None:
            line += f"  confidence {one.confidence:4.0%}  {one.volume_ml:8.1f} ml"
        lines.append(line)
    return lines
