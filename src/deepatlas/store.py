"""A cohort: many prepared exams in one HDF5 file.

The format, version 1. Attributes of the root:

    format   "deepatlas-cohort"
    version  1
    size     voxels along each axis, n
    region   "body", "exam" or the edge of a cube such as "320mm", see `deepatlas.prepare.prepare`; of crops "cube",
             its box of the atlas and its name, see `deepatlas.cascade`
    failed   JSON object: exam name → why it could not be prepared, from the latest build

Datasets, all resizable along their first axis, uncompressed, the volumes in chunks of one exam:

    hu          int16   (N, n, n, n)  HU before any windowing, rounded; axes R, A, S
    foreground  uint8   (N, n, n, n)  1 where the patient is
    box_to_mm   float64 (N, 4, 4)     box (−1…+1 over the centres of the corner voxels) → mm (RAS+)
    start       float16 (N, 3, 32, 32, 32)  of crops alone: coordinates to start from, over the cube from face to face
    names       utf-8   (N,)          one per exam, each once, sorted; the rows of all datasets stand in this order

HDF5 does not survive a process that is killed while it writes. So a build appends each exam, with its checksum, to a
journal beside the cohort (`.NAME.journal`), and at its end, or when it is interrupted, merges journal and cohort into a
new file that takes the old one's place in one step. A build that was killed leaves the old cohort untouched and the
journal behind; the next one reads the journal up to the last whole exam and goes on. While they are merged, the disk
holds both.
"""

import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from glob import escape
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

import h5py
import numpy as np

from deepatlas.config import CUBE
from deepatlas.errors import CohortError, DeepAtlasError, ExamError
from deepatlas.files import Exam, exam_name, find_inputs, read_exam
from deepatlas.prepare import Prepared, fixed_extent_mm, prepare

FORMAT = "deepatlas-cohort"
VERSION = 1
JOURNAL_FORMAT = "deepatlas-cohort-journal"
FLUSH_EVERY = 8
START_NODES = 32
"""Along each axis of the coordinates that a cohort of crops comes with."""


def _kinds(region: str) -> dict[str, str]:
    """The arrays of a cohort and their types; crops have one more."""
    kinds = {"hu": "<i2", "foreground": "|u1", "box_to_mm": "<f8"}
    if region.startswith(CUBE):
        kinds["start"] = "<f2"
    return kinds


def _shape(key: str, size: int) -> tuple[int, ...]:
    """The shape of an exam's part of an array."""
    return {"box_to_mm": (4, 4), "start": (3, *(START_NODES,) * 3)}.get(key, (size,) * 3)


class CohortArrays(NamedTuple):
    """A cohort in memory, sorted by name: hu int16 and foreground bool (N, n, n, n), box_to_mm float64 (N, 4, 4)."""

    names: list[str]
    hu: np.ndarray
    foreground: np.ndarray
    box_to_mm: np.ndarray
    start: np.ndarray | None = None
    """Of crops, the coordinates that the model above gave them: float16 (N, 3, m, m, m), m = `START_NODES`, over the
    cube from face to face, in the frame of the finer atlas."""


@dataclass(frozen=True)
class BuildReport:
    """What a build did: how many exams were added and kept, and by name why others failed or what was repaired."""

    added: int
    kept: int
    failed: dict[str, str] = field(default_factory=dict)
    repaired: dict[str, str] = field(default_factory=dict)


class Row(NamedTuple):
    """One prepared exam, as `CohortArrays` holds many."""

    hu: np.ndarray
    foreground: np.ndarray
    box_to_mm: np.ndarray
    repairs: tuple[str, ...]
    start: np.ndarray | None = None

    @classmethod
    def of(cls, prepared: Prepared, repairs: tuple[str, ...], start: np.ndarray | None = None) -> Self:
        """A prepared exam, its HU rounded."""
        hu = np.clip(np.rint(prepared.hu), -32768, 32767).astype(np.int16)
        return cls(hu, prepared.foreground, prepared.box_to_mm, repairs, start)


class Cohort:
    """A cohort file, open for reading. Use it in a `with`, or call `close`.

    Raises:
        CohortError: the file is missing, broken, not a cohort, or of another version.
    """

    def __init__(self, path: Path | str) -> None:
        """Open the file and read its table of names."""
        self.path = Path(path)
        self._file = _open(self.path)
        try:
            self.size, self.region, self.names = _header(self._file, self.path)
            self._index = {name: position for position, name in enumerate(self.names)}
            self.failed: dict[str, str] = json.loads(self._file.attrs["failed"])
        except BaseException:
            self._file.close()
            raise

    def __len__(self) -> int:
        """How many exams the cohort holds."""
        return len(self.names)

    def __enter__(self) -> Self:
        """The cohort itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def index(self, name: str) -> int:
        """Position of an exam in `names`, and so in the arrays of `load`.

        Raises:
            CohortError: the cohort does not hold it.
        """
        if name not in self._index:
            near = ", ".join(self.names[:3])
            raise CohortError(
                f'Expected the name of an exam in {self.path.name} ({near}, …), got "{name}"; choose one.'
            )
        return self._index[name]

    def box_to_mm(self) -> np.ndarray:
        """The boxes of all exams alone, (exam, 4, 4) float64."""
        return np.asarray(self._file["box_to_mm"])

    def load(self) -> CohortArrays:
        """Everything, in memory, sorted by name."""
        arrays = {}
        try:
            for key in _kinds(self.region):
                data = self._file[key]
                arrays[key] = np.empty(data.shape, dtype=data.dtype)
                if len(self):
                    data.read_direct(arrays[key])
        except (OSError, RuntimeError) as error:
            raise CohortError(f"{self.path.name}: expected whole arrays, got {_line(error)}; build it again.") from None
        arrays["foreground"] = arrays["foreground"].view(bool)
        return CohortArrays(list(self.names), **arrays)


def build(
    inputs: Path | str,
    cohort: Path | str,
    size: int = 64,
    region: str = "body",
    workers: int | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
    executor: Executor | None = None,
    cut: Callable[[Exam], Row] | None = None,
) -> BuildReport:
    """Prepare a folder of exams into a cohort file, or go on with one.

    Exams that are in the file already are kept and not read again; an interrupted build goes on where it stopped. An
    exam that cannot be used is listed with its reason and the others go on; the next build tries it again. The
    result depends only on the exams, not on who was done first.

    Args:
        inputs: a NIfTI file or a folder of them.
        cohort: the HDF5 file to make or to extend.
        size: voxels along each axis of the prepared grid.
        region: "body", "exam" or a cube such as "320mm", see `prepare`.
        workers: processes; None takes one per core, 0 works in this process.
        on_progress: called in this process as `on_progress(done, total, name)` after each exam.
        executor: where to prepare, instead of own processes; it is left open.
        cut: makes crops instead of `prepare`, in this process, of the region that `region` describes.

    Raises:
        ExamError: `inputs` holds no exam.
        CohortError: the file is no cohort, has other settings or is in use, no exam could be prepared, or workers died.
    """
    cohort = Path(cohort)
    exams = {exam_name(path): path for path in find_inputs(inputs)}
    stored: set[str] = set()
    noted: dict[str, str] = {}
    if cohort.exists():
        with Cohort(cohort) as file:
            _check_settings((file.size, file.region), (size, region), cohort)
            stored, noted = set(file.names), file.failed
    else:
        _check_new(cohort, size, region)
    failed: dict[str, str] = {}
    repaired: dict[str, str] = {}
    added = 0
    whole = False
    journal = _Journal(cohort, size, region)
    try:
        stored.update(journal.rows)
        todo = [name for name in sorted(exams) if name not in stored]
        work = partial(_cut_file, cut=cut) if cut else partial(_prepare_file, size=size, region=region)
        results = _prepared([(name, exams[name]) for name in todo], work, 0 if cut else workers, executor)
        try:
            for done, (name, outcome) in enumerate(results, start=1):
                if isinstance(outcome, str):
                    failed[name] = outcome
                else:
                    journal.append(name, outcome)
                    added += 1
                    if outcome.repairs:
                        repaired[name] = "; ".join(outcome.repairs)
                if on_progress is not None:
                    on_progress(done, len(todo), name)
        except BrokenExecutor:
            raise CohortError(
                "Expected the workers to finish, but one died: out of memory, or started from a script without "
                '`if __name__ == "__main__":`; build again with fewer workers, what is stored is kept.'
            ) from None
        finally:
            results.close()
            if journal.rows or (cohort.exists() and failed != noted):
                _merge(cohort, journal, size, region, failed)
        whole = True
    except OSError as error:
        raise CohortError(
            f"Expected to write {cohort}, but could not ({_line(error)}); check its folder and space and build again."
        ) from None
    finally:
        journal.close(remove=whole or not journal.rows)
    if not added and not stored:
        name, reason = next(iter(failed.items()))
        raise CohortError(
            f"Expected exams that can be prepared, but all {len(failed)} failed; the first, {name}: {reason}"
        )
    return BuildReport(added, len(exams) - len(todo), failed, repaired)


class _Journal:
    """Prepared exams that are not in the cohort yet: a line of settings, then per exam a line and its bytes.

    It is only ever appended to; what follows the last whole exam is cut off when it is opened.
    """

    def __init__(self, cohort: Path, size: int, region: str) -> None:
        """Open or make the journal of a cohort, alone, and find its exams."""
        self.path = cohort.with_name(f".{cohort.name}.journal")
        self.rows: dict[str, int] = {}  # name -> where its bytes begin
        self._size, self._kinds = size, _kinds(region)
        try:
            self._file: BinaryIO = open(self.path, "a+b")  # noqa: SIM115
        except OSError as error:
            raise CohortError(f"Expected to write beside {cohort}, but could not ({_line(error)}); check it.") from None
        try:
            _lock(self._file, cohort)
            self._recover(region, cohort)
        except BaseException:
            self._file.close()
            raise

    @property
    def _length(self) -> int:
        return sum(np.dtype(kind).itemsize * np.prod(_shape(key, self._size)) for key, kind in self._kinds.items())

    def _recover(self, region: str, cohort: Path) -> None:
        settings = {"format": JOURNAL_FORMAT, "version": VERSION, "size": self._size, "region": region}
        self._file.seek(0)
        first = self._file.readline()
        if not first.endswith(b"\n"):  # new, or killed before the first line was whole
            self._file.truncate(0)
            self._file.write(json.dumps(settings).encode() + b"\n")
            self._file.flush()
            return
        try:
            found = json.loads(first)
            found_settings = (int(found["size"]), str(found["region"]))
        except (ValueError, KeyError, TypeError):
            raise CohortError(f"Expected a journal, but {self.path.name} is something else; delete it.") from None
        if found != settings:
            _check_settings(found_settings, (self._size, region), self.path)
            raise CohortError(f"{self.path.name} was written by another version; delete it and build again.")
        good = self._file.tell()
        while True:
            try:
                entry = json.loads(self._file.readline())
                start = self._file.tell()
                data = self._file.read(self._length)
                if len(data) != self._length or zlib.crc32(data) != entry["crc"]:
                    break
                self.rows[str(entry["name"])] = start
            except (ValueError, KeyError, TypeError):
                break
            good = self._file.tell()
        self._file.truncate(good)

    def append(self, name: str, row: Row) -> None:
        """Write one exam at the end."""
        data = b"".join(getattr(row, key).astype(kind).tobytes() for key, kind in self._kinds.items())
        self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps({"name": name, "crc": zlib.crc32(data)}).encode() + b"\n")
        start = self._file.tell()
        self._file.write(data)
        self.rows[name] = start
        if len(self.rows) % FLUSH_EVERY == 0:
            self._file.flush()

    def read(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of one exam."""
        self._file.seek(self.rows[name])
        found = {}
        for key, kind in self._kinds.items():
            shape = _shape(key, self._size)
            numbers = self._file.read(np.dtype(kind).itemsize * int(np.prod(shape)))
            found[key] = np.frombuffer(numbers, kind).reshape(shape)
        return found

    def close(self, remove: bool) -> None:
        """Close the journal, and remove it once its exams are in the cohort."""
        if remove:
            self.path.unlink(missing_ok=True)
        self._file.close()


def _lock(file: BinaryIO, cohort: Path) -> None:
    """Hold the journal alone until it is closed, or the process ends; where the system has no such lock, do nothing."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CohortError(
            f"Expected {cohort.name} to be free, but another build writes to it; wait for that one."
        ) from None


def _merge(cohort: Path, journal: _Journal, size: int, region: str, failed: dict[str, str]) -> None:
    """Write the cohort anew with the journal's exams, sorted by name, and put it into place in one step."""
    for left in cohort.parent.glob(f".{escape(cohort.name)}.*.part"):  # of builds that were killed: we hold the lock
        with suppress(OSError):  # where there is none, another build may be writing
            left.unlink()
    part = cohort.with_name(f".{cohort.name}.{os.getpid()}.part")
    old = _open(cohort) if cohort.exists() else None
    try:
        before = {} if old is None else {name: row for row, name in enumerate(_header(old, cohort)[2])}
        names = sorted(before.keys() | journal.rows.keys())
        with h5py.File(part, "w") as file:
            file.attrs.update(format=FORMAT, version=VERSION, size=size, region=region, failed=json.dumps(failed))
            rows = len(names)
            sets = {}
            for key, kind in _kinds(region).items():
                shape, chunk = _shape(key, size), 64 if key == "box_to_mm" else 1
                sets[key] = file.create_dataset(
                    key, (rows, *shape), kind, maxshape=(None, *shape), chunks=(chunk, *shape)
                )
            kind = h5py.string_dtype("utf-8")
            file.create_dataset("names", (rows,), kind, data=names, maxshape=(None,), chunks=(256,))
            for row, name in enumerate(names):
                arrays = journal.read(name) if name in journal.rows else None
                for key, data in sets.items():
                    data[row] = old[key][before[name]] if arrays is None else arrays[key]
        with open(part, "r+b") as written:
            os.fsync(written.fileno())
        os.replace(part, cohort)
        journal.rows.clear()
    finally:
        if old is not None:
            old.close()
        part.unlink(missing_ok=True)


def _prepare_file(path: Path, size: int, region: str) -> Row:
    """Read and prepare one exam; runs in a worker."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # repairs go into the report
        exam = read_exam(path)
    return Row.of(prepare(exam, size, region), exam.repairs)


def _cut_file(path: Path, cut: Callable[[Exam], Row]) -> Row:
    """Read one exam and cut it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cut(read_exam(path))


def _prepared(
    todo: list[tuple[str, Path]], work: Callable[[Path], Row], workers: int | None, executor: Executor | None
) -> Iterator[tuple[str, Row | str]]:
    """Each exam's row, or why there is none, in the order given; a few are on the way at any time."""
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers, len(todo))
    if executor is None and workers <= 1:
        for name, path in todo:
            yield name, _outcome(lambda path=path: work(path))
        return
    own = executor is None
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if executor is None else executor
    ahead = 4 * max(workers, 4)
    waiting: list[tuple[str, Future[Row]]] = []
    source = iter(todo)
    try:
        while True:
            while len(waiting) < ahead and (following := next(source, None)) is not None:
                waiting.append((following[0], pool.submit(work, following[1])))
            if not waiting:
                return
            name, future = waiting.pop(0)
            yield name, _outcome(future.result)
    finally:
        for _, future in waiting:
            future.cancel()
        if own:
            pool.shutdown(wait=True, cancel_futures=True)


def _outcome(work: Callable[[], Row]) -> Row | str:
    try:
        return work()
    except DeepAtlasError as error:
        return str(error)
    except BrokenExecutor:
        raise
    except MemoryError:
        return "Expected the exam to fit into memory, but it does not; use fewer workers or crop it."
    except Exception as error:  # one odd file must not end a build of thousands
        return f"Expected an exam that can be prepared, got {type(error).__name__}: {_line(error)}; export it again."


def _line(error: BaseException) -> str:
    text = str(error).splitlines()
    return text[0] if text else type(error).__name__


def _open(path: Path) -> h5py.File:
    if not path.exists():
        raise CohortError(f"Expected a cohort, but {path} does not exist; make it with `deepatlas prepare`.")
    try:
        return h5py.File(path, "r")
    except BlockingIOError:
        raise CohortError(f"Expected {path.name} to be free, but another process writes to it; wait for it.") from None
    except OSError as error:
        raise CohortError(
            f"Expected a cohort, but {path.name} cannot be opened ({_line(error)}); delete it and build it again."
        ) from None


def _header(file: h5py.File, path: Path) -> tuple[int, str, list[str]]:
    """Size, region and names of a cohort that is sound."""
    attributes = file.attrs
    if attributes.get("format") != FORMAT:
        raise CohortError(
            f"Expected a cohort, but {path.name} is another HDF5 file; make one with `deepatlas prepare`."
        )
    version = attributes.get("version")
    if version != VERSION:
        raise CohortError(
            f"Expected a cohort of version {VERSION}, but {path.name} is of version {version}; build it again."
        )
    try:
        size, region = int(attributes["size"]), str(attributes["region"])
        if not isinstance(json.loads(attributes["failed"]), dict):
            raise TypeError("failed is no table")
        names = [name.decode("utf-8") for name in file["names"][:]]
        found = {key: (file[key].shape, file[key].dtype.str) for key in _kinds(region)}
    except (KeyError, ValueError, TypeError, AttributeError, OSError, RuntimeError) as error:
        raise CohortError(f"{path.name}: expected a whole cohort, got {_line(error)}; build it again.") from None
    if found != {key: ((len(names), *_shape(key, size)), kind) for key, kind in _kinds(region).items()}:
        raise CohortError(
            f"{path.name}: expected {len(names)} exams of {size}³ voxels, got {found['hu'][0]}; build it again."
        )
    if any(after <= before for before, after in pairwise(names)):
        raise CohortError(f"{path.name}: expected each name once and sorted, got another order; build it again.")
    return size, region, names


def _check_settings(found: tuple[int, str], wanted: tuple[int, str], path: Path) -> None:
    if found != wanted:
        raise CohortError(
            f"Expected size {found[0]} and region {found[1]}, as {path.name} was built, got size {wanted[0]} and "
            f"region {wanted[1]}; use those, or another file."
        )


def _check_new(path: Path, size: int, region: str) -> None:
    if size < 4:
        raise CohortError(f"Expected a size of at least 4, got {size}; 64 is usual.")
    try:
        if not region.startswith(CUBE):
            fixed_extent_mm(region)
    except ExamError as error:
        raise CohortError(str(error)) from None
    if not path.absolute().parent.is_dir():
        raise CohortError(f"Expected a folder for {path.name}, but {path.parent} does not exist; make it first.")
