"""The finished epochs: which one is best, and what ended a run."""

from quick.run.history import History
from quick.run.settings import Config


def test_the_first_of_equal_epochs_is_the_best():
    epochs = [{"epoch": epoch, "test_accuracy": share} for epoch, share in ((1, 0.3), (2, 0.5), (3, 0.5))]
    assert History(epochs).best["epoch"] == 2


def test_the_epochs_and_the_config_tell_what_ended_a_run():
    epochs = [{"epoch": epoch, "test_accuracy": share} for epoch, share in ((1, 0.3), (2, 0.5), (3, 0.5), (4, 0.4))]
    assert History().ended_by(Config(epochs=1, patience=1)) is None
    assert History(epochs).ended_by(Config(epochs=5)) is None
    assert History(epochs).ended_by(Config(epochs=4, patience=2)) == "epochs"
    assert History(epochs).ended_by(Config(epochs=5, patience=2)) == "patience"
    assert History(epochs).ended_by(Config(epochs=5, patience=3)) is None
