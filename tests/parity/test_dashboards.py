"""The dashboard of a network of streams has the same keys and numbers from both packages."""

import re
from functools import reduce

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import bridge
import mhc_jax.models as jax_models
import mhc_jax.nn as jax_nn
import mhc_torch.models as torch_models
import mhc_torch.nn as torch_nn
from mhc_jax.monitoring.dashboard import dashboard
from mhc_jax.monitoring.diagnostics import diagnose
from mhc_torch import check_model_stability, extract_mixing_weights
from mhc_torch.monitoring.dashboard import draw_mixing_weights, plot_gradient_flow, plot_mixing_weights
from mhc_torch.monitoring.diagnostics import composite_gains, gradient_norms, row_figures

WIDTH, DEPTH = 3, 2
X = np.random.default_rng(0).normal(size=(5, WIDTH)).astype(np.float32)


def pair(**options):
    """A stack of streams in both packages, with the same random parameters and the gradients of one loss."""

    def layer(rngs, index):
        return jax_nn.HyperConnections(nnx.Linear(WIDTH, WIDTH, rngs=rngs), WIDTH, layer_index=index, **options)

    stack = jax_nn.StreamStack(layer, DEPTH, options["streams"], rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for leaf in (stack.layers.bias, stack.layers.alpha, stack.layers.phi):
        leaf.set_value(jnp.asarray(rng.normal(size=leaf.shape), jnp.float32))
    theirs = torch_nn.StreamStack(
        [torch_nn.HyperConnections(nn.Linear(WIDTH, WIDTH), WIDTH, **options) for _ in range(DEPTH)], options["streams"]
    )
    bridge.convert(stack, theirs)
    grads = nnx.grad(lambda stack: jnp.mean(stack(jnp.asarray(X)) ** 2))(stack)
    theirs(torch.from_numpy(X)).square().mean().backward()
    return stack, grads, theirs


@pytest.mark.parametrize("constraint", ["sinkhorn", "none"])
@pytest.mark.filterwarnings("ignore:the weights are converted")
def test_streams(constraint):
    stack, grads, theirs = pair(streams=2, constraint=constraint)
    metrics, weights = dashboard(stack, diagnose(stack, grads), prefix="mhc")
    shown = extract_mixing_weights(theirs)
    assert list(shown) == list(weights)
    assert len(shown) == DEPTH * 4
    for name, row in shown.items():
        np.testing.assert_allclose(row, weights[name], rtol=1e-5, atol=1e-6)
    figures = row_figures(theirs) | gradient_norms(theirs) | composite_gains(theirs)
    figures |= {f"{name}/alpha_{i}": float(value) for name, row in shown.items() for i, value in enumerate(row)}
    assert {f"mhc/{key}" for key in figures} == set(metrics)
    for key, value in figures.items():
        np.testing.assert_allclose(value, metrics[f"mhc/{key}"], rtol=1e-3, atol=1e-6, err_msg=key)
    assert any(value > 0 for key, value in figures.items() if key.endswith("entropy"))


@pytest.mark.parametrize("options", [{"max_history": 2, "use_gating": True}, {"streams": 2}])
@pytest.mark.filterwarnings("ignore:the weights are converted")
def test_a_decoder(options):
    sizes = {"vocabulary": 7, "features": 4, "mlp_features": 6, "depth": 2, "num_heads": 2}
    kind = "streams" if "streams" in options else "history"
    ours = jax_models.Decoder(jax_models.DecoderConfig(**sizes), kind, rngs=nnx.Rngs(0), **options)
    theirs = torch_models.Decoder(torch_models.DecoderConfig(**sizes), kind, **options)
    bridge.convert(ours, theirs)
    tokens = np.array([[1, 5, 2, 6, 0]])
    grads = nnx.jit(nnx.grad(lambda model: model.loss(jnp.asarray(tokens))))(ours)
    theirs.loss(torch.from_numpy(tokens)).backward()
    metrics, weights = dashboard(ours, diagnose(ours, grads), prefix="mhc")
    figures = row_figures(theirs) | gradient_norms(theirs) | composite_gains(theirs)
    # A torch decoder has the names of Llama, and no weights among its figures.
    names = (("model.layers/", "stack/"), ("model.", "stack."), (r"layers.(\d).skip", r"skip_layers.\1"))
    figures = {reduce(lambda name, pair: re.sub(*pair, name), names, key): value for key, value in figures.items()}
    assert {f"mhc/{key}" for key in figures} == {key for key in metrics if "/alpha_" not in key}
    for key, value in figures.items():
        np.testing.assert_allclose(value, metrics[f"mhc/{key}"], rtol=1e-3, atol=1e-7, err_msg=key)
    if kind == "streams":
        assert len({value for key, value in figures.items() if key.endswith("hc/grad_norm")}) == 4  # one a branch
    shown = extract_mixing_weights(theirs).values()
    for row, wanted in zip(shown, weights.values(), strict=True):
        np.testing.assert_allclose(row, wanted, rtol=1e-5, atol=1e-6)
    assert check_model_stability(theirs, torch.from_numpy(tokens)).checks[0].value == 1


def test_reports_and_plots_of_streams(tmp_path):
    _, _, model = pair(streams=2)
    report = check_model_stability(model, torch.from_numpy(X))
    assert [check.name for check in report.checks] == ["buffer growth", "gradient path", "spectral drift"]
    assert report
    for plot in (plot_mixing_weights, plot_gradient_flow):
        plot(model, save_path=tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 0


def test_negative_weights_are_not_drawn_as_pruned():
    from matplotlib.figure import Figure

    figure = Figure()
    draw_mixing_weights(figure, {"layer.res.0": torch.tensor([-0.5, 2.0])})
    image = figure.axes[0].images[0]
    assert image.norm.vmin == -0.5
    assert image.norm.vmax == 2.0
