"""The words of errors: what strangers wrote steers no terminal, and names that are nearly right are guessed."""

import numpy as np
import pytest
import torch

from quick.errors import CallError, Problem, out_of_memory, padded, printable, reason, suggestion, terminal_width


@pytest.mark.parametrize("character", ["\x1b", "\x7f", "\x9b", "\n", "\u2028", "\u202e", "\u2066", "\udce9"])
def test_what_could_steer_a_terminal_is_escaped(character):
    assert printable(f"a{character}猫").isprintable() and printable("a 猫") == "a 猫"
    assert str(Problem(f"a{character}")).isprintable()


@pytest.mark.parametrize(
    "name",
    ["می\u200cرود", "क्\u200dष", "\U0001f468\u200d\U0001f469", "1.23\u202fPM", "black\u00a0cat", "e\u0301", "Ωmega"],
)
def test_names_in_any_script_stay_as_they_are(name):
    assert printable(name) == name and str(Problem(name)) == name


def test_a_wrong_call_has_a_status_of_its_own():
    assert (Problem("x").status, CallError("x").status) == (1, 2)


def test_errors_say_something_in_one_short_line():
    assert reason(ValueError("a\n  b")) == "a b"
    assert reason(ValueError("x" * 1000), 100) == "x" * 100
    assert reason(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_the_nearest_name_is_suggested_or_none():
    assert suggestion("resnet81", ["vgg16", "resnet18"]) == "; did you mean resnet18?"
    assert suggestion("x", ["vgg16", "resnet18"]) == ""


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (np.exceptions.AxisError("x"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB). Tried to allocate 2 GB"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("could not create a memory object"), True),  # oneDNN
        (RuntimeError("dataloader's workers are out of shared memory"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_ran_out(error, is_one):
    assert out_of_memory(error) == is_one


def test_numpy_and_pytorch_say_that_memory_ran_out():
    for allocate in (lambda: np.ones(2**55), lambda: torch.ones(2**55), lambda: bytearray(2**60)):
        with pytest.raises((MemoryError, RuntimeError)) as caught:
            allocate()
        assert out_of_memory(caught.value)


def test_a_table_knows_how_wide_a_terminal_shows_its_names():
    assert [terminal_width(text) for text in ("abc", "猫", "狗狗 1", "é", "e\u0301", "한국", "เสือ")] == [
        3,
        2,
        6,
        1,
        1,
        4,
        3,
    ]
    assert [padded(text, 4) for text in ("ab", "猫", "狗狗")] == ["ab  ", "猫  ", "狗狗"]
