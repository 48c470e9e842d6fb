"""The command line: reads, calls, writes. Results go to stdout, progress and errors to stderr.

Exit codes: 0 ok, 1 refused (one line says why), 2 usage, 3 some exams failed (`OUT/failed.json` says which).
PyTorch and the rest are imported inside the commands, so that `--help` does not wait for them.
"""

import os
import sys
import warnings
from typing import Annotated, NoReturn

import typer

import deepatlas
from deepatlas.cli import answers, geometry, library, regseg, showing, training
from deepatlas.cli.speech import complain
from deepatlas.errors import DeepAtlasError, memory_as_such

app = typer.Typer(
    help="An anatomical coordinate for every voxel, learned from unlabeled CT: mark a structure once, find it in "
    "every exam. MODEL is a folder, or the name of a model that came with the program (`deepatlas models`).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
structures_app = typer.Typer(help="List, rename or remove the structures of a model.", no_args_is_help=True)
regseg_app = typer.Typer(
    help="Registration and segmentation that teach each other from few labels; CT or MR.", no_args_is_help=True
)

for command in (
    *(training.prepare, training.pretrain, training.finetune),
    *(library.define, library.export),
    *(answers.locate, answers.propose, answers.vote, answers.embed, answers.atlas, answers.evaluate),
    *(geometry.points, geometry.mark, geometry.boxes, geometry.roi, geometry.crop, geometry.uncrop),
    *(geometry.coverage, geometry.register),
    *(library.models, library.info),
    *(showing.phantoms, showing.demo),
):
    app.command()(command)
app.add_typer(structures_app, name="structures")
app.add_typer(regseg_app, name="regseg")
for command in (regseg.train, regseg.register, regseg.segment, regseg.evaluate):
    regseg_app.command()(command)
structures_app.command("list")(library.list_structures)
structures_app.command("rename")(library.rename_structure)
structures_app.command("remove")(library.remove_structures)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and end the process with its exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin slow the program beside by a factor of 10
    warnings.filterwarnings("ignore", module=r"deepatlas\..*")  # what was repaired stands in the answer
    try:
        with memory_as_such():
            app(arguments, prog_name="deepatlas")
    except DeepAtlasError as error:
        complain(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        complain(f"{where}{error.strerror or error}; check the path, the rights and the space.")
    except MemoryError:
        complain("Out of memory; crop or coarsen the exam, or use a machine with more.")
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
