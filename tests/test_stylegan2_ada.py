"""stylegan2_ada.py: the pipe's statistics and derivatives, the control of p, and its commands run
as a user runs them. What it shares with stylegan2.py is equal to the letter and tested there."""

import ast
import json
import math
import re
import types
from pathlib import Path

import commands
import numpy as np
import official_files
import pytest
import torch
from commands import ROOT, no_stray_files, one_thread  # noqa: F401
from eager import Eager
from PIL import Image

import common
import stylegan2
import stylegan2_ada
from stylegan2_ada import PIPES, AugmentPipe

NETS = "--size 8 --channel-base 32 --channel-max 8 --z-dim 8 --w-dim 8 --map-layers 2".split()
TINY = [*NETS, *"--batch 50 --mbstd-group 2 --kimg 1 --every 1".split()]  # 20 steps
script, run, main, fails = commands.of(stylegan2_ada)


def faces(folder, n=6, size=8, domain=0):
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        common.toy_face(i, domain, size).save(f"{folder}/{i:03}.png")
    return folder


def jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- what two papers share ----


def definitions(file):
    """{name: source} of the top-level functions, classes and tables of a script."""
    text, found = (ROOT / file).read_text(), {}
    for node in ast.parse(text).body:
        names = [node.name] if hasattr(node, "name") else []
        first = node.lineno - len(getattr(node, "decorator_list", ()))
        for name in names:
            found[name] = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
    return found


OWN = {  # what the second paper changed, and what only names its own file
    "generator_phase", "discriminator_phase", "r1_phase", "train_step", "train", "fill_options",
    "check_options", "evaluate", "main",
}  # fmt: skip


def test_copies_are_equal():
    first, second = definitions("stylegan2.py"), definitions("stylegan2_ada.py")
    assert set(first) - set(second) == {"project", "edit"}
    for name in set(first) - OWN - {"project", "edit"}:
        assert first[name] == second[name], name
    assert all(first[name] != second[name] for name in OWN)


# ---- the pipe: rates and distributions ----

N = 10_000
Q = 0.4  # the p of most tests


def is_close(count, share, n=N):
    """Whether a count is within four deviations of a binomial's mean."""
    return abs(count - n * share) < 4 * math.sqrt(n * share * (1 - share)) + 1e-9


def follows(values, cdf):
    """Kolmogorov-Smirnov at 0.1%: the distance of the empirical distribution to cdf."""
    x = np.sort(np.asarray(values, float))
    high = np.arange(1, len(x) + 1) / len(x) - cdf(x)
    low = cdf(x) - np.arange(len(x)) / len(x)
    return max(high.max(), low.max()) < 1.95 / math.sqrt(len(x))


def normal(std):
    erf = np.vectorize(math.erf)
    return lambda x: (1 + erf(x / (std * math.sqrt(2)))) / 2


def uniform(limit):
    return lambda x: ((x + limit) / (2 * limit)).clip(0, 1)


def draws(seed=0):
    return stylegan2_ada.Draws("cpu", seed)


def exact(*args, **options):
    """An AugmentPipe whose constants are float64 from the start."""
    torch.set_default_dtype(torch.float64)
    try:
        return AugmentPipe(*args, **options)
    finally:
        torch.set_default_dtype(torch.float32)


def geometry(name, p=Q, size=(64, 32)):
    return exact({name: 1}, p).geometry(N, *size, draws()).numpy()


def colors(name, p=Q):
    return exact({name: 1}, p).colors(N, 3, draws()).numpy()


def test_the_checks_of_distributions_can_fail():
    x = np.random.default_rng(0).standard_normal(4000)
    assert follows(x, normal(1)) and not follows(x, normal(1.2)) and not follows(x, uniform(3))
    assert is_close(4050, 0.4) and not is_close(4250, 0.4)


def test_flips_come_at_half_of_p():
    G = geometry("xflip")
    flipped = G[:, 0, 0] < 0
    assert is_close(flipped.sum(), Q / 2)
    assert (np.abs(G) == np.eye(3)).all() and (G[:, 1, 1] == 1).all()


def test_quarter_turns_are_uniform():
    G = geometry("rotate90")
    turns = np.round(np.arctan2(G[:, 1, 0], G[:, 0, 0]) / (math.pi / 2)).astype(int) % 4
    counts = np.bincount(turns, minlength=4)
    assert all(is_close(count, Q / 4) for count in counts[1:])
    assert is_close(counts[0], 1 - Q * 3 / 4)


def test_integer_shifts_are_uniform_up_to_an_eighth_and_have_one_gate():
    G = geometry("xint", size=(64, 32))
    shift = -G[:, :2, 2]
    assert (shift == np.round(shift)).all() and (np.abs(shift).max(0) == (8, 4)).all()
    moved = shift.any(1)
    assert is_close(moved.sum(), Q * (1 - 1 / 16 / 8))  # else both shifts were rounded to 0
    for k, limit in ((0, 8), (1, 4)):  # 0 and inner values come at 1 / (2 limit), ends at half
        counts = np.bincount((shift[moved, k] + limit).astype(int), minlength=2 * limit + 1)
        inner = counts[1:limit].sum() + counts[limit + 1 : -1].sum()
        assert is_close(inner, (2 * limit - 2) / (2 * limit), moved.sum())
        assert is_close(counts[0], 1 / (4 * limit), moved.sum())
        assert is_close(counts[-1], 1 / (4 * limit), moved.sum())


@pytest.mark.parametrize("name", ["scale", "aniso"])
def test_scales_are_lognormal(name):
    G = geometry(name)
    x, y = -np.log2(G[:, 0, 0]), -np.log2(G[:, 1, 1])
    np.testing.assert_allclose(y, x if name == "scale" else -x, atol=1e-12)
    scaled = x != 0
    assert is_close(scaled.sum(), Q) and follows(x[scaled], normal(0.2))


@pytest.mark.parametrize("p", [0.4, 1.0, 1.7])
def test_turns_are_uniform_and_come_at_p_in_two_chances(p):
    G = geometry("rotate", p)
    angle = np.arctan2(G[:, 1, 0], G[:, 0, 0])
    turned = np.abs(angle) > 1e-12
    assert is_close(turned.sum(), min(p, 1)) and follows(angle[turned], uniform(math.pi))


def test_fractional_shifts_are_normal_and_have_one_gate():
    t = -geometry("xfrac", size=(64, 32))[:, :2, 2] / (64, 32)
    moved = t.all(1)
    assert is_close(moved.sum(), Q) and not t[~moved].any()
    assert follows(t[moved, 0], normal(0.125)) and follows(t[moved, 1], normal(0.125))
    assert abs(np.corrcoef(t[moved].T)[0, 1]) < 4 / math.sqrt(moved.sum())


def test_brightness_is_normal_and_grey():
    b = colors("brightness")[:, :3, 3]
    assert (b == b[:, :1]).all()
    lit = b[:, 0] != 0
    assert is_close(lit.sum(), Q) and follows(b[lit, 0], normal(0.2))


def test_contrast_is_lognormal():
    c = np.log2(colors("contrast")[:, [0, 1, 2], [0, 1, 2]])
    assert (c == c[:, :1]).all()
    changed = c[:, 0] != 0
    assert is_close(changed.sum(), Q) and follows(c[changed, 0], normal(0.5))


GREY = np.ones(3) / math.sqrt(3)


def test_luma_flips_come_at_half_of_p_and_mirror_the_grey_axis():
    M = colors("lumaflip")[:, :3, :3]
    flipped = ~np.isclose(M, np.eye(3)).all((1, 2))
    assert is_close(flipped.sum(), Q / 2)
    np.testing.assert_allclose(M[flipped] @ GREY, np.broadcast_to(-GREY, (flipped.sum(), 3)))
    np.testing.assert_allclose(np.linalg.det(M[flipped]), -1)


def test_hues_turn_uniformly_about_the_grey_axis():
    M = colors("hue")[:, :3, :3]
    np.testing.assert_allclose(M @ GREY, np.broadcast_to(GREY, (N, 3)), atol=1e-12)
    np.testing.assert_allclose(M @ M.swapaxes(1, 2), np.broadcast_to(np.eye(3), M.shape), atol=1e-9)
    across = np.array([1, -1, 0]) / math.sqrt(2)
    x, y = M @ across @ across, M @ across @ np.cross(GREY, across)
    angle = np.arctan2(y, x)
    turned = np.abs(angle) > 1e-12
    assert is_close(turned.sum(), Q) and follows(angle[turned], uniform(math.pi))


def test_saturation_is_lognormal_and_keeps_grey():
    M = colors("saturation")[:, :3, :3]
    np.testing.assert_allclose(M @ GREY, np.broadcast_to(GREY, (N, 3)), atol=1e-12)
    s = np.log2((np.trace(M, axis1=1, axis2=2) - 1) / 2)
    changed = np.abs(s) > 1e-12
    assert is_close(changed.sum(), Q) and follows(s[changed], normal(1))


def test_octaves_are_amplified_independently_and_expected_power_stays():
    T = exact("filter", Q)
    gains = T.gains(N, draws())
    power = torch.tensor([10, 1, 1, 1]).double() / 13
    one = exact("filter", 1.0, imgfilter_bands=(1, 0, 0, 0)).gains(N, draws())
    torch.testing.assert_close((power * one.square()).sum(1), torch.ones(N).double())
    factor = (one[:, 0] / one[:, 1]).log2().numpy()
    assert follows(factor, normal(1)) and torch.equal(one[:, 1], one[:, 2])
    unchanged = (gains - 1).abs().amax(1) < 1e-12
    assert is_close(unchanged.sum(), (1 - Q) ** 4)


def test_noise_has_a_half_normal_deviation():
    x = AugmentPipe("noise", Q)(torch.zeros(N, 1, 16, 16), draws()).flatten(1)
    noisy = x.any(1)
    assert is_close(noisy.sum(), Q)
    sigma = x[noisy].double().square().mean(1).sqrt()  # of 256 values: 4% off
    assert abs(sigma.square().mean().sqrt() - 0.1) < 0.004
    assert follows(sigma, lambda x: 2 * normal(0.1)(x) - 1)


def test_cutout_takes_a_half_sided_square_about_a_uniform_centre():
    x = AugmentPipe("cutout", Q)(torch.ones(N, 1, 32, 32), draws())[:, 0]
    cut = x.eq(0).flatten(1).any(1)
    assert is_close(cut.sum(), Q) and set(x.unique().tolist()) == {0, 1}
    for axis in (1, 2):
        line = x[cut].amin(axis)  # 0 in the rows, or columns, of the square
        inside = (line == 0).double()
        whole = inside[(inside[:, 0] == 0) & (inside[:, -1] == 0)]  # touches no border
        assert (whole.sum(1) == 16).all() and is_close(len(whole), 15 / 32, len(inside))
        firsts = np.bincount(whole.argmax(1), minlength=16)
        assert all(is_close(count, 1 / 15, len(whole)) for count in firsts[1:])


def test_at_p_0_images_change_by_rounding_only():
    x = torch.rand(8, 3, 32, 32) * 2 - 1
    for name in PIPES:
        y = AugmentPipe(name, 0.0)(x)
        torch.testing.assert_close(y, x, rtol=0, atol=1e-5)
    assert torch.equal(AugmentPipe({}, 1.0)(x), x)


def test_every_sample_has_its_own_transformation():
    x = torch.rand(1, 3, 32, 32).repeat(16, 1, 1, 1)
    for name in PIPES["bgcfnc"]:
        y = AugmentPipe({name: 1}, 1.0)(x, draws(3))
        discrete = {"xflip": 2, "lumaflip": 2, "rotate90": 4}.get(name, 12)
        assert len({tuple(image.flatten()[:400].tolist()) for image in y}) >= discrete, name


# ---- the pipe: pictures ----


def smooth(side=32):
    y, x = torch.meshgrid(*[torch.arange(side).double()] * 2, indexing="ij")
    waves = (0.3 * x + 0.1 * y).sin(), (0.1 * x - 0.25 * y + 1).sin(), (x / 5).cos() * (y / 7).cos()
    return torch.stack(waves)[None]


class Fixed(stylegan2_ada.Draws):
    """All draws are these two values, for U[0, 1) and N(0, 1)."""

    def __init__(self, u, z):
        self.u, self.z = u, z

    def rand(self, *shape):
        return torch.full(shape, self.u, dtype=torch.float64)

    def randn(self, *shape):
        return torch.full(shape, self.z, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "u", "z", "expected", "atol"),
    [
        ("xflip", 0.7, 0, lambda x: x.flip(3), 0.05),
        ("rotate90", 0.3, 0, lambda x: x.rot90(1, (2, 3)), 0.05),
        ("xint", 0.75, 0, lambda x: x.roll((2, 2), (2, 3)), 1e-9),
        ("brightness", 0, 0.5, lambda x: x + 0.1, 1e-9),
        ("contrast", 0, 2, lambda x: x * 2, 1e-9),
        ("lumaflip", 0.7, 0, lambda x: x - 2 * x.mean(1, keepdim=True), 1e-9),
        ("saturation", 0, 1, lambda x: 2 * x - x.mean(1, keepdim=True), 1e-9),
        ("noise", 0, 1, lambda x: x + 0.1, 1e-9),
    ],
)
def test_a_transformation_does_what_its_name_says(name, u, z, expected, atol):
    x = smooth()
    y = exact({name: 1}, 1.0)(x, Fixed(u, z))
    inner = (..., slice(4, -4), slice(4, -4))
    torch.testing.assert_close(y[inner], expected(x)[inner], rtol=0, atol=atol)


def test_scaling_up_enlarges_and_positive_angles_turn_counterclockwise():
    dot = torch.zeros(1, 1, 33, 33).double()
    dot[..., 16, 20:23] = 1  # to the right of the centre
    big = exact({"scale": 1}, 1.0)(dot, Fixed(0, 5.0))  # twice as large
    assert abs(big[0, 0, 16].argmax().item() - (16 + 2 * 5)) <= 1
    turned = exact({"rotate90": 1}, 1.0)(dot, Fixed(0.3, 0))
    assert turned[0, 0].argmax().item() // 33 in (11, 10, 12)  # now above it


def test_a_colour_image_becomes_as_bright_as_its_grey_copy():
    T, grey = exact("color", 1.0), smooth()[:, :1]
    y = T(grey, Fixed(0.7, 0.3))
    only = exact({k: 1 for k in ("brightness", "contrast", "lumaflip")}, 1.0)
    three = only(grey.expand(-1, 3, -1, -1), Fixed(0.7, 0.3))
    torch.testing.assert_close(y, three.mean(1, keepdim=True))


def test_hue_of_a_third_of_a_turn_permutes_the_channels():
    x = smooth()
    y = exact({"hue": 1}, 1.0)(x, Fixed(5 / 6, 0))  # 2 pi / 3
    torch.testing.assert_close(y, x[:, [2, 0, 1]])


@pytest.mark.parametrize("name", ["bg", "color", "noise", "cutout", "filter"])
def test_derivatives_of_the_pipe_are_right_to_second_order(name):
    side = 22 if name == "filter" else 8
    T, x = exact(name, 0.7), torch.randn(2, 3, side, side).double().requires_grad_()

    def part(x):
        return (T(x, draws(2)) * weights).sum([1, 3]) ** 2

    weights = torch.randn(2, 3, side, side).double()
    assert torch.autograd.gradcheck(part, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(part, x, fast_mode=True)


def test_the_pipe_refuses_what_it_does_not_know():
    with pytest.raises(TypeError, match="zoom"):
        AugmentPipe({"zoom": 1})
    with pytest.raises(TypeError, match="bgx"):
        AugmentPipe("bgx")
    with pytest.raises(TypeError, match="scale_sdt"):
        AugmentPipe("bgc", scale_sdt=1)
    with pytest.raises(ValueError, match="not 4"):
        AugmentPipe("bgc", 1.0)(torch.zeros(1, 4, 8, 8))
    assert AugmentPipe("bg", 1.0)(torch.zeros(1, 4, 8, 8)).shape == (1, 4, 8, 8)


# ---- p, consistency, frozen layers, options ----


def test_p_moves_by_the_share_of_ada_kimg_towards_the_target():
    p = torch.tensor(0.5)
    for r_t, expected in ((0.9, 0.502), (0.6, 0.502), (0.1, 0.5)):
        stylegan2_ada.adapt(p, torch.tensor(r_t), 0.6, images=1000, kimg=500)
        torch.testing.assert_close(p, torch.tensor(expected))


def test_p_stays_within_0_and_the_cap():
    low, high, free = torch.zeros(()), torch.tensor(0.799), torch.tensor(0.999)
    for _ in range(3):
        stylegan2_ada.adapt(low, torch.tensor(0.0), 0.6, 1000, 500)
        stylegan2_ada.adapt(high, torch.tensor(1.0), 0.6, 1000, 500, cap=0.8)
        stylegan2_ada.adapt(free, torch.tensor(1.0), 0.6, 1000, 500)
    assert low == 0 and high == pytest.approx(0.8) and free == pytest.approx(1.005)


def test_consistency_is_the_squared_change_under_shifts_of_a_32nd():
    S = AugmentPipe({"xint": 1}, 1, xint_max=stylegan2_ada.BCR_SHIFT)
    shifts = S.geometry(1000, 64, 64, draws())[:, :2, 2]
    assert shifts.unique().tolist() == [-2, -1, 0, 1, 2]
    x, a = torch.randn(2, 1, 32, 32), torch.randn(1, 32, 32)

    def D(img, c):
        return (img * a).sum([1, 2, 3])[:, None]

    change = stylegan2_ada.consistency_loss(D, S, x, None, D(x, None), draws(5))
    torch.testing.assert_close(change, (D(S(x, draws(5)), None) - D(x, None)).square()[:, 0])
    blind = stylegan2_ada.consistency_loss(lambda x, c: x[:, 0, 0, :1] * 0, S, x, None, 0, draws())
    assert (blind == 0).all()


def small_D(**options):
    return stylegan2_ada.Discriminator(img_resolution=16, channel_base=64, channel_max=8, **options)


@pytest.mark.parametrize(("architecture", "last"), [("resnet", "b16.skip"), ("orig", "b8.conv0")])
def test_frozen_layers_count_from_the_image_and_keep_their_names(architecture, last):
    D = small_D(architecture=architecture)
    names = list(D.state_dict())
    stylegan2_ada.freeze(D, 4)
    frozen = {name.rsplit(".", 1)[0] for name, _ in D.named_buffers() if "weight" in name}
    assert frozen == {"b16.fromrgb", "b16.conv0", "b16.conv1", last}
    assert sorted(D.state_dict()) == sorted(names)
    assert all(name.rsplit(".", 1)[0] not in frozen for name, _ in D.named_parameters())
    with pytest.raises(common.UserError, match="has"):
        stylegan2_ada.freeze(D, 40)


def options(*argv, data=None, gpus=1, size=None):
    """The options of train as it would use them."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stylegan2_ada, "train", found.append)
        main("--data", data or "d", *argv)
    stylegan2_ada.fill_options(found[0], {}, size or 256, gpus)
    stylegan2_ada.check_options(found[0], size or 256, gpus)
    return found[0]


@pytest.mark.parametrize(
    ("size", "gpus", "expected"),
    [
        (128, 1, (32, 0.1024, 10, 4, 16384, 0.0025)),
        (128, 8, (64, 0.0512, 20, 4, 16384, 0.0025)),
        (256, 1, (16, 0.8192, 5, 4, 16384, 0.0025)),
        (256, 4, (64, 0.2048, 20, 4, 16384, 0.0025)),
        (512, 2, (16, 3.2768, 5, 4, 32768, 0.0025)),
        (1024, 1, (4, 52.4288, 1.25, 4, 32768, 0.002)),
        (1024, 8, (32, 6.5536, 10, 4, 32768, 0.002)),
    ],
)
def test_auto_has_the_official_values(size, gpus, expected):
    a = options(size=size, gpus=gpus)
    found = (a.batch, a.r1_gamma, a.ema_kimg, a.mbstd_group, a.channel_base, a.lr)
    assert found == pytest.approx(expected)
    assert (a.map_layers, a.ema_rampup, a.kimg, a.ada_kimg) == (2, 0.05, 25000, 500)
    assert (a.pl_weight, a.mixing, a.D, a.batch_gpu) == (2, 0.9, "resnet", a.batch // gpus)


def test_named_configs_share_their_batch_as_the_papers_gpus_did():
    a = options("--cfg", "paper512", gpus=1)
    assert (a.batch, a.batch_gpu, a.mbstd_group, a.r1_gamma, a.map_layers) == (64, 8, 8, 0.5, 8)
    a = options("--config", "cifar", gpus=8)
    assert (a.batch, a.batch_gpu, a.mbstd_group, a.D, a.pl_weight, a.mixing) == (
        64,
        8,
        32,
        "orig",
        0,
        0,
    )
    assert a.kimg == 100_000 and a.ema_kimg == 500


def test_what_the_user_types_wins():
    a = options("--cfg", "paper256", "--batch", 8, "--gamma", 3, "--p", 0.2, "--target", 0.5)
    assert (a.batch, a.batch_gpu, a.r1_gamma, a.ada_p, a.ada_target) == (8, 8, 3, 0.2, 0.5)
    assert options("--aug", "bcr").bcr_weight == 10 and options().bcr_weight == 0
    assert options("--bcr-weight", 5).bcr_weight == 5


def test_transfer_is_five_times_as_quick_and_takes_the_architecture_of_the_file():
    a, nets = (
        options(),
        {
            "D": small_D(c_dim=3, map_layers=1),
            "G": stylegan2.Generator(
                z_dim=6, w_dim=7, img_resolution=16, channel_base=64, channel_max=8, map_layers=5
            ),
        },
    )
    for name in ("ada_kimg", "ema_rampup", "map_layers", "D_map_layers", "z_dim", "w_dim"):
        setattr(a, name, None)
    a.channel_base = a.channel_max = None
    stylegan2_ada.fill_options(a, nets, 16, 1)
    assert (a.ada_kimg, a.ema_rampup, a.map_layers, a.D_map_layers) == (100, None, 5, 1)
    assert (a.z_dim, a.w_dim, a.channel_base, a.channel_max) == (6, 7, 64, 8)
    a.D_map_layers = None  # a D without labels has no depth of its own to hand on
    stylegan2_ada.fill_options(a, {"D": small_D()}, 16, 1)
    assert a.D_map_layers == 8


# ---- train ----


training, trained = commands.trained_beside_the_tests(
    stylegan2_ada,
    "--size 16 --subset 60 --channel-base 256 --channel-max 16 --z-dim 16 --w-dim 16 --kimg 2"
    " --batch 32 --lr 0.004 --r1-gamma 0.5 --ema-kimg 0.5 --ada-kimg 4 --every 1",
)


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    out = tmp_path_factory.mktemp("conditional")
    main("--cond", "--out", out, *TINY, "--batch", 100, "--subset", 30)
    return out / "stylegan2_ada-toy-000"


LOGGED = {
    "kimg", "loss/G", "loss/D_fake", "loss/D_real", "reg/r1", "reg/pl", "reg/pl_mean", "ada/p",
    "ada/r_t", "D/real", "D/fake", "D/sign_real", "D/sign_fake",
}  # fmt: skip


def test_training_learns_and_adapts(trained):
    scores = jsonl(trained / "metrics.jsonl")
    assert len(scores) == 3 and scores[-1]["fd8"] < scores[0]["fd8"] / 2
    assert {"D/train", "D/heldout", "D/generated", "r_v"} <= set(scores[-1])
    log = jsonl(trained / "log.jsonl")
    assert LOGGED <= set(log[0]) and log[-1]["step"] == 63
    assert log[0]["ada/r_t"] > 0.6 and 0 < log[0]["ada/p"] < 0.25


def test_train_leaves_a_run_folder(trained):
    names = {p.name for p in trained.iterdir()}
    assert {"args.json", "stylegan2_ada.py", "log.jsonl", "metrics.jsonl"} <= names
    assert {"checkpoint.pt", "checkpoint-0000063.pt", "samples", "progress.png"} <= names
    samples = sorted(p.name for p in (trained / "samples").iterdir())
    assert samples == ["0000000.png", "0000032.png", "0000063.png", "reals.png"]
    picture = Image.open(trained / "progress.png").convert("RGB")
    colors = {color for _, color in picture.getcolors(1 << 20)}
    assert picture.size[0] == 1120 and {(0x0B, 0x62, 0xA4), (0xD9, 0x48, 0x0F)} <= colors
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    assert state["model"] == "stylegan2_ada" and set(state["nets"]) == {"G", "D", "G_ema"}
    held = state["ranks"][0]["pools"]["state"]
    assert held["p"] > 0 and held["pl_mean"] > 0


@pytest.mark.parametrize(
    ("more", "config"),
    [
        ("--channels 1 --augpipe bgc --aug fixed --p 0.5", {"img_channels": 1}),
        ("--aug noaug --D skip --r1-gamma 0", {"architecture": "skip"}),
        ("--aug bcr --batch-gpu 10 --subset 3", {}),
        ("--bcr-weight 3 --augpipe cutout --ada-cap 0.01 --ada-kimg 0.1 --mirror", {}),
        ("--augpipe bgcfnc --size 32 --aug fixed --ada-p 1 --batch 100 --pl-weight 0", {}),
        ("--cfg cifar --batch 50 --ema-kimg 1 --map-layers 1", {"architecture": "orig"}),
    ],
)
def test_variants_train(tmp_path, more, config):
    size = 32 if "32" in more else 10
    main("--data", faces("d", size=size), *TINY, "--out", tmp_path, *more.split())
    folder = tmp_path / "stylegan2_ada-d-000"
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert config.items() <= state["config"]["D"].items()
    log = jsonl(folder / "log.jsonl")[-1]
    assert all(math.isfinite(v) for v in log.values())
    p = state["ranks"][0]["pools"]["state"]["p"]
    fixed = re.search(r"p (\d\S*)", more)
    assert p == float(fixed[1]) if fixed else p >= 0
    assert ("reg/bcr_real" in log) == ("bcr" in more)
    assert "ada-cap" not in more or p <= 0.01
    assert state["args"]["aug"] == "ada" or "ada/r_t" in log


def test_mirror_doubles_the_pictures_and_subset_takes_some(tmp_path, monkeypatch):
    faces("d", 5)
    seen, batches = [], common.Run.batches

    def spy(self, item, start, stop):
        seen.extend(item(n)[0] for n in range(6))
        return batches(self, item, start, stop)

    monkeypatch.setattr(common.Run, "batches", spy)
    main("--data", "d", *TINY, "--out", tmp_path, "--mirror", "--subset", 3)
    originals = [np.asarray(Image.open(p)) for p in sorted(Path("d").iterdir())]
    which = [(k, flip) for image in seen for k, o in enumerate(originals) for flip in (1, -1)
             if np.array_equal(image, o[:, ::flip])]  # fmt: skip
    chosen = np.arange(5)
    np.random.RandomState(0).shuffle(chosen)
    assert sorted(which) == sorted((k, flip) for k in chosen[:3] for flip in (1, -1))


def test_fid_is_kept_at_every_snapshot_where_its_network_is_given(tmp_path, monkeypatch, capsys):
    class Features(torch.nn.Module):
        label = "a stand-in"

        def forward(self, x):
            return torch.nn.functional.adaptive_avg_pool2d(x.double(), 2).flatten(1)

    def features(images, net, mode="tf1", device=None):
        return torch.cat([net(x.float()) for x in common.uint8_batches(images)])

    passes, batches = [], common.ImageSet.batches
    monkeypatch.setattr(
        common.ImageSet, "batches", lambda self, n: passes.append(n) or batches(self, n)
    )

    monkeypatch.setattr(common, "load_inception", lambda path, device: Features())
    monkeypatch.setattr(common, "inception_features", features)
    main("--data", faces("d", 12), *TINY, "--out", tmp_path, "--fid-samples", 20)
    rows = jsonl(tmp_path / "stylegan2_ada-d-000/metrics.jsonl")
    assert all(row["fid"]["n_real"] == 12 and row["fid"]["n_fake"] == 20 for row in rows)
    assert len(rows) > 1 and len(passes) == 2  # for the key of the cache, and for the statistics
    assert "FID" in capsys.readouterr().out


def test_without_its_network_fid_is_left_out_in_one_line(tmp_path, capsys):
    main("--data", faces("d"), *TINY, "--out", tmp_path, "--fid-samples", 20)
    said = capsys.readouterr().out
    assert len(re.findall("^FID and KID are left out", said, re.M)) == 1
    assert "fid" not in jsonl(tmp_path / "stylegan2_ada-d-000/metrics.jsonl")[-1]


def test_a_high_p_is_warned_of(tmp_path, capsys):
    options = [*TINY, "--kimg", 2, "--target", -2, "--ada-kimg", 1]
    main("--data", faces("d"), *options, "--out", tmp_path)
    assert "above 0.8 augmentations tend to leak" in capsys.readouterr().out


class Runner(Eager):
    """What train_step needs of common.Run."""

    world = 1

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)

    def rand(self, n, *shape, shared=False):
        return torch.rand(n, *shape, generator=self.generator)

    def randn(self, n, *shape):
        return torch.randn(n, *shape, generator=self.generator)

    def mean(self, x):
        return x

    maximum = mean

    def backward(self, loss):
        loss.backward()

    def step(self, opt):
        opt.step()
        opt.zero_grad()


def test_all_that_d_sees_is_augmented_and_gradients_of_g_and_r1_pass_through():
    G = stylegan2_ada.Generator(z_dim=6, w_dim=8, img_resolution=16, channel_base=64, channel_max=8)
    D, calls = small_D(), []

    class Watched(AugmentPipe):
        def forward(self, img, draws=None):
            y = super().forward(img, draws)
            calls.append((img, y))
            return y

    seen = []
    D.register_forward_hook(lambda net, args, out: seen.append(args[0]))
    T, opts = Watched("bgc", 0.9), [torch.optim.SGD(net.parameters(), 1e-3) for net in (G, D)]
    args = types.SimpleNamespace(
        batch_gpu=2, batch=4, mixing=0.9, pl_weight=2.0, pl_every=1, r1_gamma=1.0, r1_every=1,
        bcr_weight=0, aug="ada", ada_target=0.6, ada_every=1, ada_kimg=1, ada_cap=None,
    )  # fmt: skip
    signs, pl_mean = torch.zeros(2, dtype=torch.float64), torch.zeros(())
    real = torch.randn(4, 3, 16, 16)
    losses = stylegan2_ada.train_step(
        G, D, T, None, opts, pl_mean, signs, real, None, lambda n: None, 0, args, Runner()
    )
    assert len(calls) == len(seen) == 2 + 4 + 2  # G, D on fakes and reals, R1; two rounds each
    assert all(x is y for x, (_, y) in zip(seen, calls, strict=True))
    assert all(y.requires_grad for _, y in (*calls[:2], *calls[-2:]))  # of G's fakes and for R1
    assert (signs == 0).all() and -1 <= losses["ada/r_t"] <= 1
    assert T.p == pytest.approx(0.9 + 0.004 * (1 if losses["ada/r_t"] > 0.6 else -1))


def test_r_t_is_the_mean_sign_of_all_real_logits_since_the_last_change(monkeypatch):
    given = iter([[1.0, 2.0, -1.0, 1.0], [1.0, -1.0, -1.0, 0.0], [3.0, 3.0, 3.0, 3.0]])
    on_r1 = iter([[1.0, 1.0, 1.0, 1.0]])
    monkeypatch.setattr(stylegan2_ada, "generator_phase", lambda *args: torch.zeros(1))
    monkeypatch.setattr(
        stylegan2_ada, "discriminator_phase",
        lambda *args: ({"D_real": torch.zeros(1)}, torch.tensor(next(given))[:, None]),
    )  # fmt: skip
    monkeypatch.setattr(
        stylegan2_ada, "r1_phase",
        lambda *args: (torch.zeros(1), torch.tensor(next(on_r1))[:, None]),
    )  # fmt: skip
    args = types.SimpleNamespace(
        batch=4, pl_weight=0, r1_gamma=1.0, r1_every=16, aug="ada", ada_target=0.6, ada_every=3,
        ada_kimg=1, ada_cap=None,
    )  # fmt: skip
    runner, T, signs = Runner(), AugmentPipe("bgc", 0.5), torch.zeros(2, dtype=torch.float64)
    runner.step = lambda opt: None
    net = types.SimpleNamespace(requires_grad_=lambda flag: None)
    for step in range(3):
        losses = stylegan2_ada.train_step(
            net, net, T, None, (None, None), None, signs, torch.zeros(4, 1), None, None, step,
            args, runner,
        )  # fmt: skip
        assert ("ada/r_t" in losses) == (step == 2)
    assert losses["ada/r_t"] == pytest.approx((2 - 1 + 4 + 4) / 16)  # not above 0.6
    assert T.p == pytest.approx(0.5 - 12 / 1000)


# ---- resume, transfer, processes ----

RESUMED = [*NETS, *"--batch 40 --mbstd-group 2 --kimg 3 --every 1 --r1-every 4".split()]
RESUMED += "--pl-every 3 --ada-kimg 5 --subset 25 --mirror".split()


def finished(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same_runs(one, two):
    """Weights, state and logs of two run folders are equal bit for bit."""
    states = [finished(one), finished(two)]
    for name, net in states[0]["nets"].items():
        assert all(torch.equal(states[1]["nets"][name][k], v) for k, v in net.items()), name
    held = [state["ranks"][0]["pools"]["state"] for state in states]
    assert all(torch.equal(held[1][k], v) for k, v in held[0].items())
    logs = [jsonl(f / "log.jsonl") for f in (one, two)]
    for line in logs[0] + logs[1]:
        del line["sec"], line["mem_gb"]
    assert logs[0] == logs[1]
    assert jsonl(one / "metrics.jsonl") == jsonl(two / "metrics.jsonl")
    return held[0]


def test_a_run_killed_twice_ends_as_one_that_was_not(tmp_path):
    options = ["--data", faces(tmp_path / "d", 30), *RESUMED]
    kills = [(25, 0.5), (50, 0.5)]  # of 75
    held = assert_same_runs(*commands.whole_and_killed(stylegan2_ada, options, kills))
    assert held["p"] > 0 and held["pl_mean"] > 0 and held["signs"][1] > 0


@pytest.fixture(scope="module")
def humans(tmp_path_factory):
    """A run on the toy faces of domain 0."""
    out = tmp_path_factory.mktemp("humans")
    main("--data", "toy/human", *RESUMED, "--out", out, "--aug", "noaug")
    return out / "stylegan2_ada-human-000"


def test_transfer_from_humans_to_goblins_survives_a_kill(humans, tmp_path, capsys):
    def start(out):
        return ["--data", "toy/goblin", *NETS, "--channels", 3, *RESUMED, "--checkpoint", humans,
                "--freezed", 2, "--out", out, "--ada-kimg", 2]  # fmt: skip

    main(*start(tmp_path / "whole"))
    text = capsys.readouterr().out
    for name in ("G", "D", "G_ema"):
        assert re.search(rf"^{name}: (\d+) of \1 tensors copied$", text, re.M), text
    folder = tmp_path / "killed/stylegan2_ada-goblin-000"
    commands.kill_after(script(*start(tmp_path / "killed")), folder, 50, 0.2)
    main("--resume", folder)
    held = assert_same_runs(tmp_path / "whole/stylegan2_ada-goblin-000", folder)
    before, after = finished(humans)["nets"]["D"], finished(folder)["nets"]["D"]
    for name, t in before.items():
        frozen = name.startswith(("b8.fromrgb", "b8.conv0"))
        assert torch.equal(after[name], t) == frozen, name
    assert held["p"] > 0
    first, *_, last = jsonl(folder / "metrics.jsonl")
    assert last["fd8"] < first["fd8"]  # goblins are nearer than at the start


def test_a_transfer_stopped_before_its_first_checkpoint_starts_from_the_same_weights(
    humans, tmp_path
):
    main("--data", "toy/goblin", *TINY, "--checkpoint", humans, "--out", tmp_path)
    folder = tmp_path / "stylegan2_ada-goblin-000"
    before = jsonl(folder / "metrics.jsonl")
    for path in folder.glob("checkpoint*.pt"):
        path.unlink()
    main("--resume", folder)
    assert jsonl(folder / "metrics.jsonl") == before


def test_sizes_come_from_the_checkpoint_on_toy_data_too(humans, tmp_path, capsys):
    short = "--size 8 --batch 50 --mbstd-group 2 --kimg 1 --every 1".split()
    main("--data", "toy/robot", *short, "--checkpoint", humans, "--out", tmp_path)
    said = capsys.readouterr().out
    assert all(re.search(rf"^{k}: (\d+) of \1 tensors copied$", said, re.M) for k in ("G", "D"))


def test_a_fixed_p_may_be_changed_on_resume(tmp_path, capsys):
    main("--data", faces("d"), *TINY, "--out", tmp_path, "--aug", "fixed", "--p", 0.2)
    folder = tmp_path / "stylegan2_ada-d-000"
    main("--resume", folder, "--p", 0.4, "--kimg", 2)
    said = capsys.readouterr().out
    assert "--ada-p was 0.2, is 0.4 from here" in said and "--kimg was 1, is 2" in said
    assert [round(row["ada/p"], 3) for row in jsonl(folder / "log.jsonl")] == [0.2, 0.4]


def test_labels_of_samples_are_those_of_random_pictures():
    labels = np.eye(10, dtype=np.float32)[np.repeat(np.arange(10), 50)]  # sorted by class
    G = types.SimpleNamespace(config={"z_dim": 3})
    z, c = common.sample_inputs(G, labels, seed=5, n=500)
    counts = c.sum(0)
    assert z.shape == (500, 3) and all(is_close(k, 0.1, 500) for k in counts)
    assert torch.equal(c, common.sample_inputs(G, labels, 5, 500)[1])
    assert len(common.sample_inputs(G, labels, 6, 32)[1].unique(dim=0)) > 5


def test_transfer_lists_what_is_new_and_what_does_not_fit(humans, tmp_path, capsys):
    options = [*TINY, "--data", faces("d", size=16), "--size", 16, "--checkpoint", humans]
    main(*options, "--w-dim", 6, "--out", tmp_path)
    said = capsys.readouterr().out
    assert re.search(r"^G: \d+ of \d+ tensors copied; \d+ new: \S*b16", said, re.M), said
    assert re.search(r"^G: .*; \d+ of another shape: \S+affine", said, re.M), said
    options = [*TINY, "--data", faces("e"), "--checkpoint", humans, "--D", "orig"]
    main(*options, "--out", tmp_path)
    assert re.search(r"^D: .*; 1 not used: b8.skip.weight$", capsys.readouterr().out, re.M)


def test_two_processes_make_the_update_of_one(tmp_path):
    options = ["--data", faces(tmp_path / "d"), *TINY, "--batch", 200, "--mbstd-group", 1]
    options += ["--pl-every", 2, "--r1-every", 2, "--device", "cpu", "--p", 0.6, "--ada-every", 1]
    options += ["--ada-kimg", 10, "--bcr-weight", 1]
    commands.on_one_and_two_processes(ROOT / "stylegan2_ada.py", *options)
    one, two = (finished(tmp_path / n / "stylegan2_ada-d-000") for n in ("one", "two"))
    assert one["step"] == two["step"] == 5 and len(two["ranks"]) == 2
    for name, net in one["nets"].items():
        for key, t in net.items():
            torch.testing.assert_close(
                t, two["nets"][name][key], rtol=1e-4, atol=2e-5, msg=f"{name}.{key}"
            )
    p = [state["ranks"][-1]["pools"]["state"]["p"] for state in (one, two)]
    assert p[0] == p[1] != 0.6


# ---- generate, timelapse, evaluate, project ----


def test_generate_and_evaluate_take_a_run(trained):
    text = run("generate", "--checkpoint", trained, "--seeds", "0-2", "--psi", 0.7)
    assert "3 pictures" in text and Image.open("out/seed0002.png").size == (16, 16)
    text = run("evaluate", "--checkpoint", trained, "--samples", 100, "--out", "s.json")
    assert json.loads(Path("s.json").read_text())["fd8"] > 0 and "of toy at 16x16" in text
    assert "100 untruncated samples" in text and "4000 pictures" in text


def test_stylegan2_projects_into_a_checkpoint_of_ada(trained):
    main("generate", "--checkpoint", trained, "--seeds", 5)
    options = ["--input", "out/seed0005.png", "--steps", 40, "--out", "p"]
    text = run("project", "--checkpoint", trained, *options, file="stylegan2.py")
    first, *_, last = (float(d) for d in re.findall(r"distance ([\d.]+)", text))
    assert last < first


def test_classes_of_a_conditional_model_differ(conditional, capsys):
    assert finished(conditional)["config"]["D"]["c_dim"] == 3  # though 30 of 6000 were used
    for k in range(2):
        main("generate", "--checkpoint", conditional, "--class", k, "--seeds", 0, "--out", k)
    assert not np.allclose(*[np.load(f"{k}/latents.npz")["w"] for k in range(2)])
    assert "0 to 2" in fails(capsys, "generate", "--checkpoint", conditional, "--class", 3)


@pytest.mark.parametrize("suffix", ["webp", "gif", "png"])
def test_a_timelapse_shows_every_grid_and_rests_on_the_last(trained, suffix, capsys):
    main("timelapse", "--checkpoint", trained, "--out", f"f.{suffix}", "--fps", 2, "--width", 200)
    film = Image.open(f"f.{suffix}")
    width, height = film.size
    grid = Image.open(trained / "samples/0000063.png")
    assert width == 200 and height == round(grid.height * 200 / grid.width) + 20
    durations, frames = 0, []
    for k in range(film.n_frames):
        film.seek(k)
        film.load()
        durations += film.info["duration"]
        frames.append(np.asarray(film.convert("RGB")).astype(int))
    assert durations == 500 * 5 and len(frames) >= 3
    assert np.abs(frames[0] - frames[-1]).mean() > 5 and "3 grids" in capsys.readouterr().out


def test_an_official_file_with_its_pipe_starts_a_training(tmp_path, capsys):
    G = stylegan2_ada.Generator(
        z_dim=8, w_dim=8, img_resolution=8, channel_base=32, channel_max=8, map_layers=2
    )
    D = stylegan2_ada.Discriminator(img_resolution=8, channel_base=32, channel_max=8)
    arrays = {"G": G.state_dict(), "D": D.state_dict(), "G_ema": G.state_dict()}
    official_files.write_pytorch_pickle("net.pkl", arrays, {"conv_clamp": 256})
    options = [*TINY[2:6], *TINY[-6:]]
    main(*options, "--data", faces("d"), "--checkpoint", "net.pkl", "--out", tmp_path)
    said = capsys.readouterr().out
    assert re.search(r"^D: (\d+) of \1 tensors copied$", said, re.M)
    state = finished(tmp_path / "stylegan2_ada-d-000")
    assert state["config"]["G"]["z_dim"] == 8 and state["args"]["ada_kimg"] == 100


# ---- mistakes ----


def test_mistakes_in_options_end_in_one_line(capsys, trained, conditional):
    faces("d"), faces("wide", 1), faces("one", 1), Path("empty").mkdir()
    faces("mixed", 3), faces("mixed/b", 3, size=16)
    Image.new("RGB", (20, 16)).save("wide/000.png")
    Path("text.png").write_text("hello")
    Path("bare/samples").mkdir(parents=True)
    Path("bare/args.json").write_text('{"batch": 4}')
    Path("odd").mkdir()
    Path("odd/args.json").write_text("[1]")
    torch.save({"model": "cyclegan", "nets": {}}, "other.pt")
    small = ["--data", "d", *TINY]
    cases = [
        (["--data", "wide", *TINY[2:]], "not square"),
        (["--data", "nowhere", *TINY], "nowhere"),
        (["--data", "toy/elf", *TINY], "toy/goblin"),
        (["--data", "toy/human", "--cond", *TINY], "toy/human"),
        (["--data", "empty", *TINY], "no images"),
        (["--data", "one", *TINY], "one picture"),
        (["--data", "mixed", *TINY[2:]], "pictures of different sizes"),
        ([*small, "--cond"], "no labels"),
        ([*small, "--subset", 7], "there are 6 pictures"),
        ([*small, "--subset", 0], "--subset"),
        ([*small, "--batch", 6, "--mbstd-group", 4], "--mbstd-group 4"),
        ([*small, "--batch-gpu", 1, "--mbstd-group", 1], "--pl-weight 0"),
        ([*small, "--batch-gpu", 3], "--batch-gpu 3"),
        ([*small, "--augpipe", "zoom"], "zoom"),
        ([*small, "--augpipe", "bgcf"], "32 pixels or more"),
        ([*small, "--aug", "fixed"], "--ada-p"),
        ([*small, "--p", 1.5], "number from 0 to 1"),
        ([*small, "--p", 0.5, "--ada-cap", 0.4], "above --ada-cap 0.4"),
        ([*small, "--aug", "noaug", "--p", 0.5], "no use"),
        ([*small, "--aug", "adarv"], "adarv"),
        ([*small, "--p", -0.1], "number from 0 to 1"),
        ([*small, "--ada-kimg", 0], "not a finite number above 0"),
        ([*small, "--target", "x"], "--target"),
        ([*small, "--freezed", 9, "--checkpoint", trained], "D has 4 layers"),
        ([*small, "--freezed", 3], "without --checkpoint"),
        ([*small, "--freezed", -1], "--freezed"),
        ([*small, "--cfg", "paper2048"], "paper2048"),
        ([*small, "--checkpoint", "none.pt"], "none.pt"),
        ([*small, "--checkpoint", "other.pt"], "holds a cyclegan model"),
        ([*small, "--fid-samples", 10, "--inception", "no.pt"], "no.pt"),
        (["--resume", "nowhere"], "--resume nowhere"),
        (["--resume", "odd"], "damaged"),
        (["--resume", trained, "--batch", 64], "--batch was 32"),
        (["--resume", trained, "--channel-max", 8], "other networks"),
        (["generate"], "--checkpoint"),
        (["generate", "--checkpoint", conditional], "pass --class"),
        (["timelapse"], "--checkpoint"),
        (["timelapse", "--checkpoint", "nowhere"], "--checkpoint nowhere"),
        (["timelapse", "--checkpoint", "odd"], "damaged"),
        (["timelapse", "--checkpoint", "bare"], "two sample grids"),
        (["timelapse", "--checkpoint", trained, "--out", "x.mp4"], "x.mp4"),
        (["evaluate", "--checkpoint", trained, "--data", "nowhere"], "nowhere"),
    ]
    commands.each_ends_in_one_line(fails, capsys, cases)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_named(capsys):
    line = fails(capsys, "--data", faces("d"), *TINY, "--lr", "1e30", "--out", "r")
    assert re.search(r"(loss|reg|D)/\w+ became (nan|inf)", line) and "none yet" in line


def test_the_pipe_networks_and_losses_can_be_pasted_elsewhere(trained):
    text = (ROOT / "stylegan2_ada.py").read_text()
    bar = "# " + "=" * 77 + "\n"
    sections = dict(zip(*[iter(text.split(bar)[1:])] * 2, strict=True))
    names = "import functools\nimport itertools\nimport math\nimport numpy as np\nimport torch\n"
    names += "import torch.nn.functional as F\nfrom torch import nn\nimport ops_cuda as ops\n"
    here = {}
    code = [sections[f"# {name}\n"] for name in ("Networks", "Augmentation", "Losses")]
    exec(names + "W_AVG_BETA = 0.995\n" + "".join(code), here)
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    G = here["build"](state["config"]["G_ema"]).eval()
    G.load_state_dict(state["nets"]["G_ema"])
    img = here["AugmentPipe"]("bgc", 0.5)(G(torch.randn(4, G.config["z_dim"])))
    assert img.shape == (4, 3, 16, 16)


# ---- the paper's claim ----


def test_100_faces_overfit_without_ada_and_less_with_it(tmp_path):
    """Fig. 1 and Fig. 6 in small: without augmentation r_t rises as D learns 100 faces by heart;
    with it p rises as needed and r_t stays at the target. Same seed, both at the same time."""
    options = "--size 8 --subset 100 --batch 64 --kimg 32 --every 16 --lr 0.02 --r1-gamma 0"
    options += " --pl-weight 0 --mixing 0 --z-dim 32 --w-dim 32 --channel-base 256 --channel-max 32"
    options += " --ada-target 0.3 --ada-kimg 10 --seed 0 --device cpu"
    augs = ("noaug", "ada")
    with commands.beside(*(script("--aug", aug, *options.split(), "--out", aug) for aug in augs)):
        pass
    r_t, p, gap = {}, {}, {}
    for aug in augs:
        folder = tmp_path / aug / "stylegan2_ada-toy-000"
        log = jsonl(folder / "log.jsonl")
        thirds = [[row for row in log if low < row["kimg"] <= low + 8] for low in (8, 24)]
        r_t[aug], p[aug] = (
            [np.mean([row[name] for row in rows]) for rows in thirds]
            for name in ("ada/r_t", "ada/p")
        )
        last = jsonl(folder / "metrics.jsonl")[-1]
        gap[aug] = last["D/train"] - last["D/heldout"]
    said = f"r_t {r_t}, p {p}, gap {gap}"
    assert r_t["noaug"][1] > r_t["noaug"][0] + 0.1 and p["noaug"] == [0, 0], said
    assert abs(r_t["ada"][1] - 0.3) < 0.1 < r_t["noaug"][1] - 0.3, said
    assert p["ada"][1] > 0 and gap["ada"] < gap["noaug"], said
