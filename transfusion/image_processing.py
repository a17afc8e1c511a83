"""`TransfusionImageProcessor`: any picture -> upright RGB pixels of a known size, with PIL and numpy alone.

What happens to a picture, in this order:

1. A path or bytes must be PNG, JPEG, WEBP or GIF (of an animation, the first frame). URLs are never fetched. The pixel
   count is checked against `max_image_pixels` before anything is decoded.
2. EXIF orientation is applied, to files and to PIL images alike.
3. Everything becomes 8-bit RGB. Transparency is laid over white; 16-bit grey (modes `I;16*` and `I`, 0 to 65535) is
   scaled, not clipped; arrays and tensors are (H, W), (H, W, C) or (C, H, W) of uint8, uint16 or floats in [0, 1].
   With `do_convert_rgb=False` grey, RGB and RGBA keep their channels, for use without a VAE, which reads RGB.
   Colour profiles are ignored: values are taken as sRGB.
4. It is resized so that it just covers `size`, and cropped centrally; or, without `size`, cropped to whole patches.
5. `(pixels * rescale_factor - image_mean) / image_std`, which is [-1, 1] by default.
"""

import io
import os
from collections.abc import Iterator
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature, get_size_dict
from transformers.utils import logging

from .sharing import SharedImageProcessor


logger = logging.get_logger(__name__)

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
# About 150 MB of RGB: more than a phone's camera delivers by default, less than what hurts.
DEFAULT_MAX_IMAGE_PIXELS = 50_000_000

# Keys that transformers itself passes to, or writes into, an image processor's config.
_TRANSFORMERS_KEYS = {"auto_map", "feature_extractor_type", "image_processor_type", "processor_class"}
_MAY_BE_NONE = ("size", "input_data_format")
_CHANNEL_ORDERS = (None, "channels_first", "channels_last")


class TransfusionImageProcessorKwargs(TypedDict, total=False):
    """What `TransfusionImageProcessor` takes, when it is made and per call."""

    size: int | list[int] | tuple[int, ...] | dict[str, int] | None
    patch_size: int
    vae_scale_factor: int
    do_resize: bool
    do_center_crop: bool
    do_rescale: bool
    do_normalize: bool
    do_convert_rgb: bool
    resample: int
    rescale_factor: float
    image_mean: float | list[float] | tuple[float, ...]
    image_std: float | list[float] | tuple[float, ...]
    input_data_format: str | None
    max_image_pixels: int


class TransfusionImageProcessor(SharedImageProcessor, BaseImageProcessor):
    """Turns pictures into pixel arrays that divide into whole patches; the module's docstring states the policy.

    Args:
        size: `{"height": H, "width": W}` in pixels, (H, W), or a number for a square. None: every picture keeps its
            own size, cropped to whole patches.
        patch_size: Side of a patch, in latent positions.
        vae_scale_factor: Pixels per latent position along a side (1 where pixels are the latents).
        do_resize: Scale to `size`. Without it, pictures are only cropped, and too small ones are refused.
        do_center_crop: Crop what `size` does not cover. Without it, `do_resize` stretches, and pictures that are not
            resized must fit already.
        resample: A PIL resampling filter.
        image_mean, image_std: Per channel, or a number for all, on the scale that `rescale_factor` leads to.
        max_image_pixels: Pictures with more pixels are refused before they are decoded.
        do_rescale: Multiply 8-bit values by `rescale_factor`. Without it they stay 0 to 255; those of pictures given
            as floats stay in [0, 1].
        rescale_factor: By default 1 / 255.
        do_normalize: Subtract `image_mean` and divide by `image_std`.
        do_convert_rgb: Make RGB of everything.
        input_data_format: `"channels_first"` or `"channels_last"`, the order of arrays and tensors; None finds it.
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = TransfusionImageProcessorKwargs

    def __init__(
        self,
        size: int | list[int] | tuple[int, ...] | dict[str, int] | None = None,
        patch_size: int = 2,
        vae_scale_factor: int = 1,
        do_resize: bool = True,
        do_center_crop: bool = True,
        resample: int = Image.Resampling.BICUBIC,
        image_mean: float | list[float] | tuple[float, ...] = (0.5, 0.5, 0.5),
        image_std: float | list[float] | tuple[float, ...] = (0.5, 0.5, 0.5),
        max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        do_convert_rgb: bool = True,
        input_data_format: str | None = None,
        **kwargs: Any,
    ) -> None:
        if unknown := set(kwargs) - _TRANSFORMERS_KEYS:
            allowed = ", ".join(TransfusionImageProcessorKwargs.__annotations__)
            raise ValueError(
                f"{', '.join(sorted(unknown))}: not an option of {type(self).__name__}; it has {allowed}."
            )
        super().__init__(**kwargs)
        self.size = None if size is None else dict(get_size_dict(size))
        self.patch_size = patch_size
        self.vae_scale_factor = vae_scale_factor
        self.do_resize = do_resize
        self.do_center_crop = do_center_crop
        self.resample = int(resample)
        self.image_mean = [image_mean] * 3 if isinstance(image_mean, int | float) else list(image_mean)
        self.image_std = [image_std] * 3 if isinstance(image_std, int | float) else list(image_std)
        self.max_image_pixels = max_image_pixels
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.do_convert_rgb = do_convert_rgb
        self.input_data_format = input_data_format
        self.check()

    @property
    def block(self) -> int:
        """Side of a patch in pixels."""
        return self.patch_size * self.vae_scale_factor

    def check(self) -> None:
        """Raise a `ValueError` where the settings do not fit each other."""
        for name in ("patch_size", "vae_scale_factor", "max_image_pixels"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a positive integer.")
        allowed = (3,) if self.do_convert_rgb else (1, 3, 4)
        if (
            len(self.image_mean) not in allowed
            or len(self.image_mean) != len(self.image_std)
            or min(self.image_std) <= 0
        ):
            raise ValueError(
                f"image_mean is {self.image_mean} and image_std {self.image_std}; each needs three numbers "
                "(red, green, blue; with do_convert_rgb=False as many as there are channels), and the latter must be "
                "positive."
            )
        if not self.rescale_factor:
            raise ValueError(f"rescale_factor is {self.rescale_factor!r}; it must be a number that is not 0.")
        if self.input_data_format not in _CHANNEL_ORDERS:
            raise ValueError(f"input_data_format is {self.input_data_format!r}; allowed: {_CHANNEL_ORDERS}.")
        if self.size is not None:
            self._check_size(self.size)

    def _check_size(self, size: dict[str, int]) -> None:
        if set(size) != {"height", "width"}:
            raise ValueError(f"size is {size}; it must have exactly 'height' and 'width', or be None.")
        height, width, block = size["height"], size["width"], self.block
        if height < 1 or width < 1 or height % block or width % block:
            nearest = " x ".join(str(max(block, round(side / block) * block)) for side in (height, width))
            raise ValueError(
                f"size is {height} x {width} pixels; both sides must be multiples of {block}, which is patch_size "
                f"({self.patch_size}) times vae_scale_factor ({self.vae_scale_factor}). The nearest is {nearest}."
            )

    def to_dict(self) -> dict[str, Any]:
        """What `preprocessor_config.json` holds: the options, and none that is None."""
        saved = {*self.valid_kwargs.__annotations__, *_TRANSFORMERS_KEYS}
        return {name: value for name, value in super().to_dict().items() if name in saved}

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As for any image processor, but an option that is not known is left out, and said so.

        A newer version may have written it.
        """
        known = {*cls.valid_kwargs.__annotations__, *_TRANSFORMERS_KEYS}
        if unknown := sorted(set(image_processor_dict) - known):
            logger.warning(
                f"The image processor's file holds {', '.join(unknown)}, which is no option of {cls.__name__} here; "
                "left out. If a newer version of transfusion wrote it, install that; if not, it is misspelt."
            )
        options = {name: value for name, value in image_processor_dict.items() if name in known}
        return super().from_dict(options, **kwargs)

    def preprocess(self, images: Any, return_tensors: str | None = None, **overrides: Any) -> BatchFeature:
        """Turn one picture or several into `pixel_values`.

        Args:
            images: Paths, bytes, PIL images, arrays or tensors: one, a list of them or of such lists, or a batch in
                one array of four axes.
            return_tensors: `"pt"` or `"np"` stacks them to (N, 3, H, W), which needs equal sizes; None leaves a list.
            overrides: Any option of the class, for this call; None stands for its own value, except for `size` and
                `input_data_format`. Of transformers' further options `device="cpu"` and
                `data_format="channels_first"` say what is so anyway, and `disable_grouping` is without effect.

        Returns:
            `pixel_values`: a list of float32 arrays (3, H, W).

        Raises:
            ValueError: A picture that is empty, truncated, too large, too small, of a foreign format or out of range;
                pictures of different sizes to stack.
        """
        _drop_backend_options(overrides)
        given = {name: value for name, value in overrides.items() if value is not None or name in _MAY_BE_NONE}
        if given:
            return type(self)(**{**self.to_dict(), **given}).preprocess(images, return_tensors)
        pictures = list(flat_pictures(images))
        if not pictures:
            raise ValueError("images is an empty list; give at least one picture.")
        pixels = [self._read(picture) for picture in pictures]
        shapes = {values.shape for values in pixels}
        if return_tensors is not None and len(shapes) > 1:
            raise ValueError(
                f"Pictures of the shapes {sorted(shapes)} cannot be stacked; set `size`, or leave return_tensors out."
            )
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def patch_grid(self, height: int, width: int, **overrides: Any) -> tuple[int, int]:
        """Rows and columns of patches of a picture of height x width pixels, without reading it."""
        if overrides:
            return type(self)(**{**self.to_dict(), **overrides}).patch_grid(height, width)
        size = self.size or {"height": height, "width": width}
        return size["height"] // self.block, size["width"] // self.block

    def _read(self, source: Any) -> np.ndarray:
        """A picture -> float32 (C, H, W)."""
        picture = load_picture(source, self.max_image_pixels, self.do_convert_rgb, self.input_data_format)
        factor = self.rescale_factor if self.do_rescale else 1 / 255 if _is_float(source) else 1.0
        return self._to_pixels(self._fit(picture), factor)

    def _fit(self, picture: Image.Image) -> Image.Image:
        """Bring an RGB picture to its target size."""
        if self.size is None:
            target = (picture.width // self.block * self.block, picture.height // self.block * self.block)
        else:
            target = (self.size["width"], self.size["height"])
            if self.do_resize and self.do_center_crop:
                # One resampling of the central box: a 20000 x 1 picture makes no giant intermediate.
                return ImageOps.fit(picture, target, method=self.resample)
            if self.do_resize:
                return picture.resize(target, self.resample)
        if picture.size == target:
            return picture
        if not self.do_center_crop or 0 in target or picture.width < target[0] or picture.height < target[1]:
            wanted = f"{self.size['height']} x {self.size['width']}" if self.size else f"multiples of {self.block}"
            raise ValueError(
                f"A picture of {picture.height} x {picture.width} pixels (height x width) cannot be brought to "
                f"{wanted} with do_resize={self.do_resize}, do_center_crop={self.do_center_crop}; resize it, or set "
                "`size`, do_resize=True and do_center_crop=True."
            )
        left, top = (picture.width - target[0]) // 2, (picture.height - target[1]) // 2
        return picture.crop((left, top, left + target[0], top + target[1]))

    def _to_pixels(self, picture: Image.Image, factor: float) -> np.ndarray:
        """Picture -> float32 (C, H, W)."""
        values = np.atleast_3d(np.asarray(picture))
        # In double precision, so that 255 / 255 is 1; by a table, as there are 256 values.
        pixels = (np.arange(256) * factor).astype(np.float32)[values]
        if self.do_normalize:
            if values.shape[-1] != len(self.image_mean):
                raise ValueError(
                    f"A picture has {values.shape[-1]} channels and image_mean is {self.image_mean}; give a number "
                    "for each, or set do_convert_rgb=True."
                )
            mean, std = np.array([self.image_mean, self.image_std], dtype=np.float32)
            pixels = (pixels - mean) / std
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def to_picture(self, pixels: torch.Tensor) -> Image.Image:
        """Undo the normalisation of pixels (3, H, W); what lies outside 0 to 255 is clipped."""
        values = pixels.cpu().float().numpy().transpose(1, 2, 0)
        if self.do_normalize:
            mean, std = np.array([self.image_mean, self.image_std], dtype=np.float32)
            values = values * std + mean
        factor = self.rescale_factor if self.do_rescale else 1.0
        return Image.fromarray((values / factor).clip(0, 255).round().astype(np.uint8))


def flat_pictures(images: Any) -> Iterator[Any]:
    """The pictures of nested lists, of arrays with a batch axis, or a single one."""
    if isinstance(images, list | tuple) or isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4:
        for image in images:
            yield from flat_pictures(image)
    else:
        yield images


def _drop_backend_options(options: dict[str, Any]) -> None:
    """Take out of `options` what transformers' callers say to a backend, if it is what happens here."""
    options.pop("disable_grouping", None)
    for name, only in (("device", "cpu"), ("data_format", "channels_first")):
        value = options.pop(name, None)
        if value is not None and str(getattr(value, "value", value)) != only:
            raise ValueError(
                f"{name} is {value!r}; this image processor works with {name}={only!r} alone. Convert its output."
            )


def _is_float(source: Any) -> bool:
    if isinstance(source, torch.Tensor):
        return source.is_floating_point()
    return isinstance(source, np.ndarray) and bool(np.issubdtype(source.dtype, np.floating))


def load_picture(
    source: Any,
    max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS,
    convert_rgb: bool = True,
    input_data_format: str | None = None,
) -> Image.Image:
    """Return an upright 8-bit RGB picture from a local path, encoded bytes, a PIL image, an array or a tensor.

    Args:
        source: The picture.
        max_image_pixels: How many pixels it may have.
        convert_rgb: False leaves grey, RGB and RGBA as they are, and refuses other modes.
        input_data_format: The order of an array's axes, `"channels_first"` or `"channels_last"`; None finds it.

    Raises:
        ValueError: What cannot be read, is not of an allowed format, or has more pixels than the limit.
    """
    if isinstance(source, Image.Image):
        return _decode(source, "The PIL image", max_image_pixels, convert_rgb)
    if isinstance(source, np.ndarray | torch.Tensor):
        picture = _from_array(source, max_image_pixels, input_data_format)
        return to_rgb(picture) if convert_rgb else picture
    stream: Any = source
    if isinstance(source, bytes):
        name, stream = f"The picture of {len(source)} bytes", io.BytesIO(source)
    elif isinstance(source, str | os.PathLike):
        name = f"The picture {os.fspath(source)!r}"
        if not os.path.isfile(source):
            raise ValueError(f"{name} is not a file. Pictures are read from local paths; URLs are not fetched.")
    else:
        raise ValueError(
            f"A picture is a {type(source).__name__}; give a path, bytes, a PIL image, a numpy array or a tensor."
        )
    try:
        image = Image.open(stream, formats=PICTURE_FORMATS)
    except Exception as error:  # Pillow's plugins raise what they like on broken files
        raise ValueError(f"{name} cannot be opened as {', '.join(PICTURE_FORMATS)}: {error}") from error
    with image:
        return _decode(image, name, max_image_pixels, convert_rgb)


def _decode(image: Image.Image, name: str, max_image_pixels: int, convert_rgb: bool) -> Image.Image:
    _check_pixels(image.width, image.height, name, max_image_pixels)
    if not convert_rgb and image.mode not in ("L", "RGB", "RGBA"):
        raise ValueError(f"{name} has the mode {image.mode}; do_convert_rgb=False reads L, RGB and RGBA alone.")
    try:
        upright = ImageOps.exif_transpose(image)
        return to_rgb(upright) if convert_rgb else upright
    except Exception as error:
        raise ValueError(f"{name} cannot be decoded (truncated or damaged?): {error}") from error


def _check_pixels(width: int, height: int, name: str, max_image_pixels: int) -> None:
    if not 0 < width * height <= max_image_pixels:
        raise ValueError(
            f"{name} has {width} x {height} pixels (width x height); between 1 and {max_image_pixels} in all are "
            "allowed. Scale it down, or raise max_image_pixels."
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode of PIL to 8-bit RGB, transparency over white."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bit(np.asarray(image)).convert("RGB")
    if image.mode == "F":
        return _from_array(np.asarray(image), image.width * image.height).convert("RGB")
    if image.has_transparency_data:
        # Not convert("RGB"), which would uncover the colour hidden under transparent pixels.
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return white.convert("RGB")
    return image.convert("RGB")


def _from_16_bit(values: np.ndarray) -> Image.Image:
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"16-bit values run from {values.min()} to {values.max()}; 0 to 65535 is allowed.")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _from_array(
    source: np.ndarray | torch.Tensor, max_image_pixels: int, input_data_format: str | None = None
) -> Image.Image:
    """(H, W), (H, W, C) or (C, H, W), C in 1, 3, 4, of uint8, uint16 or floats in [0, 1] -> L, RGB or RGBA picture."""
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = source.float().numpy() if source.is_floating_point() else source.numpy()
    values = _channels_last(source, input_data_format)
    _check_pixels(values.shape[1], values.shape[0], "The array", max_image_pixels)
    if np.issubdtype(values.dtype, np.floating):
        if not (values.min() >= 0 and values.max() <= 1):  # written so that NaN is refused too
            raise ValueError(
                f"A float picture has values from {values.min()} to {values.max()}; they must be in [0, 1]. "
                "Bring [-1, 1] there by (x + 1) / 2, or 0 to 255 by x / 255."
            )
        values = (values.astype(np.float32) * 255).round().astype(np.uint8)
    elif values.dtype == np.uint16:
        values = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    elif values.dtype != np.uint8:
        raise ValueError(f"An array picture has dtype {values.dtype}; use uint8, uint16 or floats in [0, 1].")
    return Image.fromarray(np.ascontiguousarray(values.squeeze(-1) if values.shape[-1] == 1 else values))


def _channels_last(values: np.ndarray, input_data_format: str | None) -> np.ndarray:
    """(H, W) or (H, W, C) or (C, H, W) -> (H, W, C); an array that could be either is refused."""
    if values.ndim == 2:
        return values[:, :, None]
    first, last = (values.ndim == 3 and values.shape[axis] in (1, 3, 4) for axis in (0, -1))
    if input_data_format is not None:
        first, last = first and input_data_format == "channels_first", last and input_data_format == "channels_last"
    elif first and last and (values.shape[0] == 3) != (values.shape[-1] == 3):
        first, last = values.shape[0] == 3, values.shape[-1] == 3  # RGB of 4 pixels rather than RGBA of 3
    if first == last:
        reason = "could be channels first or last" if first else "has no axis of 1, 3 or 4 channels"
        raise ValueError(
            f"An array picture of shape {values.shape} {reason} (input_data_format={input_data_format!r}); give "
            "(H, W), (H, W, C) or (C, H, W) and, where both fit, input_data_format; or a PIL image."
        )
    return values if last else values.transpose(1, 2, 0)
