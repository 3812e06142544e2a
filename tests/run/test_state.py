"""What changes while training: it is counted exactly, goes on elsewhere, and is never a bad number."""

import math

import pytest
import torch
from runs import start

import datasets
import model
import train
from quick.data.batching import batch_slices
from quick.data.pictures import Batch
from quick.errors import Interrupted
from quick.nets import losses
from quick.processes import ALONE
from quick.run.config import read_config
from quick.run.history import History
from quick.run.optimizers import make_optimizer
from quick.run.settings import Config
from quick.run.state import TrainState, epoch_pictures, epoch_steps, make_state, run_steps
from quick.run.stopping import StopVote
from quick.views.tensorboard import NoBoard


def new_state(network: torch.nn.Module, config: Config, precision: torch.dtype = torch.float32) -> TrainState:
    head = model.head_keys("cifar_quick", {"image_size": 8})
    optimizer = make_optimizer(network, head, config, precision)
    return make_state(network, network, optimizer, config, precision, ALONE, labels=torch.arange(200) % 10)


# ---- counting ----


@pytest.mark.parametrize("hardest", [1.0, 0.3])
@pytest.mark.parametrize(("done", "epochs"), [(0, 1), (0, 2), (0, 5), (3, 5), (2, 7), (6, 7), (7, 7)])
def test_all_steps_are_counted(hardest, done, epochs):
    config = Config(epochs=epochs, hardest=hardest, batch_size=10)
    counts = [len(batch_slices(epoch_pictures(105, config, epoch), 10)) for epoch in range(1, epochs + 1)]
    assert [epoch_steps(105, config, epoch) for epoch in range(1, epochs + 1)] == counts
    history = History([{"step": 1000}] * done)
    assert run_steps(history, 105, config) == sum(counts[done:]) + (1000 if done else 0)


def test_the_steps_of_a_million_million_epochs_are_counted_at_once():
    assert run_steps(History(), 105, Config(epochs=10**12, hardest=0.5, batch_size=10)) == 10**12 * (11 + 6) // 2


# ---- going on ----


def test_a_state_goes_on_on_another_device():
    config = Config(momentum=0.9, batch_size=10, hardest=0.5)
    before = new_state(model.CifarQuick(image_size=8), config)
    train_set, _ = datasets.load("shapes", image_size=8, limit=200)
    stop = StopVote(ALONE, minutes=1e-9, start=0.0)  # after the first step
    with pytest.raises(Interrupted):
        train.train_epoch(before, train_set, config, NoBoard(), stop)
    state = new_state(model.CifarQuick(image_size=8).to("meta"), config)
    state.load_state_dict(before.state_dict())
    assert state.totals.confidence.is_meta and state.confidence is None and state.totals.step == state.step == 1
    assert all(buffers["momentum_buffer"].is_meta for buffers in state.optimizer.state.values())
    assert len(state.optimizer.state) == len(list(state.network.parameters()))


def test_the_scale_of_fp16_goes_on_too():
    states = [new_state(model.CifarQuick(image_size=8), Config(), torch.float16) for _ in range(2)]
    saved = states[0].state_dict()
    saved["scaler"]["scale"] = 8.0
    states[1].load_state_dict(saved)
    assert states[1].scaler.get_scale() == 8


# ---- numbers ----


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_found_again(epoch, tmp_path, monkeypatch, capsys):
    count, loss_function = [], losses.loss_function

    def failing(*inputs):
        count.append(None)
        loss = loss_function(*inputs)
        return loss * math.nan if len(count) == 20 * epoch - 7 + epoch - 1 else loss

    monkeypatch.setattr(losses, "loss_function", failing)
    assert start(tmp_path, "a") == 1
    out, err = capsys.readouterr()
    config = read_config(tmp_path / "a" / "config.toml")
    train_set, _ = datasets.load("shapes", limit=200)
    order = train_set.order(shuffle=True, seed=0, epoch=epoch)
    numbers = ", ".join(map(str, order[120:130].tolist()))
    last = tmp_path / "a" / "epoch_001.pt" if epoch == 2 else "none yet"
    assert f"the loss is nan in epoch {epoch}, step 13 (lr " in err
    assert f", training pictures number {numbers}); try a lower --lr, or --clip-grad 1" in err
    assert err.endswith(f"; last good checkpoint: {last}\n") and config.epochs == 3
    assert len(out.splitlines()) == epoch - 1
    if epoch == 2:
        assert torch.load(tmp_path / "a" / "best.pt", weights_only=True)["epoch"] == 1


def test_gradients_are_shortened():
    network, config = model.CifarQuick(classes=2, image_size=8), Config(lr=1.0, clip_grad=0.01)
    state = new_state(network, config)
    batch = Batch(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]), torch.arange(4), 4, [4])
    before = torch.nn.utils.parameters_to_vector(network.parameters()).detach().clone()
    train.train_step(state, batch, config)
    after = torch.nn.utils.parameters_to_vector(network.parameters()).detach()
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-3) and state.gradient_norm() > 0.1
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)  # as in fp16: they are unscaled first
    train.train_step(state, batch._replace(images=torch.rand(4, 3, 8, 8)), config)
    again = torch.nn.utils.parameters_to_vector(network.parameters()).detach()
    assert (again - after).norm().item() == pytest.approx(0.01, rel=1e-3)
