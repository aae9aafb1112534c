"""The three ways to embed: batched = alone, written through the cache = written without."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from plume import Item
from plume_eval.baselines import embed, embed_batch
from plume_eval.latency import latency_ms


@pytest.fixture
def chatty(model):
    """Gives the read-out a random row, so that random weights stop writing at different lengths."""
    with torch.no_grad():
        row = model.backbone.get_input_embeddings().weight[model.config.read_out_token_id]
        row.copy_(0.3 * torch.randn(row.shape, generator=torch.Generator().manual_seed(3)))
    return model


def items(picture):
    return [Item.parse(f"kite {n}") for n in range(5)] + [Item.parse(picture(84, 56)), Item.parse("table")]


def written_by_hand(model, item, limit):
    """Greedy writing that recomputes everything at every token."""
    prefix, _ = model.embed_prefix(model.read_inputs(model.processor.encode([item])))
    embeds, positions = prefix.embeds, prefix.positions
    token, count = torch.tensor([[model.config.latent_end_token_id]]), 0
    while True:
        embeds = torch.cat([embeds, model.embed_tokens(token)], dim=1)
        positions = torch.cat([positions, positions.amax() + torch.ones(3, 1, 1, dtype=torch.long)], dim=2)
        hidden = model.backbone.language_model(
            inputs_embeds=embeds, position_ids=positions, use_cache=False
        ).last_hidden_state[:, -1]
        if token.item() == model.config.read_out_token_id or count == limit:
            return normalize(hidden[0], dim=-1), count
        token = model.logits(hidden).argmax(dim=-1, keepdim=True)
        count += token.item() != model.config.read_out_token_id


@torch.inference_mode()
def test_explicit_writing_in_a_batch_equals_writing_alone_without_a_cache(chatty, picture):
    limit = 12
    result = embed(chatty, items(picture), "explicit", max_new_tokens=limit)
    for row, item in enumerate(items(picture)):
        embedding, count = written_by_hand(chatty, item, limit)
        assert result.num_reasoning_steps[row] == count
        assert torch.allclose(result.embedding[row], embedding, atol=1e-4)
    lengths = set(result.num_reasoning_steps.tolist())
    assert len(lengths) > 1  # rows stopped at different lengths, or the test shows nothing


def test_a_rationale_without_a_read_out_is_counted(model, picture):
    with torch.no_grad():
        model.backbone.get_input_embeddings().weight[model.config.read_out_token_id] = 0
    result = embed(model, items(picture), "explicit", max_new_tokens=3)
    assert not result.is_complete.any()
    assert result.num_reasoning_steps.tolist() == [3] * 7


def test_modes_cost_what_they_say(model, picture):
    batch = dict(model.processor.encode(items(picture)))
    assert embed_batch(model, batch, "latent").num_reasoning_steps.tolist() == [4] * 7
    assert embed_batch(model, batch, "latent", num_latent_steps=2).num_reasoning_steps.tolist() == [2] * 7
    single = embed_batch(model, batch, "single_pass")
    assert single.num_reasoning_steps.tolist() == [0] * 7
    assert torch.equal(single.embedding, model(**batch, num_latent_steps=0).embedding)


def test_latency_is_measured_per_query(model):
    assert latency_ms(model, [Item.parse("red")] * 2, "latent", num_runs=3, num_warm_up=1) > 0
