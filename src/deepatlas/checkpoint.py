"""Models on disk: safetensors and JSON in one folder, never a pickle.

A model folder, format version 1:

===========================  ===============================================================================
``model.json``               format, version, sizes, preparation, seed exam, structures (name, label, level...),
                             regions, landmarks
``weights.safetensors``      network, autoencoder and atlas; half or single precision, the atlas also in bytes
``structures.safetensors``   one soft mask per structure, or ``structures-2.safetensors``, as ``model.json`` says
``classifiers.safetensors``  the voxel classifiers of structures that have one (`deepatlas.classifier`)
``head.safetensors``         of a fine-tuned model: the segmentation head with its backbone (`deepatlas.finetune`)
``finer/NAME/``              a model of the cube NAME of this atlas, a folder of the same kind (`deepatlas.cascade`)
===========================  ===============================================================================

Everything is written beside its target first and then moved over it; the JSON goes last. Loading checks every name,
type and shape against the header before any array is allocated.
"""

import json
import os
import struct
import zlib
from dataclasses import asdict, dataclass, field, replace
from glob import escape
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as serialised
from torch import Tensor

from deepatlas.atlas import REGION_NODES, Region, Structure
from deepatlas.autoencoder import Autoencoder
from deepatlas.config import NetworkConfig
from deepatlas.errors import ModelError, StructureError
from deepatlas.networks import CoordinateNetwork, SegmentationHead, VoxelClassifier
from deepatlas.tissue import BINS, MOST, PARTS

FORMAT = "deepatlas-model"
VERSION = 1
LARGEST_HEADER = 4 << 20
FINER = "finer"
HEAD = "head.safetensors"
STRUCTURES, CLASSIFIERS = "structures", "classifiers"
"""Files of the library; model.json says under which names."""
MARGIN = 0.9
"""The seed exam's box lies within ± this in the atlas, so that tanh has room for anatomy beyond it."""


@dataclass(frozen=True)
class Model:
    """A trained map: everything that is needed to find structures in an exam."""

    network: CoordinateNetwork
    autoencoder: Autoencoder
    atlas: Tensor
    """X, (1, 1, n, n, n), 0 ... 1."""
    seed_box_to_mm: Tensor
    """Box → mm of the seed exam, (4, 4) float64; the seed's box lies within ± `MARGIN` of the atlas."""
    region: str
    """How exams are prepared: see `deepatlas.prepare.prepare`."""
    level: int
    """The level of the network that is trained and used (0 is the finest)."""
    seed_exam: str
    structures: dict[str, Structure]
    regions: dict[str, Region] = field(default_factory=dict)
    name: str = "model"
    familiar: float = 0.0
    """An exam whose mean likeness to the aligned atlas lies below this is unlike any that was learned."""
    landmarks: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    """Named points, in atlas units."""
    finer: "dict[str, Model]" = field(default_factory=dict)
    """Models of cubes of this atlas, see `deepatlas.cascade`."""
    head: SegmentationHead | None = None
    """A supervised segmentation on top of the map, see `deepatlas.finetune`."""
    segmented: dict[str, int] = field(default_factory=dict)
    """Structures that the head speaks for, and its channel of each. One that is made anew is the map's again."""

    @property
    def size(self) -> int:
        """Nodes along each axis of a prepared exam."""
        return self.network.config.size

    @property
    def atlas_to_mm(self) -> Tensor:
        """Atlas → mm of the seed exam, (4, 4) float64."""
        scale = torch.diag(torch.tensor([1 / MARGIN] * 3 + [1.0], dtype=torch.float64))
        return self.seed_box_to_mm @ scale

    @property
    def fine_tuned(self) -> set[str]:
        """Structures that its head, or that of a finer model, speaks for."""
        return set(self.segmented).union(*(one.fine_tuned for one in self.finer.values()))

    def structure(self, name: str) -> Structure:
        """A structure of the library, or a StructureError that lists what there is."""
        if name not in self.structures:
            raise StructureError(
                f"The model knows no structure {name!r}; it knows: {', '.join(self.structures) or 'none'}."
            )
        return self.structures[name]

    def with_structures(self, *added: Structure) -> "Model":
        """The model with structures added; one of the same name is replaced, the others stay."""
        names = {s.name for s in added}
        segmented = {name: channel for name, channel in self.segmented.items() if name not in names}
        return replace(self, structures=self.structures | {s.name: s for s in added}, segmented=segmented)

    def with_regions(self, *added: Region) -> "Model":
        """The model with regions added; one of the same name is replaced, the others stay."""
        return replace(self, regions=self.regions | {r.name: r for r in added})

    def without(self, name: str) -> "Model":
        """The model, and those finer than it, without one structure."""
        self.structure(name)
        structures = {k: s for k, s in self.structures.items() if k != name}
        finer = {k: one.without(name) if name in one.structures else one for k, one in self.finer.items()}
        segmented = {k: channel for k, channel in self.segmented.items() if k != name}
        return replace(self, structures=structures, finer=finer, segmented=segmented)


def save(model: Model, folder: Path, half: bool = False) -> None:
    """Write a model folder. ``half`` stores the weights in half precision and the atlas in 255 steps, which are 2 HU
    (for shipping)."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = torch.float16 if half else torch.float32
    tensors = {f"network.{k}": v.to(kind) for k, v in model.network.state_dict().items()}
    tensors |= {f"autoencoder.{k}": v.to(kind) for k, v in model.autoencoder.state_dict().items()}
    tensors["atlas"] = (255 * model.atlas).round().clamp(0, 255).to(torch.uint8) if half else model.atlas.to(kind)
    write_tensors(folder / "weights.safetensors", tensors)
    if model.head is not None:
        write_tensors(folder / HEAD, {k: v.to(kind) for k, v in model.head.state_dict().items()})
    for name, finer in model.finer.items():
        save(finer, folder / FINER / name, half)
    _describe(model, folder)


def save_structures(model: Model, folder: Path) -> None:
    """Write the library and the description of a model and of those finer than it, leaving their weights alone."""
    for name, finer in model.finer.items():
        save_structures(finer, folder / FINER / name)
    _describe(model, folder)


def _describe(model: Model, folder: Path) -> None:
    tensors = {}
    for index, structure in enumerate(model.structures.values()):
        tensors[f"{index}.mask"] = (structure.mask.clamp(0, 1) * 255).round().to(torch.uint8)
        tensors[f"{index}.known"] = (structure.known > 0).to(torch.uint8)
        if structure.tissue is not None:
            tensors[f"{index}.tissue"] = (255 * (structure.tissue / MOST + 1) / 2).round().to(torch.uint8)
    tensors = tensors or {"none": torch.zeros(1, dtype=torch.uint8)}
    written = {STRUCTURES: _write_beside(folder, STRUCTURES, tensors)}
    learned = [(n, s.classifier) for n, s in enumerate(model.structures.values()) if s.classifier is not None]
    if learned:
        weights = {f"{n}.{k}": v.to(torch.float16) for n, one in learned for k, v in one.state_dict().items()}
        written[CLASSIFIERS] = _write_beside(folder, CLASSIFIERS, weights)
    about = {
        "format": FORMAT,
        "version": VERSION,
        "files": written,
        "network": asdict(model.network.config),
        "preparation": {"size": model.size, "region": model.region},
        "level": model.level,
        "atlas_size": model.atlas.shape[-1],
        "seed_exam": model.seed_exam,
        "familiar": model.familiar,
        "seed_box_to_mm": model.seed_box_to_mm.tolist(),
        "structures": [
            {
                "name": s.name,
                "label": s.label,
                "level": s.level,
                "exams": s.exams,
                "box_atlas": s.box_atlas.tolist(),
                "shape": list(s.mask.shape),
                "tissue": PARTS if s.tissue is not None else 0,
                "classifier": [s.classifier.members, s.classifier.width] if s.classifier else None,
            }
            for s in model.structures.values()
        ],
        "regions": [
            {"name": r.name, "box_atlas": r.box_atlas.tolist(), "counted": _bits(r.counted)}
            for r in model.regions.values()
        ],
        "landmarks": {name: list(place) for name, place in model.landmarks.items()},
    }
    if model.head is not None:
        head = model.head
        about["head"] = {
            "channels": head.channels,
            "width": head.width,
            "shape": list(head.shape),
            "structures": model.segmented,
        }
    write_text(folder / "model.json", json.dumps(about, indent=1))
    for kind in (STRUCTURES, CLASSIFIERS):
        for path in folder.glob(f"{kind}*.safetensors"):
            if path.name not in written.values():
                path.unlink()


def _write_beside(folder: Path, kind: str, tensors: dict[str, Tensor]) -> str:
    """Write a file of a library under a name that is free, or holds the same already: the one that the JSON speaks of
    stays as long as it does."""
    data = _serialised(tensors)
    paths = (folder / f"{kind}{end}.safetensors" for end in chain([""], (f"-{n}" for n in count(2))))
    path = next(path for path in paths if not path.exists() or path.read_bytes() == data)
    if not path.exists():
        _write_bytes(path, data)
    return path.name


def load(folder: Path) -> Model:
    """Read a model folder.

    Raises:
        ModelError: not a model, another version, or files that do not fit their description.
    """
    about = describe(folder)
    try:
        with torch.device("meta"):  # shapes alone: nothing is allocated before the files were held against them
            network = CoordinateNetwork(_network_config(about["network"]))
            autoencoder = Autoencoder()
        size = int(about["atlas_size"])
        shapes = {f"network.{k}": tuple(v.shape) for k, v in network.state_dict().items()}
        shapes |= {f"autoencoder.{k}": tuple(v.shape) for k, v in autoencoder.state_dict().items()}
        shapes["atlas"] = (1, 1, size, size, size)
        tensors = read_tensors(folder / "weights.safetensors", shapes, {"F16", "F32", "U8"})
        if tensors["atlas"].dtype == torch.uint8:
            tensors["atlas"] = tensors["atlas"].float() / 255
        if whole := [k for k, v in tensors.items() if not v.is_floating_point()]:
            raise ValueError(f"{whole[0]} in whole numbers")
        tensors = {k: v.float() for k, v in tensors.items()}
        network.load_state_dict(under(tensors, "network."), assign=True)
        autoencoder.load_state_dict(under(tensors, "autoencoder."), assign=True)
        if not 0 <= int(about["level"]) <= network.coarsest:
            raise ValueError(f"level {about['level']} of a network of {network.coarsest + 1}")
        structures = _load_structures(folder, about["structures"], about.get("files", {}))
        model = Model(
            network=network.eval().requires_grad_(False),
            autoencoder=autoencoder.eval().requires_grad_(False),
            atlas=tensors["atlas"],
            seed_box_to_mm=torch.tensor(about["seed_box_to_mm"], dtype=torch.float64).view(4, 4),
            region=str(about["preparation"]["region"]),
            level=int(about["level"]),
            seed_exam=str(about["seed_exam"]),
            structures=structures,
            regions={str(entry["name"]): _region(entry) for entry in about.get("regions", [])},
            landmarks={str(name): _place(place) for name, place in about.get("landmarks", {}).items()},
            name=folder.name,
            familiar=float(about["familiar"]),
            **_load_head(folder, network.config, about.get("head"), structures),
            finer={path.parent.name: load(path.parent) for path in sorted((folder / FINER).glob("*/model.json"))},
        )
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{folder / 'model.json'} does not describe a model ({error}); copy the model again."
        ) from error
    return model


def _load_head(folder: Path, config: NetworkConfig, about: dict | None, known: dict[str, Structure]) -> dict:
    """The fields of a model that a segmentation head fills."""
    if about is None:
        return {}
    channels, width = int(about["channels"]), int(about["width"])
    x, y, z = (int(nodes) for nodes in about["shape"])
    segmented = {str(name): int(channel) for name, channel in about["structures"].items()}
    fits = 0 < channels <= 254 and 0 < width <= 256 and 2 <= min(x, y, z) <= max(x, y, z) <= 512
    if not (fits and set(segmented.values()) <= set(range(channels))):
        raise ValueError("sizes beyond what any head has")
    if unknown := set(segmented) - set(known):
        raise ValueError(f"a head that speaks for {unknown.pop()}, which is not in the library")
    with torch.device("meta"):
        head = SegmentationHead(config, channels, width, (x, y, z))
    shapes = {k: tuple(v.shape) for k, v in head.state_dict().items()}
    tensors = read_tensors(folder / HEAD, shapes, {"F16", "F32"})
    head.load_state_dict({k: v.float() for k, v in tensors.items()}, assign=True)
    return {"head": head.eval().requires_grad_(False), "segmented": segmented}


def lineage(folder: Path) -> list[Model]:
    """A model, and before it those whose atlas it sees a part of, the widest first."""
    folder = Path(os.path.abspath(folder))
    above = folder.parent.parent
    if folder.parent.name == FINER and (above / "model.json").exists():
        return [*lineage(above), load(folder)]
    return [load(folder)]


def find(name_or_folder: str | Path) -> Path:
    """The folder of a model: a folder itself, or the name of one that came with the program.

    Raises:
        ModelError: neither is there.
    """
    folder = Path(os.path.abspath(name_or_folder))
    if (folder / "model.json").exists():
        return folder
    known = {path.name: path for path in shipped()}
    if str(name_or_folder) in known:
        return known[str(name_or_folder)]
    if folder.is_dir():
        return folder  # `describe` says what it lacks
    raise ModelError(
        f"Expected a model folder or the name of a shipped model ({', '.join(known) or 'there is none'}), "
        f"got {name_or_folder}; check the path, or train one with `deepatlas pretrain`."
    )


def shipped() -> list[Path]:
    """Folders of the models that came with the program, sorted by name: in the wheel, or in the checkout."""
    package = Path(__file__).resolve().parent
    places = [package / "models_shipped", package.parents[1] / "models"]
    found = {path.parent.name: path.parent for place in reversed(places) for path in place.glob("*/model.json")}
    return [found[name] for name in sorted(found)]


def describe(folder: Path, kind: str | None = FORMAT, version: int | None = VERSION) -> dict:
    """The JSON of a model folder, its format and version checked (None: any); needs no weights.

    Raises:
        ModelError: missing, not JSON, not a model, or of another version.
    """
    path = folder / "model.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{folder} is not a model: it holds no model.json. Train one with `deepatlas pretrain`."
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}); copy the model again.") from None
    if not isinstance(about, dict) or about.get("format") != (kind or about.get("format")):
        got = about.get("format") if isinstance(about, dict) else None
        raise ModelError(f"{path} does not describe a model of this kind; expected format {kind!r}, got {got!r:.40}.")
    if about.get("version") != (version or about.get("version")):
        raise ModelError(
            f"{folder} is of model version {about.get('version')}, this program reads version {version}; "
            "use the program that made it, or train again."
        )
    return about


def _network_config(about: dict) -> NetworkConfig:
    config = NetworkConfig(**{**about, "widths": tuple(int(w) for w in about["widths"])})
    if not (8 <= config.size <= 512 and 1 <= len(config.widths) <= 8 and max(config.widths) <= 1024):
        raise ValueError("sizes beyond what any model has")
    return config


def _load_structures(folder: Path, about: list[dict], files: dict[str, str]) -> dict[str, Structure]:
    """The library of a model, from the files that it names (older ones name none)."""
    if wrong := [name for name in files.values() if Path(name).name != name]:
        raise ValueError(f"a file {wrong[0]} that is not in the folder")
    shapes = {}
    for index, entry in enumerate(about):
        shapes |= {f"{index}.mask": tuple(entry["shape"]), f"{index}.known": tuple(entry["shape"])}
        if entry.get("tissue"):
            shapes[f"{index}.tissue"] = _tissue_shape(entry["tissue"])
    shapes = shapes or {"none": (1,)}
    tensors = read_tensors(folder / files.get(STRUCTURES, "structures.safetensors"), shapes, {"U8"})
    classifiers = _load_classifiers(folder / files.get(CLASSIFIERS, "classifiers.safetensors"), about)
    found = {}
    for index, entry in enumerate(about):
        found[str(entry["name"])] = Structure(
            name=str(entry["name"]),
            label=int(entry["label"]),
            mask=tensors[f"{index}.mask"].float() / 255,
            known=tensors[f"{index}.known"].float(),
            box_atlas=torch.tensor(entry["box_atlas"], dtype=torch.float32).view(2, 3),
            level=float(entry["level"]),
            exams=int(entry["exams"]),
            tissue=_tissue(tensors[f"{index}.tissue"]) if entry.get("tissue") else None,
            classifier=classifiers.get(index),
        )
    return found


def _load_classifiers(path: Path, about: list[dict]) -> dict[int, VoxelClassifier]:
    """Those of a library, by the place of their structure in it."""
    found, shapes = {}, {}
    for index, entry in enumerate(about):
        if entry.get("classifier") is not None:
            members, width = (int(number) for number in entry["classifier"])
            if not (1 <= members <= 64 and 2 <= width <= 4096):
                raise ValueError("sizes beyond what any classifier has")
            with torch.device("meta"):
                found[index] = VoxelClassifier(members, width)
            shapes |= {f"{index}.{k}": tuple(v.shape) for k, v in found[index].state_dict().items()}
    tensors = read_tensors(path, shapes, {"F16"}) if shapes else {}
    for index, one in found.items():
        one.load_state_dict({k: v.float() for k, v in under(tensors, f"{index}.").items()}, assign=True)
        one.requires_grad_(False)
    return found


def _tissue_shape(parts: bool | int) -> tuple[int, ...]:
    """Of the stored tables; older libraries say true, and have one for the whole box."""
    if parts is True:
        return BINS, BINS
    if parts != PARTS:
        raise ValueError(f"tissue in {parts!r} parts")
    return PARTS, PARTS, PARTS, BINS, BINS


def _tissue(stored: Tensor) -> Tensor:
    return (MOST * (stored.float() / 255 * 2 - 1)).expand(PARTS, PARTS, PARTS, BINS, BINS).contiguous()


def _region(entry: dict) -> Region:
    counted = np.unpackbits(np.frombuffer(bytes.fromhex(entry["counted"]), np.uint8)).astype(bool)
    box_atlas = torch.tensor(entry["box_atlas"], dtype=torch.float32).view(2, 3)
    return Region(str(entry["name"]), box_atlas, torch.from_numpy(counted).view(*(REGION_NODES,) * 3))


def _place(numbers: list) -> tuple[float, float, float]:
    x, y, z = (float(number) for number in numbers)
    return x, y, z


def _bits(mask: Tensor) -> str:
    """A boolean array as hexadecimal digits, four bits each."""
    return np.packbits(mask.numpy()).tobytes().hex()


def read_tensors(path: Path, shapes: dict[str, tuple[int, ...]], kinds: set[str]) -> dict[str, Tensor]:
    """Tensors of a safetensors file, after its header was held against the names, shapes and types expected.

    Raises:
        ModelError: missing, damaged, or not what was expected.
    """
    header = _header(path)
    entries = {k: v for k, v in header.items() if k != "__metadata__"}
    if entries.keys() != shapes.keys():
        odd = sorted(entries.keys() ^ shapes.keys())
        raise ModelError(
            f"{path} does not fit its model.json: {odd[0]} and {len(odd) - 1} more tensors differ by name."
        )
    for name, entry in entries.items():
        if tuple(entry.get("shape", ())) != tuple(shapes[name]) or entry.get("dtype") not in kinds:
            raise ModelError(
                f"{path}: {name} should be {list(shapes[name])} of {'/'.join(sorted(kinds))}, "
                f"is {entry.get('shape')} of {entry.get('dtype')}; copy the model again."
            )
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in shapes}
    except Exception as error:  # safetensors raises its own type without a public base
        raise ModelError(f"{path} is damaged ({error}); copy the model again.") from None


def _header(path: Path) -> dict:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(LARGEST_HEADER, path.stat().st_size):
                raise ModelError(f"{path} is damaged: its header claims {length} bytes; copy the model again.")
            header = json.loads(file.read(length))
            if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
                raise ValueError("no table of tensors")
            return header
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; copy the whole model folder.") from None
    except (OSError, ValueError, struct.error) as error:
        raise ModelError(f"{path} is damaged ({error}); copy the model again.") from None


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file in one step; by ourselves, as safetensors leaves one that nobody else may read."""
    _write_bytes(path, _serialised(tensors))


def _serialised(tensors: dict[str, Tensor]) -> bytes:
    return serialised({k: v.detach().cpu().contiguous() for k, v in tensors.items()})


def checksum(*tensors: Tensor) -> str:
    """What tells tensors from others, eight digits; not proof against intent."""
    found = 0
    for tensor in tensors:
        found = zlib.crc32(tensor.detach().cpu().contiguous().numpy(), found)
    return f"{found:08x}"


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step."""
    _write_bytes(path, f"{text}\n".encode())


def _write_bytes(path: Path, data: bytes) -> None:
    """Beside the target, to disk, then over it."""
    _remove_left(path)
    part = path.with_name(path.name + f".{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _remove_left(path: Path) -> None:
    """Remove what processes that have ended left of a file; other systems cannot be asked whether they have."""
    for part in path.parent.glob(f"{escape(path.name)}.*.part") if os.name == "posix" else ():
        try:
            os.kill(int(part.name.split(".")[-2]), 0)  # asks alone
        except ProcessLookupError:
            part.unlink(missing_ok=True)
        except (ValueError, OverflowError, PermissionError):  # no name of ours, or another user's process
            continue


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name begins with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
