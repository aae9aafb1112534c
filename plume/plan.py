"""What the host knows of a batch before the device starts: lengths, positions, places; so that nothing is asked later.

Letters: B batch, L prefix length, S suffix length, M visual tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from plume import positions, tokens
from plume.arguments import check_prefix, last_column, steps_of, suffix_of
from plume.backbone import prefix_positions
from plume.model import PlumeModel
from plume.tower import Grid


@dataclass(frozen=True)
class Plan:
    """A batch, on the CPU, its rows without gaps and padded on the right.

    ids `[B, L]`; the suffix stands behind each prefix where no latent step comes between.
    lengths `[B]`: tokens of each row.
    positions `[3, B, L]`: rotary positions.
    columns `[B, m]`: hidden states that are wanted: anchor, `<bot>`, and without latent steps `<gen_emb>`.
    start `[B]`: rotary position of latent step 0.
    num_latent_steps `[B]`: K of each row; max_latent_steps: the largest.
    patches: of all images, then all videos, and grid: their sizes; None without media.
    places `[M]`: where their visual tokens go, in the flattened ids.
    media_keys: of the images, then of the videos; empty where no cache asks for them.
    num_shared `[B]`: tokens of each row up to its last visual one, and prefix_keys: of what they hold; None for rows
    without media.
    """

    ids: Tensor
    lengths: Tensor
    positions: Tensor
    columns: Tensor
    start: Tensor
    num_latent_steps: Tensor
    max_latent_steps: int
    patches: Tensor | None
    grid: Grid | None
    places: Tensor
    media_keys: tuple[str, ...]
    num_shared: Tensor
    prefix_keys: tuple[Hashable, ...]

    def pinned(self) -> Plan:
        """In memory from which a GPU copies while it works."""
        tensors = {one.name: getattr(self, one.name) for one in fields(self)}
        return replace(self, **{name: one.pin_memory() for name, one in tensors.items() if isinstance(one, Tensor)})


def plan(
    model: PlumeModel,
    batch: dict[str, Any],
    num_latent_steps: int | Tensor | None = None,
    suffix_ids: Tensor | None = None,
    media_keys: Sequence[tuple[Sequence[str], Sequence[str]]] | None = None,
) -> Plan:
    """Lay out a batch.

    Args:
        model: gives configuration and positions.
        batch: what the processor makes; padded on either side.
        num_latent_steps: K, one number or one per row `[B]`; None: the configuration's.
        suffix_ids: `[S]`, where no latent step comes before; None: the configuration's. Of others than the
            configuration's the last hidden state is wanted.
        media_keys: of the images and of the videos of each row; see `plume.content`.

    Raises:
        ValueError: as `PlumeModel.forward`; or there are not as many keys as media.
    """
    config, vision = model.config, model.backbone.config
    batch = {name: value.cpu() for name, value in batch.items() if isinstance(value, Tensor)}
    ids = batch["input_ids"]
    mask = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(ids).bool()
    steps, max_steps = steps_of(config, num_latent_steps, ids)
    steps = steps.cpu()
    anchor = last_column(ids, mask, config.anchor_token_id, tokens.ANCHOR)
    timing = {name: batch.get(name) for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")}
    places = prefix_positions(vision, ids, mask, **timing, rule=config.vision_positions)

    # Rows without gaps: a column's new place is the number of real tokens before it.
    order = torch.argsort(~mask, dim=1, stable=True)
    lengths = mask.sum(dim=1)
    ids = ids.gather(1, order)
    places = places.gather(2, order.expand(3, -1, -1))
    rows = torch.arange(len(ids))
    check_prefix(config, ids[rows, lengths - 1][:, None])
    last = places[0, rows, lengths - 1]
    start = lengths if config.latent_positions == "kv_length" else last + 1
    columns = torch.stack([(mask.cumsum(dim=1) - 1)[rows, anchor], lengths - 1], dim=1)

    if max_steps == 0:
        own = suffix_ids is None
        suffix, is_suffix = suffix_of(config, ids, None if own else suffix_ids.expand(len(ids), -1), None)
        end = suffix.shape[1] - 1
        read_out = last_column(suffix, is_suffix, config.read_out_token_id, tokens.READ_OUT) if own else end
        columns = torch.cat([columns, (lengths + read_out)[:, None]], dim=1)
        behind = lengths[:, None] + torch.arange(suffix.shape[1])  # [B, S]
        ids = torch.nn.functional.pad(ids, (0, suffix.shape[1])).scatter(1, behind, suffix)
        places = torch.nn.functional.pad(places, (0, suffix.shape[1]))
        places = places.scatter(2, behind.expand(3, -1, -1), positions.suffix_positions(start, steps, suffix.shape[1]))
        lengths = lengths + suffix.shape[1]

    length = int(lengths.max())
    real = torch.arange(length) < lengths[:, None]
    ids = ids[:, :length].masked_fill(~real, 0)
    is_image, is_video = ids == vision.image_token_id, ids == vision.video_token_id
    media = [
        (batch[f"pixel_values{kind}"], batch[f"{name}_grid_thw"], is_kind)
        for kind, name, is_kind in (("", "image", is_image), ("_videos", "video", is_video))
        if f"pixel_values{kind}" in batch
    ]
    num_media = sum(len(grid) for _, grid, _ in media)
    num_keys = sum(len(images) + len(videos) for images, videos in media_keys or ())
    if media_keys is not None and (len(media_keys), num_keys) != (len(ids), num_media):
        raise ValueError(
            f"media_keys holds {num_keys} keys in {len(media_keys)} rows for {num_media} media in {len(ids)} rows; "
            "give one key for each, as plume.content.media_keys makes them"
        )
    visual = is_image | is_video
    num_shared = torch.where(visual, torch.arange(length) + 1, 0).amax(dim=1)
    num_shared = torch.where(num_shared <= columns[:, 0], num_shared, 0)  # what is read must stand behind
    keys = media_keys or [((), ())] * len(ids)
    prefix_keys = (
        [
            (tuple(row[:count]), *map(tuple, key)) if any(key) and count else None
            for row, count, key in zip(ids.tolist(), num_shared.tolist(), keys, strict=True)
        ]
        if media_keys
        else []
    )
    return Plan(
        ids=ids,
        lengths=lengths,
        positions=places[:, :, :length],
        columns=columns,
        start=start,
        num_latent_steps=steps,
        max_latent_steps=max_steps,
        patches=_joined([patches for patches, _, _ in media]),
        grid=Grid([tuple(size) for _, grid, _ in media for size in grid.tolist()]) if media else None,  # type: ignore[misc]
        media_keys=tuple(one for kind in (0, 1) for key in keys for one in key[kind]),
        num_shared=num_shared,
        prefix_keys=tuple(prefix_keys),
        places=torch.cat([is_kind.flatten().nonzero()[:, 0] for *_, is_kind in media])
        if media
        else torch.empty(0).long(),
    )


def _joined(parts: list[Tensor]) -> Tensor | None:
    # Joining copies, gigabytes for many pages.
    return None if not parts else parts[0] if len(parts) == 1 else torch.cat(parts)
