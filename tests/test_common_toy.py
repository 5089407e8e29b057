"""Tests of the toy faces."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

import common
from common import TOY_DOMAINS, TOY_REGIONS, toy_attributes, toy_face, toy_labels

SEEDS, DOMAINS = range(24), range(len(TOY_DOMAINS))


def img(*args):
    return np.asarray(toy_face(*args), np.float32) / 127.5 - 1


def seg(*args):
    return np.asarray(toy_labels(*args))


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_face_is_a_pure_function_of_its_seed(domain):
    first = toy_face(3, domain)
    toy_face(4, domain)
    assert (first.mode, first.size) == ("RGB", (64, 64))
    assert first.tobytes() == toy_face(3, domain).tobytes()
    assert first.tobytes() != toy_face(4, domain).tobytes()


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("size", [16, 33, 64, 128])
def test_every_size_shows_the_same_picture(size, domain):
    for seed in range(4):
        large = toy_face(seed, domain, 4 * size).reduce(4)
        error = np.abs(np.asarray(large, np.float32) / 127.5 - 1 - img(seed, domain, size))
        assert error.mean() < 0.02
        labels = seg(seed, domain, 4 * size)[2::4, 2::4]
        assert (labels == seg(seed, domain, size)).mean() > 0.85


def test_domains_differ_by_at_least_0_15_and_each_face_by_0_07():
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        errors = [np.abs(img(seed, a) - img(seed, b)).mean() for seed in SEEDS]
        assert np.mean(errors) >= 0.15 and min(errors) >= 0.07


def test_clothes_are_equal_in_all_domains():
    kept = [TOY_REGIONS.index("clothes")]
    for seed in SEEDS:
        labels = np.stack([seg(seed, domain, 256) for domain in DOMAINS])
        same = np.isin(labels, kept).all(0)
        # A pixel at an edge mixes regions but has one label: keep a pixel away from edges.
        inner = np.asarray(Image.fromarray(same).convert("L").filter(ImageFilter.MinFilter(3))) > 0
        faces = np.stack([np.asarray(toy_face(seed, domain, 256)) for domain in DOMAINS])
        assert inner.mean() > 0.02
        assert (faces[:, inner] == faces[:1, inner]).all()


def test_no_face_is_in_two_parts_and_the_counterpart_is_the_same_face():
    toy = common.open_data("toy", size=16)
    parts = {part: common.subset(toy, part) for part in ("trainA", "trainB", "testA", "testB")}
    seeds = [toy.domain_and_seed(name)[1] for name in toy.names]
    assert len(seeds) == len(set(seeds)) == sum(len(part.names) for part in parts.values())
    for part, other in (("testA", 1), ("testB", 0)):
        name = parts[part].names[3]
        domain, seed = toy.domain_and_seed(f"{part}/{name}")
        assert domain == 1 - other
        assert parts[part].image(name).tobytes() == toy_face(seed, domain, 16).tobytes()
        assert parts[part].counterpart(name, other).tobytes() == toy_face(seed, other, 16).tobytes()


def test_skin_and_hair_are_where_their_labels_are_and_keep_the_order_of_lightness():
    for region in ("skin", "hair"):
        k = TOY_REGIONS.index(region)
        tones = [toy_attributes(seed)[f"{region}_tone"] for seed in SEEDS]
        for domain in DOMAINS:
            means = [img(seed, domain)[seg(seed, domain) == k].mean() for seed in SEEDS]
            assert np.corrcoef(tones, means)[0, 1] > 0.9


def test_labels_are_region_indices_and_every_region_appears_in_every_domain():
    for domain in DOMAINS:
        labels = np.stack([seg(seed, domain) for seed in SEEDS])
        assert toy_labels(0, domain).mode == "L"
        assert set(np.unique(labels)) == set(range(len(TOY_REGIONS)))
        always = [k for k, name in enumerate(TOY_REGIONS) if name not in ("ears", "glasses")]
        assert all((labels == k).any((1, 2)).all() for k in always)


def test_attributes_vary_and_keep_to_their_ranges():
    faces = [toy_attributes(seed) for seed in range(200)]
    assert all(len({face[name] for face in faces}) > 1 for name in faces[0])
    assert {face["hair_style"] for face in faces} == set(range(len(common.TOY_HAIR)))
    assert {face["glasses"] for face in faces} == {0, 1, 2}
    assert all(0 <= face["skin_tone"] <= 1 and -1 <= face["yaw"] <= 1 for face in faces)
    assert toy_attributes(7) == toy_attributes(7)


def test_one_domain_is_a_set_of_its_own():
    goblins = common.open_data("toy/goblin", size=16, toy=common.TOY_FACES)
    assert goblins.is_toy and len(goblins.names) == 4000
    picture = np.asarray(goblins.image(goblins.names[7]))
    assert np.array_equal(picture, np.asarray(toy_face(7, TOY_DOMAINS.index("goblin"), 16)))
    for name, parts in (("toy/elf", common.TOY_FACES), ("toy/goblin", common.TOY_PARTS)):
        with pytest.raises(common.UserError, match=name):
            common.open_data(name, size=16, toy=parts)
