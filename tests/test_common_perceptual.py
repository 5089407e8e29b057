"""LPIPS, path length, precision, recall, projection, films, seeds: closed forms and bad input."""

import argparse
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
from common import (
    LPIPS,
    VGG16,
    UserError,
    distance_to,
    for_vgg16,
    load_lpips,
    load_vgg16,
    lr_ramp,
    noise_regularization,
    path_point,
    perceptual_path_length,
    precision_recall,
    project,
    save_film,
    seeds,
    trimmed_mean,
    vgg_features,
    w_noise_ramp,
)

WIDTHS = (64, 128, 256, 512, 512)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(shape, generator=rng(seed))


@pytest.fixture(scope="module")
def vgg():
    """A sixteenth of the width, random weights of the size that keeps activations near 1."""
    net = VGG16(width=4).eval()
    for i, weight in enumerate(net.parameters()):
        fan_in = weight[0].numel()
        scale = (2 / fan_in) ** 0.5 if weight.ndim > 1 else 0.1
        weight.data.copy_(random(*weight.shape, seed=i) * scale)
    return net


@pytest.fixture(scope="module")
def lpips(vgg):
    return LPIPS(vgg, [random(c // 16, seed=k).abs() for k, c in enumerate(WIDTHS)])


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Files with the published names and shapes and other values, a few kB; an empty cache."""
    monkeypatch.setenv("GANS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GANS_OFFLINE", "1")
    (tmp_path / "cache").mkdir()
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in VGG16().state_dict().items()}
    lins = {f"lin{k}.model.1.weight": torch.full((1, c, 1, 1), 0.5) for k, c in enumerate(WIDTHS)}
    torch.save({k: torch.full((), 0.01).expand(s) for k, s in shapes.items()}, tmp_path / "v.pth")
    torch.save(lins, tmp_path / "l.pth")
    return tmp_path


# ---- VGG16 and LPIPS -------------------------------------------------------------------


def test_vgg16_has_torchvisions_tensors():
    with torch.device("meta"):
        net = VGG16()
    assert sum(p.numel() for p in net.parameters()) == 138_357_544
    names = list(net.state_dict())
    convs = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    layers = [f"features.{i}" for i in convs] + [f"classifier.{i}" for i in (0, 3, 6)]
    assert names == [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]
    x = torch.empty(2, 3, 64, 32, device="meta")
    shapes = [(2, c, 64 >> k, 32 >> k) for k, c in enumerate(WIDTHS)]
    assert [tuple(maps.shape) for maps in net.stages(x)] == shapes
    assert net(x).shape == (2, 4096)


def test_the_stages_end_with_a_relu_and_the_features_too(vgg):
    x = for_vgg16(random(2, 3, 32, 32).tanh())
    assert all(maps.min() == 0 and maps.max() > 0 for maps in vgg.stages(x))
    features = vgg(x)
    assert features.min() == 0 and features.max() > 0
    hidden = F.adaptive_avg_pool2d(vgg.features(x), 7).flatten(1)
    for i in (0, 3):
        hidden = F.relu(F.linear(hidden, vgg.classifier[i].weight, vgg.classifier[i].bias))
    torch.testing.assert_close(features, hidden)


def test_the_normalisation_is_that_of_lpips():
    x = random(2, 3, 4, 4)
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    torch.testing.assert_close(for_vgg16(x), (x - shift) / scale)
    torch.testing.assert_close(for_vgg16(x[:, :1]), for_vgg16(x[:, :1].expand(-1, 3, -1, -1)))


def slow_lpips(lpips, x, y):
    """LPIPS of two images (3, H, W) in float64, pixel by pixel."""
    state = {name: tensor.double() for name, tensor in lpips.state_dict().items()}
    total, stage = 0.0, 0
    shift = torch.tensor([-0.030, -0.088, -0.188]).double()[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450]).double()[:, None, None]
    maps = [((image.double() - shift) / scale)[None] for image in (x, y)]
    for i in range(31):
        if f"net.features.{i}.weight" in state:
            weight, bias = (state[f"net.features.{i}.{part}"] for part in ("weight", "bias"))
            maps = [F.relu(F.conv2d(m, weight, bias, padding=1)) for m in maps]
        elif i in (4, 9, 16, 23, 30):
            _, C, H, W = maps[0].shape
            lin = state[f"lin{stage}"].flatten()
            for r in range(H):
                for c in range(W):
                    u, v = (m[0, :, r, c] / (m[0, :, r, c].norm() + 1e-10) for m in maps)
                    total += float((lin * (u - v) ** 2).sum()) / (H * W)
            stage += 1
            maps = [F.max_pool2d(m, 2) for m in maps] if stage < 5 else maps
    assert stage == 5
    return total


def test_lpips_is_the_formula_and_the_squared_distance_of_its_features(lpips):
    x, y = random(2, 3, 16, 32).tanh(), random(2, 3, 16, 32, seed=1).tanh()
    distance = lpips(x, y)
    expected = torch.tensor([slow_lpips(lpips, a, b) for a, b in zip(x, y, strict=True)])
    assert distance.shape == (2,) and distance.min() > 0
    torch.testing.assert_close(distance, expected.float(), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        (lpips.features(x) - lpips.features(y)).square().sum(1), distance, rtol=1e-6, atol=0
    )
    assert torch.equal(lpips(x, x), torch.zeros(2)) and torch.equal(lpips(y, x), distance)
    grey = x[:, :1]
    assert torch.equal(lpips(grey, y), lpips(grey.expand(-1, 3, -1, -1), y))


def test_lpips_has_a_gradient_in_the_image_and_none_in_the_weights(lpips):
    x = random(1, 3, 16, 16).tanh().requires_grad_(True)
    (gradient,) = torch.autograd.grad(lpips(x, torch.zeros(1, 3, 16, 16)).sum(), x)
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    assert not any(p.requires_grad for p in lpips.parameters())


def test_the_gradient_of_lpips_is_finite_where_all_channels_are_dead(vgg):
    dead = VGG16(width=1)
    for parameter in dead.parameters():
        parameter.data.fill_(-1)
    x = torch.ones(1, 3, 16, 16, requires_grad=True)
    distance = LPIPS(dead, [torch.ones(c // 64) for c in WIDTHS])(x, -x).sum()
    assert torch.autograd.grad(distance, x)[0].isfinite().all()


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 4, 32, 32), (3, 32, 32)])
def test_lpips_names_the_shape_that_it_cannot_take(lpips, shape):
    with pytest.raises(ValueError, match=str(shape[-1])):
        lpips(torch.zeros(shape), torch.zeros(shape))


def test_negative_channel_weights_are_refused(vgg):
    with pytest.raises(ValueError, match="negative"):
        LPIPS(vgg, [-torch.ones(c // 16) for c in WIDTHS])


# ---- Weights ---------------------------------------------------------------------------


def test_weights_given_by_path_load_and_carry_their_hash(files):
    state = torch.get_rng_state()
    lpips = load_lpips(files / "v.pth", files / "l.pth")
    assert torch.equal(state, torch.get_rng_state())
    assert lpips.label.startswith("LPIPS ") and " of VGG16 " in lpips.label
    distance = lpips(random(1, 3, 32, 32).tanh(), torch.zeros(1, 3, 32, 32))
    assert distance.isfinite().all() and not lpips.training
    vgg = load_vgg16(str(files / "v.pth"))
    assert vgg.label.startswith("VGG16 ") and not any(p.requires_grad for p in vgg.parameters())


@pytest.mark.parametrize("load", [load_vgg16, load_lpips])
def test_weights_that_cannot_be_fetched_are_one_line_that_says_where_they_are(load, files):
    with pytest.raises(UserError) as error:
        load()
    line = str(error.value)
    assert "GANS_OFFLINE" in line and "https://" in line and "save it as" in line
    assert "\n" not in line and str(files / "cache") in line
    assert not list((files / "cache").glob("*.pth"))


class Malicious:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "foreign", "swapped", "malicious"])
@pytest.mark.parametrize("load", ["vgg", "lin"])
def test_a_file_that_holds_something_else_is_one_line(load, kind, files, capsys):
    path = files / "other.pth"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("not weights")
    elif kind == "foreign":
        torch.save({"features.0.weight": torch.zeros(3)}, path)
    elif kind == "swapped":  # the other one of the two files
        path.write_bytes((files / ("l.pth" if load == "vgg" else "v.pth")).read_bytes())
    elif kind == "malicious":
        torch.save(Malicious(), path)
    with pytest.raises(UserError, match="other.pth") as error:
        load_vgg16(path) if load == "vgg" else load_lpips(files / "v.pth", path)
    assert "\n" not in str(error.value) and capsys.readouterr().out == ""


def test_a_damaged_file_in_the_cache_is_not_used(files):
    (files / "v.pth").rename(files / "cache" / "vgg16-397923af.pth")
    with pytest.raises(UserError, match="damaged.*Delete it"):
        load_vgg16()


def test_vgg_features_count_pixels_of_all_kinds_the_same(vgg):
    images = (random(3, 1, 20, 12).tanh() * 127 + 128).to(torch.uint8)
    features = vgg_features(images, vgg)
    assert features.shape == (3, 256) and features.dtype == torch.float32
    assert torch.equal(features, vgg_features(images.expand(-1, 3, -1, -1), vgg))
    torch.testing.assert_close(features, vgg_features([images[:2], images[2:]], vgg))
    flat = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)  # resizing leaves it flat
    expected = vgg(for_vgg16(torch.full((1, 3, 224, 224), 100 / 127.5 - 1)))
    torch.testing.assert_close(vgg_features(flat, vgg), expected.detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="none"):
        vgg_features([], vgg)


# ---- Precision and recall --------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_precision_and_recall_of_points_on_a_line(chunk):
    real = torch.tensor([0.0, 1, 2, 3])[:, None]  # every ball has radius 1
    fake = torch.tensor([3.9, 4.1, 10, 0.5])[:, None]  # radii 0.2, 0.2, 5.9, 3.4
    assert precision_recall(real, fake, k=1, chunk=chunk) == (0.5, 1.0)
    assert precision_recall(fake, real, k=1, chunk=chunk) == (1.0, 0.5)
    # k = 2, radii 2, 1, 1, 2: 4.1 is inside the ball of 3
    assert precision_recall(real, fake, k=2, chunk=chunk)[0] == 0.75


def test_precision_and_recall_are_those_of_the_definition_with_many_points():
    real, fake = random(60, 5).double(), random(50, 5, seed=1).double() * 0.7 + 0.5

    def share(points, centres, k=3):
        hits = 0
        for p in points:
            for i, c in enumerate(centres):
                others = [float((c - d).norm()) for j, d in enumerate(centres) if j != i]
                if (p - c).norm() <= sorted(others)[k - 1]:
                    hits += 1
                    break
        return hits / len(points)

    expected = share(fake, real), share(real, fake)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1
    assert precision_recall(real, fake, chunk=7) == expected
    assert precision_recall((real + 1000).float(), (fake + 1000).float()) == expected


def test_equal_sets_have_precision_and_recall_1_and_distant_sets_0():
    x = random(40, 8)
    assert precision_recall(x, x.clone()) == (1.0, 1.0)
    assert precision_recall(x, x + 100) == (0.0, 0.0)
    collapsed = x[:1].expand(40, 8)  # real, but all the same
    assert precision_recall(x, collapsed) == (1.0, 1 / 40)


@pytest.mark.parametrize(
    "shapes", [((3, 2), (9, 2)), ((9, 2), (3, 2)), ((9, 2), (9, 3)), ((9,),) * 2]
)
def test_too_few_points_or_other_features_are_an_error(shapes):
    with pytest.raises(ValueError, match="k = 3"):
        precision_recall(*(torch.zeros(shape) for shape in shapes))


# ---- Path length -----------------------------------------------------------------------


def squared(x, y):
    return (x - y).square().sum([1, 2, 3])


def linear_draw(A, ends):
    """Endpoints from a list, images A w of 2 x 2 pixels in float64."""
    todo = list(ends)

    def draw(m):
        a, b = (torch.stack(side) for side in zip(*(todo.pop(0) for _ in range(m)), strict=True))
        return a, b, lambda w: (w @ A.T).reshape(m, 1, 2, 2)

    return draw


@pytest.mark.parametrize("full", [False, True])
def test_path_length_of_a_linear_generator_is_the_trimmed_mean_of_its_squared_steps(full):
    A = random(4, 6).double()
    ends = [tuple(random(2, 6, seed=i).double()) for i in range(300)]
    steps = [float((A @ (b - a)).square().sum()) for a, b in ends]
    ppl = perceptual_path_length(linear_draw(A, ends), squared, n=300, batch=7, full=full)
    assert ppl == pytest.approx(trimmed_mean(steps), rel=1e-6)
    assert ppl < np.mean(steps)  # the largest are out


def test_the_mean_leaves_out_the_lowest_and_the_highest_hundredth():
    values = np.random.default_rng(0).permutation(1001.0 * np.ones(1001) * np.arange(1001))
    assert trimmed_mean(values) == pytest.approx(1001 * 500)  # of 10 ... 990
    values = np.r_[np.full(5, -1e9), np.linspace(1, 2, 995), np.full(5, 1e9)]
    assert 1 < trimmed_mean(values) < 2
    # Percentiles of 0, ..., 49 lie at 0.49 and 48.51: rounded outward, all stay.
    assert trimmed_mean([1e9, *range(1, 49), -1e9]) == pytest.approx(sum(range(1, 49)) / 50)
    assert trimmed_mean([3.0]) == 3.0


def test_path_length_in_z_of_the_identity_is_the_squared_angle():
    a, b = random(2, 5, 1, 4).double() * 3  # not of unit length
    angle = F.cosine_similarity(a, b, dim=-1).acos()  # (5, 1)
    expected = (2 * (angle * 1e-4 / 2).sin() / 1e-4).square()

    def draw(m):
        return a, b, lambda z: z[:, :, None]

    for full in (False, True):
        ppl = perceptual_path_length(draw, squared, n=5, batch=5, space="z", full=full)
        assert ppl == pytest.approx(trimmed_mean(expected.flatten()), rel=1e-6)


def test_paths_begin_at_a_and_end_at_b_at_constant_speed():
    a, b = random(2, 3, 2, 4)
    t0, half, t1 = torch.zeros(3), torch.full((3,), 0.5), torch.ones(3)
    torch.testing.assert_close(path_point(a, b, t0), a)
    torch.testing.assert_close(path_point(a, b, t1), b)
    torch.testing.assert_close(path_point(a, b, half), (a + b) / 2)
    torch.testing.assert_close(path_point(a, b, t0, "z"), F.normalize(a, dim=-1))
    torch.testing.assert_close(path_point(a, b, t1, "z"), F.normalize(b, dim=-1))
    middle = F.normalize(F.normalize(a, dim=-1) + F.normalize(b, dim=-1), dim=-1)
    torch.testing.assert_close(path_point(a, b, half, "z"), middle)
    assert path_point(a, a, half, "z").isfinite().all()


@pytest.mark.parametrize("full", [False, True])
def test_images_are_rendered_at_t_and_one_epsilon_later(full):
    seen = []

    def draw(m):
        def render(w):
            seen.append(w[:, 0].double())
            return torch.zeros(m, 3, 8, 8)

        return torch.zeros(m, 2), torch.ones(m, 2), render

    assert perceptual_path_length(draw, squared, n=20, batch=8, full=full, eps=0.25) == 0
    assert [len(w) for w in seen] == [8, 8, 8, 8, 4, 4]
    first, second = torch.cat(seen[::2]), torch.cat(seen[1::2])
    torch.testing.assert_close(second, first + 0.25)
    assert (first.unique().numel() == 20 and first.max() < 1) if full else first.eq(0).all()


@pytest.mark.parametrize(
    "side, crop, seen", [(256, False, 256), (512, False, 256), (512, True, 256), (1024, True, 256)]
)
def test_large_images_are_averaged_to_256_after_the_crop(side, crop, seen):
    image = torch.arange(side).float()[:, None] + torch.arange(side) * 2.0
    shapes = []

    def distance(x, y):
        shapes.append(x.shape)
        box = side // 2 // seen if crop else side // seen
        corner = image[3 * side // 8 :, 2 * side // 8 :] if crop else image
        assert float(x[0, 0, 0, 0]) == float(corner[:box, :box].mean())
        return torch.ones(len(x))

    def draw(m):
        return torch.zeros(m, 1), torch.ones(m, 1), lambda w: image.expand(m, 1, side, side)

    ppl = perceptual_path_length(draw, distance, n=1, crop=crop, eps=0.5)
    assert ppl == 4 and shapes == [(1, 1, seen, seen)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
def test_rounded_images_have_no_path_length(dtype):
    def draw(m):
        return torch.zeros(m, 1), torch.ones(m, 1), lambda w: torch.zeros(m, 3, 8, 8, dtype=dtype)

    with pytest.raises(ValueError, match=str(dtype)):
        perceptual_path_length(draw, squared, n=2)


# ---- Projection ------------------------------------------------------------------------


class Synthesizer(torch.nn.Module):
    """ws (1, 3, 5) -> image (1, 3, 16, 16): linear, a convolution, and two noise maps."""

    def __init__(self):
        super().__init__()
        self.A = torch.nn.Parameter(random(15, 2 * 8 * 8, seed=1) * 0.2)
        self.conv = torch.nn.Conv2d(2, 3, 3, padding=1)
        self.conv.weight.data.copy_(random(3, 2, 3, 3, seed=2) * 0.3)
        self.conv.bias.data.zero_()
        self.noises = [random(8, 8, seed=3), random(1, 1, 16, 16, seed=4)]
        self.strength = 0.0

    def forward(self, ws):
        x = (ws.flatten(1) @ self.A).reshape(1, 2, 8, 8) + self.strength * self.noises[0]
        x = F.interpolate(x, scale_factor=2)
        return self.conv(x) + self.strength * self.noises[1]


@pytest.mark.parametrize("rows", [1, 3])
def test_projection_recovers_the_latent_in_w_and_in_w_plus(rows):
    G, w = Synthesizer(), random(rows, 5, seed=9)
    target = G(w.expand(3, 5)[None]).detach()
    start = torch.zeros(rows, 5)
    path, distances = project(G, distance_to(target), start, 1.0, 3, steps=250)
    assert path.shape == (250, rows, 5) and distances.shape == (250,)
    assert distances[-1] < 1e-3 * distances[0]
    torch.testing.assert_close(path[-1], w, atol=0.02, rtol=0)
    assert start.eq(0).all() and all(p.grad is None for p in G.parameters())


def test_projection_fits_noise_maps_of_zero_mean_and_unit_variance():
    G = Synthesizer()
    G.strength = 0.3
    target = G(random(1, 5, seed=9).expand(3, 5)[None]).detach()
    before = [noise.clone() for noise in G.noises]
    steps = []

    def on_step(step, image, distance):
        steps.append((step, tuple(image.shape), float(distance)))
        assert not image.requires_grad and not distance.requires_grad
        for noise in G.noises:
            assert abs(float(noise.detach().mean())) < 1e-6
            assert float(noise.detach().square().mean()) == pytest.approx(1, abs=1e-5)

    kwargs = dict(noises=G.noises, steps=60, noise_weight=1.0, on_step=on_step)
    path, distances = project(G, distance_to(target), torch.zeros(1, 5), 1.0, 3, **kwargs)
    assert [s[0] for s in steps] == list(range(60)) and steps[0][1] == (1, 3, 16, 16)
    assert [s[2] for s in steps] == distances.tolist()
    assert distances[-1] < 0.3 * distances[0]
    for old, new in zip(before, G.noises, strict=True):
        assert not new.requires_grad and new.grad is None and not torch.equal(old, new)
    with torch.no_grad():
        fitted = distance_to(target)(G(path[-1].expand(3, 5)[None]))
    assert fitted < 0.3 * distances[0]  # the maps stay in the network


def test_projection_is_deterministic_and_leaves_the_random_state_alone():
    def run(seed, old_noise=1.0):
        G = Synthesizer()
        G.noises[0].mul_(old_noise)
        G.strength, state = 0.1, torch.get_rng_state()
        out = project(
            G, distance_to(torch.zeros(1, 3, 16, 16)), random(1, 5), 1.0, 3, G.noises, steps=5,
            generator=rng(seed),
        )  # fmt: skip
        assert torch.equal(state, torch.get_rng_state())
        return [*out, *G.noises]

    first, again, other = run(1), run(1, old_noise=2.0), run(2)
    assert all(map(torch.equal, first, again)) and not torch.equal(first[0], other[0])


def test_steps_of_a_linear_loss_are_the_learning_rates():
    # Adam's step under a constant gradient is the learning rate.
    path, _ = project(lambda ws: ws, torch.sum, torch.zeros(1, 2).double(), 0, 4, steps=40, lr=0.3)
    t = torch.arange(40).double() / 40
    ramp = (t / 0.05).clamp(max=1) * (1 - (math.pi * ((1 - t) / 0.25).clamp(max=1)).cos()) / 2
    torch.testing.assert_close(path[:, 0, 0], -0.3 * ramp.cumsum(0), rtol=1e-5, atol=1e-7)
    assert [lr_ramp(t) for t in (0, 0.025, 0.05, 0.5, 0.75)] == pytest.approx([0, 0.5, 1, 1, 1])
    assert [lr_ramp(t) for t in (0.875, 1)] == pytest.approx([0.5, 0])


def test_the_noise_on_w_falls_as_a_square_and_ends_at_three_quarters():
    images = []
    project(
        lambda ws: ws, torch.sum, torch.ones(1, 1000), 2.0, 2, steps=8, lr=1e-30,
        on_step=lambda step, image, distance: images.append(image[0] - 1),
    )  # fmt: skip
    assert all(torch.equal(image[0], image[1]) for image in images)  # one row for all layers
    expected = [2 * 0.05 * max(0, 1 - step / 6) ** 2 for step in range(8)]
    assert [float(image.square().mean().sqrt()) for image in images] == pytest.approx(
        expected, rel=0.1
    )
    assert [w_noise_ramp(t) for t in (0, 0.375, 0.75, 1)] == pytest.approx([0.05, 0.0125, 0, 0])


def test_w_weight_pulls_towards_the_start():
    free, held = (
        project(lambda ws: ws, torch.sum, torch.ones(1, 3), 0, 1, steps=300, w_weight=weight)[0]
        for weight in (0.0, 15.0)
    )
    # The minimum of sum(w) + 15 mean((w - 1)^2) is at w = 1 - 3 / 30.
    torch.testing.assert_close(held[-1], torch.full((1, 3), 0.9), atol=1e-3, rtol=0)
    assert free[-1].max() < -10


def test_a_projection_that_diverges_is_one_line():
    with pytest.raises(UserError, match="smaller learning rate"):
        project(lambda ws: ws, lambda x: x.sum() / 0, torch.zeros(1, 2), 0, 1, steps=3)


def test_noise_regularization_of_flat_and_of_checkered_maps():
    flat = torch.ones(8, 8)
    checkered = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
    stripes = (torch.arange(32) % 2 * 2.0 - 1).expand(32, 32)
    assert float(noise_regularization(flat)) == 2
    assert float(noise_regularization(torch.ones(1, 1, 32, 32))) == 6  # of sides 32, 16, 8
    assert float(noise_regularization(checkered)) == 2  # only at the finest level
    assert float(noise_regularization(stripes)) == 2
    assert float(noise_regularization(random(64, 64))) < 0.01
    assert float(noise_regularization(torch.ones(4, 4))) == 2


def test_distance_to_is_lpips_or_a_pyramid_of_pixels(lpips):
    x, y = random(1, 3, 16, 16).tanh(), random(1, 3, 16, 16, seed=1).tanh()
    torch.testing.assert_close(distance_to(y, lpips)(x), lpips(x, y)[0])
    finest, coarser = (x - y).square().mean(), F.avg_pool2d(x - y, 2).square().mean()
    torch.testing.assert_close(distance_to(y)(x), finest + coarser)
    # Only averages of 2 x 2 count above 256 pixels.
    large = torch.zeros(1, 1, 512, 512)
    fine = large + (torch.arange(512) % 2 * 2.0 - 1)
    assert float(distance_to(large, lpips)(fine)) == 0 and float(distance_to(large)(fine)) == 1


def test_projection_with_lpips_lowers_it(lpips):
    G = Synthesizer()
    target = G(random(1, 5, seed=9).expand(3, 5)[None]).detach()
    _, distances = project(G, distance_to(target, lpips), torch.zeros(1, 5), 1.0, 3, steps=100)
    assert distances[-1] < 0.1 * distances[0]


# ---- Seeds and films -------------------------------------------------------------------


def test_seeds_are_numbers_and_ranges():
    assert seeds("0-7,42") == [0, 1, 2, 3, 4, 5, 6, 7, 42]
    assert seeds("5") == [5] and seeds("3-3, 1") == [3, 1]
    assert seeds(str(2**32 - 1)) == [2**32 - 1]
    assert len(seeds("1-100000")) == 100_000


@pytest.mark.parametrize(
    "text, says",
    [
        ("-3", "'-3'"), ("1,-3", "'-3'"), ("7-0", "write 0-7"), ("0-100000", "100,000"),
        ("0-99999,5", "100,000"), ("0-4000000000", "100,000"), ("4294967296", "4294967295"),
        ("", "''"), ("1,", "''"), ("a", "'a'"), ("1-2-3", "1-2-3"), ("1.5", "1.5"), ("1_0", "1_0"),
        ("9" * 5000, "9999"), ("٣", "٣"),
    ],
)  # fmt: skip
def test_what_is_not_a_seed_is_one_line(text, says):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        seeds(text)
    assert says in str(error.value) and len(str(error.value)) < 120


def pictures(n, size=24):
    for i in range(n):
        yield Image.new("RGB", (size, size), (20 * i, 255 - 20 * i, 90))


@pytest.mark.parametrize("suffix, decoder", [("webp", "WEBP"), ("GIF", "GIF"), ("png", "PNG")])
@pytest.mark.parametrize("fps, duration", [(25, 40), (10, 100)])
def test_films_open_again_with_all_frames(tmp_path, suffix, decoder, fps, duration):
    path = tmp_path / "below" / f"film.{suffix}"
    save_film(path, pictures(7), fps)
    with Image.open(path) as film:
        assert film.format == decoder and film.n_frames == 7 and film.info["loop"] == 0
        for i, expected in enumerate(pictures(7)):
            film.seek(i)
            film.load()
            assert film.info["duration"] == duration
            difference = np.asarray(film.convert("RGB")).astype(int) - np.asarray(expected)
            assert np.abs(difference).max() <= (8 if suffix == "webp" else 0)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_gif_is_not_faster_than_browsers_show_it(tmp_path):
    save_film(tmp_path / "a.gif", pictures(3), fps=120)
    save_film(tmp_path / "a.webp", pictures(3), fps=30)
    with Image.open(tmp_path / "a.gif") as gif, Image.open(tmp_path / "a.webp") as webp:
        gif.seek(1), webp.seek(1)
        gif.load(), webp.load()
        assert (gif.info["duration"], webp.info["duration"]) == (20, 33)


@pytest.mark.parametrize("name", ["film.mp4", "film", "film.jpg"])
def test_other_films_are_refused_before_a_frame_is_made(tmp_path, name):
    def never():
        raise AssertionError
        yield

    with pytest.raises(UserError, match=r"\.webp, \.gif, \.png"):
        save_film(tmp_path / name, never())


def test_a_film_that_breaks_off_leaves_the_old_one(tmp_path):
    def broken():
        yield from pictures(2)
        raise KeyboardInterrupt

    save_film(tmp_path / "a.webp", pictures(3))
    before = (tmp_path / "a.webp").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        save_film(tmp_path / "a.webp", broken())
    with pytest.raises(ValueError):
        save_film(tmp_path / "a.webp", [])
    assert (tmp_path / "a.webp").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# ---- curves ----


def test_curves_show_every_point_where_its_axes_say(tmp_path):
    line = [(0, 0.0), (5, 1.0), (10, 0.5)]
    picture = common.curves({"a": {"y": line}, "empty": {"z": []}, "b": {"y": [(1, 2.0)]}}, "x")
    assert picture.size == (1120, 280)  # two panels: one without points is left out
    blue = np.asarray(picture)[:, :560] == (0x0B, 0x62, 0xA4)
    ys, xs = np.nonzero(blue.all(2))
    left, width, top, height = 64, 480, 44, 202
    plotted = ys >= top - 2  # below the legend
    assert abs(xs[plotted].min() - left) <= 3 and abs(xs[plotted].max() - left - width) <= 3
    middle = ys[plotted & (np.abs(xs - left - width / 2) <= 1)]
    assert abs(middle.min() - top) <= 3
    right = ys[plotted & (np.abs(xs - left - width) <= 1)]
    assert abs(right.mean() - top - height / 2) <= 3


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-3, 12, [0, 5, 10]), (0.101, 0.102, 5), (0, 60000, 7)],
)
def test_ticks_are_few_and_round(low, high, expected):
    found = common.ticks(low, high)
    assert 3 <= len(found) <= 7 and all(low - 1e-9 <= t <= high + 1e-9 for t in found)
    if isinstance(expected, list):
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_progress_takes_names_from_both_logs(tmp_path):
    rows = [{"step": k, "loss/G": 1.0 + k, "kimg": 0.1 * k} for k in (1, 2)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = {"step": 2, "fd8": 3.0, "fid": {"fid": 40.0, "n_real": 5}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    panels = {"G": ("loss/G", "no such"), "scores": ("fd8", "fid"), "none": ("ada/p",)}
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "curves", lambda *args: seen.append(args) or Image.new("L", (1, 1)))
        common.save_curves(tmp_path, panels, batch=500)
    assert seen == [
        (
            {
                "G": {"loss/G": [(0.5, 2.0), (1.0, 3.0)]},
                "scores": {"fd8": [(1.0, 3.0)], "fid": [(1.0, 40.0)]},
                "none": {},
            },
            "thousands of images",
        )
    ]
    common.save_curves(tmp_path / "nowhere", panels, batch=500)
    assert (tmp_path / "nowhere/progress.png").exists()


def test_a_path_length_does_not_depend_on_which_other_scores_are_asked_for(monkeypatch):
    monkeypatch.setattr(common, "load_or_explain", lambda *args, **options: common.pixel_distance)

    def pairs(rng, m, space):
        a, b = torch.from_numpy(rng.standard_normal((2, m, 3, 1, 1))).float()
        return a, b, lambda x: x.expand(-1, -1, 32, 32)

    def scores(metrics):
        args = dict(metrics=metrics, known_metrics="path,ppl", batch=4, seed=0, size=32, data="d")
        args = argparse.Namespace(**args, vgg=None, lpips=None)
        return common.sample_scores(args, 8, None, 8, None, torch.device("cpu"), pairs)

    both = scores("path,ppl")
    assert both["ppl2_wend"] == scores("ppl")["ppl2_wend"] == both["path2_wend"] > 0
