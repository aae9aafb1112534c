"""Runs of the rollout that must agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import Qwen2VLConfig

from plume import Item, PlumeConfig, PlumeModel
from plume.model.interface import Decoder, Segment
from plume.model.rollout import rollout
from plume.model.transition import build_adapter
from plume.random_models import SHORT_STRINGS

ATTENTION = ["eager", "sdpa"]


def mixed_items(picture) -> list[Item]:
    return [
        Item.parse("a red kite"),
        Item.parse({"image": picture(84, 56), "text": "what is on the table?"}),
        Item.parse({"image": [picture(56, 56, 1), picture(28, 84, 2)], "instruction": "Find it:"}),
        Item.parse(picture(140, 28, 3)),
    ]


def exact(model, items):
    """A batch in float64, so that only mistakes and not rounding show."""
    batch = dict(model.processor.encode(items))
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].double()
    return batch


def without_cache(model, item, num_steps: int):
    """The equations of the rollout, step by step: no cache, no padding, no batch, suffix in a pass of its own."""
    batch = exact(model, [item])
    mask = torch.ones_like(batch["input_ids"]).bool()
    prefix, _ = model.embed_prefix(model.read_inputs(batch))
    embeds, positions = prefix.embeds, prefix.positions
    first = positions.max() + 1 if model.config.latent_positions == "mrope" else mask.sum()
    anchor_column = (batch["input_ids"][0] == model.config.anchor_token_id).nonzero()[-1, 0]

    def run():
        return model.backbone.language_model(
            inputs_embeds=embeds, position_ids=positions, use_cache=False
        ).last_hidden_state

    states, gates = [run()[:, -1]], []
    anchor = run()[:, anchor_column]
    for step in range(num_steps):
        next_input, gate = model.transition(states[-1], step, anchor)
        embeds = torch.cat([embeds, next_input[:, None]], dim=1)
        positions = torch.cat([positions, (first + step).expand(3, 1, 1)], dim=2)
        states.append(run()[:, -1])
        gates.append(gate)
    suffix = torch.tensor([model.config.suffix_ids])
    embeds = torch.cat([embeds, model.embed_tokens(suffix)], dim=1)
    after = first + num_steps + torch.arange(suffix.shape[1])
    positions = torch.cat([positions, after.expand(3, 1, -1)], dim=2)
    return normalize(run()[:, -1], dim=-1), torch.stack(states, dim=1), gates


@pytest.mark.parametrize("convention", ["mrope", "kv_length"])
@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_cached_and_folded_equals_full_recomputation_without_either(model, picture, num_steps, convention):
    model = model.double()
    model.config.latent_positions = convention
    for item in mixed_items(picture):
        output = model(**exact(model, [item]), num_latent_steps=num_steps)
        embedding, states, gates = without_cache(model, item, num_steps)
        assert torch.allclose(output.states, states, atol=1e-10)
        assert torch.allclose(output.embedding.double(), embedding, atol=1e-6)
        if num_steps:
            assert torch.allclose(output.gates, torch.stack(gates, dim=1), atol=1e-10)


@pytest.mark.parametrize("attention", ATTENTION)
def test_an_embedding_does_not_depend_on_neighbours_or_padding(model, picture, attention):
    model.set_attn_implementation(attention)
    items = mixed_items(picture)
    together = model(**model.processor.encode(items))
    for row, item in enumerate(items):
        alone = model(**model.processor.encode([item]))
        for name in ("embedding", "anchor_embedding", "states", "gates"):
            assert torch.allclose(together[name][row], alone[name][0], atol=1e-5), name


def test_attention_implementations_agree(model, picture):
    batch = model.processor.encode(mixed_items(picture))
    results = []
    for attention in ATTENTION:
        model.set_attn_implementation(attention)
        results.append(model(**batch).embedding)
    assert torch.allclose(results[0], results[1], atol=1e-5)


def test_rows_with_different_numbers_of_steps_equal_each_alone(model, picture):
    items = mixed_items(picture)
    steps = torch.tensor([3, 0, 4, 1])
    batch = model.processor.encode(items)
    suffix = model.processor.suffix_ids("<eot>red kite<gen_emb>")
    labels = torch.tensor([suffix] * 4)
    together = model(**batch, num_latent_steps=steps, suffix_ids=labels, labels=labels)
    logits = together.suffix_logits.view(4, len(suffix), -1)
    for row, item in enumerate(items):
        num_steps = int(steps[row])
        alone = model(
            **model.processor.encode([item]),
            num_latent_steps=num_steps,
            suffix_ids=labels[:1],
            labels=labels[:1],
        )
        assert torch.allclose(together.embedding[row], alone.embedding[0], atol=1e-5)
        assert torch.allclose(logits[row], alone.suffix_logits, atol=1e-4)
        assert torch.allclose(together.states[row, : num_steps + 1], alone.states[0], atol=1e-5)
        assert not together.states[row, num_steps + 1 :].any()
        assert not together.gates[row, num_steps:].any()


def test_suffixes_of_different_length_equal_each_alone(model, picture):
    items = mixed_items(picture)[:2]
    texts = ["<eot><gen_emb>", "<eot>red kite<gen_emb>"]
    suffixes = [torch.tensor(model.processor.suffix_ids(text)) for text in texts]
    padded = torch.nn.utils.rnn.pad_sequence(suffixes, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in suffixes], batch_first=True)
    together = model(**model.processor.encode(items), suffix_ids=padded, suffix_mask=mask)
    for row, item in enumerate(items):
        alone = model(**model.processor.encode([item]), suffix_ids=suffixes[row][None])
        assert torch.allclose(together.embedding[row], alone.embedding[0], atol=1e-5)


def test_a_rollout_makes_one_more_pass_than_it_has_steps(model):
    passes = []
    handle = model.backbone.language_model.register_forward_hook(lambda *_: passes.append(1))
    for num_steps in (0, 1, 4):
        passes.clear()
        model(**model.processor.encode([Item.parse("red")]), num_latent_steps=num_steps)
        assert len(passes) == num_steps + 1
    handle.remove()


@pytest.mark.parametrize("transition", ["moe", "mlp", "projector", "identity"])
def test_gradients_through_the_cache_equal_those_of_full_recomputation(backbone_folder, picture, transition):
    model = PlumeModel.from_backbone(
        str(backbone_folder), num_latent_steps=3, transition=transition, **SHORT_STRINGS, expert_dropout=0.0
    )
    model = model.double().eval()
    item = mixed_items(picture)[1]
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    direction = torch.randn(model.config.hidden_size, dtype=torch.double)

    gradients = []
    for embedding in (
        model(**exact(model, [item])).embedding.double(),
        without_cache(model, item, 3)[0],
    ):
        loss = (embedding * direction).sum()
        gradients.append(torch.autograd.grad(loss, weights, allow_unused=True))
    reached = 0
    for cached, full in zip(*gradients, strict=True):
        assert (cached is None) == (full is None)
        if cached is not None:
            assert (cached - full).norm() <= 1e-5 * full.norm() + 1e-9
            reached += 1
    assert reached > 40


def count_passes(model) -> list[int]:
    passes: list[int] = []
    model.backbone.language_model.register_forward_hook(lambda *_: passes.append(1))
    return passes


@pytest.mark.parametrize("steps", [1, 4, torch.tensor([3, 0, 4, 1])], ids=["1", "4", "mixed"])
def test_enough_refinements_of_parallel_latents_are_the_sequential_ones(model, picture, steps):
    model = model.double()
    batch = exact(model, mixed_items(picture))
    expected = model(**batch, num_latent_steps=steps)
    most = int(torch.as_tensor(steps).max())
    for refinements in (max(most - 1, 1), most + 2):
        parallel, new = model.reconfigured(latents="parallel", refinements=refinements)
        assert new == ["latent_inputs"]
        found = parallel(**batch, num_latent_steps=steps)
        for name in ("embedding", "anchor_embedding", "states", "gates"):
            assert torch.allclose(found[name], expected[name], atol=1e-10), name
    if most > 2:
        fewer, _ = model.reconfigured(latents="parallel", refinements=most - 2)
        assert (fewer(**batch, num_latent_steps=steps).embedding - expected.embedding).abs().max() > 1e-4


def test_each_refinement_makes_one_more_state_exact(model):
    model = model.double()
    batch = exact(model, [Item.parse("a red kite")])
    expected = model(**batch, num_latent_steps=5).states[0]
    for refinements in (1, 2, 3):
        parallel, _ = model.reconfigured(latents="parallel", refinements=refinements)
        error = (parallel(**batch, num_latent_steps=5).states[0] - expected).norm(dim=-1)
        assert (error[: refinements + 2] < 1e-10).all()
        assert (error[refinements + 2 :] > 1e-4).all()


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("refinements", [0, 1])
def test_parallel_latents_do_not_depend_on_neighbours_padding_or_other_rows_steps(
    model, picture, refinements, attention
):
    model, _ = model.double().reconfigured(latents="parallel", refinements=refinements)
    model.set_attn_implementation(attention)
    items, steps = mixed_items(picture), torch.tensor([3, 0, 4, 1])
    together = model(**exact(model, items), num_latent_steps=steps)
    for row, item in enumerate(items):
        count = int(steps[row])
        alone = model(**exact(model, [item]), num_latent_steps=count)
        for name in ("embedding", "anchor_embedding"):
            assert torch.allclose(together[name][row], alone[name][0], atol=1e-6), name
        assert torch.allclose(together.states[row, : count + 1], alone.states[0], atol=1e-5)
        assert not together.states[row, count + 1 :].any()


def test_parallel_latents_take_one_pass_and_refined_ones_two_more_than_refinements(model):
    batch = model.processor.encode([Item.parse("red")])
    for refinements, expected in ((0, 1), (1, 3), (2, 4)):
        parallel, _ = model.reconfigured(latents="parallel", refinements=refinements)
        passes = count_passes(parallel)
        parallel(**batch, num_latent_steps=4)
        assert len(passes) == expected
        passes.clear()
        assert torch.equal(
            parallel(**batch, num_latent_steps=0).embedding, model(**batch, num_latent_steps=0).embedding
        )
        model.backbone.language_model._forward_hooks.clear()


def test_latent_inputs_are_as_long_as_embeddings_where_that_is_asked_for(model):
    scaled, new = model.reconfigured(latent_scale="embedding")
    assert new == ["latent_norm"]
    expected = model.get_input_embeddings().weight.norm(dim=-1).mean()
    next_input, gates = scaled.adapter(torch.randn(3, 64), 1, None)
    assert torch.allclose(next_input.norm(dim=-1), expected.expand(3))
    assert gates.shape == (3, 4)


class RunningMean(Decoder):
    """A differentiable stand-in for the backbone: each position sees the mean of what it may see so far."""

    def __init__(self):
        self.seen: list[tuple[Tensor, Tensor]] = []

    def feed(self, segment: Segment, *, with_layers: bool = False) -> Tensor:
        assert not with_layers
        hidden = []
        for column in range(len(segment)):
            self.seen.append((segment.embeds[:, column], segment.mask[:, column, None].double()))
            total = sum(embeds * mask for embeds, mask in self.seen)
            count = sum(mask for _, mask in self.seen).clamp(min=1)
            place = segment.positions[0, :, column, None].double()
            hidden.append(torch.tanh(total / count + segment.embeds[:, column] + 0.01 * place))
        return torch.stack(hidden, dim=1)

    def forget(self, segment: Segment) -> None:
        del self.seen[len(self.seen) - len(segment) :]


@pytest.mark.parametrize("refinements", [None, 0, 1], ids=["sequential", "one pass", "refined"])
def test_gradients_of_the_rollout_match_finite_differences_in_float64(refinements):
    config = PlumeConfig(backbone_config=Qwen2VLConfig(text_config={"hidden_size": 5}), num_latent_steps=3)
    adapter = build_adapter(config).double().eval()
    mask = torch.tensor([[False, True, True], [True, True, True]])
    steps = torch.tensor([1, 3])
    learnt = torch.randn(4, 5, dtype=torch.double)

    def run(prefix: Tensor, suffix: Tensor) -> tuple[Tensor, ...]:
        result = rollout(
            RunningMean(),
            adapter,
            Segment(prefix, mask, torch.arange(3).expand(3, 2, 3)),
            suffix,
            torch.ones(2, 2, dtype=torch.bool),
            num_latent_steps=steps,
            max_latent_steps=3,
            anchor_column=torch.tensor([1, 0]),
            start=torch.tensor([3, 3]),
            latent_inputs=None if refinements is None else learnt,
            refinements=refinements or 0,
        )
        gates = () if result.gates is None else (result.gates,)
        return result.states, result.anchor, result.last_state, result.suffix, *gates

    prefix = torch.randn(2, 3, 5, dtype=torch.double, requires_grad=True)
    suffix = torch.randn(2, 2, 5, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(run, (prefix, suffix))


@pytest.mark.parametrize("num_steps", [0, 2])
def test_float64_with_eager_attention_and_padding_gives_the_numbers_of_each_row_alone(plume_folder, num_steps):
    """transformers adds the least float64 to what is masked, and takes the softmax in float32, where it is infinite."""
    model = PlumeModel.from_pretrained(plume_folder, dtype=torch.float64, attn_implementation="eager").eval()
    items = [Item.parse("red kite is a kite of red"), Item.parse("red"), Item.parse("blue table")]
    together = model(**model.processor.encode(items), num_latent_steps=num_steps)
    assert not together.embedding.isnan().any()
    for row, item in enumerate(items):
        alone = model(**model.processor.encode([item]), num_latent_steps=num_steps).embedding[0]
        assert torch.allclose(together.embedding[row], alone, atol=1e-6)
    together.embedding.sum().backward()
    assert all(one.grad is None or one.grad.isfinite().all() for one in model.parameters())


@pytest.mark.parametrize("fields", [{"latents": "parallel"}, {"latents": "parallel", "refinements": 1}], ids=str)
def test_new_parts_have_the_dtype_of_the_backbone(backbone_folder, fields):
    started = PlumeModel.from_backbone(
        str(backbone_folder), dtype="bfloat16", num_latent_steps=3, latent_scale="embedding", **SHORT_STRINGS, **fields
    )
    changed, _ = PlumeModel.from_backbone(str(backbone_folder), dtype="bfloat16", **SHORT_STRINGS).reconfigured(
        **fields
    )
    for model in (started, changed):
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        assert model(**model.processor.encode([Item.parse("red")]), num_latent_steps=3).embedding.isfinite().all()


def test_a_router_without_steps_stays_so_when_it_is_trained_after_loading(model, tmp_path):
    blind, new = model.reconfigured(step_embedding=False)
    assert not new
    blind.save_pretrained(tmp_path)
    loaded = PlumeModel.from_pretrained(tmp_path).train()
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=0.1)
    loaded(**loaded.processor.encode([Item.parse("red")])).gates.square().sum().backward()
    optimizer.step()
    assert not loaded.transition.step_embed.weight.any()
