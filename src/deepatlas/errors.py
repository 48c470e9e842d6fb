"""Errors a user can mend: one line that says what was expected, what came, and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def memory_as_such() -> Iterator[None]:
    """Turn what PyTorch raises where memory runs out into the MemoryError that it is."""
    try:
        yield
    except RuntimeError as error:
        if "allocate memory" in str(error) or "out of memory" in str(error):
            raise MemoryError(str(error)) from error
        raise


class DeepAtlasError(Exception):
    """Base of every refusal. The command line prints the message and ends with exit code 1."""


class ExamError(DeepAtlasError):
    """An exam, or a folder of exams, that cannot be used."""


class LabelError(DeepAtlasError):
    """A label map, or a table of label names, that cannot be used."""


class CohortError(DeepAtlasError):
    """A prepared cohort that cannot be read or extended."""


class ModelError(DeepAtlasError):
    """A model folder or a checkpoint that cannot be used."""


class StructureError(DeepAtlasError):
    """A structure that the library does not hold, or that cannot be defined."""


class MarkupError(DeepAtlasError):
    """A file of points or boxes that cannot be used."""


class RegionError(DeepAtlasError):
    """A region that the model does not hold, that cannot be defined, or that an exam does not show."""
