"""Commands that answer about exams: locate, propose, vote, embed, atlas, evaluate."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from deepatlas.cli.options import (
    CascadeOption,
    CopiesOption,
    DeviceOption,
    ExamOption,
    ExamsOption,
    ListOption,
    ModelOption,
    NamesOption,
    OrientOption,
    OutOption,
    OverwriteOption,
    RefineOption,
)
from deepatlas.cli.reading import exam_names, label_faults, load, mapped, names_in, table_of_names
from deepatlas.cli.speech import UNLIKE, counting, each_exam, end, say
from deepatlas.errors import DeepAtlasError, ModelError, StructureError

if TYPE_CHECKING:
    from deepatlas.found import Found


def locate(
    model: ModelOption,
    inputs: ExamsOption,
    output: OutOption,
    structures: ListOption = None,
    refined: RefineOption = False,
    copies: CopiesOption = 0,
    orient: OrientOption = False,
    cascade: CascadeOption = False,
    pictured: Annotated[bool, typer.Option("--report", help="Write report.html too: pictures and a table.")] = False,
    overwrite: OverwriteOption = False,
    resume: Annotated[bool, typer.Option("--resume", help="Pass over exams that were answered already.")] = False,
    device: DeviceOption = "cpu",
) -> None:
    """Find structures in an exam, or in every exam of a folder, on the exam's own grid.

    Writes `<exam>_seg.nii.gz` and `<exam>.json`; what failed stands in `failed.json`.
    """
    if resume and (overwrite or pictured):
        raise typer.BadParameter("Give it without --overwrite and --report.", param_hint="--resume")
    page = output / "report.html" if pictured else None
    care = Care(refined, copies, orient)
    _answer(model, inputs, output, structures, care, cascade, overwrite, device, page, resume=resume)


def propose(
    model: ModelOption,
    inputs: ExamsOption,
    output: OutOption,
    structures: ListOption = None,
    refined: RefineOption = False,
    copies: CopiesOption = 0,
    orient: OrientOption = False,
    cascade: CascadeOption = False,
    overwrite: OverwriteOption = False,
    device: DeviceOption = "cpu",
) -> None:
    """Write masks to be corrected by hand, and `review.csv`, what to look at first: the lowest confidence on top.

    Corrected masks go back through `deepatlas define -i FOLDER -l OUT`.
    """
    from deepatlas import outputs

    outputs.claim([output / "review.csv"], overwrite)
    answers = _answer(
        model, inputs, output, structures, Care(refined, copies, orient), cascade, overwrite, device, failing=False
    )
    outputs.write_review(output / "review.csv", answers.found)
    typer.echo(f"{output / 'review.csv'}: {sum(map(len, answers.found.values()))} structures, the least sure first.")
    end(answers.failed)


def vote(
    model: ModelOption,
    inputs: ExamsOption,
    examples: Annotated[Path, typer.Option("-e", "--examples", help="Labelled exams that vote.")],
    labels: Annotated[Path, typer.Option("-l", "--labels", help="Their label maps, by the same names.")],
    names: NamesOption,
    output: OutOption,
    structures: ListOption = None,
    exclude: Annotated[
        Path | None, typer.Option(help='JSON of label faults to leave out: {"larynx": ["pt_206"]}.')
    ] = None,
    refined: Annotated[bool, typer.Option("--refine", help="Fit each example to each exam, seconds a pair.")] = False,
    overwrite: OverwriteOption = False,
    device: DeviceOption = "cpu",
) -> None:
    """Find structures by the votes of labelled exams, each laid over the exam, weighted by how alike they look there.

    The model's library says whether a structure is there; it must know it (`deepatlas define`).
    """
    from deepatlas import checkpoint, files, library, outputs
    from deepatlas import vote as voting
    from deepatlas.config import FINE
    from deepatlas.embedding import familiar
    from deepatlas.prepare import Prepared, prepare

    paths = files.find_inputs(inputs)
    loaded = load(checkpoint.find(model), device)
    table = {name: number for name, number in table_of_names(names, structures).items() if loaded.structure(name)}
    faults = label_faults(exclude, names, lambda: exam_names(examples))
    outputs.claim((p for path in paths for p in outputs.answer_paths(output, files.exam_name(path))), overwrite)

    def fine(exam: files.Exam) -> Prepared | None:
        return prepare(exam, FINE.size, loaded.region) if refined else None

    voters = []
    with counting("Reading") as count:
        pairs = library.pair(examples, labels)
        for done, (exam_path, label_path) in enumerate(pairs, start=1):
            exam = files.read_exam(exam_path)
            drawn = library.without_faults(files.read_labels(label_path, like=exam), exam.name, table, faults)
            voters.append(voting.Voter(mapped(loaded, exam)[0], drawn, fine(exam)))
            count(done, len(pairs), exam.name)

    def work(path: Path) -> None:
        exam = files.read_exam(path)
        embedded = mapped(loaded, exam)[0]
        known = familiar(loaded, embedded)
        if not known:
            say(f"{exam.name}: {UNLIKE}")
        found = voting.locate_by_vote(loaded, exam, embedded, voters, table, fine(exam))
        outputs.write_answer(output, exam, found, loaded, known)

    each_exam(paths, work, output if inputs.is_dir() else None, "Locating")


class Care(NamedTuple):
    """How the map of an exam is made."""

    refined: bool
    copies: int
    orient: bool


class Answers(NamedTuple):
    """What was found in every exam, and what failed."""

    found: dict[str, dict[str, "Found"]]
    failed: dict[str, str]


def _answer(
    model: str,
    inputs: Path,
    output: Path,
    structures: str | None,
    care: Care,
    cascade: bool,
    overwrite: bool,
    device: str,
    page: Path | None = None,
    failing: bool = True,
    resume: bool = False,
) -> Answers:
    """Locate in every exam and write the answers, with pictures on a page where one is wanted; ends with the exit code
    for what failed unless told otherwise. To resume is to pass over exams whose JSON, which is written last, exists,
    unless the list of what failed has them: then the JSON is of an earlier run."""
    from deepatlas import checkpoint, dense, files, outputs
    from deepatlas.embedding import familiar
    from deepatlas.locate import locate as find

    if page:  # pictures take half a second to import
        from deepatlas import report
    if cascade:
        from deepatlas.cascade import locate as find
    paths = files.find_inputs(inputs)
    loaded = load(checkpoint.find(model), device)
    wanted = names_in(structures) or list(loaded.structures)
    if cascade and not loaded.finer:
        raise ModelError(
            f"The model {loaded.name} has no finer model to look closer with; train one on crops of a region "
            "(`deepatlas prepare --roi`), or leave out --cascade."
        )
    if not wanted:
        raise StructureError(f"The model {loaded.name} knows no structure yet; teach it with `deepatlas define`.")
    outputs.check_numbers((name, loaded.structure(name).label) for name in wanted)
    answers_at = {path: outputs.answer_paths(output, files.exam_name(path)) for path in paths}
    if resume:
        again = outputs.read_failed(output / "failed.json")
        paths = [p for p, (_, about) in answers_at.items() if not about.exists() or files.exam_name(p) in again]
    outputs.claim([*(p for path in paths for p in answers_at[path]), *([page] if page else [])], overwrite or resume)
    lines: list[str] = []
    shown: list[str] = []
    answers = Answers({}, {})

    def work(path: Path) -> None:
        exam = files.read_exam(path)
        embedded, notes = mapped(loaded, exam, *care)
        exam = replace(exam, repairs=(*exam.repairs, *notes))
        found = find(loaded, exam, wanted, embedded)
        known = familiar(loaded, embedded)
        outputs.write_answer(output, exam, found, loaded, known)
        answers.found[exam.name] = {name: one.without_mask() for name, one in found.items()}
        lines.extend(_answer_lines(exam.name, found, alone=len(paths) == 1))
        lines.extend([] if known else [f"{exam.name}: {UNLIKE}"])
        lines.extend(f"{exam.name}: mended: {repair}" for repair in exam.repairs)
        if page:
            shown.append(report.answer(exam, found, dense.aligned_atlas(loaded, exam, embedded)))

    with counting("Locating") as count:
        failed = outputs.each(paths, work, count)
    if page and shown:
        report.write(page, f"{loaded.name}: what was found", shown)
        lines.append(f"Report: {page}")
    elif overwrite and answers.found:
        (output / "report.html").unlink(missing_ok=True)  # it showed the answers before these
    for line in lines:
        typer.echo(line)
    outputs.write_failed(output / "failed.json", failed, [files.exam_name(path) for path in answers_at])
    if failed and inputs.is_file():
        raise DeepAtlasError(*failed.values())
    answers.failed.update(failed)
    if failing:
        end(failed)
    return answers


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

    outputs.check_file(output, files.SUFFIXES)
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
    left_out = label_faults(exclude, names, lambda: exam_names(truth))
    other = scoring.read_results(against) if against else None
    outputs.claim([output, scoring.beside(output)], overwrite)
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
