"""Both backends of the image processor: equal to a step of 1 / 255, and chosen as transformers chooses.

What needs torchvision is skipped where it is missing; the rest is about its absence.
"""

import base64
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from transformers import AutoImageProcessor
from transformers.utils import is_torchvision_available

from agevlm import processing
from agevlm.processing.image_processing_agevlm import GEOMETRIES, AgeVlmImageProcessor, AgeVlmImageProcessorPil
from builders import picture, tiny_processor


with_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="torchvision is not installed")
without_torchvision = pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
geometries = pytest.mark.parametrize("geometry", GEOMETRIES)
BACKENDS = [
    pytest.param(AgeVlmImageProcessorPil, id="pil"),
    pytest.param(AgeVlmImageProcessor, id="torchvision", marks=with_torchvision),
]
backends = pytest.mark.parametrize("backend", BACKENDS)
QUICK = settings(max_examples=40, deadline=None, database=None)
SIZES = st.one_of(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.sampled_from([(1, 1), (20_000, 10), (10, 20_000), (3, 2000), (96, 96), (1, 257), (480, 640)]),
)


def both(geometry: str = "pad", canvas: tuple[int, int] = (96, 96), **kwargs):
    """(torchvision, Pillow)"""
    size = {"height": canvas[0], "width": canvas[1]}
    return tuple(
        backend(size=size, geometry=geometry, **kwargs) for backend in (AgeVlmImageProcessor, AgeVlmImageProcessorPil)
    )


def photograph(width: int, height: int) -> Image.Image:
    """Smooth colors with a few hard edges, which make bicubic filters overshoot."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9 + y / 17), np.cos(x / 23), np.sin(y / 11)], axis=-1) * 100 + 120
    waves[height // 4 : height // 2, width // 5 : width // 3] = (255, 0, 255)
    return Image.fromarray(waves.clip(0, 255).astype(np.uint8))


def steps(backends, images) -> np.ndarray:
    """By how many steps of 1 / 255 two backends differ, value by value; what is no pixel must be equal."""
    _, pil = backends
    batch, reference = (backend(images, return_tensors="pt") for backend in backends)
    assert batch.keys() == reference.keys() == {"pixel_values", "visual_token_mask"}
    for name, value in batch.items():
        assert (value.dtype, value.shape) == (reference[name].dtype, reference[name].shape), name
    assert torch.equal(batch["visual_token_mask"], reference["visual_token_mask"])
    std = torch.tensor(pil.image_std if pil.do_normalize else (1.0, 1.0, 1.0))[:, None, None]
    return ((batch["pixel_values"] - reference["pixel_values"]).abs() * std * 255).numpy()


@with_torchvision
@geometries
@QUICK
@given(size=SIZES, canvas=st.sampled_from([(96, 96), (64, 128), (224, 224)]), seed=st.integers(0, 99))
def test_noise_of_any_size(geometry, size, canvas, seed):
    difference = steps(both(geometry, canvas), picture(size[1], size[0], seed=seed))
    # Both round after either pass; Pillow's weights have 22 bits, torch's 16. Where the first pass rounds differently,
    # on a tie, the second may end two steps off: measured at one value in ten million over many sizes.
    assert difference.max() < 2.01 and (difference > 1.01).mean() < 1e-4


@with_torchvision
@geometries
@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize("size", [(640, 480), (1500, 1000), (336, 336), (500, 1333), (96, 96), (31, 7)])
def test_photographs_at_full_size(geometry, resample, size):
    difference = steps(both(geometry, (768, 768), resample=resample), photograph(*size))
    assert difference.max() < 2.01 and (difference > 1.01).mean() < 1e-6


@with_torchvision
@pytest.mark.parametrize(
    "switches",
    [
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.2, 0.1]},
    ],
)
def test_switches(switches):
    """On a picture that is padded, and not resampled; pixels that nothing is done to stay as they are."""
    batches = [backend(picture(96, 30), return_tensors="np") for backend in both("pad", **switches)]
    values = [batch["pixel_values"] for batch in batches]
    untouched = switches.keys() == {"do_rescale", "do_normalize"}
    assert [value.dtype for value in values] == [np.uint8 if untouched else np.float32] * 2
    np.testing.assert_allclose(*values, rtol=1e-5, atol=1e-5)


@backends
@pytest.mark.parametrize("disable_grouping", [None, False, True])
def test_batches_are_what_their_pictures_are_alone(backend, disable_grouping):
    processor = backend(size={"height": 96, "width": 96})
    images = [picture(40, 90), picture(96, 96, seed=1), picture(40, 90, seed=2), picture(7, 3, seed=3)]
    together = processor(images, return_tensors="pt", disable_grouping=disable_grouping)
    assert together["pixel_values"].is_contiguous() and together["pixel_values"].dtype == torch.float32
    for index, image in enumerate(images):
        alone = processor(image, return_tensors="pt")
        for name in ("pixel_values", "visual_token_mask"):
            assert torch.equal(together[name][index], alone[name][0]), name


def sixteen_bits() -> np.ndarray:
    return np.arange(30 * 20, dtype=np.uint16).reshape(20, 30) * 100


KINDS = {
    "gray": picture(30, 20).convert("L"),
    "alpha": Image.merge("RGBA", [*picture(30, 20).split(), picture(30, 20, seed=1).convert("L")]),
    "CMYK": picture(30, 20).convert("CMYK"),
    "palette": picture(30, 20).quantize(16),
    "bilevel": picture(30, 20).convert("1"),
    "16 bits": Image.fromarray(sixteen_bits()),
    "floating point": Image.fromarray(np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30)),
    "array": np.asarray(picture(30, 20)),
    "array of 16 bits": sixteen_bits()[..., None],
    "array of 0..1": np.asarray(picture(30, 20)) / 255,
    "tensor": torch.from_numpy(np.array(picture(30, 20))).permute(2, 0, 1),
    "tensor, channels last": torch.from_numpy(np.array(picture(30, 20))),
    "tensor of 0..1": torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0)),
    "gray tensor": torch.from_numpy(np.array(picture(30, 20).convert("L")))[None],
    "tensor with alpha": torch.randint(0, 256, (4, 20, 30), generator=torch.Generator().manual_seed(0)).byte(),
}


@with_torchvision
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture(kind):
    assert steps(both(), KINDS[kind]).max() < 1.01


@with_torchvision
@pytest.mark.parametrize("mode", ["file", "base64", "list"])
def test_files_are_decoded_alike(mode, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "picture.png"
    picture(40, 20).save(path, exif=exif)
    inputs = {
        "file": str(path),
        "base64": "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
        "list": [str(path), picture(), picture(7, 9)],
    }[mode]
    assert steps(both(), inputs).max() < 1.01
    assert all(backend(str(path))["visual_token_mask"].shape[0] == 1 for backend in both())


@backends
@pytest.mark.parametrize(
    ("image", "settings", "message"),
    [
        (Image.new("1", (400, 300)), {"max_pixels": 100_000}, r"400 x 300 pixels is over the limit of 100,000"),
        (torch.zeros(3, 300, 400, dtype=torch.uint8), {"max_pixels": 9}, r"400 x 300 pixels is over the limit of 9"),
        (Image.new("RGB", (0, 5)), {}, r"0 x 5 pixels has none"),
        (np.full((5, 5, 3), -1.5), {}, r"float64 with values from -1.5 to -1.5. Give 0\.\.255"),
        (np.full((5, 5, 3), np.nan), {}, r"values from nan to nan"),
        (np.full((5, 5, 3), 300), {}, r"int64 with values from 300 to 300"),
        (Image.new("RGBA", (5, 5)), {"do_convert_rgb": False}, r"mode RGBA with `do_convert_rgb=False`. Leave"),
        (picture(50, 60), {"do_resize": False}, r"50 x 60 pixels must be resized for `size` 96 x 96, but `do_resize`"),
        (picture(), {"resample": 1}, r"`resample` must be 2 \(bilinear\) or 3 \(bicubic\)"),
        (picture(), {"image_mean": 0.5}, r"`image_mean` must be three finite numbers .* got 0.5"),
        (picture(), {"image_std": [0, 0, 0]}, r"`image_std` must be three finite numbers .* got \(0, 0, 0\)"),
        (picture(), {"image_std": [0.2, float("nan"), 0.2]}, r"`image_std` must be three finite numbers"),
        (picture(), {"image_mean": "abc"}, r"`image_mean` must be three finite numbers .* got 'abc'"),
        (picture(), {"cell_size": 0}, r"`cell_size` must be a positive number of pixels, got 0"),
        (picture(), {"size": {"shortest_edge": 96}}, r"`size` must have `height` and `width`"),
        (picture(), {"size": {"height": 100, "width": 96}}, r"100 x 96 is no multiple of the cell size 32"),
        (picture(), {"do_center_crop": True, "crop_size": 96}, r"`do_center_crop` is not a step .*`geometry`"),
        (picture(), {"do_pad": True}, r"`do_pad` is not a step"),
    ],
)
def test_what_cannot_be_done_is_refused(backend, image, settings, message):
    with pytest.raises(ValueError, match=message):
        backend(**{"size": {"height": 96, "width": 96}, **settings})(image)


@backends
def test_files_that_cannot_be_read_are_refused(backend, tmp_path):
    whole, cut, text = tmp_path / "whole.jpg", tmp_path / "cut.jpg", tmp_path / "text.png"
    picture(200, 200).save(whole)
    cut.write_bytes(whole.read_bytes()[:2000])
    text.write_bytes(b"no picture")
    for images in ([str(whole), str(cut)], Image.open(cut)):
        with pytest.raises(
            ValueError, match=r"cut\.jpg cannot be decoded: .*truncated.*Replace the file or drop the row"
        ):
            backend()(images)
    with pytest.raises(ValueError, match=r"text\.png cannot be opened: .*Replace the file"):
        backend()(str(text))


@backends
@geometries
@pytest.mark.parametrize("size", [(9_999_999, 1), (1, 9_999_999)])
def test_thin_pictures_stay_small_on_their_way(backend, geometry, size):
    """Widened before they are shortened, they would take gigabytes."""
    values = backend(size={"height": 768, "width": 768}, geometry=geometry)(
        Image.new("RGB", size, (90, 60, 30)), do_normalize=False, do_rescale=False, return_tensors="np"
    )["pixel_values"]
    assert (values == np.array([90, 60, 30])[:, None, None]).all(1).any()


@backends
def test_pictures_of_the_right_size_need_no_resizing(backend):
    processor = backend(size={"height": 96, "width": 96})
    batches = [processor(picture(), return_tensors="np", do_resize=resize) for resize in (True, False)]
    np.testing.assert_array_equal(*(batch["pixel_values"] for batch in batches))


@pytest.fixture
def address(tmp_path):
    """The address of a server of the files in `tmp_path`."""
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def sources(path, address: str) -> dict[str, str]:
    """The picture at `path` in every way to name one."""
    encoded = base64.b64encode(path.read_bytes()).decode()
    return {
        "file": str(path),
        "URL": f"{address}/{path.name}",
        "base64": encoded,
        "data URL": f"data:image/png;base64,{encoded}",
    }


@backends
def test_transparency_is_white_wherever_a_picture_comes_from(backend, tmp_path, address):
    keyed, alpha = tmp_path / "keyed.png", tmp_path / "alpha.png"
    Image.new("RGB", (96, 96), (1, 2, 3)).save(keyed, transparency=(1, 2, 3))
    Image.new("RGBA", (96, 96), (1, 2, 3, 0)).save(alpha)
    processor = backend(size={"height": 96, "width": 96})
    for path in (keyed, alpha):
        for source, name in sources(path, address).items():
            values = processor(name, do_normalize=False, return_tensors="np")["pixel_values"]
            assert (values == 1).all(), source


@backends
def test_too_many_pixels_are_refused_before_they_are_decoded(backend, tmp_path, address, monkeypatch):
    path = tmp_path / "large.png"
    picture(40, 30).save(path)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for source in sources(path, address).values():
        with pytest.raises(ValueError, match="40 x 30 pixels is over the limit of 9"):
            backend(max_pixels=9)(source)


@backends
def test_what_names_no_picture_is_refused(backend, tmp_path, address):
    for name in (
        "nowhere.png",
        f"{address}/nowhere.png",
        "http://127.0.0.1:1/closed.png",
        "data:image/png;base64,QUJD",
    ):
        with pytest.raises(ValueError, match=rf"{name} cannot be opened"):
            backend()(name)
    with pytest.raises(ValueError, match=r"QUJD\.\.\. cannot be opened") as error:
        backend()("QUJD" * 1000)
    assert len(str(error.value)) < 300
    (tmp_path / "long.png").write_bytes(bytes(2**20 + 100))
    with pytest.raises(ValueError, match=r"long\.png cannot be opened: its file has more than 1,048,612 bytes"):
        backend(max_pixels=9)(f"{address}/long.png")


@backends
def test_a_checkpoint_does_not_tell_which_backend_saved_it(backend, tmp_path):
    processor = tiny_processor()
    processor.image_processor = backend(**AgeVlmImageProcessorPil(geometry="crop").to_dict())
    processor.save_pretrained(tmp_path)
    saved = processor.image_processor.to_dict()
    assert saved["image_processor_type"] == "AgeVlmImageProcessor"
    assert saved["auto_map"]["AutoImageProcessor"] == {
        "torchvision": "image_processing_agevlm.AgeVlmImageProcessor",
        "pil": "image_processing_agevlm.AgeVlmImageProcessorPil",
    }
    for name in ("torchvision", "pil") if is_torchvision_available() else ("pil",):
        again = AutoImageProcessor.from_pretrained(tmp_path, backend=name)
        assert again.backend == name and again.to_dict() == saved
    best = AutoImageProcessor.from_pretrained(tmp_path)
    assert best.backend == ("torchvision" if is_torchvision_available() else "pil")
    assert type(best) is type(tiny_processor().image_processor) is processing.AgeVlmImageProcessor


@without_torchvision
def test_without_torchvision_its_backend_says_so():
    assert processing.AgeVlmImageProcessor is AgeVlmImageProcessorPil
    with pytest.raises(ImportError, match="AgeVlmImageProcessor requires the Torchvision library"):
        AgeVlmImageProcessor()


@with_torchvision
def test_the_processor_packs_what_either_backend_returns(processor):
    text, images = ["<|image|>Yes", "No", "<|image|><|image|>No"], [[picture()], [], [picture(seed=1), picture(9, 5)]]
    batches = []
    for backend in both():
        processor = tiny_processor()
        processor.image_processor = backend
        batches.append(processor(images=images, text=text, return_tensors="pt"))
        assert processor(images=images, text=text)["image_mask"].tolist() == batches[0]["image_mask"].tolist()
    one, other = batches
    assert one.keys() == other.keys()
    for name in one.keys() - {"pixel_values"}:
        assert torch.equal(one[name], other[name]), name
    torch.testing.assert_close(one["pixel_values"], other["pixel_values"], atol=1.01 / 255 / 0.26, rtol=0)
