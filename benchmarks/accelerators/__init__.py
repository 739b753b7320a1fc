"""The lab: what the compilers of TPUs and GPUs make of this library, on a machine that has none of them.

Whatever it finds was compiled for a target, and measured on none.
"""
