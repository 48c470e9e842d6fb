"""The 2019 registration on head-and-neck CT, from the middle of the images and from a coordinate map.

``python -m benchmarks.bridge --work W --json FILE``: two registration networks are trained without labels, alike
but for what the images are laid onto (middle on middle, or a region of the atlas), and the listed pairs of validation
exams are registered; of every second pair the exams are cut so that they share less than half their length.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.localisation import PAIRS, exam_of, folder, names, slab
from benchmarks.regseg import tell
from deepatlas import checkpoint, common_grid, files, regions, register, regseg, transforms
from deepatlas.atlas_grid import AtlasGrid
from deepatlas.config import REGSEG_CT
from deepatlas.embedding import embed
from deepatlas.errors import ExamError
from deepatlas.metrics import dice
from deepatlas.transforms import Transform
from deepatlas.volume import Volume

SETTINGS = replace(REGSEG_CT, segmentation=0, joint=0, registration=500)
TRAINED_ON = 60
SCALING = "-256:256"
SPACING_MM = {"middle": 12.0, "atlas": 4.0}
"""Grids of about as many nodes: of the whole images, and of the region."""
MARGIN_MM = 20.0


def grid_of(model: checkpoint.Model) -> AtlasGrid:
    """The region around all structures of the library."""
    around = regions.from_structures(model, "head and neck", model.structures, MARGIN_MM)
    return AtlasGrid.of(model.with_regions(around), around.name)


def trained(how: str, atlas: AtlasGrid, work: Path) -> regseg.Model:
    """A registration network, read back where it was trained before."""
    if not (work / how / "model.json").exists():
        paths = files.find_exams(folder() / "train" / "images")[:TRAINED_ON]
        if how == "atlas":
            frame, laid = atlas.frame(SPACING_MM[how], SCALING), atlas
            images = ((files.exam_name(path), files.read_image(path), None) for path in paths)
            cases, left = atlas.cases(images, frame, tuple(names().values()))
            print(f"left out: {left}", flush=True)
        else:
            images = {files.exam_name(path): files.read_image(path) for path in paths}
            frame = common_grid.frame_for(list(images.values()), SPACING_MM[how], SCALING)
            cases, laid = common_grid.laid_together(common_grid.cases_of(images, {}, frame, tuple(names().values())))
        print(f"{how}: {len(cases.names)} exams on a grid of {frame.shape}", flush=True)
        regseg.train(cases, frame, names(), SETTINGS, work / how, on_progress=tell(how), laid=laid)
    return regseg.load(work / how)


def score(found: Transform, fixed: tuple[Volume, Volume], moving: tuple[Volume, Volume]) -> float:
    """Mean Dice of the structures that both show."""
    shared = [n for n in names().values() if all((one[1].array == n).any() for one in (fixed, moving))]
    laid = transforms.moved(found, fixed[1], moving[1], labels=True)
    return round(float(np.mean([dice(laid == n, fixed[1].array == n) for n in shared])), 4)


def compare(model: checkpoint.Model, work: Path) -> dict:
    """Every pair by both networks, by where the map lays the grid, and by the map alone."""
    atlas = grid_of(model)
    networks = {how: trained(how, atlas, work) for how in SPACING_MM}
    still = replace(networks["atlas"], networks=regseg.networks_for(len(names())))
    cases = []
    for pair in json.loads(PAIRS.read_text(encoding="utf-8")):
        fixed, moving = exam_of(pair["fixed"]), exam_of(pair["moving"])
        if pair["fixed_slices"]:
            fixed = tuple(slab(one, *pair["fixed_slices"]) for one in fixed)
            moving = tuple(slab(one, *pair["moving_slices"]) for one in moving)
        ways = {
            "middle, registration": lambda f, m: regseg.register(networks["middle"], f, m),
            "atlas": lambda f, m: regseg.register(still, f, m),
            "atlas, registration": lambda f, m: regseg.register(networks["atlas"], f, m),
            "map": lambda f, m: register.register(embed(model, f), embed(model, m)),
        }
        case = dict(pair)
        for way, how in ways.items():
            try:
                found = how(fixed[0], moving[0])
                case[way] = score(found, fixed, moving)
                case[f"{way}, folded"] = round(transforms.folded(found, fixed[0]), 6)
            except ExamError as error:
                print(f"{pair['fixed']} and {pair['moving']}: {error}", flush=True)
                case[way] = 0.0
        print({way: case[way] for way in ways}, flush=True)
        cases.append(case)
    parts = {"all": cases, "whole": [c for c in cases if not c["fixed_slices"]]}
    parts["short"] = [c for c in cases if c["fixed_slices"]]
    return {
        way: {part: round(float(np.mean([case[way] for case in some])), 4) for part, some in parts.items()}
        | {"folded": round(float(np.mean([case.get(f"{way}, folded", 0.0) for case in cases])), 6)}
        for way in ways
    } | {"cases": cases}


def main() -> int:
    """Train, score, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bridge", description=__doc__)
    parser.add_argument("--model", default="head-neck-ct", help="the coordinate map")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is trained")
    parser.add_argument("--json", type=Path, required=True, help="write the results here")
    asked = parser.parse_args()
    result = compare(checkpoint.load(checkpoint.find(asked.model)), asked.work)
    asked.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
