"""Kernels in Triton: those of other projects, as their packages have them, and of `mhc_torch`, for the lab's shapes.

A peer is an entry of `PEERS`: what it launches for the work of one of the lab's cases. Of other projects only kernels
that touch the streams are listed: gates and Sinkhorn, which they have in kernels of their own, move a few numbers a
token.
"""

from collections.abc import Callable, Mapping
from functools import partial
from math import ceil, prod
from typing import Any

from benchmarks.accelerators.targets import Target
from benchmarks.accelerators.triton_kernels import SIZES, Array, Launch, figures, module

Peer = Callable[[Target], dict[str, Any]]
"""The figures of the kernels, or an error that says why there are none."""
Launches = Callable[[int, int, int], list[Launch]]
Arrays = dict[str, Array | None]
LIGER, ENGINE, OURS = "liger", "transformer_engine", "mhc_torch"


def peers(work: str, tokens: int, n: int, width: int) -> dict[str, Peer]:
    """By project, the kernels for "read", "write" or "boundary", forward or ", backward", of n streams of a width."""

    def compiled(project: str, launches: Launches, target: Target) -> dict[str, Any]:
        return figures(project, launches(tokens, n, width), target)

    return {
        project: partial(compiled, project, launches)
        for (project, done), launches in PEERS.items()
        # The kernels of TransformerEngine say themselves that they are for four.
        if done == work and (project != ENGINE or n == 4)
    }


def _strides(*shapes: tuple[int, ...]) -> list[int]:
    """Of arrays whose last axis lies next to each other, one array after the other."""
    return [prod(shape[i + 1 :]) for shape in shapes for i in range(len(shape))]


def _liger_sizes(tokens: int, n: int, width: int, tile: tuple[int, int]) -> dict[str, Any]:
    def programs(blocks: Mapping[str, Any]) -> int:
        return ceil(tokens / blocks["BLOCK_N"]) * ceil(width / blocks["BLOCK_C"])

    constants = {"N": tokens, "HC": n, "C": width}
    return {"constants": constants, "blocks": {"BLOCK_N": tile[0], "BLOCK_C": tile[1]}, "programs": programs}


def _liger_merge(tokens: int, n: int, width: int, *, backward: bool) -> list[Launch]:
    streams, one, post, res = (tokens, n, width), (tokens, width), (tokens, n), (tokens, n, n)
    # The blocks that it picks for Hopper and before (`_post_res_default_meta`).
    rows, columns, warps, stages = module(LIGER)._post_res_default_meta(width)
    sizes = _liger_sizes(tokens, n, width, (rows, columns)) | {"warps": warps, "stages": stages}
    arrays = {
        "x_ptr": ("bf16", streams),
        "f_ptr": ("bf16", one),
        "hpost_ptr": ("fp32", post),
        "hres_ptr": ("fp32", res),
    }
    if not backward:
        arrays["out_ptr"] = ("fp32", streams)
        return [Launch("_mhc_post_res_fwd_kernel", arrays, strides=_strides(streams, one, post, res, streams), **sizes)]
    arrays |= {"grad_out_ptr": ("fp32", streams), "grad_x_ptr": ("fp32", streams), "grad_f_ptr": ("fp32", one)}
    arrays |= {"grad_hpost_ptr": ("fp32", post), "grad_hres_ptr": ("fp32", res)}
    strides = _strides(streams, one, post, res, streams, streams, one, post, res)
    return [Launch("_mhc_post_res_bwd_kernel", arrays, strides=strides, **sizes)]


def _liger_read(tokens: int, n: int, width: int, *, backward: bool) -> list[Launch]:
    streams, one, pre, flat = (tokens, n, width), (tokens, width), (tokens, n), (tokens, n * width)
    maps = 2 * n + n * n
    phi, mix = (n * width, maps), (tokens, maps)
    constants = {"N": tokens, "K": n * width, "M": maps, "CAST_FP32": False}
    blocks = {"BLOCK_N": 32, "BLOCK_K": 256, "BLOCK_M": 32}
    sizes = _liger_sizes(tokens, n, width, (32, 128))
    arrays: dict[str, Array] = {"x_ptr": ("bf16", flat), "phi_ptr": ("bf16", phi), "mix_ptr": ("fp32", mix)}
    arrays["invr_ptr"] = ("fp32", (tokens,))
    collapse: dict[str, Array] = {"x_ptr": ("bf16", streams), "hpre_ptr": ("fp32", pre)}
    if not backward:
        project = Launch(
            "_mhc_mm_norm_fwd_kernel",
            arrays,
            constants | {"eps": 1e-6},
            _strides(flat, phi, mix),
            lambda sizes: ceil(tokens / sizes["BLOCK_N"]) * ceil(maps / sizes["BLOCK_M"]),
            blocks,
        )
        collapse["out_ptr"] = ("fp32", one)
        return [project, Launch("_mhc_pre_fwd_kernel", collapse, strides=_strides(streams, pre, one), **sizes)]
    collapse |= {"grad_out_ptr": ("fp32", one), "grad_x_ptr": ("fp32", streams), "grad_h_ptr": ("fp32", pre)}
    arrays |= {"grad_mix_ptr": ("fp32", mix), "grad_x_ptr": ("bf16", flat), "grad_phi_ptr": ("fp32", phi)}
    project = Launch(
        "_mhc_mm_norm_bwd_fused_kernel",
        arrays,
        constants,
        _strides(flat, phi, mix, (tokens,), mix, flat, phi),
        lambda sizes: ceil(tokens / sizes["BLOCK_N"]) * ceil(n * width / sizes["BLOCK_K"]),
        blocks,
    )
    return [
        Launch("_mhc_pre_bwd_kernel", collapse, strides=_strides(streams, pre, one, streams, pre), **sizes),
        project,
    ]


def _tuned(tokens: int, features: int, axis: str) -> Callable[[Mapping[str, Any]], int]:
    """How many programs a grid has whose blocks Triton's tuner chooses."""
    return lambda blocks: ceil(tokens / blocks["BLOCK_SIZE_M"]) * ceil(features / blocks[f"BLOCK_SIZE_{axis}"])


def _engine_merge(tokens: int, n: int, width: int, *, backward: bool) -> list[Launch]:
    one, flat = (tokens, width), (tokens, width * n)
    constants: dict[str, Any] = {"M": tokens, "C": width, "n": n, "HAS_BIAS": False}
    arrays: dict[str, Array | None] = {"f_ptr": ("bf16", one), "bias_ptr": None, "H_post_ptr": ("fp32", (tokens, n))}
    arrays |= {"x_ptr": ("bf16", flat), "H_res_ptr": ("fp32", (tokens, n, n))}
    programs = _tuned(tokens, width, "C")
    if not backward:
        arrays["output_ptr"] = ("bf16", flat)
        strides = [*_strides(one), 1, *_strides(flat, flat)]
        return [Launch("_mhc_expand_combine_fwd", arrays, constants, strides, programs)]
    arrays |= {"grad_output_ptr": ("bf16", flat), "grad_f_ptr": ("bf16", one), "grad_x_ptr": ("bf16", flat)}
    arrays |= {"grad_H_post_ptr": ("fp32", (tokens, n)), "grad_H_res_ptr": ("fp32", (tokens, n, n))}
    arrays |= {"grad_bias_ptr": ("bf16", (1,)), "grad_bias_ws_ptr": None}
    constants |= {"precision": "tf32", "FUSE_GRAD_X_ACC": False, "DETERMINISTIC": False}
    strides = [*_strides(flat, one), 1, *_strides(flat, one), 1, width, 1, *_strides(flat)]
    return [Launch("_mhc_expand_combine_bwd", arrays, constants, strides, programs)]


def _engine_read(tokens: int, n: int, width: int, *, backward: bool) -> list[Launch]:
    # The product for the gradient of phi is cuBLAS', and is not here.
    one, flat, phi = (tokens, width), (tokens, n * width), (2 * n + n * n, n * width)
    constants = {"M": tokens, "N": phi[0], "K": n * width, "BLOCK_SIZE_N": 32, "precision": "tf32"}
    arrays: dict[str, Array | None] = {"x_ptr": ("bf16", flat), "phi_ptr": ("fp32", phi)}
    collapse: dict[str, Array | None] = {"x_ptr": ("bf16", flat), "H_pre_ptr": ("fp32", (tokens, n))}
    sizes: dict[str, Any] = {"M": tokens, "C": width, "n": n}
    if not backward:
        arrays |= {"h_ptr": ("fp32", (tokens, 32)), "ms_ptr": ("fp32", (tokens,))}
        collapse["output_ptr"] = ("bf16", one)
        split = constants | {"USE_SPLIT_K": True, "USE_TMA": False}
        strides = [*_strides(flat, phi, (tokens, 32)), 1, 1]
        return [
            Launch("_mhc_projection_fwd_fused", arrays, split, strides, _tuned(tokens, n * width, "K")),
            Launch("_mhc_aggregate_fwd", collapse, sizes, _strides(flat, one), _tuned(tokens, width, "C")),
        ]
    collapse |= {
        "grad_output_ptr": ("bf16", one),
        "grad_H_pre_ptr": ("fp32", (tokens, n)),
        "grad_x_ptr": ("bf16", flat),
    }
    sizes |= {"precision": "tf32", "FUSE_GRAD_X_ACC": False}
    arrays |= {"grad_x_ptr": ("bf16", flat), "norm_weight_ptr": None, "grad_h_ptr": ("fp32", (tokens, 32))}
    arrays["grad_ms_ptr"] = ("fp32", (tokens,))
    constants |= {"FUSE_GRAD_X_ACC": False, "HAS_NORM_WEIGHT": False}
    strides = [*_strides(flat, flat, phi), 1, *_strides(phi, (tokens, 32)), 1]
    return [
        Launch("_mhc_aggregate_bwd", collapse, sizes, _strides(one, flat, flat), _tuned(tokens, width, "C")),
        Launch("_mhc_projection_bwd_fused_dx", arrays, constants, strides, _tuned(tokens, n * width, "K")),
    ]


def _ours(
    tokens: int, n: int, width: int, *, writes: bool = False, reads: bool = False, backward: bool = False
) -> list[Launch]:
    boundary, maps, m = module("boundary"), module("maps"), n * n + 2 * n
    wide, one, table, few = (tokens, n, width), (tokens, width), (tokens, n, n), (tokens, n)
    old: Arrays = {"streams": ("bf16", wide)}
    for name, kind, shape in (("output", "bf16", one), ("post", "fp32", few), ("res", "fp32", table)):
        old[name] = (kind, shape) if writes else None
    parameters: Arrays = {
        "phi": ("fp32", (n * width, m)),
        "alpha": ("fp32", (3,)),
        "bias": ("fp32", (m,)),
    }
    projected: Arrays = {"raw": ("fp32", (tokens, m)), "inverse_rms": ("fp32", (tokens,))}
    x: Arrays = {"inputs": ("bf16", one)}
    logits: Arrays = {"d_logits": ("fp32", (tokens, m))}
    if not reads:
        parameters, projected, x, logits = (dict.fromkeys(arrays) for arrays in (parameters, projected, x, logits))
    new: Arrays = {"new": ("bf16", wide) if writes else None}

    def launch(
        source: str,
        kernel: str,
        programs: int,
        arrays: Arrays,
        constants: dict[str, Any],
        options: Any,
    ) -> Launch:
        return Launch(
            kernel,
            arrays,
            constants | {"tokens": tokens},
            (),
            lambda _: programs,
            {},
            options["num_warps"],
            options["num_stages"],
            source,
        )

    fixed = boundary.constants(n, width, SIZES["bf16"], writes, writes, m if reads else 0) | {"width": width}
    fixed["read_epsilon"] = 0.0
    of_tokens = "boundary", f"boundary_{'backward' if backward else 'forward'}", boundary.programs(tokens)
    sinkhorn = maps.constants(n, False, False) | {"iterations": 20, "epsilon": 0.0, "post_scale": 2.0}
    of_maps = "maps", f"maps_{'backward' if backward else 'forward'}", maps.programs(tokens, n)
    shared = {name: array for name, array in (projected | parameters).items() if name != "phi"}
    if not backward:
        fixed["norm_epsilon"] = 1e-6
        launches = [launch(*of_tokens, old | parameters | new | x | projected, fixed, boundary.options(n))]
        if reads:
            found: Arrays = {"post": ("fp32", few), "res": ("fp32", table)}
            sinkhorn["post_epsilon"] = 0.0
            launches.append(launch(*of_maps, shared | found, sinkhorn, maps.OPTIONS))
        return launches
    arrived: Arrays = {"d_new": ("bf16", wide) if writes else None, "d_inputs": x["inputs"]}
    gradients = {f"d_{name}": array for name, array in old.items()}
    everything = old | parameters | projected | arrived | logits | gradients
    launches = [launch(*of_tokens, everything, fixed, boundary.options(n))]
    if reads:
        found = {"d_post": ("fp32", few), "d_res": ("fp32", table)}
        sums: Arrays = {"sums": ("fp32", (tokens, 20, 2, sinkhorn["N"]))}
        launches.insert(0, launch(*of_maps, shared | found | sums | logits, sinkhorn, maps.OPTIONS))
        own = {f"d_{name}": array for name, array in parameters.items()}
        programs = boundary.parameter_programs(n * width)
        constants = boundary.parameter_constants(n, m) | {"features": n * width}
        arrays = {"new": ("bf16", wide)} | projected | {"alpha": parameters["alpha"]} | logits | own
        options = boundary.parameter_options(n)
        launches.append(launch("boundary", "parameters_backward", programs, arrays, constants, options))
    return launches


PEERS: Mapping[tuple[str, str], Launches] = {
    (LIGER, "write"): partial(_liger_merge, backward=False),
    (LIGER, "write, backward"): partial(_liger_merge, backward=True),
    (LIGER, "read"): partial(_liger_read, backward=False),
    (LIGER, "read, backward"): partial(_liger_read, backward=True),
    (ENGINE, "write"): partial(_engine_merge, backward=False),
    (ENGINE, "write, backward"): partial(_engine_merge, backward=True),
    (ENGINE, "read"): partial(_engine_read, backward=False),
    (ENGINE, "read, backward"): partial(_engine_read, backward=True),
    (OURS, "write"): partial(_ours, writes=True),
    (OURS, "write, backward"): partial(_ours, writes=True, backward=True),
    (OURS, "read"): partial(_ours, reads=True),
    (OURS, "read, backward"): partial(_ours, reads=True, backward=True),
    (OURS, "boundary"): partial(_ours, writes=True, reads=True),
    (OURS, "boundary, backward"): partial(_ours, writes=True, reads=True, backward=True),
}
