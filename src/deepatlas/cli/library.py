"""Commands about models and what they know: define, structures, export, models, info."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deepatlas.cli.options import (
    ExamsOption,
    JsonOption,
    ListOption,
    ModelFolder,
    ModelOption,
    NamesOption,
    OverwriteOption,
    RefineOption,
)
from deepatlas.cli.reading import exam_names, label_faults, own, table_of_names
from deepatlas.cli.speech import counting, end
from deepatlas.errors import ModelError, StructureError

if TYPE_CHECKING:
    from deepatlas import checkpoint, regseg

MANY = 12
"""More regions or landmarks than this are counted by `info` instead of named."""


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
    learn: Annotated[
        bool, typer.Option("--learn", help="Learn also how structures look that ten exams or more show: a minute each.")
    ] = False,
) -> None:
    """Store structures in a model's library, from one labelled exam or from several.

    In folders, the label map of an exam has its name, or its name and `_seg`.
    """
    from deepatlas import checkpoint, outputs
    from deepatlas.config import Classifying
    from deepatlas.library import define_files

    folder = checkpoint.find(model)
    target = output or own(folder)
    if output is not None:
        if (output / "model.json").exists():
            raise ModelError(f"{output} holds a model already; choose another folder, or extend that one by -m.")
        outputs.claim([output / "model.json"], overwrite=False)
    table = table_of_names(names, structures)
    faults = label_faults(exclude, names, lambda: exam_names(inputs))
    base = checkpoint.load(folder)
    with counting("Defining") as count:
        made = define_files(base, inputs, labels, table, structures is not None, faults, refined, learn, count)
    if output is None:
        checkpoint.save_structures(made.model, target)
    else:
        checkpoint.save(made.model, target)
    outputs.write_failed(target / "failed.json", made.failed)
    for name in made.defined:
        one = made.model.structures[name]
        typer.echo(f"{name}: number {one.label}, from {one.exams} exam{'s' * (one.exams > 1)}.")
    for look in made.looks:
        kept = "kept" if look.structure.classifier else "not kept"
        scores = f"Dice {look.learned:.3f} by its look, {look.alone:.3f} by the map alone"
        typer.echo(f"{look.structure.name}: {scores}: {kept}.")
    tried = {look.structure.name for look in made.looks}
    if learn and (few := [name for name in made.defined if name not in tried]):
        typer.echo(f"No look, which needs {Classifying.least_exams} exams that show the structure: {', '.join(few)}.")
    looks = {name for name, one in base.structures.items() if one.classifier is not None}
    if lost := sorted(name for name in looks if made.model.structures[name].classifier is None):
        typer.echo(f"Drawn by the mask again, the look was that of the old drawing: {', '.join(lost)}.")
    if again := sorted(base.fine_tuned - made.model.fine_tuned):
        typer.echo(f"Drawn by the map again, the head had learned the old drawing: {', '.join(again)}.")
    if made.undrawn:
        typer.echo(f"Not drawn in any exam, left out: {', '.join(made.undrawn)}.")
    try:
        outputs.check_numbers((one.name, one.label) for one in made.model.structures.values())
    except StructureError as shared:
        typer.echo(f"Defined, but: {shared}")
    end(made.failed)


def list_structures(model: ModelOption, as_json: JsonOption = False) -> None:
    """List the structures of a model."""
    from deepatlas import checkpoint

    about = checkpoint.describe(checkpoint.find(model))
    if as_json:
        typer.echo(json.dumps({one["name"]: one["label"] for one in about["structures"]}))
        return
    for one in about["structures"]:
        typer.echo(f"{one['label']:>5}  {one['name']}  (exams: {one['exams']})")


def rename_structure(
    old: Annotated[str, typer.Argument(help="Its name now.")],
    new: Annotated[str, typer.Argument(help="Its new name.")],
    model: ModelFolder,
) -> None:
    """Rename a structure; its place in the library and its number stay."""
    from deepatlas import checkpoint
    from deepatlas.library import renamed

    folder = own(checkpoint.find(model))
    checkpoint.save_structures(renamed(checkpoint.load(folder), old, new), folder)
    typer.echo(f"{old} is {new} now.")


def remove_structures(
    names: Annotated[list[str], typer.Argument(help="Structures to remove.")], model: ModelFolder
) -> None:
    """Remove structures from a model."""
    from deepatlas import checkpoint

    folder = own(checkpoint.find(model))
    kept = checkpoint.load(folder)
    for name in dict.fromkeys(names):
        kept = kept.without(name)
    checkpoint.save_structures(kept, folder)
    typer.echo(f"Removed {', '.join(names)}.")


def export(
    model: ModelOption,
    output: Annotated[Path, typer.Option("-o", "--output", help="Model folder to write.")],
    overwrite: OverwriteOption = False,
) -> None:
    """Copy a model for shipping: weights in half precision, the library, no state of the training."""
    from deepatlas import checkpoint, outputs

    loaded = checkpoint.load(checkpoint.find(model))
    outputs.claim([output / "model.json"], overwrite)
    old = [path.name for path in (output / checkpoint.FINER).glob("*") if path.name not in loaded.finer]
    if old:
        raise ModelError(
            f"{output} holds a finer model {old[0]} of another model; remove it, or choose another folder."
        )
    checkpoint.save(loaded, output, half=True)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    typer.echo(f"{output}: {size / 1e6:.1f} MB.")


def models(as_json: JsonOption = False) -> None:
    """List the models that came with the program."""
    from deepatlas import checkpoint

    rows = []
    for folder in checkpoint.shipped():
        about = checkpoint.describe(folder, kind=None, version=None)
        structures = [one["name"] for one in about["structures"]]
        kind = "map" if about["format"] == checkpoint.FORMAT else "regseg"
        rows.append({"name": folder.name, "kind": kind, "version": about["version"], "structures": structures})
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for row in rows:
        structures = ", ".join(row["structures"]) or "no structures"
        typer.echo(f"{row['name']} ({row['kind']}, version {row['version']}): {structures}")
    if not rows:
        typer.echo("No model came with the program; train one with `deepatlas pretrain`.")


def info(model: Annotated[str, typer.Argument(help="Folder or shipped name.")], as_json: JsonOption = False) -> None:
    """Describe a model of either kind: what it sees, its sizes, its structures, regions and landmarks."""
    from deepatlas import checkpoint, regseg

    folder = checkpoint.find(model)
    kind = checkpoint.describe(folder, kind=None, version=None).get("format")
    about = _about_pair(regseg.load(folder)) if kind == regseg.FORMAT else _about_map(checkpoint.load(folder))
    if as_json:
        typer.echo(json.dumps(about))
        return
    about["structures"] = [f"{one['name']} ({one['label']})" for one in about["structures"]]
    for key in {"regions", "landmarks"} & about.keys():
        if len(names := about[key]) > MANY:
            about[key] = f"{len(names)}, named by --json"
    for key, value in about.items():
        typer.echo(f"{key:<11} {', '.join(value) or 'none' if isinstance(value, list) else value}")


def _about_map(model: "checkpoint.Model") -> dict[str, Any]:
    from deepatlas import checkpoint

    return {
        "name": model.name,
        "version": checkpoint.VERSION,
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "size": model.size,
        "region": model.region,
        "level": model.level,
        "seed_exam": model.seed_exam,
        "looks": [s.name for s in model.structures.values() if s.classifier is not None],
        "fine-tuned": sorted(model.fine_tuned),
        "finer": list(model.finer),
        "regions": list(model.regions),
        "landmarks": list(model.landmarks),
        "structures": [{"name": s.name, "label": s.label, "exams": s.exams} for s in model.structures.values()],
    }


def _about_pair(model: "regseg.Model") -> dict[str, Any]:
    """Of a registration and a segmentation network."""
    from deepatlas import regseg

    return {
        "name": model.name,
        "version": regseg.VERSION,
        "parameters": sum(p.numel() for network in model.networks for p in network.parameters()),
        "grid": " × ".join(map(str, model.frame.shape)),
        "spacing_mm": " × ".join(f"{step:g}" for step in model.frame.spacing_mm),
        "structures": [{"name": name, "label": label} for name, label in model.classes.items()],
    }
