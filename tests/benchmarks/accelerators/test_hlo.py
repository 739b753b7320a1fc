"""Bytes and operations of programs whose traffic is known by hand: compiled for the CPU, and as a TPU writes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.accelerators.hlo import Module, arrays

KILO = 1024


def compiled(function, *shapes, **options) -> Module:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return Module(jax.jit(function, **options).lower(*arguments).compile().as_text(), on_chip=False)


def test_a_copy_reads_and_writes_once():
    assert compiled(lambda x: x[::-1], (KILO, KILO)).bytes == 2 * 4 * KILO**2


def test_an_addition_reads_two_and_writes_one():
    assert compiled(lambda x, y: x + y, (KILO, KILO), (KILO, KILO)).bytes == 3 * 4 * KILO**2


def test_what_is_fused_is_not_written_in_between():
    assert compiled(lambda x: jnp.sin(jnp.exp(x) + 1), (KILO, KILO)).bytes == 2 * 4 * KILO**2


def test_a_scan_that_updates_in_place_moves_slices_only():
    depth, width = 16, 64 * KILO

    def states(x):
        return jax.lax.scan(lambda x, _: (x * 2, x), x, length=depth)[1]

    # Once, the empty slots are written. In every turn the state is read and doubled, and read and written into its
    # slot; a CPU also copies it first. Were all that is kept written in every turn, it would be 16 times as much.
    assert depth * 5 <= compiled(states, (width,)).bytes / (4 * width) <= depth * 7 + 3


def test_a_scan_that_reads_slices_reads_each_once():
    depth, width = 16, 64 * KILO

    def total(rows):
        return jax.lax.scan(lambda sum, row: (sum + row, None), jnp.zeros(width), rows)[0]

    moved = compiled(total, (depth, width)).bytes
    assert depth * 3 * 4 * width <= moved <= depth * 3.5 * 4 * width


def test_operations_of_a_loop_of_products():
    def power(x):
        return jax.lax.fori_loop(0, 10, lambda _, y: x @ y, x)

    module = compiled(power, (256, 256))
    assert sum(c.times * c.flops for c in module.crossings) == 10 * 2 * 256**3
    assert not module.unknown_loops


def test_a_loop_of_unknown_length_is_named():
    def until(x):
        return jax.lax.while_loop(lambda x: x.sum() < 7, lambda x: x * 2, x)

    assert len(compiled(until, (256, 256)).unknown_loops) == 1


def test_the_largest_branch_counts():
    def either(flag, x):
        return jax.lax.cond(flag.sum() > 0, lambda x: jnp.sort(x[::-1]), lambda x: x, x)

    assert compiled(either, (1,), (KILO,)).bytes >= 4 * 4 * KILO


# As libtpu 0.0.42 writes it: tiles, memory on the chip (S(1)), copies that are started and waited for, loops without a
# count, products as convolutions.
TPU = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(bf16[16,128]{1,0:T(8,128)(2,1)})->f32[]}

FileNames
1 "f.py"

%keep (tape: bf16[4,16,128], index: s32[], state: bf16[16,128]) -> bf16[4,16,128] {
  %tape = bf16[4,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %state = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(2)
  %row = bf16[1,16,128]{2,1,0:T(8,128)(2,1)} bitcast(%state)
  %index = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %put = bf16[4,16,128]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%tape, %row, %index, %zero, %zero)
}

%body (carry: (s32[], bf16[4,16,128], bf16[16,128])) -> (s32[], bf16[4,16,128], bf16[16,128]) {
  %carry = (s32[]{:T(128)}, bf16[4,16,128]{2,1,0:T(8,128)(2,1)}, /*index=2*/bf16[16,128]{1,0:T(8,128)(2,1)}) \
parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %kept = bf16[4,16,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=1
  %x = bf16[16,128]{1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=2
  %fusion = bf16[4,16,128]{2,1,0:T(8,128)(2,1)} fusion(%kept, %i, %x), kind=kLoop, calls=%keep
  ROOT %out = (s32[]{:T(128)}, bf16[4,16,128]{2,1,0:T(8,128)(2,1)}, bf16[16,128]{1,0:T(8,128)(2,1)}) \
tuple(%i, %fusion, %x)
}

%condition (carry.1: (s32[], bf16[4,16,128], bf16[16,128])) -> pred[] {
  %carry.1 = (s32[]{:T(128)}, bf16[4,16,128]{2,1,0:T(8,128)(2,1)}, bf16[16,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  %length = s32[]{:T(128)} constant(4)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %length), direction=LT
}

ENTRY %main (a: bf16[16,128], few: f32[16,3]) -> bf16[16,16] {
  %a = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="a"}
  %few = f32[16,3]{1,0:T(8,128)} parameter(1)
  %zero.1 = s32[]{:T(128)} constant(0)
  %empty = bf16[4,16,128]{2,1,0:T(8,128)(2,1)} custom-call(), custom_call_target="AllocateBuffer"
  %start = (s32[]{:T(128)}, bf16[4,16,128]{2,1,0:T(8,128)(2,1)}, bf16[16,128]{1,0:T(8,128)(2,1)}) \
tuple(%zero.1, %empty, %a)
  %loop = (s32[]{:T(128)}, bf16[4,16,128]{2,1,0:T(8,128)(2,1)}, bf16[16,128]{1,0:T(8,128)(2,1)}) while(%start), \
condition=%condition, body=%body
  %fetch = (bf16[16,128]{1,0:T(8,128)(2,1)S(1)}, bf16[16,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%a)
  %near = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%fetch)
  %padded = f32[16,3]{1,0:T(8,128)} negate(%few)
  ROOT %product = bf16[16,16]{1,0:T(8,128)(2,1)} convolution(%near, %near), dim_labels=bf_oi->bf
}
"""


def test_a_program_for_tpu():
    found = {c.instruction.name: c for c in Module(TPU, on_chip=True).crossings}
    state = 16 * 128 * 2
    scalar = 4
    # Read the state, write its slot; the index is a word. Four turns, which the condition tells.
    assert (found["fusion"].times, found["fusion"].bytes) == (4, 2 * state + scalar)
    # The copy to the chip is read; nothing on the chip counts.
    assert found["fetch"].bytes == state
    # A result of 16 columns fills tiles of 128.
    assert found["product"].bytes == 16 * 128 * 2
    assert found["product"].flops == 2 * 16 * 16 * 128
    assert found["padded"].bytes == 2 * 16 * 128 * 4
    assert "empty" not in found


# As libtpu writes it for TPU7x: another name for the tape with other tiles, and a call that the SparseCore works on.
TPU7X = """%retile (in: bf16[4,16,128]) -> bf16[4,16,128] {
  %in = bf16[4,16,128]{2,1,0:T(16,128)(2,1)} parameter(0)
  ROOT %copied = bf16[4,16,128]{2,1,0:T(8,128)(2,1)} copy(%in)
}

%keep (tape: bf16[4,16,128], rows: bf16[4,16,128], index: s32[]) -> bf16[4,16,128] {
  %tape = bf16[4,16,128]{2,1,0:T(16,128)(2,1)} parameter(0)
  %renamed = bf16[4,16,128]{2,1,0:T(8,128)(2,1)} fusion(%tape), kind=kLoop, \
output_to_operand_aliasing={{}: (0, {})}, calls=%retile
  %rows = bf16[4,16,128]{2,1,0:T(16,128)(2,1)} parameter(1)
  %others = bf16[4,16,128]{2,1,0:T(8,128)(2,1)} fusion(%rows), kind=kLoop, \
output_to_operand_aliasing={{}: (0, {})}, calls=%retile
  %index = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = bf16[1,16,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%others, %index, %zero, %zero)
  ROOT %put = bf16[4,16,128]{2,1,0:T(16,128)(2,1)} dynamic-update-slice(%renamed, %row, %index, %zero, %zero)
}

ENTRY %main (tape.1: bf16[4,16,128], rows.1: bf16[4,16,128], i: s32[]) -> bf16[4,16,128] {
  %tape.1 = bf16[4,16,128]{2,1,0:T(16,128)(2,1)} parameter(0)
  %rows.1 = bf16[4,16,128]{2,1,0:T(16,128)(2,1)} parameter(1)
  %i = s32[]{:S(6)} parameter(2)
  %fusion = bf16[4,16,128]{2,1,0:T(16,128)(2,1)} fusion(%tape.1, %rows.1, %i), kind=kLoop, calls=%keep
  %call = ((bf16[4,16,128]{2,1,0:T(16,128)(2,1)}, token[]), bf16[4,16,128]{1,2,0:T(16,128)(2,1)}) call-start(%fusion)
  ROOT %done = bf16[4,16,128]{1,2,0:T(16,128)(2,1)} call-done(%call)
}
"""


def test_another_name_for_a_tape_moves_nothing():
    found = {c.instruction.name: c.bytes for c in Module(TPU7X, on_chip=True).crossings}
    # Transposed, 16 features fill a tile of 128.
    assert found == {"fusion": 2 * 16 * 128 * 2, "call": 4 * (16 + 128) * 128 * 2}


# A sum of many arrays at once is a tuple inside of the tuple that a fusion returns, as a GPU gets it.
NESTED = """%added (a: f32[], b: f32[], c: f32[], d: f32[]) -> (f32[], f32[]) {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  %c = f32[] parameter(2)
  %d = f32[] parameter(3)
  %one = f32[] add(%a, %c)
  %two = f32[] add(%b, %d)
  ROOT %both = (f32[], f32[]) tuple(%one, %two)
}

%sums (x: f32[256,512], y: f32[256,512]) -> ((f32[256], f32[256]), f32[256,512]) {
  %x = f32[256,512]{1,0} parameter(0)
  %y = f32[256,512]{1,0} parameter(1)
  %zero = f32[] constant(0)
  %many = (f32[256]{0}, f32[256]{0}) reduce(%x, %y, %zero, %zero), dimensions={1}, to_apply=%added
  %product = f32[256,512]{1,0} multiply(%x, %y)
  ROOT %all = ((f32[256]{0}, f32[256]{0}), f32[256,512]{1,0}) tuple(%many, %product)
}

ENTRY %main (p: f32[256,512], q: f32[256,512]) -> ((f32[256], f32[256]), f32[256,512]) {
  %p = f32[256,512]{1,0} parameter(0)
  %q = f32[256,512]{1,0} parameter(1)
  ROOT %fusion = ((f32[256]{0}, f32[256]{0}), f32[256,512]{1,0}) fusion(%p, %q), kind=kInput, calls=%sums
}
"""


def test_a_tuple_inside_of_a_tuple_counts_all_its_arrays():
    assert [array.dims for array in arrays("((f32[2]{0}, bf16[3]{0}), (s32[]))")] == [(2,), (3,), ()]
    (fusion,) = Module(NESTED, on_chip=False).crossings
    assert fusion.bytes == (3 * 256 * 512 + 2 * 256) * 4


def test_without_memory_on_the_chip_everything_counts():
    found = {c.instruction.name: c for c in Module(TPU, on_chip=False).crossings}
    assert found["fetch"].bytes == 2 * 16 * 128 * 2


def test_a_batch_of_products_on_a_tpu_counts_one_position():
    text = """ENTRY %main (a: bf16[4,8,16], b: bf16[4,16,32]) -> bf16[4,8,32] {
  %a = bf16[4,8,16]{2,1,0} parameter(0)
  %b = bf16[4,16,32]{2,1,0} parameter(1)
  ROOT %c = bf16[4,8,32]{2,1,0} convolution(%a, %b), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf
}"""
    (crossing,) = Module(text, on_chip=True).crossings
    assert crossing.flops == 2 * 4 * 8 * 16 * 32


@pytest.mark.parametrize(
    ("text", "bytes"),
    [
        ("f32[4096,4,4]{0,2,1:T(4,128)}", 4096 * 16 * 4),
        ("f32[4096,20]{1,0:T(8,128)}", 4096 * 128 * 4),
        ("bf16[5,3,100]{2,1,0:T(8,128)(2,1)}", 5 * 8 * 128 * 2),
        ("f32[2000]{0:T(1024)}", 2048 * 4),
        ("pred[7]{0}", 7),
        ("s4[7]{0}", 4),
        ("f32[]", 4),
        ("token[]", 0),
    ],
)
def test_an_array_counts_as_it_lies_in_memory(text, bytes):
    (array,) = arrays(text)
    assert array.bytes() == bytes
    assert array.bytes(padded=False) == np.ceil(np.prod(array.dims) * array.itemsize)


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="text must be HLO with an ENTRY computation, got 'nothing'"):
        Module("nothing", on_chip=False)
