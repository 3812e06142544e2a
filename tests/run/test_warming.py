"""What is computed before the first epoch, so that a GPU knows every size of batch by then."""

import pytest
import torch
from samples import a_state

import model
from quick.data.pictures import Pictures
from quick.data.stores import InMemory
from quick.processes import ALONE
from quick.run.stopping import StopVote
from quick.run.warming import warm_up
from quick.views.tensorboard import NoBoard
from train import parse_train, train_epoch


@pytest.mark.parametrize(
    "flags",
    [
        ["--batch-size", "64"],
        ["--batch-size", "50", "--hardest", "0.3", "--accumulate", "3", "--optimizer", "muon"],
    ],
)
def test_all_sizes_are_known_before_the_first_epoch_and_nothing_else_changes(flags):
    config, _, _ = parse_train(["--lr", "0.1", "--epochs", "2", *flags])
    torch.manual_seed(0)
    network = model.create("cifar_quick", {"classes": 2, "image_size": 8})
    images = torch.randint(256, (190, 3, 8, 8), dtype=torch.uint8)
    pictures = Pictures(InMemory(images), torch.arange(190) % 2, ["cat", "dog"], "train")
    head = model.head_keys("cifar_quick", {"classes": 2, "image_size": 8})
    state = a_state(network, config, head, 6, pictures.labels)
    before = {name: values.clone() for name, values in network.state_dict().items()}

    seen = []
    network.register_forward_pre_hook(lambda network, inputs: seen.append((network.training, inputs[0].shape)))
    warm_up(state, pictures, config)
    known = set(seen)
    assert all(torch.equal(values, before[name]) for name, values in network.state_dict().items())
    assert all(weight.grad is None for weight in network.parameters()) and not state.optimizer.state

    seen.clear()
    for _ in range(2):
        metrics = train_epoch(state, pictures, config, NoBoard(), StopVote(ALONE, 0, 0))
        metrics |= {"test_loss": 0.0, "test_accuracy": 0.0}
        state.end_epoch(metrics, (torch.eye(2), torch.arange(2)), ["cat", "dog"])
    assert set(seen) == known
