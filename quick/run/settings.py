"""All settings of a run: each is a field of Config, a key of the config files and a flag of the same name."""

import re
from dataclasses import dataclass, fields

from quick.choices import LOSSES, PRECISIONS, STEMS, TTA
from quick.cli import USUAL, setting
from quick.data.augment import Augment
from quick.data.source import Source
from quick.values import bad_folder

BEST = ("accuracy", "f1", "loss")
GROUPS = (USUAL, "data", "augmentation", "network", "recipe", "machine", "run")  # headings of --help, in this order


def activations() -> tuple[str, ...]:
    from quick.nets.activations import ACTIVATIONS  # imports PyTorch, for which --help does not wait

    return ("auto", *ACTIVATIONS)


def optimizers() -> tuple[str, ...]:
    from quick.run.optimizers import OPTIMIZERS  # as above

    return tuple(OPTIMIZERS)


def bad_freeze(value: str) -> str | None:
    """Why this is no value for --freeze, in words; None when it is one."""
    if value == "all" or re.fullmatch("0|[1-9][0-9]*", value, re.ASCII):
        return None
    return f"{value!r} is neither a number of stages nor all"


@dataclass(frozen=True)
class Config(Source, Augment):
    """Every setting of a run; those of Source and Augment belong to it too."""

    model: str = setting(USUAL, "cifar_quick", "name of the network; python model.py --list tells all")
    batch_norm: bool = setting("network", True, "batch normalisation in every stage of cifar_quick")
    sync_bn: bool = setting(
        "network", False, "batch normalisation by the pictures of all processes, not by those of each alone"
    )
    activation: str = setting(
        "network",
        "auto",
        "activation of our own networks: none, relu, gelu, silu or sigmoid",
        means="the one that each does best with",
        choices=activations,
        auto=True,
    )
    width: float = setting("network", 1.0, "multiply the channels of the network fast by this", above=0, at_most=64)
    whiten: bool = setting(
        "network", False, "start the first convolution from whitening filters, if no weights are loaded"
    )
    stem: str = setting(
        "network",
        "standard",
        "first layers of torchvision's networks; small ones keep the size of small pictures",
        choices=STEMS,
    )
    weights: str = setting(
        USUAL, "none", "weights to start from: none, imagenet, or those of a checkpoint", metavar="SOURCE"
    )
    head: str = setting(
        "network",
        "auto",
        "replace the last layer, or append one behind it",
        means="replace, unless the weights have the same classes",
        choices=("auto", "replace", "append"),
    )
    freeze: str = setting(
        "network",
        "0",
        "number of first stages that keep their weights; all: everything but the head keeps them",
        check=bad_freeze,
        metavar="N",
    )

    epochs: int = setting(USUAL, 10, "passes over the training pictures", at_least=1, resumable=True)
    batch_size: int = setting(USUAL, 64, "pictures in each step, over all processes", at_least=1)
    accumulate: int = setting(
        "recipe", 1, "pieces of each batch, worked on one after the other, which takes less memory", at_least=1
    )
    optimizer: str = setting(
        "recipe",
        "sgd",
        "optimizer: sgd, adamw, or muon (orthogonal steps for hidden layers, SGD for all else)",
        choices=optimizers,
    )
    lr: float = setting(
        USUAL,
        0.0,
        "highest learning rate",
        means="what fits optimizer, network, weights and what is frozen",
        at_least=0,
        auto=True,
        metavar="RATE",
    )
    muon_lr: float = setting("recipe", 0.05, "highest learning rate of Muon's steps", above=0, metavar="RATE")
    muon_decay: float = setting(
        "recipe", 0.0, "weight decay of the weights that take Muon's steps", means="that of all matrices", at_least=0
    )
    backbone_lr: float = setting(
        "recipe",
        0.0,
        "highest learning rate of what SGD or AdamW trains before the head",
        means="that of the head",
        at_least=0,
        metavar="RATE",
    )
    schedule: str = setting(
        "recipe",
        "constant",
        "how the learning rate changes in the run; onecycle begins with a warm-up",
        choices=("constant", "onecycle", "cosine"),
    )
    warmup: float = setting(
        "recipe",
        0.0,
        "epochs in which the learning rate of cosine and constant first rises in a straight line",
        means="none",
        at_least=0,
        metavar="EPOCHS",
    )
    momentum: float = setting("recipe", 0.0, "momentum of SGD and Muon; AdamW's is 0.9", at_least=0, below=1)
    nesterov: bool = setting("recipe", False, "use Nesterov's momentum")
    weight_decay: float = setting(
        "recipe", 0.0, "weight decay of matrices; biases and normalisation have none", at_least=0
    )
    loss: str = setting(
        "recipe", "cross_entropy", "loss function; mse and l1 compare with one-hot labels", choices=LOSSES
    )
    label_smoothing: float = setting(
        "recipe", 0.0, "share of each label that is given to all classes evenly", at_least=0, below=1, metavar="SHARE"
    )
    balance: float = setting(
        "recipe",
        0.0,
        "how much more small classes weigh in the training loss, up to 1: all classes weigh the same",
        at_least=0,
        at_most=1,
    )
    hardest: float = setting(
        "recipe",
        1.0,
        "train the second half of the run on this share of the pictures alone, its hardest ones",
        means="all",
        above=0,
        at_most=1,
        metavar="SHARE",
    )
    clip_grad: float = setting("recipe", 0.0, "shorten gradients that are longer than this", means="never", at_least=0)
    tta: str = setting(
        "recipe", "none", "test-time augmentation: also look at mirror images, or also at shifted ones", choices=TTA
    )
    seed: int = setting(
        "recipe", 0, "random seed of first weights, order and augmentation", at_least=0, at_most=2**63 - 1
    )

    device: str = setting("machine", "auto", "where to compute: auto, cpu, cuda, cuda:1 or mps", resumable=True)
    precision: str = setting(
        "machine",
        "auto",
        "number format of the forward pass",
        means="bf16 where the hardware computes in it, else fp32",
        choices=PRECISIONS,
        resumable=True,
    )
    workers: int = setting(
        "machine", -1, "processes that read picture files", means="one for each core", at_least=-1, resumable=True
    )
    memory_share: float = setting(
        "machine",
        0.4,
        "share of free memory that all pictures may take; else they are streamed from the files",
        at_least=0,
        at_most=1,
        resumable=True,
        metavar="SHARE",
    )
    cache: bool = setting(
        "machine", False, "keep pictures that are streamed resized on the disk: they are decoded once", resumable=True
    )
    timeout: float = setting(
        "machine",
        600.0,
        "how long processes wait for each other",
        above=0,
        at_most=10**6,
        resumable=True,
        metavar="SECONDS",
    )
    compile: bool = setting("machine", False, "use torch.compile: slow to start, faster on GPUs", resumable=True)
    deterministic: bool = setting(
        "machine", False, "compute the same bits each time, on GPUs too; slower there", resumable=True
    )

    log_dir: str = setting("run", "logs", "folder in which each run gets its own", resumable=True, metavar="FOLDER")
    views: bool = setting(
        "run", True, "show pictures, and a PR curve for each class, in TensorBoard beside the curves", resumable=True
    )
    view_every: int = setting(
        "run",
        0,
        "epochs from one set of pictures in TensorBoard to the next",
        means="ten sets in the run",
        at_least=0,
        resumable=True,
    )
    histograms: bool = setting(
        "run", False, "show in TensorBoard how weights and gradients are distributed", resumable=True
    )
    embedding: bool = setting(
        "run",
        False,
        "show 1,000 test pictures in TensorBoard's projector, placed by the last hidden layer",
        resumable=True,
    )
    quiet: bool = setting("run", False, "no progress bars and no notes; problems are still named", resumable=True)
    run_name: str = setting("run", "", "name of the run's folder", means="date, time and network", check=bad_folder)
    keep: int = setting(
        "run", 0, "newest checkpoints that are kept, beside best.pt", means="all", at_least=0, resumable=True
    )
    best: str = setting(
        "run",
        "accuracy",
        "what chooses the best epoch; f1: its mean over the classes; of equal ones the loss, then the later one",
        choices=BEST,
    )
    patience: int = setting(
        "run",
        0,
        "end the run when so many epochs brought none that is better, as --best says",
        means="never",
        at_least=0,
        resumable=True,
    )
    time_limit: float = setting(
        "run",
        0.0,
        "save and end after this time, as after Ctrl-C",
        means="no limit",
        at_least=0,
        metavar="MINUTES",
        resumable=True,
    )


# In the order of `--help` and of config files.
SETTINGS = sorted(fields(Config), key=lambda key: GROUPS.index(key.metadata["group"]))
