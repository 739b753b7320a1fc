"""python -m mhc_torch.native: compile the nodes of a tape, and print where they are."""

from mhc_torch.native import build

try:
    print(build())
except RuntimeError as error:
    # In one line, since it stands among much else.
    cost = "stacks of mhc_torch work without it, and take up to a quarter longer on a CPU"
    raise SystemExit(f"{' '.join(str(error).split())}; {cost}") from None
