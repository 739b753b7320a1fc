"""The library's logger."""

import logging


def get_logger(name: str = "mhc") -> logging.Logger:
    """The logger of that name; the library logs under "mhc" and sets no handlers."""
    return logging.getLogger(name)
