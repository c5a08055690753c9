"""Pixels as they are in the file: 16 bits keep their range, EXIF turns, and what has no range is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from bdistil.data.readers.images import ArrayImages, GreyFiles, ImageFiles, encoded, image_size, normalised, read_image
from bdistil.errors import RunError, UserError

RAMP = np.linspace(0, 65535, 6 * 4).reshape(6, 4).astype(np.uint16)
PLAIN = normalised([], [0.0], [1.0])


def pixels(kind, path):
    return kind(encoded([path]), torch.zeros(1), PLAIN)[0][0]


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(("kind", "channels"), [(ImageFiles, 3), (GreyFiles, 1)])
def test_16_bits_keep_their_range(tmp_path, suffix, kind, channels):
    Image.fromarray(RAMP).save(tmp_path / f"a.{suffix}")
    x = pixels(kind, tmp_path / f"a.{suffix}")
    assert (x.shape, x.dtype) == ((channels, 6, 4), torch.float32)
    for channel in x:
        np.testing.assert_allclose(channel.numpy(), RAMP / 65535, atol=1e-6)


def test_8_bits_of_any_kind_become_rgb_or_grey(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (6, 4, 3)).astype(np.uint8)
    for mode in ("RGB", "RGBA", "CMYK"):
        path = tmp_path / f"{mode}.tif"
        Image.fromarray(colour).convert(mode).save(path)
        assert pixels(ImageFiles, path).shape == (3, 6, 4)
        assert pixels(GreyFiles, path).shape == (1, 6, 4)
    x = pixels(ImageFiles, tmp_path / "RGB.tif")
    np.testing.assert_allclose(x.numpy(), colour.transpose(2, 0, 1) / 255, atol=1e-6)
    Image.fromarray(colour[..., 0] > 127).save(tmp_path / "bits.png")
    assert set(pixels(GreyFiles, tmp_path / "bits.png").unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_numbers_without_a_range_are_refused(tmp_path, kind):
    path = tmp_path / "a.tif"
    Image.fromarray(RAMP.astype(kind)).save(path)
    with pytest.raises(
        UserError, match=r"a\.tif has pixels that are (real numbers|32-bit integers), whose range is not"
    ):
        image_size(path)
    with pytest.raises(RunError, match=r"bdistil\.data\.Arrays"):
        read_image(str(path))


@pytest.mark.parametrize("kind", ["png", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_orientation_says(tmp_path, orientation, kind):
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(6, 4) * 10)
    turn = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_90}  # fmt: skip
    expected = np.asarray(image.transpose(turn[orientation]) if orientation in turn else image)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"a.{kind}", exif=exif, compression="tiff_lzw")  # Pillow 13 mixes up uncompressed pixels
    x = pixels(GreyFiles, tmp_path / f"a.{kind}")
    np.testing.assert_allclose(x[0].numpy() * 255, expected, atol=1e-3)
    assert image_size(tmp_path / f"a.{kind}") == expected.shape


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"a\.png is no image that can be read"):
        image_size(tmp_path / "a.png")
    with pytest.raises(RunError, match=r"a\.png is not a complete image"):
        read_image(str(tmp_path / "a.png"))


def test_images_in_memory_stay_as_they_are():
    images = torch.arange(24, dtype=torch.uint8).view(2, 1, 3, 4)
    x, y = ArrayImages(images, torch.tensor([4, 5]), PLAIN)[1]
    assert y == 5
    torch.testing.assert_close(x, images[1] / 255)
