"""Linear separability: the toy faces' attributes, their classifier, the planes, the entropies."""

import math

import pytest
import torch

import common
from common import (
    TOY_BINARY,
    attribute_classifier,
    conditional_entropy,
    linear_separability,
    linear_svm,
    toy_attributes,
    toy_classifier,
    toy_examples,
)

TINY = dict(size=8, faces=800, held_out=400, epochs=3)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bits(*x):
    return torch.tensor(x, dtype=torch.bool)


# ---- attributes and their classifier ----------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """A short training, and torch's global random state before and after it."""
    before = torch.get_rng_state()
    net, accuracies = toy_classifier(**TINY)
    return net, accuracies, before, torch.get_rng_state()


def test_every_attribute_splits_the_faces():
    faces = [toy_attributes(seed) for seed in range(2000)]
    for name, (test, _) in TOY_BINARY.items():
        assert 0.2 < sum(map(test, faces)) / len(faces) < 0.8, name


def test_the_classifier_learns_from_faces_that_no_gan_sees():
    for parts in (common.TOY_FACES, common.TOY_CLASSES, common.TOY_PARTS):
        assert all(first + n <= common.CLASSIFIER_SEEDS for _, first, n in parts.values())


def test_a_short_training_beats_guessing_and_says_how_often_it_is_right(trained):
    net, accuracies, *_ = trained
    start = common.CLASSIFIER_SEEDS + TINY["faces"]
    images, has = toy_examples(range(start, start + TINY["held_out"]), 0, 8)
    logits = net(common.to_float(images, "cpu"))
    right = ((logits > 0) == has).double().mean(0)
    assert list(accuracies) == list(TOY_BINARY)
    assert list(accuracies.values()) == pytest.approx(right.tolist())
    share = has.double().mean(0)
    assert right.mean() > torch.maximum(share, 1 - share).mean() + 0.1
    assert not logits.requires_grad


def test_a_training_depends_on_its_seed_only_and_leaves_the_global_random_state_alone(trained):
    net, accuracies, before, after = trained
    assert torch.equal(before, after)
    torch.rand(3)
    again, accuracies_again = toy_classifier(**TINY)
    assert accuracies == accuracies_again
    for a, b in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    other, _ = toy_classifier(**TINY | dict(faces=32, held_out=1), seed=1)
    assert not torch.equal(other[1].weight, net[1].weight)


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128, 256])
def test_the_classifier_takes_every_size_and_averages_large_pictures_to_64_pixels(size):
    net, x = attribute_classifier(size), random(2, 3, size, size)
    small = x.reshape(2, 3, min(size, 64), -1, min(size, 64), max(size // 64, 1)).mean([3, 5])
    assert net(x).shape == (2, len(TOY_BINARY))
    torch.testing.assert_close(net(x), net[1:](small))


# ---- planes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("scale, shift", [(1, 0), (0.2, 1), (3, 2)])
def test_the_plane_is_the_minimum_of_linear_svcs_objective(seed, scale, shift):
    x = (random(200, 3, seed=seed) * scale + shift).double()
    y = (x - shift).sum(1) + scale * random(200, seed=seed + 100) > 0.5 * scale
    w = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    opt = torch.optim.LBFGS(
        [w], max_iter=500, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def objective():
        opt.zero_grad()
        hinge = (1 - (2.0 * y - 1) * (x @ w[:3] + w[3])).clamp(min=0)
        loss = 0.5 * w @ w + hinge.square().sum()
        loss.backward()
        return loss

    opt.step(objective)
    objective()
    assert w.grad.norm() < 1e-5  # of several hundred at w = 0
    assert torch.equal(linear_svm(x.float(), y), x @ w[:3] + w[3] > 0)


def test_classes_that_a_plane_splits_are_split():
    x = random(500, 20)
    y = x @ random(20, seed=1) > 1
    x += 0.2 * torch.where(y[:, None], 1, -1) * random(20, seed=1)  # a gap
    assert torch.equal(linear_svm(x, y), y)
    assert torch.equal(linear_svm(1000 * x + 100, y), y)


def test_samples_on_the_wrong_side_are_given_up():
    x = torch.tensor([-1.0] * 12 + [1.0] * 12)[:, None]
    y = bits(*[False] * 10, *[True] * 14)
    assert torch.equal(linear_svm(x, y), x[:, 0] > 0)


@pytest.mark.parametrize("value", [True, False])
def test_one_class_alone_is_predicted_everywhere(value):
    y = torch.full((5,), value)
    assert torch.equal(linear_svm(random(5, 2), y), y)


# ---- entropies --------------------------------------------------------------------------------


def test_a_sequence_says_nothing_of_an_independent_one_and_all_of_itself_and_its_opposite():
    x, y = bits(0, 0, 1, 1), bits(0, 1, 0, 1)
    assert conditional_entropy(x, y) == pytest.approx(1)
    for of_y in (y, ~y, bits(1, 1, 1, 1), bits(0, 0, 0, 0)):
        assert conditional_entropy(y, of_y) == 0


def test_conditional_entropy_is_that_of_each_row_of_the_table_weighted():
    x = bits(*[0] * 4, *[1] * 2)
    y = bits(1, 0, 0, 0, 1, 1)
    quarter = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert conditional_entropy(x, y) == pytest.approx(4 / 6 * quarter)
    assert conditional_entropy(y, x) == pytest.approx(
        0.5 * -(math.log2(1 / 3) + 2 * math.log2(2 / 3)) / 3
    )


# ---- the score --------------------------------------------------------------------------------


def test_a_space_with_a_plane_for_each_attribute_scores_1_and_one_with_xor_scores_2_for_each():
    w = random(4000, 6)
    flip = torch.where(random(4000, 1, seed=1) > 0, 1, -1)
    latents = {"w": w, "z": torch.cat([w * flip, flip * random(4000, 1, seed=2).abs()], 1)}
    score, entropies = linear_separability(latents, 3 * w[:, :2])
    assert score["w"] == pytest.approx(1, abs=0.01)
    assert score["z"] == pytest.approx(4, rel=0.02)
    for space in latents:
        assert len(entropies[space]) == 2
        assert score[space] == pytest.approx(2 ** sum(entropies[space]))


def test_only_the_surer_half_counts():
    w = random(1000, 2)
    logit = w[:, 0].sign() * 2
    logit[::2] = random(500, seed=1).clamp(-1, 1)  # noise, less sure
    score, _ = linear_separability({"w": w}, logit[:, None])
    assert score["w"] == pytest.approx(1, abs=0.05)
    score, _ = linear_separability({"w": w[::2]}, logit[::2, None])
    assert score["w"] > 1.9


def test_an_attribute_of_all_sure_images_adds_nothing():
    logits = torch.cat([random(100, 1).abs() + 1, -random(100, 1).abs() - 1], 1)
    logits[0, 0] = -0.1
    assert linear_separability({"w": random(100, 3)}, logits) == ({"w": 1.0}, {"w": [0.0, 0.0]})
