"""Options that commands share."""

from pathlib import Path
from typing import Annotated

import typer

ModelOption = Annotated[str, typer.Option("-m", "--model", help="Model folder or shipped name.")]
ModelFolder = Annotated[str, typer.Option("-m", "--model", help="Model folder.")]
ExamsOption = Annotated[Path, typer.Option("-i", "--input", help="An exam (.nii, .nii.gz) or a folder of them.")]
ExamOption = Annotated[Path, typer.Option("-i", "--input", help="An exam (.nii, .nii.gz).")]
OutOption = Annotated[Path, typer.Option("-o", "--output", help="Folder for the results.")]
NamesOption = Annotated[Path, typer.Option("--names", help='JSON, structure to number: {"larynx": 6}.')]
ListOption = Annotated[str | None, typer.Option("--structures", help="Only these, separated by commas.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist.")]
DeviceOption = Annotated[str, typer.Option("--device", help='Where the network runs: "cpu", "cuda".')]
OrientOption = Annotated[bool, typer.Option("--orient", help="Try all ways the exam may be turned; says so if it is.")]
CopiesOption = Annotated[
    int, typer.Option("--copies", help="Average the maps of so many augmented copies too.", min=0, max=64)
]
CascadeOption = Annotated[
    bool, typer.Option("--cascade", help="Look closer with the model's finer models, where it has any.")
]
RefineOption = Annotated[bool, typer.Option("--refine", help="Fit each map to its exam first: better, seconds each.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
