"""Calls as the published package (`mhc` 0.5.5) takes them: understood, or refused in words that say what to write."""

import re

import pytest
import torch
from torch import nn

from mhc_torch import MHCLightningCallback, inject_mhc


def layers(depth=3, width=4):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))


def test_a_number_in_third_place_is_max_history():
    """Published: inject_mhc(model, target_types, max_history, ...)."""
    assert inject_mhc(layers(), nn.Linear, 2)[0].mhc_skip.max_history == 2
    model = inject_mhc(layers(), nn.Linear, 8, clear_on_forward=False, history_scope="module")
    assert model[0].mhc_skip.max_history == 8
    assert model[0].mhc_skip.history_buffer is not model[1].mhc_skip.history_buffer
    with pytest.raises(ValueError, match="max_history must be at least 1, got 0"):
        inject_mhc(layers(), nn.Linear, 0)
    with pytest.raises(TypeError, match=re.escape("max_history must be of type int, got 2.5")):
        inject_mhc(layers(), nn.Linear, 2.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((nn.Linear, nn.Conv2d), "target_class_name must be the name of a class, got <class"),
        ((nn.Linear, True), "target_class_name must be the name of a class, got True"),
        ((nn.Linear, 8, True), "give what follows it by name, as clear_on_forward=True"),
        ((nn.Linear, 8, True, "module"), "give what follows it by name, as clear_on_forward=True"),
        ((nn.Linear, None, 4, "module"), "clear_history_each_forward must be of type bool, got 'module'"),
    ],
)
def test_other_things_in_the_places_of_inject_mhc_are_refused(arguments, message):
    model = layers()
    with pytest.raises(TypeError, match=re.escape(message)):
        inject_mhc(model, *arguments)
    assert not hasattr(model[0], "mhc_skip")


@pytest.mark.parametrize(
    ("arguments", "keywords", "name"),
    [
        ((True, 2, "foo"), {}, "log_entropy"),
        ((True, 2), {}, "log_entropy"),
        ((True, True, "foo"), {}, "log_gradients"),
        ((1,), {}, "log_mixing_weights"),
        ((), {"log_interval": 2.0}, "log_interval"),
        ((), {"log_interval": True}, "log_interval"),
        ((), {"prefix": None}, "prefix"),
        ((), {"log_weights": "yes"}, "log_weights"),
    ],
)
def test_the_published_order_of_the_callback_is_refused_by_name(arguments, keywords, name):
    """Published: MHCLightningCallback(log_mixing_weights, log_interval, prefix)."""
    with pytest.raises(TypeError, match=rf"^{name} must be of type .*\(log_mixing_weights, log_interval, prefix\)"):
        MHCLightningCallback(*arguments, **keywords)
