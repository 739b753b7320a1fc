"""An import path of the `mhc` package: the version of the installed library."""

from importlib.metadata import version

__version__ = version("mhc-jax")
