"""python -m mhc_torch.native: compile the nodes of a tape, and print where they are."""

from mhc_torch.native import build

try:
    print(build())
except RuntimeError as error:
    raise SystemExit(f"{error}\nmhc_torch works without it; a stack takes longer on a CPU.") from None
