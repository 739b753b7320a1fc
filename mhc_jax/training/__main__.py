"""`python -m mhc_jax.training [CONFIG.py] [--field value ...]`: trains a decoder, and goes on where it was ended.

CONFIG.py is a Python file that says `config = TrainingConfig(...)`; without one, a small decoder learns the source of
Python's standard library. `--help` lists all fields.
"""

import logging
import sys
from pathlib import Path

from mhc_jax.training.config import TrainingConfig, load_config

try:
    import tyro
except ImportError as error:
    raise ImportError("the training program needs tyro: pip install 'mhc-jax[train]'") from error


def read_arguments(arguments: list[str]) -> TrainingConfig:
    """The config of a file, if the first argument names one, with what the others change.

    Raises:
        FileNotFoundError, ValueError, TypeError: as `load_config`, or as the config.
        SystemExit: an argument is none of the program's, or asks for help.
    """
    given = bool(arguments) and not arguments[0].startswith("-")
    config = load_config(Path(arguments[0])) if given else TrainingConfig()
    return tyro.cli(
        TrainingConfig,
        prog="python -m mhc_jax.training [CONFIG.py]",
        description=__doc__,
        default=config,
        args=arguments[1:] if given else arguments,
        config=(tyro.conf.AvoidSubcommands,),
    )


def main() -> int:
    # Orbax raises an error, and logs it with its trace as well; so do the futures that it leaves behind.
    for name in ("absl", "asyncio", "concurrent.futures"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        config = read_arguments(sys.argv[1:])
        # It needs JAX, grain and tqdm, which `--help` does not.
        from mhc_jax.training.program import Run, start_processes

        start_processes(config)
        run = Run(config)
        state = run.begin()
    except (ValueError, TypeError, OSError, ImportError) as error:
        return _refuse(error)
    try:
        run.train(state)
    except OSError as error:
        return _refuse(error)
    return 0


def _refuse(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
