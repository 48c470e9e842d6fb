"""Cohorts: built in one go or in several, whole after an interruption, and refused where they cannot be trusted."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest

from deepatlas import store
from deepatlas.errors import CohortError, ExamError
from deepatlas.files import read_exam
from deepatlas.prepare import prepare
from deepatlas.store import Cohort, build

SIZE = 8


def make(folder: Path, *names: str) -> Path:
    """Small exams, each with a patient of its own width and HU."""
    folder.mkdir(exist_ok=True)
    for name in names:
        random = np.random.default_rng(sum(name.encode()))
        array = np.full((20, 22, 18), -1000, np.int16)
        wide = int(random.integers(4, 8))
        array[10 - wide : 10 + wide, 4:18, 3:15] = random.integers(-100, 100, (2 * wide, 14, 12))
        nib.Nifti1Image(array, np.diag([-3.0, 3.0, 4.0, 1.0])).to_filename(folder / f"{name}.nii.gz")
    return folder


@pytest.fixture
def exams(tmp_path) -> Path:
    """A folder of five exams whose names are not written in order."""
    return make(tmp_path / "exams", "c", "a", "e", "b", "d")


def same(left: Path, right: Path) -> None:
    """Both cohorts read the same."""
    with Cohort(left) as one, Cohort(right) as two:
        first, second = one.load(), two.load()
    assert first.names == second.names
    for before, after in zip(first[1:4], second[1:4], strict=True):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)


def test_a_cohort_holds_what_prepare_gives(exams, tmp_path):
    seen = []
    report = build(exams, tmp_path / "c.h5", SIZE, workers=0, on_progress=lambda *step: seen.append(step))
    assert (report.added, report.kept, report.failed, report.repaired) == (5, 0, {}, {})
    assert seen == [(n + 1, 5, name) for n, name in enumerate("abcde")]
    with Cohort(tmp_path / "c.h5") as cohort:
        assert (cohort.names, len(cohort), cohort.size, cohort.region) == (list("abcde"), 5, SIZE, "body")
        assert cohort.failed == {}
        arrays = cohort.load()
        assert arrays.names == cohort.names
        assert (arrays.hu.dtype, arrays.foreground.dtype, arrays.box_to_mm.dtype) == (np.int16, bool, np.float64)
        for name in "abcde":
            prepared = prepare(read_exam(exams / f"{name}.nii.gz"), SIZE)
            row = cohort.index(name)
            assert np.abs(arrays.hu[row] - prepared.hu).max() <= 0.5
            np.testing.assert_array_equal(arrays.foreground[row], prepared.foreground)
            np.testing.assert_array_equal(arrays.box_to_mm[row], prepared.box_to_mm)
        with pytest.raises(CohortError, match="choose one"):
            cohort.index("z")


def test_the_format_is_the_documented_one(exams, tmp_path):
    build(exams, tmp_path / "c.h5", SIZE, region="exam", workers=0)
    with h5py.File(tmp_path / "c.h5") as file:
        assert file.attrs["format"] == "deepatlas-cohort"
        assert (file.attrs["version"], file.attrs["size"]) == (1, SIZE)
        assert (file.attrs["region"], json.loads(file.attrs["failed"])) == ("exam", {})
        assert set(file) == {"hu", "foreground", "box_to_mm", "names"}
        assert (file["hu"].dtype, file["hu"].shape) == (np.int16, (5, SIZE, SIZE, SIZE))
        assert (file["hu"].chunks, file["hu"].compression, file["hu"].maxshape[0]) == (
            (1, SIZE, SIZE, SIZE),
            None,
            None,
        )
        assert (file["foreground"].dtype, file["foreground"].shape) == (np.uint8, (5, SIZE, SIZE, SIZE))
        assert (file["box_to_mm"].dtype, file["box_to_mm"].shape) == (np.float64, (5, 4, 4))
        assert [name.decode() for name in file["names"]] == list("abcde")


def test_names_of_any_language(tmp_path):
    build(make(tmp_path / "exams", "Übung 1", "胸部"), tmp_path / "c.h5", SIZE, workers=0)
    with Cohort(tmp_path / "c.h5") as cohort:
        assert cohort.names == ["Übung 1", "胸部"]


def test_processes_give_the_same_as_one(exams, tmp_path):
    build(exams, tmp_path / "one.h5", SIZE, workers=0)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        report = build(exams, tmp_path / "two.h5", SIZE, executor=pool)
        assert pool.submit(len, "abc").result() == 3  # left open
    assert report.added == 5
    same(tmp_path / "one.h5", tmp_path / "two.h5")


class Backwards(Executor):
    """Finishes its work in the wrong order: each call waits for all later ones."""

    def __init__(self) -> None:
        self.work = []

    def submit(self, function, *values):
        future: Future = Future()
        future.result = lambda timeout=None: self.finish(future)
        self.work.append((future, function, values))
        return future

    def finish(self, wanted):
        done = {id(future): function(*values) for future, function, values in reversed(self.work)}
        return done[id(wanted)]


def test_the_order_is_that_of_the_names(exams, tmp_path):
    build(exams, tmp_path / "one.h5", SIZE, workers=0)
    build(exams, tmp_path / "two.h5", SIZE, executor=Backwards())
    with h5py.File(tmp_path / "two.h5") as file:
        assert [name.decode() for name in file["names"]] == list("abcde")
    same(tmp_path / "one.h5", tmp_path / "two.h5")


def test_a_cohort_grows_and_still_reads_in_order(tmp_path, monkeypatch):
    folder = make(tmp_path / "exams", "b", "d")
    build(folder, tmp_path / "grown.h5", SIZE, workers=0)
    make(folder, "a", "c", "e")
    read = []
    inner = store.read_exam
    monkeypatch.setattr(store, "read_exam", lambda path: read.append(path.name) or inner(path))
    report = build(folder, tmp_path / "grown.h5", SIZE, workers=0)
    assert (report.added, report.kept) == (3, 2)
    assert read == ["a.nii.gz", "c.nii.gz", "e.nii.gz"]
    build(folder, tmp_path / "once.h5", SIZE, workers=0)
    with Cohort(tmp_path / "grown.h5") as cohort:
        assert cohort.names == list("abcde")
    same(tmp_path / "grown.h5", tmp_path / "once.h5")
    assert build(folder, tmp_path / "grown.h5", SIZE, workers=0).kept == 5


def test_bad_files_are_listed_and_the_rest_goes_on(exams, tmp_path):
    (exams / "b.nii.gz").write_bytes(b"nonsense")
    (exams / "x.nii").write_bytes((exams / "a.nii.gz").read_bytes()[:200])
    with ThreadPoolExecutor(2) as pool:
        report = build(exams, tmp_path / "c.h5", SIZE, executor=pool)
    assert (report.added, set(report.failed)) == (4, {"b", "x"})
    assert "NIfTI" in report.failed["b"]
    assert "gzip" in report.failed["x"]
    with Cohort(tmp_path / "c.h5") as cohort:
        assert cohort.names == list("acde")
        assert cohort.failed == report.failed
    make(exams, "b")  # mended
    report = build(exams, tmp_path / "c.h5", SIZE, workers=0)
    assert (report.added, report.kept, set(report.failed)) == (1, 4, {"x"})
    with Cohort(tmp_path / "c.h5") as cohort:
        assert cohort.names == list("abcde")
        assert set(cohort.failed) == {"x"}
    (exams / "x.nii").unlink()
    build(exams, tmp_path / "c.h5", SIZE, workers=0)
    with Cohort(tmp_path / "c.h5") as cohort:
        assert cohort.failed == {}


def test_an_odd_error_does_not_end_the_build(exams, tmp_path, monkeypatch):
    inner = store.read_exam

    def read(path):
        if path.name == "c.nii.gz":
            raise ZeroDivisionError("odd\nfile")
        return inner(path)

    monkeypatch.setattr(store, "read_exam", read)
    report = build(exams, tmp_path / "c.h5", SIZE, workers=0)
    assert report.added == 4
    assert "ZeroDivisionError: odd;" in report.failed["c"]


def test_many_failures_fit(exams, tmp_path):
    """Reasons beyond 64 KiB, the usual limit of an attribute."""
    for number in range(900):
        (exams / f"bad_{number:04d}.nii").write_bytes(b"")
    report = build(exams, tmp_path / "c.h5", SIZE, workers=0)
    assert len(json.dumps(report.failed)) > 100_000
    with Cohort(tmp_path / "c.h5") as cohort:
        assert cohort.failed == report.failed


def test_repairs_are_reported(exams, tmp_path):
    image = nib.load(exams / "a.nii.gz")
    array = image.get_fdata().astype(np.float32)
    array[0, 0, 0] = np.nan
    nib.Nifti1Image(array, image.affine).to_filename(exams / "a.nii.gz")
    report = build(exams, tmp_path / "c.h5", SIZE, workers=0)
    assert set(report.repaired) == {"a"}
    assert "NaN" in report.repaired["a"]


def test_nothing_to_prepare(tmp_path):
    folder = make(tmp_path / "exams")
    with pytest.raises(ExamError, match="found none"):
        build(folder, tmp_path / "c.h5", SIZE)
    (folder / "a.nii").write_bytes(b"")
    with pytest.raises(CohortError, match="all 1 failed; the first, a"):
        build(folder, tmp_path / "c.h5", SIZE)
    assert not (tmp_path / "c.h5").exists()


def test_an_interrupted_build_goes_on(exams, tmp_path):
    def stop(done, total, name):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(exams, tmp_path / "c.h5", SIZE, workers=0, on_progress=stop)
    with Cohort(tmp_path / "c.h5") as cohort:
        assert cohort.names == list("abc")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.h5", "exams"]
    report = build(exams, tmp_path / "c.h5", SIZE, workers=0)
    assert (report.added, report.kept) == (2, 3)
    build(exams, tmp_path / "once.h5", SIZE, workers=0)
    same(tmp_path / "c.h5", tmp_path / "once.h5")


def interrupted(folder: Path, cohort: Path, monkeypatch: pytest.MonkeyPatch, done: int) -> Path:
    """The journal that a build leaves when it ends after some exams without a chance to merge."""

    def stop(count, total, name):
        if count == done:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "_merge", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            build(folder, cohort, SIZE, workers=0, on_progress=stop)
    journal = cohort.with_name(f".{cohort.name}.journal")
    assert journal.exists()
    assert not cohort.exists()
    return journal


@pytest.mark.parametrize("cut", [1, 100, 3 * SIZE**3 + 127, 3 * SIZE**3 + 129, 3 * SIZE**3 + 150])
def test_a_half_written_exam_does_not_count(exams, tmp_path, monkeypatch, cut):
    """Whatever is missing at the journal's end, only the exam that it belongs to is prepared again."""
    journal = interrupted(exams, tmp_path / "c.h5", monkeypatch, 3)
    data = journal.read_bytes()
    journal.write_bytes(data[:-cut])
    report = build(exams, tmp_path / "c.h5", SIZE, workers=0)
    assert (report.added, report.kept) == (3, 2)
    build(exams, tmp_path / "once.h5", SIZE, workers=0)
    same(tmp_path / "c.h5", tmp_path / "once.h5")
    assert not journal.exists()


def test_interrupted_twice(exams, tmp_path, monkeypatch):
    """What stands after a half-written exam is found again."""
    journal = interrupted(exams, tmp_path / "c.h5", monkeypatch, 2)
    journal.write_bytes(journal.read_bytes()[:-50])
    interrupted(exams, tmp_path / "c.h5", monkeypatch, 3)
    report = build(exams, tmp_path / "c.h5", SIZE, workers=0)
    assert (report.added, report.kept) == (1, 4)
    build(exams, tmp_path / "once.h5", SIZE, workers=0)
    same(tmp_path / "c.h5", tmp_path / "once.h5")


def test_a_changed_byte_in_the_journal_is_seen(exams, tmp_path, monkeypatch):
    journal = interrupted(exams, tmp_path / "c.h5", monkeypatch, 3)
    data = bytearray(journal.read_bytes())
    data[-5] ^= 1
    journal.write_bytes(data)
    assert build(exams, tmp_path / "c.h5", SIZE, workers=0).kept == 2


def test_a_journal_of_other_settings(exams, tmp_path, monkeypatch):
    journal = interrupted(exams, tmp_path / "c.h5", monkeypatch, 3)
    with pytest.raises(CohortError, match=r"size 8 .*size 16"):
        build(exams, tmp_path / "c.h5", 16, workers=0)
    assert journal.exists()
    assert build(exams, tmp_path / "c.h5", SIZE, workers=0).kept == 3
    journal.write_bytes(b"something\n")
    with pytest.raises(CohortError, match="delete it"):
        build(exams, tmp_path / "c.h5", SIZE, workers=0)
    journal.write_bytes(b'{"form')  # killed within its first line
    assert build(exams, tmp_path / "c.h5", SIZE, workers=0).kept == 5
    assert not journal.exists()


def test_a_merge_that_fails_leaves_everything(exams, tmp_path, monkeypatch):
    """No space for the new file: the old cohort stays, and nothing has to be prepared again."""
    build(make(tmp_path / "some", "a", "c"), tmp_path / "c.h5", SIZE, workers=0)
    before = (tmp_path / "c.h5").read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(CohortError, match="No space"):
            build(exams, tmp_path / "c.h5", SIZE, workers=0)
    assert (tmp_path / "c.h5").read_bytes() == before
    assert not list(tmp_path.glob(".*.part"))
    report = build(exams, tmp_path / "c.h5", SIZE, workers=0)
    assert (report.added, report.kept) == (0, 5)


def test_what_a_killed_merge_left_is_removed(exams, tmp_path):
    left, kept = tmp_path / ".c[1].h5.4711.part", tmp_path / ".d.h5.4711.part"
    for file in (left, kept):
        file.write_bytes(b"half")
    build(exams, tmp_path / "c[1].h5", SIZE, workers=0)
    assert not left.exists()
    assert kept.exists()


@pytest.mark.parametrize("after", [9, 40, 59])
def test_a_killed_build_goes_on(tmp_path, after):
    """SIGKILL in the middle: what was flushed is kept, and the next build completes the cohort."""
    folder = make(tmp_path / "exams", *[f"p{number:03d}" for number in range(60)])
    build(make(tmp_path / "other", "z"), tmp_path / "c.h5", SIZE, workers=0)
    script = textwrap.dedent(
        f"""
        import time
        from deepatlas.store import build
        build({str(folder)!r}, {str(tmp_path / "c.h5")!r}, {SIZE}, workers=0,
              on_progress=lambda done, total, name: (print(done, flush=True), time.sleep(0.002)))
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) == after:
            os.kill(process.pid, signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    with Cohort(tmp_path / "c.h5") as cohort:
        assert "z" in cohort.names
    report = build(folder, tmp_path / "c.h5", SIZE, workers=0)
    assert report.added + report.kept == 60
    assert report.kept >= after // store.FLUSH_EVERY * store.FLUSH_EVERY
    make(folder, "z")
    build(folder, tmp_path / "once.h5", SIZE, workers=0)
    same(tmp_path / "c.h5", tmp_path / "once.h5")


class Dying(Executor):
    """Its second task finds that a worker has died."""

    def __init__(self) -> None:
        self.count = 0

    def submit(self, function, *values):
        future: Future = Future()
        self.count += 1
        if self.count == 2:
            future.set_exception(BrokenProcessPool("a child process terminated abruptly"))
        else:
            future.set_result(function(*values))
        return future


def test_a_worker_that_dies(exams, tmp_path):
    with pytest.raises(CohortError, match="fewer workers"):
        build(exams, tmp_path / "c.h5", SIZE, executor=Dying())
    with Cohort(tmp_path / "c.h5") as cohort:
        assert cohort.names == ["a"]


def test_other_settings_are_refused(exams, tmp_path):
    build(exams, tmp_path / "c.h5", SIZE, workers=0)
    with pytest.raises(CohortError, match=r"size 8 and region body.*size 16 and region exam"):
        build(exams, tmp_path / "c.h5", 16, "exam", workers=0)
    with pytest.raises(CohortError, match="region exam"):
        build(exams, tmp_path / "c.h5", SIZE, "exam", workers=0)
    with pytest.raises(CohortError, match="choose one"):
        build(exams, tmp_path / "new.h5", SIZE, "head", workers=0)
    with pytest.raises(CohortError, match="does not exist"):
        build(exams, tmp_path / "nowhere" / "new.h5", SIZE, workers=0)


def refused(path: Path, word: str, folder: Path) -> None:
    """Neither a reader nor a writer takes the file."""
    for use in (lambda: Cohort(path), lambda: build(folder, path, SIZE, workers=0)):
        with pytest.raises(CohortError, match=word) as caught:
            use()
        assert "\n" not in str(caught.value)


def test_files_that_are_no_cohort(exams, tmp_path):
    path = tmp_path / "c.h5"
    with pytest.raises(CohortError, match="does not exist"):
        Cohort(path)
    for content in (b"", b"hello" * 100):
        path.write_bytes(content)
        refused(path, "cannot be opened", exams)
    with h5py.File(path, "w") as file:
        file["data"] = np.zeros(3)
    refused(path, "another HDF5 file", exams)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda file: file.attrs.update(version=2), "version 2"),
        (lambda file: file.attrs.update(version="1"), "version 1"),
        (lambda file: file.attrs.update(size=9), "9³"),
        (lambda file: file.attrs.update(size="many"), "whole cohort"),
        (lambda file: file.attrs.update(failed="{"), "whole cohort"),
        (lambda file: file.attrs.__delitem__("region"), "whole cohort"),
        (lambda file: file.__delitem__("foreground"), "whole cohort"),
        (lambda file: file["hu"].resize(2, axis=0), "5 exams"),
        (lambda file: file["names"].__setitem__(1, "a"), "once and sorted"),
        (lambda file: file["names"].__setitem__(1, "x"), "once and sorted"),
        (lambda file: file["names"].resize(6, axis=0), "6 exams"),
        (lambda file: file.attrs.update(failed="[]"), "whole cohort"),
    ],
)
def test_changed_cohorts(exams, tmp_path, change, word):
    build(exams, tmp_path / "c.h5", SIZE, workers=0)
    with h5py.File(tmp_path / "c.h5", "r+") as file:
        change(file)
    refused(tmp_path / "c.h5", word, exams)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.99])
def test_a_cohort_that_was_cut_off(exams, tmp_path, keep):
    build(exams, tmp_path / "c.h5", SIZE, workers=0)
    data = (tmp_path / "c.h5").read_bytes()
    (tmp_path / "c.h5").write_bytes(data[: int(len(data) * keep)])
    refused(tmp_path / "c.h5", "cannot be opened", exams)


def test_two_builds_at_once(exams, tmp_path):
    """The second is told so, and neither disturbs the first nor a reader."""

    def second(done, total, name):
        if done == 2:
            with pytest.raises(CohortError, match="another build"):
                build(exams, tmp_path / "c.h5", SIZE, workers=0)

    report = build(exams, tmp_path / "c.h5", SIZE, workers=0, on_progress=second)
    assert report.added == 5
    with Cohort(tmp_path / "c.h5") as reader:
        make(exams, "f")
        assert build(exams, tmp_path / "c.h5", SIZE, workers=0).added == 1
        assert reader.load().names == list("abcde")
    with Cohort(tmp_path / "c.h5") as cohort:
        assert len(cohort) == 6


def test_real_exams(tmp_path):
    folder = os.environ.get("DEEPATLAS_DATA")
    if not folder or not (Path(folder) / "openkbp").is_dir():
        pytest.skip("needs DEEPATLAS_DATA, a folder that holds openkbp/")
    source = Path(folder) / "openkbp" / "validation" / "images"
    (tmp_path / "exams").mkdir()
    for path in sorted(source.glob("*.nii.gz"))[:4]:
        (tmp_path / "exams" / path.name).symlink_to(path.resolve())
    report = build(tmp_path / "exams", tmp_path / "c.h5", 32, workers=0)
    assert (report.added, report.failed) == (4, {})
    with Cohort(tmp_path / "c.h5") as cohort:
        share = cohort.load().foreground.mean(axis=(1, 2, 3))
    assert np.all((share > 0.05) & (share < 0.9))
