"""deepatlas: an anatomical coordinate for every voxel, learned from unlabeled CT.

>>> import deepatlas
>>> model = deepatlas.load("head-neck-ct")  # doctest: +SKIP
>>> deepatlas.define(model, exam="one.nii.gz", labels="one_labels.nii.gz", names={"larynx": 6})  # doctest: +SKIP
>>> found = deepatlas.locate(model, "other.nii.gz")  # doctest: +SKIP
>>> found["larynx"].mask, found["larynx"].coverage  # doctest: +SKIP

The rooms behind this door are opened when they are asked for, so that importing it does not wait for PyTorch.
"""

import importlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepatlas.checkpoint import Model

__version__ = "0.1.0"
__all__ = ["__version__", "define", "load", "locate"]


def load(name_or_folder: str | Path) -> "Model":
    """A trained model, by the name of a shipped one or by its folder.

    Raises:
        ModelError: it is not there, or cannot be used.
    """
    from deepatlas import checkpoint

    return checkpoint.load(checkpoint.find(name_or_folder))


def define(model: "Model", exam: str | Path, labels: str | Path, names: Mapping[str, int]) -> "Model":
    """Teach a model structures from one labelled exam. Those of the same name are replaced, the others kept.

    The model itself learns them; it is returned too. On disk nothing changes: `deepatlas.checkpoint.save_structures`.

    Raises:
        ExamError, LabelError: a file cannot be used. StructureError: a structure is not drawn.
    """
    from deepatlas.files import read_exam, read_labels
    from deepatlas.locate import define as made

    image = read_exam(exam)
    taught = made(model, [(image, read_labels(labels, like=image))], names)
    finer = {}
    if model.finer:
        from deepatlas.library import define_files

        finer = define_files(model, Path(exam), Path(labels), dict(names)).model.finer
    model.structures.update(taught.structures)
    for name in model.segmented.keys() - taught.segmented.keys():
        del model.segmented[name]
    model.finer.update(finer)
    return model


class _Locate(ModuleType):
    """The module `deepatlas.locate`, which is also called as the function of its name."""

    def __call__(self, model: "Model", exam: str | Path, structures: Iterable[str] | None = None) -> dict:
        """Find structures in an exam on disk: name → `deepatlas.found.Found`; see `deepatlas.locate.locate`."""
        from deepatlas.files import read_exam

        return self.locate(model, read_exam(exam), structures)


class _Door(ModuleType):
    """This package: its room `locate` shares its name with the function people call."""

    def __setattr__(self, name: str, value: object) -> None:
        """Where the import system hangs the module `locate` into the package, make it callable."""
        if name == "locate" and isinstance(value, ModuleType):
            value.__class__ = _Locate
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Door


def __getattr__(name: str) -> object:
    """Open the room `locate` when it is first asked for."""
    if name == "locate":
        return importlib.import_module("deepatlas.locate")
    raise AttributeError(f"module 'deepatlas' has no attribute {name!r}")
