"""Rows: every token once, in the same batches however many processes take them, from any position on."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhc_jax.training.config import DataConfig
from mhc_jax.training.data import Rows, evaluation_batches, find_documents, open_data, training_batches


def write(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return DataConfig(folder, length=4, held_out=0.25)


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6), length=st.integers(1, 7))
def test_rows_are_the_documents_one_behind_the_other(tmp_path_factory, lengths, length):
    folder = tmp_path_factory.mktemp("arrays")
    tokens = np.arange(sum(lengths), dtype=np.int64)
    for number, part in enumerate(np.split(tokens, np.cumsum(lengths)[:-1])):
        np.save(folder / f"{number}.npy", part.astype([np.uint8, np.int32, ">u2"][number % 3]))
    if len(tokens) <= length:
        with pytest.raises(ValueError, match=r"holds a token|fill no row"):
            Rows(find_documents(DataConfig(folder)), length, 100)
        return
    documents = find_documents(DataConfig(folder))
    rows = Rows(documents, length, 100)
    whole = np.concatenate([document.read(0, document.count) for document in documents])
    number = np.repeat(np.arange(len(documents)), [document.count for document in documents])
    assert sorted(whole) == list(tokens)
    assert len(rows) == (len(tokens) - 1) // length
    for index in range(len(rows)):
        row, piece = rows[index], slice(index * length, (index + 1) * length + 1)
        np.testing.assert_array_equal(row["tokens"], whole[piece])
        np.testing.assert_array_equal(row["segments"], number[piece] - number[piece][0])
        assert row["tokens"].dtype == row["segments"].dtype == np.int32


def test_a_batch_has_the_same_rows_for_any_number_of_processes_and_from_any_position(tmp_path):
    rows, training = open_data(write(tmp_path, a="abcdefgh" * 9, b="0123456789" * 5), 256)

    def first(count, **options):
        batches = training_batches(rows, training, 6, 1, **options)
        return [batch["tokens"].tolist() for batch in itertools.islice(batches, count)]

    whole = first(9)
    assert first(4, start=5) == whole[5:]
    parts = [first(9, process=process, processes=3) for process in range(3)]
    for batch, *pieces in zip(whole, *parts, strict=True):
        assert sorted(batch) == sorted(itertools.chain(*pieces))
    # In every epoch each row comes once, in an order of its own.
    taken = list(itertools.chain(*first(2 * training)))
    epochs = [taken[start : start + training] for start in range(0, 3 * training, training)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(rows[i]["tokens"].tolist() for i in range(training))
    assert epochs[0] != epochs[1]


def test_what_is_held_out_is_not_learned(tmp_path):
    rows, training = open_data(write(tmp_path, a="".join(map(chr, range(33, 120)))), 256)
    assert training == 16
    assert len(rows) == 21
    learned = {tuple(row) for b in itertools.islice(training_batches(rows, training, 4, 0), 20) for row in b["tokens"]}
    parts = [evaluation_batches(rows, training, 2, 9, process=process, processes=2) for process in range(2)]
    held_out = {tuple(row) for part in parts for batch in part for row in batch["tokens"]}
    assert [len(part) for part in parts] == [2, 2]
    assert not learned & held_out
    (few,) = evaluation_batches(rows, training, 8, 9)
    assert few["tokens"].shape == (8, 5)
    assert evaluation_batches(rows, training, 2, 0) == []


def test_the_standard_library_is_there():
    rows, training = open_data(DataConfig(), 256)
    assert rows.tokens > 2_000_000
    assert 0.9 < training / len(rows) < 1
    assert not any("site-packages" in document.path.parts for document in rows.documents)


def test_hidden_files_are_passed_over_and_one_file_is_enough(tmp_path):
    write(tmp_path, a="text " * 9)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "object").write_bytes(b"\xff\xfe")
    assert [document.path.name for document in find_documents(DataConfig(tmp_path))] == ["a.txt"]
    assert find_documents(DataConfig(tmp_path / "a.txt"))[0].count == 45


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no file in .* holds a token"),
        (lambda folder: (folder / "a").write_text(""), "no file in .* holds a token"),
        (lambda folder: (folder / "a").write_bytes(b"\xff\xfe\xfd" * 9), "a is no text in UTF-8"),
        (lambda folder: (folder / "a").write_bytes(b"a\0b" * 9), "it has a byte 0"),
        (lambda folder: (folder / "a").write_text("abc"), "3 tokens fill no row of data.length=4"),
        (lambda folder: (folder / "a").write_text("abcdef"), "all of 1 rows are held out"),
        (lambda folder: np.save(folder / "a.npy", np.ones((2, 9), int)), "one axis of integers, got int64.2, 9"),
        (lambda folder: np.save(folder / "a.npy", np.ones(9)), "one axis of integers, got float64"),
        (lambda folder: (folder / "a.npy").write_text("abc"), "a.npy is no NumPy array"),
        (lambda folder: np.save(folder / "a.npy", np.full(99, 256)), "token 256 in .*a.npy is not in the vocabulary"),
        (lambda folder: np.save(folder / "a.npy", np.full(99, -1)), "token -1 in"),
        (lambda folder: [np.save(folder / "a.npy", np.ones(9, int)), (folder / "b").write_text("b")], "are mixed"),
    ],
)
def test_data_that_are_none_are_refused(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_data(DataConfig(tmp_path, length=4), 256)


def test_missing_data_and_small_vocabularies_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data.path: there is no file or folder .*none"):
        open_data(DataConfig(tmp_path / "none"), 256)
    with pytest.raises(ValueError, match="vocabulary must be 256 at least, for bytes; got 100"):
        open_data(write(tmp_path, a="text " * 9), 100)


def test_a_file_that_shrinks_is_noticed(tmp_path):
    rows, _ = open_data(write(tmp_path, a="text " * 9), 256)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"a\.txt or a file after it is shorter than it was"):
        rows[2]
