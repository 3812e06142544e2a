"""The words of errors: what strangers wrote steers no terminal, and names that are nearly right are guessed."""

import pytest

from quick.errors import CallError, Problem, printable, reason, suggestion


@pytest.mark.parametrize("character", ["\x1b", "\x7f", "\x9b", "\u2028", "\u202e"])
def test_what_could_steer_a_terminal_is_escaped(character):
    assert printable(f"a{character}猫").isprintable() and printable("a 猫") == "a 猫"
    assert str(Problem(f"a{character}")).isprintable()


def test_a_wrong_call_has_a_status_of_its_own():
    assert (Problem("x").status, CallError("x").status) == (1, 2)


def test_errors_say_something_in_one_short_line():
    assert reason(ValueError("a\n  b")) == "a b"
    assert reason(ValueError("x" * 1000), 100) == "x" * 100
    assert reason(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_the_nearest_name_is_suggested_or_none():
    assert suggestion("resnet81", ["vgg16", "resnet18"]) == "; did you mean resnet18?"
    assert suggestion("x", ["vgg16", "resnet18"]) == ""
