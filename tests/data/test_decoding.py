"""Pictures of every kind, as files: all become RGB squares."""

import io
import os
import sys
import tracemalloc
import types
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, as_bytes, noisy
from PIL import EpsImagePlugin, Image, ImageFile, PngImagePlugin

from quick.data import decoding, sizing
from quick.data.decoding import ENDINGS, read_picture
from quick.data.pictures import normalize
from quick.data.sizing import Sizing
from quick.data.stores import cut_squares
from quick.errors import DataError


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGB", (40, 40), (200, 100, 50)), (200, 100, 50)),
        (Image.new("L", (40, 40), 90), (90, 90, 90)),
        (Image.new("1", (40, 40), 1), (255, 255, 255)),
        (Image.new("I;16", (40, 40), 128 * 257), (128, 128, 128)),
        (Image.new("RGBA", (40, 40), (200, 100, 50, 0)), (255, 255, 255)),
        (Image.new("RGBA", (40, 40), (200, 100, 50, 255)), (200, 100, 50)),
        (Image.new("LA", (40, 40), (10, 0)), (255, 255, 255)),
        (Image.new("RGB", (40, 40), (200, 100, 50)).convert("P", palette=Image.Palette.ADAPTIVE), (200, 100, 50)),
        (Image.new("RGB", (1, 1), (200, 100, 50)), (200, 100, 50)),
        (Image.new("RGB", (8000, 3), (200, 100, 50)), (200, 100, 50)),
    ],
    ids=[
        "rgb",
        "grey",
        "bilevel",
        "grey16",
        "transparent",
        "opaque",
        "grey-alpha",
        "palette",
        "one-pixel",
        "8000-wide",
    ],
)
def test_every_kind_of_png_becomes_rgb(image, expected):
    picture, size = read_picture(io.BytesIO(as_bytes(image)), Sizing(32))
    assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8 and size == image.size
    assert np.abs(picture.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind):
    image = Image.new("CMYK", (50, 50), (0, 255, 255, 0))  # red
    picture, _ = read_picture(io.BytesIO(as_bytes(image, kind)), Sizing(32))
    assert np.abs(picture.astype(int) - (255, 0, 0)).max() <= 3


def test_a_transparent_colour_is_white():
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 100, 50)).save(file, "PNG", transparency=(200, 100, 50))
    assert (read_picture(file, Sizing(32))[0] == 255).all()


@pytest.mark.parametrize("side", [70, 200, 500])
def test_large_jpegs_lose_nothing_by_the_quick_way(side):
    pixels = np.random.RandomState(0).randint(0, 256, (35, 35, 3)).astype(np.uint8)
    file = io.BytesIO(as_bytes(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC), "JPEG"))
    whole, _ = read_picture(Image.open(file).convert("RGB"), Sizing(32))
    quick, _ = read_picture(file, Sizing(32))
    assert np.abs(quick.astype(int) - whole).mean() < 4


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (32, 32), "blue")
    image.paste("red", (0, 0, 32, 16))  # red above blue
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter turn clockwise
    image.save(file, "PNG", exif=exif)
    picture, _ = read_picture(file, Sizing(32))
    assert picture[5, 28].tolist() == [255, 0, 0] and picture[5, 3].tolist() == [0, 0, 255]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "turned"])
def test_jpegs_of_the_very_size_are_read_as_others_are(mode, tmp_path, monkeypatch):
    """These have a quick way, by their names as strings."""
    image, exif = noisy((200, 120, 40), 0), Image.Exif()
    image.paste("blue", (0, 0, 32, 10))
    exif[0x0112] = 6
    if mode == "turned":
        image.save(tmp_path / "a.jpg", exif=exif)
    else:
        image.convert(mode).save(tmp_path / "a.jpg")
    expected, _ = read_picture(tmp_path / "a.jpg", Sizing(32))
    monkeypatch.setattr(Image, "open", Image.open if mode != "RGB" else None)
    picture, size = read_picture(str(tmp_path / "a.jpg"), Sizing(32))
    assert size == (32, 32) and np.array_equal(picture, expected)


@pytest.mark.parametrize("behind", [False, True])
def test_exif_data_behind_the_frame_header_turns_too(behind, tmp_path):
    image = noisy((200, 120, 40), 0)
    image.paste("blue", (0, 0, 32, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    content, block = as_bytes(image, "JPEG"), exif.tobytes()
    block = b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block
    place = content.index(b"\xff\xda" if behind else b"\xff\xdb")
    (tmp_path / "a.jpg").write_bytes(content[:place] + block + content[place:])
    picture, _ = read_picture(str(tmp_path / "a.jpg"), Sizing(32))
    assert np.array_equal(picture, np.rot90(read_picture(io.BytesIO(content), Sizing(32))[0], -1))


def test_a_damaged_exif_block_does_not_spoil_the_picture():
    file = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(file, "PNG", exif=b"nonsense")
    assert read_picture(file, Sizing(32))[0][0, 0].tolist() == [255, 0, 0]


def test_the_centre_square_is_taken_and_resized_smoothly():
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    picture, size = read_picture(io.BytesIO(as_bytes(image)), Sizing(32))
    assert size == (300, 100) and (picture[:, 1:-1] == (0, 0, 255)).all()
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (320, 160)))
    picture, _ = read_picture(io.BytesIO(as_bytes(stripes)), Sizing(32))
    assert np.abs(picture.astype(int) - 127).max() < 10  # aliasing would leave stripes


def photographs() -> list[Image.Image]:
    """A generated photograph, wide and tall, and three real ones where they are at hand."""
    pixels = np.random.RandomState(0).randint(0, 256, (30, 40, 3)).astype(np.uint8)
    wide = Image.fromarray(pixels).resize((400, 301), Image.Resampling.BICUBIC)
    real = sorted((ROOT / "data" / "ants_bees" / "val").glob("*/*.jpg"))[:3]
    return [wide, wide.transpose(Image.Transpose.ROTATE_90), *map(Image.open, real)]


@pytest.mark.parametrize(
    "name", ["vgg16", "efficientnet_b0", "efficientnet_b1", "swin_v2_t", "efficientnet_v2_s", "inception_v3"]
)
def test_pictures_are_prepared_as_imagenet_weights_want_them(name):
    models = pytest.importorskip("torchvision.models")
    transforms = models.get_model_weights(name).DEFAULT.transforms()
    how = Sizing(transforms.crop_size[0], transforms.resize_size[0], transforms.interpolation.value)
    for image in photographs():
        expected = transforms(image.convert("RGB"))
        picture, _ = read_picture(io.BytesIO(as_bytes(image.convert("RGB"))), how)
        batch = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None]
        difference = (normalize(batch, transforms.mean, transforms.std)[0] - expected).abs() * 0.229 * 255
        assert difference.max() < 2.5 and difference.mean() < 0.1  # of 255: roundings alone


@pytest.mark.parametrize(("side", "shorter"), [(32, 32), (33, 33), (75, 75), (224, 256), (299, 342)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_square_is_torchvisions_whatever_is_kept_beside_it(side, shorter, interpolation):
    transforms = pytest.importorskip("torchvision.transforms.v2")
    how = transforms.Compose(
        [transforms.Resize(shorter, transforms.InterpolationMode(interpolation)), transforms.CenterCrop(side)]
    )
    random, sizing = np.random.RandomState(0), Sizing(side, shorter, interpolation)
    for size in ((90, 60), (61, 90), (321, 481), (481, 321), (400, 600), (200, 41), (41, 200), (300, 1000), (33, 32)):
        image = Image.fromarray(random.randint(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        square, _ = read_picture(image, sizing)
        difference = np.abs(square.astype(int) - np.asarray(how(image)))
        assert difference.max() <= 2 and difference.mean() < 0.1, size
        for width in (side + 1, side + side // 3, 2 * side):
            kept, _ = read_picture(image, sizing, width)
            tall = kept.shape[0] > kept.shape[1]
            kept = torch.tensor(kept.swapaxes(0, 1) if tall else kept).permute(2, 0, 1)[None]
            middle = cut_squares(kept, torch.tensor([kept.shape[3]]), torch.tensor([tall]), None)[0].permute(1, 2, 0)
            difference = np.abs(square.astype(int) - middle.numpy())
            assert difference.max() <= 2 and difference.mean() < 0.1, (size, width)


@pytest.mark.parametrize("side", [32, 75])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_padded_and_squashed_pictures_are_torchvisions(side, interpolation):
    transforms = pytest.importorskip("torchvision.transforms.v2")
    how = transforms.InterpolationMode(interpolation)
    random, sizing = np.random.RandomState(0), Sizing(side, 0, interpolation)
    for size in ((90, 60), (61, 90), (20, 33), (400, 41), (32, 32), (900, 2)):
        image = Image.fromarray(random.randint(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        squashed, _ = read_picture(image, sizing._replace(fit="squash"), 2 * side)
        expected = np.asarray(transforms.Resize((side, side), how)(image))
        assert np.abs(squashed.astype(int) - expected).max() <= 1, size
        padded, _ = read_picture(image, sizing._replace(fit="pad"), 2 * side)
        longest = transforms.Resize([max(1, side * pixels // max(size)) for pixels in size[::-1]], how)(image)
        expected = Image.new("RGB", (side, side), (128, 128, 128))
        expected.paste(longest, ((side - longest.width) // 2, (side - longest.height) // 2))
        assert np.abs(padded.astype(int) - np.asarray(expected)).max() <= 1, size


@pytest.mark.parametrize("fit", ["pad", "squash"])
def test_all_of_a_large_turned_jpeg_is_kept(fit, tmp_path):
    """It is decoded at a fraction of its size. Red stands at its left edge and blue at its right one, then turned."""
    image, exif = Image.new("RGB", (903, 301), "white"), Image.Exif()
    image.paste("red", (0, 0, 90, 301))
    image.paste("blue", (813, 0, 903, 301))
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", quality=95, exif=exif)
    image.save(tmp_path / "a.png", exif=exif)
    jpeg, png = (
        read_picture(str(tmp_path / f"a.{kind}"), Sizing(30, fit=fit))[0].astype(int) for kind in ("jpg", "png")
    )
    assert np.abs(jpeg - png).mean() < 4 and jpeg.shape == (30, 30, 3)
    assert np.abs(jpeg[0, 15] - (255, 0, 0)).max() < 10 and np.abs(jpeg[29, 15] - (0, 0, 255)).max() < 10
    beside = (128, 128, 128) if fit == "pad" else (255, 255, 255)
    assert np.abs(jpeg[15, 2] - beside).max() < 3
    crop, _ = read_picture(str(tmp_path / "a.jpg"), Sizing(30))
    assert np.abs(crop.astype(int) - 255).max() < 10  # which loses both


def test_transparent_and_grey_pictures_are_padded_too():
    clear = Image.new("RGBA", (40, 20), (200, 100, 50, 0))
    for image, colour in ((clear, 255), (Image.new("L", (40, 20), 90), 90), (Image.new("I;16", (40, 20)), 0)):
        picture, _ = read_picture(image, Sizing(20, fit="pad"))
        assert (picture[:5] == 128).all() and (picture[15:] == 128).all() and (picture[5:15] == colour).all()


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_jpeg_decoded_at_a_fraction_is_cut_where_the_same_png_is(turn, tmp_path):
    """Its last column and row are parts of pixels then, which lie at the other end once it is turned."""
    exif = Image.Exif()
    exif[0x0112] = turn
    for size in ((274, 264), (263, 353), (515, 301)):
        across, down = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
        image = Image.fromarray(np.stack([across, down, 0 * down], 2).round().astype(np.uint8))
        image.save(tmp_path / "a.jpg", quality=100, subsampling=0, exif=exif)
        image.save(tmp_path / "a.png", exif=exif)
        for side in (32, 64):
            jpeg, png = (
                read_picture(str(tmp_path / f"a.{kind}"), Sizing(side))[0].astype(int) for kind in ("jpg", "png")
            )
            shift = (jpeg - png)[..., :2].mean((0, 1)) / (255 / side * min(size) / max(size))
            assert np.abs(shift).max() < 0.1, (size, side)  # of a pixel


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("kind", ["RGB", "RGBA", "L", "I;16", "large JPEG", "turned JPEG"])
def test_pytorch_resizes_as_pillow_does(fit, interpolation, kind, tmp_path, monkeypatch):
    """To one of 255; also at the edges, of wide and tall pictures, and of what training keeps beside the square."""
    pixels = np.random.RandomState(0).randint(0, 256, (14, 18, 4)).astype(np.uint8)
    image, exif = Image.fromarray(pixels).resize((181, 135), Image.Resampling.BILINEAR), Image.Exif()
    exif[0x0112] = 6
    if kind == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 16)
    name = "a.jpg" if "JPEG" in kind else "a.png"
    image = (
        image.convert("RGB").resize((477, 359)) if "JPEG" in kind else image.convert(kind) if kind != "I;16" else image
    )
    ways, used = [], []
    resized_by_torch = sizing.resized_by_torch
    monkeypatch.setattr(sizing, "resized_by_torch", lambda *given: used.append(1) or resized_by_torch(*given))
    for is_faster in (False, True):
        monkeypatch.setattr(sizing, "IS_FASTER", is_faster)
        found = []
        for turned in (image, image.transpose(Image.Transpose.ROTATE_90)):
            turned.save(tmp_path / name, **({"exif": exif} if kind == "turned JPEG" else {}))
            for side, width in ((64, 0), (64, 128), (33, 0), (101, 0)):
                how = Sizing(side, side + 20 * (fit == "crop"), interpolation, (0, 4095), fit)
                found.append(read_picture(str(tmp_path / name), how, width)[0].astype(int))
        ways.append(found)
    assert all(a.shape == b.shape and abs(a - b).max() <= 1 for a, b in zip(*ways, strict=True))
    assert used or kind not in ("RGB", "large JPEG")
    for plain, wide in (ways[1][:2], ways[1][4:6]):  # prediction sees the very pixels of training
        first = [(full - 64) // 2 for full in wide.shape[:2]]
        if used and fit == "crop" and all((full - 64) % 2 == 0 for full in wide.shape[:2]):
            assert np.array_equal(plain, wide[first[0] : first[0] + 64, first[1] : first[1] + 64])


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "transparent", "text", "interlaced", "turned", "damaged"])
def test_pngs_of_the_very_size_are_read_as_others_are(mode, tmp_path, monkeypatch):
    """These have a quick way, by their names as strings; what is turned, transparent or damaged is not for it."""
    image, exif, text = noisy((200, 120, 40), 0), Image.Exif(), PngImagePlugin.PngInfo()
    image.paste("blue", (0, 0, 32, 10))
    exif[0x0112] = 6
    text.add_text("Comment", "none")
    how = {"turned": {"exif": exif}, "transparent": {"transparency": (0, 0, 255)}, "text": {"pnginfo": text}}
    path = tmp_path / "a.png"
    (image.convert(mode) if mode in ("L", "RGBA", "P") else image).save(path, **how.get(mode, {}))
    content = path.read_bytes()
    if mode == "interlaced":  # as its header says, and what follows is not
        content = content[:28] + b"\x01" + zlib.crc32(content[12:28] + b"\x01").to_bytes(4, "big") + content[33:]
    content = content[:-600] + b"nonsense" * 70 if mode == "damaged" else content
    path.write_bytes(content)
    opened = []
    open_picture = decoding.open_picture
    monkeypatch.setattr(decoding, "open_picture", lambda source: opened.append(1) or open_picture(source))
    found = []
    for source in (path, str(path)):
        try:
            found.append(read_picture(source, Sizing(32))[0].tolist())
        except DataError as error:
            found.append(str(error))
    assert found[0] == found[1] and len(opened) == (1 if mode == "RGB" else 2)


def test_without_a_resize_nothing_of_the_shorter_side_is_lost():
    image = Image.new("RGB", (90, 60), "blue")
    image.paste("red", (0, 0, 90, 6))
    whole, _ = read_picture(io.BytesIO(as_bytes(image)), Sizing(20))
    middle, _ = read_picture(io.BytesIO(as_bytes(image)), Sizing(20, 30))
    assert whole[0, 10].tolist() == [255, 0, 0] and middle[0, 10].tolist() == [0, 0, 255]
    fits, _ = read_picture(io.BytesIO(as_bytes(image.crop((0, 4, 20, 24)))), Sizing(20, 30))
    assert fits[0, 10].tolist() == [0, 0, 255]  # also where the file has the side already


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "not a picture"), (b"hello", "not a picture"), (as_bytes(noisy((9, 9, 9), 0))[:900], "truncated")],
)
def test_what_is_no_picture_is_refused_with_a_reason(content, reason):
    with pytest.raises(DataError, match=reason):
        read_picture(io.BytesIO(content), Sizing(32))


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    for kind in ("gif", "webp", "png", "tif"):
        frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], duration=100, lossless=True)
        picture, _ = read_picture(tmp_path / f"a.{kind}", Sizing(32))
        assert np.abs(picture[16, 16].astype(int) - (255, 0, 0)).max() <= 2, kind


# ---- what is opened ----


def test_every_ending_that_is_looked_for_can_be_read(tmp_path):
    for ending in set(ENDINGS) - {".heic", ".heif"}:
        image = Image.new("1" if ending == ".pbm" else "L" if ending == ".pgm" else "RGB", (40, 40), 1)
        image.save(tmp_path / f"a{ending}", "JPEG" if ending == ".jfif" else None)
        assert read_picture(str(tmp_path / f"a{ending}"), Sizing(32))[1] == (40, 40)


def test_a_program_with_a_pictures_name_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin.EpsImageFile, "load", lambda *_: pytest.fail("PostScript was run"))
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n{ } loop\n%%EOF\n"
    for name in ("a.jpg", "a.eps"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="not a picture"):
            read_picture(str(tmp_path / name), Sizing(32))


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400)


def test_a_phones_heic_is_called_that_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # not installed
    (tmp_path / "a.jpg").write_bytes(HEIC)
    for source in (str(tmp_path / "a.jpg"), io.BytesIO(HEIC)):
        with pytest.raises(DataError, match=r"HEIC .* `pip install pillow-heif`"):
            read_picture(source, Sizing(32))


def test_heic_is_read_where_its_reader_is_installed(tmp_path, monkeypatch):
    class Reader(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self) -> None:
            self._mode, self._size = "RGB", (40, 30)

        def load(self) -> None:
            self.im = Image.new("RGB", self.size, "red").im

    def register_heif_opener() -> None:
        Image.register_open("HEIF", Reader, lambda start: start[4:12] == b"ftypheic")

    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=register_heif_opener))
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    (tmp_path / "a.jpg").write_bytes(HEIC)
    picture, size = read_picture(str(tmp_path / "a.jpg"), Sizing(32))
    assert size == (40, 30) and (picture == (255, 0, 0)).all()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes with names")
def test_pipes_and_devices_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").symlink_to("/dev/zero")
    for name in "ab":
        with pytest.raises(DataError, match="not a regular file"):
            read_picture(str(tmp_path / f"{name}.jpg"), Sizing(32))


def test_only_the_beginning_of_a_large_file_is_looked_at(tmp_path):
    small = as_bytes(noisy((200, 120, 40), 0), "JPEG")
    with (tmp_path / "a.jpg").open("wb") as file:
        file.write(small)
        file.truncate(2**26)
    tracemalloc.start()
    picture, _ = read_picture(str(tmp_path / "a.jpg"), Sizing(32))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(picture, read_picture(io.BytesIO(small), Sizing(32))[0]) and peak < 2**20
