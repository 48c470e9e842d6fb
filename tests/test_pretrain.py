"""Training: the whole recipe at toy size, stopped and resumed to the bit, and blind to labels."""

import ast
import csv
import json
import logging
import re
import tracemalloc
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from deepatlas import augment, checkpoint, files, loop, store, views
from deepatlas import pretrain as recipe
from deepatlas.atlas import Region, Structure
from deepatlas.config import (
    Augmentation,
    AutoencoderStage,
    ConsolidationStage,
    Fitting,
    LevelStage,
    NetworkConfig,
    Preset,
    WarmStage,
)
from deepatlas.errors import CohortError, ModelError
from deepatlas.loop import NOT_FINITE_IN_A_ROW
from deepatlas.masks import LabelMaps
from deepatlas.objective import objective
from deepatlas.pretrain import Lent, Run, pretrain
from deepatlas.views import batch_of, by_anatomy, load_cohort

TINY = Preset(
    name="tiny",
    network=NetworkConfig(size=16, widths=(8, 16), head_channels=8, groups=4),
    autoencoder=AutoencoderStage(steps=2, batch=2, rate=0.003),
    warm=WarmStage(steps=12, batch=2, rate=0.004),
    levels=(LevelStage(steps=2, rate=0.003, warm_up=2, loss_size=16), LevelStage(steps=3, warm_up=2, loss_size=16)),
    consolidation=(ConsolidationStage(Fitting(steps=2, nodes=4, size=16), steps=3, whole=0.75, borrow=0.5),),
    batch=2,
    atlas_size=16,
    checkpoint_minutes=0.0,
)
STAGES = {
    "autoencoder": 2,
    "warm start": 12,
    "level 8³": 2,
    "level 16³": 3,
    "fitting 1": 2,
    "consolidation 1": 3,
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """Four exams of a body with a spine and a lung, each of its own size, spacing and storage; the largest is c."""
    folder = tmp_path_factory.mktemp("exams")
    for number, name in enumerate("abcd"):
        random = np.random.default_rng(number)
        spacing = np.array([9.0, 8.0, 12.0]) * random.uniform(0.9, 1.1, 3)
        shape = (26, 24, 22)
        affine = np.diag([-spacing[0] if number % 2 else spacing[0], spacing[1], spacing[2], 1.0])
        index = np.moveaxis(np.indices(shape), 0, -1)
        places = (index - (np.array(shape) - 1) / 2) * np.diag(affine)[:3]
        size = (1.2 if name == "c" else 1.0) * random.uniform(0.95, 1.05, 3)

        def blob(centre, half, places=places, size=size):
            return (((places - np.array(centre) * size) / (np.array(half) * size)) ** 2).sum(axis=-1) < 1

        hu = np.full(shape, -1000.0)
        hu[blob((0, 0, 0), (85, 65, 110))] = 30
        hu[blob((35, 10, 50), (28, 35, 45))] = -800
        hu[blob((0, -40, 0), (15, 15, 100))] = 300
        hu += 15 * random.standard_normal(shape)
        nib.Nifti1Image(hu.astype(np.int16), affine).to_filename(folder / f"{name}.nii.gz")
    path = folder / "cohort.h5"
    store.build(folder, path, 16, workers=0)
    return path


@pytest.fixture(scope="module")
def trained(cohort, tmp_path_factory) -> Path:
    """The folder of a training that was never stopped."""
    out = tmp_path_factory.mktemp("trained") / "model"
    pretrain(cohort, out, TINY)
    return out


def files_of(folder: Path) -> dict[str, bytes]:
    """What a model is made of."""
    return {name: (folder / name).read_bytes() for name in ("model.json", "weights.safetensors")}


def test_the_stages_come_in_the_order_of_the_paper_and_are_logged(cohort, trained, tmp_path, caplog):
    seen = []
    torch.manual_seed(99)  # global chance has no say
    with caplog.at_level(logging.INFO, "deepatlas.pretrain"):
        model = pretrain(cohort, tmp_path / "model", TINY, on_progress=seen.append)
    last = {p.stage: (p.step, p.steps) for p in seen}
    assert list(last.items()) == [(name, (n, n)) for name, n in STAGES.items()]
    assert [p.done for p in seen] == sorted({p.done for p in seen})
    assert (seen[-1].done, seen[-1].total) == (24, 24)
    assert seen[-1].seconds_left == 0
    assert seen[0].seconds_left > 0
    assert model.seed_exam == "c"  # the most anatomy
    assert model.level == 0
    log = (tmp_path / "model" / "training" / "log.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(log.splitlines()))
    assert list(dict.fromkeys(row["stage"] for row in rows)) == list(STAGES)
    for name in ("loss", "explicit", "implicit", "edges", "smooth_explicit", "smooth_implicit", "unsolved"):
        assert np.isfinite(float(rows[3][name])), name
    assert 0 <= float(rows[3]["folded"]) <= 1
    assert 0 <= float(rows[3]["converged"]) <= 1
    assert all(float(rows[3][name]) > 0 for name in ("s_augment", "s_network", "s_objective", "s_backward"))
    (jump,) = re.findall(r"level 16³ begins ([\d.]+) voxels from the level above", caplog.text)
    assert float(jump) <= 0.25
    assert files_of(tmp_path / "model") == files_of(trained)
    loaded = checkpoint.load(tmp_path / "model")
    for name, values in model.network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[name], values)


class Stopped(Exception):
    """A training was stopped from outside."""


@pytest.mark.parametrize("stop", [("autoencoder", 2), ("level 16³", 2), ("fitting 1", 2), ("consolidation 1", 3)])
def test_a_stopped_training_resumes_to_the_bit(stop, cohort, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 1)

    def interrupt(progress):
        if (progress.stage, progress.step) == stop:  # before this step is saved: it is done again
            raise Stopped

    out = tmp_path / "model"
    with pytest.raises(Stopped):
        pretrain(cohort, out, TINY, on_progress=interrupt)
    about = json.loads((out / "training" / "state.json").read_text(encoding="utf-8"))
    assert about["stage"] == list(STAGES).index(stop[0])
    assert about["step"] == stop[1] - 1
    rest = []
    pretrain(cohort, out, TINY, resume=True, on_progress=rest.append)
    assert (rest[0].stage, rest[0].step) == stop
    assert files_of(out) == files_of(trained)
    assert len(list((out / "training").glob("state-*"))) == 1


def test_a_training_stopped_between_stages_resumes_to_the_bit(cohort, trained, tmp_path):
    rare = replace(TINY, checkpoint_minutes=60.0)  # saved at the end of stages alone

    def interrupt(progress):
        if progress.stage == "fitting 1":
            raise Stopped

    with pytest.raises(Stopped):
        pretrain(cohort, tmp_path / "model", rare, on_progress=interrupt)
    pretrain(cohort, tmp_path / "model", rare, resume=True)
    assert files_of(tmp_path / "model") == files_of(trained)


def test_a_finished_training_resumes_to_itself(cohort, trained):
    before = files_of(trained)
    model = pretrain(cohort, trained, TINY, resume=True)
    assert files_of(trained) == before
    assert model.level == 0


def test_resuming_nothing_is_an_error_and_so_is_beginning_again(cohort, trained, tmp_path):
    with pytest.raises(ModelError, match="nothing to resume"):
        pretrain(cohort, tmp_path / "none", TINY, resume=True)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ModelError, match="already holds a model"):
        pretrain(cohort, trained, TINY)


def test_resuming_with_other_settings_names_what_differs(cohort, trained, tmp_path):
    with pytest.raises(ModelError, match="another preset;"):
        pretrain(cohort, trained, replace(TINY, seed=7), resume=True)
    with pytest.raises(ModelError, match="another seed_exam;"):
        pretrain(cohort, trained, TINY, seed_exam="a", resume=True)
    fewer = tmp_path / "exams"
    fewer.mkdir()
    for name in "abc":
        (fewer / f"{name}.nii.gz").symlink_to(cohort.parent / f"{name}.nii.gz")
    store.build(fewer, tmp_path / "fewer.h5", 16, workers=0)
    with pytest.raises(ModelError, match="another exams;"):
        pretrain(tmp_path / "fewer.h5", trained, TINY, resume=True)


def test_a_damaged_state_is_refused_by_name(cohort, trained, tmp_path):
    out = tmp_path / "model"
    training = out / "training"
    training.mkdir(parents=True)
    (state,) = (trained / "training").glob("state-*")
    (training / state.name).write_bytes(state.read_bytes()[:5000])
    (training / "state.json").write_bytes((trained / "training" / "state.json").read_bytes())
    with pytest.raises(ModelError, match=re.escape(state.name)):
        pretrain(cohort, out, TINY, resume=True)


def test_from_a_model_its_frame_and_its_structures_are_kept(cohort, trained, tmp_path):
    box = torch.tensor([[-0.1] * 3, [0.2] * 3])
    made = Structure("kept", 3, torch.ones(4, 4, 4), torch.ones(4, 4, 4), box, 0.5, 1)
    base = checkpoint.load(trained).with_structures(made).with_regions(Region.whole("cube", box))
    base = replace(base, landmarks={"tip": (0.1, 0.2, 0.3)})
    checkpoint.save(base, tmp_path / "base")
    seen = []
    levels = replace(TINY, consolidation=())
    for name, preset, stages in (
        ("rounds", TINY, ["fitting 1", "consolidation 1"]),
        ("level", levels, ["level 16³"]),
    ):
        seen.clear()
        pretrain(cohort, tmp_path / name, preset, start_from=tmp_path / "base", seed_exam="a", on_progress=seen.append)
        assert list(dict.fromkeys(p.stage for p in seen)) == stages
        grown = checkpoint.load(tmp_path / name)
        assert list(grown.structures) == ["kept"]
        assert torch.equal(grown.structures["kept"].mask, made.mask)
        assert (list(grown.regions), grown.landmarks) == (["cube"], base.landmarks)
        assert torch.equal(grown.seed_box_to_mm, base.seed_box_to_mm)
        assert (grown.seed_exam, grown.level) == ("c", 0)
        assert not torch.equal(grown.network.shared, base.network.shared)
    with pytest.raises(ModelError, match="another --from"):  # it would begin anew, in another frame
        pretrain(cohort, tmp_path / "rounds", TINY, seed_exam="c", resume=True)
    again = pretrain(cohort, tmp_path / "rounds", TINY, start_from=tmp_path / "base", seed_exam="a", resume=True)
    assert list(again.structures) == ["kept"]
    other = replace(TINY, network=replace(TINY.network, head_channels=4))
    with pytest.raises(ModelError, match="choose the preset it was trained with"):
        pretrain(cohort, tmp_path / "other", other, start_from=tmp_path / "base")


def test_labels_are_never_read(cohort, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a label was read")

    for module, name in ((files, "read_labels"), (files, "read_names"), (recipe.checkpoint, "load")):
        monkeypatch.setattr(module, name, refuse)
    pretrain(cohort, tmp_path / "model", replace(TINY, consolidation=()))
    package = Path(recipe.__file__).parent
    reached, waiting = set(), ["pretrain"]
    while waiting:  # nothing that training imports, however far down, reads the labels of exams or defines structures
        name = waiting.pop()
        if name in reached or not (package / f"{name}.py").exists():
            continue
        reached.add(name)
        for node in ast.walk(ast.parse((package / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deepatlas"):
                waiting += [node.module.split(".")[-1], *(alias.name for alias in node.names)]
    assert {"objective", "networks", "store"} <= reached
    assert not reached & {"locate", "library", "evaluate", "metrics", "phantom"}


@pytest.fixture(scope="module")
def drawn(cohort) -> LabelMaps:
    """Spine and lung of all exams but the first."""
    with store.Cohort(cohort) as opened:
        arrays = opened.load()
    within = np.stack([ndimage.binary_erosion(one, iterations=2) for one in arrays.foreground])
    maps = np.where(arrays.hu > 100, 1, np.where((arrays.hu < -200) & within, 2, 0)).astype(np.uint8)
    maps[0] = 0
    return LabelMaps.of(("spine", "lung"), torch.from_numpy(maps), drawn_in_part=["spine"])


LONGER = ConsolidationStage(Fitting(steps=12, rate=0.02, nodes=5, size=16), steps=40)


def test_joint_training_learns_from_labels_by_fits_and_by_the_network(cohort, drawn, trained):
    base = checkpoint.load(trained)

    def errors(weight: float) -> dict[str, list[float]]:
        """The error of the labels at every step after the levels, from one and the same map."""
        weights = replace(TINY.weights, labels=weight)
        preset = replace(TINY, weights=weights, consolidation=(LONGER,))
        run = Run.begin(load_cohort(cohort, preset, "cpu", drawn), preset, None, base, "cpu")
        found = {}
        for number, (name, steps, step_of) in enumerate(run.stages()):
            if not name.startswith("level"):
                run.enter(number)
                found[name] = [step_of(number, step)["labels"] for step in range(steps)]
        return found

    with_labels, without = errors(3.0), errors(0.0)
    assert list(with_labels) == ["fitting 1", "consolidation 1"]
    for stage in with_labels:
        assert all(0 < error < 4 for error in with_labels[stage]), stage
    assert np.mean(with_labels["fitting 1"]) < np.mean(without["fitting 1"]) - 0.005
    late = slice(LONGER.steps // 2, None)
    assert np.mean(with_labels["consolidation 1"][late]) < np.mean(without["consolidation 1"][late]) - 0.02


def test_joint_training_resumes_to_the_bit_and_with_the_same_labels_only(cohort, drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    pretrain(cohort, tmp_path / "whole", TINY, labels=drawn)

    def interrupt(progress):
        if (progress.stage, progress.step) == ("consolidation 1", 2):
            raise Stopped

    with pytest.raises(Stopped):
        pretrain(cohort, tmp_path / "model", TINY, labels=drawn, on_progress=interrupt)
    for other in (None, LabelMaps.of(drawn.names, drawn.maps)):
        with pytest.raises(ModelError, match="another --labels"):
            pretrain(cohort, tmp_path / "model", TINY, labels=other, resume=True)
    pretrain(cohort, tmp_path / "model", TINY, labels=drawn, resume=True)
    assert files_of(tmp_path / "model") == files_of(tmp_path / "whole")


def test_structures_in_the_atlas_are_how_often_they_are_drawn(cohort, drawn):
    data = load_cohort(cohort, TINY, "cpu", drawn)
    run = Run.begin(data, TINY, None, None, "cpu")
    same = recipe.MARGIN * recipe.grid.identity((16,) * 3)
    run._lay_masks([0, 1, 2, 3], lambda exam: same)
    where = recipe.grid.identity(tuple(run.masks.shape[2:])) / recipe.MARGIN
    lungs = torch.stack([(drawn.maps[exam] == 2).float() for exam in (1, 2, 3)]).mean(dim=0)
    there = recipe.grid.sample(lungs[None, None], where) * recipe.grid.inside(where)
    found = run.masks.detach()[0, 1]
    assert float(found.sum()) == pytest.approx(float(there.sum()), rel=0.15)
    places = recipe.grid.identity(tuple(found.shape))[0]
    middle, expected = ((places * one).sum(dim=(1, 2, 3)) / one.sum() for one in (found, there[0, 0]))
    assert (middle - expected).norm() < 0.04
    assert float(found.max()) > 0.8


def test_labels_of_another_cohort_are_refused(cohort, drawn, tmp_path):
    fewer = LabelMaps.of(drawn.names, drawn.maps[:2])
    with pytest.raises(CohortError, match="read them for this cohort"):
        pretrain(cohort, tmp_path / "model", TINY, labels=fewer)


def test_a_cohort_that_does_not_fit_is_refused(cohort, tmp_path):
    with pytest.raises(CohortError, match="no exam 'z'"):
        pretrain(cohort, tmp_path / "model", TINY, seed_exam="z")
    with pytest.raises(CohortError, match=re.escape("prepare it with --size 32")):
        pretrain(cohort, tmp_path / "model", replace(TINY, network=replace(TINY.network, size=32)))
    single = tmp_path / "single"
    single.mkdir()
    (single / "a.nii.gz").symlink_to(cohort.parent / "a.nii.gz")
    store.build(single, tmp_path / "single.h5", 16, workers=0)
    with pytest.raises(CohortError, match="at least 2"):
        pretrain(tmp_path / "single.h5", tmp_path / "model", TINY)
    assert not (tmp_path / "model").exists()


def begun(cohort: Path, seed: int = 0) -> Run:
    """A training before its first step."""
    return Run.begin(load_cohort(cohort, TINY, "cpu"), replace(TINY, seed=seed), None, None, "cpu")


def test_a_view_is_made_on_the_device_of_the_exams(cohort):
    """A device without memory stands for a GPU: it too refuses to be mixed with the CPU."""
    data = load_cohort(cohort, TINY, "meta")
    for crop in (False, True):
        view = data.view([0, 2], augment.keyed(0), TINY.augmentation, bend=0.05, crop=crop)
        for part in (view.seen, view.image, view.foreground, view.mm_per_box, view.places_box):
            assert part.device.type == "meta"


def test_the_atlas_begins_as_the_seed_exam_within_its_margin(cohort):
    run = begun(cohort)
    assert run.data.names[by_anatomy(run.data)[0]] == run.seed_name == "c"
    centre = run.atlas[0, 0, 4:12, 4:12, 4:12]
    assert centre.std() > 0.05
    where = torch.linspace(-1, 1, 16) / checkpoint.MARGIN
    assert (run.atlas[0, 0][where.abs() > 1] == 0).all()
    image = run.data.image[run.seed_index]
    assert float(run.atlas.detach().mean() / image.mean()) == pytest.approx(checkpoint.MARGIN**3, rel=0.1)


def test_a_view_shows_the_exam_where_it_says(cohort):
    run = begun(cohort)
    view = run.data.view([0, 2], run._chance(3, 1), TINY.augmentation, bend=0.05)
    again = run.data.view([0, 2], run._chance(3, 1), TINY.augmentation, bend=0.05)
    assert all(torch.equal(one, other) for one, other in zip(view[1:], again[1:], strict=True))
    for other in (run._chance(3, 2), run._chance(2, 1), begun(cohort, seed=1)._chance(3, 1)):
        assert not torch.equal(run.data.view([0, 2], other, TINY.augmentation, bend=0.05).image, view.image)
    assert ((view.seen >= 0) & (view.seen <= 1)).all()
    inside = (view.places_box.abs() <= 1).all(dim=1, keepdim=True)
    assert (view.image[~inside] == 0).all()
    assert not (view.foreground & ~inside).any()
    plain = replace(TINY.augmentation, scale=0.0, rotation=0.0, translation=0.0, cut=0.0, tone=0.0)
    still = run.data.view([1], run._chance(0, 0), plain)
    torch.testing.assert_close(still.image, run.data.image[1:2], atol=1e-5, rtol=0)
    torch.testing.assert_close(still.seen, still.image)
    torch.testing.assert_close(still.mm_per_box, run.data.box_to_mm[1:2, :3, :3].float(), rtol=1e-5, atol=1e-4)


def test_steps_whose_gradient_is_no_number_are_skipped_and_counted(cohort, caplog):
    run = begun(cohort)
    run.enter(1)
    before = {name: values.clone() for name, values in run.network.state_dict().items()}
    image = run.data.image[:1]
    for _ in range(NOT_FINITE_IN_A_ROW - 1):
        run._descend(run.network(image, 1).sum() * torch.nan, run.network, 0.01)
    assert all(torch.equal(before[name], values) for name, values in run.network.state_dict().items())
    assert "not finite" in caplog.text
    run._descend(run.network(image, 1).sum(), run.network, 0.01)  # a good one in between
    assert run.descent.failures == 0
    assert not torch.equal(before["shared"], run.network.shared)
    for _ in range(NOT_FINITE_IN_A_ROW - 1):
        run._descend(run.network(image, 1).sum() * torch.inf, run.network, 0.01)
    with pytest.raises(ModelError, match="lower rate"):
        run._descend(run.network(image, 1).sum() * torch.inf, run.network, 0.01)


def test_a_step_is_skipped_for_any_gradient_that_is_no_number(cohort):
    """Fits move the maps and the atlas: there the network has no gradient to judge by."""
    run = begun(cohort)
    run.enter(4)
    before = run.atlas.detach().clone()
    run._descend(run.atlas.sum() * torch.nan, run.network, 0.01)
    assert run.descent.failures == 1
    assert torch.equal(run.atlas, before)


def test_a_stage_does_not_inherit_the_gradients_of_the_one_before(cohort):
    run = begun(cohort)
    run.enter(3)
    run._descend(run.network(run.data.image[:1], 0).sum() * torch.nan, run.network, 0.01)
    run.enter(4)  # fits maps and the atlas, not the network
    before = run.atlas.detach().clone()
    run._fitting_step(TINY.consolidation[0], 4, 0)
    assert run.descent.failures == 0
    assert not torch.equal(run.atlas, before)


def test_every_exam_is_seen_once_before_any_is_seen_twice():
    flat = [exam for step in range(9) for exam in batch_of(7, 3, step, 5)]
    for turn in range(3):
        assert sorted(flat[7 * turn : 7 * turn + 7]) == list(range(7))
    assert flat[:7] != flat[7:14]
    assert batch_of(7, 3, 4, 5) == flat[12:15]
    assert batch_of(3, 8, 0, 0) != batch_of(3, 8, 0, 1)


def test_a_turn_through_the_cohort_is_drawn_once(monkeypatch):
    drawn, draw = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: drawn.append(seed) or draw(seed))
    found = [exam for step in range(6) for exam in batch_of(9, 3, step, 77)]
    assert drawn == [(77, 0), (77, 1)]
    assert found == [*draw((77, 0)).permutation(9), *draw((77, 1)).permutation(9)]


def test_a_fine_cohort_is_made_coarser_exam_by_exam(monkeypatch):
    random, exams = np.random.default_rng(0), 12
    hu = random.integers(-1000, 1000, (exams, 32, 32, 32)).astype(np.int16)
    arrays = store.CohortArrays([str(n) for n in range(exams)], hu, hu > 0, np.stack([np.eye(4)] * exams))

    class Held(nullcontext):
        size, region = 32, "exam"
        load = staticmethod(lambda: arrays)

        def __enter__(self):
            return self

    monkeypatch.setattr(views, "Cohort", lambda path: Held())
    tracemalloc.start()
    data = load_cohort(Path("held.h5"), TINY, "cpu")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 32**3 * 4  # a few arrays of one exam
    coarse = np.clip(hu.reshape(exams, 16, 2, 16, 2, 16, 2).mean(axis=(2, 4, 6)), -256, 256)
    np.testing.assert_array_equal(data.image[:, 0].numpy(), ((coarse + 256) / 512).astype(np.float32))
    assert torch.equal(data.fine.hu[:, 0], torch.from_numpy(hu))


def test_a_few_exams_at_a_time_give_the_gradient_of_the_whole_batch(cohort):
    results = []
    for together in (None, 1, 3):
        preset = replace(TINY, batch=4, together=together)
        run = Run.begin(load_cohort(cohort, preset, "cpu"), preset, None, None, "cpu")
        c_atlas = run.maps(run.data.image, 0)
        push = torch.randn(c_atlas.shape, generator=torch.Generator().manual_seed(1))
        used = [p for name, p in run.network.named_parameters()]
        results.append((c_atlas, *torch.autograd.grad(c_atlas, used, push)))
    for part in results[1:]:
        for one, whole in zip(part, results[0], strict=True):
            torch.testing.assert_close(one, whole, atol=1e-4 * float(whole.detach().abs().max()), rtol=1e-4)


def test_the_compiled_network_is_for_steps_alone(cohort):
    """Every other map would cost a graph, and past `recompile_limit` of them the last level is not compiled."""
    run, steps = begun(cohort), []
    compiled = run.network._call_impl
    run.network._compiled_call_impl = lambda *given: steps.append(len(given[0])) or compiled(*given)
    for number, (_, _, step_of) in enumerate(run.stages()):
        run.enter(number)
        step_of(number, 0)
    recipe.familiar(run.model(), run.data)
    assert steps == [2, 2, 2, 2]  # the batches of the warm start, two levels and a round


def test_a_fine_cohort_is_fitted_on_its_fine_grid_and_gives_a_fine_atlas(cohort, tmp_path):
    fine = tmp_path / "fine.h5"
    store.build(cohort.parent, fine, 32, workers=0)
    fitting = Fitting(steps=2, nodes=4, size=24, learned=False, atlas_steps=0)
    preset = replace(TINY, atlas_size=24, consolidation=(ConsolidationStage(fitting, steps=2),))
    data = load_cohort(fine, preset, "cpu")
    assert (data.size, data.finest) == (16, 32)
    views, _ = data.views([0, 2], 24)
    assert views.image.shape == (2, 1, 24, 24, 24)
    model = pretrain(fine, tmp_path / "model", preset)
    assert model.size == 16
    assert model.atlas.shape[-1] == 24
    with pytest.raises(CohortError, match="--size 32"):
        load_cohort(cohort, preset, "cpu")


def test_a_model_goes_on_with_another_size_of_atlas(cohort, trained, tmp_path):
    grown = pretrain(cohort, tmp_path / "grown", replace(TINY, atlas_size=20), start_from=trained)
    assert grown.atlas.shape[-1] == 20


def test_a_model_goes_on_at_its_finest_level_also_with_fewer_levels(cohort, trained):
    preset = replace(TINY, levels=TINY.levels[:1], consolidation=())
    run = Run.begin(load_cohort(cohort, preset, "cpu"), preset, None, checkpoint.load(trained), "cpu")
    ((name, steps, step_of),) = run.stages()
    assert (name, steps) == ("level 16³", 2)
    run.enter(0)
    assert np.isfinite(step_of(0, 0)["loss"])
    assert run.model().level == 0


def test_the_mean_atlas_of_an_exam_with_itself_is_that_exam(cohort):
    run = Run.begin(load_cohort(cohort, TINY, "cpu"), TINY, None, None, "cpu")
    where = recipe.MARGIN * recipe.grid.identity((16, 16, 16))
    data = run.data
    run.data = data._replace(
        names=["c"], **{part: getattr(data, part)[[run.seed_index]] for part in ("image", "foreground", "box_to_mm")}
    )
    before = run.atlas.detach().clone()
    run.targets = where
    with torch.no_grad():
        mean = run.mean_atlas([0])
    seen = recipe.grid.sample(run.data.foreground.float(), recipe.grid.identity((16,) * 3) / recipe.MARGIN) > 0.99
    assert (mean - before)[seen].abs().mean() < 0.03
    corner = mean[0, 0, 0, 0, 0]
    assert corner == before[0, 0, 0, 0, 0]  # nobody reaches it


def test_a_round_learns_from_the_exams_that_show_most(cohort):
    run = begun(cohort)
    most = torch.stack([run.data.foreground[n].sum() * run.data.box_to_mm[n].det() for n in range(4)]).argsort()
    assert run.learned_from(ConsolidationStage(whole=0.5)) == sorted(most[-2:].tolist())
    assert run.learned_from(ConsolidationStage()) == [0, 1, 2, 3]


def test_an_exam_that_borrows_a_view_is_shown_there_alone_and_from_its_middle(cohort):
    run = begun(cohort)
    run.targets = (recipe.MARGIN * recipe.grid.identity((16,) * 3)).repeat(4, 1, 1, 1, 1)
    lower = recipe.grid.identity((12,) * 3)[:, 2:] < 0
    run.lent = Lent(lower.repeat(4, 1, 1, 1, 1), torch.zeros(4, 3, 12, 12, 12), torch.eye(4).repeat(4, 1, 1))
    chance = run._chance(0, 0)
    borrowed = run._borrowed([0, 1], chance, 1.0)
    still = Augmentation(scale=0, rotation=0, translation=0, cut=0, tone=0)
    view = run.data.view([0, 1], chance, still, borrowed=borrowed)
    height = view.places_box[:, 2:]
    assert (height[view.seen > 0] < 0.1).all()
    assert (height[view.foreground] < 0.1).all()
    assert (view.seen > 0).any()
    assert borrowed.centre[:, 2].max() < -0.3  # the lower half fills the view
    assert torch.allclose(height[:, 0].mean(dim=(1, 2, 3)), borrowed.centre[:, 2], atol=1e-4)


def test_an_exam_in_the_shape_of_another_has_its_map_there(cohort):
    run = begun(cohort)
    where = recipe.grid.identity((16,) * 3)
    wave = torch.zeros_like(where)
    wave[:, 0] = 0.12 * torch.cos(3 * where[:, 2])
    run.targets = recipe.MARGIN * where.repeat(4, 1, 1, 1, 1)
    assert run._shaped([0, 1, 2], run._chance(0, 0), 1.0).abs().max() < 0.01  # all have one shape
    run.targets[1:] += recipe.MARGIN * wave
    run.lent = None
    shaped = run._shaped([0] * 8, run._chance(0, 1), 1.0)
    still = Augmentation(scale=0, rotation=0, translation=0, cut=0, tone=0)
    view = run.data.view([0] * 8, run._chance(0, 2), still, shaped=shaped)
    moved = (view.places_box - where).abs()
    assert moved[:, 1:].max() < 0.03
    inner = recipe.grid.resize(run.data.foreground[[0]].float(), (16,) * 3) > 0.99
    inner &= recipe.grid.resize(run.data.foreground[[1]].float(), (16,) * 3) > 0.99
    c_there = recipe.grid.sample(run.targets[[0]], view.places_box) - run.targets[0]
    straight = wave[0, 0][inner[0, 0]].mean()  # of the lender's wave, what its pose is made of is not borrowed
    for one in c_there:
        bent, full = one[0][inner[0, 0]], (wave[0, 0][inner[0, 0]] - straight) * recipe.MARGIN
        share = float((bent * full).sum() / full.square().sum())
        assert -0.02 < share < 1.05
        assert (bent - share * full).abs().mean() < 0.02
    assert c_there[:, 0].abs().amax() > 0.05
    assert not run._shaped([0, 1], run._chance(0, 0), 0.0).any()


def test_what_an_exam_shows_is_lent_in_the_atlas(cohort):
    run = begun(cohort)
    run.targets = (recipe.MARGIN * recipe.grid.identity((16,) * 3)).repeat(4, 1, 1, 1, 1)
    lent = run._lend().shown[0, 0].float()
    where = recipe.grid.identity((12,) * 3) / recipe.MARGIN
    there = recipe.grid.sample(run.data.foreground[:1].float(), where) > 0.5
    assert (lent - (there & recipe.grid.inside(where))[0, 0].float()).abs().mean() < 0.02


def quiet(run: Run) -> list[float]:
    """Let no step of a training learn; the rates it would have learned at."""
    rates: list[float] = []

    def keep(loss, network, rate: float) -> float:
        rates.append(rate)
        return 0.0

    run._descend = keep
    return rates


def test_a_warm_start_teaches_the_place_in_the_seeds_box_within_the_margin(cohort):
    run = begun(cohort)
    quiet(run)
    off = torch.tensor([0.1, 0.0, -0.2]).view(1, 3, 1, 1, 1)

    def answer(_seen, _level):
        crops = run.data.view([run.seed_index] * 2, run._chance(1, 4), Augmentation(), TINY.warm.bend, run.crops)
        return 0.9 * crops.places_box + off

    run.maps = answer
    terms = run.warm_step(1, 4)
    assert terms["loss"] == pytest.approx(0.05, rel=1e-3)
    half_mm = run.data.box_to_mm[run.seed_index, :3, :3].norm(dim=0).mean()
    assert terms["rms_mm"] == pytest.approx(0.05**0.5 / 0.9 * float(half_mm), rel=1e-3)


def test_rates_rise_from_a_tenth_and_fall_in_stairs(cohort):
    level = LevelStage(steps=50, rate=0.004, warm_up=10, loss_size=16)
    preset = replace(TINY, levels=(level,), decay=0.5, decay_every=6)
    run = Run.begin(load_cohort(cohort, preset, "cpu"), preset, None, None, "cpu")
    rates = quiet(run)
    for step in (0, 4, 7, 20):
        run.level_step(2, step)
    assert rates == pytest.approx([0.004 * 0.19, 0.004 * 0.55, 0.004 * 0.82 / 2, 0.004 / 8])
    rates.clear()
    for step in (0, 14, 60):
        run.warm_step(1, step)
    assert rates == pytest.approx([0.004 / 30, 0.004 / 2 / 4, 0.004 / 1024])


def test_a_level_compares_what_exams_show_and_in_mm_of_the_seed_exam(cohort, monkeypatch):
    run = begun(cohort)
    quiet(run)
    given = []

    def keep(c_atlas, exams, atlas, autoencoder, weights):
        given.append((exams, atlas))
        return objective(c_atlas, exams, atlas, autoencoder, weights)

    monkeypatch.setattr(recipe, "objective", keep)
    run.level_step(2, 0)
    ((exams, atlas),) = given
    body = exams.image > 0.05  # air is 0
    assert 0.02 < float(body.float().mean()) < 0.9
    around = torch.nn.functional.max_pool3d(body.float(), 5, 1, 2) > 0
    assert not exams.foreground[~around].any()
    assert exams.foreground[body].float().mean() > 0.7
    side = 0.9 * torch.eye(3)  # of the atlas: there the seed's box ends
    ends = atlas.mm_per_atlas[0] @ side
    torch.testing.assert_close(ends, run.data.box_to_mm[run.seed_index, :3, :3].float())


def test_an_exam_is_familiar_from_part_of_what_nearly_all_exams_of_the_training_reach(cohort, trained, monkeypatch):
    reached = iter([0.5, 0.2, 0.3, 0.4])
    monkeypatch.setattr(recipe, "likeness", lambda c_atlas, *_: torch.full_like(c_atlas[:, :1], next(reached)))
    found = recipe.familiar(checkpoint.load(trained), load_cohort(cohort, TINY, "cpu")).familiar
    assert found == pytest.approx(0.6 * (0.2 + 0.15 * 0.1))  # of four, 5 % is .15 of the way from the least to the next


def test_gradients_are_cut_to_the_length_of_the_preset(cohort):
    preset = replace(TINY, clip=0.01)
    run = Run.begin(load_cohort(cohort, preset, "cpu"), preset, None, None, "cpu")
    run.enter(1)
    assert run._descend(run.network(run.data.image[:1], 1).sum(), run.network, 0.001) > 1
    gradient = torch.stack([part.grad.norm() for part in run.network.parameters() if part.grad is not None]).norm()
    assert float(gradient) == pytest.approx(0.01, rel=0.01)
