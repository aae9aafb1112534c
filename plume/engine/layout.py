"""Lengths, positions and columns of a batch, computed on the CPU, so that the GPU is never waited for on their account.

Left padding becomes right padding here (`plume.inputs.processor` says why it is on the left). The engine's rows begin
in the first column: its cache has no gaps, its causal mask alone hides padding, and an input takes the same columns
whatever its neighbours are.

Letters: B batch, L prefix length (in one pass: with latents and suffix), S suffix length, K latent steps, M visual
tokens, m hidden states that are read: 2, and K + 3 in one pass.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from plume.engine.layers.vision import Grid
from plume.model.interface import (
    Media,
    check_prefix_end,
    find_anchor,
    read_out_column,
    resolve_steps,
    resolve_suffix,
)
from plume.model.model import PlumeModel
from plume.model.positions import latent_start, prefix_positions, suffix_positions

MediaKeys = Sequence[tuple[Sequence[str], Sequence[str]]]
"""For each row, the keys of its images and of its videos."""


@dataclass(frozen=True)
class BatchLayout:
    """A batch, on the CPU, its rows without gaps and padded on the right.

    ids `[B, L]`: prefixes; in one pass each is followed by a place for each latent input, and by the suffix.
    lengths `[B]`: tokens of each row.
    positions `[3, B, L]`: rotary positions.
    columns `[B, m]`: the hidden states that are read: at the anchor and at `<bot>`; in one pass also at each latent
    input (beyond a row's own K at its last) and at `<gen_emb>`.
    is_one_pass: whether nothing follows, since K = 0 or since latent inputs are known before (`PlumeConfig.latents`).
    latent_columns `[N]`: where latent inputs go in one pass, in the flattened ids; latent_steps `[N]`: their steps.
    start `[B]`: rotary position of latent step 0.
    num_latent_steps `[B]`: K of each row; max_latent_steps: the largest. is_gated: whether the model's gate decides.
    media: of all rows, and what the caches ask of them.
    """

    ids: Tensor
    lengths: Tensor
    positions: Tensor
    columns: Tensor
    is_one_pass: bool
    latent_columns: Tensor
    latent_steps: Tensor
    start: Tensor
    num_latent_steps: Tensor
    max_latent_steps: int
    is_gated: bool
    media: MediaLayout

    def pinned(self) -> BatchLayout:
        """In memory from which a GPU copies while it works."""
        return replace(_pinned(self), media=_pinned(self.media))


@dataclass(frozen=True)
class MediaLayout:
    """Images and videos of a batch.

    patches: of all images, then all videos, and grid: their sizes; None without media.
    columns `[M]`: where their visual tokens go, in the flattened ids.
    keys: of the images, then of the videos; empty where no cache asks for them.
    num_shared `[B]`: tokens of each row up to its last visual one, which it shares with other texts about the same
    media. prefix_keys: what these tokens hold; None for rows without media, empty where no cache asks.
    """

    patches: Tensor | None
    grid: Grid | None
    columns: Tensor
    keys: tuple[str, ...]
    num_shared: Tensor
    prefix_keys: tuple[Hashable, ...]


@dataclass(frozen=True)
class _Rows:
    """Rows without gaps: ids `[B, L]`, positions `[3, B, L]`, lengths `[B]`, and the columns of anchor and `<bot>`."""

    ids: Tensor
    positions: Tensor
    lengths: Tensor
    columns: Tensor


def lay_out(
    model: PlumeModel,
    batch: Mapping[str, Any],
    num_latent_steps: int | Tensor | None = None,
    suffix_ids: Tensor | None = None,
    media_keys: MediaKeys | None = None,
) -> BatchLayout:
    """Lay out a batch.

    Args:
        model: gives configuration and positions.
        batch: what the processor makes; padded on either side.
        num_latent_steps: K, one number or one per row `[B]`; None: the configuration's, which a gate may lower.
        suffix_ids: `[S]`, with K = 0 only; the hidden state of its last token is read. None: the configuration's,
            whose `<gen_emb>` is read.
        media_keys: of the images and of the videos of each row; see `plume.embedder.digests`.

    Raises:
        ValueError: as `PlumeModel.forward`; or there are not as many keys as media.
    """
    config = model.config
    batch = {name: value.cpu() for name, value in batch.items() if isinstance(value, Tensor)}
    steps, max_steps = resolve_steps(config, num_latent_steps, batch["input_ids"])
    steps = steps.cpu()
    rows = _without_padding(model, batch)
    last = rows.positions[0].gather(1, rows.columns[:, 1:])[:, 0]
    start = latent_start(last, rows.lengths, config.latent_positions)
    is_one_pass = max_steps == 0 or config.is_one_pass
    latent_columns = rows.lengths[:, None] + torch.arange(max_steps)  # [B, K]
    if is_one_pass:
        rows = _with_suffix(model, rows, start, steps, latent_columns, suffix_ids)
    longest = int(rows.lengths.max())
    is_latent = (torch.arange(max_steps) < steps[:, None]) & is_one_pass
    in_flattened = latent_columns + longest * torch.arange(len(latent_columns))[:, None]
    is_real = torch.arange(longest) < rows.lengths[:, None]
    ids = rows.ids[:, :longest].masked_fill(~is_real, 0)
    return BatchLayout(
        ids=ids,
        lengths=rows.lengths,
        positions=rows.positions[:, :, :longest],
        columns=rows.columns,
        is_one_pass=is_one_pass,
        latent_columns=in_flattened[is_latent],
        latent_steps=is_latent.nonzero()[:, 1],
        start=start,
        num_latent_steps=steps,
        max_latent_steps=max_steps,
        is_gated=config.is_gated(num_latent_steps) and not is_one_pass,
        media=_media(model, batch, ids, rows.columns[:, 0], media_keys),
    )


def _without_padding(model: PlumeModel, batch: Mapping[str, Tensor]) -> _Rows:
    config, ids = model.config, batch["input_ids"]
    mask = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(ids).bool()
    anchor = find_anchor(config, ids, mask)
    positions = prefix_positions(model.backbone.config, ids, mask, Media.of(batch), rule=config.vision_positions)
    order, lengths = torch.argsort(~mask, dim=1, stable=True), mask.sum(dim=1)  # real tokens first
    ids = ids.gather(1, order)
    check_prefix_end(config, ids.gather(1, lengths[:, None] - 1)[:, 0])
    new_column = mask.cumsum(dim=1) - 1  # the number of real tokens before
    columns = torch.stack([new_column.gather(1, anchor[:, None])[:, 0], lengths - 1], dim=1)
    return _Rows(ids, positions.gather(2, order.expand(3, -1, -1)), lengths, columns)


def _with_suffix(
    model: PlumeModel, rows: _Rows, start: Tensor, steps: Tensor, latent_columns: Tensor, suffix_ids: Tensor | None
) -> _Rows:
    """Each prefix followed by its latent inputs and the suffix.

    Also reads the states of latents, and of `<gen_emb>` or the last token of a suffix that was given.
    """
    config, num_rows = model.config, len(rows.ids)
    given = None if suffix_ids is None else suffix_ids.expand(num_rows, -1)
    suffix, is_suffix = resolve_suffix(config, num_rows, rows.ids.device, given, None)
    most, length = latent_columns.shape[1], suffix.shape[1]
    lengths = rows.lengths + steps
    suffix_columns = lengths[:, None] + torch.arange(length)  # [B, S]
    behind = start[:, None] + torch.arange(most)  # [B, K]
    new_columns = torch.cat([latent_columns, suffix_columns], dim=1)  # the suffix overwrites latents that a row lacks
    new_ids = torch.cat([torch.zeros_like(latent_columns), suffix], dim=1)
    new_positions = torch.cat([behind.expand(3, -1, -1), suffix_positions(start, steps, length)], dim=2)
    ids, positions = F.pad(rows.ids, (0, most + length)), F.pad(rows.positions, (0, most + length))
    for part in (slice(0, most), slice(most, None)):
        columns = new_columns[:, part]
        ids = ids.scatter(1, columns, new_ids[:, part])
        positions = positions.scatter(2, columns.expand(3, -1, -1), new_positions[:, :, part])
    read = torch.minimum(latent_columns, lengths[:, None] - 1)
    last = torch.full_like(start, length - 1)
    read_out = lengths[:, None] + (read_out_column(config, suffix, is_suffix) if given is None else last)[:, None]
    return _Rows(ids, positions, lengths + length, torch.cat([rows.columns, read, read_out], dim=1))


def _media(
    model: PlumeModel, batch: Mapping[str, Tensor], ids: Tensor, anchor: Tensor, media_keys: MediaKeys | None
) -> MediaLayout:
    """Patches, sizes and places of images and videos; `anchor [B]` is the first column that is read."""
    media, config = Media.of(batch), model.backbone.config
    is_image, is_video = ids == config.image_token_id, ids == config.video_token_id
    kinds = [
        (patches, grid, is_kind)
        for patches, grid, is_kind in (
            (media.pixel_values, media.image_grid_thw, is_image),
            (media.pixel_values_videos, media.video_grid_thw, is_video),
        )
        if patches is not None and grid is not None
    ]
    num_shared = torch.where(is_image | is_video, torch.arange(ids.shape[1]) + 1, 0).amax(dim=1)
    num_shared = torch.where(num_shared <= anchor, num_shared, 0)  # what is read must come after
    if media_keys is not None:
        _check_keys(media_keys, len(ids), sum(len(grid) for _, grid, _ in kinds))
    patches = [patches for patches, _, _ in kinds]
    return MediaLayout(
        # Joining copies, gigabytes for many pages.
        patches=None if not kinds else patches[0] if len(kinds) == 1 else torch.cat(patches),
        grid=Grid([tuple(size) for _, grid, _ in kinds for size in grid.tolist()]) if kinds else None,
        columns=torch.cat([torch.empty(0).long(), *(is_kind.flatten().nonzero()[:, 0] for *_, is_kind in kinds)]),
        keys=tuple(key for kind in (0, 1) for keys in media_keys or () for key in keys[kind]),
        num_shared=num_shared,
        prefix_keys=tuple(
            (tuple(row[:count]), *map(tuple, keys)) if any(keys) and count else None
            for row, count, keys in zip(ids.tolist(), num_shared.tolist(), media_keys, strict=True)
        )
        if media_keys
        else (),
    )


def _check_keys(media_keys: MediaKeys, num_rows: int, num_media: int) -> None:
    num_keys = sum(len(images) + len(videos) for images, videos in media_keys)
    if (len(media_keys), num_keys) != (num_rows, num_media):
        raise ValueError(
            f"media_keys holds {num_keys} keys in {len(media_keys)} rows for {num_media} media in {num_rows} rows; "
            "give one key for each, as plume.embedder.digests.media_keys makes them"
        )


def _pinned(layout: Any) -> Any:
    tensors = {field.name: getattr(layout, field.name) for field in fields(layout)}
    return replace(layout, **{name: x.pin_memory() for name, x in tensors.items() if isinstance(x, Tensor)})
