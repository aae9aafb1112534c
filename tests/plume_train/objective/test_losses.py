"""The terms of the objective against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from plume_train.objective.extra_losses import matryoshka_loss, quantized, ranking_loss
from plume_train.objective.losses import Contrast, NegativeRules, balance_loss, info_nce, suffix_cross_entropy


def test_suffix_cross_entropy_is_a_mean_over_rows_of_means_over_tokens():
    labels = torch.tensor([[5, 2, -100], [1, -100, -100], [-100, -100, -100]])
    logits = torch.randn(3, 7, dtype=torch.double)  # the three supervised tokens
    rows = [cross_entropy(logits[:2], torch.tensor([5, 2])), cross_entropy(logits[2:], torch.tensor([1]))]
    assert torch.allclose(suffix_cross_entropy(logits, labels), torch.stack(rows).mean())


def test_suffix_cross_entropy_without_labels_is_a_connected_zero():
    logits = torch.zeros(0, 7, requires_grad=True)
    loss = suffix_cross_entropy(logits, torch.full((2, 3), -100))
    assert loss.item() == 0
    loss.backward()


@pytest.mark.parametrize("num_experts", [2, 4])
def test_balance_is_zero_for_uniform_load_and_largest_for_one_expert(num_experts):
    one_hot = torch.zeros(3, 2, num_experts)
    one_hot[..., 0] = 1
    largest = (num_experts - 1) / num_experts**2
    assert balance_loss(one_hot.sum(dim=(0, 1)), torch.tensor(6)).item() == pytest.approx(largest)
    # each row uses one expert, the load over the batch is even: balanced, though no single gate is uniform
    spread = torch.eye(num_experts)[:, None]
    assert balance_loss(spread.sum(dim=(0, 1)), torch.tensor(num_experts)).item() == pytest.approx(0)


def test_balance_leaves_out_steps_that_a_row_does_not_take():
    gates = torch.rand(2, 3, 4).softmax(dim=-1)
    gates[0, 1:] = 0
    mean = torch.cat([gates[0, :1], gates[1]]).mean(dim=0)
    expected = (mean - 0.25).square().mean()
    assert torch.allclose(balance_loss(gates.sum(dim=(0, 1)), torch.tensor(4)), expected)


def vectors(*shape):
    return normalize(torch.randn(*shape, dtype=torch.double), dim=-1)


def test_info_nce_is_the_mean_of_both_directions():
    query, target = vectors(5, 8), vectors(5, 8)
    scores = query @ target.T / 0.1
    expected = (cross_entropy(scores, torch.arange(5)) + cross_entropy(scores.T, torch.arange(5))) / 2
    assert torch.allclose(info_nce(query, target, 0.1), expected)


def test_equal_targets_and_equal_queries_are_no_negatives():
    query, target = vectors(4, 8), vectors(4, 8)
    target_keys, query_keys = torch.tensor([7, 7, 8, 9]), torch.tensor([1, 2, 3, 1])
    total = 0
    for mine, others in ((query, target), (target, query)):
        for row in range(4):
            kept = [
                column
                for column in range(4)
                if column == row or (target_keys[row] != target_keys[column] and query_keys[row] != query_keys[column])
            ]
            scores = mine[row] @ others[kept].T / 0.02
            total += torch.logsumexp(scores, dim=0) - scores[kept.index(row)]
    contrast = Contrast.of(torch.ones(4, dtype=torch.bool), query_keys, target_keys)
    loss = info_nce(query, target, 0.02, contrast)
    assert torch.allclose(loss, total / 8)


RULES = {
    "none": {},
    "margin": {"margin": 0.1},
    "no margin": {"margin": 0.0},
    "duplicate": {"duplicate": 0.3},
    "hardness": {"hardness": 2.0},
    "same side": {"same_side": True},
    "all": {"margin": 0.1, "duplicate": 0.5, "hardness": 2.0, "same_side": True},
}


def are_alike(query, target, row, column, duplicate):
    return max(query[row] @ query[column], target[row] @ target[column]) > duplicate


def with_rules(query, target, negative, temperature, margin=None, duplicate=None, hardness=0.0, same_side=False):
    """InfoNCE with rules, row by row; weights of negatives are constants."""
    losses = []
    for mine, others, in_front in ((query, target, True), (target, query, False)):
        for row in range(len(query)):
            own = mine[row] @ others[row]
            candidates = [(others[column], column) for column in range(len(query)) if column != row]
            if same_side:
                candidates += [(mine[column], column) for column in range(len(query)) if column != row]
            if in_front:
                candidates += [(one, None) for one in negative]
            terms = [own / temperature]
            for candidate, column in candidates:
                cosine = mine[row] @ candidate
                if margin is not None and cosine > own + margin:
                    continue
                if duplicate is not None and column is None and target[row] @ candidate > duplicate:
                    continue
                if duplicate is not None and column is not None and are_alike(query, target, row, column, duplicate):
                    continue
                terms.append(cosine / temperature + hardness * cosine.detach())
            losses.append(torch.logsumexp(torch.stack(terms), dim=0) - terms[0])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("rules", RULES)
def test_rules_leave_negatives_out_and_weigh_them_without_a_gradient(rules):
    torch.manual_seed(0)
    leaves = [vectors(*shape).requires_grad_() for shape in ((6, 4), (6, 4), (5, 4))]
    contrast = Contrast.of(torch.ones(6, dtype=torch.bool), is_negative=torch.ones(5, dtype=torch.bool))
    found = info_nce(leaves[0], leaves[1], 0.5, contrast, leaves[2], NegativeRules(**RULES[rules]))
    expected = with_rules(*leaves, 0.5, **RULES[rules])
    assert torch.allclose(found, expected)
    if rules != "none":
        assert not torch.allclose(found, with_rules(*leaves, 0.5))
    gradients = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other)


def test_rules_at_their_limits_change_nothing_or_leave_the_pair_alone():
    query, target = vectors(6, 4), vectors(6, 4)
    plain = info_nce(query, target, 0.1)
    assert torch.equal(info_nce(query, target, 0.1, rules=NegativeRules(margin=2.0, duplicate=1.1)), plain)
    assert info_nce(query, target, 0.1, rules=NegativeRules(duplicate=-1.1)).item() == 0


def test_a_row_without_a_pair_is_neither_anchor_nor_negative():
    query, target = vectors(4, 8), vectors(4, 8)
    is_pair = torch.tensor([True, False, True, True])
    alone = info_nce(query[is_pair], target[is_pair], 0.05)
    assert torch.allclose(info_nce(query, target, 0.05, Contrast.of(is_pair)), alone)


def test_no_pair_at_all_is_a_connected_zero():
    query = vectors(2, 8).requires_grad_()
    loss = info_nce(query, vectors(2, 8), 0.05, Contrast.of(torch.zeros(2, dtype=torch.bool)))
    loss.backward()
    assert loss.item() == 0
    assert not query.grad.any()


def test_similarities_are_exact_in_bfloat16():
    query, target = vectors(6, 64).bfloat16(), vectors(6, 64).bfloat16()
    loss = info_nce(query, target, 0.02)
    assert loss.dtype == torch.float32
    assert math.isclose(loss.item(), info_nce(query.double(), target.double(), 0.02).item(), rel_tol=1e-5)


def ranked_by(query, target, negative, teachers, temperature, allowed):
    """The divergence of rankings, row by row and candidate by candidate."""
    losses = []
    for front in (True, False):
        mine, others = (query, target) if front else (target, query)
        its, of_its = (teachers[0], teachers[1]) if front else (teachers[1], teachers[0])
        for row in range(len(query)):
            columns = [column for column in range(len(query)) if allowed[row][column]]
            found = [mine[row] @ others[column] for column in columns]
            wanted = [its[row] @ of_its[column] for column in columns]
            if front:
                found += [mine[row] @ one for one in negative]
                wanted += [its[row] @ one for one in teachers[2]]
            p, q = (torch.softmax(torch.stack(values) / temperature, dim=0) for values in (wanted, found))
            losses.append((p * (p / q).log()).sum())
    return torch.stack(losses).mean()


def test_ranking_is_the_divergence_from_the_teachers_and_moves_the_student_alone():
    torch.manual_seed(0)
    leaves = [vectors(*shape).requires_grad_() for shape in ((6, 4), (6, 4), (5, 4))]
    teachers = [vectors(*shape).requires_grad_() for shape in ((6, 9), (6, 9), (5, 9))]
    keys = torch.tensor([1, 2, 3, 4, 5, 1])  # the last target equals the first
    contrast = Contrast.of(
        torch.ones(6, dtype=torch.bool), target_keys=keys, is_negative=torch.ones(5, dtype=torch.bool),
        negative_keys=torch.arange(10, 15),
    )  # fmt: skip
    found = ranking_loss(leaves[0], leaves[1], teachers[0], teachers[1], 0.3, contrast, leaves[2], teachers[2])
    allowed = [[row == column or keys[row] != keys[column] for column in range(6)] for row in range(6)]
    expected = ranked_by(*leaves, teachers, 0.3, allowed)
    assert torch.allclose(found, expected)
    for one, other in zip(*(torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (found, expected)),
                          strict=True):  # fmt: skip
        assert torch.allclose(one, other)
        assert one.abs().sum() > 0
    assert torch.autograd.grad(found, teachers, allow_unused=True) == (None, None, None)


def test_ranking_is_zero_where_both_rank_alike_and_without_rows_that_are_taught():
    torch.manual_seed(0)
    query, target = vectors(5, 4), vectors(5, 4)
    contrast = Contrast.of(torch.ones(5, dtype=torch.bool))
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=query.dtype))[0]  # another space of the same similarities
    assert ranking_loss(query, target, query @ rotation, target @ rotation, 0.1, contrast).abs() < 1e-9
    assert ranking_loss(query, target, vectors(5, 4), vectors(5, 4), 0.1, contrast) > 0
    nobody = Contrast.of(torch.zeros(5, dtype=torch.bool))
    assert ranking_loss(query, target, vectors(5, 4), vectors(5, 4), 0.1, nobody) == 0


def test_labels_take_the_place_of_the_batchs_targets_for_queries_alone():
    """Six rows of three labels, which are columns once each; others than its own are a target's negatives still."""
    torch.manual_seed(0)
    labels = vectors(3, 4)
    of_row = torch.tensor([0, 1, 0, 2, 1, 0])
    query, target = vectors(6, 4), labels[of_row]
    contrast = Contrast.of(
        torch.ones(6, dtype=torch.bool), target_keys=of_row, is_negative=torch.ones(3, dtype=torch.bool),
        negative_keys=torch.arange(3), has_labels=True,
    )  # fmt: skip
    found = info_nce(query, target, 0.2, contrast, labels)
    forwards = cross_entropy(query @ labels.T / 0.2, of_row)
    rows = []
    for row in range(6):
        others = [column for column in range(6) if column == row or of_row[column] != of_row[row]]
        scores = query[others] @ target[row] / 0.2
        rows.append(scores.logsumexp(dim=0) - scores[others.index(row)])
    assert torch.allclose(found, (forwards + torch.stack(rows).mean()) / 2)


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_quantised_vectors_are_coarse_in_front_and_plain_behind(precision):
    torch.manual_seed(0)
    plain = vectors(5, 16).requires_grad_()
    coarse = quantized(plain, precision)
    assert torch.allclose(coarse.norm(dim=-1), torch.ones(5, dtype=torch.double))
    assert len(coarse[0].abs().unique()) <= (127 if precision == "int8" else 1) + 1
    cosine = (coarse * plain).sum(dim=-1)
    assert (cosine > (0.9995 if precision == "int8" else 0.6)).all()
    assert (cosine < 1 - 1e-9).all()
    wanted = torch.randn(5, 16, dtype=torch.double)
    assert torch.equal(torch.autograd.grad((coarse * wanted).sum(), plain)[0], wanted)
    assert quantized(plain, "float32") is plain


def test_cut_vectors_are_contrasted_in_every_precision():
    query, target = vectors(6, 8), vectors(6, 8)
    contrast = Contrast.of(torch.ones(6, dtype=torch.bool))
    found = matryoshka_loss(query, target, [4, 8], 0.1, contrast, precisions=["float32", "binary"])
    expected = []
    for dim in (4, 8):
        short = [normalize(side[:, :dim], dim=-1) for side in (query, target)]
        expected += [info_nce(*short, 0.1), info_nce(*(quantized(side, "binary") for side in short), 0.1)]
    assert torch.allclose(found, torch.stack(expected).mean())
