"""The table of what was compiled."""

from collections.abc import Iterator, Mapping
from typing import Any

Results = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Case, implementation, target."""

HEADER = ("compiled for", "implementation", "MB", "over", "µs", "over", "GiB")
WIDTHS = (13, 15, 10, 8, 10, 8, 8)
ABSENT = "-"


def table(results: Results, over: Mapping[str, str | None]) -> str:
    """One block for every case, one line for every target and implementation, and one below for each kernel.

    Args:
        over: of each case, the implementation that the others are set against, or None for the least possible.
    """
    lines = []
    for case, ways in results.items():
        base = over[case]
        lines += ["", f"{case}: over {base or 'the least possible'}", _line(HEADER)]
        for target in dict.fromkeys(target for found in ways.values() for target in found):
            for way, found in ways.items():
                if target not in found:
                    continue
                one = found[target]
                if "error" in one:
                    lines.append(_line((target, way)) + "  " + one["error"])
                    continue
                other = ways.get(base or "", {}).get(target, {}) if base else {"bytes": one["least"]}
                lines.append(
                    _line(
                        (
                            target,
                            way,
                            f"{one['bytes'] / 1e6:.0f}",
                            _ratio(one, other, "bytes"),
                            f"{1e6 * one['seconds']:.0f}",
                            _ratio(one, other, "seconds"),
                            f"{one['memory'] / 2**30:.2f}",
                        )
                    )
                )
                lines += [f"    {text}" for text in _kernels(one["kernels"])]
    return "\n".join(lines).strip()


def _line(cells: tuple[str, ...]) -> str:
    texts = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, WIDTHS, strict=False))]
    return "".join(texts).rstrip()


def _ratio(one: Mapping[str, Any], other: Mapping[str, Any], name: str) -> str:
    return f"{one[name] / other[name]:.3f}" if other.get(name) else ABSENT


def _kernels(kernels: list[Mapping[str, Any]]) -> Iterator[str]:
    for kernel in kernels:
        if "bundles" in kernel:
            least = "at least " if kernel["unknown"] else ""
            yield (
                f"{kernel['name']}: {least}{kernel['bundles']} bundles x {kernel['turns']} turns = "
                f"{1e6 * kernel['seconds']:.0f} µs, its bytes {1e6 * kernel['seconds of bytes']:.0f} µs; "
                f"{kernel['spills']} spills a turn"
            )
        else:
            yield (
                f"{kernel['name']}: {kernel['registers']} registers, {kernel['spills']} bytes of spills, "
                f"{kernel['shared']} bytes of shared memory, {kernel['programs']} x {kernel['threads']} threads"
            )
