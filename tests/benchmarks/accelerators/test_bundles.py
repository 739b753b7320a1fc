"""Schedules of TPU kernels, in the form in which libtpu 0.0.42 writes them."""

import pytest

from benchmarks.accelerators.bundles import schedule

TEST = "%p1 = scmp.ge.s32.totalorder %s1, {} /* loop exit test */"


def bundles(count: int, depth: int, label: str = "", holds: str = "") -> list[str]:
    marks = ">" * depth + (" " if depth else "")
    lines = [f"  0x{i:x}   : {marks}{{ %v{i} = vadd.f32 %v1, %v2 }}" for i in range(count)]
    lines[0] = f"  0xa {label}: {marks}{{ {holds} }}"
    return lines


def text(*parts: list[str]) -> str:
    return "\n".join(["LH: loop header", "= control target key end", "", *(line for part in parts for line in part)])


def test_a_loop_counts_as_often_as_it_runs():
    one = text(bundles(3, 0), bundles(10, 1, "LB", TEST.format(130)), bundles(2, 0))
    found = schedule(one)
    assert (found.turns, found.bundles, found.total, found.unknown) == (130, 10, 3 + 130 * 10 + 2, 0)


def test_loops_inside_count_for_every_turn():
    inner = [bundles(5, 2, "LB", TEST.format(4)), bundles(7, 2, "LB", TEST.format(3))]
    found = schedule(text(bundles(3, 0), bundles(2, 1, "LB"), *inner, bundles(1, 1, holds=TEST.format(10))))
    assert found.bundles == 2 + 5 * 4 + 7 * 3 + 1
    assert found.total == 3 + 10 * found.bundles


@pytest.mark.parametrize(("by", "trips"), [(1, 16), (4, 4), (5, 4)])
def test_a_loop_that_is_unrolled_counts_by_several(by, trips):
    counted = f"%s1 = sadd.s32 {by}, %s2 /* copy for cssa */  ;;  {TEST.format(16)}"
    found = schedule(text(bundles(2, 1, "LB", TEST.format(10)), bundles(3, 2, "LB", counted), bundles(1, 1)))
    assert (found.bundles, found.unknown) == (3 + 3 * trips, 0)


def test_a_bundle_that_was_moved_into_a_loop_does_not_end_it():
    found = schedule(text(bundles(4, 1, "LB"), bundles(1, 0), bundles(5, 1, holds=TEST.format(6))))
    assert (found.turns, found.bundles, found.total) == (6, 10, 60)


def test_a_loop_of_unknown_length_is_told():
    found = schedule(text(bundles(2, 1, "LB", TEST.format(10)), bundles(3, 2, "LB"), bundles(1, 1)))
    assert (found.unknown, found.bundles) == (1, 6)


def test_spills_of_a_turn():
    spill = "%101 = vst [vmem:[#allocation5_spill] sm:$0xff] /*vst_source=*/%v3"
    store = "%102 = vst [vmem:[%s4] sm:$0xff] /*vst_source=*/%v3"
    inner = bundles(2, 2, "LB", f"{spill}  ;;  {TEST.format(4)}")
    found = schedule(text(bundles(1, 1, "LB", store), inner, bundles(1, 1, holds=f"{spill} ;; {TEST.format(9)}")))
    assert found.spills == 4 + 1


def test_a_text_without_bundles_is_refused():
    with pytest.raises(ValueError, match="text must be a schedule of final bundles, got 'Schedule analysis:'"):
        schedule("Schedule analysis:")
