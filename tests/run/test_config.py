"""Settings: the config file, the flags, what both may say, and what pretrained weights fill in."""

import os
import re
import threading
from pathlib import Path

import pytest
from conftest import ROOT

import train
from quick.errors import ConfigError
from quick.nets.activations import ACTIVATIONS
from quick.run.config import as_toml, read_config, resolve
from quick.run.optimizers import OPTIMIZERS
from quick.run.settings import GROUPS, SETTINGS, Config

# ---- files and flags ----


def test_every_setting_survives_the_config_file(tmp_path):
    config = Config(data='a "b" \\ ü 😀', mean=(0.1, 0.2, 0.3), std=(1.0, 1e-7, 1.0), lr=1e-5, compile=True)
    (tmp_path / "c.toml").write_text(as_toml(config), encoding="utf-8")
    assert read_config(tmp_path / "c.toml") == config


def test_files_may_say_freeze_with_a_number(tmp_path):
    (tmp_path / "a.toml").write_text("freeze = 2\nweights = 'w.pt'")
    assert read_config(tmp_path / "a.toml").freeze == "2"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_of_windows_editors_are_read(encoding, tmp_path):
    (tmp_path / "a.toml").write_bytes('data = "猫 می\u200cرود"\r\nepochs = 3\r\n'.encode(encoding))
    config = read_config(tmp_path / "a.toml")
    assert (config.data, config.epochs) == ("猫 می\u200cرود", 3)


def test_the_home_folder_is_filled_in(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "a.toml").write_text('data = "~/photos"\nlog_dir = "~/logs"\nrun_name = "~"')
    config = read_config(tmp_path / "a.toml")
    assert Path(config.data) == tmp_path / "photos" and Path(config.log_dir) == tmp_path / "logs"
    assert config.run_name == "~" and train.parse_train(["--weights=~/best.pt"])[0].weights == str(tmp_path / "best.pt")


def test_flags_overrule_the_config_file(tmp_path):
    (tmp_path / "my.toml").write_text("lr = 1\nepochs = 7\nflip = true")
    config = train.parse_train(["--config", str(tmp_path / "my.toml"), "--epochs", "3", "--no-flip"])[0]
    assert (config.lr, config.epochs, config.flip) == (1, 3, False)


def test_a_config_that_comes_through_a_pipe_is_read_once_though_scripts_parse_twice(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("lr = 0.5\nseed = 3",), daemon=True)
    writer.start()
    for _ in range(2):
        config = train.parse_train(["--config", str(tmp_path / "pipe"), "--seed", "4"])[0]
        assert (config.lr, config.seed) == (0.5, 4)


def help_of(argv: list[str], capsys) -> dict[str, str]:
    """What `python train.py --help` prints, by its headings, the lines of each joined to one."""
    with pytest.raises(SystemExit) as stop:
        train.main([*argv, "--help"])
    assert stop.value.code == 0
    _, *parts = re.split(r"\n\n([a-z ]+):\n", capsys.readouterr().out)
    return {heading: " ".join(part.split()) for heading, part in zip(parts[::2], parts[1::2], strict=True)}


def test_help_shows_groups_and_the_configs_defaults(capsys):
    found = help_of(["--config", str(ROOT / "configs" / "tutorial.toml")], capsys)
    assert [*found] == [*GROUPS, "examples"]
    rate = "highest learning rate (default: 0.01; 0 = what fits optimizer, network, weights and what is frozen)"
    assert rate in found["most used"]
    assert all(f"--{name.replace('_', '-')}" in str(found) for name in Config.__dataclass_fields__)


def test_help_says_of_a_runs_own_config_too_what_no_value_stands_for(tmp_path, capsys):
    (tmp_path / "config.toml").write_text(as_toml(Config()), encoding="utf-8")
    found = help_of(["--config", str(tmp_path / "config.toml")], capsys)
    assert "wider than 8 bits (default: those of the weights, else found)" in found["data"]


def test_help_begins_with_the_eight_flags_that_one_needs_and_ends_with_examples(capsys, monkeypatch):
    found = help_of([], capsys)
    usual = "--config --data --model --weights --epochs --batch-size --lr --resume --help".split()
    assert re.findall(r"--[a-z-]+", found["most used"].replace("python model.py --list", "")) == usual
    assert not re.search(r"default: (\)|\(|None|True|False)", str(found))
    examples = found["examples"].split("python train.py ")[1:]
    monkeypatch.chdir(ROOT)
    configs = [train.parse_train(flags.split())[0] for flags in examples]
    assert [(config.data, config.weights) for config in configs] == [("shapes", "none"), ("FOLDER", "imagenet")]


def test_help_is_in_phrases_of_their_own():
    for key in SETTINGS:
        phrase = key.metadata["help"]
        assert len(phrase.split()) > 2 or key.name == "lr", key.name
        assert not re.match(r"(of|for|like|as|the same|with|also)\b", phrase), phrase
        assert phrase[0].islower() and not phrase.endswith(".")


def test_help_names_all_optimizers_and_activations():
    texts = {key.name: re.findall(r"\w+", key.metadata["help"]) for key in SETTINGS}
    assert set(OPTIMIZERS) <= set(texts["optimizer"]) and set(ACTIVATIONS) <= set(texts["activation"])


def test_nothing_is_filled_in_without_weights():
    config = resolve(train.parse_train([])[0], pretrained=None)
    assert (config.image_size, config.resize, config.interpolation, config.fit) == (32, 32, "bilinear", "crop")
    assert config.mean == ()  # to be measured


def test_how_pictures_become_squares_is_that_of_the_weights():
    weights = {"image_size": 64, "resize": 72, "interpolation": "bicubic", "mean": (), "std": (), "fit": "crop"}
    weights |= {"model": {"options": {}}}
    for source, flags, expected in (
        (weights, "", (72, "crop")),
        (weights, "--fit squash", (64, "squash")),
        (weights | {"resize": 64, "fit": "pad"}, "", (64, "pad")),
        (weights | {"resize": 64, "fit": "pad"}, "--fit crop --resize 70", (70, "crop")),
        (weights | {"resize": 64, "fit": "pad"}, "--image-size 32", (32, "pad")),
    ):
        config = resolve(train.parse_train(flags.split())[0], pretrained=source)
        assert (config.resize, config.fit) == expected
    with pytest.raises(ConfigError, match="--resize 80: --fit pad cuts no middle out; add --resize 0 or --fit crop"):
        resolve(train.parse_train("--fit pad --resize 80".split())[0], pretrained=None)


# ---- wrong settings ----


def test_a_config_in_another_encoding_is_named(tmp_path, capsys):
    (tmp_path / "my.toml").write_bytes('data = "caf\u00e9"'.encode("cp1252"))
    assert train.cli(["--config", str(tmp_path / "my.toml")]) == 2
    assert capsys.readouterr().err.endswith(
        "my.toml: not a TOML file: its encoding is not UTF-8; save it anew as UTF-8\n"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epoch = 3", "unknown key 'epoch'; did you mean epochs?"),
        ("colour = 3", "unknown key 'colour'"),
        ("epochs = 'three'", "epochs: 'three' is not of type int"),
        ("epochs = true", "epochs: True is not of type int"),
        ("flip = 1", "flip: 1 is not of type bool"),
        ("lr = '0.1'", "lr: '0.1' is not of type float"),
        ("epochs = -1", "epochs: -1 is not at least 1"),
        ("loss = 'cross-entropy'", "loss: 'cross-entropy' is not one of cross_entropy, mse, l1; did you mean"),
        ("mean = [0, 0]", "mean: [0, 0] is not one number for each of the three channels"),
        ("mean = [0, 0, 'x']", "mean: 'x' is not a finite number"),
        ("lr = nan", "lr: nan is not a finite number"),
        ("lr = 1" + 400 * "0", "lr: 1000000"),
        ("[recipe]\nlr = 1", "unknown key 'recipe'"),
        ("lr 3", "not a TOML file"),
        ("run_name = '../x'", "run_name: '../x' cannot be a folder's name"),
        ("lr = " + 5000 * "1", "not a TOML file"),
        ("mean = " + 100_000 * "[", "not a TOML file"),
        ('"\\u001b[2J" = 1', r"unknown key '\x1b[2J'"),
    ],
)
def test_a_wrong_config_file_is_named_with_its_key(content, message, tmp_path, capsys):
    path = tmp_path / "my.toml"
    path.write_text(content)
    status = train.cli(["--config", str(path)])
    error = capsys.readouterr().err
    assert status == 2 and f"train.py: {path}: {message}" in error and error.count("\n") == 1


# ---- the wrong calls of train.py: one line, status 2, nothing left behind ----

MISTAKES = [
    ("--epochs -1", "--epochs: -1 is not at least 1"),
    ("--epochs 0", "--epochs: 0 is not at least 1"),
    ("--epochs 1.5", "argument --epochs: invalid int value: '1.5'"),
    ("--lr nan", "--lr: nan is not a finite number"),
    ("--lr inf", "--lr: inf is not a finite number"),
    ("--lr -1", "--lr: -1.0 is not at least 0"),
    ("--warmup -1", "--warmup: -1.0 is not at least 0"),
    ("--warmup 2", "--warmup: --schedule onecycle has its own; add --schedule cosine, or --warmup 0"),
    ("--warmup 2.5 --epochs 2 --schedule cosine", "--warmup 2.5: that is not below the 2 of --epochs"),
    ("--batch-size 0", "--batch-size: 0 is not at least 1"),
    ("--batch-size 1", "add --no-batch-norm"),
    ("--momentum 1", "--momentum: 1.0 is not below 1"),
    ("--momentum 0", "--nesterov needs --momentum above 0"),
    ("--label-smoothing 1", "--label-smoothing: 1.0 is not below 1"),
    ("--limit 9 --data shapes", "--limit 9 is below the number of classes, 10"),
    ("--mean 0 0 0", "--mean and --std: give both or neither"),
    ("--mean 0 0 0 --std 1 0 1", "--std: 0.0 is not above 0"),
    ("--mean 0 0", "argument --mean: expected 3 arguments"),
    ("--seed 99999999999999999999", "--seed: 99999999999999999999 is not at most 9223372036854775807"),
    ("--crop 33", "--crop and --cutout can be at most the image size, 32 pixels"),
    ("--val-fraction 0.01 --limit 20 --data shapes", "--val-fraction 0.01 of 20 pictures leaves too few"),
    ("--fold 2 --data shapes", "--fold 2: of how many? add --folds and their number"),
    ("--fold 3 --folds 2 --data shapes", "--fold 3: --folds 2 has those from 1 to 2"),
    ("--fold 2 --folds 100 --limit 50 --data shapes", "--fold 2 --folds 100 of 50 pictures leaves too few"),
    ("--rotate 181", "--rotate: 181.0 is not at most 180"),
    ("--rotate -1", "--rotate: -1.0 is not at least 0"),
    ("--loss hinge", "--loss: 'hinge' is not one of cross_entropy, mse, l1"),
    ("--schedule", "argument --schedule: expected one argument"),
    ("--epoch 3", "unknown flag --epoch; did you mean --epochs?"),
    ("--weigth-decay=3", "unknown flag --weigth-decay=3; did you mean --weight-decay?"),
    ("--frobnicate", "unknown flag --frobnicate"),
    ("shapes", "unknown flag shapes"),
    ("--device cuda:99", "no device 'cuda:99' here; this machine has: "),
    ("--precision fp16 --device cpu", "fp16 does not train well on cpu"),
    ("--image-size 4 --data shapes", "--image-size 4 is below 8"),
    ("--run-name ../x", "--run-name: '../x' cannot be a folder's name on every system, without a path"),
    *(
        (f"--run-name {name}", f"{name!r:.80} cannot be a folder's name on every system, without a path")
        for name in (
            "..",
            ".",
            "/x",
            "a/b",
            "a\\b",
            "c:",
            "con",
            "Aux.txt",
            "COM1",
            "lpt9.log",
            "a.",
            "a" * 300,
        )
    ),
    ("--run-name x\x1b", r"--run-name: 'x\x1b' has characters that cannot be printed"),
    ("--data caf\udce9", r"--data: 'caf\udce9' has characters that cannot be printed"),
    ("--clip-grad -1", "--clip-grad: -1.0 is not at least 0"),
    ("--patience -1", "--patience: -1 is not at least 0"),
    ("--time-limit -1", "--time-limit: -1.0 is not at least 0"),
    ("--keep -1", "--keep: -1 is not at least 0"),
    ("--resume", "--resume: no unfinished run in logs; --resume RUN --epochs N makes a finished one longer"),
    ("--resume x", "--resume x: no run there (its folder has a config.toml)"),
    ("--config nowhere.toml", "--config nowhere.toml: No such file or directory"),
]


def test_of_an_unknown_network_the_file_is_named_that_has_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my.toml").write_text('model = "cifar_quik"')
    assert train.cli(["--config", "my.toml"]) == train.cli(["--model", "resnet_18", "--config", "my.toml"]) == 2
    in_file, in_flag = capsys.readouterr().err.splitlines()
    assert in_file.startswith("train.py: my.toml: model: no network 'cifar_quik'")
    assert in_flag.startswith("train.py: --model: no network 'resnet_18'")


@pytest.mark.parametrize(("flags", "message"), MISTAKES)
def test_a_wrong_call_ends_in_one_line_and_status_2(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status = train.cli(flags.split())
    output = capsys.readouterr()
    assert status == 2 and message in output.err and output.err.count("\n") == 1 and not output.out
    assert output.err.startswith("train.py: ") and not list(tmp_path.iterdir())
