"""Rows of tokens from texts and token arrays: packed, shuffled, split over processes, from any position on.

All documents lie one behind the other, in an order that does not change, and a row is a piece of that; so every row is
full, and found without reading another. Of the rows, grain takes one batch after the other.
"""

import codecs
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from mhc_jax.training.config import DataConfig

try:
    import grain
except ImportError as error:
    raise ImportError("the training program needs grain: pip install 'mhc-jax[train]'") from error

BYTES = 256
# So much of a text is looked at to see whether it is one.
_LOOK = 2**16


@dataclass(frozen=True)
class Document:
    """Tokens in a file: `count` of them from the byte `offset` on."""

    path: Path
    count: int
    dtype: np.dtype
    offset: int = 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1."""
        return np.fromfile(self.path, self.dtype, stop - start, offset=self.offset + start * self.dtype.itemsize)


class Rows:
    """Pieces of the documents, one behind the other: row i begins with the last token of row i - 1.

    Args:
        documents: in the order in which they lie.
        length: T; a row has one token more, which is a target only.
        vocabulary: number of tokens.

    Raises:
        ValueError: the documents fill no row; as a row is read, a token is not below `vocabulary`.
    """

    def __init__(self, documents: list[Document], length: int, vocabulary: int) -> None:
        self.documents, self.length, self.vocabulary = documents, length, vocabulary
        self.ends = np.cumsum([document.count for document in documents])
        if not len(self):
            raise ValueError(f"data.path: {self.tokens} tokens fill no row of data.length={length} and one more")

    @property
    def tokens(self) -> int:
        """How many there are."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def __len__(self) -> int:
        return max(self.tokens - 1, 0) // self.length

    def __getitem__(self, index: int) -> dict[str, Int[np.ndarray, " tokens"]]:
        """Its tokens, and for each the number of its document in this row."""
        start, stop = index * self.length, (index + 1) * self.length + 1
        first = int(np.searchsorted(self.ends, start, side="right"))
        pieces = []
        for number in range(first, int(np.searchsorted(self.ends, stop, side="left")) + 1):
            begin = int(self.ends[number]) - self.documents[number].count
            piece = self.documents[number].read(max(start - begin, 0), min(stop, int(self.ends[number])) - begin)
            if len(piece) and not 0 <= piece.min() <= piece.max() < self.vocabulary:
                bad = piece.min() if piece.min() < 0 else piece.max()
                where = self.documents[number].path
                raise ValueError(f"data.path: token {bad} in {where} is not in the vocabulary 0..{self.vocabulary - 1}")
            pieces.append(piece.astype(np.int32))
        tokens = np.concatenate(pieces)
        if len(tokens) != self.length + 1:
            raise ValueError(f"data.path: {self.documents[first].path} or a file after it is shorter than it was")
        segments = np.repeat(np.arange(len(pieces), dtype=np.int32), [len(piece) for piece in pieces])
        return {"tokens": tokens, "segments": segments}


class _Range:
    """Rows first..last-1 of others."""

    def __init__(self, rows: Rows, first: int, last: int) -> None:
        self.rows, self.first, self.last = rows, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.rows[self.first + index]


def open_data(config: DataConfig, vocabulary: int) -> tuple[Rows, int]:
    """All rows, and how many of them are for training; the others, at the end, are for evaluation.

    Raises:
        FileNotFoundError: there is nothing at `config.path`.
        ValueError: no file there matches, a file is no text or token array, texts are mixed with token arrays, there
            are too few tokens or too small a vocabulary.

    Example:
        >>> from mhc_jax.training.config import DataConfig
        >>> rows, training = open_data(DataConfig(length=16, held_out=0.25), 256)
        >>> training == round(0.75 * len(rows)), bytes(rows[0]["tokens"].astype("uint8").tolist()).isascii()
        (True, True)
    """
    documents = find_documents(config)
    if all(document.path.suffix != ".npy" for document in documents) and vocabulary < BYTES:
        raise ValueError(f"model.sizes.vocabulary must be {BYTES} at least, for bytes; got {vocabulary}")
    rows = Rows(documents, config.length, vocabulary)
    held_out = max(round(len(rows) * config.held_out), 1) if config.held_out else 0
    if held_out >= len(rows):
        raise ValueError(f"data.path: all of {len(rows)} rows are held out; take a shorter data.length or more data")
    rows[0]
    return rows, len(rows) - held_out


def training_batches(
    rows: Rows, training: int, batch: int, seed: int, *, start: int = 0, process: int = 0, processes: int = 1
) -> Iterator[dict[str, Int[np.ndarray, "rows tokens"]]]:
    """Batches of the first `training` rows without end, in a new order in each epoch.

    Args:
        batch: rows of a batch, of all processes together.
        start: batches that were taken before: the position in the data.
        process, processes: which of how many processes this is. Batch i has the same rows however many there are.
    """
    source = grain.MapDataset.source(_Range(rows, 0, training)).shuffle(seed=seed).repeat()
    own = source[start * batch + process :: processes]
    return iter(
        own.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)).batch(batch // processes)
    )


def evaluation_batches(
    rows: Rows, training: int, batch: int, count: int, *, process: int = 0, processes: int = 1
) -> list[dict[str, Int[np.ndarray, "rows tokens"]]]:
    """Up to `count` batches of the rows that are held out; of few rows one batch, in which they return."""
    held_out = len(rows) - training
    found = []
    for number in range(min(count, max(held_out // batch, 1))):
        own = [training + (number * batch + i) % held_out for i in range(process, batch, processes)]
        picked = [rows[index] for index in own]
        found.append({name: np.stack([row[name] for row in picked]) for name in picked[0]})
    return found


def find_documents(config: DataConfig) -> list[Document]:
    """The documents at `config.path`, in an order that depends on their names and not on the alphabet.

    Raises:
        FileNotFoundError, ValueError: as `open_data`.
    """
    if config.path is None:
        paths = _standard_library()
    elif config.path.is_file():
        paths = [config.path]
    elif config.path.is_dir():
        paths = [path for path in config.path.glob(config.pattern) if path.is_file() and not _hidden(path, config.path)]
    else:
        raise FileNotFoundError(f"data.path: there is no file or folder {config.path}")
    arrays = [path for path in paths if path.suffix == ".npy"]
    if arrays and len(arrays) < len(paths):
        other = min(set(paths) - set(arrays))
        raise ValueError(f"data.path: token arrays and texts are mixed, {arrays[0]} and {other}; give data.pattern")
    documents = [_array(path) if arrays else _text(path) for path in sorted(paths)]
    documents = [document for document in documents if document.count]
    if not documents:
        raise ValueError(f"data.path: no file in {config.path} that matches {config.pattern!r} holds a token")
    return [documents[i] for i in np.random.default_rng(0).permutation(len(documents))]


def _standard_library() -> list[Path]:
    """The modules of Python's own library, without their tests."""
    folder = Path(os.__file__).parent
    paths = [path for name in sys.stdlib_module_names for path in (folder / name).glob("**/*.py")]
    paths += [path for name in sys.stdlib_module_names if (path := folder / f"{name}.py").is_file()]
    return [path for path in paths if not {"test", "tests", "idle_test"} & set(path.parts)]


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _text(path: Path) -> Document:
    with path.open("rb") as file:
        begin = file.read(_LOOK)
    try:
        # A character may be cut in two where the look ends.
        codecs.getincrementaldecoder("utf-8")().decode(begin, final=len(begin) < _LOOK)
        if b"\0" in begin:
            raise ValueError("it has a byte 0")
    except ValueError as error:
        raise ValueError(f"data.path: {path} is no text in UTF-8 ({error}); give data.pattern") from error
    return Document(path, path.stat().st_size, np.dtype(np.uint8))


def _array(path: Path) -> Document:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise ValueError(f"data.path: {path} is no NumPy array ({error})") from error
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"data.path: {path} must have one axis of integers, got {array.dtype}{list(array.shape)}")
    return Document(path, array.size, array.dtype, array.offset)
