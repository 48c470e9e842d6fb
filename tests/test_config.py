"""Settings: the paper's numbers by default, presets that fit together, and records that survive JSON."""

import json
from dataclasses import FrozenInstanceError, asdict, fields

import pytest

from deepatlas import config
from deepatlas.config import PRESETS, Preset


def test_the_defaults_are_the_paper_s():
    paper = PRESETS["paper"]
    assert (paper.network.size, paper.network.widths, paper.network.stem_stride) == (64, (8, 16, 32, 64, 128), 1)
    assert paper.network.sizes == (64, 32, 16, 8, 4)  # §5.2.1: (64, 64, 64, 8) to (4, 4, 4, 128)
    assert paper.atlas_size == 128
    assert (paper.autoencoder.steps, paper.autoencoder.batch, paper.autoencoder.rate) == (20_000, 16, 0.005)  # §5.3.2
    assert len(paper.levels) == 5
    assert {(level.steps, level.loss_size) for level in paper.levels} == {(7_500, 64)}
    assert (paper.levels[0].rate, paper.batch, paper.decay, paper.decay_every) == (0.005, 64, 0.995, 50)
    shown = paper.augmentation
    assert (shown.scale, shown.rotation) == (0.3, 0.5)  # §5.5.2
    assert shown.translation == pytest.approx(8 / 64 * 2)  # 8 of 64 voxels of a box that is 2 wide
    assert paper.consolidation == ()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_together(name):
    preset = PRESETS[name]
    network = preset.network
    assert preset.name == name
    assert 1 <= len(preset.levels) <= len(network.widths)
    assert network.sizes[-1] >= 4  # the coarsest level can hold an affine map with room to bend
    assert network.size == network.stem_stride * network.sizes[-1] * 2 ** (len(network.widths) - 1)
    assert all(width % min(network.groups, width) == 0 for width in network.widths)
    finest_trained = len(network.widths) - len(preset.levels)
    assert all(level.loss_size >= network.sizes[finest_trained] for level in preset.levels)
    assert all(
        0 < stage.rate <= 0.01 and stage.steps > 0 for stage in (preset.autoencoder, preset.warm, *preset.levels)
    )
    for stage in preset.consolidation:
        assert stage.fitting.nodes < stage.fitting.size <= preset.prepared_size
        assert stage.steps > 0
    assert 0 < preset.decay <= 1
    assert all(getattr(preset.weights, f.name) >= 0 for f in fields(preset.weights) if f.name != "window")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name):
    record = json.loads(json.dumps(asdict(PRESETS[name])))
    assert record == json.loads(json.dumps(asdict(PRESETS[name])))
    assert record["network"]["widths"] == list(PRESETS[name].network.widths)
    others = [json.loads(json.dumps(asdict(p))) for p in PRESETS.values() if p.name != name]
    assert record not in others


def test_settings_cannot_be_changed_behind_a_training_s_back():
    for one in (PRESETS["cpu"], PRESETS["cpu"].network, PRESETS["cpu"].weights, config.COMPACT):
        with pytest.raises(FrozenInstanceError):
            one.size = 3
    assert Preset("one") == Preset("one")
    assert hash(Preset("one")) != hash(Preset("two"))
