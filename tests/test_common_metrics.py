"""FID, KID and fd8: closed forms, values for formula weights, the cache, and bad input."""

import itertools
import os
import re
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
from common import (
    InceptionV3,
    UserError,
    averaged,
    fd8,
    fid_kid,
    frechet_distance,
    frechet_distance_of_features,
    inception_features,
    kid,
    load_inception,
    mean_cov,
    real_statistics,
    resize_for_inception,
    uint8_batches,
)


def hashed(n, seed):
    """n 32-bit integers from an integer hash of (index, seed): the same on every machine."""
    a = np.arange(n, dtype=np.uint64)
    mask = np.uint64(2**32 - 1)
    h = (a * np.uint64(2654435761) + np.uint64((seed + 1) * 40503)) & mask
    h ^= h >> np.uint64(15)
    h = (h * np.uint64(2246822519)) & mask
    return h ^ (h >> np.uint64(13))


def smooth(n, seed):
    """n uint8 images of 64 x 64: 8 x 8 random colours, enlarged."""
    x = (hashed(n * 192, seed) >> np.uint64(24)).astype(np.float64).reshape(n, 3, 8, 8)
    x = F.interpolate(torch.from_numpy(x), (64, 64), mode="bilinear", align_corners=False)
    return x.round().to(torch.uint8)


@pytest.fixture(scope="module")
def net():
    with torch.device("meta"):
        net = InceptionV3()
    weights = {}
    for i, (name, w) in enumerate(sorted(net.state_dict().items())):
        u = hashed(w.numel(), i).astype(np.float64) / 2**31 - 1
        if name.endswith("conv.weight"):
            u = u * (6 / w[0].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            u = 1 + 0.1 * u
        elif name.endswith("num_batches_tracked"):
            u = 0 * u
        else:
            u = u * (0.02 if name == "fc.weight" else 0.1)
        weights[name] = torch.from_numpy(u).reshape(w.shape).to(w.dtype)
    net.load_state_dict(weights, assign=True)
    return net.eval()


@pytest.fixture
def cheap_features(monkeypatch):
    """Replaces the Inception features by 8 pixels; returns the list of calls."""
    calls = []

    def features(images, net, mode="tf1", device=None):
        calls.append(mode)
        return torch.cat([x[:, :, 0, :8].flatten(1).float() for x in uint8_batches(images)])

    monkeypatch.setattr(common, "inception_features", features)
    return calls


def refuse(*args, **kwargs):
    raise AssertionError("computed again instead of read from the cache")


def test_frechet_distance_of_two_gaussians_is_the_formulas_value():
    mu, eye = torch.arange(64) / 10, torch.eye(64)
    assert frechet_distance(0 * mu, eye, mu, 4 * eye) == pytest.approx(917.44, rel=1e-6)
    up, mu = torch.arange(1.0, 65).double(), torch.zeros(64)
    flipped = frechet_distance(mu, up.diag(), mu, up.flip(0).diag())
    assert flipped == pytest.approx(848.390575016118, rel=1e-12)
    rank_one = frechet_distance(mu, up.outer(up) / 64, mu, up.flip(0).outer(up.flip(0)) / 64)
    assert rank_one == pytest.approx(1365, abs=1e-3)


def test_frechet_distance_of_identical_inputs_is_zero():
    f = torch.randn(20, 48)  # fewer rows than dimensions
    moments = mean_cov(f)
    assert 0 <= frechet_distance(*moments, *moments) < 1e-5
    assert 0 <= frechet_distance_of_features(f, f) < 1e-10
    images = smooth(5, 1)
    assert 0 <= fd8(images, images) < 1e-5


def test_frechet_distance_refuses_what_is_not_a_covariance():
    mu, eye = torch.zeros(3), torch.eye(3)
    with pytest.raises(ValueError, match="not sound"):
        frechet_distance(mu, -eye, mu, -eye)
    with pytest.raises(ValueError, match="not sound"):
        frechet_distance(mu, eye, mu * float("nan"), eye)
    with pytest.raises(ValueError, match="more than 1"):
        mean_cov(torch.zeros(1, 3))


def test_statistics_in_pieces_equal_those_of_the_whole():
    f = torch.randn(5000, 5, dtype=torch.float64)
    mu, sigma = mean_cov(f)
    torch.testing.assert_close(mu, f.mean(0))
    torch.testing.assert_close(sigma, torch.cov(f.T))
    biased = mean_cov(f, ddof=0)[1]
    torch.testing.assert_close(biased, torch.cov(f.T, correction=0))


def test_tf1_bilinear_starts_at_the_corner_and_repeats_the_last_pixel():
    row = torch.tensor([0.0, 10, 20, 30]).repeat(4, 1)[None, None]
    expected = torch.tensor([0, 20 / 3, 40 / 3, 20, 80 / 3, 30])
    torch.testing.assert_close(common.bilinear_tf1(row, 6)[0, 0, 0], expected)
    torch.testing.assert_close(common.bilinear_tf1(row.mT, 6)[0, 0, :, 5], expected)


@pytest.mark.parametrize("mode", common.RESIZE_MODES)
def test_a_grey_image_scores_as_its_rgb_copy(mode):
    grey = smooth(2, 4)[:, :1]
    x = resize_for_inception(grey, mode)
    assert x.shape == (2, 3, 299, 299) and x.min() >= -1 and x.max() <= 1
    assert torch.equal(x, resize_for_inception(grey.repeat(1, 3, 1, 1), mode))


def test_images_are_quantised_by_rounding_down():
    x = torch.tensor([-2, -1, -1 / 128, 0, 0.999, 1, 2])
    assert common.to_uint8(x).tolist() == [0, 0, 127, 128, 255, 255, 255]


def test_batches_have_at_most_so_many_images():
    sizes = [len(b) for b in uint8_batches([smooth(3, 0), smooth(5, 1)], batch=4)]
    assert sizes == [3, 4, 1]


def test_the_network_has_the_published_tensors_and_the_formula_weights_their_sum(net):
    state = net.state_dict()
    assert len(state) == 566
    assert sum(p.numel() for p in net.parameters()) == 23_850_960
    assert state["Mixed_6b.branch7x7_2.conv.weight"].shape == (128, 128, 1, 7)
    assert state["Mixed_7c.branch3x3dbl_3b.bn.running_var"].shape == (384,)
    assert sum(w.double().sum().item() for w in state.values()) == pytest.approx(34437.5175)


@pytest.mark.parametrize(
    "mode, expected",
    [
        ("tf1", (0.0732942, 0.3189068, 0.0746872, 0.3261015, 0.4304881)),
        ("pytorch_fid", (0.0724907, 0.3210623, 0.0756638, 0.3262521, 0.4306226)),
        ("clean", (0.0728382, 0.3250245, 0.0761103, 0.3282916, 0.4333028)),
    ],
)
def test_features_for_formula_weights_have_the_known_values(net, mode, expected):
    f = inception_features(smooth(2, 5), net, mode)
    assert f.shape == (2, 2048) and f.dtype == torch.float32
    mine = torch.stack([f[0, 2], f[0, 4], f[1, 2], f.mean(), f.std()])
    torch.testing.assert_close(mine, torch.tensor(expected), rtol=0, atol=1e-4)


def test_fid_and_kid_for_formula_weights_have_the_known_values(net, tmp_path, monkeypatch):
    a, b = smooth(24, 100), smooth(20, 200)
    features_a, features_b = inception_features(a, net), inception_features(b, net)
    mean, std = kid(features_a[:20], features_b)
    assert mean == pytest.approx(5.8712e-4, abs=2e-7) and std == 0
    known = {24: features_a, 20: features_b}
    monkeypatch.setattr(common, "inception_features", lambda images, *_: known[len(images)])
    scores = fid_kid(a, b, net, folder=tmp_path)
    assert fid_kid(real_statistics(a, net, folder=tmp_path), b, net) == scores
    assert scores["fid"] == pytest.approx(0.69932, abs=1e-3)
    assert (scores["n_real"], scores["n_fake"], scores["resize"]) == (24, 20, "tf1")
    assert "2048" in scores["warning"] and scores["features"] == net.label
    assert scores["kid_x1000"] == 1000 * kid(features_a, features_b)[0]


def test_the_mean_difference_of_all_pairs_is_that_of_each_pair():
    images = torch.randint(256, (10, 3, 3, 16, 8), dtype=torch.uint8)
    pairs = [common.mean_abs(a, b) for a, b in itertools.combinations(images, 2)]
    assert len(pairs) == 45
    assert common.mean_abs_of_pairs(images) == pytest.approx(np.mean(pairs), rel=1e-12)


def test_kid_is_the_mean_over_pairs_without_the_diagonal():
    x, y = torch.randn(4, 6).double(), torch.randn(5, 6).double()

    def k(a, b):
        return float(a @ b / 6 + 1) ** 3

    within_x = sum(k(a, b) for a in x for b in x if a is not b) - sum(k(a, a) for a in x)
    within_y = sum(k(a, b) for a in y for b in y if a is not b) - sum(k(a, a) for a in y)
    across = sum(k(a, b) for a in x for b in y) / 20
    expected = within_x / 12 + within_y / 20 - 2 * across
    mean, _ = kid(x, y, indices=[(range(4), range(5))])
    assert mean == pytest.approx(expected)
    again = [kid(x, y, 3, 3) for _ in range(2)]
    assert again[0] == again[1] and again[0][1] > 0


def test_fd8_of_flat_images_is_192_times_the_squared_difference():
    black, grey = torch.full((3, 3, 20, 12), -0.5), torch.full((4, 1, 16, 16), 0.25)
    assert fd8(black, [grey[:1], grey[1:]]) == pytest.approx(192 * 0.75**2)
    a, b = smooth(6, 8), smooth(6, 9)
    assert fd8(a, b) == pytest.approx(fd8(a / 127.5 - 1, b / 127.5 - 1), rel=1e-5)
    assert fd8(averaged(a), b) == fd8(a, averaged(b)) == fd8(a, b)


def test_statistics_of_real_images_are_cached_by_their_pixels(
    net, tmp_path, cheap_features, monkeypatch
):
    images = smooth(6, 10)
    first = real_statistics(images, net, folder=tmp_path)
    other = images.clone()
    other[5, 2, 63, 63] ^= 1  # one bit of one pixel
    real_statistics(other, net, folder=tmp_path)
    real_statistics(images, net, "clean", folder=tmp_path)
    assert cheap_features == ["tf1", "tf1", "clean"] and len(list(tmp_path.iterdir())) == 3
    monkeypatch.setattr(common, "inception_features", refuse)
    again = real_statistics([images[:1], images[1:]], net, folder=tmp_path)
    assert again["n"] == 6
    for name in ("mu", "sigma", "features"):
        assert torch.equal(again[name], first[name])


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "text"])
def test_a_damaged_cache_file_is_computed_again(net, tmp_path, cheap_features, damage, capsys):
    images = smooth(6, 11)
    first = real_statistics(images, net, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    whole = file.read_bytes()
    damaged = {"empty": b"", "cut": whole[:900], "flipped": data, "text": b"not here"}[damage]
    file.write_bytes(damaged)
    again = real_statistics(images, net, folder=tmp_path)
    assert len(cheap_features) == 2 and torch.equal(again["sigma"], first["sigma"])
    assert file.read_bytes() == whole and "damaged" in capsys.readouterr().err


def test_images_that_can_be_read_only_once_are_refused(net, tmp_path):
    with pytest.raises(ValueError, match="twice"):
        real_statistics(iter([smooth(2, 0)]), net, folder=tmp_path)


def test_a_cache_folder_that_cannot_be_written_costs_only_a_line(
    net, tmp_path, cheap_features, capsys
):
    (tmp_path / "file").write_text("in the way")
    assert real_statistics(smooth(3, 1), net, folder=tmp_path / "file" / "cache")["n"] == 3
    assert "cannot write" in capsys.readouterr().err


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "cut", "foreign", "shape", "code"])
def test_a_wrong_weights_file_ends_in_one_line(tmp_path, kind, net):
    file = tmp_path / "weights.pth"
    if kind == "folder":
        file.mkdir()
    if kind == "text":
        file.write_text("<html>not found</html>")
    if kind == "cut":
        torch.save({"fc.weight": torch.zeros(500)}, file)
        file.write_bytes(file.read_bytes()[:-300])
    if kind == "foreign":
        torch.save({"conv.weight": torch.zeros(3)}, file)
    if kind == "shape":
        torch.save({**net.state_dict(), "fc.weight": torch.zeros(1000, 2048)}, file)
    if kind == "code":
        torch.save({"fc.weight": Bomb(str(tmp_path / "exploded"))}, file)
    with pytest.raises(UserError) as error:
        load_inception(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "exploded").exists()


def test_a_damaged_download_in_the_cache_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("GANS_CACHE", str(tmp_path))
    with pytest.raises(UserError):
        load_inception()  # nothing there: the download is asked for
    (tmp_path / "pt_inception-2015-12-05-6726825d.pth").write_bytes(b"half a file")
    with pytest.raises(UserError, match="damaged"):
        load_inception()


def test_weights_given_by_path_load_and_carry_their_hash(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    before = torch.get_rng_state()
    loaded = load_inception(tmp_path / "weights.pth")
    assert torch.equal(torch.get_rng_state(), before)
    assert re.fullmatch("Inception [0-9a-f]{8}", loaded.label)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    for name, w in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], w)


def test_scoring_does_not_move_random_states_nor_depend_on_autocast(net, tmp_path):
    def sample():
        for _ in range(2):
            yield (torch.rand(1, 3, 16, 16) * 255).to(torch.uint8)

    precision = torch.backends.cudnn.conv.fp32_precision
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    plain = fid_kid(smooth(2, 1), sample(), net, folder=tmp_path)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = fid_kid(smooth(2, 1), sample(), net, folder=tmp_path / "other")
        assert torch.is_autocast_enabled("cpu")
    assert mixed == plain
    assert torch.backends.cudnn.conv.fp32_precision == precision


def test_precision_and_recall_of_three_images_are_left_out(monkeypatch, capsys):
    monkeypatch.setattr(common, "load_vgg16", lambda *args, **how: None)
    monkeypatch.setattr(common, "load_or_explain", lambda *args, **how: True)
    monkeypatch.setattr(
        common, "vgg_features", lambda images, vgg: torch.randn(len(next(images)), 5)
    )
    args = types.SimpleNamespace(metrics="pr", known_metrics="pr", vgg=None, lpips=None, batch=9)
    args.size, args.seed, args.data = 32, 0, "d"
    for n, found in ((3, {}), (4, {"precision", "recall"})):
        row = common.sample_scores(
            args,
            n,
            lambda rng, m: smooth(m, 1),
            9,
            lambda i: np.zeros((8, 8, 3), np.uint8),
            torch.device("cpu"),
        )
        assert set(row) == set(found)
        assert ("4 images or more" in capsys.readouterr().out) == (n == 3)


def test_infinite_features_are_an_error_and_not_a_score(net):
    broken = InceptionV3()
    broken.load_state_dict(net.state_dict())
    broken.Mixed_7c.branch1x1.bn.bias.data[0] = float("inf")
    with pytest.raises(ValueError, match="finite"):
        inception_features(smooth(1, 1), broken)
    with pytest.raises(ValueError, match="0 images"):
        inception_features([], net)
