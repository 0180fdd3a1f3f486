import pytest
import torch

from foveate.tasks.byte_text import ByteText, needle_bytes

TEXT = "".join(f"Line {i} of a text without numbers of four digits.\n" for i in range(200))


def said(row):
    return bytes(row.tolist()).decode()


def test_the_target_of_a_byte_is_the_next_one():
    text = ByteText.of(TEXT, held_out=1000)
    batch = text.batch(16, seed=0, length=50)
    assert batch.mask.all()
    for row, target in zip(batch.inputs, batch.targets, strict=True):
        assert torch.equal(row[1:], target[:-1])
        assert said(row) + said(target[-1:]) in TEXT


def test_no_training_row_is_from_what_is_held_out():
    text = ByteText.of("a" * 300 + "b" * 300, held_out=300)
    batch = text.batch(200, seed=0, length=20)
    assert set(said(batch.inputs.flatten())) == {"b"}
    test = text.test(length=29)
    assert test.inputs.shape == (10, 29) and set(said(test.inputs.flatten())) == {"a"}
    assert text.test(length=29, limit=3).inputs.shape == (3, 29)


@pytest.mark.parametrize("depth", [None, 0.0, 0.5, 1.0])
def test_the_needle_is_said_once_and_asked_at_the_end(depth):
    text = ByteText.of(TEXT, held_out=1000)
    batch = needle_bytes(text, 40, seed=1, length=128, depth=depth)
    starts = []
    for row, target, mask in zip(*batch, strict=True):
        code, line = said(target[mask]), said(row)
        assert len(code) == 4 and code.isdigit()
        assert line.count(f" The code is {code}. ") == 1
        assert line.endswith(f" The code is {code[:-1]}")
        assert mask.tolist() == [False] * 124 + [True] * 4
        starts.append(line.index(" The code is"))
    wanted = {None: None, 0.0: {0}, 1.0: {128 - 16 - 19}}
    if depth in (0.0, 1.0):
        assert set(starts) == wanted[depth]
    elif depth is None:
        assert len(set(starts)) > 20


def test_seeds_reproduce():
    text = ByteText.of(TEXT, held_out=100)
    one, two, other = (needle_bytes(text, 4, seed=s).inputs for s in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(text.batch(4, seed=1).inputs, text.batch(4, seed=1).inputs)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="more than the 65536 bytes that are held out, got 5"):
        ByteText.of("short")
    text = ByteText.of(TEXT, held_out=100)
    for call, message in (
        (lambda: text.batch(1, seed=0, length=20_000), "length must be below the"),
        (lambda: text.test(length=100), "rows must be at least 1"),
        (lambda: needle_bytes(text, 1, seed=0, length=30), "length must be at least 35, got 30"),
        (lambda: needle_bytes(text, 1, seed=0, depth=1.5), r"depth must be in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
