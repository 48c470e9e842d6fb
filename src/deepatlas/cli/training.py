"""Commands that learn: prepare, pretrain, finetune."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deepatlas.cli.options import DeviceOption, ExamsOption
from deepatlas.cli.reading import check_device, choice, label_faults, names_in, table_of_names
from deepatlas.cli.speech import counting, end, training
from deepatlas.errors import DeepAtlasError

if TYPE_CHECKING:
    from deepatlas.cascade import Cutter
    from deepatlas.masks import LabelMaps


NamesOption = Annotated[Path | None, typer.Option(help='JSON, {"larynx": 6, ...}, of --labels.')]
InPartOption = Annotated[
    str | None, typer.Option(help="Structures drawn in part, a,b: nothing is known beyond their drawn slices.")
]
ExcludeOption = Annotated[Path | None, typer.Option(help='JSON, {"larynx": ["exam", ...]}: labels known to be wrong.')]


def prepare(
    inputs: ExamsOption,
    output: Annotated[Path, typer.Option("-o", "--output", help="The cohort to make or to extend, .h5.")],
    size: Annotated[int, typer.Option(help="Voxels along each axis of a prepared exam.", min=8, max=512)] = 128,
    region: Annotated[
        str, typer.Option(help='"body" cuts to the patient, "exam" takes all, "340mm" a fixed cube.')
    ] = "body",
    workers: Annotated[int | None, typer.Option(help="Processes; one per core by default.", min=0)] = None,
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="Cut crops of --roi by this model, for a finer one.")
    ] = None,
    roi: Annotated[str | None, typer.Option(help="Region or structure of the model to cut out.")] = None,
) -> None:
    """Prepare a folder of unlabeled CT exams for training. An interrupted build goes on where it stopped."""
    from deepatlas import outputs, store
    from deepatlas.prepare import fixed_extent_mm

    if (model is None) != (roi is None):
        raise typer.BadParameter("crops need both a model and a region.", param_hint="--model, --roi")
    if model is not None and (region != "body" or workers is not None):
        raise typer.BadParameter("crops are cut by the model, one by one.", param_hint="--region, --workers")
    cut = None
    if model is not None:
        cut = _cutter(model, roi, size)
        region = cut.region.as_text()
    else:
        try:
            fixed_extent_mm(region)
        except DeepAtlasError as error:
            raise typer.BadParameter(str(error), param_hint="--region") from None
    with counting("Preparing") as count:
        report = store.build(inputs, output, size, region, workers, on_progress=count, cut=cut)
    outputs.write_failed(output.with_name(f"{output.name}.failed.json"), report.failed)
    typer.echo(f"{output}: {report.added} exams added, {report.kept} kept, {len(report.failed)} failed.")
    for name, reason in report.repaired.items():
        typer.echo(f"{name}: mended: {reason}.")
    end(report.failed)


def _cutter(model: str, roi: str, size: int) -> "Cutter":
    """What cuts a region out of exams, by a model and those above it."""
    from deepatlas import checkpoint, regions
    from deepatlas.cascade import Cutter

    models = checkpoint.lineage(checkpoint.find(model))
    return Cutter(models, regions.region_of(models[-1], roi), size)


def pretrain(
    cohort: Annotated[Path, typer.Option("-c", "--cohort", help="A cohort made by `deepatlas prepare`.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Model folder to write.")],
    preset: Annotated[
        str | None, typer.Option(help='"cpu", "paper", "finer", "joint" or "demo"; by default cpu, on a GPU paper.')
    ] = None,
    seed_exam: Annotated[str | None, typer.Option(help="Exam that seeds the atlas; by default the widest.")] = None,
    start_from: Annotated[str | None, typer.Option("--from", help="Go on from this trained model.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a training that was stopped.")] = False,
    labels: Annotated[
        Path | None, typer.Option("-l", "--labels", help="Label maps of some exams: learn from them as well.")
    ] = None,
    names: NamesOption = None,
    in_part: InPartOption = None,
    exclude: ExcludeOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Learn the map from a cohort, without any label; with --labels, jointly from images and labels."""
    from deepatlas import checkpoint
    from deepatlas.config import PRESETS
    from deepatlas.loop import check_folder
    from deepatlas.pretrain import pretrain as train

    if (labels is None) != (names is None):
        raise typer.BadParameter("labels need their table of names.", param_hint="--labels, --names")
    if labels is None and (in_part or exclude):
        raise typer.BadParameter("say something about labels; give --labels.", param_hint="--in-part, --exclude")
    preset = preset or ("cpu" if device == "cpu" else "paper")
    choice("--preset", preset, tuple(PRESETS))
    check_device(device)
    base = checkpoint.find(start_from) if start_from else None
    check_folder(output, resume)  # before minutes of reading
    drawn = _drawn(cohort, labels, names, in_part, exclude) if labels is not None else None
    with training() as report:
        model = train(cohort, output, PRESETS[preset], seed_exam, base, resume, device, report, drawn)
    typer.echo(f"{output}: trained with preset {preset} on seed exam {model.seed_exam}.")


def _drawn(cohort: Path, labels: Path, names: Path, in_part: str | None, exclude: Path | None) -> "LabelMaps":
    """Read the label maps of a cohort."""
    from deepatlas import masks, store

    def exams() -> list[str]:
        with store.Cohort(cohort) as opened:
            return opened.names

    faults = label_faults(exclude, names, exams)
    with counting("Reading labels") as count:
        drawn = masks.read(cohort, labels, table_of_names(names, None), names_in(in_part), faults, count)
    typer.echo(f"Labels: {drawn}.")
    return drawn


def finetune(
    cohort: Annotated[Path, typer.Option("-c", "--cohort", help="The cohort that the model learned from, or another.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Model folder to write.")],
    start_from: Annotated[str, typer.Option("--from", help="The trained map, with these structures defined.")],
    labels: Annotated[Path, typer.Option("-l", "--labels", help="Label maps of some of the cohort's exams.")],
    names: Annotated[Path, typer.Option(help='JSON, {"larynx": 6, ...}, of --labels.')],
    in_part: InPartOption = None,
    exclude: ExcludeOption = None,
    steps: Annotated[int | None, typer.Option(help="Steps; by default 3000.", min=1)] = None,
    shape: Annotated[
        tuple[int, int, int] | None, typer.Option(help="Voxels of the head's grid along R, A, S; by default the map's.")
    ] = None,
    mirrored: Annotated[
        bool, typer.Option("--mirrored", help="Every other step left and right change places, also in names.")
    ] = False,
    mixed: Annotated[
        bool, typer.Option("--mixed", help="Compute in bfloat16: faster on a GPU or a processor with AMX.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a training that was stopped.")] = False,
    device: DeviceOption = "cpu",
) -> None:
    """Train a supervised segmentation on top of a map: `locate` draws these structures by it then."""
    from dataclasses import replace

    from deepatlas import checkpoint
    from deepatlas.config import FineTuning
    from deepatlas.finetune import finetune as train
    from deepatlas.loop import check_folder

    if shape is not None and not 8 <= min(shape) <= max(shape) <= 512:
        raise typer.BadParameter("give 8 to 512 voxels along each axis.", param_hint="--shape")
    check_device(device)
    base = checkpoint.find(start_from)
    check_folder(output, resume)  # before minutes of reading
    drawn = _drawn(cohort, labels, names, in_part, exclude)
    settings = FineTuning(shape=shape, mirrored=mirrored, mixed=mixed)
    settings = settings if steps is None else replace(settings, steps=steps)
    with training() as report:
        model = train(cohort, output, base, drawn, settings, resume, device, report)
    typer.echo(f"{output}: draws {', '.join(model.segmented)}.")
