"""The record keeps what the same compilers made before."""

from benchmarks.accelerators.__main__ import merged

NOW = {"c": {"xla": {"v5e": {"bytes": 1}}}}


def test_a_part_is_put_beside_what_was_recorded():
    before = merged(
        {}, {"jax": "1", "libtpu": "2"}, {"c": None}, {"c": {"xla": {"v5p": {"bytes": 7}, "v5e": {"bytes": 8}}}}
    )
    after = merged(before, {"jax": "1"}, {"c": None}, NOW)
    assert after["compiled for"] == {"c": {"xla": {"v5p": {"bytes": 7}, "v5e": {"bytes": 1}}}}
    assert after["versions"] == {"jax": "1", "libtpu": "2"}


def test_what_other_compilers_made_is_left_out():
    before = merged({}, {"jax": "0"}, {"d": None}, {"d": {"xla": {"v5p": {"bytes": 7}}}})
    after = merged(before, {"jax": "1"}, {"c": "xla"}, NOW)
    assert (after["compiled for"], after["over"]) == (NOW, {"c": "xla"})
