"""stylegan.py: networks, growth, official files, and its commands run as a user runs them."""

import copy
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
import torch.nn.functional as F
from commands import ROOT, no_stray_files, one_thread  # noqa: F401
from eager import Eager
from PIL import Image
from test_stylegan2 import faces, jsonl, labelled_zip, shuffled_weights
from test_stylegan2_ada import definitions

import common
import ops_cuda as ops
import stylegan

TINY = (  # 8 steps at 8, 4 in the fade, 12 at 16 pixels
    "--size 16 --channel-base 64 --channel-max 8 --z-dim 8 --w-dim 8 --map-layers 2 --batch 40"
    " --batches= --mbstd-group 2 --train-kimg 1 --fade-kimg 1 --kimg 3 --every 1"
).split()
script, run, main, fails = commands.of(stylegan)


SMALL = dict(img_resolution=16, channel_base=64, channel_max=8)


def small_G(**options):
    kinds = SMALL | dict(z_dim=6, w_dim=8, map_layers=2) | options
    return shuffled_weights(stylegan.Generator(**kinds))


def small_D(**options):
    return shuffled_weights(stylegan.Discriminator(**SMALL | options))


# ---- networks ----


def test_networks_have_the_published_numbers_of_parameters():
    with torch.device("meta"):
        G, D = stylegan.Generator(), stylegan.Discriminator()
    assert common.count(G) == 26_219_627 and common.count(D) == 23_087_249
    assert common.count(G.mapping) == 2_101_248 and G.num_ws == 18


COPIES = (
    "normalize", "channels", "resolutions", "half_type", "minibatch_std", "mixed_ws", "r1_penalty",
    "rounds", "update_ema", "build", "block_type",
)  # fmt: skip


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_equal(name):
    assert definitions("stylegan.py")[name] == definitions("stylegan2.py")[name]


@pytest.mark.parametrize("size", [(1, 1), (5, 7)])
def test_a_fused_upsampling_convolution_is_the_plain_one_with_its_kernel_turned(size):
    x, w = torch.randn(2, 3, *size).double(), torch.randn(4, 3, 3, 3).double()
    plain = F.conv2d(stylegan.upscale(x), w, padding=1)
    torch.testing.assert_close(ops.upscale_conv2d(x, w), plain)
    # the official one: the sum of four shifted kernels, transposed and not turned
    fused = F.conv_transpose2d(x, ops.widened(w).transpose(0, 1), stride=2, padding=1)
    torch.testing.assert_close(ops.upscale_conv2d(x, w.flip([2, 3])), fused)


def test_a_downsampling_convolution_is_the_plain_one_and_an_average():
    x, w = torch.randn(2, 3, 6, 8).double(), torch.randn(4, 3, 3, 3).double()
    plain = F.avg_pool2d(F.conv2d(x, w, padding=1), 2)
    torch.testing.assert_close(ops.conv2d_downscale(x, w), plain)


def test_adain_gives_each_map_the_mean_and_deviation_of_its_style():
    x = 5 * torch.randn(3, 4, 6, 5).double() + 2
    for order in (torch.contiguous_format, torch.channels_last):
        scale, shift = torch.rand(3, 4).double() + 0.5, torch.randn(3, 4).double()
        y = stylegan.instance_norm(x.contiguous(memory_format=order), scale, shift)
        torch.testing.assert_close(y.mean([2, 3]), shift)
        torch.testing.assert_close(y.std([2, 3], unbiased=False), scale)


@pytest.mark.parametrize("N", [1, 2])
def test_gradients_of_adain_are_exact_in_any_memory_order(N):
    for order in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(N, 3, 4, 4).double().contiguous(memory_format=order).requires_grad_()
        style = torch.randn(2, N, 3).double().requires_grad_()
        assert torch.autograd.gradcheck(lambda x, s: stylegan.instance_norm(x, *s), (x, style))


def test_psi_0_and_constant_noise_give_one_picture_for_all_z():
    G, z = small_G(), torch.randn(3, 6)
    img = G(z, psi=0, noise="const")
    torch.testing.assert_close(img, img[:1].expand_as(img))
    ws = G.mapping(z, psi=0.3, cutoff=2)
    assert torch.equal(ws[:, 2:], G.mapping(z)[:, 2:]) and not torch.equal(ws[:, :2], ws[:, 2:4])


def test_noise_of_each_channel_has_a_strength_of_its_own():
    G = small_G()
    for name, t in G.synthesis.named_parameters():
        if name.endswith("noise_strength"):
            block = name.split(".")[0]
            assert t.shape == (G.synthesis.get_submodule(block).conv1.weight.shape[0],)
            t.zero_()
    ws = G.mapping(torch.randn(1, 6))
    assert torch.equal(G.synthesis(ws), G.synthesis(ws))
    G.synthesis.b8.conv0.noise_strength[3] = 0.5
    assert not torch.equal(G.synthesis(ws), G.synthesis(ws))


@pytest.mark.parametrize("c_dim", [0, 3])
def test_growing_fades_from_one_resolution_to_the_next(c_dim):
    G, D = small_G(c_dim=c_dim), small_D(c_dim=c_dim)
    z, c = torch.randn(4, 6), torch.eye(3)[[0, 1, 2, 0]] if c_dim else None
    ws, x = G.mapping(z, c), torch.randn(4, 3, 8, 8)
    images, logits = {}, {}
    for lod in (2.0, 1.5, 1.0, 1e-6, 0.0):
        G.grow(lod), D.grow(lod)
        assert G.config["lod"] == D.config["lod"] == lod
        grown = G.synthesis.grown(ws, "const")
        assert grown.shape[2] == 16 >> int(lod)
        images[lod] = G.synthesis(ws, "const")
        torch.testing.assert_close(images[lod], stylegan.upscale(grown, 2 ** int(lod)))
        logits[lod] = D(stylegan.upscale(x), c)
        if lod == 1.5:
            torch.testing.assert_close(logits[lod], D(x, c))  # of the size that was grown to
    torch.testing.assert_close(images[1.5], (images[1.0] + images[2.0]) / 2)
    torch.testing.assert_close(images[1e-6], images[0.0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1e-6], logits[0.0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="conditional"):
        (D(x) if c_dim else small_D(c_dim=2)(x))


def test_minibatch_std_takes_the_largest_group_that_divides_the_batch():
    D = small_D(mbstd_group=4)
    three = copy.deepcopy(D)
    three.b4.mbstd_group = 3
    x = torch.randn(6, 3, 16, 16)
    assert torch.equal(D(x), three(x))
    assert small_D(mbstd_group=0).b4.conv.weight.shape[1] == 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("half", "rel"), [("float16", 0.02), ("bfloat16", 0.1)])
def test_half_precision_agrees_with_float32_on_a_gpu(half, rel):
    for lod in (0.0, 0.5):
        options = dict(img_resolution=64, channel_base=1024, channel_max=64, lod=lod)
        nets = [small_G(**options), small_D(**options)]
        halves = [
            stylegan.build(net.config | dict(half_res=4, half=half)).cuda().eval() for net in nets
        ]
        for net, other in zip(nets, halves, strict=True):
            other.load_state_dict(net.state_dict())
        (G, D), (G_half, D_half) = (net.cuda() for net in nets), halves
        ws, x = G.mapping(torch.randn(8, 6).cuda()), torch.randn(8, 3, 64, 64).cuda()
        with common.exact_float32(x.device):
            pairs = [(G.synthesis(ws, "const"), G_half.synthesis(ws, "const")), (D(x), D_half(x))]
        for exact, mine in pairs:
            assert mine.dtype == torch.float32
            assert (mine - exact).norm() < rel * exact.norm(), (half, lod)


# ---- losses and training ----


def test_r1_of_a_linear_discriminator_is_the_squared_norm_of_its_weights():
    a, x = torch.randn(3, 8, 8), torch.randn(2, 3, 8, 8, requires_grad=True)
    expected = a.square().sum().expand(2)
    torch.testing.assert_close(stylegan.r1_penalty((x * a).sum([1, 2, 3]), x), expected)


def test_penalties_are_those_of_images_enlarged_to_full_size():
    D = small_D().double().requires_grad_(True)
    D.grow(1.25)
    x, fake = torch.randn(2, 4, 3, 8, 8).double()
    small, large = x.clone().requires_grad_(), stylegan.upscale(x).requires_grad_()
    r1 = [stylegan.r1_penalty(D(img), img) * stylegan.share_of(D, img) for img in (small, large)]
    torch.testing.assert_close(*r1)
    u = torch.rand(4, 1, 1, 1).double()
    torch.testing.assert_close(
        stylegan.gradient_penalty(D, x, fake, u, target=2.0),
        stylegan.gradient_penalty(D, stylegan.upscale(x), stylegan.upscale(fake), u, target=2.0),
    )


@pytest.mark.parametrize("kind", stylegan.LOSSES)
def test_losses_fall_as_logits_move_to_where_they_should(kind):
    logits = torch.tensor([[-0.3], [0.4]], requires_grad=True)
    signs = {"G": -1, "fake": 1, "real": -1}
    for name, sign in signs.items():
        if name == "G":
            loss = stylegan.generator_loss(logits, kind)
        else:
            loss = stylegan.discriminator_loss(logits, name == "real", kind)
        assert loss.shape == (2,)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        assert (grad * sign > 0).all(), name


def options_of_a_step(**more):
    options = dict(mixing=0.9, loss="logistic", r1_gamma=10.0, r2_gamma=0.0, gp_lambda=0.0)
    return types.SimpleNamespace(**options | dict(gp_target=1.0, batch_gpu=None) | more)


class Runner(Eager):
    """Stands in for common.Run: draws, and optimisers that are told to step."""

    def __init__(self, on_step=lambda opt: None):
        self.on_step = on_step

    def rand(self, *shape, shared=False):
        return torch.rand(shape)

    def randn(self, *shape):
        return torch.randn(shape)

    def backward(self, loss):
        loss.backward()

    def step(self, opt):
        self.on_step(opt)
        opt.step()
        opt.zero_grad(set_to_none=True)


@pytest.mark.parametrize("loss", stylegan.LOSSES)
def test_a_step_trains_d_then_averages_then_trains_g(loss):
    G, D = (net.train().requires_grad_(True) for net in (small_G(), small_D()))
    G_ema, steps = copy.deepcopy(G), []
    opts = [torch.optim.SGD(net.parameters(), 1e-3) for net in (G, D)]
    for net in (G, D, G_ema):
        net.grow(0.4)
    before = copy.deepcopy(G.state_dict())

    def on_step(opt):
        other = D if opt is opts[0] else G
        assert all(p.grad is None for p in other.parameters())
        steps.append("GD"[opts.index(opt)])
        assert all(torch.equal(p, before[k]) for k, p in G.named_parameters())

    args = options_of_a_step(loss=loss, **dict(r1_gamma=0.0, gp_lambda=0.0) | {
        k: v for k, v in stylegan.LOSSES[loss].items() if k != "lr_max"
    })  # fmt: skip
    losses = stylegan.train_step(
        G, D, G_ema, opts, torch.randn(4, 3, 16, 16), None, lambda n: None, 0.5, args,
        Runner(on_step),
    )  # fmt: skip
    assert steps == ["D", "G"]
    assert {"G", "D_fake", "D_real"} <= set(losses)
    assert ("reg/r1" in losses) == (args.r1_gamma > 0)
    assert ("reg/gp" in losses) == (args.gp_lambda > 0)
    # The average was taken between the two: G had not moved yet.
    assert all(torch.equal(p, before[k]) for k, p in G_ema.named_parameters())


def test_rounds_of_half_a_batch_make_the_mean_of_both_gradients():
    G, D = (net.double().requires_grad_(True) for net in (small_G(), small_D(mbstd_group=2)))
    z, real = torch.randn(4, 6).double(), torch.randn(4, 3, 16, 16).double()

    def gradients(batch_gpu, which):
        for net in (G, D):
            net.zero_grad()
        runner = Runner()
        runner.randn = lambda *shape: z[which]
        args = options_of_a_step(mixing=0, batch_gpu=batch_gpu, gp_lambda=0.0)
        stylegan.discriminator_phase(G, D, real[which], None, args, runner, "const")
        stylegan.generator_phase(G, D, len(z[which]), lambda n: None, args, runner, "const")
        params = [p for net in (G, D) for p in net.parameters()]
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]

    whole = gradients(2, slice(0, 4))
    halves = [gradients(None, slice(k, k + 2)) for k in (0, 2)]
    for mine, a, b in zip(whole, *halves, strict=True):
        torch.testing.assert_close(mine, (a + b) / 2)


def test_crossovers_lie_in_the_layers_that_are_grown(monkeypatch):
    G, args, seen = small_G(), options_of_a_step(mixing=0.9), []
    monkeypatch.setattr(stylegan, "mixed_ws", lambda G, z, c, z2, k: seen.append(int(k)))
    for lod, layers in ((1.7, 4), (0.0, 6)):
        G.grow(lod), seen.clear()
        for _ in range(2000):
            stylegan.mix(G, torch.randn(1, 6), None, args, Runner())
        assert set(seen) == {*range(1, layers), G.num_ws}
        assert abs(seen.count(G.num_ws) / 2000 - 0.1) < 0.03
        assert abs(seen.count(1) / 2000 - 0.9 / (layers - 1)) < 0.05


def test_the_published_schedule_of_1024_pixels():
    stages = stylegan.plan(8500, size=1024)
    lods = [math.ceil(s.lod) for s in stages if s.age == 0]
    assert lods == [7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0]  # fades begin just below theirs
    for kimg, res, batch, lr in [
        (0, 8, 256, 0.001), (700, 16, 128, 0.001), (2000, 32, 64, 0.001), (3100, 64, 32, 0.001),
        (4300, 128, 32, 0.0015), (6500, 256, 32, 0.002), (7000, 512, 32, 0.003),
        (8450, 1024, 32, 0.003),
    ]:  # fmt: skip
        stage = next(s for s in stages if s.images >= kimg * 1000)
        assert (stage.res, stage.batch) == (res, batch) and math.isclose(stage.lr, lr), kimg
    images, last = stylegan.images_before, stages[-1]
    assert images(stages, 5) == 5 * 256 and images(stages, 4 * len(stages) - 4) == last.images
    assert images(stages, 4 * len(stages)) == last.images + 4 * last.batch >= 8_500_000
    assert max(s.lr for s in stylegan.plan(8500, size=1024, lr_max=0.002)) == 0.002


def test_real_images_are_averages_of_boxes_and_fade_with_their_own(tmp_path):
    faces("d", 2, (16, 16), "png")
    source = common.open_data("d")
    data = common.ImageSet(source, lambda img: img)
    x = torch.tensor(data[0]).permute(2, 0, 1)[None].double()
    small = data.shrunk(4)[0]
    boxes = F.avg_pool2d(x, 4).round().byte()[0].permute(1, 2, 0).numpy()
    assert small.shape == (4, 4, 3) and np.array_equal(small, boxes)
    assert data.shrunk(1) is data
    x = torch.randn(1, 3, 8, 8)
    half = stylegan.upscale(F.avg_pool2d(x, 2))
    torch.testing.assert_close(stylegan.faded(x, 1.25), 0.75 * x + 0.25 * half)
    assert stylegan.faded(x, 2.0) is x


def test_adam_with_the_epsilon_of_tensorflow_takes_its_steps():
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]).double())
    opt = torch.optim.Adam([p], 0.1, stylegan.BETAS, stylegan.EPS)
    m, v, theta = 0, torch.zeros(2).double(), p.detach().clone()
    for t in range(1, 4):
        g = torch.tensor([3e-8, 0.5]).double() * t
        p.grad = g.clone()
        opt.param_groups[0]["eps"] = stylegan.tensorflow_eps(t)
        opt.step()
        m, v = g, 0.99 * v + 0.01 * g.square()  # beta1 = 0
        theta = theta - 0.1 * math.sqrt(1 - 0.99**t) * m / (v.sqrt() + 1e-8)
        torch.testing.assert_close(p.detach(), theta)


# ---- runs ----


training, trained = commands.trained_beside_the_tests(  # it grows from 8 to 16 pixels
    stylegan,
    "--size 16 --channel-base 256 --channel-max 16 --z-dim 16 --w-dim 16 --map-layers 2 --kimg 6"
    " --batch 32 --batches 8:32,16:32 --train-kimg 3 --fade-kimg 1 --r1-gamma 0.5 --ema-kimg 0.5"
    " --lr 0.004 --seed 0 --every 2",
)


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    out = tmp_path_factory.mktemp("conditional")
    main("--data", "toy", "--cond", "--out", out, *TINY)
    return out / "stylegan-toy-000"


def test_training_learns_and_grows(trained):
    scores = [line["fd8"] for line in jsonl(trained / "metrics.jsonl")]
    assert len(scores) == 3 and scores[-1] < 60  # 103 untrained
    log = jsonl(trained / "log.jsonl")
    assert [line["res"] for line in log] == [8, 8, 8, 16, 16, 16]
    assert log[0]["lod"] == 1 and log[-1]["lod"] == 0 and log[-1]["kimg"] >= 6
    assert {"loss/G", "loss/D_fake", "loss/D_real", "reg/r1"} <= set(log[0])
    assert Image.open(trained / "samples/0000063.png").size == (8 * 96, 4 * 96)
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    assert state["config"]["G_ema"]["lod"] == 0 and state["model"] == "stylegan"


@pytest.mark.parametrize("config", stylegan.CONFIGS)
def test_every_row_of_table_1_trains(tmp_path, config):
    options = [*TINY, "--config", config, "--kimg", 1, "--train-kimg", 1, "--fade-kimg", 0]
    if config in "AB":
        at = options.index("--map-layers")
        del options[at : at + 2]  # for the 0 of these rows
    main("--data", faces("d", size=(16, 16)), *options, "--out", tmp_path)
    folder = tmp_path / "stylegan-d-000"
    args = json.loads((folder / "args.json").read_text())
    G = torch.load(folder / "checkpoint.pt", weights_only=True)["config"]["G"]
    assert args["start_size"] == (4 if config == "A" else 8)
    assert args["mixing"] == (0.9 if config == "F" else 0)
    assert G["use_noise"] == (config in "EF") and G["const_input"] == (config in "DEF")
    assert G["use_styles"] == (config not in "AB") == (not G["pixel_norm"])
    assert G["blur"] == (config != "A") and G["map_layers"] == (0 if config in "AB" else 2)
    assert ("reg/gp" in jsonl(folder / "log.jsonl")[0]) == (config == "A")
    main("generate", "--checkpoint", folder, "--seeds", 1)
    G = stylegan.load_networks(folder)[0]["G_ema"].eval()
    w, whole = np.load("out/latents.npz")["w"], G.mapping(common.latents([1], G.config["z_dim"]))
    assert np.allclose(w, whole.detach().numpy(), atol=1e-6) == (
        config in "AB"
    )  # the others truncate it


@pytest.mark.parametrize(
    "options",
    [
        "--channels 1 --mirror",
        "--loss wgan-gp --start-size 4 --train-kimg 1 --fade-kimg 0",
        "--loss saturating --r2-gamma 1 --batch-gpu 20 --lr-rampup 2",
        "--batches 8:80,16:20 --batch-max 16:10 --mbstd-group 0 --cache off --workers 0",
    ],
)
def test_variants_train(tmp_path, options):
    main("--data", faces("d"), *TINY, "--out", tmp_path, *options.split())
    folder = tmp_path / "stylegan-d-000"
    for line in jsonl(folder / "log.jsonl"):
        assert all(math.isfinite(v) for v in line.values())
    if "--batches" in options:
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        assert state["step"] == 16 + 172  # 1,280 images by 80, the rest by 10
    if "--channels" in options:  # which a transfer keeps
        main("--data", "d", *TINY, "--out", tmp_path, "--checkpoint", folder)
        args = json.loads((tmp_path / "stylegan-d-001/args.json").read_text())
        assert args["channels"] == 1


def test_a_checkpoint_in_the_middle_of_growth_makes_its_pictures(conditional, tmp_path, capsys):
    main("--data", faces("d"), *TINY, "--kimg", 1, "--out", tmp_path)
    folder = tmp_path / "stylegan-d-000"
    G = stylegan.load_networks(folder)[0]["G_ema"]
    assert G.config["lod"] == 1 and G(torch.randn(1, 8)).shape[2] == 16
    main("generate", "--checkpoint", folder, "--seeds", 1)
    picture = np.asarray(Image.open("out/seed0001.png"))
    assert (picture[::2, ::2] == picture[1::2, 1::2]).all()  # 8 pixels, enlarged


@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 1]])
def test_labels_of_a_zip_train_a_conditional_model(tmp_path, labels):
    main("--data", labelled_zip("d.zip", labels), *TINY, "--cond", "--out", tmp_path)
    assert stylegan.load_networks(tmp_path / "stylegan-d-000")[0]["G"].config["c_dim"] == 4


def test_a_run_killed_twice_across_its_growth_ends_as_one_that_was_not(tmp_path):
    options = ["--data", faces(tmp_path / "d", 30), *TINY, "--mirror", "--kimg", 4]
    kills = [(25, 0.3), (50, 0.3)]  # of 100; the fade is from 28 to 52
    whole, folder = commands.whole_and_killed(stylegan, options, kills)
    expected, actual = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (whole, folder))
    assert expected["step"] == actual["step"] == 100
    for name, net in expected["nets"].items():
        assert all(torch.equal(actual["nets"][name][k], v) for k, v in net.items()), name
    logs = [jsonl(f / "log.jsonl") for f in (whole, folder)]
    for line in logs[0] + logs[1]:
        del line["sec"], line["mem_gb"]
    assert logs[0] == logs[1] and {line["lod"] % 1 > 0 for line in logs[0]} == {True, False}
    assert jsonl(whole / "metrics.jsonl") == jsonl(folder / "metrics.jsonl")


IN_DOUBLE = """import sys, torch, common, stylegan
torch.set_default_dtype(torch.float64)
to_float, latents = common.to_float, common.latents
common.to_float = lambda images, device: to_float(images, device).double()
common.latents = lambda *args: latents(*args).double()
sys.exit(common.exit_status(stylegan.main))
"""


def test_resuming_a_finished_run_changes_nothing(trained, capsys):
    before = (trained / "args.json").read_bytes()
    main("--resume", trained, "--lr", 0.01, "--kimg", 5)
    assert "this run is finished" in capsys.readouterr().out
    assert (trained / "args.json").read_bytes() == before


def test_two_processes_make_the_update_of_one(tmp_path, monkeypatch):
    # In float64: where a gradient should be 0, as that of a bias before an instance norm of a flat
    # map, Adam makes steps of rounding, and that of b4.conv0 starts flat.
    Path("double.py").write_text(IN_DOUBLE)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    options = ["--data", faces(tmp_path / "d"), *TINY, "--batch", 200, "--mbstd-group", 1]
    options += ["--device", "cpu", "--kimg", 2]
    commands.on_one_and_two_processes("double.py", *options)
    one, two = (
        torch.load(tmp_path / n / "stylegan-d-000/checkpoint.pt", weights_only=True)
        for n in ("one", "two")
    )
    assert one["step"] == two["step"] == 12 and len(two["ranks"]) == 2
    for name, net in one["nets"].items():
        for key, t in net.items():
            assert t.dtype == torch.float64
            atol = 1e-7 if key == "synthesis.b4.conv0.bias" else 1e-10
            torch.testing.assert_close(
                t, two["nets"][name][key], rtol=1e-10, atol=atol, msg=f"{name}.{key}"
            )


def test_a_batch_smaller_than_the_number_of_processes_is_refused():
    with pytest.raises(common.UserError, match="8 pixels"):
        stylegan.plan(1, size=32, batches={8: 4}, world=8)


def test_processes_may_not_change_where_batches_depend_on_them(tmp_path, monkeypatch, capsys):
    options = [*TINY, "--kimg", 1, "--batch-max", "8:20", "--out", tmp_path]
    main("--data", faces("d"), *options)
    schedule = stylegan.schedule
    doubled = {"world": 2}
    monkeypatch.setattr(stylegan, "schedule", lambda *a, **k: schedule(*a, **k | doubled))
    assert "go on with 1 processes" in fails(capsys, "--resume", tmp_path / "stylegan-d-000")


def test_transfer_goes_on_from_the_resolution_of_the_checkpoint(trained, tmp_path, capsys):
    main(*TINY, "--data", faces("d"), "--checkpoint", trained, "--size", 32, "--kimg", 1,
         "--out", tmp_path)  # fmt: skip
    assert "from 16 to 16 pixels" in capsys.readouterr().out
    args = json.loads((tmp_path / "stylegan-d-000/args.json").read_text())
    assert args["start_size"] == 16 and args["use_styles"] and args["config"] is None


def test_transfer_copies_a_smaller_network(trained, tmp_path, capsys):
    options = [*TINY, "--data", faces("d"), "--checkpoint", trained, "--size", 32, "--kimg", 1]
    main(*options, "--z-dim", 16, "--w-dim", 16, "--channel-base", 256, "--channel-max", 16,
         "--out", tmp_path)  # fmt: skip
    said = capsys.readouterr().out
    for name in ("G", "D", "G_ema"):
        assert re.search(rf"^{name}: \d+ of \d+ tensors copied; \d+ new: ", said, re.M), said


# ---- generate, evaluate ----


def test_generate_truncates_by_default(trained):
    text = run("generate", "--checkpoint", trained, "--seeds", "0-2")
    assert "3 pictures" in text
    G = stylegan.load_networks(trained)[0]["G_ema"].eval()
    ws = G.mapping(common.latents([0, 1, 2], 16), psi=0.7, cutoff=8)
    np.testing.assert_allclose(np.load("out/latents.npz")["w"], ws.detach(), atol=1e-6)


def test_bands_are_the_papers():
    with torch.device("meta"):
        sizes = {
            s: stylegan.Generator(img_resolution=s, z_dim=8, w_dim=8) for s in (8, 32, 64, 1024)
        }
    bands = {s: {k: (v[0], v[-1]) for k, v in stylegan.bands(G).items()} for s, G in sizes.items()}
    assert bands[1024] == {"coarse": (0, 3), "middle": (4, 7), "fine": (8, 17)}
    assert bands[64] == {"coarse": (0, 3), "middle": (4, 7), "fine": (8, 9)}
    assert bands[32] == {"coarse": (0, 3), "middle": (4, 5), "fine": (6, 7)}
    assert bands[8] == {"coarse": (0, 1), "fine": (2, 3)}


def test_figures_of_the_paper(trained, tmp_path):
    G = ["generate", "--checkpoint", trained, "--psi", 1]
    main(*G, "--figure", "mixing", "--mix-rows", "1,2", "--mix-cols", "1,5,6")
    cell, left = 132, Image.open("out/mixing.png").width - 4 - 4 * 132
    sheet = np.asarray(Image.open("out/mixing.png")).astype(int)

    def tile(x, y):
        x, y = left + 4 + x * cell, 18 + y * cell
        return sheet[y : y + 128, x : x + 128]

    assert sheet.shape[0] == 7 * cell + 18
    for band in range(3):  # seed 1 in itself
        assert np.array_equal(tile(1, 1 + 2 * band), tile(0, 1 + 2 * band))
    assert np.array_equal(tile(0, 1), tile(1, 0))
    assert not np.array_equal(tile(2, 1), tile(2, 3))  # coarse and middle styles of seed 5

    main(*G, "--figure", "noise", "--seeds", "3,4")
    assert Image.open("out/noise.png").height == 2 * cell + 18
    main(*G, "--figure", "truncation", "--seeds", "3,4")
    sheet, left = np.asarray(Image.open("out/truncation.png")).astype(int), 0
    left = sheet.shape[1] - 4 - 6 * cell
    assert np.array_equal(tile(3, 0), tile(3, 1))  # psi 0: the mean picture


def test_noise_of_a_figure_has_the_layers_that_it_says(trained, monkeypatch):
    G = stylegan.load_networks(trained)[0]["G_ema"].eval().requires_grad_(False)
    drawn = []
    synthesis = type(G.synthesis).forward

    def forward(self, ws, noise="random"):
        if callable(noise):
            drawn.append({res: bool(noise(1, 1, res, res).any()) for res in (4, 8, 16)})
        return synthesis(self, ws, noise)

    monkeypatch.setattr(type(G.synthesis), "forward", forward)
    args = types.SimpleNamespace(seeds=[1], psi=1, cutoff=None)
    table, rows = stylegan.figure_noise(args, G, None, realisations=3)
    assert list(table) == [
        "noise", "again", "deviation x 4", "none", "from 8 px", "below 8"
    ] and rows == ["seed 1"]  # fmt: skip
    assert drawn[:5] == [{4: True, 8: True, 16: True}] * 5
    assert drawn[5:] == [{4: False, 8: True, 16: True}, {4: True, 8: False, 16: False}]


def test_evaluate_prints_path_lengths_in_z_and_w_and_separability(trained, monkeypatch, capsys):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, len(common.TOY_BINARY)))
    accuracy = dict.fromkeys(common.TOY_BINARY, 0.9)
    monkeypatch.setattr(common, "toy_classifier", lambda *args, **kw: (net, accuracy))
    main("evaluate", "--checkpoint", trained, "--samples", 200, "--out", "scores.json")
    text, scores = capsys.readouterr().out, json.loads(Path("scores.json").read_text())
    for line in ("FID and KID", "precision and recall", "perceptual path length"):
        assert len(re.findall(f"^{line} (?:are|is) left out: .*$", text, re.M)) == 1, text
    for name in ("path_zfull", "path_wfull", "path_zend", "path_wend"):
        assert scores[name] > 0 and f"{name} {scores[name]:.4g}" in text
    assert scores["ls"]["n"] == 200 and scores["ls"]["w"] >= 1
    assert text.count("H(Y|X) in bits") == len(common.TOY_BINARY)


def test_labels_are_asked_for_and_matter(conditional, capsys):
    assert "pass --class" in fails(capsys, "generate", "--checkpoint", conditional)
    main("generate", "--checkpoint", conditional, "--seeds", 1, "--class", 2)
    main("evaluate", "--checkpoint", conditional, "--samples", 20, "--metrics", "fd8,ls,path")
    assert "linear separability is left out" in capsys.readouterr().out


# ---- official files ----


def to_tensorflow(net):
    """The variables of the TensorFlow release, as its fused_scale "auto" has them."""
    found, in_G = {}, net.config["kind"] == "G"
    size = net.config["img_resolution"]
    leaves = {"affine.weight": "StyleMod/weight", "affine.bias": "StyleMod/bias"}
    leaves |= {"noise_strength": "Noise/weight", "weight": "weight", "bias": "bias"}
    for name, t in net.state_dict().items():
        if name == "mapping.w_avg":
            found["dlatent_avg"] = t
        elif name == "mapping.embed":
            found["mapping/LabelConcat/weight"] = t
        elif m := re.fullmatch(r"mapping\.fc(\d+)\.(\w+)", name):
            found[f"mapping/Dense{m[1]}/{m[2]}"] = t.T if t.ndim == 2 else t
        elif m := re.fullmatch(r"synthesis\.b(\d+)\.conv(\d)\.noise_const", name):
            number = 2 * int(math.log2(int(m[1]))) - 4 + int(m[2])
            found[f"synthesis/noise{number}"] = t[None, None]
        elif name == "synthesis.b4.const":
            found["synthesis/4x4/Const/const"] = t[None]
        elif name == "synthesis.b4.dense.weight":
            found["synthesis/4x4/Dense/weight"] = t.T
        else:
            block, layer, leaf = name.removeprefix("synthesis.").split(".", 2)
            res = int(block[1:])
            lod = int(math.log2(size // res))
            first = "Const" if "synthesis.b4.const" in net.state_dict() else "Dense"
            path = f"{res}x{res}/" + {
                "conv0": ("Conv0_up" if res > 4 else first) if in_G else "Conv0",
                "conv1": ("Conv1" if res > 4 else "Conv") if in_G else "Conv1_down",
                "conv": "Conv", "fc": "Dense0", "out": "Dense1",
            }.get(layer, "")  # fmt: skip
            path = {"torgb": f"ToRGB_lod{lod}", "fromrgb": f"FromRGB_lod{lod}"}.get(layer, path)
            if path.endswith("Conv0_up") and res >= 128 and t.ndim == 4:
                t = t.flip([2, 3])
            t = t.permute(2, 3, 1, 0) if t.ndim == 4 else t.T if t.ndim == 2 else t
            found[f"{'synthesis/' * in_G}{path}/{leaves[leaf]}"] = t
    return {k: t.numpy().copy() for k, t in found.items()}


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (16, dict(c_dim=3)),
        (32, dict(lod=1.5, use_noise=False)),
        (128, dict(channel_base=128)),
        (16, dict(use_styles=False, pixel_norm=True, instance_norm=False, const_input=False)),
        (16, dict(map_layers=0, z_dim=8, use_styles=False, blur=False)),
    ],
)
def test_an_official_file_makes_the_pictures_and_logits_of_its_networks(size, options):
    both = dict(img_resolution=size, c_dim=options.get("c_dim", 0), lod=options.get("lod", 0.0))
    both |= {k: options[k] for k in ("blur", "channel_base") if k in options}
    G, D = small_G(**options | both), small_D(**both, mbstd_group=2)
    static = {"use_pixel_norm": G.config["pixel_norm"], "mbstd_group_size": 2}
    static |= {"use_instance_norm": G.config["instance_norm"]}
    static |= {} if G.config["blur"] else {"blur_filter": None}
    lod = np.float32(both["lod"])
    g = to_tensorflow(G) | {"lod": lod, "synthesis/lod": lod}
    nets = {"G": g, "D": to_tensorflow(D) | {"lod": lod}, "Gs": g}
    official_files.write_tf_pickle("net.pkl", nets, static, version=3)
    found, _ = stylegan.load_networks("net.pkl")
    assert set(found) == {"G", "D", "G_ema"}
    z, x = torch.randn(4, G.config["z_dim"]), torch.randn(4, 3, size, size)
    c = torch.eye(3)[[0, 1, 2, 0]] if both["c_dim"] else None
    torch.testing.assert_close(
        found["G_ema"].eval()(z, c, psi=0.5, noise="const"), G(z, c, psi=0.5, noise="const"),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip
    torch.testing.assert_close(found["D"](x, c), D(x, c), rtol=1e-5, atol=1e-5)
    label = ["--class", 0] if both["c_dim"] else []
    main("generate", "--checkpoint", "net.pkl", "--seeds", 3, *label)


def test_networks_of_the_other_papers_are_recognised(capsys):
    from test_stylegan2 import small_D as D2
    from test_stylegan2 import small_G as G2
    from test_stylegan2 import write_official

    import stylegan2

    for kind in ("tf", "pytorch"):
        write_official("two.pkl", kind, G2(), D2())
        line = fails(capsys, "generate", "--checkpoint", "two.pkl")
        assert "StyleGAN2" in line and "stylegan2.py" in line
    g, d = to_tensorflow(small_G()), to_tensorflow(small_D())
    official_files.write_tf_pickle("one.pkl", {"G": g, "D": d, "Gs": g}, version=3)
    capsys.readouterr()
    assert common.exit_status(lambda: stylegan2.main(["generate", "--checkpoint", "one.pkl"])) == 2
    assert "stylegan.py" in capsys.readouterr().err


# ---- mistakes ----


def test_mistakes_in_options_end_in_one_line(capsys, trained, conditional):
    faces("d"), faces("wide", size=(20, 16))
    net, small = ["--checkpoint", trained], ["--data", "d", *TINY]
    cases = [
        (["--data", "wide", *TINY[2:]], "not square"),
        (["--data", "nowhere", *TINY], "nowhere"),
        ([*small, "--cond"], "no labels"),
        ([*small, "--start-size", 32], "--start-size 32"),
        ([*small, "--start-size", 12], "--start-size 12"),
        ([*small, "--batches", "8=3"], "8:256,16:128"),
        ([*small, "--batches", "8:0"], "8:256,16:128"),
        ([*small, "--batches", "7:40"], "8:256,16:128"),
        ([*small, "--checkpoint", trained, "--config", "C"], "other layers than row C"),
        ([*small, "--batch-gpu", 3], "--batch-gpu 3"),
        ([*small, "--config", "B", "--map-layers", 0, "--w-dim", 16], "--map-layers 0"),
        ([*small, "--map-layers", 0, "--cond"], "--map-layers 0"),
        ([*small, "--loss", "nonsense"], "nonsense"),
        ([*small, "--precision", "fp16", "--device", "cpu"], "needs a GPU"),
        ([*small, "--mixing", 1.5], "--mixing"),
        (["--resume", "nowhere"], "--resume nowhere"),
        (["--resume", trained, "--batch", 64], "--batch was 32"),
        (["--resume", trained, "--fade-kimg", 5], "--fade-kimg was 1"),
        (["--resume", trained, "--batches", "8:64"], "--batches was"),
        (["--resume", trained, "--loss", "wgan-gp"], "--loss was logistic"),
        (["--resume", trained, "--config", "A"], "--config was left out"),
        (["generate", *net, "--figure", "noise", "--film", "x.webp"], "goes without"),
        (["generate", *net, "--figure", "mixing"], "--mix-rows"),
        (["generate", *net, "--figure", "nonsense"], "nonsense"),
        (["generate", *net, "--class", 0], "--class 0"),
        (["generate", "--checkpoint", conditional], "pass --class"),
        (["evaluate", *net, "--metrics", "nonsense"], "fd8, fid, pr, path, ppl, ls"),
        (["evaluate", *net, "--data", "nowhere"], "nowhere"),
    ]
    commands.each_ends_in_one_line(fails, capsys, cases)


def test_the_networks_and_losses_can_be_pasted_elsewhere(trained):
    text = (ROOT / "stylegan.py").read_text()
    bar = "# " + "=" * 77 + "\n"
    sections = dict(zip(*[iter(text.split(bar)[1:])] * 2, strict=True))
    names = "import math\nimport torch\nimport torch.nn.functional as F\nfrom torch import nn\n"
    names += "import ops_cuda as ops\nW_AVG_BETA, DRIFT = 0.995, 0.001\n"
    here = {}
    exec(names + sections["# Networks\n"] + sections["# Losses\n"], here)
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    G = here["build"](state["config"]["G_ema"]).eval()
    G.load_state_dict(state["nets"]["G_ema"])
    img = G(torch.randn(4, G.config["z_dim"]), psi=0.7, noise="const").detach().requires_grad_()
    D = here["build"](state["config"]["D"])
    D.load_state_dict(state["nets"]["D"])
    assert here["r1_penalty"](D(img), img).shape == (4,)
    assert here["discriminator_loss"](D(img), True, "wgan-gp").shape == (4,)
    assert ops.SQRT2 == math.sqrt(2)
