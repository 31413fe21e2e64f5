"""Pictures: every kind of file is decoded as it looks or refused by name; masks are read as what they mark."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from bad_rows import bomb_png, png_chunk
from bad_rows import encoded as stored
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from agevlm.images import FORMATS, data_address, open_header, open_image
from agevlm.processing import image_processing_agevlm
from agevlm.processing.image_processing_agevlm import AgeVlmImageProcessorPil


RED = Image.new("RGB", (8, 8), "red")
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
MARKED = np.zeros((30, 40), dtype=bool)
MARKED[5:20, 5:30] = True


def png(image: Image.Image, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG with more chunks in front of its pixels."""
    data = stored(image, "PNG")
    at = data.index(b"IDAT") - 4
    return data[:at] + b"".join(png_chunk(*chunk) for chunk in chunks) + data[at:]


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def ours(data: bytes) -> np.ndarray:
    return np.asarray(open_image(data, "row 7"))


def travelling(data: bytes, path) -> np.ndarray:
    """The picture as the processor that travels with a checkpoint reads it."""
    path.write_bytes(data)
    processor = AgeVlmImageProcessorPil()
    image = processor.fetch_images(str(path))
    return np.asarray(processor.process_image(image, processor.max_pixels, True, True))


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(mode):
    assert open_image(Image.new(mode, (4, 3)), "x").mode == "RGB"


def test_oversized_picture_is_refused_before_decoding():
    with pytest.raises(ValueError, match="limit of 100"):
        open_image(stored(PHOTO, "JPEG"), "row 3", max_pixels=100)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "JPEG", "WEBP", "GIF", "PPM"])
def test_ordinary_pictures_are_what_pillow_decodes(kind):
    data = stored(PHOTO, kind)
    with Image.open(io.BytesIO(data)) as plain:
        np.testing.assert_array_equal(ours(data), np.asarray(plain.convert("RGB")))


# One pixel: the picture, and the color it must have.
COLORS = {
    "damaged EXIF": (png(RED, (b"eXIf", b"b'Exif\\x00\\x00II*'")), (255, 0, 0)),
    "EXIF of nothing": (png(RED, (b"eXIf", b"")), (255, 0, 0)),
    "EXIF cut off": (png(RED, (b"eXIf", exif(6)[6:-4])), (255, 0, 0)),
    "EXIF with a directory beyond its end": (png(RED, (b"eXIf", b"II*\0\xff\xff\0\0")), (255, 0, 0)),
    "damaged EXIF of a JPEG": (stored(RED, "JPEG", quality=100, exif=b"Exif\0\0damaged"), (254, 0, 0)),
    "transparent": (stored(Image.new("RGBA", (1, 1), (200, 0, 0, 0))), (255, 255, 255)),
    "transparent color": (stored(RED, transparency=(255, 0, 0)), (255, 255, 255)),
    "another transparent color": (stored(RED, transparency=(0, 0, 255)), (255, 0, 0)),
    "transparent grey": (stored(Image.new("L", (8, 8), 7), transparency=7), (255, 255, 255)),
    "transparent black of two levels": (stored(Image.new("1", (8, 8), 0), transparency=0), (255, 255, 255)),
    "16 bits, PGM": (b"P5\n1 1\n65535\n" + struct.pack(">H", 25600), (100, 100, 100)),
    "10 bits, PGM": (b"P5\n1 1\n1023\n" + struct.pack(">H", 1023), (255, 255, 255)),
    "16 bits, the largest": (stored(Image.fromarray(np.full((1, 1), 65535, np.uint16))), (255, 255, 255)),
    "16 bits, PNG": (stored(Image.fromarray(np.full((1, 1), 25600, np.uint16))), (100, 100, 100)),
    "16 bits, TIFF": (stored(Image.fromarray(np.full((1, 1), 25600, np.uint16)), "TIFF"), (100, 100, 100)),
    "0 to 1": (stored(Image.fromarray(np.ones((1, 1), np.float32)), "TIFF"), (255, 255, 255)),
}


@pytest.mark.parametrize("case", COLORS)
def test_a_picture_has_the_color_it_shows_in_both_openers(case, tmp_path):
    data, color = COLORS[case]
    assert tuple(ours(data)[0, 0]) == color
    assert tuple(travelling(data, tmp_path / "picture")[0, 0]) == color


def test_one_transparent_value_of_16_bits_is_white():
    grey = Image.fromarray(np.array([[300, 301]], dtype=np.uint16))
    assert ours(stored(grey, transparency=300))[0].tolist() == [[255] * 3, [1] * 3]


@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt"])
def test_large_profiles_and_texts_do_not_matter(kind):
    assert (ours(png(PHOTO, (kind, b"p\0\0" + zlib.compress(bytes(2 * 2**20))))) == np.asarray(PHOTO)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotation_is_applied_once(orientation, tmp_path):
    data = stored(PHOTO, exif=exif(orientation))
    opened = open_image(data, "x")
    assert open_header(data, "x").size == opened.size
    assert open_image(opened, "x") == opened  # nothing is left that would turn it again
    np.testing.assert_array_equal(travelling(data, tmp_path / "turned.png"), np.asarray(opened))
    given = Image.open(io.BytesIO(data))
    assert open_image(given, "x").tobytes() == opened.tobytes()
    assert given.size == PHOTO.size


REFUSED = {
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
    "too many pixels by its header": bomb_png(65_000, 65_000),
    "text": b"no picture",
    "nothing": b"",
    "32 bits": stored(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)), "TIFF"),
    "not a number": stored(Image.fromarray(np.full((1, 1), np.nan, np.float32)), "TIFF"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_shown_is_refused_by_name_in_both_openers(case, tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: pytest.fail("a program was started"))
    with pytest.raises(ValueError, match=r"^row 7: "):
        open_image(REFUSED[case], "row 7")
    with pytest.raises(ValueError):
        travelling(REFUSED[case], tmp_path / "picture.png")
    if case not in ("32 bits", "not a number"):  # their pixels say so, not their headers
        with pytest.raises(ValueError, match=r"^row 7: "):
            open_header(REFUSED[case], "row 7")


def test_only_regular_files_are_opened(tmp_path):
    for path in (tmp_path, tmp_path / "absent.png"):
        with pytest.raises(ValueError, match=r"^row 7: the picture cannot be decoded"):
            open_image(path, "row 7")


def test_both_openers_know_the_same_formats():
    assert image_processing_agevlm.FORMATS == FORMATS


SAMPLES = [stored(PHOTO, kind) for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM")]
SAMPLES += [stored(PHOTO, "PNG", exif=exif(6)), stored(PHOTO, "JPEG", exif=exif(6)), stored(PHOTO.convert("P"))]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SAMPLES), st.data())
def test_damage_is_decoded_or_refused_by_name(sample, data):
    """Whatever a decoder makes of damaged bytes, nothing but a ValueError that names the place comes out."""
    damaged = bytearray(sample)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    for read in (open_image, open_header):
        try:
            read(bytes(damaged), "row 7")
        except ValueError as error:
            assert str(error).startswith("row 7: ")


def grey(low: int, high: int, dtype=np.uint8) -> Image.Image:
    return Image.fromarray(np.where(MARKED, high, low).astype(dtype))


def palette(*colors: int) -> Image.Image:
    image = Image.frombytes("P", (40, 30), MARKED.astype(np.uint8).tobytes())
    image.putpalette(colors)
    return image


def cutout(color: int, alpha: Image.Image) -> Image.Image:
    return Image.merge("RGBA", [Image.new("L", alpha.size, color)] * 3 + [alpha])


SOFT = np.where(MARKED, 255, 0).astype(np.uint8)
SOFT[4, 5:30], SOFT[19, 5:30] = 100, 140
MASKS = {
    "0 and 255": grey(0, 255),
    "0 and 1": grey(0, 1),
    "0 and 100": grey(0, 100),
    "1 and 2": grey(1, 2),
    "two levels": Image.fromarray(MARKED),
    "RGB": grey(0, 255).convert("RGB"),
    "a color on black": Image.merge("RGB", [grey(0, 128), grey(0, 0), grey(0, 0)]),
    "palette": palette(0, 0, 0, 128, 0, 0),
    "palette of one color": palette(9, 9, 9, 9, 9, 9),
    "white with alpha": cutout(255, grey(0, 255)),
    "black with alpha": cutout(0, grey(0, 255)),
    "opaque alpha": grey(0, 255).convert("RGBA"),
    "grey and alpha": Image.merge("LA", [Image.new("L", (40, 30), 255), grey(0, 255)]),
    "16 bits, 0 and 1": grey(0, 1, np.uint16),
    "16 bits": grey(0, 65535, np.uint16),
    "32 bits, 0 and 255": grey(0, 255, np.int32),
    "soft edges": Image.fromarray(SOFT),
}


@pytest.mark.parametrize("case", MASKS)
def test_masks_mark_the_object_however_they_are_stored(case):
    for source in (MASKS[case], stored(MASKS[case], "TIFF" if case.startswith("32") else "PNG")):
        found = open_image(source, "mask", mode="1")
        assert found.mode == "1"
        np.testing.assert_array_equal(np.asarray(found), MARKED)


def test_a_transparent_background_tells_the_object():
    stored_mask = stored(grey(9, 200), transparency=9)
    np.testing.assert_array_equal(np.asarray(open_image(stored_mask, "mask", mode="1")), MARKED)


@pytest.mark.parametrize(("value", "marked"), [(0, False), (255, True)])
def test_masks_of_one_value(value, marked):
    assert (np.asarray(open_image(Image.new("L", (8, 8), value), "mask", mode="1")) == marked).all()


@pytest.mark.parametrize("values", [[0, 1, 2], [0, 1, 255], [0, 15, 20, 255], [1], [120], [253, 254, 255]])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_values_that_do_not_tell_the_object_are_listed(values, dtype):
    if dtype != np.uint8 and values[-1] == 255:
        values = [*values[:-1], 256]
    with pytest.raises(ValueError, match=rf"mask: .*values {', '.join(map(str, values))}, which do not tell"):
        open_image(Image.fromarray(np.array([values], dtype=dtype)), "mask", mode="1")


@pytest.mark.parametrize(("values", "white"), [((38, 175), 255), ((20, 255), 255), ((10_000, 40_000), 65535)])
def test_a_mask_that_would_lose_an_object_is_refused(values, white):
    """Soft edges are cut at one half. Both of these fill areas."""
    two = MARKED * values[0]
    two[:, 20:] = MARKED[:, 20:] * values[1]
    dtype = np.uint8 if white == 255 else np.uint16
    with pytest.raises(ValueError, match=f"mask: .*values 0, {values[0]}, {values[1]}, which do not tell"):
        open_image(Image.fromarray(two.astype(dtype)), "mask", mode="1")


@pytest.mark.parametrize("quality", [30, 75, 90, 95])
def test_the_noise_of_jpeg_is_no_object(quality):
    found = np.asarray(open_image(stored(grey(0, 255), "JPEG", quality=quality), "mask", mode="1"))
    np.testing.assert_array_equal(found, MARKED)


def test_colors_of_one_brightness_are_refused():
    image = Image.merge("RGB", [Image.new("L", (40, 30))] * 2 + [grey(0, 1)])
    with pytest.raises(ValueError, match=r"mask: .*one brightness"):
        open_image(image, "mask", mode="1")


def test_a_data_address_holds_the_shrunk_picture():
    head, _, content = data_address(PHOTO, "jpeg", 85, side=20).partition(",")
    assert head == "data:image/jpeg;base64" and PHOTO.size == (40, 30)
    assert open_image(base64.b64decode(content), "x").size == (20, 15)
