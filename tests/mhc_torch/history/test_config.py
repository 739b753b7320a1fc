"""Settings are validated where they are made, and defaults reach the layers."""

import pytest

from mhc_torch import (
    MHCConfig,
    MHCSequential,
    MHCSkip,
    get_default_config,
    get_preset,
    load_config_from_toml,
    load_config_from_toml_optional,
    resolve_default,
    set_default_config,
)


@pytest.fixture(autouse=True)
def _defaults_come_back():
    before = get_default_config()
    yield
    set_default_config(before)


def test_defaults():
    assert MHCConfig() == MHCConfig(
        max_history=4,
        mode="mhc",
        constraint="simplex",
        epsilon=0.1,
        temperature=1.0,
        init="identity",
        detach_history=False,
        clear_history_each_forward=True,
        auto_project=False,
        history_scope="global",
        use_gating=False,
        prune_threshold=0.0,
        stochastic=False,
    )


@pytest.mark.parametrize(
    "field",
    [
        {"max_history": 0},
        {"mode": "bogus"},
        {"constraint": "bogus"},
        {"init": "bogus"},
        {"history_scope": "bogus"},
        {"epsilon": 1.0},
        {"epsilon": -0.1},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"prune_threshold": 1.5},
    ],
)
def test_values_out_of_range_are_refused_by_name(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        MHCConfig(**field)


@pytest.mark.parametrize("field", [{"max_history": 2.0}, {"max_history": True}, {"mode": 1}, {"use_gating": 1}])
def test_wrong_types_are_refused_by_name(field):
    with pytest.raises(TypeError, match=next(iter(field))):
        MHCConfig(**field)


def test_new_defaults_reach_layers_made_afterwards():
    set_default_config(max_history=7, constraint="identity")
    assert resolve_default(None, "max_history") == 7
    assert resolve_default(3, "max_history") == 3
    skip = MHCSkip()
    assert skip.mixing_logits.shape == (7,)
    assert skip.constraint == "identity"
    assert MHCSequential([], temperature=0.5).history_buffer.max_history == 7
    set_default_config(MHCConfig())
    assert MHCSkip().max_history == 4


def test_unknown_fields_are_refused():
    with pytest.raises(TypeError, match="depth"):
        set_default_config(depth=3)
    with pytest.raises(TypeError, match="either"):
        set_default_config()
    with pytest.raises(TypeError, match="MHCConfig"):
        set_default_config({"max_history": 3})


def test_toml(tmp_path):
    file = tmp_path / "pyproject.toml"
    file.write_text('[tool.mhc]\nmax_history = 6\ntemperature = 2\nconstraint = "sparse"\n')
    assert load_config_from_toml(file) == MHCConfig(max_history=6, temperature=2, constraint="sparse")
    assert load_config_from_toml_optional(str(file)) == load_config_from_toml(str(file))
    assert load_config_from_toml_optional(tmp_path / "missing.toml") is None
    with pytest.raises(FileNotFoundError):
        load_config_from_toml(tmp_path / "missing.toml")
    file.write_text("[tool.mhc]\nmax_histroy = 6\n")
    with pytest.raises(TypeError, match="max_histroy"):
        load_config_from_toml(file)
    file.write_text("[project]\nname = 'x'\n")
    assert load_config_from_toml(file) == MHCConfig()


@pytest.mark.parametrize(
    ("name", "constraint", "epsilon", "temperature", "init"),
    [
        ("stable", "identity", 0.1, 1.0, "identity"),
        ("aggressive", "simplex", 0.0, 0.7, "uniform"),
        ("Research", "simplex", 0.05, 1.0, "uniform"),
    ],
)
def test_presets_build_a_skip(name, constraint, epsilon, temperature, init):
    config = MHCSkip(**get_preset(name)).config
    assert (config.constraint, config.epsilon, config.temperature, config.init) == (
        constraint,
        epsilon,
        temperature,
        init,
    )
    get_preset(name)["epsilon"] = 0.9  # a copy: the preset itself stays
    assert get_preset(name)["epsilon"] == epsilon


def test_unknown_preset():
    with pytest.raises(ValueError, match="'bold'"):
        get_preset("bold")
