"""Triton kernels, each beside a form of torch of the same function; ``implementation="triton"`` asks for them."""
