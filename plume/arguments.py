"""What `PlumeModel.forward` makes of its arguments: checks, and defaults from the configuration.

Letters: B batch, L prefix length, S suffix length, K latent steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plume.config import PlumeConfig
from plume.tokens import LATENT_START


def check_prefix(config: PlumeConfig, input_ids: Tensor) -> None:
    """Raise ValueError unless every prefix ends with `<bot>` in the last column."""
    if not (input_ids[:, -1] == config.latent_start_token_id).all():
        raise ValueError(
            f"every prefix must end with {LATENT_START} in the last column; pad on the left and write prefixes with "
            "the checkpoint's processor"
        )


def suffix_of(
    config: PlumeConfig, input_ids: Tensor, suffix_ids: Tensor | None, suffix_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Suffix `[B, S]` and its mask; the configuration's where none is given."""
    if suffix_ids is None:
        own = torch.tensor(config.suffix_ids, device=input_ids.device)
        suffix_ids = own.expand(len(input_ids), -1)
    return suffix_ids, torch.ones_like(suffix_ids).bool() if suffix_mask is None else suffix_mask.bool()


def steps_of(
    config: PlumeConfig, asked: int | Tensor | None, input_ids: Tensor, least: int | None = None
) -> tuple[Tensor, int]:
    """K per row `[B]`, and how many steps to run, on the host: the largest K, but at least `least`."""
    asked = config.num_latent_steps if asked is None else asked
    if isinstance(asked, Tensor) and asked.ndim == 1:
        if len(asked) != len(input_ids):
            raise ValueError(f"num_latent_steps holds {len(asked)} numbers for {len(input_ids)} rows")
        steps = asked.to(input_ids.device, torch.long)
        low, high = torch.stack(steps.aminmax()).tolist()
        config.check_num_latent_steps(low)
    else:
        high = int(asked) if isinstance(asked, Tensor) else asked
        steps = None
    steps = torch.full_like(input_ids[:, 0], high) if steps is None else steps
    high = max(high, least or 0)
    config.check_num_latent_steps(high)
    return steps, int(high)


def last_column(ids: Tensor, mask: Tensor, token_id: int | None, name: str) -> Tensor:
    """Column of the last `token_id` in each row, `[B]`.

    Raises:
        ValueError: a row has none.
    """
    columns = torch.arange(ids.shape[1], device=ids.device)
    found = torch.where((ids == token_id) & mask, columns, -1).amax(dim=1)
    if (found < 0).any():
        row = int((found < 0).nonzero()[0])
        raise ValueError(f"row {row} holds no {name}; write it with the checkpoint's processor")
    return found
