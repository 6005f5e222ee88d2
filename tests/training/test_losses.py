"""Losses checked against the independent NumPy reference; their gradients; terms by name, and their weighted sum."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from finelip_fast.errors import ConfigError
from finelip_fast.training.losses import (
    LOSSES,
    SCORES,
    Criterion,
    LossTerm,
    adaptive_margin_loss,
    contextual_alignment_loss,
    contrastive_loss,
    grounding_loss,
    triplet_loss,
)

BATCH = 7
IMAGE_IDS = {
    "all differ": None,
    "two of one picture": [4, 9, 4, 1, 2, 3, 8],
    "two pictures": [0, 0, 1, 1, 0, 1, 0],
    "one picture": [5] * BATCH,
}
each_image_ids = pytest.mark.parametrize("image_ids", IMAGE_IDS.values(), ids=IMAGE_IDS.keys())


def random_scores(seed=0, size=BATCH):
    """Return float64 ``[B, B]``, roughly in the range of a cosine."""
    return torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.4


def random_embeddings(seed, items=5, tokens=4, width=6):
    """Return float64 unit rows ``[B, L, D]``."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(items, tokens, width, generator=generator, dtype=torch.float64), dim=-1)


def cosines(seed=1):
    captions = random_embeddings(seed, items=BATCH)[:, 0]
    return captions, captions @ captions.T


def assert_equals_reference(loss, expected):
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


# --- Phrases and places ------------------------------------------------------------------------------------------


def phrases(seed=0):
    """Return two pairs of 3 x 3 patches and 7 tokens, with three phrases."""
    generator = torch.Generator().manual_seed(seed)
    patches, tokens = (
        torch.randn(2, length, 5, generator=generator, dtype=torch.float64).requires_grad_() for length in (9, 7)
    )
    owners, spans = torch.tensor([0, 1, 1]), torch.tensor([[1, 3], [2, 6], [0, 1]])
    boxes = torch.tensor([[0.0, 0.0, 2 / 3, 1 / 3], [0.5, 0.5, 1.0, 1.0], [0.1, 0.1, 0.2, 0.2]])
    return patches, tokens, owners, spans, boxes, torch.tensor([1, 2, 3])


def test_a_phrase_is_matched_with_the_patches_under_its_box():
    patches, tokens, *where = phrases()
    first, second = patches.detach()
    regions = torch.stack(
        [
            first[0] + first[1],  # the first row's left two patches, fully covered
            second[4] / 4 + (second[5] + second[7]) / 2 + second[8],  # weighted by the covered area
            second[0],  # a small box within one patch
        ]
    )
    words = torch.stack([tokens.detach()[0, 1:3].sum(0), tokens.detach()[1, 2:6].sum(0), tokens.detach()[1, 0]])
    scores = F.normalize(regions, dim=-1) @ F.normalize(words, dim=-1).T
    expected = contrastive_loss(scores, 4.0)
    assert grounding_loss(patches, tokens, *where, 4.0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_phrases_of_one_label_are_no_negatives():
    patches, tokens, *where, labels = phrases()
    two_alike = grounding_loss(patches, tokens, *where, torch.tensor([1, 2, 1]), 4.0)
    all_alike = grounding_loss(patches, tokens, *where, torch.tensor([1, 1, 1]), 4.0)
    assert 0 < two_alike < grounding_loss(patches, tokens, *where, labels, 4.0)
    assert all_alike == 0
    all_alike.backward()
    assert patches.grad.isfinite().all()


def test_only_phrases_and_their_places_get_a_gradient():
    patches, tokens, *where = phrases()
    grounding_loss(patches, tokens, *where, 4.0).backward()
    assert [row.nonzero().flatten().tolist() for row in patches.grad.abs().sum(-1)] == [[0, 1], [0, 4, 5, 7, 8]]
    assert [row.nonzero().flatten().tolist() for row in tokens.grad.abs().sum(-1)] == [[1, 2], [0, 2, 3, 4, 5]]


def test_a_batch_without_phrases_costs_nothing():
    patches, tokens, *where = phrases()
    loss = grounding_loss(patches, tokens, *(rows[:0] for rows in where), 4.0)
    assert (loss.shape, loss.item()) == ((), 0.0)


# --- Parts of captions and what they attend to -------------------------------------------------------------------


def captions_with_parts():
    """Two pairs of 9 patches and 7 tokens, their captions' rows, and three parts: two of the first, one of the second."""
    patches, tokens, *_ = phrases()
    captions = random_embeddings(3, items=2, width=5)[:, 0]
    return patches, tokens, captions, torch.tensor([0, 0, 1]), torch.tensor([[1, 3], [2, 6], [0, 1]])


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("image_ids", [[4, 7], [4, 4]], ids=["two pictures", "one picture"])
def test_a_part_is_matched_with_what_it_attends_to(beta, image_ids):
    patches, tokens, captions, owners, parts = (tensor.detach() for tensor in captions_with_parts())
    pairs = [0, 1, *owners.tolist()]
    means = [tokens[pair, first:last].mean(0) for pair, (first, last) in zip(pairs[2:], parts.tolist(), strict=True)]
    queries = F.normalize(torch.stack([*captions, *means]), dim=-1)
    attended = []
    for query, pair in zip(queries, pairs, strict=True):
        weights = (20.0 * F.normalize(patches[pair], dim=-1) @ query).softmax(0)
        attended.append(F.normalize(weights @ patches[pair], dim=-1))
    logits = 4.0 * torch.stack(attended) @ queries.T
    expected = 0.0
    for at, pair in enumerate(pairs):
        shares = [1.0 if at == to else beta * (image_ids[pair] == image_ids[column]) for to, column in enumerate(pairs)]
        for row in (logits[at].log_softmax(0), logits[:, at].log_softmax(0)):
            expected -= float(torch.tensor(shares).double() @ row) / sum(shares) / len(pairs) / 2
    loss = contextual_alignment_loss(patches, tokens, captions, owners, parts, torch.tensor(image_ids), 4.0, beta=beta)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_captions_without_parts_are_matched_all_the_same():
    patches, tokens, captions, owners, parts = captions_with_parts()
    loss = contextual_alignment_loss(patches, tokens, captions, owners[:0], parts[:0], torch.tensor([1, 2]), 4.0)
    loss.backward()
    assert loss > 0
    assert patches.grad.isfinite().all()


# --- Parity ------------------------------------------------------------------------------------------------------


@each_image_ids
@pytest.mark.parametrize("hardest", [False, True], ids=["sum", "hardest"])
@pytest.mark.parametrize("margin", [0.0, 0.2, 1.0])
def test_triplet_equals_the_reference(method, image_ids, hardest, margin):
    scores = random_scores()
    ids = None if image_ids is None else torch.tensor(image_ids)
    loss = triplet_loss(scores.float(), ids, margin=margin, hardest=hardest)
    assert_equals_reference(loss, method.triplet_loss(scores.numpy(), image_ids, margin, hardest))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("logit_scale", [0.0, 1.3, math.log(100)])
def test_contrastive_equals_the_reference(method, label_smoothing, logit_scale):
    scores = random_scores()
    loss = contrastive_loss(scores.float(), math.exp(logit_scale), label_smoothing=label_smoothing)
    assert_equals_reference(loss, method.contrastive_loss(scores.numpy(), logit_scale, label_smoothing))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_adaptive_margin_equals_the_reference(method, gamma):
    scores, (captions, similarity) = random_scores(), cosines()
    loss = adaptive_margin_loss(scores.float(), similarity.float(), math.exp(1.3), gamma=gamma)
    assert_equals_reference(loss, method.adaptive_margin_loss(scores.numpy(), captions.numpy(), 1.3, gamma))


def test_defaults_are_those_of_the_papers(method):
    scores, (captions, similarity) = random_scores(), cosines()
    assert_equals_reference(triplet_loss(scores.float()), method.triplet_loss(scores.numpy(), margin=0.2))
    assert_equals_reference(
        adaptive_margin_loss(scores.float(), similarity.float(), 1.0),
        method.adaptive_margin_loss(scores.numpy(), captions.numpy(), 0.0, gamma=0.5),
    )
    assert (Criterion(terms=()).margin, Criterion(terms=()).gamma, Criterion(terms=()).label_smoothing) == (
        0.2,
        0.5,
        0.1,
    )


# --- Properties --------------------------------------------------------------------------------------------------


def every_loss(scores, similarity, image_ids):
    return {
        "triplet": triplet_loss(scores, image_ids),
        "hardest": triplet_loss(scores, image_ids, hardest=True),
        "contrastive": contrastive_loss(scores, 5.0, label_smoothing=0.1),
        "adaptive": adaptive_margin_loss(scores, similarity, 5.0),
    }


def test_order_and_direction_change_nothing():
    scores, (_, similarity), ids = random_scores(), cosines(), torch.tensor(IMAGE_IDS["two of one picture"])
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(3))
    expected = every_loss(scores, similarity, ids)
    shuffled = every_loss(scores[order][:, order], similarity[order][:, order], ids[order])
    swapped = every_loss(scores.T, similarity, ids)
    for name, value in expected.items():
        torch.testing.assert_close(shuffled[name], value)
        torch.testing.assert_close(swapped[name], value)


def test_a_pair_alone_costs_nothing():
    alone = every_loss(torch.tensor([[0.3]]), torch.ones(1, 1), torch.tensor([7]))
    assert all(value.item() == pytest.approx(0.0, abs=1e-6) for value in alone.values())


def test_pairs_that_win_by_the_margin_cost_nothing():
    scores = torch.full((4, 4), 0.1).fill_diagonal_(0.1 + 0.2001)
    assert triplet_loss(scores).item() == 0.0
    assert triplet_loss(scores, margin=0.3).item() == pytest.approx(2 * 12 * 0.0999, rel=1e-5)
    assert triplet_loss(scores, margin=0.3, hardest=True).item() == pytest.approx(2 * 4 * 0.0999, rel=1e-5)


def test_the_captions_own_cosine_is_ignored_and_nothing_is_written_into():
    scores, (_, similarity) = random_scores(), cosines()
    before = similarity.clone()
    expected = adaptive_margin_loss(scores, similarity, 3.0)
    assert torch.equal(similarity, before)
    torch.testing.assert_close(adaptive_margin_loss(scores, similarity + 9 * torch.eye(BATCH), 3.0), expected)
    torch.testing.assert_close(adaptive_margin_loss(scores, similarity, 3.0, gamma=0.0), contrastive_loss(scores, 3.0))


# --- Gradients ---------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_finite_differences():
    scores, (_, similarity) = random_scores().requires_grad_(), cosines()
    scale, ids = (
        torch.tensor(3.0, dtype=torch.float64, requires_grad=True),
        torch.tensor(IMAGE_IDS["two of one picture"]),
    )
    gradcheck = torch.autograd.gradcheck
    assert gradcheck(lambda s, factor: contrastive_loss(s, factor, label_smoothing=0.1), (scores, scale))
    assert gradcheck(lambda s, factor: adaptive_margin_loss(s, similarity, factor), (scores, scale))
    for hardest in (False, True):
        assert gradcheck(lambda s, hardest=hardest: triplet_loss(s, ids, hardest=hardest), (scores,))


@pytest.mark.parametrize("hardest", [False, True], ids=["sum", "hardest"])
def test_triplet_lifts_pairs_lowers_negatives_and_leaves_the_masked_alone(hardest):
    ids = torch.tensor(IMAGE_IDS["two of one picture"])
    scores = random_scores().requires_grad_()
    triplet_loss(scores, ids, margin=5.0, hardest=hardest).backward()
    negative = ids[:, None] != ids[None, :]
    same_but_other = ~negative & ~torch.eye(BATCH, dtype=torch.bool)
    assert (scores.grad.diagonal() < 0).all()
    assert (scores.grad[negative] >= 0).all()
    assert (scores.grad[same_but_other] == 0).all()
    n_violations = 2 if hardest else int(negative.sum(dim=1)[0]) * 2
    assert scores.grad.diagonal()[0].item() == -n_violations


def test_margins_pass_no_gradient_to_the_captions():
    similarity = cosines()[1].requires_grad_()
    adaptive_margin_loss(random_scores().requires_grad_(), similarity, 3.0).backward()
    assert similarity.grad is None


# --- Terms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "loss", "on", "weight"),
    [
        ("triplet:fine", "triplet", "fine", 1.0),
        ("contrastive:global:0.5", "contrastive", "global", 0.5),
        ("hardest_triplet:combined:2", "hardest_triplet", "combined", 2.0),
        ("adaptive_margin:fine:1e-3", "adaptive_margin", "fine", 0.001),
    ],
)
def test_a_term_is_read_and_written(text, loss, on, weight):
    term = LossTerm.parse(text)
    assert (term.loss, term.on, term.weight) == (loss, on, weight)
    assert LossTerm.parse(str(term)) == term


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "expected LOSS:SCORE or LOSS:SCORE:WEIGHT, got ''"),
        ("triplet", "got 'triplet'"),
        ("triplet:fine:1:2", "got 'triplet:fine:1:2'"),
        ("tripelt:fine", r"got 'tripelt:fine'.*expected a loss of \('contrastive', 'triplet'"),
        ("triplet:fin", r"on a score of \('global', 'fine', 'combined'\).*got 'triplet' on 'fin'"),
        ("triplet:fine:0", "positive weight.* with 0.0"),
        ("triplet:fine:-1", "positive weight.* with -1.0"),
        ("triplet:fine:nan", "positive weight.* with nan"),
        ("triplet:fine:inf", "positive weight.* with inf"),
        ("triplet:fine:heavy", "could not convert string to float: 'heavy'"),
    ],
)
def test_a_term_that_is_none_is_refused(text, reason):
    with pytest.raises(ConfigError, match=reason):
        LossTerm.parse(text)


# --- Their sum ---------------------------------------------------------------------------------------------------


def reference_scores(method, images, texts):
    """Return ``[B_i, B_t]`` for each score."""
    images, texts = images.numpy(), texts.numpy()
    return {
        "global": images[:, 0] @ texts[:, 0].T,
        "fine": method.score_matrix(images, texts, alpha=0.0),
        "combined": method.score_matrix(images, texts),
    }


def reference_loss(method, loss, scores, texts, image_ids):
    match loss:
        case "contrastive":
            return method.contrastive_loss(scores, 1.3, 0.05)
        case "adaptive_margin":
            return method.adaptive_margin_loss(scores, texts[:, 0].numpy(), 1.3, 0.7)
    return method.triplet_loss(scores, image_ids, 0.3, loss == "hardest_triplet")


@pytest.mark.parametrize("on", SCORES)
@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_of_each_score_equals_the_reference(method, loss, on):
    images, texts, image_ids = random_embeddings(0), random_embeddings(1), [3, 1, 3, 0, 2]
    criterion = Criterion(terms=(LossTerm(loss, on, 2.0),), margin=0.3, gamma=0.7, label_smoothing=0.05)
    total, values = criterion(
        images.float(), texts.float(), torch.tensor(image_ids), torch.tensor(math.exp(1.3), dtype=torch.float32)
    )
    expected = reference_loss(method, loss, reference_scores(method, images, texts)[on], texts, image_ids)
    assert values.keys() == {f"{loss}:{on}:2"}
    assert_equals_reference(values[f"{loss}:{on}:2"], expected)
    assert_equals_reference(total, 2 * expected)


def test_terms_are_added_by_weight_and_reported_without_it():
    images, texts = random_embeddings(0).float().requires_grad_(), random_embeddings(1).float().requires_grad_()
    terms = tuple(
        LossTerm.parse(text) for text in ("contrastive:global:0.5", "triplet:fine:2", "adaptive_margin:combined")
    )
    inputs = (images, texts, torch.arange(5), torch.tensor(4.0, requires_grad=True))
    total, values = Criterion(terms=terms)(*inputs)
    alone = [Criterion(terms=(LossTerm(term.loss, term.on),))(*inputs)[0] for term in terms]
    torch.testing.assert_close(total, 0.5 * alone[0] + 2 * alone[1] + alone[2])
    assert list(values) == [str(term) for term in terms]
    torch.testing.assert_close(torch.stack(list(values.values())), torch.stack(alone).detach())
    assert not any(value.requires_grad for value in values.values())

    gradients = torch.autograd.grad(total, inputs[:2])
    by_term = [torch.autograd.grad(loss, inputs[:2]) for loss in alone]
    for side in (0, 1):
        expected = 0.5 * by_term[0][side] + 2 * by_term[1][side] + by_term[2][side]
        torch.testing.assert_close(gradients[side], expected)
