"""An import path of the `mhc` package; see `mhc_torch.history.config`."""

from mhc_torch.history.config import (
    MHCConfig,
    get_default_config,
    load_config_from_toml,
    load_config_from_toml_optional,
    resolve_default,
    set_default_config,
)

__all__ = [
    "MHCConfig",
    "get_default_config",
    "load_config_from_toml",
    "load_config_from_toml_optional",
    "resolve_default",
    "set_default_config",
]
