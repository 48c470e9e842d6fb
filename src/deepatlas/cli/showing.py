"""Commands that need no data of the user: phantoms, demo."""

from pathlib import Path
from typing import Annotated

import typer

from deepatlas.cli.options import OutOption, OverwriteOption
from deepatlas.cli.speech import say, training


def phantoms(
    output: OutOption,
    count: Annotated[int, typer.Option("-n", "--count", help="How many exams.", min=1, max=999)] = 24,
    seed: Annotated[int, typer.Option(help="The same seed gives the same exams.", min=0)] = 0,
    overwrite: OverwriteOption = False,
) -> None:
    """Write procedural CT exams with known anatomy: images/, labels/ and labels.json."""
    from deepatlas import outputs, phantom

    outputs.claim(phantom.cohort_paths(output, count), overwrite)
    phantom.write_cohort(output, count, seed)
    typer.echo(f"{output}: {count} exams in images/, their {len(phantom.STRUCTURES)} structures in labels/.")


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for everything it makes.")] = Path("demo"),
    overwrite: OverwriteOption = False,
) -> None:
    """Show the whole path on phantoms: train, mark structures once, find them in unseen exams, write a report."""
    from deepatlas import demo as show
    from deepatlas import outputs

    outputs.claim([output / part for part in show.PARTS], overwrite)
    with training() as report:
        shown = show.run(output, on_stage=say, on_progress=report)
    for line in show.summary(shown):
        typer.echo(line)
    typer.echo(f"Report: {output / 'report.html'}")
