"""The boundary of streams in PyTorch: our kernels beside a compiler's and other projects', and a copy of as many bytes.

A part of `benchmarks.streams`. What a candidate does is a write and the read of the next branch, forward alone and with
its backward pass. The least that it must move is, of a token, 10C numbers forward and 15C backward for four streams
(`streams.boundary`); a copy that moves as much says what share of the memory's rate a candidate has.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Spread, interleaved, ratio
from mhc_torch.streams import StreamConfig, boundary, read, write

STREAMS = 4
CONFIG = StreamConfig(STREAMS)
WIDTHS, TOKENS = (2048, 4096, 7168), 16384
QUICK_WIDTHS, QUICK_TOKENS = (64,), 64
CALLS = 20  # of a GPU in a row: it must never wait for the host

Candidate = Callable[..., tuple[Tensor | None, ...]]
"""phi, alpha, bias, streams, output, post, res -> what a boundary gives."""


def check_device(device: str) -> None:
    """Raises a SystemExit where torch has no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"--device cuda: torch {torch.__version__} finds no GPU here; --device cpu runs the same cases on the CPU"
        )


def synchronize(device: str) -> None:
    """Waits for a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def plain(
    phi: Tensor, alpha: Tensor, bias: Tensor, streams: Tensor, output: Tensor, post: Tensor, res: Tensor
) -> tuple[Tensor | None, ...]:
    """A write and a read by operations of torch."""
    new = write(streams, output, post, res, implementation="torch")
    return new, *read(phi, alpha, bias, new, CONFIG, implementation="torch")


def liger(
    phi: Tensor, alpha: Tensor, bias: Tensor, streams: Tensor, output: Tensor, post: Tensor, res: Tensor
) -> tuple[Tensor | None, ...]:
    """By the kernels of Liger, whose streams are float32 after a write; it hands them on in their dtype."""
    from liger_kernel.transformers import functional

    new = functional.liger_mhc_post_res(streams, output, post, res).to(streams.dtype)
    pre, following, mixing = functional.liger_mhc_coeffs(new, phi.to(new.dtype), bias, *alpha, allow_fp32=True)
    return new, functional.liger_mhc_pre(new, pre), following, mixing


def transformer_engine(
    phi: Tensor, alpha: Tensor, bias: Tensor, streams: Tensor, output: Tensor, post: Tensor, res: Tensor
) -> tuple[Tensor | None, ...]:
    """By the kernels of TransformerEngine, whose streams lie in the last axis: (sequence, batch, C, n)."""
    from transformer_engine.pytorch.triton import mhc

    new = mhc.mhc_fused_expand_combine(output, None, post, streams, res, STREAMS)
    return new, *mhc.mhc_generate_mix_and_aggregate(new, phi, alpha, bias)


def candidates(device: str) -> dict[str, Candidate]:
    """Those that run on the device, of the packages that are installed."""
    compiled: Candidate = torch.compile(plain, dynamic=False)
    found: dict[str, Candidate] = {"torch.compile": compiled, "torch": partial(boundary, config=CONFIG)}
    if device == "cuda":
        found = {"mhc_torch": partial(boundary, config=CONFIG, implementation="triton")} | found
        found["torch"] = partial(boundary, config=CONFIG, implementation="torch")
        others = {"liger_kernel": ("liger", liger), "transformer_engine": ("transformer_engine", transformer_engine)}
        found |= {name: one for package, (name, one) in others.items() if find_spec(package)}
    return found


def arguments(name: str, tokens: int, width: int, device: str) -> list[Tensor]:
    """What a candidate is called with: bfloat16 streams, maps in float32, each as the candidate has them lie."""
    torch.manual_seed(0)
    n, logits = STREAMS, CONFIG.logits
    wide: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    phi = torch.randn(n * width, logits, device=device) / (n * width) ** 0.5
    alpha, bias = torch.full((3,), 0.1, device=device), torch.zeros(logits, device=device)
    streams, output = torch.randn(1, tokens, n, width, **wide), torch.randn(1, tokens, width, **wide)
    post = torch.rand(1, tokens, n, device=device)
    res = torch.softmax(torch.randn(1, tokens, n, n, device=device), -1)
    made = [phi, alpha, bias, streams, output, post, res]
    if name == "transformer_engine":
        made = [phi.T.contiguous(), alpha, bias[None], streams.mT.contiguous(), output, post, res]
    return [tensor.requires_grad_() for tensor in made]


def steps(one: Candidate, inputs: list[Tensor], device: str) -> dict[str, Callable[[], None]]:
    """CALLS times the boundary alone, and with its backward pass; of a CPU once."""
    calls = CALLS if device == "cuda" else 1
    with torch.no_grad():
        cotangents = [torch.randn_like(result) for result in one(*inputs) if result is not None]

    def forward() -> None:
        with torch.no_grad():
            for _ in range(calls):
                one(*inputs)
        synchronize(device)

    def both() -> None:
        for _ in range(calls):
            results = [result for result in one(*inputs) if result is not None]
            torch.autograd.grad(results, inputs, cotangents)
        synchronize(device)

    return {"forward": forward, "forward and backward": both}


def copies(least: int, device: str) -> Callable[[], None]:
    """As many copies as a candidate has calls, each of which moves the least bytes: half are read, half are written."""
    source = torch.ones(least // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def call() -> None:
        for _ in range(CALLS if device == "cuda" else 1):
            target.copy_(source)
        synchronize(device)

    return call


def measure(device: str, quick: bool, seconds: float) -> dict[str, Any]:
    """By width and pass: milliseconds of every candidate, over the compiled plain form, and its share of a copy's rate.

    A candidate that fails is recorded with what it said: the others are measured all the same.
    """
    found: dict[str, Any] = {}
    tokens = QUICK_TOKENS if quick else TOKENS
    calls = CALLS if device == "cuda" else 1
    for width in QUICK_WIDTHS if quick else WIDTHS:
        runs: dict[str, dict[str, Callable[[], None]]] = {}
        failed: dict[str, str] = {}
        for name, one in candidates(device).items():
            try:
                runs[name] = steps(one, arguments(name, tokens, width, device), device)
                for run in runs[name].values():
                    run()
            except Exception as error:
                runs.pop(name, None)
                failed[name] = f"{type(error).__name__}: {error}"[:500]
        numbers = {"forward": 2 * STREAMS + 2, "forward and backward": 2 * STREAMS + 2 + 3 * STREAMS + 3}
        for way, count in numbers.items():
            least = count * width * tokens * 2
            timed = {name: run[way] for name, run in runs.items()} | {"copy": copies(least, device)}
            times = interleaved(timed, seconds=seconds / len(numbers))
            found[f"C={width}, {way}"] = {
                "least bytes": least,
                "copy (GB/s)": Spread.of(least * calls / times["copy"] / 1e9),
                **{f"{name}: ms": Spread.of(1e3 * times[name] / calls) for name in runs},
                **{f"{name}: over torch.compile": ratio(times, name, "torch.compile") for name in runs},
                **{f"{name}: share of a copy's rate": Spread.of(times["copy"] / times[name]) for name in runs},
                **{f"{name}: failed": said for name, said in failed.items()},
            }
    return found
