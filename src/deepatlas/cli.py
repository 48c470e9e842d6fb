"""The command line: reads, calls, writes. Results go to stdout, progress and errors to stderr.

Exit codes: 0 ok, 1 refused (one line says why), 2 usage, 3 some exams failed (`OUT/failed.json` says which).
PyTorch and the rest are imported inside the commands, so that `--help` does not wait for them.
"""

import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import deepatlas
from deepatlas.errors import DeepAtlasError, LabelError, ModelError, StructureError

if TYPE_CHECKING:
    from deepatlas.checkpoint import Model
    from deepatlas.locate import Found
    from deepatlas.pretrain import Progress

SOME_FAILED = 3
SETTINGS = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    help="An anatomical coordinate for every voxel, learned from unlabeled CT: mark a structure once, find it in "
    "every exam. MODEL is a folder, or the name of a model that came with the program (`deepatlas models`).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=SETTINGS,
)
structures_app = typer.Typer(help="List, rename or remove the structures of a model.", no_args_is_help=True)
app.add_typer(structures_app, name="structures")

ModelOption = Annotated[str, typer.Option("-m", "--model", help="Model folder or shipped name.")]
ModelFolder = Annotated[str, typer.Option("-m", "--model", help="Model folder.")]
ExamsOption = Annotated[Path, typer.Option("-i", "--input", help="An exam (.nii, .nii.gz) or a folder of them.")]
ExamOption = Annotated[Path, typer.Option("-i", "--input", help="An exam (.nii, .nii.gz).")]
OutOption = Annotated[Path, typer.Option("-o", "--output", help="Folder for the results.")]
NamesOption = Annotated[Path, typer.Option("--names", help='JSON, structure to number: {"larynx": 6}.')]
ListOption = Annotated[str | None, typer.Option("--structures", help="Only these, separated by commas.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist.")]
DeviceOption = Annotated[str, typer.Option("--device", help='Where the network runs: "cpu", "cuda".')]
RefineOption = Annotated[bool, typer.Option("--refine", help="Fit each map to its exam first: better, seconds each.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and end the process with its exit code."""
    warnings.filterwarnings("ignore", module=r"deepatlas\..*")  # what was repaired stands in the answer
    try:
        app(arguments, prog_name="deepatlas")
    except DeepAtlasError as error:
        _complain(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _complain(f"{where}{error.strerror or error}; check the path, the rights and the space.")
    except MemoryError:
        _complain("Out of memory; crop or coarsen the exam, or use a machine with more.")
    sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"deepatlas {deepatlas.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


# --- training ---------------------------------------------------------------------------------------------------------


@app.command()
def prepare(
    inputs: ExamsOption,
    output: Annotated[Path, typer.Option("-o", "--output", help="The cohort to make or to extend, .h5.")],
    size: Annotated[int, typer.Option(help="Voxels along each axis of a prepared exam.", min=8, max=512)] = 128,
    region: Annotated[
        str, typer.Option(help='"body" cuts to the patient, "exam" takes all, "340mm" a fixed cube.')
    ] = "body",
    workers: Annotated[int | None, typer.Option(help="Processes; one per core by default.", min=0)] = None,
) -> None:
    """Prepare a folder of unlabeled CT exams for training. An interrupted build goes on where it stopped."""
    from deepatlas import outputs, store
    from deepatlas.prepare import fixed_extent_mm

    try:
        fixed_extent_mm(region)
    except DeepAtlasError as error:
        raise typer.BadParameter(str(error), param_hint="--region") from None
    with _counting("Preparing") as count:
        report = store.build(inputs, output, size, region, workers, on_progress=count)
    outputs.write_failed(output.with_name(f"{output.name}.failed.json"), report.failed)
    typer.echo(f"{output}: {report.added} exams added, {report.kept} kept, {len(report.failed)} failed.")
    for name, reason in report.repaired.items():
        typer.echo(f"{name}: mended: {reason}.")
    _end(report.failed)


@app.command()
def pretrain(
    cohort: Annotated[Path, typer.Option("-c", "--cohort", help="A cohort made by `deepatlas prepare`.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Model folder to write.")],
    preset: Annotated[
        str | None, typer.Option(help='"cpu", "paper" or "demo"; by default cpu, on a GPU paper.')
    ] = None,
    seed_exam: Annotated[str | None, typer.Option(help="Exam that seeds the atlas; by default the widest.")] = None,
    start_from: Annotated[str | None, typer.Option("--from", help="Go on from this trained model.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a training that was stopped.")] = False,
    device: DeviceOption = "cpu",
) -> None:
    """Learn the map from a cohort, without any label."""
    from deepatlas import checkpoint
    from deepatlas.config import PRESETS
    from deepatlas.pretrain import pretrain as train

    preset = preset or ("cpu" if device == "cpu" else "paper")
    _choice("--preset", preset, tuple(PRESETS))
    _check_device(device)
    base = checkpoint.find(start_from) if start_from else None
    with _training() as report:
        model = train(cohort, output, PRESETS[preset], seed_exam, base, resume, device, report)
    typer.echo(f"{output}: trained with preset {preset} on seed exam {model.seed_exam}.")


@app.command()
def define(
    model: ModelFolder,
    inputs: ExamsOption,
    labels: Annotated[Path, typer.Option("-l", "--labels", help="Label map of the exam, or a folder of them.")],
    names: NamesOption,
    structures: ListOption = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the extended model here and leave MODEL as it is.")
    ] = None,
    exclude: Annotated[
        Path | None, typer.Option(help='JSON of label faults to leave out: {"larynx": ["pt_206"]}.')
    ] = None,
    refined: RefineOption = False,
) -> None:
    """Store structures in a model's library, from one labelled exam or from several.

    In folders, the label map of an exam has its name, or its name and `_seg`.
    """
    from deepatlas import checkpoint, outputs
    from deepatlas.library import define_files

    folder = checkpoint.find(model)
    target = output or _own(folder)
    if output is not None:
        outputs.claim([output / "model.json"], overwrite=False)
    table = _table_of_names(names, structures)
    faults = _read_json(exclude, dict) if exclude else None
    base = checkpoint.load(folder)
    with _counting("Reading") as count:
        made = define_files(
            base, inputs, labels, table, required=structures is not None, exclude=faults, refined=refined, on_done=count
        )
    if output is None:
        checkpoint.save_structures(made.model, target)
    else:
        checkpoint.save(made.model, target)
    outputs.write_failed(target / "failed.json", made.failed)
    for name in made.defined:
        one = made.model.structures[name]
        typer.echo(f"{name}: number {one.label}, from {one.exams} exam{'s' * (one.exams > 1)}.")
    if made.undrawn:
        typer.echo(f"Not drawn in any exam, left out: {', '.join(made.undrawn)}.")
    _end(made.failed)


@structures_app.command("list")
def list_structures(model: ModelOption, as_json: JsonOption = False) -> None:
    """List the structures of a model."""
    from deepatlas import checkpoint

    about = checkpoint.describe(checkpoint.find(model))
    if as_json:
        typer.echo(json.dumps({one["name"]: one["label"] for one in about["structures"]}))
        return
    for one in about["structures"]:
        typer.echo(f"{one['label']:>5}  {one['name']}  (exams: {one['exams']})")


@structures_app.command("rename")
def rename_structure(
    old: Annotated[str, typer.Argument(help="Its name now.")],
    new: Annotated[str, typer.Argument(help="Its new name.")],
    model: ModelFolder,
) -> None:
    """Rename a structure; its place in the library and its number stay."""
    from deepatlas import checkpoint
    from deepatlas.library import renamed

    folder = _own(checkpoint.find(model))
    checkpoint.save_structures(renamed(checkpoint.load(folder), old, new), folder)
    typer.echo(f"{old} is {new} now.")


@structures_app.command("remove")
def remove_structures(
    names: Annotated[list[str], typer.Argument(help="Structures to remove.")], model: ModelFolder
) -> None:
    """Remove structures from a model."""
    from deepatlas import checkpoint

    folder = _own(checkpoint.find(model))
    kept = checkpoint.load(folder)
    for name in dict.fromkeys(names):
        kept = kept.without(name)
    checkpoint.save_structures(kept, folder)
    typer.echo(f"Removed {', '.join(names)}.")


@app.command()
def export(
    model: ModelOption,
    output: Annotated[Path, typer.Option("-o", "--output", help="Model folder to write.")],
    overwrite: OverwriteOption = False,
) -> None:
    """Copy a model for shipping: weights in half precision, the library, no state of the training."""
    from deepatlas import checkpoint, outputs

    loaded = checkpoint.load(checkpoint.find(model))
    outputs.claim([output / "model.json"], overwrite)
    checkpoint.save(loaded, output, half=True)
    size = sum(path.stat().st_size for path in output.glob("*") if path.is_file())
    typer.echo(f"{output}: {size / 1e6:.1f} MB.")


# --- answers ----------------------------------------------------------------------------------------------------------


@app.command()
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
    loaded = _load(checkpoint.find(model), device)
    wanted = _wanted(structures) or list(loaded.structures)
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

    with _counting("Locating") as count:
        failed = outputs.each(paths, work, count)
    for line in lines:
        typer.echo(line)
    outputs.write_failed(output / "failed.json", failed, [files.exam_name(path) for path in paths])
    if failed and inputs.is_file():
        raise DeepAtlasError(*failed.values())
    _end(failed)


@app.command()
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
    loaded = _load(checkpoint.find(model), device)
    outputs.claim([target], overwrite)
    files.write_image(target, dense.coordinates(loaded, exam, mm), exam)
    typer.echo(f"{target}: coordinates in {'mm of the seed exam' if mm else 'atlas units, -1 to +1'}.")


@app.command()
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
    loaded = _load(checkpoint.find(model), device)
    outputs.claim([output], overwrite)
    if exam is None:
        exam = files.as_exam(dense.atlas_volume(loaded), "atlas")
        files.write_image(output, exam.array, exam)
        typer.echo(f"{output}: the atlas, in mm of its seed exam {loaded.seed_exam}.")
    else:
        files.write_image(output, dense.aligned_atlas(loaded, exam), exam)
        typer.echo(f"{output}: the atlas aligned to {exam.name}.")


@app.command()
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
    left_out = _read_json(exclude, dict) if exclude else None
    other = scoring.read_results(against) if against else None
    outputs.claim([output], overwrite)
    results = scoring.evaluate(predictions, truth, table, left_out)
    if other is not None:
        results["against"] = scoring.against(results, other)
    scoring.write_results(results, output)
    typer.echo(scoring.table(results), nl=False)


# --- models and phantoms ----------------------------------------------------------------------------------------------


@app.command()
def models(as_json: JsonOption = False) -> None:
    """List the models that came with the program."""
    from deepatlas import checkpoint

    rows = []
    for folder in checkpoint.shipped():
        about = checkpoint.describe(folder)
        structures = [one["name"] for one in about["structures"]]
        rows.append({"name": folder.name, "version": about["version"], "structures": structures})
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for row in rows:
        typer.echo(f"{row['name']} (version {row['version']}): {', '.join(row['structures']) or 'no structures'}")
    if not rows:
        typer.echo("No model came with the program; train one with `deepatlas pretrain`.")


@app.command()
def info(model: Annotated[str, typer.Argument(help="Folder or shipped name.")], as_json: JsonOption = False) -> None:
    """Describe a model: its sizes, its seed exam, its structures."""
    from deepatlas import checkpoint

    loaded = checkpoint.load(checkpoint.find(model))
    about: dict[str, Any] = {
        "name": loaded.name,
        "version": checkpoint.VERSION,
        "parameters": sum(p.numel() for p in loaded.network.parameters()),
        "size": loaded.size,
        "region": loaded.region,
        "level": loaded.level,
        "seed_exam": loaded.seed_exam,
        "structures": [{"name": s.name, "label": s.label, "exams": s.exams} for s in loaded.structures.values()],
    }
    if as_json:
        typer.echo(json.dumps(about))
        return
    names = [f"{one['name']} ({one['label']})" for one in about.pop("structures")]
    for key, value in about.items():
        typer.echo(f"{key:<11} {value}")
    typer.echo(f"structures  {', '.join(names) or 'none'}")


@app.command()
def phantoms(
    output: OutOption,
    count: Annotated[int, typer.Option("-n", "--count", help="How many exams.", min=1, max=999)] = 24,
    seed: Annotated[int, typer.Option(help="The same seed gives the same exams.", min=0)] = 0,
    overwrite: OverwriteOption = False,
) -> None:
    """Write procedural CT exams with known anatomy: images/, labels/ and labels.json."""
    from deepatlas import outputs, phantom

    outputs.claim([output / "labels.json"], overwrite)
    phantom.write_cohort(output, count, seed)
    typer.echo(f"{output}: {count} exams in images/, their {len(phantom.STRUCTURES)} structures in labels/.")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for everything it makes.")] = Path("demo"),
    overwrite: OverwriteOption = False,
) -> None:
    """Show the whole path on phantoms: train, mark structures once, find them in unseen exams, write a report."""
    from deepatlas import demo as show
    from deepatlas import outputs

    outputs.claim([output / part for part in show.PARTS], overwrite)
    with _training() as report:
        shown = show.run(output, on_stage=_say, on_progress=report)
    for line in show.summary(shown):
        typer.echo(line)
    typer.echo(f"Report: {output / 'report.html'}")


# --- how commands talk ------------------------------------------------------------------------------------------------


def _say(line: str) -> None:
    """A line about the work, not a result."""
    typer.echo(line, err=True)


def _complain(message: str) -> None:
    _say(f"error: {' '.join(message.split())}")


def _end(failed: dict[str, str]) -> None:
    """Say which exams failed, and end with the exit code for that."""
    for name, reason in failed.items():
        _say(f"failed: {name}: {' '.join(reason.split())}")
    if failed:
        raise typer.Exit(SOME_FAILED)


@contextmanager
def _counting(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A function that shows how far a folder is: a bar on a terminal, plain lines elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done, total, name: _say(f"{title} {done}/{total} {name}")
        return
    with _bar() as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total, description=f"{title} {name}")


@contextmanager
def _training() -> Iterator[Callable[["Progress"], None]]:
    """A function that shows how far a training is: a bar on a terminal, a line every half minute elsewhere."""
    if not sys.stderr.isatty():
        spoken = [-30.0]

        def line(at: "Progress") -> None:
            if time.monotonic() - spoken[0] >= 30 or at.done == at.total:
                spoken[0] = time.monotonic()
                _say(f"{at.done}/{at.total} {_training_words(at)}, {at.seconds_left:.0f} s left")

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


# --- how commands read ------------------------------------------------------------------------------------------------


def _choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(choices)}.", param_hint=option)


def _check_device(device: str) -> None:
    """Refuse a device that is not there."""
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ModelError(f"Expected a device of this machine, got {device!r}; take --device cpu.") from None


def _load(folder: Path, device: str) -> "Model":
    """A model with its network on a device."""
    from deepatlas import checkpoint

    _check_device(device)
    model = checkpoint.load(folder)
    model.network.to(device)
    return model


def _own(folder: Path) -> Path:
    """A model folder that may be changed: not one that came with the program."""
    from deepatlas import checkpoint

    if folder.resolve() in [path.resolve() for path in checkpoint.shipped()]:
        raise ModelError(
            f"{folder.name} came with the program and is not changed; copy {folder} and give the copy, "
            "or define with -o NEW_FOLDER."
        )
    return folder


def _wanted(structures: str | None) -> list[str]:
    """Names from a list with commas, each once."""
    return list(dict.fromkeys(filter(None, (name.strip() for name in (structures or "").split(",")))))


def _table_of_names(path: Path, structures: str | None) -> dict[str, int]:
    """The table of label names, or the part of it that was asked for."""
    from deepatlas import files

    table = files.read_names(path)
    wanted = _wanted(structures) or list(table)
    unknown = [name for name in wanted if name not in table]
    if unknown:
        raise StructureError(f"{path.name} has no structure {unknown[0]!r}; it has: {', '.join(table)}.")
    return {name: table[name] for name in wanted}


def _read_json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LabelError(f"Expected JSON in {path}, but it cannot be read ({error}); mend the file.") from None
    if not isinstance(value, kind):
        raise LabelError(f"Expected a JSON {kind.__name__} in {path.name}, got {type(value).__name__}; mend the file.")
    return value
