"""The private names of other libraries that a file leans on."""

import ast
import re
from collections.abc import Collection, Iterator
from pathlib import Path

_NOTHING = re.compile(r"(?!)")


def private_names(file: Path, libraries: Collection[str], of_objects: re.Pattern[str] = _NOTHING) -> Iterator[str]:
    """Dotted private names below `libraries`, as the file calls them, and private modules and names that it imports.

    Args:
        of_objects: further attributes that are private of a library's objects, whatever the object is called; also
            as text, as in `getattr`.
    """
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute):
            parts = ast.unparse(node).split(".")
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Constant):
            parts = [str(node.value)]
        else:
            continue
        theirs = parts[0] in libraries and any(re.fullmatch(r"_[A-Za-z]\w*", part) for part in parts)
        if theirs or of_objects.fullmatch(parts[-1]):
            yield f"{file.name}:{node.lineno}: {'.'.join(parts)}"
