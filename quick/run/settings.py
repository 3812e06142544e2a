"""All settings of a run: each is a field of Config, a key of the config files and a flag of the same name."""

import re
from dataclasses import dataclass, fields

from quick.checkpoints import FITS, INTERPOLATIONS, LOSSES, TTA
from quick.cli import bad_folder, setting
from quick.data.augment import Augment
from quick.nets.activations import ACTIVATIONS
from quick.nets.pretrained import STEMS
from quick.run.optimizers import OPTIMIZERS

BEST = ("accuracy", "f1", "loss")
GROUPS = ("data", "augmentation", "network", "recipe", "machine", "run")  # headings of --help, in this order


def bad_freeze(value: str) -> str | None:
    """Why this is no value for --freeze, in words; None when it is one."""
    if value == "all" or re.fullmatch("0|[1-9][0-9]*", value, re.ASCII):
        return None
    return f"{value!r} is neither a number of stages nor all"


def bad_levels(value: tuple) -> str | None:
    """Why these are no values for --levels, in words; None when they are."""
    return None if not value or value[0] < value[1] else f"{list(value)} are not two numbers, the lower one first"


@dataclass(frozen=True)
class Config(Augment):
    """Every setting of a run; those of Augment belong to it too."""

    data: str = setting("data", "cifar10", "cifar10, shapes, or a folder of pictures")
    labels: str = setting(
        "data",
        "",
        "a table (CSV: file,label) that says the classes of the pictures in the folder of --data, wherever they are",
        metavar="FILE",
    )
    data_dir: str = setting("data", "data", "where downloads live", resumable=True)
    data_url: str = setting("data", "", "download CIFAR-10 from here, not from its known mirrors", resumable=True)
    strict: bool = setting("data", False, "stop at bad files instead of leaving them out")
    image_size: int = setting(
        "data",
        0,
        "side of the network's pictures, in pixels; 0: as --weights had it, else 32",
        at_least=0,
        at_most=4096,
        auto=True,
    )
    resize: int = setting(
        "data",
        0,
        "pixels of the shorter side before the middle is cut out; 0: like image_size",
        at_least=0,
        at_most=4096,
        auto=True,
    )
    interpolation: str = setting(
        "data",
        "auto",
        "how pictures are resized; auto: as --weights had it",
        choices=("auto", *INTERPOLATIONS),
        auto=True,
    )
    fit: str = setting(
        "data",
        "auto",
        "how pictures become squares: cut the middle out, pad with grey, or squash; auto: as --weights had it",
        choices=("auto", *FITS),
        auto=True,
    )
    limit: int = setting(
        "data", 0, "take the first N pictures of each split, classes balanced: a quick try", at_least=0
    )
    val_fraction: float = setting(
        "data", 0.0, "hold this share of training out, choose the best epoch on it, test once", at_least=0, below=1
    )
    fold: int = setting(
        "data", 0, "hold this one of --folds out, from 1 on, in place of a fraction", at_least=0, metavar="K"
    )
    folds: int = setting(
        "data", 0, "parts that are held out in turn, one in each of so many runs", at_least=0, metavar="N"
    )
    mean: tuple = setting(
        "data",
        (),
        "means of the three channels, of pixels in [0, 1]; (): as --weights has them, else measured",
        auto=True,
    )
    std: tuple = setting("data", (), "standard deviations of the three channels; (): like mean", above=0, auto=True)
    levels: tuple = setting(
        "data",
        (),
        "of pixels wider than 8 bits, the values that become black and white; (): as --weights has them, else found",
        check=bad_levels,
        metavar=("LOW", "HIGH"),
        auto=True,
    )
    shuffle: bool = setting("data", True, "take the pictures in a new order in every epoch")

    model: str = setting("network", "cifar_quick", "the network; python model.py --list names all")
    batch_norm: bool = setting("network", True, "cifar_quick: batch normalisation in every stage")
    sync_bn: bool = setting(
        "network", False, "batch normalisation by the pictures of all processes; else by those of each process"
    )
    activation: str = setting(
        "network",
        "auto",
        "activation of our own networks; auto: the one that each does best with",
        choices=("auto", *ACTIVATIONS),
        auto=True,
    )
    width: float = setting("network", 1.0, "fast: how many times as many channels", above=0, at_most=64)
    whiten: bool = setting(
        "network", False, "the first convolution starts as whitening filters, if there are no --weights"
    )
    stem: str = setting(
        "network",
        "standard",
        "first layers of torchvision's networks; small: they keep the size of small pictures",
        choices=STEMS,
    )
    weights: str = setting("network", "none", "start from: none, imagenet, or a checkpoint")
    head: str = setting(
        "network",
        "auto",
        "replace the last layer, or append one behind it; auto: replace, unless --weights has the same classes",
        choices=("auto", "replace", "append"),
    )
    freeze: str = setting(
        "network",
        "0",
        "keep the weights of the first N stages, or with all those of everything but the head",
        check=bad_freeze,
    )

    epochs: int = setting("recipe", 10, "passes over the training pictures", at_least=1, resumable=True)
    batch_size: int = setting("recipe", 64, "pictures in each step, over all processes", at_least=1)
    accumulate: int = setting(
        "recipe", 1, "work on each batch in so many pieces, one after the other, which takes less memory", at_least=1
    )
    optimizer: str = setting(
        "recipe",
        "sgd",
        "sgd; adamw; or muon: the weights of hidden layers get orthogonal steps, all others SGD",
        choices=OPTIMIZERS,
    )
    lr: float = setting(
        "recipe",
        0.0,
        "highest learning rate; 0: what fits optimizer, network, weights and what is frozen",
        at_least=0,
        auto=True,
    )
    muon_lr: float = setting("recipe", 0.05, "highest learning rate of Muon's orthogonal steps", above=0)
    backbone_lr: float = setting(
        "recipe", 0.0, "highest learning rate of what SGD or AdamW trains before the head; 0: like lr", at_least=0
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
        "epochs in which cosine and constant first rise in a straight line: this share of the run's steps",
        at_least=0,
        metavar="EPOCHS",
    )
    momentum: float = setting("recipe", 0.0, "momentum of SGD and Muon; AdamW's is 0.9", at_least=0, below=1)
    nesterov: bool = setting("recipe", False, "Nesterov's momentum")
    weight_decay: float = setting(
        "recipe", 0.0, "weight decay of matrices; biases and normalisation have none", at_least=0
    )
    loss: str = setting(
        "recipe", "cross_entropy", "loss function; mse and l1 compare with one-hot labels", choices=LOSSES
    )
    label_smoothing: float = setting(
        "recipe", 0.0, "share of each label that is given to all classes evenly", at_least=0, below=1
    )
    balance: float = setting(
        "recipe",
        0.0,
        "how much more the pictures of small classes weigh in the training loss; 1: all classes weigh the same",
        at_least=0,
        at_most=1,
    )
    hardest: float = setting(
        "recipe",
        1.0,
        "share of the pictures, the hardest ones, on which the second half of the run trains",
        above=0,
        at_most=1,
    )
    clip_grad: float = setting("recipe", 0.0, "shorten gradients that are longer than this; 0: never", at_least=0)
    tta: str = setting(
        "recipe", "none", "test-time augmentation: also look at mirror images, or also at shifted ones", choices=TTA
    )
    seed: int = setting("recipe", 0, "seed of initialisation, order and augmentation", at_least=0, at_most=2**63 - 1)

    device: str = setting("machine", "auto", "auto, cpu, cuda, cuda:1 or mps", resumable=True)
    precision: str = setting(
        "machine", "auto", "precision of the forward pass", choices=("auto", "fp32", "bf16", "fp16"), resumable=True
    )
    workers: int = setting(
        "machine", -1, "processes that read picture files; -1: one for each core", at_least=-1, resumable=True
    )
    memory_share: float = setting(
        "machine",
        0.4,
        "share of free memory that all pictures may take; else they are streamed from the files",
        at_least=0,
        at_most=1,
        resumable=True,
    )
    cache: bool = setting(
        "machine", False, "keep pictures that are streamed resized on the disk: they are decoded once", resumable=True
    )
    timeout: float = setting(
        "machine", 600.0, "seconds that processes wait for each other", above=0, at_most=10**6, resumable=True
    )
    compile: bool = setting("machine", False, "torch.compile: slow to start, faster on GPUs", resumable=True)
    deterministic: bool = setting(
        "machine", False, "the same bits each time, on GPUs too; slower there", resumable=True
    )

    log_dir: str = setting("run", "logs", "where run folders live", resumable=True)
    views: bool = setting(
        "run", True, "pictures, and a PR curve for each class, in TensorBoard beside the scalars", resumable=True
    )
    view_every: int = setting(
        "run", 0, "epochs between two sets of pictures; 0: ten times in the run", at_least=0, resumable=True
    )
    histograms: bool = setting("run", False, "views: how weights and gradients are distributed", resumable=True)
    embedding: bool = setting(
        "run", False, "views: 1,000 test pictures in the projector, by the last hidden layer", resumable=True
    )
    quiet: bool = setting("run", False, "no progress bars and no notes; problems are still named", resumable=True)
    run_name: str = setting("run", "", "the run's folder; date, time and network if not given", check=bad_folder)
    keep: int = setting("run", 0, "checkpoints to keep beside best.pt, the newest; 0: all", at_least=0, resumable=True)
    best: str = setting(
        "run",
        "accuracy",
        "what chooses the best epoch; f1: its mean over the classes; of equal ones the loss, then the later one",
        choices=BEST,
    )
    patience: int = setting(
        "run",
        0,
        "stop when so many epochs brought none that is better, as --best says; 0: never",
        at_least=0,
        resumable=True,
    )
    time_limit: float = setting(
        "run",
        0.0,
        "save and end after this many minutes, as after Ctrl-C; 0: no limit",
        at_least=0,
        metavar="MINUTES",
        resumable=True,
    )


# In the order of `--help` and of config files.
SETTINGS = sorted(fields(Config), key=lambda key: GROUPS.index(key.metadata["group"]))
