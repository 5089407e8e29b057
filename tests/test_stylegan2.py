"""stylegan2.py: networks, losses, official files, and its commands run as a user runs them."""

import argparse
import json
import math
import re
import types
import zipfile
import zlib
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

TINY = (  # 20 steps
    "--size 8 --channel-base 32 --channel-max 8 --z-dim 8 --w-dim 8 --map-layers 2 --batch 50"
    " --mbstd-group 2 --kimg 1 --every 1"
).split()
script, run, main, fails = commands.of(stylegan2)


def faces(folder, n=6, size=(10, 10), suffix="jpg"):
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        common.toy_face(i, 0, 32).resize(size).save(f"{folder}/{i}.{suffix}")
    return folder


def jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def shuffled_weights(net, seed=0):
    """The net with all of its tensors random, biases and noise strengths too."""
    generator = torch.Generator().manual_seed(seed)
    for name, t in net.state_dict().items():
        draw = torch.randn(t.shape, generator=generator)
        if name.endswith(("bias", "strength", "w_avg")):
            draw = 0.3 * draw + name.endswith("affine.bias")
        t.copy_(100 * draw if re.search(r"mapping\.fc\d+\.weight", name) else draw)
    return net.eval().requires_grad_(False)


SMALL = dict(img_resolution=16, channel_base=64, channel_max=8)


def small_G(**options):
    kinds = SMALL | dict(z_dim=6, w_dim=8, map_layers=2) | options
    return shuffled_weights(stylegan2.Generator(**kinds))


def small_D(**options):
    return shuffled_weights(stylegan2.Discriminator(**SMALL | options))


# ---- networks ----

AUTO = dict(channel_base=16384, map_layers=2)


@pytest.mark.parametrize(
    ("kind", "res", "options", "parameters"),
    [
        ("G", 1024, {}, 30_370_060),
        ("G", 1024, {"channel_base": 16384}, 24_900_764),
        ("G", 512, {}, 30_276_583),
        ("G", 256, {}, 30_034_338),
        ("G", 256, {"channel_base": 16384}, 24_767_458),
        ("G", 256, AUTO, 23_191_522),
        ("G", 32, {"map_layers": 2}, 19_947_539),
        ("G", 32, {"map_layers": 2, "c_dim": 10}, 20_215_315),
        ("D", 1024, {}, 29_012_513),
        ("D", 1024, {"channel_base": 16384}, 24_038_161),
        ("D", 512, {}, 28_982_849),
        ("D", 256, {}, 28_864_129),
        ("D", 256, {"channel_base": 16384}, 24_001_089),
        ("D", 32, {"architecture": "orig"}, 20_720_641),
        ("D", 32, {"architecture": "orig", "c_dim": 10}, 23_089_664),
    ],
)
def test_networks_have_the_published_numbers_of_parameters(kind, res, options, parameters):
    with torch.device("meta"):
        net = stylegan2.build({"kind": kind, "img_resolution": res, **options})
    assert common.count(net) == parameters
    if kind == "G" and "map_layers" not in options:
        assert common.count(net.mapping) == 2_101_248


GOLDEN = {  # of the official code with these weights
    0: dict(
        sizes=[44_635, 54_889],
        ws=[2.345269, -0.618849, 1.418828, 0.453159, 1.011959],
        img=[-0.278609, -0.313439, -0.222318, -0.352432, 1.376800],
        logits=[-0.201545, -0.594083, -0.179548, -0.112521],
        truncated=[-0.398471, 1.342843],
        lengths=[1.039009, 1.362372, 1.131636, 1.418869],
        real=[-0.013117, -0.077824, -0.053910, -0.076305],
        r1=[0.006270, 0.006019, 0.005152, 0.006333],
    ),
    3: dict(
        sizes=[45_307, 64_488],
        ws=[-0.325841, -0.428862, 2.215288, 0.407950, 0.914628],
        img=[0.221932, 0.269162, 0.344078, 0.044722, 1.042303],
        logits=[-1.268173, -2.711876, -1.706815, -0.862850],
        truncated=[-0.023055, 0.954224],
        lengths=[0.805694, 1.854348, 1.219034, 1.053647],
        real=[-0.731760, -0.465564, -0.397442, -0.742226],
        r1=[0.009735, 0.007310, 0.006910, 0.010496],
    ),
}


@pytest.mark.parametrize("c_dim", [0, 3])
def test_numbers_are_those_of_the_official_networks(c_dim):
    both = dict(c_dim=c_dim, img_resolution=32, channel_base=256, channel_max=32, clamp=256.0)
    G = stylegan2.Generator(z_dim=16, w_dim=24, map_layers=2, **both)
    D = stylegan2.Discriminator(mbstd_group=2, **both)
    for net in (G.double().eval(), D.double()):
        for name, t in net.state_dict().items():
            r = np.random.RandomState(zlib.crc32(name.encode())).randn(*t.shape)
            if name.endswith(("bias", "noise_strength")):
                r = 0.1 * r + name.endswith("affine.bias")
            elif re.fullmatch(r"mapping\.fc\d+\.weight", name):
                r = 100 * r
            t.copy_(torch.as_tensor(r))

    def draw(seed, *shape):
        return torch.from_numpy(np.random.RandomState(seed).randn(*shape))

    def moments(x):
        return [x.mean().item(), x.std(correction=0).item()]

    c = torch.eye(3).double()[[0, 1, 2, 0]] if c_dim else None
    z, x = draw(0, 4, 16), 0.5 * draw(2, 4, 3, 32, 32)
    ws = G.mapping(z, c)
    img = G.synthesis(ws, "const")
    found = dict(
        sizes=[common.count(G), common.count(D)],
        ws=[*ws[0, 0, :3].tolist(), *moments(ws)],
        img=[*img[0, 0, 0, :3].tolist(), *moments(img)],
        logits=D(img, c).flatten().tolist(),
        truncated=moments(G(z, c, psi=0.7, cutoff=4, noise="const")),
        lengths=stylegan2.path_lengths(G, ws, draw(1, 4, 3, 32, 32), "const").tolist(),
        real=D(x, c).flatten().tolist(),
        r1=stylegan2.r1_penalty(D(x.requires_grad_(), c), x).tolist(),
    )
    for name, expected in GOLDEN[c_dim].items():
        np.testing.assert_allclose(found[name], expected, 1e-5, 2e-6, name)


@pytest.mark.parametrize("res", [8, 16])
@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
def test_every_architecture_runs_at_every_size(architecture, res):
    for C in (1, 3):
        options = dict(architecture=architecture, img_resolution=res, img_channels=C)
        img = small_G(**options)(torch.randn(4, 6))
        assert img.shape == (4, C, res, res) and small_D(**options)(img).shape == (4, 1)


def test_psi_0_and_constant_noise_give_one_picture_for_all_z():
    G = small_G()
    img = G(torch.randn(3, 6), psi=0, noise="const")
    torch.testing.assert_close(img, img[:1].expand(3, -1, -1, -1))
    assert not torch.allclose(*G(torch.randn(2, 6), noise="const"))


def test_a_cutoff_limits_truncation_to_the_first_layers():
    mapping, z = small_G().mapping, torch.randn(3, 6)
    ws, all_layers = mapping(z), mapping(z, psi=0.5)
    some = mapping(z, psi=0.5, cutoff=2)
    assert torch.equal(some[:, :2], all_layers[:, :2]) and torch.equal(some[:, 2:], ws[:, 2:])
    torch.testing.assert_close(all_layers, (ws + mapping.w_avg) / 2)


@pytest.mark.parametrize("up", [1, 2])
def test_a_demodulated_convolution_does_not_know_the_scale_of_its_style(up):
    x, weight, style = (torch.randn(*s).double() for s in ((2, 4, 8, 8), (5, 4, 3, 3), (2, 4)))

    def outcome(style):
        y, demodulation = stylegan2.modulated_conv2d(
            x, weight, style, up, pad=1, fir=stylegan2.fir_filter()
        )
        return y * demodulation[:, :, None, None]

    torch.testing.assert_close(outcome(3 * style), outcome(style), rtol=1e-6, atol=1e-6)
    w = weight * style[0, None, :, None, None]
    w = w / w.square().sum([1, 2, 3], keepdim=True).sqrt()
    if up == 1:
        direct = torch.nn.functional.conv2d(x[:1], w, padding=1)
        torch.testing.assert_close(outcome(style)[:1], direct)


def test_noise_matters_by_its_strength_and_only_random_noise_varies():
    layer, x, w = stylegan2.SynthesisLayer(4, 5, 8, 8), torch.randn(2, 4, 8, 8), torch.randn(2, 8)
    assert torch.equal(layer(x, w, "random"), layer(x, w, "none"))
    layer.noise_strength.data.fill_(0.5)
    assert torch.equal(layer(x, w, "const"), layer(x, w, "const"))
    assert not torch.equal(layer(x, w, "random"), layer(x, w, "random"))
    assert not torch.equal(layer(x, w, "const"), layer(x, w, "none"))


def test_a_conditional_model_asks_for_labels():
    with pytest.raises(ValueError, match="conditional"):
        small_G(c_dim=3)(torch.randn(2, 6))
    with pytest.raises(ValueError, match="conditional"):
        small_D(c_dim=3)(torch.randn(2, 3, 16, 16))


def test_minibatch_std_of_equal_images_is_the_root_of_its_epsilon():
    x = torch.randn(1, 3, 4, 4).repeat(4, 1, 1, 1)
    y = stylegan2.minibatch_std(x, group=2)
    assert torch.equal(y[:, :3], x)
    torch.testing.assert_close(y[:, 3:], torch.full((4, 1, 4, 4), 1e-4))
    with pytest.raises(ValueError, match="groups of 3"):
        stylegan2.minibatch_std(x, group=3)


def test_groups_of_minibatch_std_are_strided():
    x = torch.tensor([0.0, 5.0, 2.0, 5.0]).reshape(4, 1, 1, 1)
    y = stylegan2.minibatch_std(x, group=2)[:, 1].flatten()
    torch.testing.assert_close(y, torch.tensor([1, 1e-4, 1, 1e-4]))


def test_half_precision_blocks_compute_in_float32_on_a_cpu():
    z, exact, half = torch.randn(4, 6), {}, dict(half_res=4, half="float16")
    G, G_half, D, D_half = small_G(), small_G(**half), small_D(), small_D(**half)
    assert G_half.synthesis.b16.half == D_half.b8.half == torch.float16
    exact = G(z, noise="const")
    assert torch.equal(G_half(z, noise="const"), exact)
    assert torch.equal(D_half(exact), D(exact))


@pytest.mark.parametrize("up", [1, 2])
def test_a_layer_in_float16_agrees_with_float32(up):
    layer = stylegan2.SynthesisLayer(4, 5, 8, 8 * up, up, clamp=256)
    layer.noise_strength.data.fill_(0.5)
    x, w = 1000 * torch.randn(2, 4, 8, 8), torch.randn(2, 8)
    try:
        y = layer(x.half(), w, "const")
    except RuntimeError as e:
        pytest.skip(f"no half precision on this CPU: {e}")
    exact = layer(x.half().float(), w, "const")
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), exact, rtol=1e-2, atol=1e-2 * exact.abs().max().item())


# ---- losses and one step ----


def test_r1_of_a_linear_discriminator_is_the_squared_norm_of_its_weights():
    a, x = torch.randn(3, 8, 8).double(), torch.randn(2, 3, 8, 8).double().requires_grad_()
    r1 = stylegan2.r1_penalty((x * a).sum([1, 2, 3]), x)
    torch.testing.assert_close(r1, a.square().sum().expand(2))


def test_path_lengths_of_a_linear_generator_are_those_of_its_matrix():
    A, y = torch.randn(5, 4, 3, 8, 8).double(), torch.randn(2, 3, 8, 8).double()
    G = types.SimpleNamespace(synthesis=lambda ws, noise: torch.einsum("nlw,lwchv->nchv", ws, A))
    ws = torch.randn(2, 5, 4).double().requires_grad_(True)
    J = torch.einsum("lwchv,nchv->nlw", A, y) / 8
    expected = J.square().sum(2).mean(1).sqrt()
    torch.testing.assert_close(stylegan2.path_lengths(G, ws, y), expected)


class Runner(Eager):
    """What train_step needs of common.Run."""

    def __init__(self, seed=0, on_step=None):
        self.generator, self.on_step = torch.Generator().manual_seed(seed), on_step

    def rand(self, n, shared=False):
        return torch.rand(n, generator=self.generator)

    def randn(self, n, *shape):
        return torch.randn(n, *shape, generator=self.generator)

    def mean(self, x):
        return x

    def backward(self, loss):
        loss.backward()

    def step(self, opt):
        self.on_step(opt)
        opt.step()
        opt.zero_grad()


def options_of_a_step(**options):
    defaults = dict(batch_gpu=None, mixing=0.9, pl_weight=2.0, pl_every=4)
    return types.SimpleNamespace(**defaults | dict(r1_gamma=10.0, r1_every=16) | options)


def test_each_phase_leaves_the_other_network_and_its_gradients_untouched():
    G, D = (net.train().requires_grad_(True) for net in (small_G(), small_D()))
    opts = [torch.optim.SGD(net.parameters(), 1e-3) for net in (G, D)]
    steps = []

    def on_step(opt):
        other = D if opt is opts[0] else G
        assert all(p.grad is None for p in other.parameters())
        mine = dict((G, D)[opts.index(opt)].named_parameters())
        steps.append(("GD"[opts.index(opt)], {k for k, p in mine.items() if p.grad is None}))

    real, pl_mean = torch.randn(4, 3, 16, 16), torch.zeros(())
    for step in (16, 17):
        losses = stylegan2.train_step(
            G, D, opts, pl_mean, real, None, lambda n: None, step, options_of_a_step(),
            Runner(on_step=on_step),
        )  # fmt: skip
        assert {"G", "D_fake", "D_real"} <= set(losses)
        assert ("reg/r1" in losses) == ("reg/pl" in losses) == (step == 16)
    assert [name for name, _ in steps] == list("GGDDGD")
    assert steps[0][1] == steps[2][1] == set() and pl_mean > 0


@pytest.mark.parametrize("c_dim", [0, 3])
def test_rounds_of_half_a_batch_sum_the_gradients_of_both(c_dim):
    G, D = (net(c_dim=c_dim).double().requires_grad_(True) for net in (small_G, small_D))
    args = options_of_a_step(batch_gpu=2, mixing=0, pl_every=1, r1_every=1)
    z, y = torch.randn(4, 6).double(), torch.randn(2, 3, 16, 16).double()
    c = torch.eye(3).double()[[0, 1, 2, 0]] if c_dim else None
    real, halves = torch.randn(4, 3, 16, 16).double(), [slice(0, 2), slice(2, 4)]
    left = iter(y.split(1))
    runner = Runner()
    runner.randn = lambda n, *shape: next(left) if len(shape) == 3 else z[:n]

    def gradients(function):
        for net in (G, D):
            net.zero_grad()
        function()
        params = [*G.named_parameters(), *D.named_parameters()]
        return {k: torch.zeros_like(p) if p.grad is None else p.grad.clone() for k, p in params}

    def label(s):
        return None if c is None else c[s]

    def expected(kind):
        for s in halves:
            fake = G(z[s], label(s), noise="const")
            if kind == "G":
                stylegan2.logistic_loss(D(fake, label(s)), real=True).mean().backward()
            elif kind == "D":
                on_fake = stylegan2.logistic_loss(D(fake.detach(), label(s)), real=False)
                on_real = stylegan2.logistic_loss(D(real[s], label(s)), real=True)
                (on_fake + on_real).mean().backward()
            else:
                x = real[s].requires_grad_()
                (5 * stylegan2.r1_penalty(D(x, label(s)), x).mean()).backward()
        if kind == "pl":
            G.zero_grad(), D.zero_grad()
            mean = 0
            for k in range(2):
                ws = G.mapping(z[k : k + 1], label(slice(k, k + 1)))
                lengths = stylegan2.path_lengths(G, ws, y[k : k + 1], "const")
                mean = 0.99 * mean + 0.01 * lengths.mean()
                (2 * (lengths - mean).square().mean()).backward()
                mean = mean.detach()

    def labels(n):
        return label(slice(0, n))

    phases = {
        "G": lambda: stylegan2.generator_phase(G, D, 4, labels, args, runner, "const"),
        "D": lambda: stylegan2.discriminator_phase(G, D, real, c, labels, args, runner, "const"),
        "r1": lambda: stylegan2.r1_phase(D, real, c, args, runner),
        "pl": lambda: stylegan2.path_length_phase(
            G, torch.zeros(()).double(), 4, labels, args, runner, "const"
        ),
    }
    for kind, phase in phases.items():
        mine = gradients(phase)
        for name, grad in gradients(lambda kind=kind: expected(kind)).items():
            torch.testing.assert_close(mine[name], grad, msg=f"{kind} {name}")


def test_an_overflow_spoils_neither_the_mean_path_length_nor_the_log(monkeypatch):
    G, pl_mean, found = small_G().requires_grad_(True), torch.tensor(0.5), {}
    args = types.SimpleNamespace(batch_gpu=None, mixing=0, pl_weight=2, pl_every=4)
    draws = dict(randn=torch.randn, mean=lambda x: x, backward=lambda loss: None)
    monkeypatch.setattr(stylegan2, "path_lengths", lambda *_: torch.tensor([1.0, math.inf]))
    draws = types.SimpleNamespace(**draws)
    pl = stylegan2.path_length_phase(G, pl_mean, 4, lambda n: None, args, draws, "const")
    assert pl_mean == 0.5 and not pl.isfinite()

    runner = types.SimpleNamespace(own_half=True, half="float16", world=1, rank=0, sums={})
    runner.due, runner.log_every, runner.write_log = lambda n: False, 1, found.update
    for value in (pl, torch.tensor(2.0)):
        losses = {"G": torch.tensor(1.0), "reg/pl": value, "reg/r1": value * math.inf}
        common.Run.log(runner, losses)
    common.Run.flush(runner)
    assert found == {"loss/G": 1, "reg/pl": 2}  # what has no finite value is not there


def test_lazy_regularization_has_the_official_rates_and_betas():
    runner = types.SimpleNamespace(adam=lambda nets, lr, betas: (lr, *betas))
    for every, expected in ((4, (0.0016, 0, 0.99199197)), (16, (0.00188235, 0, 0.99058546))):
        assert stylegan2.lazy_adam(runner, None, 0.002, every) == pytest.approx(expected, abs=1e-8)


def test_the_average_of_g_reaches_the_middle_after_its_half_life():
    G, G_ema = small_G(), small_G()
    for p, q in zip(G.parameters(), G_ema.parameters(), strict=True):
        p.data.fill_(1), q.data.fill_(0)
    G.mapping.w_avg.fill_(3)
    for _ in range(20):
        stylegan2.update_ema(G_ema, G, 0.5 ** (100 / 2000))
    assert all(torch.allclose(p, torch.tensor(0.5)) for p in G_ema.parameters())
    assert all(torch.equal(a, b) for a, b in zip(G.buffers(), G_ema.buffers(), strict=True))


def test_style_mixing_replaces_the_layers_from_the_crossover_on():
    G = small_G()
    z, z2 = torch.randn(2, 3, 6)
    ws, ws2 = G.mapping(z), G.mapping(z2)
    for k in (1, 3, G.num_ws):
        mixed = stylegan2.mixed_ws(G, z, None, z2, torch.tensor(k))
        assert torch.equal(mixed[:, :k], ws[:, :k]) and torch.equal(mixed[:, k:], ws2[:, k:])


def test_crossovers_are_uniform_over_the_layers_and_one_in_ten_batches_is_not_mixed(monkeypatch):
    G, runner, seen = small_G(), Runner(), []
    monkeypatch.setattr(stylegan2, "mixed_ws", lambda G, z, c, z2, k: seen.append(int(k)))
    for _ in range(3000):
        stylegan2.mix(G, torch.zeros(1, 6), None, options_of_a_step(), runner)
    shares = np.bincount(seen, minlength=7) / 3000
    np.testing.assert_allclose(shares, [0, *[0.18] * (G.num_ws - 1), 0.1], atol=0.03)


# ---- train ----


training, trained = commands.trained_beside_the_tests(
    stylegan2,
    "--size 16 --channel-base 256 --channel-max 16 --z-dim 16 --w-dim 16 --map-layers 2 --kimg 2"
    " --batch 32 --mbstd-group 4 --r1-gamma 0.5 --ema-kimg 0.5 --lr 0.004 --seed 0 --every 1",
)


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    out = tmp_path_factory.mktemp("conditional")
    main("--data", "toy", "--cond", "--out", out, *TINY, "--batch", 100)
    return out / "stylegan2-toy-000"


def loaded(folder):
    return stylegan2.load_networks(folder)[0]["G_ema"].eval().requires_grad_(False)


def test_training_learns(trained):
    scores = [line["fd8"] for line in jsonl(trained / "metrics.jsonl")]
    assert len(scores) == 3 and scores[-1] < scores[0] / 2


def test_train_leaves_a_run_folder(trained):
    names = {p.name for p in trained.iterdir()}
    assert {"args.json", "stylegan2.py", "log.jsonl", "metrics.jsonl", "samples"} <= names
    assert {"checkpoint.pt", "checkpoint-0000063.pt"} <= names
    assert json.loads((trained / "args.json").read_text())["channel_base"] == 256
    samples = sorted(p.name for p in (trained / "samples").iterdir())
    assert samples == ["0000032.png", "0000063.png", "reals.png"]
    log = jsonl(trained / "log.jsonl")
    expected = {"kimg", "loss/G", "loss/D_fake", "loss/D_real", "reg/r1", "reg/pl", "reg/pl_mean"}
    assert expected <= set(log[0]) and log[-1]["step"] == 63 and log[-1]["kimg"] == 2.016


def test_a_checkpoint_needs_no_unpickling_of_code(trained):
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    assert state["model"] == "stylegan2" and state["step"] == 63
    assert set(state["nets"]) == {"G", "D", "G_ema"}
    assert state["config"]["G_ema"]["img_resolution"] == 16


def test_a_folder_of_photographs_trains_with_its_options(tmp_path):
    faces("photos", size=(14, 11))
    text = run("--data", "photos", *TINY, "--mirror", "--precision", "fp32", "--out", tmp_path)
    assert "6 images of 8x8" in text and "in fp32" in text and "batch 50" in text
    assert len(jsonl(tmp_path / "stylegan2-photos-000/log.jsonl")) == 1


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ("--channels 1", {"img_channels": 1}),
        ("--G resnet --D skip", {"architecture": "resnet"}),
        ("--G orig --D orig --pl-weight 0 --mixing 0 --r1-gamma 0", {"architecture": "orig"}),
        ("--batch-gpu 10 --ema-rampup 0.05", {}),
        ("--precision tf32 --cache off --workers 0", {"clamp": None, "half_res": 0}),
        ("--config E --channel-max 4", {"channel_max": 4}),
    ],
)
def test_variants_train(tmp_path, options, config):
    main("--data", faces("d"), *TINY, "--out", tmp_path, *options.split())
    folder = tmp_path / "stylegan2-d-000"
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert config.items() <= state["config"]["G"].items()
    assert all(math.isfinite(v) for v in jsonl(folder / "log.jsonl")[0].values())
    if "--config" in options:
        assert state["args"]["r1_gamma"] == 100
    main("generate", "--checkpoint", folder, "--seeds", 1)
    assert Image.open("out/seed0001.png").mode == ("L" if "--channels" in options else "RGB")
    if "--channels" in options:  # which a transfer keeps
        main("--data", "d", *TINY, "--out", tmp_path, "--checkpoint", folder)
        assert loaded(tmp_path / "stylegan2-d-001").config["img_channels"] == 1


def labelled_zip(path, labels):
    with zipfile.ZipFile(path, "w") as z:
        for picture in sorted(Path(faces("pictures", len(labels), suffix="png")).iterdir()):
            z.write(picture, picture.name)
        pairs = [[f"{i}.png", label] for i, label in enumerate(labels) if label is not None]
        z.writestr("dataset.json", json.dumps({"labels": pairs}))
    return path


@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 1], [[0.5, 1.0], [1.0, 0.0], [0.0, 0.0]]])
def test_labels_of_a_zip_train_a_conditional_model(tmp_path, labels):
    main("--data", labelled_zip("d.zip", labels), *TINY, "--cond", "--out", tmp_path)
    G = loaded(tmp_path / "stylegan2-d-000")
    assert G.config["c_dim"] == (4 if labels[1] == 1 else 2)


def test_transfer_says_what_was_copied(trained, tmp_path, capsys):
    options = [*TINY, "--data", faces("d"), "--checkpoint", trained, "--size", 32]
    options += "--channel-base 256 --channel-max 16 --z-dim 16 --w-dim 16 --lr 1e-12".split()
    main(*options, "--out", tmp_path, "--ema-kimg", 1000)
    said = capsys.readouterr().out
    for name in ("G", "D", "G_ema"):
        assert re.search(rf"^{name}: \d+ of \d+ tensors copied; \d+ new: ", said, re.M), said
    start, end = (
        stylegan2.load_networks(f)[0]["D"].state_dict()
        for f in (trained, tmp_path / "stylegan2-d-000")
    )
    assert all(torch.allclose(start[k], end[k], atol=1e-6) for k in start if "fromrgb" not in k)


def test_a_run_resumed_on_other_pictures_says_so(tmp_path, capsys):
    main("--data", faces("d"), *RESUMED, "--kimg", 1, "--out", tmp_path)
    folder = tmp_path / "stylegan2-d-000"
    main("--resume", folder, "--kimg", 2)
    assert "other pictures" not in capsys.readouterr().out
    Path("d/3.jpg").unlink()
    main("--resume", folder, "--kimg", 3)
    assert "--data d holds other pictures than before" in capsys.readouterr().out


def test_transfer_keeps_what_options_do_not_ask_for(capsys):
    G = small_G(img_resolution=8, channel_base=32, z_dim=8, w_dim=8, c_dim=2, use_noise=False)
    D = small_D(img_resolution=8, channel_base=32, c_dim=2, map_layers=0)
    arrays = {"G": G.state_dict(), "D": D.state_dict(), "G_ema": G.state_dict()}
    official_files.write_pytorch_pickle("net.pkl", arrays, {"conv_clamp": 256})
    data = labelled_zip("d.zip", [0, 1, 1])
    options = "--cond --size 8 --batch 48 --kimg 1 --mirror --out runs --device cpu".split()
    main("--data", data, "--checkpoint", "net.pkl", *options)
    said = capsys.readouterr().out
    for name in ("G", "D", "G_ema"):
        assert re.search(rf"^{name}: (\d+) of \1 tensors copied$", said, re.M), said
    evaluate = ["evaluate", "--checkpoint", "runs/stylegan2-d-000", "--metrics", "fd8"]
    main(*evaluate, "--samples", 20)
    assert "mirrored at random" in capsys.readouterr().out  # as in training


RESUMED = "--size 8 --channel-base 32 --channel-max 8 --z-dim 8 --w-dim 8 --map-layers 2".split()
RESUMED += "--batch 40 --mbstd-group 2 --kimg 3 --every 1 --r1-every 4 --pl-every 3".split()


def test_a_run_killed_twice_ends_as_one_that_was_not(tmp_path):
    options = ["--data", faces(tmp_path / "d", 30), *RESUMED, "--mirror"]
    kills = [(25, 0.5), (50, 0.5)]  # of 75
    whole, folder = commands.whole_and_killed(stylegan2, options, kills)
    expected, actual = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (whole, folder))
    assert expected["step"] == actual["step"] == 75
    for name, net in expected["nets"].items():
        assert all(torch.equal(actual["nets"][name][k], v) for k, v in net.items()), name
    pl_mean = [s["ranks"][0]["pools"]["pl"]["mean"] for s in (expected, actual)]
    assert torch.equal(*pl_mean) and pl_mean[0] > 0
    logs = [jsonl(f / "log.jsonl") for f in (whole, folder)]
    for line in logs[0] + logs[1]:
        del line["sec"], line["mem_gb"]
    assert logs[0] == logs[1]
    assert jsonl(whole / "metrics.jsonl") == jsonl(folder / "metrics.jsonl")


def test_two_processes_make_the_update_of_one(tmp_path):
    options = ["--data", faces(tmp_path / "d"), *TINY, "--batch", 200, "--mbstd-group", 1]
    options += ["--pl-every", 2, "--r1-every", 2, "--device", "cpu"]
    commands.on_one_and_two_processes(ROOT / "stylegan2.py", *options)
    one, two = (
        torch.load(tmp_path / n / "stylegan2-d-000/checkpoint.pt", weights_only=True)
        for n in ("one", "two")
    )
    assert one["step"] == two["step"] == 5 and len(two["ranks"]) == 2
    for name, net in one["nets"].items():
        for key, t in net.items():
            torch.testing.assert_close(
                t, two["nets"][name][key], rtol=1e-4, atol=2e-5, msg=f"{name}.{key}"
            )


# ---- generate, project, edit, evaluate ----


def test_generate_writes_pictures_a_grid_and_latents(trained):
    text = run("generate", "--checkpoint", trained, "--seeds", "0-2,7", "--psi", 0.7)
    assert "4 pictures" in text
    names = {p.name for p in Path("out").iterdir()}
    assert names == {*(f"seed{k:04}.png" for k in (0, 1, 2, 7)), "grid.png", "latents.npz"}
    G, latents = loaded(trained), np.load("out/latents.npz")
    ws = G.mapping(common.latents([0, 1, 2, 7], 16), psi=0.7)
    np.testing.assert_allclose(latents["w"], ws, atol=1e-6)
    picture = common.to_uint8(G.synthesis(ws, "const"))[3].permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(Image.open("out/seed0007.png"), int) - picture).max() <= 1
    main("generate", "--checkpoint", trained, "--projected", "out/latents.npz", "--out", "again")
    assert pixels("again/projected0003.png") == pixels("out/seed0007.png")


def test_pictures_of_many_seeds_are_written_as_they_are_made(trained, monkeypatch):
    written = commands.written_before_each_batch(monkeypatch, "out/seed*")
    monkeypatch.setattr(common, "MOST_IN_GRID", 9)
    main("generate", "--checkpoint", trained, "--seeds", "0-39")
    assert written == [0, 16, 32] and len(list(Path("out").glob("seed*"))) == 40
    assert Image.open("out/grid.png").width == Image.open("out/grid.png").height
    assert len(np.load("out/latents.npz")["w"]) == 40
    main("generate", "--checkpoint", trained, "--seeds", "38-39", "--out", "last")
    assert pixels("last/seed0039.png") == pixels("out/seed0039.png")


def pixels(path):
    return Image.open(path).tobytes()


@pytest.mark.parametrize(("psi", "distinct"), [(0, 1), (1.5, 3), (-0.5, 3)])
def test_psi_may_be_any_number(trained, psi, distinct):
    main("generate", "--checkpoint", trained, "--seeds", "0-2", "--psi", psi)
    assert len({pixels(p) for p in Path("out").glob("seed*.png")}) == distinct


def test_a_mixing_table_has_the_rows_picture_where_seeds_are_equal(trained):
    options = "--mix-rows 1,2 --mix-cols 2,3 --mix-layers 0-2".split()
    main("generate", "--checkpoint", trained, *options)
    sheet = np.asarray(Image.open("out/mixing.png"))

    def cell(row, column):
        y, x = 18 + 132 * row, 4 + 132 * column
        return sheet[y : y + 128, x : x + 128]

    assert sheet.shape == (18 + 3 * 132, 3 * 132 + 4, 3) and (cell(0, 0) == 255).all()
    assert (cell(2, 1) == cell(2, 0)).all() and (cell(2, 1) == cell(0, 1)).all()
    assert (cell(1, 1) != cell(1, 0)).any() and (cell(1, 1) != cell(0, 1)).any()


@pytest.mark.parametrize("suffix", ["webp", "gif", "png"])
def test_a_film_goes_through_all_seeds(trained, suffix):
    options = ["--seeds", "0-2", "--film", f"f.{suffix}", "--frames", 4]
    main("generate", "--checkpoint", trained, *options)
    film = Image.open(f"out/f.{suffix}")
    assert film.n_frames == 12 and film.size == (16, 16)


def test_classes_of_a_conditional_model_differ(conditional, capsys):
    for k in range(2):
        main("generate", "--checkpoint", conditional, "--class", k, "--seeds", 0, "--out", k)
    latents = [np.load(f"{k}/latents.npz")["w"] for k in range(2)]
    assert not np.allclose(*latents)
    c_dim = loaded(conditional).config["c_dim"]
    line = fails(capsys, "generate", "--checkpoint", conditional, "--class", c_dim)
    assert f"--class {c_dim}" in line and f"0 to {c_dim - 1}" in line


@pytest.mark.parametrize("space", ["w", "w+"])
def test_project_approaches_a_picture_of_g_itself(trained, capsys, space):
    main("generate", "--checkpoint", trained, "--seeds", 5)
    capsys.readouterr()
    options = ["--input", "out/seed0005.png", "--space", space, "--steps", 60, "--out", "p"]
    main("project", "--checkpoint", trained, *options)
    said = capsys.readouterr().out
    first, *_, last = (float(d) for d in re.findall(r"distance ([\d.]+)", said))
    assert last < first / 2 and "LPIPS is replaced" in said
    names = {"projected.npz", "projected.png", "target.png", "progress.webp"}
    assert {p.name for p in Path("p").iterdir()} == names
    w = np.load("p/projected.npz")["w"]
    assert w.shape == (1, 6, 16) and (w[0] == w[0, 0]).all() == (space == "w")
    assert pixels("p/target.png") == pixels("out/seed0005.png")
    main("generate", "--checkpoint", trained, "--projected", "p/projected.npz", "--out", "g")
    assert Image.open("g/projected0000.png").size == (16, 16)


def test_project_takes_pictures_of_other_sizes_and_with_alpha(trained, conditional, capsys):
    Image.new("RGBA", (20, 30), (200, 30, 30, 128)).save("a.png")
    for net in ([trained], [conditional, "--class", 2]):
        main("project", "--checkpoint", *net, "--input", "a.png", "--steps", 3)
    said = capsys.readouterr().out
    assert "a.png is 20x30: its centre square is resized to 16x16" in said
    assert Image.open("out/projected.png").size == (8, 8)


def labelled_faces(folder, n=40):
    """Toy faces of 16 x 16 pixels and their regions."""
    for kind, draw in (("images", common.toy_face), ("labels", common.toy_labels)):
        Path(folder, kind).mkdir(parents=True)
        for k in range(n):
            draw(k, 0, 16).save(f"{folder}/{kind}/{k}.png")
    Path(folder, "names.txt").write_text("\n".join(common.TOY_REGIONS))
    return folder


def test_label_maps_beside_pictures_are_no_pictures(tmp_path):
    folder = labelled_faces(tmp_path / "d", 3)
    source = common.open_images(str(folder), 16, common.TOY_FACES)
    assert source.names == ["0.png", "1.png", "2.png"]


@pytest.fixture
def calls(monkeypatch):
    """[(name, arguments, options)] of what `edit` learns from, less than in earnest."""
    found, labelled = [], common.labelled_pictures

    def fewer_pictures(*args):
        data, size, classes = labelled(*args)
        data.names = data.names[:400]
        return data, size, classes

    monkeypatch.setattr(common, "labelled_pictures", fewer_pictures)

    def shorter(name, **fewer):
        function = getattr(common, name)

        def wrapper(*args, **options):
            found.append((name, args, options))
            return function(*args, **options, **fewer)

        monkeypatch.setattr(common, name, wrapper)

    shorter("toy_classifier", faces=1600, held_out=50, epochs=2)
    shorter("load_segmenter", steps=80)
    return found


def test_edit_fits_directions_and_says_where_pictures_change(trained, calls, capsys):
    options = ["--data", labelled_faces("d"), "--classes", "d/names.txt", "--samples", 300]
    options += ["--seeds", "2,5-6", "--direction"]
    main("edit", "--checkpoint", trained, *options, "hair.light,background.light")
    text = capsys.readouterr().out
    assert "segmenter of 11 classes, on 5 pictures" in text
    for name in ("hair.light", "background.light"):
        has = re.search(rf"{name}: the plane .*; (\d+)% of .* its normal (\d+)%\n", text)
        assert int(has[1]) < int(has[2]) - 20, text
        line = re.search(rf"{name}: locality, medians of 200 pairs, .*", text)[0]
        inside, low, high, outside = map(float, re.findall(r"(\d+\.\d+)", line))
        assert 0 < low < inside < high < 100 and outside > 0
    sheet = Image.open("out/hair.light.png")  # before, after, difference; three rows
    assert 3 * 132 < sheet.width < 4 * 132 and 3 * 132 < sheet.height < 4 * 132
    main("generate", "--checkpoint", trained, "--seeds", "2", "--out", "g")
    shown = np.asarray(sheet, int)[18 : 18 + 128, sheet.width - 3 * 132 :][4::8, 4:128:8]
    assert np.abs(shown - np.asarray(Image.open("g/seed0002.png"), int)).max() <= 1
    main("edit", "--checkpoint", trained, *options, "hair.light", "--alpha", 0)
    text = capsys.readouterr().out
    assert "200 without any change" in text and "training a segmenter" not in text


def test_edit_knows_the_attributes_of_toy_faces_and_the_regions_of_every_class(
    trained, conditional, calls, capsys
):
    options = ["--samples", 200, "--seeds", 1, "--direction"]
    main("edit", "--checkpoint", trained, *options, "dark hair")
    main("edit", "--checkpoint", conditional, "--class", 2, *options, "background.light")
    said = capsys.readouterr().out
    assert [name for name, *_ in calls] == ["toy_classifier", "load_segmenter", "load_segmenter"]
    assert calls[0][2]["domain"] == 0 and calls[0][2]["size"] == 16
    human, robot = (args[0] for _, args, _ in calls[1:])
    for data, domain in ((human, 0), (robot, 2)):
        face = common.toy_face(5, domain, data.size)
        assert np.array_equal(data[5][0], np.asarray(face))
    for name in ("dark hair", "background.light"):
        assert f"{name}: locality, medians of 200 pairs" in said
        assert Path("out", f"{name.replace(' ', '-')}.png").exists()


def test_evaluate_without_downloads_says_what_is_left_out(trained, conditional):
    options = ["--samples", 100, "--out", "scores.json"]
    text = run("evaluate", "--checkpoint", trained, *options)
    for line in ("FID and KID", "precision and recall", "perceptual path length"):
        assert len(re.findall(f"^{line} (?:are|is) left out: .*$", text, re.M)) == 1, text
    scores = json.loads(Path("scores.json").read_text())
    assert scores["n_real"] == scores["n_fake"] == 100 and f"fd8 {scores['fd8']:.3f}" in text
    main("evaluate", "--checkpoint", conditional, *options, "--metrics", "fd8")
    assert json.loads(Path("scores.json").read_text())["fd8"] > 0
    data = labelled_zip("two.zip", [0, 1, 0, 1])  # of the model's three classes
    main("evaluate", "--checkpoint", conditional, *options, "--metrics", "fd8", "--data", data)
    assert json.loads(Path("scores.json").read_text())["n_real"] == 4


@pytest.mark.parametrize("option", ["--inception", "--vgg"])
def test_a_file_that_is_no_network_is_refused_before_samples_are_made(
    trained, capsys, monkeypatch, option
):
    monkeypatch.setattr(common, "fd8", None)
    Path("no.pth").write_bytes(b"no network")
    said = fails(capsys, "evaluate", "--checkpoint", trained, "--samples", 20, option, "no.pth")
    assert "no.pth" in said


def test_pictures_of_all_classes_are_scored_though_files_are_sorted_by_class(conditional):
    read = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            common.ImageSet, "__getitem__", lambda self, i: read.append(i) or self.array(i)
        )
        main("evaluate", "--checkpoint", conditional, "--samples", 3, "--metrics", "fd8")
    source = common.open_data("toy", size=8, toy=common.TOY_CLASSES)
    assert len({source.labels()[source.names[i]] for i in read[-3:]}) == 3
    assert read[-3:] == common.reals_of(len(source.names), 3, labels=True)
    assert [*common.reals_of(5, 3, None)] == [0, 1, 2] and len(common.reals_of(5, 9, True)) == 5


# ---- official files ----
# The tables of names and layouts, from ours to theirs.


def to_tensorflow(net):
    """StyleGAN2's and ADA's variables."""
    found = {}
    leaves = {"affine.weight": "mod_weight", "affine.bias": "mod_bias"}
    layers = {"conv0": "Conv0_up", "torgb": "ToRGB", "skip": "Skip", "fromrgb": "FromRGB"}
    layers |= {"fc": "Dense0"}
    in_G = net.config["kind"] == "G"
    for name, t in net.state_dict().items():
        if name == "mapping.w_avg":
            found["dlatent_avg"] = t
        elif name.startswith("mapping.fc") and not net.config["map_layers"]:
            continue
        elif name.startswith("mapping."):
            _, layer, leaf = name.split(".")
            dense = "mapping/Dense" if in_G else "Mapping"
            label = "mapping/LabelEmbed" if in_G else "LabelEmbed"
            if not in_G and layer != "embed":
                t = t / 10  # its multiplier is 0.1, not 0.01
            found[f"{layer.replace('fc', dense).replace('embed', label)}/{leaf}"] = (
                t.T if leaf == "weight" else t
            )
        elif name.endswith("noise_const"):
            res, k = re.search(r"b(\d+)\.conv(\d)", name).groups()
            number = 0 if res == "4" else 2 * int(math.log2(int(res))) - 5 + int(k)
            found[f"synthesis/noise{number}"] = t[None, None]
        elif name == "synthesis.b4.const":
            found["synthesis/4x4/Const/const"] = t[None]
        else:
            block, layer, leaf = name.removeprefix("synthesis.").split(".", 2)
            side = f"{block[1:]}x{block[1:]}"
            theirs = layers.get(layer) or ("Conv" if side == "4x4" else "Conv1")
            if not in_G and side != "4x4":
                theirs = {"conv0": "Conv0", "conv1": "Conv1_down"}.get(layer, theirs)
            t = t - 1 if leaf == "affine.bias" else t
            if t.ndim == 4:
                t = t.flip([2, 3]) if theirs == "Conv0_up" else t
                t = t.permute(2, 3, 1, 0)
            path = "Output" if layer == "out" else f"{side}/{theirs}"
            found[f"{'synthesis/' * in_G}{path}/{leaves.get(leaf, leaf)}"] = (
                t.T if t.ndim == 2 else t
            )
    return {k: t.numpy().copy() for k, t in found.items()}


def to_rosinality_G(G):
    found, fir = {}, torch.ones(4, 4)
    for name, t in G.state_dict().items():
        if m := re.fullmatch(r"mapping\.fc(\d+)\.(.*)", name):
            found[f"style.{int(m[1]) + 1}.{m[2]}"] = t
        elif name == "synthesis.b4.const":
            found["input.input"] = t[None]
        elif name != "mapping.w_avg":
            res, layer, leaf = re.fullmatch(r"synthesis\.b(\d+)\.(\w+)\.(.*)", name).groups()
            j = int(math.log2(int(res))) - 3  # -1 of the 4x4 block
            k = 2 * j + int(layer[-1]) if layer != "torgb" else None
            if leaf == "noise_const":
                found[f"noises.noise_{k + 1}"] = t[None, None]
                continue
            theirs = {
                "weight": "conv.weight", "affine.weight": "conv.modulation.weight",
                "affine.bias": "conv.modulation.bias", "noise_strength": "noise.weight",
                "bias": "bias" if k is None else "activate.bias",
            }[leaf]  # fmt: skip
            if k is None:
                place = "to_rgb1" if j < 0 else f"to_rgbs.{j}"
                t = t.reshape(1, 3, 1, 1) if leaf == "bias" else t
                found |= {f"to_rgbs.{j}.upsample.kernel": fir} if j >= 0 else {}
            else:
                place = "conv1" if j < 0 else f"convs.{k}"
                found |= {f"{place}.conv.blur.kernel": fir} if layer == "conv0" else {}
            t = t[None] if t.ndim in (0, 4) and leaf != "bias" else t
            found[f"{place}.{theirs}"] = t
    return found


def to_rosinality_D(D):
    found, top = {}, int(math.log2(D.config["img_resolution"]))
    heads = {"b4.conv.weight": "final_conv.0.weight", "b4.conv.bias": "final_conv.1.bias"}
    for leaf in ("weight", "bias"):
        heads |= {f"b4.fc.{leaf}": f"final_linear.0.{leaf}"}
        heads |= {f"b4.out.{leaf}": f"final_linear.1.{leaf}"}
    leaves = {
        "conv0.weight": "conv1.0.weight", "conv0.bias": "conv1.1.bias", "skip.weight":
        "skip.1.weight", "conv1.weight": "conv2.1.weight", "conv1.bias": "conv2.2.bias",
    }  # fmt: skip
    for name, t in D.state_dict().items():
        block, leaf = name.split(".", 1)
        n = top - int(math.log2(int(block[1:]))) + 1
        if leaf.startswith("fromrgb"):
            found["convs.0.0.weight" if leaf.endswith("weight") else "convs.0.1.bias"] = t
        else:
            found[heads.get(name) or f"convs.{n}.{leaves[leaf]}"] = t
    return found | {"convs.1.conv2.0.kernel": torch.ones(4, 4)}


def write_official(path, kind, G, D):
    """The pair as a file of the release `kind`."""
    if kind == "pytorch":
        arrays = {"G": G.state_dict(), "D": D.state_dict(), "G_ema": G.state_dict()}
        options = {"synthesis_kwargs": {"conv_clamp": 256, "num_fp16_res": 4}}
        options |= {"epilogue_kwargs": {"mbstd_group_size": 2}, "conv_clamp": 256}
        extra = {"b4.resample_filter": torch.ones(4, 4)}
        arrays = {k: v | (extra if k == "D" else {}) for k, v in arrays.items()}
        official_files.write_pytorch_pickle(path, arrays, options)
    elif kind == "rosinality":
        nets = {"g_ema": to_rosinality_G(G), "g": to_rosinality_G(G), "d": to_rosinality_D(D)}
        official_files.write_rosinality(path, nets, G.mapping.w_avg)
    else:
        g, d = to_tensorflow(G), to_tensorflow(D)
        nets = {"G": g | {"synthesis/lod": np.float32(0)}, "D": d, "Gs": g}
        official_files.write_tf_pickle(path, nets, version=5 if kind == "tf ada" else 4)


OFFICIAL = [  # release, side, widths, architectures of G and D, c_dim, mapping layers of G and D
    ("pytorch", 16, 128, "skip", "resnet", 0, 2, 8),
    ("pytorch", 32, 256, "resnet", "orig", 3, 8, 8),
    ("pytorch", 32, 128, "orig", "skip", 3, 2, 2),
    ("tf", 16, 256, "skip", "resnet", 0, 8, 8),
    ("tf", 32, 128, "resnet", "orig", 0, 8, 8),
    ("tf", 16, 128, "orig", "skip", 0, 2, 8),
    ("tf ada", 32, 256, "skip", "resnet", 0, 2, 8),
    ("tf ada", 16, 128, "skip", "resnet", 3, 2, 0),
    ("tf ada", 16, 128, "skip", "resnet", 3, 8, 3),
    ("rosinality", 16, 128, "skip", "resnet", 0, 8, 8),
    ("rosinality", 32, 256, "skip", "resnet", 0, 2, 8),
]


@pytest.mark.parametrize("case", OFFICIAL, ids=lambda c: "-".join(map(str, c)))
def test_an_official_file_makes_the_pictures_and_logits_of_its_networks(case):
    kind, res, base, G_kind, D_kind, c_dim, G_layers, D_layers = case
    both = dict(c_dim=c_dim, img_resolution=res, channel_base=base, channel_max=16)
    sizes = dict(z_dim=8, w_dim=8, map_layers=G_layers)
    G = shuffled_weights(stylegan2.Generator(architecture=G_kind, **sizes, **both))
    group = 2 if kind == "pytorch" else 4
    D = stylegan2.Discriminator(architecture=D_kind, map_layers=D_layers, mbstd_group=group, **both)
    D = shuffled_weights(D)
    path = "net.pt" if kind == "rosinality" else "net.pkl"
    write_official(path, kind, G, D)

    nets, options = stylegan2.load_networks(path)
    assert set(nets) == {"G", "D", "G_ema"} and options == {}
    for net in nets.values():
        net.eval()
    assert nets["D"].config["mbstd_group"] == group
    assert nets["G"].config["clamp"] == (256 if kind == "pytorch" else None)
    z, x = torch.randn(4, 8), torch.randn(4, 3, res, res)
    c = torch.eye(3)[[0, 1, 2, 0]] if c_dim else None
    for psi in (1, 0.5):
        torch.testing.assert_close(
            nets["G_ema"](z, c, psi=psi, noise="const"), G(z, c, psi=psi, noise="const"),
            rtol=1e-5, atol=1e-5,
        )  # fmt: skip
    torch.testing.assert_close(nets["D"](x, c), D(x, c), rtol=1e-5, atol=1e-5)

    main("generate", "--checkpoint", path, "--seeds", 3, *(["--class", 0] if c_dim else []))
    c = None if c is None else c[:1]
    expected = common.sample(G, common.latents([3], 8), c)[0].permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(Image.open("out/seed0003.png"), int) - expected).max() <= 1


def test_arguments_that_an_official_file_leaves_out_are_the_defaults_of_its_code():
    arrays = small_G(img_resolution=16, z_dim=8).state_dict()
    arguments = [
        {},  # stylegan3's
        {"synthesis_kwargs": {"num_fp16_res": 0, "conv_clamp": None}},  # stylegan2-ada-pytorch's
        {"mapping_kwargs": {"lr_multiplier": 0.1}},
    ]
    nets = []
    for options in arguments:
        official_files.write_pytorch_pickle("net.pkl", {"G_ema": arrays}, options)
        nets.append(stylegan2.load_networks("net.pkl")[0]["G_ema"])
    found = [(net.config["clamp"], net.config["half_res"]) for net in nets]
    assert found == [(256, 4), (None, 0), (256, 4)]
    w, w_times_10 = (nets[k].mapping.fc0.weight for k in (0, 2))
    torch.testing.assert_close(w_times_10, 10 * w)


def test_a_training_file_of_rosinality_gets_its_mean_w_from_samples(tmp_path):
    G = small_G(img_resolution=16, z_dim=8)
    nets = {"g_ema": to_rosinality_G(G), "g": to_rosinality_G(G)}
    args = argparse.Namespace(size=16, channel_multiplier=2, path=None)
    official_files.write_rosinality("train.pt", nets, args=args)
    G.mapping.w_avg.copy_(G.mapping(torch.randn(20_000, 8))[:, 0].mean(0))
    found = stylegan2.load_networks("train.pt")[0]["G_ema"].eval()
    torch.testing.assert_close(found.mapping.w_avg, G.mapping.w_avg, rtol=0, atol=0.05)
    z = torch.randn(2, 8)
    torch.testing.assert_close(found(z, noise="const"), G(z, noise="const"))


def test_an_official_file_starts_a_training_and_is_evaluated_on_named_data(tmp_path, capsys):
    G, D = (net(img_resolution=8, channel_base=32) for net in (small_G, small_D))
    write_official("net.pkl", "tf", G, D)
    main(*TINY, "--data", faces("d"), "--checkpoint", "net.pkl", "--z-dim", 6, "--out", tmp_path)
    assert re.search(r"^D: (\d+) of \1 tensors copied$", capsys.readouterr().out, re.M)
    evaluate = ["evaluate", "--checkpoint", "net.pkl", "--metrics", "fd8", "--samples", 20]
    main(*evaluate, "--data", "toy")
    assert "--data is missing" in fails(capsys, *evaluate)


def damaged(change):
    arrays = {k: v.clone() for k, v in small_G().state_dict().items()}
    change(arrays)
    official_files.write_pytorch_pickle("damaged.pkl", {"G_ema": arrays})
    return "damaged.pkl"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda a: a.pop("synthesis.b8.conv1.bias"), "synthesis.b8.conv1.bias"),
        (lambda a: a.pop("synthesis.b8.conv1.weight"), "synthesis.b8.conv1.weight"),
        (lambda a: a.pop("mapping.fc0.weight"), "mapping.fc0.weight"),
        (lambda a: a.pop("synthesis.b4.const"), "b4"),
        (lambda a: a.update({"synthesis.b8.extra.bias": torch.ones(3)}), "extra"),
        (lambda a: a.update({"synthesis.b16.conv1.weight": torch.ones(5, 8, 3, 3)}), "G_ema"),
        (lambda a: a.update({"synthesis.b8.conv1.weight": torch.ones(5, 8, 3, 3)}), "channels"),
        (lambda a: a.update({"synthesis.b8.conv0.bias": torch.ones(3)}), "G_ema"),
        (lambda a: a.update({"mapping.fc1.weight": torch.ones(8)}), "G_ema"),
        (lambda a: a.update({"ToRGB_lod0/mod_weight": torch.ones(3)}), "grow"),
        (lambda a: a.clear(), "G_ema"),
    ],
)
def test_an_official_network_with_something_wrong_is_refused(capsys, change, problem):
    line = fails(capsys, "generate", "--checkpoint", damaged(change))
    assert "damaged.pkl" in line and problem in line and not Path("out").exists()


# ---- mistakes ----


def test_mistakes_in_options_end_in_one_line(capsys, trained, conditional):
    faces("d"), faces("wide", size=(20, 16)), faces("mixed"), faces("mixed/b", size=(12, 12))
    labelled_zip("five.zip", [0, 4, 1]), labelled_zip("half.zip", [0, 1, None, 2])
    Path("text.png").write_text("hello")
    Path("p").mkdir()
    Image.new("RGB", (20, 20)).save("p/target.png")
    np.savez("p/latents.npz", w=np.zeros((1, 6, 16)))
    np.savez("other.npz", w=np.zeros((1, 4, 16)))
    np.savez("none.npz", v=np.zeros(3))
    np.savez("empty.npz", w=np.zeros((0, 4, 16)))
    net, small = ["--checkpoint", trained], ["--data", "d", *TINY]
    sized = TINY[2:]
    cases = [
        (["--data", "wide", *sized], "not square"),
        (["--data", "d", *sized], "10: a power of two"),
        (["--data", "mixed", *TINY, "--size", 48], "--size 48"),
        (["--data", "d", *TINY, "--size", 4], "--size 4"),
        (["--data", "nowhere", *TINY], "nowhere"),
        ([*small, "--cond"], "no labels"),
        (["--data", "half.zip", *TINY, "--cond"], "1 images have no label, 2.png"),
        ([*small, "--batch", 6, "--mbstd-group", 4], "--mbstd-group 4"),
        ([*small, "--batch-gpu", 1, "--mbstd-group", 1], "--pl-weight 0"),
        ([*small, "--batch-gpu", 3], "--batch-gpu 3"),
        ([*small, "--checkpoint", "none.pt"], "none.pt"),
        ([*small, "--channel-base", 0], "not a whole number above 0"),
        ([*small, "--mixing", -1], "number from 0 to 1"),
        (["--resume", "nowhere"], "--resume nowhere"),
        (["--resume", trained, "--batch", 64], "--batch was 32"),
        (["--resume", trained, "--config", "E"], "--config was F"),
        (["--resume", trained, "--checkpoint", trained], "--checkpoint was left out"),
        (["--resume", trained, "--size", 32], "other networks"),
        (["generate"], "--checkpoint"),
        (["generate", *net, "--class", 0], "--class 0"),
        (["generate", "--checkpoint", conditional], "pass --class"),
        (["generate", *net, "--seeds", "a-b"], "'a-b' is no seed"),
        (["generate", *net, "--seeds", "5-1"], "backwards"),
        (["generate", *net, "--psi", "x"], "--psi"),
        (["generate", *net, "--film", "x.mp4"], "x.mp4"),
        (["generate", *net, "--projected", "other.npz"], "(1, 4, 16)"),
        (["generate", *net, "--projected", "none.npz"], "none.npz"),
        (["generate", *net, "--projected", "empty.npz"], "w is (0, 4, 16)"),
        (["generate", *net, "--projected", "no.npz"], "no.npz"),
        (["generate", *net, "--projected", "text.png"], "text.png"),
        (["generate", *net, "--projected", "p/latents.npz", "--out", "p"], "be written over"),
        (["generate", *net, "--mix-rows", "1"], "--mix-cols"),
        (["generate", *net, "--mix-layers", "1"], "--mix-rows"),
        (["generate", *net, "--mix-rows", "1", "--film", "f.webp"], "goes without --film"),
        (["project", *net], "--input"),
        (["project", *net, "--input", "no.png"], "no.png"),
        (["project", *net, "--input", "text.png"], "text.png"),
        (["project", *net, "--input", "p/target.png", "--out", "p"], "replace an original"),
        (["project", *net, "--input", "d"], "--input d: Is a directory."),
        (["edit", *net], "--direction"),
        (
            ["edit", *net, "--direction", "hair.light,beard"],
            "no 'beard'; there are background.area",
        ),
        (["edit", *net, "--direction", "hair.light", "--data", "d"], "no folder images"),
        (["edit", *net, "--direction", "hair.light", "--data", "nowhere"], "nowhere"),
        (["edit", "--checkpoint", conditional, "--direction", "hair.light"], "pass --class"),
        (["edit", *net, "--direction", "hair.light", "--alpha", "x"], "--alpha"),
        (["evaluate", *net, "--metrics", "nonsense"], "nonsense"),
        (["evaluate", *net, "--data", "nowhere"], "nowhere"),
        (["evaluate", *net, "--samples", 1, "--metrics", "fd8"], "--samples"),
        (["evaluate", "--checkpoint", conditional, "--data", "d"], "--data d has no labels"),
        (
            ["evaluate", "--checkpoint", conditional, "--data", "five.zip"],
            "of 5 numbers or classes",
        ),
    ]
    commands.each_ends_in_one_line(fails, capsys, cases)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_named(capsys):
    line = fails(capsys, "--data", faces("d"), *TINY, "--lr", "1e30", "--out", "r")
    assert re.search(r"(loss|reg)/\w+ became (nan|inf)", line) and "none yet" in line


def test_pictures_of_several_sizes_need_a_size(capsys):
    faces("d", size=(8, 8)), faces("d/b", size=(16, 16))
    assert "--size 8" in fails(capsys, "--data", "d", *TINY[2:], "--out", "r")


@pytest.mark.parametrize("name", ["cut.pkl", "cut.pt", "foreign.pkl", "text.pkl", "empty.pt"])
def test_damaged_and_foreign_files_are_refused(trained, capsys, name):
    if name == "cut.pkl":
        write_official("whole.pkl", "pytorch", small_G(), small_D())
        data = Path("whole.pkl").read_bytes()
    else:
        data = (trained / "checkpoint.pt").read_bytes()
    contents = {"foreign.pkl": b"\x80\x04]\x94.", "text.pkl": b"hello", "empty.pt": b""}
    Path(name).write_bytes(contents.get(name, data[: len(data) // 2]))
    line = fails(capsys, "generate", "--checkpoint", name)
    assert name in line and not Path("out").exists()


@pytest.mark.parametrize("old_format", [False, True])
def test_checkpoints_of_other_models_are_refused(capsys, old_format):
    zipped = dict(_use_new_zipfile_serialization=not old_format)
    torch.save({"model.1.weight": torch.zeros(3)}, "latest_net_G.pth", **zipped)
    line = fails(capsys, "generate", "--checkpoint", "latest_net_G.pth")
    assert "latest_net_G.pth" in line and "NoneType" not in line
    torch.save({"model": "cyclegan", "nets": {}}, "other.pt")
    assert "holds a cyclegan model" in fails(capsys, "generate", "--checkpoint", "other.pt")


@pytest.mark.parametrize("data", ["toy", "d"])
def test_a_run_of_another_model_cannot_be_resumed(capsys, data):
    faces("d", size=(8, 8)), Path("r").mkdir()
    args = {
        "model": "cyclegan",
        "data": data,
        "G": "resnet_9blocks",
        "D": "basic",
        "batch": 4,
        "workers": 0,
    }
    Path("r/args.json").write_text(json.dumps(args | {"load_size": 286, "channels_A": 3}))
    torch.save({"model": "cyclegan", "nets": {}, "args": args}, "r/checkpoint.pt")
    assert "cyclegan" in fails(capsys, "--resume", "r", "--channel-max", 4)
    assert sorted(p.name for p in Path("r").iterdir()) == ["args.json", "checkpoint.pt"]


def test_resuming_with_a_damaged_checkpoint_keeps_what_was_there(trained, capsys, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("args.json", "log.jsonl"):
        (folder / name).write_bytes((trained / name).read_bytes())
    (folder / "checkpoint.pt").write_bytes(b"PK damaged")
    log = (folder / "log.jsonl").read_bytes()
    (folder / "checkpoint-0000063.pt").touch()
    way_out = "damaged one. Move it away to go on from checkpoint-0000063.pt beside it."
    for command in (["--resume", folder], ["generate", "--checkpoint", folder]):
        assert fails(capsys, *command).endswith(way_out)
    torch.save({"some.weight": torch.zeros(3)}, folder / "checkpoint.pt")
    assert "holds no run" in fails(capsys, "--resume", folder)
    assert (folder / "log.jsonl").read_bytes() == log


def test_the_networks_and_losses_can_be_pasted_elsewhere(trained):
    text = (ROOT / "stylegan2.py").read_text()
    bar = "# " + "=" * 77 + "\n"
    sections = dict(zip(*[iter(text.split(bar)[1:])] * 2, strict=True))
    names = "import math\nimport torch\nimport torch.nn.functional as F\nfrom torch import nn\n"
    names += "import ops_cuda as ops\nW_AVG_BETA = 0.995\n"
    here = {}
    exec(names + sections["# Networks\n"] + sections["# Losses\n"], here)
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    G = here["build"](state["config"]["G_ema"]).eval()
    G.load_state_dict(state["nets"]["G_ema"])
    z = torch.randn(4, G.config["z_dim"])
    img = G(z, psi=0.7, noise="const")
    D = here["build"](state["config"]["D"])
    D.load_state_dict(state["nets"]["D"])
    img = img.detach().requires_grad_()
    assert here["r1_penalty"](D(img), img).shape == (4,)
    assert here["path_lengths"](G, G.mapping(z).requires_grad_(), img).shape == (4,)
