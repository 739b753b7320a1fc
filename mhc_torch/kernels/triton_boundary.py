"""The boundary between two branches of streams in Triton, one pass over tokens forward and one backward.

A program has a few tokens and goes over their features twice, since what it must know of a token first is a sum over
all of its features: forward of the norm and the projection, before X' can be collapsed; backward what arrives at
H_pre, before it goes on through the projection. The second time it begins with what it saw last, which the cache still
has. From the memory it reads (n+1)C numbers a token and writes (n+1)C forward, and reads (2n+2)C and writes (n+1)C
backward; what the cache has lost by then is read again.

phi's derivative is a sum over tokens. To add up parts of programs would be as much to write as the streams are, or
without an order; so a third kernel, whose programs have a few features and go over all tokens, reads X' once more.

A boundary writes (X' = res X + post y) and reads (x' = pre X'). WRITES and READS say which of the two is done: a layer
by itself does one before its branch and the other after it. Without MIXES, res is the identity.

This file needs Triton alone, so that the lab compiles it where no torch is.
"""

from typing import Any

import triton
import triton.language as tl

TOKENS = 32  # of a program
FEATURES = 64  # of a step, with up to 4 streams: a thread has 8 of each array
HELD = 4  # streams whose maps, and sums for their derivatives, stay in registers; of more they are in the cache

PARAMETER_TOKENS, PARAMETER_FEATURES = 64, 32  # of a step and of a program

# The interpreter multiplies numbers of bfloat16 as if their bits were whole numbers.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def programs(tokens: int) -> int:
    """How many programs a boundary has."""
    return triton.cdiv(tokens, TOKENS)


def constants(n: int, width: int, itemsize: int, mixes: bool, writes: bool, m: int) -> dict[str, Any]:
    """What the kernels of a boundary are compiled for; m is 0 where nothing is read.

    A step has fewer features with more streams, which a thread holds side by side, and of numbers of 32 bits.
    """
    most = FEATURES if itemsize == 2 else FEATURES // 4
    features = min(most, most * HELD // triton.next_power_of_2(n), triton.next_power_of_2(width))
    columns = _columns(m)
    return {
        "n": n,
        "m": m,
        "MIXES": mixes,
        "WRITES": writes,
        "READS": m > 0,
        "STATIC": n <= HELD or not mixes,
        "TOKENS": TOKENS,
        "FEATURES": max(16, features),
        "COLUMNS": columns,
        # Of fewer rows of a product the compiler gives a copy of what it multiplies to every warp.
        "ROWS": max(64, 2 * columns),
    }


def options(n: int) -> dict[str, int]:
    """How the kernels of a boundary are compiled. Two steps of phi of many streams would fill the shared memory.

    Products and sums are fused, which versions of Triton differ in by default.
    """
    return {"num_warps": 8, "num_stages": 2 if n <= HELD else 1, "enable_fp_fusion": True}


def parameter_programs(features: int) -> int:
    """How many programs the derivatives of the parameters have: the last has those of gates and bias."""
    return triton.cdiv(features, PARAMETER_FEATURES) + 1


def parameter_constants(n: int, m: int) -> dict[str, Any]:
    """What their kernel is compiled for."""
    columns = _columns(m)
    # The step has at most the logits of that many tokens of 4 streams, or it would fill the shared memory.
    tokens = max(16, min(PARAMETER_TOKENS, 32 * PARAMETER_TOKENS // columns))
    return {"n": n, "m": m, "TOKENS": tokens, "FEATURES": PARAMETER_FEATURES, "COLUMNS": columns}


def parameter_options(n: int) -> dict[str, int]:
    """How it is compiled."""
    return {"num_warps": 4 if n <= HELD else 8, "num_stages": 3 if n <= HELD else 1, "enable_fp_fusion": True}


def _columns(m: int) -> int:
    """Columns of phi in a product, which has 16 at least."""
    return max(16, triton.next_power_of_2(max(m, 1)))


@triton.jit
def _column(table, t, live, stride, at):
    """One number of every token of a table (T, stride) in float32."""
    return tl.load(table + t * stride + at, mask=live, other=0).to(tl.float32)


@triton.jit
def _maps(res, post, t, live, n: tl.constexpr, MIXES: tl.constexpr, WRITES: tl.constexpr):
    """For each new stream, what each old one weighs in it (if they mix), and then what the output does."""
    held = ()
    if WRITES:
        for i in tl.static_range(n):
            if MIXES:
                for j in tl.static_range(n):
                    held = held + (_column(res, t, live, n * n, i * n + j),)
            held = held + (_column(post, t, live, n, i),)
    return held


@triton.jit
def _own(streams, output, t, f, inside, width, n: tl.constexpr, WRITES: tl.constexpr):
    """A step of every stream, and then of the output, in float32."""
    own = ()
    for j in tl.static_range(n):
        at = (t * n + j)[:, None] * width + f[None, :]
        own = own + (tl.load(streams + at, mask=inside, other=0).to(tl.float32),)
    if WRITES:
        own = own + (tl.load(output + t[:, None] * width + f[None, :], mask=inside, other=0).to(tl.float32),)
    return own


@triton.jit
def _merged(own, held, i: tl.constexpr, n: tl.constexpr, MIXES: tl.constexpr, WRITES: tl.constexpr):
    """A step of new stream i, whose maps are held."""
    if MIXES:
        total = held[i * (n + 1) + n][:, None] * own[n]
        for j in tl.static_range(n):
            total += held[i * (n + 1) + j][:, None] * own[j]
    elif WRITES:
        total = own[i] + held[i][:, None] * own[n]
    else:
        total = own[i]
    return total


@triton.jit
def _merged_from_memory(own, res, post, t, live, i, n: tl.constexpr):
    """A step of new stream i, whose maps are in the cache."""
    total = _column(post, t, live, n, i)[:, None] * own[n]
    for j in tl.static_range(n):
        total += _column(res, t, live, n * n, i * n + j)[:, None] * own[j]
    return total


@triton.jit
def _phi(phi, i, f, width, m: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, dtype: tl.constexpr):
    """A step of phi of stream i, transposed (ROWS, features), as products take it: see `_all_digits`.

    Of a phi in bfloat16 there are two below each other, whose sum has 16 bits. Where it is not halved, rows are zeros.
    """
    row = tl.arange(0, ROWS)
    column = row % COLUMNS
    at = (i * width + f)[None, :] * m + column[:, None]
    if dtype == tl.bfloat16:
        whole = tl.load(phi + at, mask=(f < width)[None, :] & (column < m)[:, None], other=0).to(tl.float32)
        high = whole.to(dtype)
        weights = tl.where(row[:, None] < COLUMNS, high, (whole - high.to(tl.float32)).to(dtype))
    else:
        weights = tl.load(phi + at, mask=(f < width)[None, :] & (row < m)[:, None], other=0).to(tl.float32)
    return weights


@triton.jit
def _all_digits(a, b, total):
    """total + a b. Products of float32 are three of half the digits, by the matrix units."""
    if a.dtype == tl.bfloat16 and not INTERPRETED:
        total = tl.dot(a, b, total)
    else:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="tf32x3")
    return total


@triton.jit
def _settled(x):
    """x, in the layout that it has: the compiler would compute it anew as a product wants it, once for each warp."""
    if INTERPRETED:
        return x
    if x.dtype == tl.float32:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1)
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)


@triton.jit
def _through_phi(
    phi, d_raw, i, f, width, m: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr
):
    """What arrives at a step of new stream i from the raw logits (tokens, COLUMNS)."""
    column = tl.arange(0, COLUMNS)
    at = (i * width + f)[:, None] * m + column[None, :]
    weights = tl.load(phi + at, mask=(f < width)[:, None] & (column < m)[None, :], other=0).to(d_raw.dtype)
    return tl.trans(_all_digits(weights, tl.trans(d_raw), tl.zeros((FEATURES, TOKENS), tl.float32)))


@triton.jit
def _sigmoid(x):
    # The logarithm of what overflows here is a sigmoid of 0.
    return 1 / (1 + tl.exp(-x))


@triton.jit
def boundary_forward(
    streams,
    output,
    post,
    res,
    phi,
    alpha,
    bias,
    new,
    inputs,
    raw,
    inverse_rms,
    tokens,
    width,
    norm_epsilon,
    read_epsilon,
    n: tl.constexpr,
    m: tl.constexpr,
    MIXES: tl.constexpr,
    WRITES: tl.constexpr,
    READS: tl.constexpr,
    STATIC: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """X', x', vec(X') phi and 1 / rms(vec X'), of streams whose squares sum up to numbers that float32 holds."""
    dtype = streams.dtype.element_ty
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    live, t = row < tokens, row.to(tl.int64)
    held = ()
    if STATIC:
        held = _maps(res, post, t, live, n, MIXES, WRITES)
    products = tl.zeros((ROWS, TOKENS), tl.float32)
    squares = tl.zeros((TOKENS, FEATURES), tl.float32)
    for step in range(0, width, FEATURES):
        f = step + tl.arange(0, FEATURES)
        inside = live[:, None] & (f < width)[None, :]
        own = _own(streams, output, t, f, inside, width, n, WRITES)
        if STATIC:
            for i in tl.static_range(n):
                merged = _merged(own, held, i, n, MIXES, WRITES).to(dtype)
                if WRITES:
                    tl.store(new + (t * n + i)[:, None] * width + f[None, :], merged, mask=inside)
                if READS:
                    weights = _phi(phi, i, f, width, m, COLUMNS, ROWS, dtype)
                    products = _all_digits(weights, tl.trans(_settled(merged)), products)
                    wide = merged.to(tl.float32)
                    squares += wide * wide
        else:
            for one in range(n):
                merged = _merged_from_memory(own, res, post, t, live, one, n).to(dtype)
                tl.store(new + (t * n + one)[:, None] * width + f[None, :], merged, mask=inside)
                if READS:
                    weights = _phi(phi, one, f, width, m, COLUMNS, ROWS, dtype)
                    products = _all_digits(weights, tl.trans(_settled(merged)), products)
                    wide = merged.to(tl.float32)
                    squares += wide * wide
    if READS:
        column = tl.arange(0, COLUMNS)
        products = tl.sum(tl.reshape(products, (ROWS // COLUMNS, COLUMNS, TOKENS)), 0)
        tl.store(raw + t[None, :] * m + column[:, None], products, mask=live[None, :] & (column < m)[:, None])
        scale = tl.rsqrt(tl.sum(squares, 1) / (n * width) + norm_epsilon)
        tl.store(inverse_rms + t, scale, mask=live)
        gate = tl.load(alpha).to(tl.float32)
        pre = ()
        for i in tl.static_range(n):
            own_logit = tl.sum(tl.where(column[:, None] == i, products, 0.0), 0) * scale
            pre = pre + (_sigmoid(gate * own_logit + tl.load(bias + i).to(tl.float32)) + read_epsilon,)
        # What one thread of the program wrote another may read.
        tl.debug_barrier()
        steps = tl.cdiv(width, FEATURES)
        for back in range(0, steps):
            f = (steps - 1 - back) * FEATURES + tl.arange(0, FEATURES)
            inside = live[:, None] & (f < width)[None, :]
            total = tl.zeros((TOKENS, FEATURES), tl.float32)
            for i in tl.static_range(n):
                at = (t * n + i)[:, None] * width + f[None, :]
                merged = tl.load((new if WRITES else streams) + at, mask=inside, other=0)
                total += pre[i][:, None] * merged.to(tl.float32)
            tl.store(inputs + t[:, None] * width + f[None, :], total.to(dtype), mask=inside)


@triton.jit
def boundary_backward(
    streams,
    output,
    post,
    res,
    phi,
    alpha,
    bias,
    raw,
    inverse_rms,
    d_new,
    d_inputs,
    d_logits,
    d_streams,
    d_output,
    d_post,
    d_res,
    tokens,
    width,
    read_epsilon,
    n: tl.constexpr,
    m: tl.constexpr,
    MIXES: tl.constexpr,
    WRITES: tl.constexpr,
    READS: tl.constexpr,
    STATIC: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The derivatives of streams, output, post and res, and of the logits of H_pre; those of the others are known."""
    dtype = streams.dtype.element_ty
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    live, t = row < tokens, row.to(tl.int64)
    held = ()
    if STATIC:
        held = _maps(res, post, t, live, n, MIXES, WRITES)
    steps = tl.cdiv(width, FEATURES)
    pre = ()
    if READS:
        of_input = ()
        for _ in tl.static_range(n + WRITES):
            of_input = of_input + (tl.zeros((TOKENS,), tl.float32),)
        for step in range(0, width, FEATURES):
            f = step + tl.arange(0, FEATURES)
            inside = live[:, None] & (f < width)[None, :]
            arrived = tl.load(d_inputs + t[:, None] * width + f[None, :], mask=inside, other=0).to(tl.float32)
            sums = ()
            own = _own(streams, output, t, f, inside, width, n, WRITES)
            for j in tl.static_range(n + WRITES):
                sums = sums + (of_input[j] + tl.sum(own[j] * arrived, 1),)
            of_input = sums
        column = tl.arange(0, COLUMNS)
        known = live[:, None] & (column < m)[None, :]
        logit_at = t[:, None] * m + column[None, :]
        normalized = tl.load(raw + logit_at, mask=known, other=0)
        # Those of H_pre are not known yet.
        d_raw = tl.load(d_logits + logit_at, mask=known & (column >= n)[None, :], other=0)
        scale = tl.load(inverse_rms + t, mask=live, other=0)
        normalized *= scale[:, None]
        gate = tl.load(alpha).to(tl.float32)
        for i in tl.static_range(n):
            if MIXES and not STATIC:
                d_pre = _column(post, t, live, n, i) * of_input[n]
                for j in tl.static_range(n):
                    d_pre += _column(res, t, live, n * n, i * n + j) * of_input[j]
            elif MIXES:
                d_pre = held[i * (n + 1) + n] * of_input[n]
                for j in tl.static_range(n):
                    d_pre += held[i * (n + 1) + j] * of_input[j]
            elif WRITES:
                d_pre = of_input[i] + held[i] * of_input[n]
            else:
                d_pre = of_input[i]
            logit = gate * _column(raw, t, live, m, i) * scale + tl.load(bias + i).to(tl.float32)
            weight = _sigmoid(logit)
            pre = pre + (weight + read_epsilon,)
            d_logit = d_pre * weight * (1 - weight)
            tl.store(d_logits + t * m + i, d_logit, mask=live)
            d_raw = tl.where(column[None, :] == i, d_logit[:, None], d_raw)
        group = tl.where(column < n, 0, tl.where(column < 2 * n, 1, 2))
        d_raw *= tl.load(alpha + group).to(tl.float32)[None, :]
        # Through 1 / rms X' gets along * X'. No factor here is the square of a stream, or of 1 / rms.
        along = -tl.sum(d_raw * normalized, 1) * scale / (n * width) * scale
        d_raw = d_raw * scale[:, None]
        if dtype == tl.bfloat16:
            d_raw = d_raw.to(dtype)
    to_maps = ()
    if STATIC and WRITES:
        for _ in tl.static_range(n * (n + 1) if MIXES else n):
            to_maps = to_maps + (tl.zeros((TOKENS,), tl.float32),)
    for back in range(0, steps):
        f = (steps - 1 - back) * FEATURES + tl.arange(0, FEATURES)
        inside = live[:, None] & (f < width)[None, :]
        own = _own(streams, output, t, f, inside, width, n, WRITES)
        if READS:
            arrived = tl.load(d_inputs + t[:, None] * width + f[None, :], mask=inside, other=0).to(tl.float32)
        old = ()
        for _ in tl.static_range(n + WRITES):
            old = old + (tl.zeros((TOKENS, FEATURES), tl.float32),)
        if STATIC:
            sums = ()
            for i in tl.static_range(n):
                at = (t * n + i)[:, None] * width + f[None, :]
                if READS:
                    total = _through_phi(phi, d_raw, i, f, width, m, COLUMNS, TOKENS, FEATURES)
                    total += along[:, None] * _merged(own, held, i, n, MIXES, WRITES)
                    total += pre[i][:, None] * arrived
                else:
                    total = tl.zeros((TOKENS, FEATURES), tl.float32)
                if WRITES:
                    total += tl.load(d_new + at, mask=inside, other=0).to(tl.float32)
                    mixed = ()
                    if MIXES:
                        for j in tl.static_range(n + 1):
                            sums = sums + (to_maps[i * (n + 1) + j] + tl.sum(total * own[j], 1),)
                            mixed = mixed + (old[j] + held[i * (n + 1) + j][:, None] * total,)
                    else:
                        sums = sums + (to_maps[i] + tl.sum(total * own[n], 1),)
                        for j in tl.static_range(n):
                            mixed = mixed + (old[j],)
                        mixed = mixed + (old[n] + held[i][:, None] * total,)
                    old = mixed
                if not MIXES:
                    tl.store(d_streams + at, total.to(dtype), mask=inside)
            if WRITES:
                to_maps = sums
        else:
            for one in range(n):
                at = (t * n + one)[:, None] * width + f[None, :]
                total = tl.load(d_new + at, mask=inside, other=0).to(tl.float32)
                if READS:
                    total += _through_phi(phi, d_raw, one, f, width, m, COLUMNS, TOKENS, FEATURES)
                    total += along[:, None] * _merged_from_memory(own, res, post, t, live, one, n)
                    weight = _sigmoid(gate * _column(raw, t, live, m, one) * scale + tl.load(bias + one).to(tl.float32))
                    total += (weight + read_epsilon)[:, None] * arrived
                mixed = ()
                for j in tl.static_range(n + 1):
                    of_map = tl.sum(total * own[j], 1)
                    if j < n:
                        table, entry = d_res, t * (n * n) + one * n + j
                        weight = _column(res, t, live, n * n, one * n + j)
                    else:
                        table, entry = d_post, t * n + one
                        weight = _column(post, t, live, n, one)
                    before = tl.load(table + entry, mask=live & (back > 0), other=0)
                    tl.store(table + entry, before + of_map, mask=live)
                    mixed = mixed + (old[j] + weight[:, None] * total,)
                old = mixed
            # The next step adds to what another thread of the program may have written.
            tl.debug_barrier()
        if MIXES:
            for j in tl.static_range(n):
                tl.store(d_streams + (t * n + j)[:, None] * width + f[None, :], old[j].to(dtype), mask=inside)
        if WRITES:
            tl.store(d_output + t[:, None] * width + f[None, :], old[n].to(dtype), mask=inside)
    if STATIC and WRITES:
        for i in tl.static_range(n):
            if MIXES:
                for j in tl.static_range(n):
                    tl.store(d_res + t * (n * n) + i * n + j, to_maps[i * (n + 1) + j], mask=live)
                tl.store(d_post + t * n + i, to_maps[i * (n + 1) + n], mask=live)
            else:
                tl.store(d_post + t * n + i, to_maps[i], mask=live)


@triton.jit
def parameters_backward(
    new,
    raw,
    inverse_rms,
    alpha,
    d_logits,
    d_phi,
    d_alpha,
    d_bias,
    tokens,
    features,
    n: tl.constexpr,
    m: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The derivatives of phi, each program's of some rows, and of gates and bias, which the last program has.

    Sums over tokens in their order, so that they are the same in every run.
    """
    dtype = new.dtype.element_ty
    program = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    f = program.to(tl.int64) * FEATURES + tl.arange(0, FEATURES)
    group = tl.where(column < n, 0, tl.where(column < 2 * n, 1, 2))
    if program * FEATURES < features:
        gates = tl.load(alpha + group).to(tl.float32)
        total = tl.zeros((FEATURES, COLUMNS), tl.float32)
        for start in range(0, tokens, TOKENS):
            row = start + tl.arange(0, TOKENS)
            live, t = row < tokens, row.to(tl.int64)
            known = live[:, None] & (column < m)[None, :]
            d_raw = tl.load(d_logits + t[:, None] * m + column[None, :], mask=known, other=0)
            d_raw *= gates[None, :] * tl.load(inverse_rms + t, mask=live, other=0)[:, None]
            at = t[:, None] * features + f[None, :]
            x = tl.load(new + at, mask=live[:, None] & (f < features)[None, :], other=0)
            if dtype == tl.bfloat16:
                high = d_raw.to(dtype)
                total = _all_digits(tl.trans(x), high, total)
                total = _all_digits(tl.trans(x), (d_raw - high.to(tl.float32)).to(dtype), total)
            else:
                total = _all_digits(tl.trans(x), d_raw, total)
        inside = (f < features)[:, None] & (column < m)[None, :]
        tl.store(d_phi + f[:, None] * m + column[None, :], total.to(d_phi.dtype.element_ty), mask=inside)
    else:
        of_bias = tl.zeros((COLUMNS,), tl.float32)
        of_gate = tl.zeros((COLUMNS,), tl.float32)
        for start in range(0, tokens, TOKENS):
            row = start + tl.arange(0, TOKENS)
            live, t = row < tokens, row.to(tl.int64)
            known = live[:, None] & (column < m)[None, :]
            at = t[:, None] * m + column[None, :]
            d = tl.load(d_logits + at, mask=known, other=0)
            normalized = tl.load(raw + at, mask=known, other=0)
            normalized *= tl.load(inverse_rms + t, mask=live, other=0)[:, None]
            of_bias += tl.sum(d, 0)
            of_gate += tl.sum(d * normalized, 0)
        tl.store(d_bias + column, of_bias.to(d_bias.dtype.element_ty), mask=column < m)
        for g in tl.static_range(3):
            one = tl.sum(tl.where(group == g, of_gate, 0.0), 0)
            tl.store(d_alpha + g, one.to(d_alpha.dtype.element_ty))
