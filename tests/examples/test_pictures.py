"""Pictures of every kind that people have, and the ways in which tables name them."""

from __future__ import annotations

import io
import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps, features
from tabular_image.data import Samples
from tabular_image.data.decoding import read_image
from tabular_image.data.identity import fingerprinted
from tabular_image.data.images import in_memory, pixels, square_image, unidentified_images, without
from tabular_image.data.picture_files import find_pictures
from tabular_image.errors import ImageError, InputError

NAN, INF = float("nan"), float("inf")
BLACK, WHITE, GROUND = (0, 0, 0), (255, 255, 255), (128, 128, 128)


def line(values: list[object], dtype: str) -> Image.Image:
    """A picture of one line."""
    return Image.fromarray(np.array([values], dtype=dtype))


def mode(kind: str, *colours: object) -> Image.Image:
    """A picture of one line in a mode of Pillow."""
    image = Image.new(kind, (len(colours), 1))
    for place, colour in enumerate(colours):
        image.putpixel((place, 0), colour)
    return image


def palette(*colours: tuple[int, int, int]) -> Image.Image:
    """A picture of one line with a palette, each colour once."""
    image = mode("P", *range(len(colours)))
    image.putpalette([level for colour in colours for level in colour])
    return image


def retag(path: Path, tag: int, value: int) -> None:
    """Changes a tag of a TIFF to what Pillow does not write."""
    entry = struct.pack("<HHI", tag, 3, 1)
    content = bytearray(path.read_bytes())
    at = content.index(entry) + len(entry)
    content[at : at + 2] = value.to_bytes(2, "little")
    path.write_bytes(content)


SIGNED = {"tiffinfo": {339: 2}}
DEEP = {
    "8 bits in 16": (line([0, 100, 255], "u2"), ".png", {}, [0, 100, 255]),
    "10 bits in 16": (line([0, 512, 1023], "u2"), ".png", {}, [0, 128, 255]),
    "12 bits in 16": (line([0, 2048, 4095], "u2"), ".png", {}, [0, 128, 255]),
    "14 bits in 16": (line([0, 8192, 16383], "u2"), ".tif", {}, [0, 128, 255]),
    "16 bits": (line([0, 257, 32896, 65535], "u2"), ".png", {}, [0, 1, 128, 255]),
    "16 bits, packed": (line([0, 32896, 65535], "u2"), ".tif", {"compression": "tiff_lzw"}, [0, 128, 255]),
    "16 bits, high byte first": (mode("I;16B", 0, 32896, 65535), ".tif", {}, [0, 128, 255]),
    "16 bits, transparent 0": (line([0, 1285, 65535], "u2"), ".png", {"transparency": 0}, [128, 5, 255]),
    "16 bits, PGM": (line([0, 32896, 65535], "u2"), ".pgm", {}, [0, 128, 255]),
    "16 bits, JPEG 2000": (line([0, 32896, 65535], "u2"), ".jp2", {}, [0, 128, 255]),
    "24 bits": (line([0, 2**23, 2**24 - 1], "i4"), ".tif", {}, [0, 128, 255]),
    "31 bits": (line([0, 2**30, 2**31 - 1], "i4"), ".tif", {}, [0, 64, 127]),
    "signed 8 bits": (line([0x80, 0, 0x7F], "u1"), ".tif", SIGNED, [0, 128, 255]),
    "signed 16 bits": (line([2**16 - 1000, 2**16 - 500, 1000], "u2"), ".tif", SIGNED, [0, 64, 255]),
    "signed 16 bits, none below 0": (line([0, 2048, 4095], "u2"), ".tif", SIGNED, [0, 128, 255]),
    "signed 32 bits": (line([-100_000, -50_000, 100_000], "i4"), ".tif", {}, [0, 64, 255]),
    "signed, one value": (line([-3, -3], "i4"), ".tif", {}, [0, 0]),
    "floats of 0 to 1": (line([0, 0.25, 1], "f4"), ".tif", {}, [0, 64, 255]),
    "floats of less than 0 to 1": (line([0.2, 0.4], "f4"), ".tif", {}, [51, 102]),
    "floats of 0 to 255": (line([0, 100.4, 200], "f4"), ".tif", {}, [0, 100, 200]),
    "floats of 0 to little more than 1": (line([0, 0.255, 1.02], "f4"), ".tif", {}, [0, 64, 255]),
    "floats below 0": (line([-1, 0, 3], "f4"), ".tif", {}, [0, 64, 255]),
    "floats of a depth": (line([0, 250, 1000], "f4"), ".tif", {}, [0, 64, 255]),
    "floats, enormous": (line([-3e38, -1.5e38, 3e38], "f4"), ".tif", {}, [0, 64, 255]),
    "floats, not finite": (line([NAN, INF, -INF, 0.2, 1], "f4"), ".tif", {}, [51, 51, 51, 51, 255]),
    "floats, one small value": (line([0.2, 0.2], "f4"), ".tif", {}, [51, 51]),
    "floats, one large value": (line([1000, 1000], "f4"), ".tif", {}, [0, 0]),
    "floats, all 0": (line([0, 0], "f4"), ".tif", {}, [0, 0]),
    "floats, one pixel": (line([-7], "f4"), ".tif", {}, [0]),
    "floats, PFM": (line([0, 0.25, 1], "f4"), ".pfm", {}, [0, 64, 255]),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_pictures_use_all_levels(tmp_path: Path, kind: str):
    image, extension, options, levels = DEEP[kind]
    path = tmp_path / f"picture{extension}"
    image.save(path, **options)
    assert np.asarray(read_image(path, grey=True)).tolist() == [levels]
    assert np.asarray(read_image(path, grey=False)).tolist() == [[[level] * 3 for level in levels]]


@pytest.mark.parametrize(
    ("values", "dtype", "tag", "value", "levels"),
    [
        ([0, 2**31 - 2**32, -1], "i4", 339, 1, [0, 128, 255]),  # unsigned 32 bits
        ([0, 32896, 65535], "u2", 262, 0, [255, 127, 0]),  # white is 0
        ([0, 100, 255], "u1", 262, 0, [255, 155, 0]),
        ([0, 0.25, 1], "f4", 262, 0, [255, 191, 0]),
    ],
)
def test_kinds_of_tiff_that_pillow_does_not_write(
    tmp_path: Path, values: list[float], dtype: str, tag: int, value: int, levels: list[int]
):
    line(values, dtype).save(tmp_path / "picture.tif")
    retag(tmp_path / "picture.tif", tag, value)
    assert np.asarray(read_image(tmp_path / "picture.tif", grey=True)).tolist() == [levels]


RED, CLEAR = (255, 0, 0), {"transparency": 0}
COLOURS = {
    "1 bit": (mode("1", 0, 255), ".png", {}, [BLACK, WHITE]),
    "grey": (mode("L", 0, 128), ".bmp", {}, [BLACK, GROUND]),
    "palette": (palette(RED, WHITE), ".png", {}, [RED, WHITE]),
    "RGB": (mode("RGB", RED, WHITE), ".bmp", {}, [RED, WHITE]),
    "CMYK": (mode("CMYK", (0, 255, 255, 0), (0, 0, 0, 255)), ".tif", {}, [RED, BLACK]),
    "CMYK, JPEG": (Image.new("CMYK", (2, 1), (0, 255, 255, 0)), ".jpg", {"quality": 100}, [RED] * 2),
    "YCbCr": (mode("YCbCr", (0, 128, 128), (255, 128, 128)), ".tif", {}, [BLACK, WHITE]),
    "black on transparency": (mode("RGBA", (0, 0, 0, 0), (0, 0, 0, 255)), ".png", {}, [GROUND, BLACK]),
    "white on transparency": (mode("RGBA", (9, 9, 9, 0), (255, 255, 255, 255)), ".png", {}, [GROUND, WHITE]),
    "half transparent": (mode("RGBA", (255, 0, 0, 128)), ".png", {}, [(192, 64, 64)]),
    "opaque": (mode("RGBA", (1, 2, 3, 255), (250, 7, 9, 255)), ".png", {}, [(1, 2, 3), (250, 7, 9)]),
    "WebP": (mode("RGBA", (0, 0, 0, 0), (0, 0, 0, 255)), ".webp", {"lossless": True}, [GROUND, BLACK]),
    "TIFF": (mode("RGBA", (0, 0, 0, 0), (0, 0, 0, 255)), ".tif", {}, [GROUND, BLACK]),
    "icon": (mode("RGBA", *[(0, 0, 0, 0)] * 16).resize((16, 16)), ".ico", {"sizes": [(16, 16)]}, [GROUND] * 16),
    "grey, transparent": (mode("LA", (0, 0), (0, 255), (255, 255)), ".png", {}, [GROUND, BLACK, WHITE]),
    "grey, one value transparent": (mode("L", 0, 1, 255), ".png", CLEAR, [GROUND, (1, 1, 1), WHITE]),
    "1 bit, one value transparent": (mode("1", 0, 255), ".png", CLEAR, [GROUND, WHITE]),
    "RGB, one colour transparent": (mode("RGB", RED, BLACK), ".png", {"transparency": RED}, [GROUND, BLACK]),
    "palette, one colour transparent": (palette(RED, BLACK), ".png", CLEAR, [GROUND, BLACK]),
    "palette, several transparent": (
        palette(RED, BLACK, WHITE),
        ".png",
        {"transparency": b"\x00\xff\x80"},
        [GROUND, BLACK, (192, 192, 192)],
    ),
    "GIF": (palette(RED, BLACK), ".gif", CLEAR, [GROUND, BLACK]),
}


@pytest.mark.parametrize("kind", COLOURS)
def test_colours_and_transparency(tmp_path: Path, kind: str):
    image, extension, options, colours = COLOURS[kind]
    path = tmp_path / f"picture{extension}"
    image.save(path, **options)
    found = read_image(path, grey=False)
    assert found.mode == "RGB"
    assert np.asarray(found)[0].tolist() == [list(colour) for colour in colours]
    grey = np.asarray(read_image(path, grey=True))[0]
    np.testing.assert_allclose(grey, np.array(colours) @ [0.299, 0.587, 0.114], atol=1)


def test_grey_multiplied_by_its_transparency(tmp_path: Path):
    mode("LA", (0, 0), (0, 255), (255, 255)).save(tmp_path / "picture.tif")
    retag(tmp_path / "picture.tif", 338, 1)
    assert np.asarray(read_image(tmp_path / "picture.tif", grey=True)).tolist() == [[128, 0, 255]]


@pytest.mark.skipif(not features.check("littlecms2"), reason="this Pillow cannot convert LAB")
def test_lab_is_converted(tmp_path: Path):
    mode("LAB", (0, 128, 128), (255, 128, 128)).save(tmp_path / "picture.tif")
    np.testing.assert_allclose(read_image(tmp_path / "picture.tif", grey=True), [[0, 255]], atol=2)


def test_sixteen_bits_of_colour_are_not_black(tmp_path: Path):
    """A PNG of 16 bits a channel, written by hand since Pillow writes none."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    data = zlib.compress(b"\0" + struct.pack(">6H", 65535, 0, 32896, 0, 257, 514))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    assert np.asarray(read_image(tmp_path / "a.png", grey=False)).tolist() == [[[255, 0, 128], [0, 1, 2]]]


@pytest.mark.parametrize("extension", [".gif", ".tif", ".webp", ".png"])
def test_of_several_frames_the_first_is_read(tmp_path: Path, extension: str):
    options = {"lossless": True} if extension == ".webp" else {}
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, WHITE, BLACK)]
    frames[0].save(tmp_path / f"a{extension}", save_all=True, append_images=frames[1:], **options)
    assert read_image(tmp_path / f"a{extension}", grey=False).getcolors() == [(16, RED)]


@pytest.mark.parametrize("extension", [".png", ".tif"])
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_pictures_are_turned_upright(tmp_path: Path, extension: str, dtype: str):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    top = 255 if dtype == "u1" else 65535
    Image.fromarray(np.array([[0, top, top], [0, 0, top]], dtype)).save(tmp_path / f"a{extension}", exif=exif)
    upright = [[0, 0], [0, 255], [255, 255]]
    assert np.asarray(read_image(tmp_path / f"a{extension}", grey=True)).tolist() == upright


# Rows of pictures


def rows_of(images: list[tuple[Path | None, ...]], **changes: object) -> Samples:
    count = len(images)
    samples = Samples(
        name="made",
        images=images,
        table=pd.DataFrame({"size": range(count)}),
        numeric=["size"],
        categorical=[],
        target=pd.Series(["a", "b"] * count)[:count],
        ids=pd.Series(range(count), name="id"),
        grey=True,
        image_size=8,
    )
    return replace(samples, **changes)  # type: ignore[arg-type]


def save(path: Path, value: int = 100, size: tuple[int, int] = (4, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)
    return path


@pytest.mark.parametrize("size", [(12, 7), (7, 12), (9, 9), (1, 1), (3, 200), (64, 63), (8, 8)])
@pytest.mark.parametrize("side", [8, 11])
def test_shapes_are_kept_as_pillow_keeps_them(tmp_path: Path, size: tuple[int, int], side: int):
    noise = np.random.default_rng(0).integers(1, 255, (size[1], size[0]), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    found = square_image(rows_of([(tmp_path / "a.png",)]), 0, side)
    if min(size) / max(size) * side >= 0.5:
        assert np.array_equal(found, ImageOps.pad(Image.fromarray(noise), (side, side)))
    assert np.asarray(found).any()


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (2, 1000)])
def test_of_a_thin_picture_a_line_is_left(tmp_path: Path, size: tuple[int, int]):
    found = np.asarray(square_image(rows_of([(save(tmp_path / "a.png", 200, size),)]), 0, 8))
    assert (found == 200).sum() == 8
    assert (found == 0).sum() == 56


def both_ways(samples: Samples, size: int = 8) -> list[dict[int, str]]:
    """What is told of rows when they are decoded at the start, and when they are decoded in a batch."""
    return [in_memory(samples, size, threads=2)[1], pixels(samples, np.arange(len(samples)), size)[1]]


def test_rows_without_a_picture_are_told_and_skipped(tmp_path: Path):
    good = save(tmp_path / "a.png")
    samples = rows_of([(good,), (), (None, None), (None, good), (tmp_path / "none.png",)])
    expected = {
        1: "made, id 1: no image is named",
        2: "made, id 2: no image is named",
        4: f"made, id 4: image {tmp_path / 'none.png'} does not exist",
    }
    for problems in [unidentified_images(samples, threads=2), *both_ways(samples)]:
        assert problems == expected
        assert without(samples, problems, skip=True).ids.tolist() == [0, 3]
        with pytest.raises(InputError, match=r"id 1: no image is named.*readable image.*--skip_corrupt true"):
            without(samples, problems, skip=False)


def test_a_place_left_blank_stays_black(tmp_path: Path):
    front, back = save(tmp_path / "front.png", 100), save(tmp_path / "back.png", 200)
    samples = rows_of([(front, back), (None, back), (front, None), (front,)])
    corners = [
        [square_image(samples, row, 8).getpixel(at) for at in ((1, 1), (5, 1), (1, 5), (5, 5))] for row in range(4)
    ]
    assert corners == [[100, 200, 0, 0], [0, 200, 0, 0], [100, 0, 0, 0], [100] * 4]


def test_a_row_without_a_picture_has_no_fingerprint_and_places_count(tmp_path: Path):
    a, b, gone = save(tmp_path / "a.png"), save(tmp_path / "b.png", 7), tmp_path / ("x" * 300)
    found = fingerprinted(rows_of([(), (None, None), (gone,), (tmp_path / "\0",), (None, gone), (a, b)])).fingerprints
    assert found is not None
    assert found.tolist()[:5] == [0] * 5
    numbers = fingerprinted(rows_of([(a, b), (b, a), (None, a), (a, None), (a,)])).fingerprints
    assert numbers is not None
    assert len(set(numbers.tolist())) == 5
    assert numbers[0] == found[5]


def test_a_square_too_small_for_its_tiles_is_one_sentence(tmp_path: Path):
    samples = rows_of([(save(tmp_path / "a.png"),) * 5])
    for problems in both_ways(samples, size=2):
        assert problems == {0: "made, id 0: 5 images do not fit into 2 x 2 pixels; give an --image_size of at least 3"}
    assert both_ways(samples, size=3) == [{}, {}]


def broken(path: Path, kind: str) -> None:
    """Writes a file that is no picture, or none that can be read."""
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "TIFF" if "TIFF" in kind else "JPEG" if "JPEG" in kind else "PNG")
    match kind:
        case "empty":
            path.touch()
        case "text":
            path.write_text("no picture")
        case "folder":
            path.mkdir()
        case "HEIC":
            path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(16))
        case "no finite value":
            line([NAN, INF], "f4").save(path, "TIFF")
        case "TIFF, 64 bits":
            line([0, 1], "f4").save(path, "TIFF")
            retag(path, 258, 64)
        case "PNG, wrong checksum":
            path.write_bytes(whole.getvalue()[:60] + b"\xff\0\xff" + whole.getvalue()[63:])
        case _:
            path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("empty", "not an image"),
        ("text", "not an image"),
        ("folder", "Is a directory"),
        ("HEIC", "a HEIC picture or a film, which Pillow cannot open; save the picture as JPEG"),
        ("no finite value", "no pixel has a finite value"),
        ("TIFF, 64 bits", "a depth that Pillow cannot open; save the picture with 8 or 16 bits"),
        ("PNG, wrong checksum", ""),
        ("half a PNG", "truncated"),
        ("half a JPEG", "truncated"),
        ("half a TIFF", ""),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, kind: str, reason: str):
    path = tmp_path / "picture"
    broken(path, kind)
    for problems in both_ways(rows_of([(path,)])):
        assert problems[0].startswith(f"made, id 0: cannot read image {path} (")
        assert reason in problems[0]
        assert "\n" not in problems[0]


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "a\0b.png"])
def test_names_that_no_file_can_have_are_one_sentence(tmp_path: Path, name: str):
    for problems in [*both_ways(rows_of([(tmp_path / name,)])), unidentified_images(rows_of([(tmp_path / name,)]), 1)]:
        assert problems[0].startswith("made, id 0: cannot read image ")


def test_a_large_picture_is_read_and_one_too_large_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Pillow warns of the first and refuses the second; warnings are errors here."""
    samples = rows_of([(save(tmp_path / "a.png", size=(10, 15)),), (save(tmp_path / "b.png", size=(10, 21)),)])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for problems in [*both_ways(samples), unidentified_images(samples, 2)]:
        assert list(problems) == [1]
        assert "210 pixels" in problems[1]


def test_a_picture_with_broken_metadata_is_read(tmp_path: Path):
    for name, exif in (("a", b"Exif\0\0no TIFF"), ("b", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"), ("c", b"Exif\0\0")):
        Image.new("L", (8, 8), 100).save(tmp_path / f"{name}.jpg", exif=exif)
    samples = rows_of([(tmp_path / f"{name}.jpg",) for name in "abc"])
    for problems in both_ways(samples):
        assert problems == {}


# Names of pictures


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in (
        "1.jpg", "2.png", "two words.png", "two.png", "words.png", "a,b.png", "a|b;c.png", "[x].png", "scan.01.tif",
        "deep/3.jpg", "deep/4.JPG", "deep/c d.png", "deep/ä.png", "it's.png", "same.jpg", "same.png", "50%.png",
        "back\\slash.png",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "1.txt").touch()
    (tmp_path / "1.pdf").touch()
    (tmp_path / "2.jpg").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("cell", "names"),
    [
        ("1.jpg", ["1.jpg"]),
        (" 1.jpg ", ["1.jpg"]),
        ("", []),
        ("  ", []),
        ("deep/3.jpg", ["deep/3.jpg"]),
        ("deep/../1.jpg", ["deep/../1.jpg"]),
        ("deep\\3.jpg", ["deep/3.jpg"]),
        (".\\deep\\3", ["deep/3.jpg"]),
        ("back\\slash.png", ["back\\slash.png"]),
        # looked up
        ("1", ["1.jpg"]),
        ("2", ["2.png"]),
        ("deep/4", ["deep/4.JPG"]),
        ("1.JPG", ["1.jpg"]),
        ("deep/4.jpg", ["deep/4.JPG"]),
        ("scan.01", ["scan.01.tif"]),
        ("two words", ["two words.png"]),
        ("1.png", ["1.png"]),
        ("2.PNG", ["2.png"]),
        # signs in a name
        ("two words.png", ["two words.png"]),
        ("a,b.png", ["a,b.png"]),
        ("a|b;c.png", ["a|b;c.png"]),
        ("[x].png", ["[x].png"]),
        ("50%.png", ["50%.png"]),
        # several
        ('["1.jpg", "deep/3.jpg"]', ["1.jpg", "deep/3.jpg"]),
        ("['1.jpg','deep/3.jpg']", ["1.jpg", "deep/3.jpg"]),
        ("['1.jpg', \"it's.png\"]", ["1.jpg", "it's.png"]),
        ("['1.jpg' 'deep/3.jpg']", ["1.jpg", "deep/3.jpg"]),
        ("['deep\\3.jpg', '1']", ["deep/3.jpg", "1.jpg"]),
        ("['deep\\\\3.jpg']", ["deep/3.jpg"]),
        ('["deep/\\u00e4.png"]', ["deep/ä.png"]),
        ('["1.jpg", null, "", "none.png"]', ["1.jpg", "none.png"]),
        ("[1, 2]", ["1.jpg", "2.png"]),
        ("[]", []),
        ("1.jpg|deep/3.jpg", ["1.jpg", "deep/3.jpg"]),
        ("1.jpg; 2 ;", ["1.jpg", "2.png"]),
        ("1.jpg|none.png", ["1.jpg", "none.png"]),
        ("a,b.png|two words.png", ["a,b.png", "two words.png"]),
        ("1.jpg, deep/3.jpg", ["1.jpg", "deep/3.jpg"]),
        ("1.jpg,", ["1.jpg"]),
        ("1,two words", ["1.jpg", "two words.png"]),
        ("1.jpg deep/3.jpg\n2", ["1.jpg", "deep/3.jpg", "2.png"]),
        ("1.jpg, none.png", ["1.jpg, none.png"]),
        ("1.jpg none.png", ["1.jpg none.png"]),
        # missing
        ("none.png", ["none.png"]),
        ("none", ["none"]),
        (",", [","]),
        ("nowhere/1", ["nowhere/1"]),
        ("deep", ["deep"]),
        ("[oops", ["[oops"]),
        ("[" * 100_000 + "]", ["[" * 100_000 + "]"]),
        ("x" * 300 + ".png", ["x" * 300 + ".png"]),
        ("a\0b", ["a\0b"]),
        ("~\0", ["~\0"]),
        ("~nobody/1.jpg", ["~nobody/1.jpg"]),
        ("\0/1;1", ["\0/1", "1.jpg"]),
    ],
)
def test_cells_name_pictures(root: Path, cell: str, names: list[str]):
    assert find_pictures(pd.DataFrame({"photo": [cell]}), root) == [tuple(root / name for name in names)]


def test_home_and_addresses_of_files(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(root))
    monkeypatch.setenv("USERPROFILE", str(root))
    cells = {
        "~/1.jpg": "1.jpg",
        "~/none.png": "none.png",
        "~\\deep\\3": "deep/3.jpg",
        str(root / "1"): "1.jpg",
        f"file://{root}/deep/c%20d.png": "deep/c d.png",
        f"file://localhost{root}/deep/c d": "deep/c d.png",
        f"FILE://{root}/none%20x.png": "none x.png",
    }
    found = find_pictures(pd.DataFrame({"photo": list(cells)}), Path("elsewhere"))
    assert found == [(root / name,) for name in cells.values()]


def test_columns_keep_their_places(root: Path):
    cells = pd.DataFrame(
        [["1.jpg", "2.png"], ["", "2.png"], ["1.jpg", " "], ["", ""], ["1|2", "deep/3"]], columns=["front", "back"]
    )
    one, two, three = root / "1.jpg", root / "2.png", root / "deep/3.jpg"
    assert find_pictures(cells, root) == [(one, two), (None, two), (one, None), (), (one, two, three)]
    assert find_pictures(cells[:0], root) == []


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("same", ["'same', which may be same.jpg or same.png in "]),
        ("1.jpg|same", ["'same', which may be"]),
        ("http://host/1.jpg", ["'http://host/1.jpg', which is an address; download the picture"]),
        ("HTTPS://host/1.jpg?a|b", ["download the picture"]),
        ('["1.jpg", "s3://bucket/2.jpg"]', ["'s3://bucket/2.jpg'", "download the picture"]),
    ],
)
def test_unclear_names_are_refused_with_their_place(root: Path, cell: str, words: list[str]):
    cells = pd.DataFrame({"photo": ["1.jpg", cell]})
    for where, place in (({}, "row 2"), ({"where": lambda row: f"pets.csv, line {row + 2}"}, "pets.csv, line 3")):
        with pytest.raises(InputError) as caught:
            find_pictures(cells, root, **where)
        assert str(caught.value).startswith(f"{place}: column 'photo' names ")
        assert [word for word in words if word not in str(caught.value)] == []


def test_letters_that_differ_alone_are_several_files(tmp_path: Path):
    for name in ("1.jpg", "1.Jpg"):
        (tmp_path / name).touch()
    if len(list(tmp_path.iterdir())) < 2:
        pytest.skip("this file system has one name for both")
    with pytest.raises(InputError, match=r"may be 1\.Jpg or 1\.jpg"):
        find_pictures(pd.DataFrame({"photo": ["1.JPG"]}), tmp_path)
    assert find_pictures(pd.DataFrame({"photo": ["1.jpg"]}), tmp_path) == [(tmp_path / "1.jpg",)]


def test_found_pictures_are_read(tmp_path: Path):
    save(tmp_path / "a.png", 100)
    save(tmp_path / "b.png", 200)
    cells = pd.DataFrame({"photo": [json.dumps(["a", "b"]), "a.png", "", "c.png"]})
    samples = rows_of(find_pictures(cells, tmp_path))
    decoded, problems = in_memory(samples, 8, threads=1)
    assert list(problems) == [2, 3]
    assert isinstance(decoded.images, np.ndarray)
    assert decoded.images[0, 1, [1, 5]].tolist() == [100, 200]
    with pytest.raises(ImageError, match="id 2: no image is named"):
        square_image(samples, 2, 8)
