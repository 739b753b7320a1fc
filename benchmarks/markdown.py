"""Tables of Markdown."""

from collections.abc import Iterable, Sequence

ABSENT = "—"
"""A cell of what was not measured."""

NOT_RECORDED = "Not recorded yet.\n"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
