"""What an input says and shows, as digests: the keys of the caches."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from PIL import Image

from plume.inputs.item import Item
from plume.inputs.video import Video

Size = Mapping[str, int] | None
"""The fewest and the most pixels of an image, "shortest_edge" and "longest_edge", as image processors have them."""


def medium_key(medium: Image.Image | Video, size: Size = None) -> str:
    """Digest of an image or of sampled frames, and of the pixels that they are reduced to."""
    digest = hashlib.blake2b(repr(sorted((size or {}).items())).encode(), digest_size=20)
    if isinstance(medium, Video):
        digest.update(f"video {tuple(medium.frames.shape)} {medium.seconds_per_frame}".encode())
        digest.update(medium.frames.numpy().tobytes())
    else:
        digest.update(f"image {medium.size} {medium.mode}".encode())
        digest.update(medium.tobytes())
    return digest.hexdigest()


def item_key(item: Item, size: Size = None) -> str:
    """Digest of an input: its text and media in their order, and its instruction.

    Example:
        >>> item_key(Item(("a", "b"))) == item_key(Item(("ab",)))
        False
    """
    digest = hashlib.blake2b(repr(item.instruction).encode(), digest_size=20)
    for part in item.content:
        digest.update((repr(part) if isinstance(part, str) else medium_key(part, size)).encode() + b"\n")
    return digest.hexdigest()


def media_keys(items: Sequence[Item], size: Size = None) -> list[tuple[list[str], list[str]]]:
    """Digests of the images and of the videos of each input."""
    return [
        ([medium_key(image, size) for image in item.images], [medium_key(video, size) for video in item.videos])
        for item in items
    ]
