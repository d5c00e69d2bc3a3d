"""Reading images and masks, with errors that name the file."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torchvision import tv_tensors

LARGEST = 2**30  # pixels of an image

_SUBFILE_TYPE = 254  # TIFF's tag; bit 0: a smaller copy of another picture in the file

# Formats that Pillow knows by name but cannot read without another library.
_NO_PICTURES = frozenset({"BUFR", "GRIB", "HDF5", "MPEG"})

# What Pillow raises on damaged files, and on files too large to be images.
_BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class DataError(ValueError):
    """A file of the data set cannot be used; ``str(error)`` is one line that names the file.

    A ``DataLoader`` re-creates an exception of its worker from the worker's whole traceback.
    This class keeps the line at its end, so the message is the same with and without workers.
    """

    def __init__(self, message: str) -> None:
        *_, line = message.strip().split(f"{__name__}.{type(self).__name__}: ")
        super().__init__(" ".join(line.split()))


class StoredMask(NamedTuple):
    """A mask as its file holds it, upright as its EXIF orientation says.

    ``pixels`` are numbers (H, W) of an integer dtype or colors uint8 (H, W, 3); ``palette`` are
    the colors uint8 (n, 3) of the numbers, where the file has them; ``jpeg`` says that JPEG has
    changed what was drawn.
    """

    path: Path
    mode: str
    pixels: NDArray[Any]
    palette: NDArray[np.uint8] | None = None
    jpeg: bool = False


def read_image(path: str | Path, channels: int = 3) -> tv_tensors.Image:
    """Image, uint8 (channels, H, W), upright as its EXIF orientation says.

    3 channels are RGB and 1 is gray, whatever the file holds; transparency is left out then, so
    that the colors are those stored. Any other number is that of the file's bands, in their order:
    of a TIFF (read with rasterio), or of what Pillow reads (4 of RGBA, 2 of gray with alpha).
    16-bit images are scaled by the range of 16 bits.

    Raises:
        DataError: the file is missing, truncated or no image; its range of values is not known
            (float, 32 bits), it holds several pictures, nothing but its transparency differs, or it
            has another number of bands.
    """
    if _is_banded(path, channels):
        return _read_bands(path, channels)
    with _opened(path, "image") as file:
        return _converted(ImageOps.exif_transpose(file), path, file.format, channels)


def picture_to_image(picture: Image.Image, channels: int = 3) -> tv_tensors.Image:
    """What ``read_image`` makes of a file, of a picture that is open already."""
    return _converted(ImageOps.exif_transpose(picture), "image", picture.format, channels)


def read_pair(
    image: str | Path, mask: str | Path, channels: int = 3
) -> tuple[tv_tensors.Image, StoredMask]:
    """An image as ``read_image`` returns it, and its mask.

    EXIF orientation: annotation tools show and mark the upright image, so the image is turned
    upright where it then has the mask's size, which includes the cases that the size cannot decide
    (half turns, mirrored and square images). Where only the stored pixels have the mask's size,
    they are left as stored. A mask that a script drew on the stored pixels of a square or
    half-turned image is thus taken the wrong way round: strip the orientation of such images.

    Raises:
        DataError: a file cannot be used, or image and mask differ in size either way.
    """
    stored_mask = read_mask(mask)
    size = stored_mask.pixels.shape[1::-1]
    if _is_banded(image, channels):
        bands = _read_bands(image, channels)
        if tuple(bands.shape[:0:-1]) != size:
            raise _other_size(mask, bands.shape[:0:-1], size)
        return bands, stored_mask
    with _opened(image, "image") as file:
        stored = file.size
        upright = ImageOps.exif_transpose(file)
        picture = file if size == stored != upright.size else upright
        if picture.size != size:
            how = "" if upright.size == stored else f" turned by EXIF, {_size(stored)} as stored"
            raise _other_size(mask, upright.size, size, how)
        return _converted(picture, image, file.format, channels), stored_mask


def read_mask(path: str | Path) -> StoredMask:
    """The mask in an image file, or in a ``.mat`` file of SBD.

    Float masks of whole numbers are numbers; transparency is left out where the color alone says
    what a pixel is.

    Raises:
        DataError: the file is missing, truncated or no mask, or holds several pictures.
    """
    if Path(path).suffix == ".mat":
        return StoredMask(Path(path), "L", _read_sbd_mask(path))
    with _opened(path, "mask") as file:
        # Pillow cuts channels of 16 bits to 8, which in a mask is not another shade but nonsense.
        deep = any(";16" in str(tile.args) for tile in file.tile)
        upright = ImageOps.exif_transpose(file)
        mode, pixels = upright.mode, np.array(upright)
        flat = upright.getpalette("RGB") if mode == "P" else None
        # A TIFF may hold JPEG, and an MPO is one.
        jpeg = file.format in ("JPEG", "MPO") or file.info.get("compression") == "jpeg"
    if mode in ("LA", "RGBA") and not deep:
        pixels = _without_alpha(pixels, path)
    elif mode == "1":
        pixels = pixels.astype(np.uint8)
    elif mode == "F" and (pixels == np.rint(pixels)).all() and (np.abs(pixels) < 2**24).all():
        pixels = pixels.astype(np.int32)
    elif mode not in ("P", "L", "I") and not mode.startswith("I;16") and (mode != "RGB" or deep):
        raise DataError(
            f"{path}: expected a mask of whole numbers (palette, gray, 16 or 32 bits) or of 8-bit "
            f"colors (RGB, RGBA), got mode {mode}{' of 16 bits' if deep else ''}"
        )
    palette = None if flat is None else np.array(flat, np.uint8).reshape(-1, 3)
    return StoredMask(Path(path), mode, pixels, palette, jpeg)


def image_size(path: str | Path, channels: int = 3) -> tuple[int, int]:
    """(height, width) as stored; only the file's head is read. Raises ``DataError``."""
    banded = _is_banded(path, channels)
    with _opened_bands(path) if banded else _opened(path, "image") as file:
        return file.height, file.width


def read_palette(path: str | Path) -> list[tuple[int, int, int]]:
    """RGB colors of a palette image; empty for a gray one. Raises ``DataError``."""
    with _opened(path, "mask") as file:
        flat = file.getpalette("RGB") if file.mode == "P" else None
    return list(zip(flat[::3], flat[1::3], flat[2::3], strict=True)) if flat else []


def has_image_suffix(path: Path) -> bool:
    """Whether Pillow reads files that are called so; dot files (``._x.jpg``) are no images."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    pictures = kind in Image.OPEN and kind not in _NO_PICTURES
    return not path.name.startswith(".") and (pictures or kind == "MPO")  # read as a JPEG


@contextmanager
def _opened(path: str | Path, kind: str) -> Iterator[ImageFile.ImageFile]:
    """The only picture of a file; raises ``DataError`` for all that Pillow finds wrong with it."""
    try:
        with _large_pictures(), Image.open(path) as file:
            pictures = _count_pictures(file)
            if pictures > 1:
                raise DataError(
                    f"{path}: expected one picture, got {pictures}: write one file each"
                )
            yield file
    except DataError:
        raise
    except _BROKEN as error:
        raise _unreadable(path, kind, error) from error


@contextmanager
def _large_pictures() -> Iterator[None]:
    """Pillow refuses 179 megapixels, as files of strangers may be made to fill the memory."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, LARGEST // 2  # where it warns
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _count_pictures(file: Image.Image) -> int:
    frames = getattr(file, "n_frames", 1)
    if frames == 1 or file.format in ("MPO", "PSD"):  # a preview, layers: the first is the picture
        return 1
    if not isinstance(file, TiffImageFile):
        return frames
    reduced = 0
    for frame in range(1, frames):  # overviews, as GeoTIFFs have them
        file.seek(frame)
        reduced += file.tag_v2.get(_SUBFILE_TYPE, 0) & 1
    file.seek(0)
    return frames - reduced


def _converted(
    image: Image.Image, path: str | Path, file_format: str | None, channels: int
) -> tv_tensors.Image:
    if channels not in (1, 3):
        pixels = np.array(image)
        if len(image.getbands()) != channels or pixels.dtype != np.uint8:
            raise DataError(
                f"{path}: expected {channels} channels, got {len(image.getbands())} "
                f"(mode {image.mode})"
            )
        return _image(pixels)
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow's converter clips these to 0 to 255; PGM's it has scaled to 16 bits on reading.
        pixels = np.array(image)
        if not image.mode.startswith("I;16") and not (image.mode == "I" and file_format == "PPM"):
            raise DataError(
                f"{path}: expected 8 or 16 bits a channel, got mode {image.mode}, values "
                f"{pixels.min():g} to {pixels.max():g}, whose white is unknown: save it with 8 or "
                "16 bits"
            )
        gray = torch.from_numpy(_eight_bits(pixels, path))
        return tv_tensors.Image(gray.expand(channels, -1, -1).contiguous())
    if image.has_transparency_data:
        image = image.convert("RGBA")
        extrema: Any = image.getextrema()  # lowest and highest of each band
        *colors, alpha = extrema
        if alpha[0] < alpha[1] and all(low == high for low, high in colors):
            raise DataError(
                f"{path}: expected an image, got one color throughout, only its transparency "
                "differs: lay it over a background"
            )
    return _image(np.array(image.convert("L" if channels == 1 else "RGB")))


def _image(pixels: NDArray[np.uint8]) -> tv_tensors.Image:
    """(H, W) or (H, W, channels) as (channels, H, W)."""
    pixels = np.atleast_3d(pixels)
    return tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())


def _eight_bits(pixels: NDArray[np.uint16], path: str | Path) -> NDArray[np.uint8]:
    if pixels.max() < 2**12:
        # By folder, so that it is said once.
        warnings.warn(
            f"{Path(path).parent}: 16-bit images whose values end below 4096 are read as nearly "
            "black; if they hold 12 bits or fewer, scale them to 16",
            stacklevel=2,
        )
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _is_banded(path: str | Path, channels: int) -> bool:
    """Whether a file's bands are to be read: of a TIFF, Pillow reads some of four 8-bit bands."""
    return channels not in (1, 3) and _is_tiff(path)


def _is_tiff(path: str | Path) -> bool:
    return Path(path).suffix.lower() in (".tif", ".tiff")


@contextmanager
def _opened_bands(path: str | Path) -> Iterator[Any]:
    try:
        import rasterio
    except ImportError as error:
        raise DataError(
            f"{path}: reading the bands of a TIFF needs rasterio: pip install rasterio ({error})"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with rasterio.open(path) as file:
                yield file
    except rasterio.errors.RasterioError as error:
        raise _unreadable(path, "image", error) from error


def _read_bands(path: str | Path, channels: int) -> tv_tensors.Image:
    with _opened_bands(path) as file:
        if file.count != channels:
            raise DataError(f"{path}: expected {channels} channels, got {file.count}")
        pixels = file.read()
    if pixels.dtype == np.uint16:
        pixels = _eight_bits(pixels, path)
    if pixels.dtype != np.uint8:
        raise DataError(
            f"{path}: expected 8 or 16 bits a channel, got {pixels.dtype}, values "
            f"{pixels.min():g} to {pixels.max():g}, whose white is unknown"
        )
    return tv_tensors.Image(torch.from_numpy(pixels))


def _without_alpha(pixels: NDArray[np.uint8], path: str | Path) -> NDArray[np.uint8]:
    """Colors (H, W, 3), or gray values (H, W), of pixels with an alpha channel."""
    alpha = pixels[..., -1]
    colors = pixels[..., :-1]
    if (alpha != 255).any():
        packed = packed_colors(colors if colors.shape[-1] == 3 else colors.repeat(3, -1))
        both = np.intersect1d(packed[alpha == 255], packed[alpha != 255])
        if both.size:
            raise DataError(
                f"{path}: expected a mask without transparency, got color #{both[0]:06x} opaque "
                "and transparent"
            )
    return np.ascontiguousarray(colors.squeeze(-1) if colors.shape[-1] == 1 else colors)


def packed_colors(colors: NDArray[np.uint8]) -> NDArray[np.int32]:
    """RGB colors (..., 3) as numbers 0xrrggbb."""
    red, green, blue = np.moveaxis(colors.astype(np.int32), -1, 0)
    return red << 16 | green << 8 | blue


def _read_sbd_mask(path: str | Path) -> np.ndarray:
    from scipy.io import loadmat  # only SBD needs scipy

    try:
        mask = loadmat(path)["GTcls"][0]["Segmentation"][0]
    except Exception as error:  # scipy's own errors have no base class but this one
        raise _unreadable(path, "mask", error) from error
    return np.ascontiguousarray(mask, dtype=np.uint8)


def _unreadable(path: str | Path, kind: str, error: BaseException) -> DataError:
    banded = kind == "image" and isinstance(error, UnidentifiedImageError) and _is_tiff(path)
    hint = "; a TIFF of N bands needs --data.channels N" if banded else ""
    return DataError(f"{path}: cannot read {kind}: {error}{hint}")


def _other_size(
    mask: str | Path, expected: Sequence[int], size: Sequence[int], how: str = ""
) -> DataError:
    return DataError(
        f"{mask}: expected the size of its image, {_size(expected)}{how}, got {_size(size)}"
    )


def _size(size: Sequence[int]) -> str:
    return "{1} x {0}".format(*size)
