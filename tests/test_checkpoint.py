"""Models on disk: they come back as they were, and nothing that is not one is loaded."""

import json
import os
import re
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import deepatlas
from deepatlas import checkpoint
from deepatlas.atlas import Structure
from deepatlas.autoencoder import Autoencoder
from deepatlas.checkpoint import Model, load, save, save_structures
from deepatlas.config import NetworkConfig
from deepatlas.errors import ModelError, StructureError
from deepatlas.networks import CoordinateNetwork
from deepatlas.tissue import BINS, MOST, PARTS

CONFIG = NetworkConfig(size=8, widths=(4, 8), head_channels=6, groups=2)


def a_structure(name: str, label: int, shape=(4, 5, 6)) -> Structure:
    """A mask of 256 grey values, which is what a file holds."""
    mask = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(label)) / 255
    box = torch.tensor([[-0.5, -0.25, 0.0], [0.5, 0.75, 0.875]])
    return Structure(name, label, mask, (mask > 0.3).float(), box, 0.375, label + 1)


@pytest.fixture
def model() -> Model:
    """A small model with two structures."""
    torch.manual_seed(0)
    frame = torch.tensor([[100.0, 3, 0, 1], [-2, 120, 5, -40], [0, 1, 300, 0.1], [0, 0, 0, 1]], dtype=torch.float64)
    return Model(
        network=CoordinateNetwork(CONFIG),
        autoencoder=Autoencoder(),
        atlas=torch.rand(1, 1, 6, 6, 6),
        seed_box_to_mm=frame,
        region="320mm",
        level=1,
        seed_exam='a, "b" ü.é',
        structures={s.name: s for s in (a_structure("niere links", 3), a_structure("食道", 900, (7, 4, 4)))},
    )


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """The model on disk."""
    save(model, tmp_path / "one")
    return tmp_path / "one"


def states(model: Model) -> dict[str, torch.Tensor]:
    """All weights of a model."""
    return {**model.network.state_dict(), **{f"ae.{k}": v for k, v in model.autoencoder.state_dict().items()}}


def test_a_model_comes_back_to_the_bit(model, folder):
    back = load(folder)
    assert states(back).keys() == states(model).keys()
    for name, values in states(model).items():
        assert torch.equal(states(back)[name], values), name
    assert torch.equal(back.atlas, model.atlas)
    assert torch.equal(back.seed_box_to_mm, model.seed_box_to_mm)
    for name in ("region", "level", "seed_exam", "size"):
        assert getattr(back, name) == getattr(model, name)
    assert (back.name, back.network.config) == ("one", CONFIG)
    assert list(back.structures) == list(model.structures)
    for name, one in model.structures.items():
        other = back.structures[name]
        assert (one.name, one.label, one.level, one.exams) == (other.name, other.label, other.level, other.exams)
        for part in ("mask", "known", "box_atlas"):
            assert torch.equal(getattr(one, part), getattr(other, part))
    image = torch.rand(1, 1, 8, 8, 8)
    assert torch.equal(back.network(image, 1), model.network(image, 1).detach())
    assert not any(p.requires_grad or p.is_meta for p in (*back.network.parameters(), *back.autoencoder.parameters()))
    assert not back.network.training


def test_half_precision_is_half_the_size_and_within_a_thousandth(model, folder, tmp_path):
    save(model, tmp_path / "half", half=True)
    back = load(tmp_path / "half")
    for name, values in states(model).items():
        torch.testing.assert_close(states(back)[name], values, atol=1e-6, rtol=1e-3)
        assert states(back)[name].dtype == torch.float32
    sizes = [(path / "weights.safetensors").stat().st_size for path in (tmp_path / "half", folder)]
    assert sizes[0] < 0.65 * sizes[1]
    torch.testing.assert_close(back.atlas, model.atlas, atol=0.5 / 255 + 1e-6, rtol=0)
    assert back.atlas.dtype == torch.float32
    image = torch.rand(1, 1, 8, 8, 8)
    assert (back.network(image, 0) - model.network(image, 0)).abs().max() < 5e-3


def test_weights_are_no_bytes(folder):
    def spoil(tensors):
        name = next(key for key in tensors if key.startswith("network."))
        tensors[name] = tensors[name].to(torch.uint8)

    resave(folder, spoil)
    with pytest.raises(ModelError, match="whole numbers"):
        load(folder)


def test_a_model_without_structures_and_a_library_that_changes(model, folder):
    weights = (folder / "weights.safetensors").read_bytes()
    empty = replace(model, structures={})
    save_structures(empty, folder)
    assert load(folder).structures == {}
    grown = load(folder).with_structures(a_structure("larynx", 6))
    save_structures(grown, folder)
    assert list(load(folder).structures) == ["larynx"]
    assert (folder / "weights.safetensors").read_bytes() == weights


def test_tables_of_hu_come_back_and_older_ones_are_read(model, folder):
    table = MOST * (2 * torch.rand(PARTS, PARTS, PARTS, BINS, BINS) - 1)
    save_structures(model.with_structures(replace(a_structure("larynx", 6), tissue=table)), folder)
    back = load(folder).structures
    torch.testing.assert_close(back["larynx"].tissue, table, atol=0.01, rtol=0)
    assert back["食道"].tissue is None

    def older(tensors: dict) -> None:
        tensors["2.tissue"] = tensors["2.tissue"][0, 1, 2].clone()

    resave(folder, older, json.loads((folder / "model.json").read_text())["files"]["structures"])
    edit(folder, lambda about: about["structures"][2].update(tissue=True))
    one = load(folder).structures["larynx"].tissue
    assert one.shape == table.shape
    torch.testing.assert_close(one[2, 0, 1], table[0, 1, 2], atol=0.01, rtol=0)


def test_the_library_of_a_model(model):
    again = replace(a_structure("niere links", 4), exams=17)
    changed = model.with_structures(again, a_structure("larynx", 6))
    assert list(changed.structures) == ["niere links", "食道", "larynx"]
    assert changed.structure("niere links").exams == 17
    assert model.structure("niere links").exams == 4  # the model itself is untouched
    assert list(changed.without("食道").structures) == ["niere links", "larynx"]
    for act in (model.structure, model.without):
        with pytest.raises(StructureError, match="'heart'; it knows: niere links, 食道"):
            act("heart")
    with pytest.raises(StructureError, match="none"):
        replace(model, structures={}).structure("heart")


def test_the_seed_exam_s_box_lies_within_the_margin_of_the_atlas(model):
    corner = torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    in_atlas = corner * torch.tensor([checkpoint.MARGIN] * 3 + [1.0])
    torch.testing.assert_close(model.atlas_to_mm @ in_atlas, model.seed_box_to_mm @ corner)


def edit(folder: Path, change) -> None:
    """Change what a model says about itself."""
    about = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    change(about)
    (folder / "model.json").write_text(json.dumps(about), encoding="utf-8")


def resave(folder: Path, change, file: str = "weights.safetensors") -> None:
    """Change the tensors of a model."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


def cut(path: Path, keep: float) -> None:
    """Lose the end of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def with_header(path: Path, header: bytes, claimed: int | None = None) -> None:
    """Replace the header of a safetensors file."""
    path.write_bytes(struct.pack("<Q", len(header) if claimed is None else claimed) + header + bytes(64))


def grow(about):
    about["network"]["head_channels"] = 10**9


WEIGHTS, STRUCTURES = "weights.safetensors", "structures.safetensors"
FAULTS = {
    "no model.json": (lambda f: (f / "model.json").unlink(), "one"),
    "no JSON": (lambda f: (f / "model.json").write_text("{"), "model.json"),
    "not text": (lambda f: (f / "model.json").write_bytes(b"\xff\xfe\x00"), "model.json"),
    "a list": (lambda f: (f / "model.json").write_text("[]"), "model.json"),
    "another format": (lambda f: edit(f, lambda a: a.update(format="x")), "model.json"),
    "a later version": (lambda f: edit(f, lambda a: a.update(version=2)), "version 2"),
    "no version": (lambda f: edit(f, lambda a: a.pop("version")), "version None"),
    "no network": (lambda f: edit(f, lambda a: a.pop("network")), "model.json"),
    "an unknown setting": (lambda f: edit(f, lambda a: a["network"].update(depth=3)), "model.json"),
    "no structures": (lambda f: edit(f, lambda a: a.pop("structures")), "model.json"),
    "structures of another kind": (lambda f: edit(f, lambda a: a.update(structures=[1])), "model.json"),
    "a level the network lacks": (lambda f: edit(f, lambda a: a.update(level=2)), "model.json"),
    "a frame of another shape": (lambda f: edit(f, lambda a: a.update(seed_box_to_mm=[1, 2])), "model.json"),
    "sizes beyond any model": (lambda f: edit(f, lambda a: a["network"].update(size=10**9)), "model.json"),
    "a head of a thousand million": (lambda f: edit(f, grow), WEIGHTS),
    "an atlas of a thousand million": (lambda f: edit(f, lambda a: a.update(atlas_size=10**9)), WEIGHTS),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), WEIGHTS),
    "empty weights": (lambda f: (f / WEIGHTS).write_bytes(b""), WEIGHTS),
    "a cut header": (lambda f: cut(f / WEIGHTS, 0.01), WEIGHTS),
    "cut weights": (lambda f: cut(f / WEIGHTS, 0.7), WEIGHTS),
    "a header of ten terabytes": (lambda f: with_header(f / WEIGHTS, b"{}", 10**13), WEIGHTS),
    "a header longer than the file": (lambda f: with_header(f / WEIGHTS, b"{}", 4000), WEIGHTS),
    "a header that is no JSON": (lambda f: with_header(f / WEIGHTS, b"\x80\x04]."), WEIGHTS),
    "a header that is a list": (lambda f: with_header(f / WEIGHTS, b"[1, 2]"), WEIGHTS),
    "a header of numbers": (lambda f: with_header(f / WEIGHTS, b'{"atlas": 3}'), WEIGHTS),
    "another shape": (lambda f: resave(f, lambda t: t.update(atlas=torch.zeros(1, 1, 5, 6, 6))), WEIGHTS),
    "another type": (lambda f: resave(f, lambda t: t.update(atlas=t["atlas"].double())), WEIGHTS),
    "one tensor more": (lambda f: resave(f, lambda t: t.update(more=torch.zeros(1))), WEIGHTS),
    "one tensor less": (lambda f: resave(f, lambda t: t.pop("network.shared")), WEIGHTS),
    "no masks": (lambda f: (f / STRUCTURES).unlink(), STRUCTURES),
    "a mask of another shape": (
        lambda f: resave(f, lambda t: t.update({"0.mask": t["0.mask"][1:]}), STRUCTURES),
        STRUCTURES,
    ),
    "masks in another folder": (
        lambda f: edit(f, lambda a: a.update(files={"structures": "../structures.safetensors"})),
        "model.json",
    ),
    "HU in other parts": (lambda f: edit(f, lambda a: a["structures"][0].update(tissue=4)), "model.json"),
    "a mask of another type": (
        lambda f: resave(f, lambda t: t.update({"0.mask": t["0.mask"].float()}), STRUCTURES),
        STRUCTURES,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_is_none_is_refused_by_name(fault, folder):
    spoil, named = FAULTS[fault]
    spoil(folder)
    with pytest.raises(ModelError, match=re.escape(named)) as refusal:
        load(folder)
    assert "\n" not in str(refusal.value)
    assert str(folder) in str(refusal.value)


def test_data_behind_the_header_is_held_against_it(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes() + bytes(100))
    with pytest.raises(ModelError, match="damaged"):
        load(folder)


def test_a_writing_that_breaks_off_leaves_the_old_file(model, folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    changed = replace(model.without("食道"), atlas=model.atlas * 0.5)

    def full(*_):
        raise OSError("No space left on device")

    for name in ("serialised", "os.replace", "os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(f"deepatlas.checkpoint.{name}", full)
            with pytest.raises(OSError, match="No space"):
                save(changed, folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    save(changed, folder)
    assert list(load(folder).structures) == ["niere links"]


def test_what_a_killed_process_left_of_a_file_is_removed_when_it_is_written(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    path, left = tmp_path / "a[1].json", tmp_path / f"a[1].json.{ended.pid}.part"
    kept = [tmp_path / f"{name}.part" for name in (f"b.json.{ended.pid}", f"a[1].json.{os.getppid()}", "a[1].json.x")]
    for file in (left, *kept):
        file.write_text("{")
    checkpoint.write_text(path, "{}")
    assert sorted(tmp_path.iterdir()) == sorted([path, *kept])


def test_a_library_whose_description_is_not_written_is_the_old_one(model, folder, monkeypatch):
    before = load(folder).structures
    moved = {name: replace(one, mask=one.mask.flip(0)) for name, one in model.structures.items()}

    def killed(*_):
        raise KeyboardInterrupt

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr("deepatlas.checkpoint.write_text", killed)
            with pytest.raises(KeyboardInterrupt):
                save_structures(replace(model, structures=moved), folder)
        for name, one in load(folder).structures.items():
            assert torch.equal(one.mask, before[name].mask)
    save_structures(replace(model, structures=moved), folder)
    for name, one in load(folder).structures.items():
        assert torch.equal(one.mask, before[name].mask.flip(0))
    assert len(list(folder.glob("structures*.safetensors"))) == 1


def test_all_files_of_a_model_may_be_read_by_whom_the_folder_lets(model, folder):
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir() if path.is_file()}
    assert set(modes.values()) == {modes["model.json"]}


def test_a_model_is_found_by_its_folder_or_its_name(folder, tmp_path, monkeypatch):
    assert checkpoint.find(folder) == folder
    assert checkpoint.find(str(folder)) == folder
    monkeypatch.setattr(checkpoint, "shipped", lambda: [folder])
    monkeypatch.chdir(tmp_path.parent)
    assert checkpoint.find("one") == folder
    with pytest.raises(ModelError, match="shipped model \\(one\\)"):
        checkpoint.find("two")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=re.escape("no model.json")):
        load(checkpoint.find(tmp_path / "empty"))


def test_what_is_written_can_be_read_elsewhere_and_nothing_in_it_is_code(folder):
    assert {path.name for path in folder.iterdir()} == {"model.json", WEIGHTS, STRUCTURES}
    about = checkpoint.describe(folder)
    assert (about["format"], about["version"]) == ("deepatlas-model", 1)
    assert [s["name"] for s in about["structures"]] == ["niere links", "食道"]
    code = r"\bpickle\b|torch\.(load|save)\(|allow_pickle\s*=\s*True|joblib|(?<!\.)\beval\(|\bexec\(|shell=True"
    for path in Path(deepatlas.__file__).parent.rglob("*.py"):
        text = re.sub(r'""".*?"""', "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not re.search(code, text), path.name
    assert re.search(code, "import pickle")
