"""calm_jax.data.images: every kind of file becomes upright RGB or one sentence; a square holds the whole window."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

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
