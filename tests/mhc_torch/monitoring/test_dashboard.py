"""The pictures show what they say: read off the pixels and the axes of real figures."""

import itertools

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image
from torch import nn

from mhc_torch import (
    HyperConnections,
    MHCSequential,
    StreamStack,
    create_training_dashboard,
    inject_mhc,
    plot_gradient_flow,
    plot_history_contribution,
    plot_mixing_weights,
)
from mhc_torch.monitoring.dashboard import draw_mixing_weights, heatmap_size
from mhc_torch.monitoring.heatmap import mixing_picture


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def stack(depth=4, **settings):
    torch.manual_seed(0)
    return MHCSequential([nn.Linear(5, 5) for _ in range(depth)], **{"max_history": 3} | settings)


def cells(figure):
    """Colours of the cells of a heatmap, by row and column, as drawn."""
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    axes = figure.axes[0]
    rows, columns = axes.images[0].get_array().shape
    corners = axes.transData.transform([(c, r) for r in range(rows) for c in range(columns)])
    colours = [tuple(int(v) for v in pixels[round(pixels.shape[0] - y), round(x)]) for x, y in corners]
    return np.array(colours).reshape(rows, columns, 3)


@pytest.mark.parametrize("cmap", ["viridis", "magma", "gray_r"])
def test_zero_weights_are_black_and_missing_states_are_grey(cmap):
    model = stack(constraint="sparse")
    with torch.no_grad():
        for skip in model.skip_layers:
            skip.mixing_logits.copy_(torch.tensor([0.0, 2.0, 1.8]))
    found = cells(plot_mixing_weights(model, cmap=cmap))
    # Layer 0 has one state, layer 1 two; from layer 2 on the oldest of three is pruned.
    grey = np.round(0.85 * 255)
    np.testing.assert_allclose([*found[0, :2], found[1, 0]], grey, atol=1)
    assert (found[2:, 0] == 0).all()
    assert (found[2:, 1:].sum(-1) > 0).all()
    assert np.ptp(found[1, 1]) > 9 or abs(found[1, 1] - grey).max() > 9


def test_axes_name_history_and_depth_and_every_layer_of_fifty():
    figure = plot_mixing_weights(stack(50))
    axes = figure.axes[0]
    assert "history index" in axes.get_xlabel()
    assert "depth" in axes.get_ylabel()
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "1", "2"]
    assert [t.get_text() for t in axes.get_yticklabels()] == [f"skip_layers.{i}" for i in range(50)]
    figure.canvas.draw()
    boxes = [t.get_window_extent() for t in axes.get_yticklabels()]
    assert all(above.y0 >= below.y1 for above, below in itertools.pairwise(boxes)), "labels overlap"
    assert min(box.height for box in boxes) >= 6, "labels are too small to read"


def test_the_first_layer_is_on_top_and_the_oldest_state_on_the_left():
    model = stack()
    with torch.no_grad():
        model.skip_layers[2].mixing_logits.copy_(torch.tensor([50.0, 0.0, 0.0]))
    shown = plot_mixing_weights(model).axes[0].images[0]
    assert shown.get_array()[2].tolist() == pytest.approx([1, 0, 0], abs=1e-6)
    left, right, bottom, top = shown.get_extent()
    assert bottom > top
    assert left < right


def test_drawing_for_a_logger_leaves_no_figure_behind():
    before = plt.get_fignums()
    picture = mixing_picture({"a": torch.tensor([1.0]), "b": torch.tensor([0.5, 0.5])})
    assert picture.mode == "RGB"
    assert plt.get_fignums() == before


def test_save_path_writes_the_picture_and_nothing_else(tmp_path):
    figure = plot_mixing_weights(stack(), save_path=tmp_path / "weights.png", figsize=(4, 3))
    assert figure.get_size_inches().tolist() == [4, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["weights.png"]
    with Image.open(tmp_path / "weights.png") as picture:
        assert picture.size == (600, 450)


def test_a_model_without_history_cannot_be_drawn():
    with pytest.raises(ValueError, match="no history layer"):
        plot_mixing_weights(nn.Linear(2, 2))


def test_weights_of_every_size_have_their_own_colour_and_zero_has_none_of_them():
    # Under the scale from 0 to 1, 1e-5 and 0.1 looked alike, and under "magma" as if they were pruned.
    for cmap in ("viridis", "magma", "gray", "gray_r"):
        figure = plt.figure()
        draw_mixing_weights(figure, {"a": torch.tensor([0.0, 1e-5, 1e-3, 0.1, 0.9])}, cmap)
        found = cells(figure)[0].astype(int)
        assert found[0].tolist() == [0, 0, 0]
        assert found[1:].sum(-1).min() > 100
        assert min(abs(one - other).max() for one, other in itertools.combinations(found, 2)) > 20, cmap


def test_the_scale_adapts_to_weights_that_are_nearly_equal():
    figure = plt.figure()
    draw_mixing_weights(figure, {"a": torch.tensor([0.30, 0.35, 0.35]), "b": torch.tensor([0.2, 0.3, 0.5])})
    found = cells(figure).astype(int)
    assert abs(found[0, 0] - found[0, 1]).max() > 10
    assert abs(found[1, 0] - found[1, 2]).max() > 100


@pytest.mark.parametrize("weights", [[1.0], [0.0], [0.25] * 4, [float("nan"), 1.0], [1e-30, 1.0], [-0.5, 0.0, 2.0]])
def test_any_weights_can_be_drawn(weights):
    rows = {"a": torch.tensor(weights)}
    draw_mixing_weights(figure := plt.figure(), rows)
    figure.canvas.draw()
    assert mixing_picture(rows).size[1] < 300


def test_a_picture_for_a_logger_shows_the_cells_of_the_plot():
    weights = {"a": torch.tensor([0.5]), "b": torch.tensor([0.0, 1.0]), "c": torch.tensor([0.1, 0.2, 0.7])}
    draw_mixing_weights(figure := plt.figure(), weights)
    picture = np.asarray(mixing_picture(weights))
    shown = {tuple(colour) for colour in cells(figure).reshape(-1, 3)}
    found = {tuple(colour): int((picture == colour).all(-1).sum()) for colour in shown}
    assert min(found.values()) > 1000, found


@pytest.mark.parametrize("layers", [1, 50, 150, 1000])
def test_no_heatmap_is_higher_than_a_screen(layers):
    weights = {f"net.skip_layers.{i}": torch.full((4,), 0.25) for i in range(layers)}
    assert mixing_picture(weights).size[1] <= 1080
    assert heatmap_size(layers)[1] * 150 <= 1080


def test_labels_of_150_layers_do_not_overlap():
    figure = plot_mixing_weights(stack(150))
    figure.canvas.draw()
    labels = figure.axes[0].get_yticklabels()
    assert len(labels) == 50
    assert all(
        above.y0 >= below.y1 for above, below in itertools.pairwise([text.get_window_extent() for text in labels])
    )


def test_an_unknown_colour_map_is_refused():
    with pytest.raises(ValueError, match=r"cmap must be the name of a colour map.*'viridi'"):
        plot_mixing_weights(stack(), cmap="viridi")


def flow(figure):
    """(layer names, norms, variances) of a gradient flow picture."""
    top, bottom = figure.axes
    return [t.get_text() for t in bottom.get_xticklabels()], *(axes.lines[0].get_ydata() for axes in (top, bottom))


def test_gradient_flow_of_a_loss():
    model, x, y = stack(), torch.randn(3, 5), torch.randn(3, 5)
    names, norms, variances = flow(plot_gradient_flow(model, x, y, nn.MSELoss()))
    assert all(p.grad is None for p in model.parameters()), "gradients of the user are not touched"
    assert names == [f"wrapped_modules.{i}" for i in range(4)]
    nn.functional.mse_loss(model(x), y).backward()
    for i, layer in enumerate(model.wrapped_modules):
        gradient = np.concatenate([p.grad.numpy().ravel() for p in layer.parameters()]).astype(np.float64)
        assert norms[i] == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
        assert variances[i] == pytest.approx(gradient.var(), rel=1e-5)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(5), nn.Sequential(nn.Linear(5, 9), nn.GELU(), nn.Linear(9, 5))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (lambda: MHCSequential([Block() for _ in range(3)]), [f"wrapped_modules.{i}" for i in range(3)]),
        (lambda: MHCSequential([Block(), nn.Linear(5, 5)]), ["wrapped_modules.0", "wrapped_modules.1"]),
        (lambda: nn.Sequential(nn.Linear(5, 5), nn.Sequential(Block(), Block())), ["0", "1.0", "1.1"]),
        (lambda: nn.Sequential(Block(), Block()), ["0", "1"]),
        (lambda: nn.Sequential(nn.Linear(5, 5), MHCSequential([Block()])), ["0", "1.wrapped_modules.0"]),
        (lambda: inject_mhc(nn.Sequential(Block(), Block()), Block), ["0", "1"]),
        (lambda: StreamStack([HyperConnections(Block(), 5) for _ in range(2)]), ["layers.0", "layers.1"]),
    ],
)
def test_gradient_flow_has_one_point_for_each_block(model, names):
    torch.manual_seed(0)
    model = model()
    found, norms, _ = flow(plot_gradient_flow(model, torch.randn(3, 5)))
    assert found == names
    assert len(norms) == len(names)


def test_the_point_of_a_block_is_the_norm_of_all_its_gradients():
    model = MHCSequential([Block() for _ in range(2)])
    for i, block in enumerate(model.wrapped_modules):
        block.norm.bias.grad = torch.full((5,), 3.0 + i)
        block.mlp[0].bias.grad = torch.full((9,), 1.0)
    assert flow(plot_gradient_flow(model))[1] == pytest.approx([(45 + 9) ** 0.5, (80 + 9) ** 0.5])


def test_gradient_flow_uses_gradients_that_are_there():
    model = stack(2)
    for i, layer in enumerate(model.wrapped_modules):
        layer.bias.grad = torch.full((5,), float(i + 1))
    assert flow(plot_gradient_flow(model))[1] == pytest.approx([5**0.5, 2 * 5**0.5])


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4)),
        nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Dropout()),
    ],
)
def test_gradient_flow_makes_up_an_input_and_leaves_no_trace(model):
    state, random_state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert len(flow(plot_gradient_flow(model))[0]) == 2
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_gradient_flow_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="loss_fn needs input_data"):
        plot_gradient_flow(stack(), loss_fn=nn.MSELoss())
    with pytest.raises(ValueError, match="target needs a loss_fn"):
        plot_gradient_flow(stack(), torch.randn(2, 5), torch.randn(2, 5))
    with pytest.raises(ValueError, match="pass an example input"):
        plot_gradient_flow(nn.GRU(2, 2))


def test_history_contribution_has_a_bar_for_each_state():
    axes = plot_history_contribution(torch.tensor([0.2, 0.0, 0.8], requires_grad=True), "layer 3").axes[0]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([0.2, 0.0, 0.8])
    assert axes.patches[-1].get_facecolor() != axes.patches[0].get_facecolor()
    assert "layer 3" in axes.get_title()
    with pytest.raises(ValueError, match="vector"):
        plot_history_contribution(torch.eye(2))


def test_dashboard_has_a_panel_for_each_metric():
    history = [[0.5, 0.5], [0.1, 0.9]]
    figure = create_training_dashboard({"loss": [2.0, 1.0], "lr": (0.1,), "mixing_weights_history": history})
    assert [axes.get_title() for axes in figure.axes] == ["loss", "lr", "mixing weights history"]
    assert figure.axes[0].lines[0].get_ydata().tolist() == [2.0, 1.0]
    assert [line.get_ydata().tolist() for line in figure.axes[2].lines] == [[0.5, 0.1], [0.5, 0.9]]


@pytest.mark.parametrize("metrics", [{}, {"loss": []}, {"loss": [[[1.0]]]}, {"loss": [[1.0], [1.0, 2.0]]}])
def test_dashboard_refuses_series_it_cannot_draw(metrics):
    with pytest.raises(ValueError, match="metrics_dict"):
        create_training_dashboard(metrics)
