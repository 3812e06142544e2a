"""What the pages say works: every command and snippet of README and of the pages in docs/, on small data.

Commands run in one folder, page by page, as a reader would type them; where they train, it is on 60 pictures.
"""

import ast
import importlib.util
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import datasets
import device
import model
import predict
import train
from quick.choices import FITS
from quick.data.decoding import read_picture
from quick.data.shapes import CLASSES, shapes
from quick.data.sizing import Sizing

RECIPES = "docs/recipes.md"
PAGES = ["README.md", "docs/tour.md", RECIPES]
PAGES += [f"docs/{name}.md" for name in ("running", "photographs", "change", "results", "faq")]
CHINA = "docs/china.zh.md"  # which has no twin
TWINS = {page: page.replace(".md", ".zh.md") for page in PAGES}
SCRIPTS = {"device.py": device, "datasets.py": datasets, "model.py": model, "train.py": train, "predict.py": predict}
SMALL = {"train.py": "--limit 60 --epochs 1 --batch-size 20 --device cpu --no-views", "datasets.py": "--limit 60"}
REPLACED = {"cifar10": "shapes", "data/cifar10": "photos", "data/ants_bees": "photos", "resnet18": "squeezenet1_1"}
REPLACED["600"] = "0.0001"  # minutes after which a run is to stop
REPLACED["resnet18-f37072fd.pth"] = "torch/hub/checkpoints/squeezenet1_1-b8a52dc0.pth"
SMALL_CONFIG = {"configs/photos.toml": "--model squeezenet1_1 --image-size 64"}
PLACE = re.compile(r"\s*# ([\w/]+\.py), .*?(above|below) `(.+)`\n")  # the first line of code to put somewhere


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page: language and content."""
    return re.findall(r"(?ms)^```(\w*)\n(.*?)^```", text(page))


def commands(page: str) -> list[str]:
    """What a page tells to type, in its order: behind a $, or as code in a line that begins with a command."""
    page_text = re.sub(r" \\\n +", " ", text(page))
    typed = r"(?m)^\$ (.+)$|`((?:python|pip|torchrun|tensorboard) [^`]+)`|^(pip install -r .+)$"
    found = re.finditer(typed, page_text)
    return list(dict.fromkeys(" ".join(next(filter(None, match.groups())).split()) for match in found))


def snippets(page: str) -> list[str]:
    """The Python of a page."""
    return [content for language, content in blocks(page) if language == "python"]


# Trainings that differ from others on the pages by a setting alone, and leave nothing that a later command needs.
ALIKE = ("--activation ", "--loss mse", "--run-name muon", "--run-name replace", "--epochs 7", "--lr 0.05")
ALIKE += ("for lr in", "shapes.onnx", "--config configs/photos.toml --data dogs", "--evaluate dogs", "--balance 1")
ALIKE += ("--run-name step", "--accumulate 4", "--batch-size 32", "--clip-grad 1", "--precision fp32", "--workers 0")
ALIKE += ("--cache", "--limit 300", "--weights resnet18-", "OMP_NUM_THREADS=1")
AS_TYPED = {  # commands of which docs/faq.md has what they print
    "python train.py --config configs/shapes.toml --limit 1000 --lr 100 --epochs 1": "the loss is nan in epoch 1, step",
    "python train.py --config configs/shapes.toml --limit 100 --epochs 30": r"epoch 30/30 .* acc (9\d|100)\.\d%  test",
    "python train.py --config configs/tutorial.toml --data shapes --limit 100 --epochs 30": r"30/30 .* acc 1\d\.\d%  t",
}
ALL = [
    pytest.param(command, marks=pytest.mark.expensive) if any(flags in command for flags in ALIKE) else command
    for command in dict.fromkeys(command for page in [*PAGES, CHINA] for command in commands(page))
]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Where the commands are typed: what a clone has, photographs of shapes, and weights as if they were downloaded."""
    desk = tmp_path_factory.mktemp("desk")
    for name in ("configs", "docs", "benchmarks"):
        shutil.copytree(ROOT / name, desk / name)
    pictures = shapes("train", 60)
    for place, (image, label) in enumerate(zip(pictures.store.images, pictures.labels.tolist(), strict=True)):
        folder = desk / "photos" / ("train" if place % 3 else "test") / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{place}.png")
    (desk / "dogs").mkdir()
    for file in (desk / "photos").glob("*/*/*.png"):
        shutil.copy(file, desk / "dogs")
    rows = [f"{file.stem},{file.parent.name}" for file in (desk / "photos").glob("*/*/*.png")]
    (desk / "labels.csv").write_text("\n".join(["id,breed", *rows]))
    shutil.copytree(desk / "photos" / "test", desk / "new-photos")
    for name in ("dog.png", "new.jpg"):
        shutil.copy(next((desk / "photos" / "test").glob("*/*.png")), desk / name)
    hub = desk / "torch" / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    torch.save(model.create("squeezenet1_1", {"classes": 1000}).state_dict(), hub / "squeezenet1_1-b8a52dc0.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk)
        patch.setenv("TORCH_HOME", str(desk / "torch"))
        item, layouts = (code for code in snippets("docs/tour.md") if "[test_set] =" in code or "by_label" in code)
        exec(item + layouts, {})  # folders that the tour's commands look at
        yield desk


def unfinished(desk: Path) -> None:
    """Leave a run as one that was killed in its second epoch."""
    shutil.rmtree(desk / "logs" / "unfinished", ignore_errors=True)
    flags = f"--data shapes {SMALL['train.py']} --epochs 2 --run-name unfinished".split()
    assert train.cli(flags) == 0
    (desk / "logs" / "unfinished" / "epoch_002.pt").unlink()


def parts(command: str) -> list[str]:
    """The commands that a line is made of, and those of a loop of the shell."""
    if loop := re.fullmatch(r"for (\w+) in (.+?); do (.+); done", command):
        return [loop[3].replace(f"${loop[1]}", value) for value in loop[2].split()]
    return command.split(" && ")


def small(script: str, words: list[str]) -> list[str]:
    """The arguments of a script, with small data."""
    words = [REPLACED.get(word, word) for word in words]
    words += [] if "--resume" in words else SMALL.get(script, "").split()
    return words + [flag for config in SMALL_CONFIG if config in words for flag in SMALL_CONFIG[config].split()]


def run(command: str, desk: Path) -> None:
    """Type a command, on small data."""
    words = shlex.split(command.partition(" > ")[0].removeprefix("OMP_NUM_THREADS=1 "))
    if words[:2] == ["python", "-c"]:
        exec(words[2], {})
        return
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        args = get_args_parser().parse_args(words[1:])
        words = ["python", args.training_script, *args.training_script_args]
    if words[0] in ("pip", "tensorboard") or words[1] == "-m" or words[1].startswith("benchmarks/"):
        checked(words, desk)
        return
    script, words = words[1], small(words[1], words[2:])
    if "--resume" in words:
        words = ["2" if before == "--epochs" else word for before, word in itertools.pairwise(["", *words])]
        if command.endswith("--resume"):  # the newest unfinished one
            unfinished(desk)
    elif script in ("train.py", "datasets.py") and not {"--data", "--help"} & {*words}:
        words += ["--data", "photos" if "ants_bees" in command else "shapes"]
    try:
        status = SCRIPTS[script].cli(words)
    except SystemExit as stop:
        status = stop.code
    assert status == 0, command


def checked(words: list[str], desk: Path) -> None:
    """What cannot be typed in a test (to install, serve, test, measure for minutes): its files and flags exist."""
    flags = [f'"{word}"' for word in words if word.startswith("--")]
    if words[0] == "tensorboard":
        from tensorboard import program

        board = program.TensorBoard()
        board.configure([None, *words[1:], "--inspect"])
        assert board.flags.logdir == "logs" and list((desk / "logs").glob("*/events.*"))
    elif words[0] == "pip":
        assert words[1] in ("install", "config") and ("-r" not in words or (ROOT / words[3]).is_file())
    elif words[1] == "-m":
        assert words[2] in ("pytest", "notebook") and all(flag in text("tests/conftest.py") for flag in flags)
    else:
        assert all(flag in text(words[1]) for flag in flags)


@pytest.mark.parametrize("command", ALL)
def test_every_command(command, desk, capsys):
    if any(name in command for name in CHANGED):
        pytest.skip("of a change: test_the_four_changes runs it")
    if command in AS_TYPED:
        pytest.skip("test_what_goes_wrong_is_printed runs it")
    if "--data-url" in command:
        pytest.skip("needs the network: tests/data/test_cifar10.py downloads from this machine")
    if command.startswith("conda "):
        pytest.skip("needs conda")
    if ".onnx" in command:
        pytest.importorskip("onnxscript")
    for part in parts(command):
        run(part, desk)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("command", [command if "nan" in told else pytest.param(command, marks=pytest.mark.expensive)
                                     for command, told in AS_TYPED.items()])  # fmt: skip
def test_what_goes_wrong_is_printed(command, tmp_path, capsys):
    """The cases of docs/faq.md go as the page says, at full size."""
    assert command in commands("docs/faq.md")
    words = [str(ROOT / word) if word.startswith("configs/") else word for word in command.split()[2:]]
    status = train.cli([*words, "--device", "cpu", "--no-views", "--log-dir", str(tmp_path)])
    out, err = capsys.readouterr()
    assert status == ("nan" in AS_TYPED[command]) and re.search(AS_TYPED[command], out + err)


def test_the_files_for_china_are_the_right_ones():
    from torchvision import models

    from quick.data import cifar10

    [mirror] = re.findall(r"--data-url (\S+)", text(CHINA))
    assert mirror in cifar10.MIRRORS and f"`{cifar10.MD5}`" in text(CHINA) and cifar10.ARCHIVE in text(CHINA)
    urls = re.findall(r"https://download.pytorch.org/models/\S+", text(CHINA))
    assert urls == [models.get_model_weights(name).DEFAULT.url for name in ("resnet18", "vgg16")]


@pytest.mark.skipif(os.name == "nt", reason="the page has other words for Windows, in its text")
def test_the_clone_and_the_environment(tmp_path):
    """The first block of README, with this clone in the place of the address."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    [block] = [code for _, code in blocks("README.md") if code.startswith("git clone ")]
    typed = block.replace("https://github.com/OWNER/NAME", shlex.quote(str(ROOT)))
    typed = typed.replace("-m venv", "-m venv --without-pip")  # which takes seconds
    where = "python -c 'import os, sys; print(sys.prefix, os.path.isfile(\"requirements.txt\"))'"
    done = subprocess.run(["bash", "-ec", typed + where], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [str(tmp_path / "pictures" / ".venv"), "True"], done.stderr


@pytest.mark.parametrize("page", [page for page in PAGES if page != RECIPES])
def test_every_snippet(page, desk, capsys):
    """It runs, and prints what stands behind its print() or in the block below, unless that depends on a training."""
    names = {"__name__": "__main__"}
    for code, below in re.findall(r"(?ms)^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", text(page)):
        if PLACE.match(code):
            continue
        capsys.readouterr()
        exec(compile(code, page, "exec"), names)
        wanted = [*re.findall(r"(?m)^ *print\(.*\)  # (.+)$", code), *below.splitlines()]
        if wanted and "best.pt" not in code and "help(" not in code:  # whose words each Python chooses
            assert capsys.readouterr().out.splitlines() == wanted


def section(code: str) -> str:
    """The heading above a recipe."""
    return re.findall("(?m)^## (.+)$", text(RECIPES).partition(code)[0])[-1]


@pytest.mark.expensive
@pytest.mark.parametrize("code", snippets(RECIPES), ids=section)
def test_every_recipe(code, desk, monkeypatch, capsys):
    """Each for itself, after the commands; left out where a package that it imports is not installed."""
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    for module in (name for node in nodes for name in [getattr(node, "module", None) or node.names[0].name]):
        if not importlib.util.find_spec(module.partition(".")[0]):
            pytest.skip(f"needs {module}")
    monkeypatch.setattr(train, "main", lambda flags, main=train.main: main(small("train.py", flags)))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names = {}
    if "gradio" not in code:
        exec(compile(code, RECIPES, "exec"), names)
        assert "Traceback" not in capsys.readouterr().err
        return
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio
    from gradio_client import Client, handle_file

    launch = gradio.Interface.launch
    monkeypatch.setattr(gradio.Interface, "launch", lambda page: launch(page, prevent_thread_lock=True, quiet=True))
    exec(compile(code, RECIPES, "exec"), names)
    try:
        client = Client(names["page"].local_url, verbose=False)
        answer = client.predict(handle_file("docs/star.png"), api_name="/answer")
        assert answer["label"] == predict.classify("docs/star.png")[0][0] and len(answer["confidences"]) == 5
    finally:
        names["page"].close()


def test_an_app_prepares_pictures_as_predict_does(tmp_path):
    """The recipe for phones gives the same pixels (to one of 255), by each fit, of pictures of any shape."""
    [code] = [code for code in snippets(RECIPES) if "custom_metadata_map" in code]
    code = code[code.index("side, fit =") : code.index("images =")]
    for turn, (width, height) in enumerate([(90, 61), (61, 91), (200, 33), (20, 31), (32, 32)], 1):
        pixels = np.random.default_rng(turn).integers(0, 256, (height, width, 3), np.uint8)
        exif = Image.Exif()
        exif[0x0112] = turn  # how the camera was held
        Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
        for fit in FITS:
            resize = 40 if fit == "crop" else 32
            facts = {"image_size": 32, "resize": resize, "fit": fit, "interpolation": "bicubic"}
            names = {"facts": facts}
            exec("from PIL import Image, ImageOps\n" + code.replace("docs/star.png", str(tmp_path / "a.png")), names)
            wanted, _ = read_picture(tmp_path / "a.png", Sizing(32, resize, "bicubic", None, fit))
            difference = np.abs(np.asarray(names["square"], np.int64) - wanted).max()
            assert difference <= 1, (fit, width, height)


@pytest.mark.parametrize(("page", "twin"), TWINS.items())
def test_the_chinese_pages_say_the_same(page, twin):
    assert commands(twin) == commands(page)
    code, code_of_twin = ([block for block in blocks(of) if block[0] or "$ " in block[1]] for of in (page, twin))
    assert code_of_twin == code
    assert len(re.findall("(?m)^#+ ", text(twin))) == len(re.findall("(?m)^#+ ", text(page)))


OTHERS = ["CONTRIBUTING.md", "CHANGELOG.md", "docs/scaling.md", "docs/reliability.md", "docs/security.md"]
OTHERS += ["benchmarks/README.md"]


def anchors(page_text: str) -> set[str]:
    """What GitHub calls the headings of a page: lower case, hyphens for spaces, no punctuation."""
    headings = re.findall("(?m)^#+ (.+)$", re.sub("(?ms)^```.*?^```", "", page_text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *TWINS.values(), *OTHERS, CHINA])
def test_every_link_leads_somewhere(page):
    links = [link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", text(page)) if "://" not in link]
    missing = [path for path, _, _ in links if path and not (ROOT / page).parent.joinpath(path).exists()]
    assert not missing
    for path, _, heading in links:
        target = (ROOT / page).parent / path if path else ROOT / page
        assert not heading or heading in anchors(target.read_text(encoding="utf-8")), f"{page}: {path}#{heading}"


def lines_of(file: str, name: str) -> int:
    """How many lines a function, class, method (`Class.method`) or constant of a file has."""
    node = ast.parse(text(file))
    for part in name.split("."):
        inside = {getattr(child, "name", ""): child for child in node.body}
        inside |= {of.id: child for child in node.body for of in getattr(child, "targets", []) if hasattr(of, "id")}
        assert part in inside, f"{name} is not in {file}"
        node = inside[part]
    return node.end_lineno - node.lineno + 1


@pytest.mark.parametrize(("page", "begin"), [("docs/tour.md", ("Read:", "If you like:")),
                                             ("docs/tour.zh.md", ("必读\uff1a", "选读\uff1a"))])  # fmt: skip
def test_the_lines_to_read_are_there(page, begin):
    """Each section ends with code to read: names in back ticks, their file, and how many lines that is."""
    for part in text(page).split("\n## ")[1:]:
        assert any(paragraph.startswith(begin) for paragraph in part.split("\n\n")), part.splitlines()[0]
    total = 0
    for paragraph in (" ".join(part.split()) for part in text(page).split("\n\n") if part.startswith(begin)):
        for part in re.split("[;\uff1b]", paragraph):  # Chinese has a semicolon of its own
            names, [file] = re.findall("`([^`]+)`", part), re.findall(r"\]\(\.\./([^)]+)\)", part)
            [count] = re.findall(r"(\d+) (?:lines?|行)", part)
            lines = sum(lines_of(file, name) for name in names)
            assert names and lines == int(count), f"{page} has {part}, but these are {lines} lines"
            total += lines * paragraph.startswith(begin[0])
    assert f"{total} lines in all" in text(page) or f"一共 {total} 行" in text(page)


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_the_tree_has_every_file(page):
    """Each script, room, config and benchmark has its line, and rooms stand below those that they import."""
    [tree] = re.findall(r"(?m)(?:^    .+\n)+^    docs/ .+\n", text(page))
    folders, listed = [], []
    for line in tree.splitlines():
        depth, name = line.index(line.strip()) // 4 - 1, re.split(" {2,}", line.strip())[0]
        folders[depth:] = [name if name.endswith("/") else ""]
        listed += ["".join([*folders[:depth], file]) for file in name.split(", ")]
    there = [path.relative_to(ROOT).as_posix() for pattern in ("*.py", "quick/**/*.py", "configs/*", "benchmarks/*.py")
             for path in ROOT.glob(pattern) if path.name != "__init__.py"]  # fmt: skip
    others = ["quick/", *(f"{path.relative_to(ROOT).as_posix()}/" for path in ROOT.glob("quick/[a-z]*/"))]
    others += ["configs/", "benchmarks/", "weights/cifar_quick.pt", "tests/", "docs/"]
    assert sorted(listed) == sorted([*there, *others])
    rooms = [file for file in listed if file.startswith("quick/") and file.endswith(".py")]
    for place, room in enumerate(rooms):
        imported = re.findall(r"(?m)^ *from (quick\S*) import (\w+)", text(room))
        paths = {f"{module.replace('.', '/')}{end}" for module, name in imported for end in (".py", f"/{name}.py")}
        assert not paths & {*rooms[place:]}, f"{page}: {room} imports what stands below it"


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_the_first_page_is_short_and_its_badges_are_true(page):
    assert text(page).count("\n") <= 200
    [badges] = re.findall("<title>(.+)</title>", text("docs/badges.svg"))
    [python], [torch_floor] = re.findall("Python ([\\d.]+)\\+", badges), re.findall("PyTorch ([\\d.]+)\\+", badges)
    assert f"torch>={torch_floor}\n" in text("requirements.txt")
    assert f'target-version = "py{python.replace(".", "")}"' in text("pyproject.toml")
    assert "MIT" in badges and text("LICENSE").startswith("MIT License")
    assert all(words in text(page) for words in (f"Python {python}", f"PyTorch {torch_floor}"))


def test_every_config_begins_with_its_command():
    for path in (ROOT / "configs").glob("*.toml"):
        head = path.read_text(encoding="utf-8").partition("\n\n")[0]
        command = f"python train.py --config configs/{path.name}"
        assert all(line.startswith("#") for line in head.splitlines()) and command in head, path.name


def test_every_fault_is_provoked_by_a_test():
    """What docs/reliability.md gives to pytest's -k are words of tests that are there."""
    functions = [name for path in ROOT.glob("tests/**/test_*.py")
                 for name in re.findall(r"(?m)^def (test_\w+)", path.read_text(encoding="utf-8"))]  # fmt: skip
    page = text("docs/reliability.md")
    chosen = [one or other for one, other in re.findall(r"-k (?:\"([^\"]+)\"|([\w]+))", page)]
    assert len(chosen) > 30
    for words in chosen:
        for word in words.split(" or "):
            assert any(word in name for name in functions), f"no test has {word!r} in its name"
    assert all((ROOT / path).is_file() for path in re.findall(r"tests/[\w/]+\.py", page))


# ---- changing it ----

CHANGED = ("--model tiny", "--grey", "--optimizer rmsprop")

CHECK = """
import json, sys, torch, datasets, train
flags = sys.argv[1:]
assert train.cli([*flags, "--run-name", "a"]) == 0
lines = [json.loads(line) for line in open("logs/a/metrics.jsonl")]
assert lines[-1]["train_loss"] < lines[0]["train_loss"] and lines[-1]["test_top3"] >= lines[-1]["test_accuracy"] > 0
before = torch.load("logs/a/epoch_003.pt", weights_only=True)
assert before["model"]["name"] == "tiny" and "square_avg" in before["training"]["optimizer"]["state"][0]
import pathlib
pathlib.Path("logs/a/epoch_003.pt").unlink()
assert train.cli(["--resume", "a"]) == 0
after = torch.load("logs/a/epoch_003.pt", weights_only=True)
assert all(torch.equal(value, after["state_dict"][name]) for name, value in before["state_dict"].items())
[pictures] = datasets.load("shapes", limit=200, splits=["train"])
images, *_ = next(pictures.batches(200, augment=datasets.Augment(grey=0.5)))
grey = (images * torch.tensor(pictures.std).view(1, 3, 1, 1) + torch.tensor(pictures.mean).view(1, 3, 1, 1)).std(1)
assert 60 < (grey.amax((1, 2)) < 1e-3).sum() < 140
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
assert len(EventAccumulator("logs/a").Reload().Scalars("top3/test")) >= 3
"""


@pytest.mark.expensive
def test_the_four_changes(tmp_path):
    """The snippets of docs/change.md, put where they say into a copy of the code: one file, at most 15 lines each."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for name in ("quick", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    files = []
    for code in filter(PLACE.match, snippets("docs/change.md")):
        file, side, anchor = PLACE.match(code).groups()
        lines, new = (tmp_path / file).read_text(encoding="utf-8").splitlines(), code.splitlines()[1:]
        place = next(number for number, line in enumerate(lines) if anchor in line) + (side == "below")
        lines[place:place] = new if side == "above" else ["", "", *new]
        (tmp_path / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
        assert len(new) <= 15
        files.append(file)
    augment = "quick/data/augment.py"
    assert files == ["model.py", augment, augment, "quick/run/optimizers.py", "quick/nets/losses.py"]
    flags = "--config configs/shapes.toml --limit 200 --epochs 3 --lr 0.003 --quiet".split()
    flags += "--model tiny --grey 0.5 --optimizer rmsprop".split()
    result = subprocess.run(
        [sys.executable, "-c", CHECK, *flags], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
