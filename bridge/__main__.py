"""Command line: look into weight files, convert them between JAX and PyTorch, prove that two models are equal."""

import argparse
import importlib
import importlib.util
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from flax import nnx
from torch import nn

import bridge
from bridge.weights.formats import Piece, open_file, write

_EXAMPLES = """\
examples:
  what is in a file, and is it whole
      python -m bridge inspect model.safetensors
  another file format, same names and values
      python -m bridge convert checkpoint.pt model.safetensors
  PyTorch weights for a JAX model (models.py has two functions that make the two models)
      python -m bridge convert torch.pt jax.safetensors --to jax --jax models.py:jax_model --torch models.py:torch_model
  do both compute the same function, on a random batch of shape (8, 64)?
      python -m bridge verify models.py:jax_model models.py:torch_model --inputs 8x64 \\
          --jax-weights jax.safetensors --torch-weights torch.pt

formats: .safetensors, .safetensors.index.json (shards, read only), .pt .pth .bin .ckpt, Orbax directory (no suffix)
exit status: 0 all is well, 1 the models differ, 2 something is wrong with the arguments, the files or a model,
3 no difference was found, but equality is not proved
"""
_MODEL = "module:function or file.py:function, which takes no arguments and returns the model"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {_line(message)}", file=sys.stderr)
    try:
        return options.command(options)
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(f"error: {_line(error)}", file=sys.stderr)
    except Exception as error:  # of the models' own code, most likely: it helps to see where
        print(f"error: {type(error).__name__} at {_place(error)}: {_line(error)}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help shows what is right\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m bridge",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="inspect | convert | verify")

    command = commands.add_parser("inspect", help="list the arrays of a file and check that they are undamaged")
    command.add_argument("file", help="weights in any of the formats")
    command.set_defaults(command=_inspect)

    command = commands.add_parser(
        "convert",
        help="write weights in another format, or for the other framework",
        description="Without --to, only the format changes. With it, names and layouts change as the two models ask.",
    )
    command.add_argument("source", help="file to read")
    command.add_argument("target", help="file to write; its name says the format")
    command.add_argument("--to", choices=["jax", "torch"], help="framework of the target")
    command.add_argument("--jax", metavar="MODEL", help=f"the JAX model: {_MODEL}")
    command.add_argument("--torch", metavar="MODEL", help="the PyTorch model, likewise")
    command.add_argument("--cast", action="store_true", help="round values to the target model's floating-point dtypes")
    command.add_argument("--untie", action="store_true", help="what is tied in the source may be several in the target")
    command.set_defaults(command=_convert)

    command = commands.add_parser("verify", help="compare two models layer by layer, with gradients and training steps")
    command.add_argument("jax", help=f"the JAX model: {_MODEL}")
    command.add_argument("torch", help="the PyTorch model, likewise")
    inputs = (
        "a file with one array per argument (.npy, .npz or weights), shapes for random ones (8x64, or 8x64,8x3), or "
        "file.py:function, which returns what bridge.verify takes as inputs"
    )
    command.add_argument("--inputs", required=True, help=inputs)
    command.add_argument("--torch-inputs", help="where they differ from those of JAX, likewise")
    command.add_argument(
        "--outputs",
        metavar="JAX=TORCH",
        action="append",
        help="results to compare, such as logits=logits, or =logits for a bare array in JAX (default: all, by name)",
    )
    command.add_argument("--no-training", action="store_true", help="leave out gradients and steps of the whole model")
    command.add_argument("--jax-weights", metavar="FILE", help="weights to load into the JAX model")
    command.add_argument("--torch-weights", metavar="FILE", help="weights to load into the PyTorch model")
    command.add_argument("--steps", type=int, default=0, help="training steps to compare (default: 0)")
    command.add_argument("--seed", type=int, default=0, help="for random inputs, targets and noise (default: 0)")
    command.add_argument("--json", metavar="FILE", help="save the report as JSON")
    command.add_argument("--html", metavar="FILE", help="save the report as a page")
    command.set_defaults(command=_verify)
    return parser


def _inspect(options: argparse.Namespace) -> int:
    with open_file(options.file) as reader:
        width = max((len(name) for name in reader.specs), default=0)
        for name, spec in reader.specs.items():
            print(f"{name:{width}}  {spec}")
        total = sum(spec.nbytes for spec in reader.specs.values())
        progress = Progress("reading")
        done = 0
        for name, spec in reader.specs.items():
            reader.read(name)
            done += spec.nbytes
            progress(done, total)
        numbers = sum(int(np.prod(spec.shape)) for spec in reader.specs.values())
        print(f"{len(reader.specs)} arrays, {numbers:,} numbers, {total / 1e6:,.1f} MB; no damage found")
    return 0


def _convert(options: argparse.Namespace) -> int:
    models = options.jax, options.torch
    if options.to and all(models):
        jax_model, torch_model = _model(options.jax, nnx.Module), _model(options.torch, nn.Module)
        bridge.convert_file(
            options.source,
            options.target,
            jax_model,
            torch_model,
            options.to,
            Progress("converting"),
            dtype="cast" if options.cast else "equal",
            untie=options.untie,
        )
    elif options.to or any(models):
        raise ValueError("--to, --jax and --torch go together: the models say how names and layouts correspond")
    elif options.cast or options.untie:
        raise ValueError("--cast and --untie need --to, --jax and --torch: the models say what is cast or tied")
    else:
        with open_file(options.source) as reader:
            total = sum(spec.nbytes for spec in reader.specs.values())
            progress = Progress("converting")

            def pieces() -> Iterator[Piece]:
                done = 0
                for name, spec in reader.specs.items():
                    yield Piece(name, 0, reader.read(name))
                    done += spec.nbytes
                    progress(done, total)

            write(options.target, reader.specs, pieces())
    print(f"wrote {options.target}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    jax_model, torch_model = _model(options.jax, nnx.Module), _model(options.torch, nn.Module)
    for weights, model in ((options.jax_weights, jax_model), (options.torch_weights, torch_model)):
        if weights:
            bridge.load(weights, model)
    report = bridge.verify(
        jax_model,
        torch_model,
        _arrays(options.inputs, options.seed),
        torch_inputs=_arrays(options.torch_inputs, options.seed) if options.torch_inputs else None,
        outputs=_outputs(options.outputs),
        training=not options.no_training,
        steps=options.steps,
        seed=options.seed,
    )
    print(report)
    if options.json:
        report.to_json(options.json)
    if options.html:
        report.to_html(options.html)
    return report.exit_status


def _outputs(pairs: Sequence[str] | None) -> dict[str, str] | None:
    """The names on both sides of each `jax=torch`."""
    for pair in pairs or ():
        if pair.count("=") != 1:
            raise ValueError(f"--outputs: {pair!r} is not of the form JAX=TORCH")
    return None if pairs is None else dict(pair.split("=") for pair in pairs)


def _model(name: str, kind: type) -> Any:
    """The model that `module:function` makes."""
    model = _made(name)
    if not isinstance(model, kind):
        wanted = f"{kind.__module__}.{kind.__name__}"
        raise TypeError(f"{name} must return a {wanted}, and gave one of type {type(model).__name__}")
    return model


def _made(name: str) -> Any:
    """What `module:function` or `file.py:function` returns."""
    module_name, _, function = name.rpartition(":")
    if not module_name:
        raise ValueError(f"{name!r} does not name a model: give {_MODEL}")
    if module_name.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(module_name).stem, module_name)
        if spec is None or spec.loader is None or not Path(module_name).exists():
            raise FileNotFoundError(f"there is no file {module_name}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        with _named(module_name):
            spec.loader.exec_module(module)
    else:
        sys.path.insert(0, "")
        with _named(module_name):
            module = importlib.import_module(module_name)
    make: Callable[[], Any] | None = getattr(module, function, None)
    if not callable(make):
        raise ValueError(f"{module_name} has no function {function!r}")
    with _named(name):
        return make()


@contextmanager
def _named(source: str) -> Iterator[None]:
    """What somebody's file raises, or how it ends the process, is an error of that file."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ValueError(f"{source} raised {type(error).__name__}: {error} (at {_place(error)})") from error


def _place(error: BaseException) -> str:
    """File and line of the innermost step that is none of the frameworks' own."""
    steps = [step for step in traceback.extract_tb(error.__traceback__) if Path(step.filename).exists()]
    here = Path(__file__).parent
    own = [s for s in steps if "site-packages" not in s.filename and here not in Path(s.filename).parents]
    step = (own or steps)[-1]
    return f"{step.filename}:{step.lineno}"


def _arrays(source: str, seed: int) -> Any:
    """The arrays of a file in its order, random ones of the shapes that `source` is, or a function's result."""
    if re.fullmatch(r"\d+(x\d+)*(,\d+(x\d+)*)*", source):
        generator = np.random.default_rng(seed)
        shapes = [tuple(map(int, shape.split("x"))) for shape in source.split(",")]
        return tuple(generator.standard_normal(shape).astype(np.float32) for shape in shapes)
    if ".py:" in source:
        return _made(source)
    if not Path(source).exists():
        raise FileNotFoundError(f"--inputs: {source} is neither a file nor shapes such as 8x64 or 8x64,8")
    if source.endswith(".npy"):
        return (np.load(source, allow_pickle=False),)
    if source.endswith(".npz"):
        return tuple(np.load(source, allow_pickle=False).values())
    return tuple(bridge.load(source).values())


def _line(error: Any) -> str:
    """A message with its notes on one line, however many problems it lists."""
    notes = [note for note in getattr(error, "__notes__", []) if "\n" not in note]  # JAX has one of several lines
    lines = [*str(error).splitlines(), *notes]
    first, *others = [line.strip() for line in lines] or [type(error).__name__]
    shown = [first, *others[:3]] + [f"and {len(others) - 3} more"] * (len(others) > 3)
    return shown[0] + (" " if first.endswith(":") else "; ") * bool(others) + "; ".join(shown[1:])


class Progress:
    """A line on a terminal that counts megabytes, for work of more than a second."""

    def __init__(self, verb: str) -> None:
        self._verb, self._next = verb, time.monotonic() + 1

    def __call__(self, done: int, total: int) -> None:
        """Says how far the work is, four times a second, and clears the line at the end."""
        now = time.monotonic()
        if not sys.stderr.isatty() or (now < self._next and done < total):
            return
        self._next = now + 0.25
        text = f"{self._verb}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB" if done < total else ""
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
