"""What a connection is worth for learning: decoders on real text, connected in every way the library knows.

    python -m benchmarks.quality                            # runs what is not recorded yet, in order
    python -m benchmarks.quality --report                   # pages and figures again, from the record
    python -m benchmarks.quality --check --arm mHC --seed 0 # trains one recorded run again: the same numbers?

The protocol is in docs/quality.md and, as numbers, in `protocol`.
"""
