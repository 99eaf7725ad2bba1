"""The heat maps against the counts that they show."""

import matplotlib
import numpy as np
import pytest
import torch

from spiking_mamba.reports.figures import write_png
from spiking_mamba.reports.spike_map import quantile_norm, spike_panels
from spiking_mamba.spike_map import draw_spike_map
from spiking_mamba.spikes.counting import count_spikes
from spiking_mamba.spikes.counts import ProjectionSpikes, SpikeCounts
from tests.helpers.tiny import INTEGER, tiny_model, tokens


def counts_of(spike, out_features=3):
    counted = ProjectionSpikes(spike.shape[1], out_features, 4)
    counted.add(spike.unsqueeze(0))
    return counted


def random_counts(layers, **widths):
    torch.manual_seed(0)
    return SpikeCounts(
        {
            f"layers.{layer}.mixer.{kind}": counts_of(torch.randint(-4, 5, (4, width)).float())
            for layer in range(layers)
            for kind, width in widths.items()
        }
    )


def draw_spikes(spikes, path):
    if panels := spike_panels(spikes):
        write_png(path, panels)
    return bool(panels)


def image_of(axes):
    return axes.images[0].get_array().filled(0.0)


def test_every_channel_in_its_place(tmp_path, drawn):
    counts = random_counts(3, in_proj=8, out_proj=3000)
    counts.projections["layers.1.mixer.in_proj"] = counts_of(torch.zeros(4, 8))
    draw_spike_map(counts, str(tmp_path / "map.png"))
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]
    drawn.check()
    first, second = drawn.figures[0].subfigs
    (heat, bars, silent), wide = first.axes[:3], second.axes[0]
    means = torch.stack([counts.projections[f"layers.{i}.mixer.in_proj"].channel_mean_abs for i in range(3)])
    np.testing.assert_array_equal(image_of(heat), means.numpy())
    assert heat.images[0].get_array().mask[1].all()  # silent: the colour that stands for it
    assert heat.images[0].cmap.get_bad().tolist() == list(silent.patches[1].get_facecolor())
    assert [bar.get_width() for bar in silent.patches] == (means == 0).sum(1).tolist()
    assert silent.get_xlim() == (0, 8)  # the silent layer's bar is full
    assert "Silent layers: 1." in spike_panels(counts.to_dict(detail=True))[0].text
    assert heat.images[0].get_extent() == [-0.5, 7.5, 2.5, -0.5]  # the first layer at the top
    assert first.get_suptitle() == f"in_proj: 8 channels, {(means == 0).double().mean():.1%} silent"
    assert [bar.get_width() for bar in bars.patches] == pytest.approx(means.mean(1).tolist())
    # a column shows the busiest of the three channels that it stands for
    means = torch.stack([counts.projections[f"layers.{i}.mixer.out_proj"].channel_mean_abs for i in range(3)])
    np.testing.assert_array_equal(image_of(wide), means.view(3, 1000, 3).amax(2).numpy())
    assert wide.images[0].get_extent()[:2] == [-0.5, 2999.5]


def test_channels_that_do_not_fill_the_last_column(tmp_path, drawn):
    counts = random_counts(1, in_proj=1025)
    draw_spike_map(counts, tmp_path / "map.png")
    heat = drawn.figures[0].axes[0]
    means = counts.projections["layers.0.mixer.in_proj"].channel_mean_abs
    assert image_of(heat)[0, -1] == means[1024]
    assert heat.get_xlim() == (-0.5, 1024.5)


def test_layers_of_two_kinds_have_panels_of_their_own(tmp_path, drawn):
    model = tiny_model(
        neuron=INTEGER, layers_block_type=["mamba", "mlp", "mamba"], num_hidden_layers=3, intermediate_size=48
    )
    with count_spikes(model) as counts, torch.no_grad():
        model(tokens(2, 9))
    draw_spike_map(counts, tmp_path / "map.png")
    shown = {
        part.get_suptitle().split(",")[0]: [tick.get_text() for tick in part.axes[0].get_yticklabels()]
        for part in drawn.figures[0].subfigs
        if part.axes
    }
    assert shown == {
        "in_proj: 32 channels": ["0", "1", "2"],
        "out_proj: 64 channels": ["0", "2"],
        "out_proj: 48 channels": ["1"],
    }


@pytest.mark.parametrize("layers", [1, 28, 29, 100])
def test_labels_of_many_layers(layers, tmp_path, drawn):
    counts = random_counts(layers, in_proj=5)
    draw_spike_map(counts, tmp_path / "channels.png")
    assert draw_spikes(counts.to_dict(), tmp_path / "counts.png")
    drawn.check()


def test_an_evaluation_is_drawn_with_the_same_map(tmp_path, drawn):
    counts = random_counts(2, in_proj=6)
    assert draw_spikes(counts.to_dict(detail=True), tmp_path / "one.png")
    draw_spike_map(counts, tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_counts_where_there_are_no_channels(tmp_path, drawn):
    counts = random_counts(2, in_proj=6)
    assert draw_spikes(counts.to_dict(), tmp_path / "counts.png")
    axes = drawn.figures[0].axes[0]
    rows = [spikes.histogram for spikes in counts.projections.values()]
    np.testing.assert_allclose(image_of(axes), torch.stack(rows) / 24)
    assert axes.images[0].get_extent() == [-4.5, 4.5, 1.5, -0.5]
    bare = {"projections": {"a": {"histogram": None, "tokens": 4}}}
    assert not draw_spikes(bare, tmp_path / "no.png")
    assert not draw_spikes({"projections": {}}, tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()


def test_what_cannot_be_drawn(tmp_path):
    silent = SpikeCounts({"_a": counts_of(torch.zeros(2, 5))})
    draw_spike_map(silent, tmp_path / "silent.png")
    never = SpikeCounts({"a": ProjectionSpikes(5, 3, 4)})
    for counts in (SpikeCounts({}), never):
        with pytest.raises(ValueError, match="no spikes"):
            draw_spike_map(counts, tmp_path / "no.png")
    wild = counts_of(torch.ones(2, 5))
    wild.channel_sum[3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        draw_spike_map(SpikeCounts({"a": wild}), tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()


def test_a_program_s_own_figures_stay_as_they_are(tmp_path):
    before = dict(matplotlib.rcParams)
    draw_spike_map(random_counts(1, in_proj=5), tmp_path / "map.png")
    assert dict(matplotlib.rcParams) == before


def test_every_colour_stands_for_as_many_cells():
    values = np.random.default_rng(0).lognormal(0, 3, 10_000)
    values[:2000] = 0.0
    norm = quantile_norm(values)
    _, cells = np.unique(np.asarray(norm(values[2000:])), return_counts=True)
    assert len(cells) == 10
    assert cells.min() >= 799
    assert cells.max() <= 801
    for few in (np.zeros(3), np.full(3, 2.0), np.array([0.0, 1.0, 1.0, 3.0])):
        scale = quantile_norm(few)
        assert np.all(np.diff(scale.boundaries) > 0)
        assert not np.ma.getmask(scale(few[few > 0])).any()


def test_silent_layers_of_counts_stand_out(tmp_path, drawn):
    counts = random_counts(3, in_proj=6)
    counts.projections["layers.1.mixer.in_proj"] = counts_of(torch.zeros(4, 6))
    (panel,) = spike_panels(counts.to_dict())
    assert panel.text.endswith("Silent layers: 1.")
    write_png(tmp_path / "a.png", [panel])
    drawn.check()
    axes, silent = drawn.figures[0].axes[:2]
    assert axes.get_title("left") == "Spike counts, in_proj: 1 of 3 layers silent"
    (band,) = axes.patches
    assert [band.get_y(), band.get_height()] == [0.5, 1.0]
    assert [bar.get_width() for bar in silent.patches][1] == 6
    assert "6" in drawn.text_of("a.png").split("\n")
