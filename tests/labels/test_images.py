"""calm_jax.data.images: every kind of file becomes upright RGB or one sentence; a square holds the whole window."""

import io
import os
import re
import struct
import sys
import threading
import time
import zlib

import miniature
import numpy as np
import pytest
from PIL import Image, ImageOps

from calm_jax.data import images, pictures
from calm_jax.data.samples import BadRecord, Edit, ImageRef


def encoded(picture: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


@pytest.fixture
def gradient() -> np.ndarray:
    y, x = np.mgrid[0:60, 0:80]
    return np.stack([x * 3, y * 4, (x + y)], -1).astype(np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "YCbCr", "I;16", "F"])
def test_every_mode_becomes_rgb(gradient, mode):
    if mode == "I;16":
        data = encoded(Image.fromarray(gradient[..., 0].astype(np.uint16) * 257))
    elif mode == "F":
        data = encoded(Image.fromarray(gradient[..., 0].astype(np.float32) / 255), "TIFF")
    else:
        form = {"CMYK": "JPEG", "YCbCr": "JPEG"}.get(mode, "PNG")
        data = encoded(Image.fromarray(gradient).convert(mode), form)
    pixels = pictures.read(data)
    assert pixels.shape == (60, 80, 3) and pixels.dtype == np.uint8
    if mode in ("RGB", "RGBA"):
        np.testing.assert_array_equal(pixels, gradient)
    if mode in ("I;16", "F"):
        np.testing.assert_array_equal(pixels, np.repeat(gradient[..., :1], 3, 2))


def test_transparency_shows_the_padding_colour():
    pixels = pictures.read(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0))))
    assert (pixels == pictures.PADDING).all()


def test_exif_rotation_is_honoured(gradient):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    pixels = pictures.read(encoded(Image.fromarray(gradient), exif=exif))
    np.testing.assert_array_equal(pixels, np.rot90(gradient, -1))


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    pixels = pictures.read(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert (pixels == (255, 0, 0)).all()


def test_a_path_may_be_text_or_path(tmp_path, gradient):
    path = tmp_path / "a b.png"
    path.write_bytes(encoded(Image.fromarray(gradient)))
    np.testing.assert_array_equal(pictures.read(path), pictures.read(str(path)))


def bomb() -> bytes:
    """A PNG of a few bytes that claims 20,000 x 20,000 pixels."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("kind", "word"), [
    ("missing", "does not exist"), ("folder", "is a folder"), ("empty", "not a picture"), ("text", "not a picture"),
    ("cut", "truncated"), ("cut png", "truncated"), ("bomb", "megapixels"),
])
def test_bad_files_get_one_sentence_with_their_name(tmp_path, gradient, kind, word):
    jpeg, png = encoded(Image.fromarray(gradient), "JPEG"), encoded(Image.fromarray(gradient))
    path = tmp_path / f"{kind}.jpg"
    contents = {"empty": b"", "text": b"no picture at all", "cut": jpeg[:len(jpeg) // 2],
                "cut png": png[:len(png) // 2], "bomb": bomb()}
    if kind == "folder":
        path.mkdir()
    elif kind in contents:
        path.write_bytes(contents[kind])
    with pytest.raises(BadRecord, match=word) as caught:
        pictures.read(path)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)


def test_the_limit_holds_where_the_guard_of_pillow_is_off(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(BadRecord, match="400 megapixels"):
        pictures.read(bomb())


@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (50, 50), (1, 300), (300, 1), (7, 5)])
def test_the_square_holds_the_whole_picture_and_pads_the_rest(shape):
    pixels = np.full((*shape, 3), 250, np.uint8)
    square = images.render(pixels, ImageRef(0), 48)
    assert square.shape == (48, 48, 3) and square.dtype == np.uint8
    inside = (square == 250).all(-1)
    rows, columns = inside.any(1).sum(), inside.any(0).sum()
    assert max(rows, columns) == 48
    assert min(rows, columns) == max(1, round(48 * min(shape) / max(shape)))
    assert inside.sum() == rows * columns
    assert (square[~inside] == pictures.PADDING).all()
    assert abs(np.argwhere(inside).mean(0) - 23.5).max() <= 0.5  # centred


def test_a_window_shows_its_part_only():
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:20, 40:] = 200
    assert (images.fit(pixels, ImageRef(0, (0.5, 0.0, 1.0, 0.5)), 32) == 200).all()
    assert (images.fit(pixels, ImageRef(0, (0.0, 0.0, 0.5, 1.0)), 32) == 0).all()


@pytest.mark.parametrize("window", [(0.5, 0.0, 0.5, 1.0), (-0.1, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 1.2)])
def test_a_window_outside_the_picture_is_refused(window, gradient):
    with pytest.raises(BadRecord, match="window"):
        images.render(gradient, ImageRef(3, window), 32)


def test_edits_leave_the_padding_alone(gradient):
    for edit in (Edit("noise", 2), Edit("tint", 0), Edit("sharpness", 2), Edit("tilt", 2)):
        square = images.render(gradient, ImageRef(0, None, (edit,)), 64)
        assert (square[:8] == pictures.PADDING).all() and (square[-8:] == pictures.PADDING).all()


def test_rendering_is_repeatable_and_writes_nothing(gradient):
    gradient.setflags(write=False)
    ref = ImageRef(0, (0.1, 0.1, 0.9, 0.8), (Edit("tilt", 0, 1), Edit("sharpness", 1, 2), Edit("noise", 1, 3)))
    np.testing.assert_array_equal(images.render(gradient, ref, 40), images.render(gradient, ref, 40))


def test_doubtful_attributes_are_noted(gradient):
    grey = np.repeat(gradient[..., :1], 3, 2)
    _, doubtful = images.render_noting(images.Fitter(grey), ImageRef(0, None, (Edit("saturation", 0),)), 48)
    assert doubtful == {"saturation"}
    assert images.render_noting(images.Fitter(gradient), ImageRef(0, None, (Edit("saturation", 0),)), 48)[1] == set()
    blank = np.full((20, 20, 3), 9, np.uint8)
    assert "sharpness" in images.render_noting(images.Fitter(blank), ImageRef(0), 48)[1]


# ---- hostile and odd files --------------------------------------------------------------------------------------


def test_a_pipe_a_loop_and_a_long_name_are_told_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    os.symlink("loop.jpg", tmp_path / "loop.jpg")
    for name in ("pipe.jpg", "loop.jpg", "x" * 300 + ".jpg", "a\0b.jpg"):
        with pytest.raises(pictures.BadRecord, match=re.escape(name[:20])):
            pictures.read(str(tmp_path / name))


@pytest.mark.parametrize("text", [
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\xd7\xcd\xc6\x9a" + bytes(80)], ids=["EPS", "WMF"])
def test_a_format_that_starts_other_programs_is_no_picture(tmp_path, text):
    file = tmp_path / "a.jpg"
    file.write_bytes(text)
    with pytest.raises(pictures.BadRecord, match=r"a\.jpg"):
        pictures.read(file)


@pytest.mark.parametrize(("unit", "odd"), [(1.0, 1.001), (1.0, float("nan")), (1.0, float("inf")), (255.0, 260.0),
                                           (1.0, -5.0)])
def test_one_odd_number_among_floats_changes_nothing_else(tmp_path, unit, odd):
    values = np.linspace(0.1, 0.9, 64 * 64, dtype=np.float32).reshape(64, 64)
    spoiled = values * unit
    spoiled[3, 5] = odd
    Image.fromarray(spoiled, "F").save(tmp_path / "a.tif")
    found = pictures.read(tmp_path / "a.tif")[..., 0].astype(int)
    expected = np.rint(values * 255).astype(int)
    assert (np.abs(found - expected) > 1).sum() <= 1


def test_integers_of_32_bits_are_16_bit_grey_or_refused(tmp_path):
    values = np.arange(4096, dtype=np.int32).reshape(64, 64)
    Image.fromarray(values * 16, "I").save(tmp_path / "a.tif")
    assert pictures.read(tmp_path / "a.tif").max() == 255
    Image.fromarray(values % 256, "I").save(tmp_path / "b.tif")
    with pytest.raises(pictures.BadRecord, match=r"b\.tif"):
        pictures.read(tmp_path / "b.tif")


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
@pytest.mark.parametrize("turned", range(1, 9))
def test_every_orientation_is_honoured(gradient, turned, kind):
    exif = Image.Exif()
    exif[0x0112] = turned
    data = encoded(Image.fromarray(gradient), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    np.testing.assert_array_equal(pictures.read(data), expected)


@pytest.mark.parametrize("kept", [1 << 25, 5000])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_path_the_bytes_and_an_opened_picture_are_the_same_picture(tmp_path, gradient, monkeypatch, kind, kept):
    monkeypatch.setattr(pictures, "KEPT_PIXELS", kept)
    Image.fromarray(gradient).resize((200, 100)).save(tmp_path / "a", kind)
    found = pictures.pixels(tmp_path / "a")
    assert found.shape == ((100, 200, 3) if kept > 20_000 else (50, 100, 3))
    np.testing.assert_array_equal(pictures.pixels((tmp_path / "a").read_bytes()), found)
    np.testing.assert_array_equal(pictures.pixels(Image.open(tmp_path / "a")), found)
    half = (tmp_path / "a").read_bytes()
    with pytest.raises(pictures.BadRecord, match="damaged"):
        pictures.pixels(Image.open(io.BytesIO(half[:len(half) // 2])))


def test_what_takes_more_memory_than_all_threads_have_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "_DECODING", pictures.Budget(10_000_000))
    Image.new("RGB", (900, 900)).save(tmp_path / "a.png")
    Image.new("RGB", (900, 900)).save(tmp_path / "a.jpg", progressive=True)
    for name in ("a.png", "a.jpg"):
        with pytest.raises(pictures.BadRecord, match=re.escape(name)):
            pictures.read(tmp_path / name)
    Image.new("RGB", (400, 400)).save(tmp_path / "a.png")
    assert pictures.read(tmp_path / "a.png").shape == (400, 400, 3)


@pytest.mark.parametrize("values", [np.linspace(0, 4, 4096), np.linspace(0, 60_000, 4096), np.full(4096, 1e30)])
def test_floats_that_could_mean_anything_are_refused(tmp_path, values):
    Image.fromarray(values.astype(np.float32).reshape(64, 64), "F").save(tmp_path / "a.tif")
    with pytest.raises(pictures.BadRecord, match=r"a\.tif"):
        pictures.read(tmp_path / "a.tif")


@pytest.mark.parametrize(("mode", "suffix"), [("RGB", ".png"), ("LA", ".png"), ("RGBA", ".png"), ("P", ".png"),
                                              ("I;16", ".png"), ("F", ".tif"), ("RGB", ".jpg")])
@pytest.mark.parametrize("turned", [1, 6])
def test_a_large_picture_is_reduced_to_what_it_would_be(tmp_path, monkeypatch, mode, suffix, turned):
    """Strip by strip, also where strips and factors do not divide its sides."""
    y, x = np.mgrid[0:157, 0:211]
    grey = ((x + y) / 368 * 255).astype(np.uint8)
    picture = {"RGB": lambda: Image.fromarray(np.stack([grey, grey // 2, 255 - grey], 2)),
               "LA": lambda: Image.merge("LA", [Image.fromarray(grey), Image.fromarray(255 - grey)]),
               "RGBA": lambda: Image.merge("RGBA", [Image.fromarray(band) for band in (grey, 255 - grey, grey, grey)]),
               "P": lambda: Image.fromarray(grey).convert("P"),
               "I;16": lambda: Image.fromarray(grey.astype(np.uint16) * 257),
               "F": lambda: Image.fromarray(grey.astype(np.float32) / 255, "F")}[mode]()
    exif = Image.Exif()
    exif[0x0112] = turned
    file = tmp_path / f"a{suffix}"
    picture.save(file, **({"exif": exif} if suffix != ".tif" else {}))
    whole = pictures.read(file)
    monkeypatch.setattr(pictures, "KEPT_PIXELS", 157 * 211 // 7)
    monkeypatch.setattr(pictures, "STRIP", 2000)
    small = pictures.read(file)
    expected = np.asarray(Image.fromarray(whole).resize(small.shape[1::-1], Image.Resampling.BOX)).astype(int)
    assert small.shape[0] * small.shape[1] <= 157 * 211 // 7
    assert np.abs(small.astype(int)[2:-2, 2:-2] - expected[2:-2, 2:-2]).max() <= 8


def test_giants_take_turns(tmp_path):
    """One or four threads of one process, each with 179 megapixels of grey with transparency in 350 kB."""
    Image.new("LA", (13_370, 13_370), (90, 128)).save(tmp_path / "a.png", compress_level=1)
    code = ("import sys, threading; from calm_jax.data import pictures; "
            f"peak = lambda: {miniature.PEAK} >> 10; before = peak(); "
            "read = lambda: sizes.append(pictures.read(sys.argv[1]).nbytes); sizes = []; "
            "threads = [threading.Thread(target=read) for _ in range(int(sys.argv[2]))]; "
            "[t.start() for t in threads]; [t.join() for t in threads]; print(peak() - before, *sizes)")
    count = 4 if miniature.THOROUGH else 1
    done = miniature.run([sys.executable, "-c", code, str(tmp_path / "a.png"), str(count)], dict(os.environ))
    mebibytes, *sizes = map(int, done.stdout.split())
    print(f"{mebibytes} MiB")
    assert len(sizes) == count and mebibytes < (1200 if count == 1 else 2300) and not done.stderr


def test_threads_share_the_memory_of_decoding_whatever_the_format(tmp_path):
    """Eight threads each with 4 megapixels that take up to 128 MB, and 150 MiB for all of them, beside what they give
    and the libraries that they load."""
    side, made = 2000, {"la.png": "LA", "rgba.webp": "RGBA", "rgb.jp2": "RGB", "f.tif": "F", "rgb.jpg": "RGB"}
    for name, mode in made.items():
        Image.new(mode, (side, side)).save(tmp_path / name, **{"jpg": {"progressive": True, "subsampling": 0}, "webp": {
            "method": 0}, "tif": {"compression": "tiff_deflate"}}.get(name.split(".")[1], {}))
    code = ("import pathlib, sys, threading; from calm_jax.data import pictures; "
            "pictures._DECODING = pictures.Budget(150 << 20); done = []; "
            f"peak = lambda: {miniature.PEAK} >> 10; before = peak(); "
            "read = lambda path: done.append(pictures.read(path).shape); "
            "groups = [[threading.Thread(target=read, args=(path,)) for _ in range(8)] "
            "for path in pathlib.Path(sys.argv[1]).iterdir()]; "
            "[([t.start() for t in group], [t.join() for t in group]) for group in groups]; "
            "print(peak() - before, len(done))")
    done = miniature.run([sys.executable, "-c", code, str(tmp_path)], dict(os.environ))
    mebibytes, count = map(int, done.stdout.split())
    print(f"{mebibytes} MiB")
    assert count == 8 * len(made) and mebibytes < 450 and not done.stderr  # 340; 600 without it


def test_no_more_is_decoded_at_a_time_than_the_budget():
    budget, most, now, lock = pictures.Budget(10), [], [], threading.Lock()

    def work(pixels):
        with budget.of(pixels):
            with lock:
                now.append(pixels)
                most.append(sum(now))
            time.sleep(0.005)
            with lock:
                now.remove(pixels)

    threads = [threading.Thread(target=work, args=(size,)) for size in (3, 9, 1, 4, 10, 2, 7, 5) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert len(most) == 16 and max(most) <= 10 and not now
