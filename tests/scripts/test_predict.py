"""predict.py as a user calls it, on networks that were trained on colours and on shapes."""

import csv
import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COLOURS, ROOT, as_bytes, noisy, save
from PIL import Image

import datasets
import model
import predict
import train
from quick.checkpoints import TTA, read
from quick.cli import Parser
from quick.data import streaming
from quick.data.cifar10 import CLASSES
from quick.data.decoding import read_picture
from quick.data.pictures import normalize
from quick.errors import CheckpointError, DataError
from quick.nets import losses
from quick.run import evaluation
from quick.run.config import parse_config
from quick.run.optimizers import fitting_lr


@pytest.fixture
def ask(colour_run, capsys):
    """Calls predict.py with the colours' checkpoint; returns status, lines on standard output, and standard error."""

    def call(*arguments: object) -> tuple[int, list[str], str]:
        status = predict.cli(["--checkpoint", str(colour_run / "best.pt"), "--device", "cpu", *map(str, arguments)])
        output = capsys.readouterr()
        return status, output.out.splitlines(), output.err

    return call


@pytest.fixture
def pictures(tmp_path):
    """A folder with one new picture of each colour, one of them in a folder inside."""
    (tmp_path / "inside").mkdir()
    noisy(COLOURS["red"], 100, (50, 40)).save(tmp_path / "a.png")
    noisy(COLOURS["green"], 101, (60, 90)).save(tmp_path / "b.JPG", "JPEG")
    noisy(COLOURS["blue"], 102).save(tmp_path / "inside" / "c.webp")
    return tmp_path


@pytest.mark.parametrize("fit", ["pad", "squash"])
def test_what_stands_at_the_edges_can_be_learned_and_is_looked_at(fit, tmp_path, capsys):
    """The centre of these pictures, which is all that is seen of them without --fit, says nothing of their class."""
    for split, count in (("train", 10), ("test", 4)):
        for name in ("red", "blue"):
            (tmp_path / "d" / split / name).mkdir(parents=True)
            for number in range(count):
                image = noisy((128, 128, 128), number, (48, 16))
                image.paste(COLOURS[name], (0, 0, 14, 16))
                image.save(tmp_path / "d" / split / name / f"{number}.png")
    flags = (
        f"--fit {fit} --image-size 8 --epochs 8 --batch-size 5 --no-flip --crop 0 --no-views --device cpu --run-name a"
    )
    assert train.cli([*flags.split(), "--data", str(tmp_path / "d"), "--log-dir", str(tmp_path)]) == 0
    checkpoint = read(tmp_path / "a" / "best.pt")
    assert checkpoint["fit"] == fit and f'fit = "{fit}"' in (tmp_path / "a" / "config.toml").read_text()
    capsys.readouterr()
    call = ["--checkpoint", str(tmp_path / "a" / "best.pt"), "--device", "cpu", "--json"]
    assert predict.cli([*call, "--evaluate", str(tmp_path / "d")]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == 1
    assert predict.cli([*call, str(tmp_path / "d" / "test")]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(answers) == 8 and all(f"{answer['classes'][0]['class']}{os.sep}" in answer["file"] for answer in answers)
    assert model.cli(call[:2]) == 0
    told = {"pad": "8 x 8 pixels, bilinear, padded with grey\n", "squash": "8 x 8 pixels, bilinear, squashed\n"}
    assert told[fit] in capsys.readouterr().out


def test_a_picture_gets_its_top_classes_with_percentages(ask, pictures):
    status, lines, errors = ask(pictures / "a.png")
    name, *guesses = lines[0].split("  ")
    assert (status, len(lines), name, errors) == (0, 1, str(pictures / "a.png"), "")
    assert guesses[0].split()[0] == "red" and len(guesses) == 3
    shares = [float(guess.split()[1].rstrip("%")) for guess in guesses]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=0.2)
    assert ask(pictures / "a.png", "--top-k", 9)[1] == lines  # there are three


@pytest.mark.parametrize("kind", ["file", "picture", "grey picture", "array", "tensor"])
def test_a_notebook_asks_in_one_line(kind, ask, pictures, colour_run):
    path = pictures / "a.png"
    image = {
        "file": path,
        "picture": Image.open(path).convert("RGBA"),
        "grey picture": Image.open(path).convert("L"),
        "array": np.asarray(Image.open(path)),
        "tensor": torch.tensor(np.asarray(Image.open(path))).permute(2, 0, 1),
    }[kind]
    guesses = predict.classify(image, model.load(colour_run / "best.pt"), top_k=2)
    assert len(guesses) == 2 and guesses[0][1] > guesses[1][1]
    if kind != "grey picture":
        printed = [f"{name} {share:.1%}" for name, share in guesses]
        assert ask(path, "--top-k", 2)[1] == ["  ".join([str(path), *printed])]


def test_a_notebook_gets_errors_that_name_what_is_wanted(pictures, monkeypatch):
    with pytest.raises(DataError, match=r"uint8 \(H, W, 3\), not float32 \(32, 32, 3\)"):
        predict.classify(torch.zeros(3, 32, 32))  # and without a run of one's own, by what is in weights/
    with pytest.raises(DataError, match="No such file"):
        predict.classify("nowhere.png")
    monkeypatch.chdir(pictures)
    assert {name for name, _ in predict.classify("a.png", top_k=99)} == set(CLASSES)


def test_folders_are_searched_and_the_order_is_kept(ask, pictures):
    status, lines, _ = ask(pictures / "b.JPG", pictures, "--top-k", 1)
    assert status == 0
    assert [line.split()[:2] for line in lines] == [
        [str(pictures / "b.JPG"), "green"],
        [str(pictures / "a.png"), "red"],
        [str(pictures / "b.JPG"), "green"],
        [str(pictures / "inside" / "c.webp"), "blue"],
    ]


@pytest.mark.parametrize("many", [1000, 5])  # the second starts processes
def test_many_pictures_in_several_batches_get_their_own_answers(ask, tmp_path, monkeypatch, many):
    monkeypatch.setattr(streaming, "BATCH", 4)
    monkeypatch.setattr(streaming, "MANY", many)
    monkeypatch.setattr(streaming, "cores", lambda: 4)
    names = [list(COLOURS)[k % 3] for k in range(11)]
    for number, name in enumerate(names):
        noisy(COLOURS[name], 200 + number).save(tmp_path / f"{number:02}.png")
    (tmp_path / "05b.png").write_text("not a picture")
    status, lines, errors = ask(tmp_path, "--top-k", 1)
    assert [line.split()[1] for line in lines] == names
    assert status == 1 and errors.count("\n") == 1 and "05b.png: not a picture" in errors


def test_the_reasons_belong_to_their_files(ask, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_text("not a picture")
    (tmp_path / "zero.png").write_bytes(b"")
    status, lines, errors = ask(tmp_path / "empty", tmp_path / "broken.png", tmp_path / "zero.png")
    reasons = [line.rpartition(": ")[2] for line in errors.splitlines() if line.startswith("predict.py")]
    assert status == 1 and not lines
    assert reasons == ["no pictures in this folder", "not a picture that Pillow can read", "empty file"]


def test_json_has_an_object_a_line(ask, pictures):
    _, lines, _ = ask("--json", pictures)
    answers = [json.loads(line) for line in lines]
    assert [answer["classes"][0]["class"] for answer in answers] == ["red", "green", "blue"]
    assert sum(guess["probability"] for guess in answers[0]["classes"]) == pytest.approx(1, abs=1e-4)


def test_json_tells_what_has_no_answer(ask, pictures):
    (pictures / "bad.png").write_text("no picture")
    status, lines, errors = ask("--json", "--top-k", 1, pictures / "a.png", pictures / "bad.png")
    [answer, error] = map(json.loads, lines)
    assert status == 1 and answer.keys() == {"file", "classes"} and f"{error['file']}: {error['error']}\n" in errors
    assert error == {"file": str(pictures / "bad.png"), "error": "not a picture that Pillow can read"}


def test_csv_is_a_table_with_a_header(ask, pictures):
    odd = pictures / 'comma, "quote".png'
    noisy(COLOURS["red"], 5).save(odd)
    _, lines, _ = ask("--csv", "--top-k", 2, odd)
    header, row = csv.reader(lines)
    assert header == ["file", "class_1", "probability_1", "class_2", "probability_2"]
    assert row[:2] == [str(odd), "red"] and 1 / 3 < float(row[2]) <= 1


def test_class_names_steer_no_spreadsheet_either(ask, pictures, colour_run, tmp_path):
    checkpoint = read(colour_run / "best.pt")
    save(tmp_path / "odd.pt", checkpoint | {"classes": ["=1+1", "+2", "@red"]})
    _, lines, _ = ask("--csv", pictures / "a.png", "--checkpoint", tmp_path / "odd.pt")
    assert sorted(list(csv.reader(lines))[1][1::2]) == ["'+2", "'=1+1", "'@red"]


@pytest.fixture
def table(ask, tmp_path, monkeypatch):
    """Seven files, one of them bad, a table of which is stopped after the first four; asks for it again."""
    for number in range(7):
        noisy(list(COLOURS.values())[number % 3], number).save(tmp_path / f"{number}.png")
    (tmp_path / "5.png").write_text("no picture")
    of_all, seen = predict.classify_files, []

    def stopped(*inputs, **more):
        for answer in of_all(*inputs, **more):
            if len(seen) == 4:
                raise KeyboardInterrupt
            seen.append(answer.name)
            yield answer

    def counted(*inputs, **more):
        for answer in of_all(*inputs, **more):
            seen.append(answer.name)
            yield answer

    monkeypatch.setattr(predict, "classify_files", stopped)
    status, _, errors = ask(tmp_path, "--csv", tmp_path / "out.csv")
    assert status == 130 and "interrupted; with --csv FILE or --into, the same command goes on from here" in errors
    assert not (tmp_path / "out.csv").exists()
    monkeypatch.setattr(predict, "classify_files", counted)

    def again(*arguments: object) -> tuple[list[str], str, list[str]]:
        """The pictures that were looked at now, what was said of it, and the table."""
        seen.clear()
        status, lines, errors = ask(tmp_path, "--csv", tmp_path / "out.csv", *arguments)
        assert status == 1 and lines == [str(tmp_path / "out.csv")] and not list(tmp_path.glob("*.jsonl"))
        assert errors.endswith(f"predict.py: {tmp_path / '5.png'}: not a picture that Pillow can read\n")
        return [name[-5] for name in seen], errors, (tmp_path / "out.csv").read_text().splitlines()

    return again


def test_a_stopped_table_goes_on(ask, table, tmp_path):
    seen, errors, lines = table()
    assert seen == ["4", "5", "6"] and "out.csv: 4 of 7 files are done already\n" in errors
    assert lines == ask(tmp_path, "--csv")[1] and len(lines) == 7
    assert [row[1] for row in csv.reader(lines[1:])] == [list(COLOURS)[number % 3] for number in (0, 1, 2, 3, 4, 6)]


@pytest.mark.parametrize("what", ["top-k", "tta", "checkpoint", "sure", "pictures"])
def test_answers_of_another_table_are_not_used(what, table, tmp_path, colour_run):
    save(tmp_path / "other.pt", read(colour_run / "best.pt") | {"epoch": 99})
    if what == "pictures":
        noisy(COLOURS["red"], 8).save(tmp_path / "0b.png")
    more = {"top-k": ["--top-k", 1], "tta": ["--tta", "mirror"], "checkpoint": ["--checkpoint", tmp_path / "other.pt"]}
    more["sure"] = ["--sure", "0.9"]
    seen, errors, lines = table(*more.get(what, ()))
    assert len(seen) == 7 + (what == "pictures") and "of another table, done anew" in errors
    assert len(lines) == len(seen)


def test_a_file_of_ones_own_is_not_overwritten_by_answers(ask, pictures):
    (pictures / "out.csv.0.jsonl").write_text("mine")
    status, _, errors = ask(pictures, "--csv", pictures / "out.csv")
    assert status == 1 and errors.splitlines()[-1].endswith("answers are to go there, but it holds something else")
    assert (pictures / "out.csv.0.jsonl").read_text() == "mine" and not (pictures / "out.csv").exists()


def test_what_follows_csv_is_a_file_to_write_or_the_first_picture(ask, pictures):
    table = pictures / "table.CSV"
    _, printed, _ = ask("--csv", pictures)
    assert len(printed) == 4 and not list(pictures.glob("*.CSV"))
    assert ask("--csv", pictures / "b.JPG", pictures / "a.png")[1] == [printed[0], printed[2], printed[1]]
    assert ask("--csv", table, pictures)[1] == [str(table)] and table.read_text().splitlines() == printed
    assert ask(pictures, "--csv", table)[1] == [str(table)] and ask(pictures, "--csv")[1] == printed


def test_standard_input(ask, monkeypatch):
    content = io.BytesIO(as_bytes(noisy(COLOURS["blue"], 7)))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(content))
    status, lines, _ = ask("-")
    assert status == 0 and lines[0].startswith("-  blue ")


def test_pictures_are_prepared_as_in_training(ask, colour_run, colour_folder):
    """The percentages are those of the network on the training code's own batches."""
    path = colour_folder / "test" / "green" / "03.png"
    network, checkpoint = model.load(colour_run / "best.pt")
    [_, test_set] = datasets.load(str(colour_folder), mean=checkpoint["mean"], std=checkpoint["std"])
    batches = (batch.images for batch in test_set.batches(100))
    expected = evaluation.outputs(network, batches, checkpoint["config"]["tta"]).softmax(1)
    _, lines, _ = ask("--json", "--top-k", 3, path)
    answer = {guess["class"]: guess["probability"] for guess in json.loads(lines[0])["classes"]}
    mine = torch.tensor([answer[name] for name in checkpoint["classes"]])
    assert (expected - mine).abs().sum(1).min() < 1e-4


@pytest.mark.parametrize("tta", TTA)
def test_views_of_pictures_can_be_chosen(tta, ask, pictures, colour_run):
    network, checkpoint = model.load(colour_run / "best.pt")
    checkpoint["config"]["tta"] = tta
    expected = dict(predict.classify(pictures / "a.png", (network, checkpoint)))
    [line] = ask("--json", "--tta", tta, pictures / "a.png")[1]
    answer = {guess["class"]: guess["probability"] for guess in json.loads(line)["classes"]}
    assert answer == pytest.approx(expected, abs=1e-5)
    pixels, _ = read_picture(pictures / "a.png", predict.sizing(checkpoint))
    image = torch.tensor(pixels).permute(2, 0, 1)[None]
    with torch.no_grad():
        logits = evaluation.mean_of_views(network, normalize(image, checkpoint["mean"], checkpoint["std"]), tta)
    shares = dict(zip(checkpoint["classes"], logits.softmax(1)[0].tolist(), strict=True))
    assert expected == pytest.approx(shares, abs=1e-5)


def test_networks_that_learned_one_hot_labels_answer_with_them(colour_run, pictures):
    network, checkpoint = model.load(colour_run / "best.pt")
    checkpoint["config"] |= {"loss": "mse", "tta": "none"}
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        logits = network(normalize(images, checkpoint["mean"], checkpoint["std"]))
    found = predict.probabilities(network, checkpoint, images)
    assert torch.allclose(found, losses.probabilities(logits, "mse"), atol=1e-5)


def test_show_explains_each_picture_beside_it(ask, pictures):
    status, lines, errors = ask(pictures, "--show", "--top-k", 2)
    assert status == 0 and len(lines) == 3
    assert f"explained: {pictures / 'a.explained.png'}" in errors.splitlines()
    for name in ("a", "b.JPG", "inside/c.webp"):
        explained = Image.open(pictures / f"{name}.explained.png")
        assert explained.mode == "RGB" and explained.width > 900
        seen = np.asarray(explained)[40:328, 20:308]
        assert (
            np.abs(
                seen[::9, ::9].astype(int).mean((0, 1)) - COLOURS[{"a": "red", "b": "green", "i": "blue"}[name[0]]]
            ).max()
            < 12
        )
    assert len(ask(pictures)[1]) == 3  # explanations are not classified in their turn


def test_the_checkpoints_resize_is_applied(ask, colour_run, tmp_path):
    """The same network, told that its pictures are cut out of a larger middle, sees no rim any more."""
    image = noisy((40, 200, 60), 0, (40, 40))
    image.paste(noisy((220, 40, 30), 1, (40, 15)), (0, 0))
    image.paste(noisy((220, 40, 30), 2, (40, 15)), (0, 25))
    image.save(tmp_path / "a.png")
    checkpoint = read(colour_run / "best.pt")
    shares = []
    for resize in (32, 128):
        save(tmp_path / f"{resize}.pt", checkpoint | {"resize": resize})
        [out] = ask(tmp_path / "a.png", "--json", "--checkpoint", tmp_path / f"{resize}.pt")[1]
        guesses = {guess["class"]: guess["probability"] for guess in json.loads(out)["classes"]}
        shares.append(guesses["green"])
    assert shares[1] > shares[0] + 0.1  # the rim is red, the middle green
    (tmp_path / "data" / "test" / "green").mkdir(parents=True)
    (tmp_path / "a.png").rename(tmp_path / "data" / "test" / "green" / "a.png")
    [out] = ask("--evaluate", tmp_path / "data", "--json", "--checkpoint", tmp_path / "128.pt")[1]
    assert json.loads(out)["loss"] == pytest.approx(-np.log(shares[1]), abs=1e-3)


def test_what_cannot_be_read_is_named_and_the_rest_is_answered(ask, pictures):
    (pictures / "empty.png").write_bytes(b"")
    (pictures / "cut.png").write_bytes((pictures / "a.png").read_bytes()[:500])
    status, lines, errors = ask(
        pictures / "empty.png", pictures / "nowhere.png", pictures / "cut.png", pictures / "a.png"
    )
    assert status == 1 and len(lines) == 1 and lines[0].startswith(str(pictures / "a.png"))
    reasons = [line.removeprefix(f"predict.py: {pictures}/") for line in errors.splitlines()]
    assert reasons[0] == "empty.png: empty file"
    assert reasons[1] == "nowhere.png: No such file or directory"
    assert reasons[2].startswith("cut.png: ") and len(reasons) == 3


def test_pictures_are_sorted_into_a_folder_among_them_which_is_not_asked_about(ask, pictures, monkeypatch):
    monkeypatch.chdir(pictures.parent)
    folder = pictures / "sorted"
    copies = ["green/b.JPG", "red/a.png", "unsure/c.webp"]
    of_all = predict.classify_files

    def doubting(*inputs, **more):
        for found in of_all(*inputs, **more):
            yield found._replace(top=[("blue", 0.5)]) if found.name.endswith("c.webp") else found

    monkeypatch.setattr(predict, "classify_files", doubting)
    for asked in (
        [pictures],
        [pictures],
        pictures.iterdir(),
        [f"{pictures.name}/*"],
        [pictures.resolve() / "inside/.."],
    ):
        status, lines, errors = ask(*asked, "--into", folder, "--sure", 0.51)
        found = [path.relative_to(folder).as_posix() for path in folder.glob("*/*")]
        assert (status, sorted(found)) == (0, copies) and "Traceback" not in errors
        assert "3 copied" in lines[0] or "3 there already" in lines[0]
    assert (folder / "red" / "a.png").read_bytes() == (pictures / "a.png").read_bytes()
    status, lines, _ = ask(folder / "unsure", "--into", folder)  # now without a doubt
    assert status == 0 and lines[0] == "blue 1; 1 copied" and (folder / "blue" / "c.webp").exists()


def test_several_processes_do_not_sort(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert predict.cli(["a.png", "--into", "x"]) == 2
    assert "--into x: one process alone copies; start it without torchrun" in capsys.readouterr().err


def test_an_unsure_class_goes_not_with_sure(ask, pictures, colour_run, tmp_path):
    checkpoint = read(colour_run / "best.pt") | {"classes": ["a", "unsure", "../b"]}
    save(tmp_path / "strange.pt", checkpoint)
    for more, message in ((("--sure", 0.5), "a class 'unsure' itself"), (("--into", "x"), "class '../b' cannot be a")):
        status, lines, errors = ask(pictures / "a.png", "--checkpoint", tmp_path / "strange.pt", *more)
        assert (status, lines) == (1, []) and message in errors and errors.count("\n") == 1


def test_an_empty_folder_is_named(ask, tmp_path):
    status, lines, errors = ask(tmp_path)
    assert (status, lines) == (1, []) and errors == f"predict.py: {tmp_path}: no pictures in this folder\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give pictures or --evaluate DATA, one of them"),
        (["a.png", "--evaluate", "shapes"], "give pictures or --evaluate DATA, one of them"),
        (["a.png", "--top-k", "0"], "--top-k 0: must be at least 1"),
        (["a.png", "--json", "--csv"], "not allowed with argument"),
        (["--evaluate", "shapes", "--csv"], "--csv: an evaluation is printed as text or with --json"),
        (["-", "--csv", "a.csv"], "--csv a.csv: standard input cannot be read again after a stop"),
        (["--evaluate", "shapes", "--show"], "--show: it explains pictures, not an evaluation"),
        (["--evaluate", "shapes", "--top-k", "3"], "--top-k: an evaluation counts the most probable class alone"),
        ([""], "a name is empty"),
        (["--evaluate", ""], "a name is empty"),
        (["a.png", "--checkpoint", ""], "a name is empty"),
        (["a.png", "--csv", ""], "a name is empty"),
        (
            ["a.png", "--csv", "nowhere/a.csv"],
            "--csv nowhere/a.csv: that is a folder, or in a folder that is not there",
        ),
        *(
            (["a.png", "--sure", value], "must be a probability from 0 to 1, such as 0.8")
            for value in ("80", "-0.1", "nan", "inf")
        ),
        (["a.png", "--sure", "80%"], "--sure: invalid float value: '80%'"),
        (["a.png", "--into", ""], "a name is empty"),
        (["--evaluate", "shapes", "--into", "x"], "--into x: an evaluation copies nothing"),
        (["-", "--into", "x"], "--into x: standard input has no name that a copy could get"),
        (
            ["a.png", "--into", "x", "--json"],
            f"--into x: what it says goes into {Path('x/sorted.csv')}; leave --json out",
        ),
        (["a.png", "--into", "x", "--csv"], "leave --csv out"),
        (["--into", "x", "--csv", "a.png"], "leave --csv out"),
        (["a.png", "--into", "x", "--show"], f"--into x: leave --show out; {Path('x/CLASS')} can be asked"),
        (["a.png", "--into", "x", "--top-k", "1"], "--into x: pictures go by the most probable class alone"),
        (["a.png", "--into", __file__], f"--into {__file__}: that is no folder"),
        ([str(ROOT), "--into", f"{ROOT}/quick/.."], "that is the folder asked about itself; give another, such as"),
        (["a.png", "--checkpiont", "x"], "unknown flag --checkpiont; did you mean --checkpoint?"),
        (["a.png", "--device", "cuda:99"], "no device 'cuda:99' here"),
    ],
)
def test_wrong_calls_end_in_one_line_and_status_2(arguments, message, capsys):
    status = predict.cli(arguments)
    output = capsys.readouterr()
    assert status == 2 and message in output.err and output.err.count("\n") == 1 and not output.out


def test_a_missing_or_broken_checkpoint_is_named(tmp_path, capsys):
    assert predict.cli(["a.png", "--checkpoint", str(tmp_path / "no.pt")]) == 1
    assert capsys.readouterr().err == f"predict.py: {tmp_path / 'no.pt'}: no such checkpoint\n"
    (tmp_path / "bad.pt").write_text("hello")
    assert predict.cli(["a.png", "--checkpoint", str(tmp_path / "bad.pt")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"predict.py: {tmp_path / 'bad.pt'}: not a whole checkpoint of train.py")
    assert error.count("\n") == 1


def test_the_newest_run_is_asked_by_default(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("old", "new")):
        (tmp_path / "logs" / name).mkdir(parents=True)
        best = tmp_path / "logs" / name / "best.pt"
        best.write_bytes((run / "best.pt").read_bytes())
        os.utime(best, (1e9 + number, 1e9 + number))
    Image.new("RGB", (32, 32)).save("a.png")
    assert predict.cli(["a.png"]) == 0
    assert "checkpoint: logs/new/best.pt" in capsys.readouterr().err.replace("\\", "/")


def test_the_shipped_weights_serve_where_there_is_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "__file__", str(tmp_path / "predict.py"))
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*: run `python train.py` first"):
        predict.newest_checkpoint(tmp_path / "logs")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "small.pt").write_bytes(b"")
    assert predict.newest_checkpoint(tmp_path / "logs") == tmp_path / "weights" / "small.pt"


def test_the_shipped_weights_are_those_of_the_default_config():
    path = ROOT / "weights" / "cifar_quick.pt"
    network, checkpoint = model.load(path)
    assert path.stat().st_size < 1e6 and sum(p.numel() for p in network.parameters()) == 145_770
    assert checkpoint["classes"] == CLASSES and checkpoint["metrics"]["test_accuracy"] > 0.8
    config = parse_config(Parser(), [])[0]
    wanted = vars(replace(config, lr=fitting_lr(network, config, own=True)))
    differ = {key for key, value in checkpoint["config"].items() if value != wanted[key]}
    assert differ <= {"data", "image_size", "resize", "interpolation", "fit", "levels", "mean", "std", "run_name"}


# ---- names of strangers ----


def test_names_steer_neither_terminals_nor_spreadsheets(ask, tmp_path, monkeypatch):
    names = ["=1+1.png", "+a.png", "-b.png", "@c.png", "d\x1b[2J.png", 'e,"f.png']
    for name in names:
        noisy(COLOURS["red"], 1).save(tmp_path / name)
    (tmp_path / "g\x07.png").write_bytes(b"no picture")
    monkeypatch.chdir(tmp_path)
    status, lines, errors = ask(*names[:2], "./-b.png", *names[3:], "g\x07.png", "--csv")
    assert status == 1 and errors.startswith("predict.py: g\\x07.png: ") and errors[:-1].isprintable()
    cells = [row[0] for row in csv.reader(lines[1:])]
    assert cells == ["'=1+1.png", "'+a.png", "./-b.png", "'@c.png", "d\x1b[2J.png", 'e,"f.png']
    _, lines, _ = ask(tmp_path)
    assert len(lines) == 6 and all(line.isprintable() for line in lines)
    _, lines, _ = ask(tmp_path, "--json")
    assert {json.loads(line)["file"] for line in lines} == {str(tmp_path / name) for name in [*names, "g\x07.png"]}
    assert all(line.isprintable() for line in lines)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no names of other bytes")
def test_a_table_names_the_very_files(ask, tmp_path):
    names = [
        "Screenshot 1.23\u202fPM.png",
        "می\u200cرود.png",
        "cafe\u0301.png",
        "caf\u00e9.png",
        "a\nb.png",
        "caf\udce9.png",
    ]
    for name in [*names, "=1.png", "'=1.png"]:
        noisy(COLOURS["red"], 1).save(os.fsencode(tmp_path / name))
    assert ask(tmp_path, "--csv", tmp_path / "out.csv")[0] == 0
    with (tmp_path / "out.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        found = [row["file"] for row in csv.DictReader(file)]
    assert len(found) == 8 and set(found) == {str(path) for path in tmp_path.glob("*.png")}
    assert {json.loads(line)["file"] for line in ask(tmp_path, "--json")[1]} == set(found)


# ---- answers that are no numbers ----


@pytest.fixture
def overflowing(tmp_path, colour_run) -> Path:
    """A checkpoint whose outputs are finite for a black picture alone."""
    options = {"classes": 3, "image_size": 32, "batch_norm": False, "activation": "none"}
    network = model.create("cifar_quick", options)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0 if parameter.ndim == 1 else 1e12)
    changes = {"model": {"name": "cifar_quick", "options": options}, "state_dict": network.state_dict()}
    save(tmp_path / "large.pt", read(colour_run / "best.pt") | changes | {"mean": [0.0] * 3, "std": [1.0] * 3})
    return tmp_path / "large.pt"


@pytest.mark.parametrize("flags", [[], ["--json"], ["--csv"], ["--csv", "FILE"], ["--show"], ["--tta", "shift"]])
def test_a_picture_with_outputs_that_are_no_numbers_is_named(flags, ask, pictures, overflowing):
    Image.new("RGB", (32, 32)).save(pictures / "black.png")
    table = pictures / "out.csv"
    flags = [str(table) if flag == "FILE" else flag for flag in flags]
    status, lines, errors = ask(pictures / "a.png", pictures / "black.png", "--checkpoint", overflowing, *flags)
    named = f"predict.py: {pictures / 'a.png'}: the network's outputs for it are not finite numbers"
    assert status == 1 and named in errors.splitlines() and errors.count("finite") == 1
    text = table.read_text() if table.exists() else "\n".join(lines)
    assert (
        "black.png" in text and (str(pictures / "a.png") in text) == ("--json" in flags) and "nan" not in text.lower()
    )
    assert "33.3%" in text or "0.333333" in text
    assert not (pictures / "a.explained.png").exists()


def test_a_notebook_is_told_that_outputs_are_no_numbers(pictures, overflowing):
    with pytest.raises(DataError, match="outputs for it are not finite numbers"):
        predict.classify(pictures / "a.png", model.load(overflowing))


def test_an_evaluation_has_numbers_alone(ask, colour_folder, overflowing):
    status, lines, errors = ask("--evaluate", colour_folder, "--json", "--checkpoint", overflowing)
    assert (status, lines) == (
        1,
        [],
    ) and ".png: the network's outputs for it are not finite numbers (18 of 18" in errors


# ---- names that lead nowhere, and what the shell left ----


def test_what_is_no_file_is_named_and_the_rest_is_answered(ask, pictures):
    (pictures / "empty").mkdir()
    strange = ["https://example.org/cat.jpg", "x" * 5000, pictures / "empty", pictures / "*.tiff"]
    status, lines, errors = ask(*strange, pictures / "a.png", pictures / "a.png")
    assert status == 1 and len(lines) == 2 and lines[0] == lines[1]
    reasons = [line.rpartition(": ")[2] for line in errors.splitlines()]
    assert reasons[0] == "an address on the web; download the picture first"
    assert reasons[1:] == ["File name too long", "no pictures in this folder", "No such file or directory"]


def test_patterns_and_the_home_folder_are_filled_in_where_the_shell_did_not(ask, pictures, monkeypatch):
    assert ask(pictures / "*.png")[1] == ask(pictures / "a.png")[1]
    (pictures / "[1].png").write_bytes((pictures / "a.png").read_bytes())
    assert ask(pictures / "[1].png")[0] == 0
    monkeypatch.setenv("HOME", str(pictures))
    monkeypatch.setenv("USERPROFILE", str(pictures))
    assert ask("~/a.png")[1] == ask(pictures / "a.png")[1]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"x", "not a picture that Pillow can read"),
        (b"PK\x03\x04x", "not a picture that Pillow can read; if it is an archive, unpack it first"),
    ],
)
def test_standard_input_that_is_no_picture(content, reason, ask, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert ask("-") == (1, [], f"predict.py: -: {reason}\n")
    monkeypatch.setattr(sys, "stdin", None)  # closed
    assert ask("-") == (1, [], "predict.py: -: empty file\n")


def test_standard_input_without_an_end(ask, monkeypatch):
    monkeypatch.setattr(streaming, "LARGEST_INPUT", 2**20)
    with open("/dev/zero" if os.path.exists("/dev/zero") else os.devnull) as endless:  # noqa: PTH110, PTH123
        monkeypatch.setattr(sys, "stdin", endless)
        status, lines, errors = ask("-")
    assert (status, lines) == (1, []) and errors.startswith("predict.py: -: ") and errors.count("\n") == 1


def test_a_folder_that_takes_no_explanations_is_named_once(ask, pictures):
    noisy(COLOURS["red"], 4).save(pictures / "a2.png")
    (pictures / "a.explained.png").mkdir()  # as if it were read-only, for root too
    status, lines, errors = ask(pictures, "--show", "--top-k", 1)
    assert status == 1 and len(lines) == 4 and (pictures / "inside" / "c.webp.explained.png").exists()
    assert errors.count("no explanations there") == 1 and "a.explained.png: " in errors


@pytest.mark.skipif(sys.platform == "win32", reason="names of 255 characters need a setting there")
def test_a_name_too_long_for_an_explanation_costs_no_other_its_own(ask, pictures):
    noisy(COLOURS["red"], 4).save(pictures / f"a{'x' * 245}.png")
    status, _, errors = ask(pictures, "--show", "--top-k", 1)
    assert status == 1 and errors.count("no explanations there") == 1 and errors.count("explained: ") == 3
    assert f"/a{'x' * 245}.explained.png: File name too long" in errors  # not the file beside it


# ---- evaluation ----


def test_evaluation_gives_the_figures_of_training(run, capsys):
    checkpoint = torch.load(run / "best.pt", weights_only=True)
    assert predict.cli(["--evaluate", "shapes", "--checkpoint", str(run / "best.pt"), "--device", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["accuracy"] == checkpoint["metrics"]["test_accuracy"]
    assert result["loss"] == pytest.approx(checkpoint["metrics"]["test_loss"], abs=1e-5)
    assert (result["split"], result["pictures"]) == ("test", 1000)
    assert [sum(row) for row in result["confusion"]] == [100] * 10
    assert result["classes"]["ring"]["recall"] == result["confusion"][6][6] / 100
    assert result["f1"] == result["means"]["f1"] == checkpoint["metrics"]["test_f1"]
    assert result["balanced_accuracy"] == result["means"]["recall"] == pytest.approx(result["accuracy"])


def test_evaluation_prints_a_table(ask, colour_folder):
    status, lines, _ = ask("--evaluate", colour_folder)
    assert status == 0 and "accuracy 100.0%" in lines[0] and lines[0].endswith("  18 test pictures")
    assert [line.split() for line in lines[3:]] == [
        ["0", "blue", *["100.0%"] * 3, "6", "0", "0"],
        ["1", "green", *["100.0%"] * 3, "0", "6", "0"],
        ["2", "red", *["100.0%"] * 3, "0", "0", "6"],
        ["mean", *["100.0%"] * 3],
    ]
    assert lines[2].split()[:4] == ["class", "recall", "precision", "F1"]
    assert ask("--evaluate", colour_folder / "train")[1][0].endswith("%  60 pictures")  # of no split


def test_evaluation_tells_how_many_are_sure_and_right(ask, colour_folder):
    plain = json.loads(ask("--evaluate", colour_folder, "--json")[1][0])
    everything = json.loads(ask("--evaluate", colour_folder, "--json", "--sure", 0)[1][0])
    assert everything.pop("sure") == {"at_least": 0, "share": 1, "accuracy": plain["accuracy"]} and everything == plain
    lines = ask("--evaluate", colour_folder, "--sure", 0.5)[1]
    assert lines[1:3] == ["sure, 0.5 or more: 100.0% of the pictures, 100.0% of them right", ""]
    logits = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.9, 0.1]]).log()
    scores = evaluation.sure_scores(logits, torch.tensor([0, 1, 1, 1]), "cross_entropy", 0.8)
    assert scores == {"at_least": 0.8, "share": 0.75, "accuracy": 2 / 3}
    assert evaluation.sure_scores(logits, torch.zeros(4).long(), "cross_entropy", 1.0)["accuracy"] is None


def test_classes_are_matched_by_name(ask, tmp_path):
    for name in ("green", "red"):  # other places than in the checkpoint
        (tmp_path / "test" / name).mkdir(parents=True)
        noisy(COLOURS[name], 1).save(tmp_path / "test" / name / "1.png")
    _, lines, _ = ask("--evaluate", tmp_path)
    assert "accuracy 100.0%" in lines[0] and lines[3].split()[:5] == ["0", "blue", "-", "-", "-"]
    assert lines[-1].split() == ["mean", *["100.0%"] * 3]
    [found] = map(json.loads, ask("--evaluate", tmp_path, "--json")[1])
    assert found["classes"]["blue"] == dict.fromkeys(["recall", "precision", "f1"]) and found["means"]["f1"] == 1
    (tmp_path / "test" / "yellow").mkdir()
    noisy((250, 250, 0), 1).save(tmp_path / "test" / "yellow" / "1.png")
    status, _, errors = ask("--evaluate", tmp_path)
    assert status == 1 and "does not know class 'yellow'" in errors


def test_a_folder_is_evaluated_whole_unless_the_network_was_trained_on_it(ask, colour_folder, colour_run, tmp_path):
    def looked_at(folder: Path, checkpoint: Path = colour_run / "best.pt") -> tuple[int, str]:
        status, [line], errors = ask("--evaluate", folder, "--json", "--checkpoint", checkpoint)
        assert status == 0
        return json.loads(line)["pictures"], errors.splitlines()[-1].removeprefix(f"{folder}: ")

    assert looked_at(colour_folder) == (18, "18 test pictures")
    assert looked_at(colour_folder / "test") == (18, "all 18 pictures")
    assert looked_at(colour_folder / "train") == (60, "all 60 pictures")
    checkpoint = read(colour_run / "best.pt")
    unsplit = checkpoint["config"] | {"data": str(colour_folder / "train"), "val_fraction": 0.0}
    save(tmp_path / "unsplit.pt", checkpoint | {"config": unsplit})
    count, words = looked_at(colour_folder / "train", tmp_path / "unsplit.pt")
    assert 3 <= count < 30 and words == f"{count} val pictures"  # as its run calls them
    (tmp_path / "link").symlink_to(colour_folder / "train")
    assert looked_at(tmp_path / "link", tmp_path / "unsplit.pt") == (count, words)
    assert looked_at(colour_folder / "test", tmp_path / "unsplit.pt")[0] == 18
    folds = []
    for fold in (1, 2, 3):
        save(tmp_path / "fold.pt", checkpoint | {"config": unsplit | {"fold": fold, "folds": 3}})
        folds.append(looked_at(colour_folder / "train", tmp_path / "fold.pt")[0])
    assert sum(folds) == 60 and min(folds) > 5
    near = tmp_path / "logs" / "a" / "best.pt"  # of a training that was started in another folder
    near.parent.mkdir(parents=True)
    (tmp_path / "a").symlink_to(colour_folder / "train")
    for name in ("link", "a"):  # the run itself may have the name of the data
        save(near, checkpoint | {"config": unsplit | {"data": name, "log_dir": "logs"}})
        assert looked_at(colour_folder / "train", near) == (count, words)


def test_evaluation_of_nothing(ask):
    assert ask("--evaluate", "nowhere")[0] == 1
