"""Text that is said from latent steps alone: it sees what it is meant to see, and changes nothing else."""

from __future__ import annotations

import pytest
import torch

from plume import Item
from plume.model.reconstruction import Reconstruction

ITEMS = [Item.parse("a red kite"), Item.parse("rain")]


def said(model, num_latent_steps, sees="own_step", steps_per_group=1, groups=((0, 0, 1, 1, 2), (0, 1, 1, -1, -1))):
    """Inputs of a forward pass whose text is five tokens in up to three groups."""
    groups = torch.tensor(groups)
    places = torch.tensor([[row[:column].count(group) for column, group in enumerate(row)] for row in groups.tolist()])
    ids = torch.arange(10).view(2, 5) + 20
    return {
        **model.processor.encode(ITEMS),
        "num_latent_steps": num_latent_steps,
        "reconstruction": {
            "ids": ids,
            "groups": groups,
            "places": places,
            "sees": sees,
            "steps_per_group": steps_per_group,
        },
        "reconstruction_labels": torch.where(groups >= 0, ids + 1, -100),
    }


def readable(sees, steps_per_group=1, num_latent_steps=(3, 2)):
    groups = torch.tensor([[0, 0, 1, 1, 2], [0, 1, 1, -1, -1]])
    text = Reconstruction(groups, groups, groups, sees, steps_per_group)
    return text.readable(torch.tensor(num_latent_steps), length=4, most_steps=3, num_suffix=2)


def test_each_group_sees_its_own_steps_and_its_own_text():
    own = readable("own_step")
    assert own.shape == (2, 5, 4 + 3 + 2 + 5)
    assert not own[:, :, :4].any()  # the prefix
    assert not own[:, :, 7:9].any()  # the suffix
    assert own[0, :, 4:7].long().tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert own[0, :, 9:].long().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    earlier = readable("up_to_step")
    assert earlier[0, :, 4:7].long().tolist() == [[1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 0], [1, 1, 1]]
    every = readable("all")
    assert every[0, :, 4:7].all()
    assert every[1, :, 4:7].long().tolist() == [[1, 1, 0]] * 5  # K = 2
    pairs = readable("own_step", steps_per_group=2)
    assert pairs[0, :, 4:7].long().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("fields", [{}, {"latents": "parallel"}, {"latents": "parallel", "refinements": 1}], ids=str)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_what_is_said_depends_on_its_own_latent_step_alone(model, attention, fields):
    """The gradient of a group's logits with respect to the latent inputs is zero at all steps but its own."""
    model, _ = model.double().reconfigured(**fields)
    model.set_attn_implementation(attention)
    own = model.transition.forward
    inputs: dict[int, torch.Tensor] = {}

    def keep(state, step, context):
        next_input, gates = own(state, step, context)
        inputs[step] = next_input.detach().requires_grad_()  # cuts the way from one step to the next
        return inputs[step], gates

    if model.config.is_one_pass:
        model.latent_inputs.register_forward_hook(lambda module, args, rows: inputs.update(all=rows) or rows)
    else:
        model.transition.forward = keep
    output = model(**said(model, 3))
    per_token = output.reconstruction_logits.square().sum(dim=-1)
    groups = [0, 0, 1, 1, 2, 0, 1, 1]
    for token, group in enumerate(groups):
        if model.config.is_one_pass:
            (rows,) = torch.autograd.grad(per_token[token], inputs["all"], retain_graph=True)
            # Earlier latents reach later ones through attention; later ones never reach earlier ones.
            assert rows[group].any()
            assert not rows[group + 1 :].any()
            continue
        steps = sorted(inputs)
        found = torch.autograd.grad(
            per_token[token], [inputs[step] for step in steps], retain_graph=True, allow_unused=True
        )
        reached = [step for step, one in zip(steps, found, strict=True) if one is not None and one.any()]
        assert max(reached) == group
    model.transition.__dict__.pop("forward", None)


def test_it_changes_neither_the_embedding_nor_the_cache_of_the_rollout(model):
    inputs = said(model, 3)
    plain = {name: value for name, value in inputs.items() if not name.startswith("reconstruction")}
    assert torch.equal(model(**inputs).embedding, model(**plain).embedding)
    assert model(**plain).reconstruction_logits is None


def test_rows_say_the_same_alone_and_together(model):
    model = model.double()
    inputs = said(model, torch.tensor([3, 2]))
    together = model(**inputs).reconstruction_logits
    first = {
        name: value[:1] if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
        if name not in ("input_ids", "attention_mask", "reconstruction")
    }
    text = {
        name: value[:1] if isinstance(value, torch.Tensor) else value
        for name, value in inputs["reconstruction"].items()
    }
    alone = model(**{**first, **model.processor.encode(ITEMS[:1])}, reconstruction=text).reconstruction_logits
    assert torch.allclose(alone, together[:5], atol=1e-5)


def test_attention_without_masks_of_its_own_is_refused(model):
    inputs = said(model, 0)
    roll_out = model.roll_out

    def unmaskable(*args, **kwargs):
        result = roll_out(*args, **kwargs)
        model.backbone.language_model.config._attn_implementation = "flash_attention_2"
        return result

    model.roll_out = unmaskable
    with pytest.raises(ValueError, match="takes no mask of its own per token; use sdpa or eager"):
        model(**inputs)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_half_precision_says_it_too(model, attention):
    half, _ = model.reconfigured(latents="parallel", refinements=1, latent_scale="embedding")
    half = half.to(torch.bfloat16)
    half.set_attn_implementation(attention)
    assert half(**said(half, 3)).reconstruction_logits.isfinite().all()
