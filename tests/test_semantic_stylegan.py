"""semantic_stylegan.py: networks, losses, official files, and its commands run as a user does."""

import argparse
import json
import math
import re
import types
from pathlib import Path

import commands
import numpy as np
import pytest
import torch
from commands import ROOT, no_stray_files, one_thread  # noqa: F401
from eager import Eager
from PIL import Image
from test_stylegan2 import jsonl, labelled_faces
from test_stylegan2_ada import definitions

import common
import ops_cuda as ops
import semantic_stylegan

script, run, main, fails = commands.of(semantic_stylegan)
WIDTHS = (
    "--size 16 --coarse-size 8 --min-size 4 --layers 4 --base-layers 2 --depth-layers 3"
    " --local-channels 8 --coarse-channels 32 --channel-base 512 --channel-max 32 --w-dim 32"
    " --map-layers 2 --see-through glasses"
).split()
TINY = [*WIDTHS, *"--batch 4 --mbstd-group 2 --iters 4 --every 2 --workers 1".split()]
TOY = list(common.TOY_REGIONS)
NUM_WS = 2 + 2 * len(TOY)


def codes_of(name):
    """Which of the ws are structure and texture of a region."""
    k = 2 + 2 * TOY.index(name)
    return [k, k + 1]


def small_G(**options):
    """A generator with all tensors random, biases and noise strengths too."""
    sizes = dict(size=16, regions=["sky", "face", "hat"], w_dim=8, map_layers=2, coarse_size=8)
    sizes |= dict(min_size=4, layers=4, base_layers=1, depth_layers=2, local_channels=4)
    sizes |= dict(coarse_channels=6, see_through=[2], channels={8: 8, 16: 4})
    G = semantic_stylegan.Generator(**sizes | options)
    return shuffled(G)


def small_D():
    return shuffled(semantic_stylegan.Discriminator(16, 3, {4: 8, 8: 6, 16: 4}))


def shuffled(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, t in net.state_dict().items():
        draw = torch.randn(t.shape, generator=generator)
        if name.endswith(("bias", "strength", "modulation")):
            draw = 0.3 * draw + name.endswith(("affine_bias", "modulation"))
        t.copy_(100 * draw if re.search(r"mapping\.fc\d+\.weight", name) else draw)
    semantic_stylegan.update_w_avg(net) if hasattr(net, "mapping") else None
    return net.eval().requires_grad_(False)


# ---- networks ----


def count(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("size", "G_", "local", "render", "mapping", "position", "D_"),
    [
        (512, 20_320_358, 403_264 + 12 * 403_393, 12_972_698, 2_101_248, 2432, 51_406_593),
        (256, 20_208_020, 403_264 + 12 * 403_393, 12_860_616, 2_101_248, 2176, 51_169_793),
    ],
)
def test_networks_have_the_official_numbers_of_parameters(
    size, G_, local, render, mapping, position, D_
):
    with torch.device("meta"):
        G, D = semantic_stylegan.Generator(size), semantic_stylegan.Discriminator(size)
    parts = [count(net) for net in (G, G.local, G.render, G.mapping, G.position, D)]
    assert parts == [G_, local, render, mapping, position, D_]


def test_every_official_name_is_a_tensor_of_ours_and_there_are_as_many_as_officially():
    with torch.device("meta"):
        G, D = semantic_stylegan.Generator(512), semantic_stylegan.Discriminator(512)
    for net, official, n in ((G, to_official_G(G), 732), (D, to_official_D(D), 108)):
        assert len(official) == n
        names = {semantic_stylegan.our_name(name)[0] for name in official} - {None}
        assert names == net.state_dict().keys()


def test_layers_follow_base_structure_and_texture_codes_and_the_background_has_no_base():
    with torch.device("meta"):
        G = semantic_stylegan.Generator()
    assert G.num_ws == 28
    rows = G.expand(torch.arange(28.0).view(1, 28, 1)).flatten().int().tolist()
    wanted = [2] * 6 + [3] * 4
    for k in range(1, 13):
        wanted += [0, 1] + [2 + 2 * k] * 4 + [3 + 2 * k] * 4
    assert rows == wanted and len(rows) == 130


@pytest.mark.parametrize(("frequencies", "features"), [(9, 38), (8, 34)])
def test_positions_are_two_coordinates_and_waves_of_them(frequencies, features):
    net = semantic_stylegan.FourierFeatures(4, 64, frequencies)
    found = net.features.view(features, 64, 64)
    assert found[:2, 0, 0].tolist() == [-1, -1] and found[:2, -1, -1].tolist() == [1, 1]
    assert found[:2, 0, -1].tolist() == [1, -1]  # x, then y
    for k in range(frequencies):  # sines, then cosines
        sin, cos = math.sin(2**k), math.cos(2**k)
        wanted = torch.tensor([sin, -sin, cos, cos])
        torch.testing.assert_close(found[2 + 4 * k : 6 + 4 * k, 0, -1], wanted)
    assert net().shape == (4, 64 * 64)


def test_weights_of_what_hides_add_up_to_1_and_so_do_the_masks():
    depth = torch.randn(2, 5, 6, 6, dtype=torch.float64)
    m, a = semantic_stylegan.fusion_weights(depth, None, (3, 4))
    one = torch.ones(2, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(m.sum(1), one)
    torch.testing.assert_close(a[:, :3].sum(1), one, atol=1e-6, rtol=0)
    assert torch.equal(a[:, 3:], m[:, 3:])
    torch.testing.assert_close(a[:, 0] / a[:, 1], m[:, 0] / m[:, 1])
    m, a = semantic_stylegan.fusion_weights(depth)
    assert torch.equal(m, a)


def test_showing_all_regions_changes_nothing_and_one_region_alone_is_everywhere():
    depth = torch.randn(2, 3, 6, 6, dtype=torch.float64).clamp(-1, 1)
    for clear in ((), (2,)):
        plain = semantic_stylegan.fusion_weights(depth, None, clear)
        for x, y in zip(
            plain, semantic_stylegan.fusion_weights(depth, torch.ones(2, 3), clear), strict=True
        ):
            torch.testing.assert_close(x, y, atol=1e-7, rtol=0)
    m, a = semantic_stylegan.fusion_weights(depth, torch.tensor([[1.0, 0, 0], [0, 1, 0]]))
    for n in (0, 1):
        torch.testing.assert_close(m[n, n], torch.ones(6, 6).double(), atol=1e-6, rtol=0)
        assert m[n].sum(0).max() < 1 + 1e-12 and m[n, 2].max() == 0


def test_a_texture_code_leaves_depths_and_masks_as_they_are():
    G, ws = small_G(), torch.randn(2, 7, 8)
    before = G.synthesis(ws, "const")
    for k in range(3):
        changed = ws.clone()
        changed[:, 1 + 2 * k + 1] += 1
        after = G.synthesis(changed, "const")
        assert torch.equal(after.depth, before.depth) and torch.equal(after.coarse, before.coarse)
        assert (after.img - before.img).abs().max() > 1e-3


def test_a_structure_code_moves_the_depth_of_its_region_and_of_no_other():
    G, ws = small_G(), torch.randn(2, 7, 8)
    before = G.synthesis(ws, "const").depth
    for k in range(3):
        changed = ws.clone()
        changed[:, 1 + 2 * k] += 1
        after = G.synthesis(changed, "const").depth
        others = [j for j in range(3) if j != k]
        assert torch.equal(after[:, others], before[:, others])
        assert torch.equal(after[:, k], before[:, k]) == (k == 0)  # the background has no depth
    changed = ws.clone()
    changed[:, 0] += 1  # base: every region but the background
    after = G.synthesis(changed, "const").depth
    assert [torch.equal(after[:, k], before[:, k]) for k in range(3)] == [True, False, False]
    assert before[:, 0].abs().max() == 0


@pytest.mark.parametrize("refine", [True, False])
def test_read_outs_of_zero_leave_the_masks_or_nothing(refine):
    G = small_G(residual_refine=refine)
    for head in G.render.to_seg:
        for p in head.parameters():
            p.zero_()
    picture = G(torch.randn(2, 8), noise="const")
    assert picture.coarse.abs().max() <= 1
    torch.testing.assert_close(picture.coarse.sum(1), torch.full((2, 8, 8), 2.0 - 3))
    wanted = ops.upsample2d(picture.coarse, G.render.fir) * refine  # the masks have half the side
    torch.testing.assert_close(picture.seg, wanted)


def test_texture_teaches_structure_unless_it_is_detached():
    for detach in (False, True):
        G = small_G(detach_texture=detach).requires_grad_(True)
        codes = G.expand(torch.randn(1, 7, 8)).requires_grad_(True)
        h, _ = G.local(G.position(), codes.unflatten(1, (3, 4)))
        h.square().sum().backward()
        reached = codes.grad.unflatten(1, (3, 4))[0].abs().sum([0, 2]) > 0
        assert reached.tolist() == [not detach] * 2 + [True] * 2


def test_what_convolutions_read_is_channels_last():
    order = torch.channels_last
    G, D = (net.to(memory_format=order) for net in (small_G(), small_D()))
    seen = []

    def look(layer, inputs):
        seen.append(inputs[0].is_contiguous(memory_format=order))

    for layer in (*G.render.layers, *D.of_img, *D.of_seg):
        layer.register_forward_pre_hook(look)
    G(torch.randn(2, 8))
    real = torch.zeros(2, 16, 16, 3).permute(0, 3, 1, 2)  # as the loader makes them
    D(real, common.one_hot_seg(torch.zeros(2, 16, 16), 3))
    assert len(seen) > 8 and all(seen)


def test_psi_0_and_constant_noise_give_one_picture_for_all_z():
    G = small_G()
    pictures = G(torch.randn(2, 8), psi=0.0, noise="const").img
    torch.testing.assert_close(pictures[0], pictures[1])
    again, noisy = (G(torch.zeros(1, 8), 0.0, n).img[0] for n in ("const", "random"))
    torch.testing.assert_close(again, pictures[0])
    assert (noisy - again).abs().max() > 1e-3


def test_mean_w_is_that_of_latents():
    G, z = small_G(), torch.randn(20_000, 8)
    torch.testing.assert_close(G.mapping.w_avg, G.mapping(z)[:, 0].mean(0), rtol=0, atol=0.05)
    assert G.mapping.w_avg.abs().max() > 0.1


def test_the_discriminator_judges_batches_of_any_size():
    D = small_D()
    for n, group in ((8, 4), (6, 3), (5, 1), (1, 1)):
        assert semantic_stylegan.largest_divisor(n, 4) == group
        logits = D(torch.randn(n, 3, 16, 16), torch.randn(n, 3, 16, 16))
        assert logits.shape == (n, 1) and logits.isfinite().all()


def test_both_branches_count_and_without_a_segmentation_the_image_alone():
    D, img, seg = small_D(), torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16)
    both, alone = D(img, seg), D(img)
    assert (D(seg, img) - both).abs().max() > 1e-3 < (both - alone).abs().max()
    D.of_seg.register_forward_hook(lambda m, x, y: 0 * y)
    assert torch.equal(D(img, seg), alone)


def test_what_is_said_to_be_stylegan2s_is():
    first, copy = definitions("stylegan2.py"), definitions("semantic_stylegan.py")
    for name in ("Linear", "Conv2d", "normalize", "minibatch_std", "logistic_loss", "fir_filter"):
        assert copy[name] == first[name], name
    assert copy["build"] == first["build"]


def test_networks_that_do_not_fit_together_are_refused():
    for wrong in (
        dict(coarse_size=16), dict(min_size=8), dict(depth_layers=5), dict(base_layers=3),
        dict(see_through=[0]), dict(see_through=[3]),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            small_G(**wrong)


# ---- losses and one step ----


def test_r1_of_a_linear_discriminator_is_the_squared_norm_of_its_weights():
    a, b = torch.randn(2, 3, 8, 8)
    x, y = torch.randn(2, 5, 3, 8, 8).unbind()
    x, y = x.requires_grad_(), y.requires_grad_()
    logits = (x * a + y * b).sum([1, 2, 3])
    img, seg = semantic_stylegan.r1_penalties(logits, x, y)
    torch.testing.assert_close(img, a.square().sum().expand(5))
    torch.testing.assert_close(seg, b.square().sum().expand(5))
    (alone,) = semantic_stylegan.r1_penalties((x * a).sum([1, 2, 3]), x)
    torch.testing.assert_close(alone, img)


def test_the_mask_loss_is_0_where_the_segmentation_is_the_mask_and_the_square_of_what_is_added():
    coarse = torch.randn(2, 3, 8, 8)
    seg = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert semantic_stylegan.mask_loss(seg, coarse) == 0
    torch.testing.assert_close(semantic_stylegan.mask_loss(seg + 0.5, coarse), torch.tensor(0.25))


def test_path_lengths_of_a_linear_generator_are_those_of_its_matrix():
    A, codes = torch.randn(3 * 4 * 4, 6 * 5).double(), torch.randn(2, 6, 5).double()
    codes.requires_grad_()
    img, y = (codes.flatten(1) @ A.T).view(2, 3, 4, 4), torch.randn(2, 3, 4, 4).double()
    lengths = semantic_stylegan.path_lengths(img, codes, y)
    J = (y.flatten(1) @ A / 4).view(2, 6, 5)  # 4: the side of the image
    torch.testing.assert_close(lengths, J.square().sum(2).mean(1).sqrt())


def test_mixed_faces_keep_their_base_and_never_have_a_foreign_structure_with_their_own_texture():
    ws, ws2 = torch.zeros(3, 2 + 2 * 4, 1), torch.ones(3, 2 + 2 * 4, 1)
    r = torch.randint(3, (3, 4))
    r[0] = torch.tensor([0, 1, 2, 0])
    found = semantic_stylegan.mixed_ws(ws, ws2, r)[:, :, 0]
    assert found[0].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 0, 0]
    structure, texture = found[:, 2::2], found[:, 3::2]
    assert torch.equal(texture, (r >= 1).float()) and torch.equal(structure, (r == 2).float())


class Draws(Eager):
    """What train_step needs of common.Run."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def rand(self, n, *shape, shared=False):
        return torch.rand(n, *shape, generator=self.generator)

    def randn(self, n, *shape):
        return torch.randn(n, *shape, generator=self.generator)

    def mean(self, x):
        return x

    def backward(self, loss):
        loss.backward()

    def step(self, *optimizers):
        for opt in optimizers:
            opt.step()
            opt.zero_grad()


def test_batches_are_mixed_as_a_whole_and_as_often_as_asked():
    G, runner = small_G(base_layers=1), Draws()
    args = types.SimpleNamespace(mixing=0.3)
    mixed, takes = 0, torch.zeros(3)
    for _ in range(400):
        codes = semantic_stylegan.mix(G, 4, args, runner).unflatten(1, (3, 4))
        structure, texture = codes[:, :, 1], codes[:, :, 3]
        base = codes[:, 1:, 0]
        assert torch.equal(base[:, 0], base[:, 1])  # one of the face, not of the region
        own_structure = (structure[:, 1:] == base).all(2)
        own_texture = (texture[:, 1:] == base).all(2)
        assert not (own_texture & ~own_structure).any()
        if not (own_structure & own_texture).all():
            mixed += 1
            takes += torch.stack(
                [
                    own_texture.sum(),
                    (own_structure & ~own_texture).sum(),
                    (~own_structure).sum(),
                ]
            )
    assert 90 < mixed < 150  # 120 of 400
    assert ((takes / takes.sum() - 1 / 3).abs() < 0.06).all()


def one_step(step, labelled=True, rates=(1e-3, 1e-3, 1e-3), **options):
    """(losses, {part: (weights before, after)}, mean path length) of train_step with SGD."""
    torch.manual_seed(0)
    G, D = small_G().requires_grad_(True), small_D().requires_grad_(True)
    rest = torch.nn.ModuleList([G.position, G.local, G.render])
    nets = dict(mapping=G.mapping, rest=rest, D=D)
    before = {name: [p.detach().clone() for p in net.parameters()] for name, net in nets.items()}
    opts = [
        torch.optim.SGD(net.parameters(), lr) for net, lr in zip(nets.values(), rates, strict=True)
    ]
    args = dict(r1_img=10.0, r1_seg=1000.0, r1_every=16, mixing=0.3, pl_weight=0.5, pl_every=4)
    args = types.SimpleNamespace(**args | dict(lambda_mask=100.0) | options)
    real, labels = torch.rand(4, 3, 16, 16) * 2 - 1, torch.randint(3, (4, 16, 16))
    seg, pl_mean = common.one_hot_seg(labels, 3) if labelled else None, torch.zeros(())
    losses = semantic_stylegan.train_step(G, D, opts, pl_mean, real, seg, step, args, Draws())
    weights = {name: (before[name], list(net.parameters())) for name, net in nets.items()}
    return losses, weights, pl_mean


def moved(pair):
    return any(not torch.equal(p, q) for p, q in zip(*pair, strict=True))


def test_regularizers_come_at_their_intervals_and_the_first_step():
    for step, r1, pl in ((0, True, True), (1, False, False), (4, False, True), (16, True, True)):
        losses, _, pl_mean = one_step(step)
        assert ({"reg/r1_img", "reg/r1_seg"} <= losses.keys()) == r1
        assert ("reg/pl" in losses) == pl == (pl_mean > 0).item()
    assert losses["reg/r1_seg"] > 0 < losses["reg/r1_img"]
    losses = one_step(0, r1_img=0.0, r1_seg=0.0, pl_weight=0.0)[0]
    assert not any(name.startswith("reg/") for name in losses)


def test_each_optimiser_moves_its_own_network():
    for i, name in enumerate(("mapping", "rest", "D")):
        rates = [1e-3 * (j == i) for j in range(3)]
        weights = one_step(0, rates=rates)[1]
        assert {other for other, pair in weights.items() if moved(pair)} == {name}


def test_without_labels_D_sees_images_alone(monkeypatch):
    losses, weights, _ = one_step(0, labelled=False)
    assert "reg/r1_seg" not in losses and all(map(moved, weights.values()))
    seen, forward = [], semantic_stylegan.Discriminator.forward

    def watch(D, *images):
        seen.append(sum(x is not None for x in images))
        return forward(D, *images)

    monkeypatch.setattr(semantic_stylegan.Discriminator, "forward", watch)
    one_step(0, labelled=False)
    assert set(seen) == {1}


def test_rates_betas_weights_and_half_life_are_the_official_ones():
    lr, betas = semantic_stylegan.lazy(semantic_stylegan.LR, semantic_stylegan.PL_EVERY)
    assert lr == pytest.approx(0.0016) and betas == pytest.approx((0, 0.991992))
    lr, betas = semantic_stylegan.lazy(semantic_stylegan.LR, semantic_stylegan.R1_EVERY)
    assert lr == pytest.approx(0.00188235, rel=1e-5) and betas == pytest.approx((0, 0.990585))
    weights = (semantic_stylegan.R1_IMG, semantic_stylegan.R1_SEG)
    assert [w / 2 * semantic_stylegan.R1_EVERY for w in weights] == [80, 8000]
    assert [0.1 * common.lr_ramp(t / 400) for t in (0, 20, 400)] == pytest.approx([0, 0.1, 0])


def test_the_average_takes_up_a_part_of_the_weights_and_keeps_its_own_noise():
    G = small_G()
    average = semantic_stylegan.average_of(G)
    before = {k: t.clone() for k, t in average.state_dict().items()}
    shuffled(G, 1)
    semantic_stylegan.update_ema(average, G, semantic_stylegan.EMA_BETA)
    parameters = dict(average.named_parameters())
    for name, t in average.state_dict().items():
        old, new = before[name], G.state_dict()[name]
        wanted = 0.9977844 * old + 0.0022156 * new if name in parameters else old
        torch.testing.assert_close(t, wanted)


# ---- train ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run folder of a short toy run."""
    out = tmp_path_factory.mktemp("trained")
    options = "--batch 8 --iters 80 --every 40 --r1-img 0.5 --r1-seg 20 --lr 0.004 --ema-beta 0.95"
    main("--data", "toy", *WIDTHS, *options.split(), "--workers", 1, "--out", out)
    return out / "semantic_stylegan-toy-000"


def state_of(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def weights_of(folder):
    return {(n, k): t for n, net in state_of(folder)["nets"].items() for k, t in net.items()}


def test_training_learns(trained):
    scores = [line["fd8"] for line in jsonl(trained / "metrics.jsonl")]
    assert len(scores) == 3 and scores[2] < scores[1] < scores[0] and scores[2] < scores[0] / 2


def test_train_leaves_a_run_folder(trained):
    names = {p.name for p in trained.iterdir()}
    assert {"args.json", "semantic_stylegan.py", "log.jsonl", "metrics.jsonl", "samples"} <= names
    assert {"checkpoint.pt", "checkpoint-0000080.pt"} <= names
    sheets = sorted(p.name for p in (trained / "samples").iterdir())
    assert sheets == ["0000040.png", "0000080.png", "reals.png"]
    # 16 faces: image, segmentation, masks, and the depths of 10 regions
    assert Image.open(trained / "samples/0000080.png").size == (16 * 96, 13 * 96)
    assert Image.open(trained / "samples/reals.png").size == (16 * 96, 2 * 96)
    state = state_of(trained)
    assert state["model"] == "semantic_stylegan" and state["step"] == 80
    assert list(state["nets"]) == ["G", "D", "G_ema"]
    assert state["config"]["G_ema"]["regions"] == TOY
    assert state["config"]["G_ema"]["see_through"] == [TOY.index("glasses")]
    log = jsonl(trained / "log.jsonl")[0]
    assert {"loss/mask", "loss/G", "loss/D_real", "reg/r1_img", "reg/r1_seg", "reg/pl"} <= set(log)


def test_a_run_that_was_killed_ends_as_one_that_was_not(tmp_path):
    data = labelled_faces(tmp_path / "d", 12)
    options = ["--data", data, "--classes", data / "names.txt", *TINY, "--iters", 60]
    options += ["--every", 15, "--keep-every", 30, "--aug", "--workers", 0]
    whole, folder = commands.whole_and_killed(semantic_stylegan, options, [(30, 0.05)])
    expected, actual = weights_of(whole), weights_of(folder)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[k], actual[k]) for k in expected)
    pl_mean = [state_of(f)["ranks"][0]["pools"]["pl"]["mean"] for f in (whole, folder)]
    assert torch.equal(*pl_mean) and pl_mean[0] > 0
    logs = [jsonl(f / "log.jsonl") for f in (whole, folder)]
    for line in logs[0] + logs[1]:
        del line["sec"], line["mem_gb"]
    assert logs[0] == logs[1] and logs[0][-1]["step"] == 60
    assert jsonl(whole / "metrics.jsonl") == jsonl(folder / "metrics.jsonl")
    assert {p.name for p in folder.glob("checkpoint-*")} == {
        "checkpoint-0000030.pt", "checkpoint-0000060.pt",
    }  # fmt: skip


IN_DOUBLE = """import sys, torch, common, semantic_stylegan
torch.set_default_dtype(torch.float64)
for name in ("to_float", "latents", "one_hot_seg"):
    setattr(common, name, lambda *args, f=getattr(common, name): f(*args).double())
sys.exit(common.exit_status(semantic_stylegan.main))
"""


def test_two_processes_make_the_update_of_one(tmp_path, monkeypatch):
    Path("double.py").write_text(IN_DOUBLE)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    options = ["--data", labelled_faces("d", 8), "--classes", "d/names.txt", *TINY]
    options += ["--mbstd-group", 1, "--mixing", 1]
    options += ["--pl-every", 2, "--r1-every", 2, "--device", "cpu"]
    commands.on_one_and_two_processes("double.py", *options)
    folders = [tmp_path / n / "semantic_stylegan-d-000" for n in ("one", "two")]
    one, two = map(weights_of, folders)
    for key, t in one.items():
        assert t.dtype == torch.float64
        torch.testing.assert_close(t, two[key], rtol=1e-9, atol=1e-9, msg=str(key))
    means = [state_of(f)["ranks"][0]["pools"]["pl"]["mean"].item() for f in folders]
    assert means[0] == pytest.approx(means[1], rel=1e-9) and means[0] > 0


def goblins(folder, n=4):
    """Pictures without labels."""
    Path(folder).mkdir()
    for k in range(n):
        common.toy_face(k, 1, 16).save(f"{folder}/{k}.png")
    return folder


@pytest.mark.parametrize("option", [[], ["--freeze-local"], ["--freeze"]], ids=str)
def test_adaptation_goes_on_without_labels_and_freezes_what_it_is_told_to(
    trained, tmp_path, option
):
    main("--adapt", "--data", goblins("d"), "--checkpoint", trained, "--batch", 4, "--iters", 3,
         "--workers", 1, *option, "--out", "r")  # fmt: skip
    folder = tmp_path / "r/semantic_stylegan-d-000"
    source, adapted, args = weights_of(trained), weights_of(folder), state_of(folder)["args"]
    assert adapted.keys() == source.keys() and args["regions"].split(",") == TOY
    assert args["lambda_mask"] == 0 and args["mirror"] is True

    def moved(net, part):
        learned = [k for k in source if k[0] == net and k[1].startswith(part)]
        return any(not torch.equal(source[k], adapted[k]) for k in learned if "w_avg" not in k[1])

    frozen, really = bool(option), option == ["--freeze"]
    for part in ("local", "position"):
        assert moved("G_ema", part) == (not frozen) and moved("G", part) == (not really)
    for net in ("G", "G_ema"):
        assert moved(net, "render") and moved(net, "mapping")
    assert moved("D", "of_img") and not moved("D", "of_seg")


def test_adaptation_sees_pictures_of_a_labelled_set_alone(trained, tmp_path, monkeypatch, capsys):
    for part in ("train", "val"):
        labelled_faces(f"d/{part}", 4)
        Path(f"d/{part}/names.txt").rename("d/classes.txt")
    Path("d/classes.txt").write_text("".join(f"{k}\n" for k in range(255)))
    options = ["--adapt", "--data", "d", "--checkpoint", trained, "--batch", 4, "--iters", 1]
    main(*options, "--out", "r")
    assert "4 pictures of 16x16" in capsys.readouterr().out
    evaluate = ["evaluate", "--checkpoint", "r/semantic_stylegan-d-000", "--pairs", 2]
    main(*evaluate, "--samples", 4, "--metrics", "fd8")  # though there are other classes
    out = capsys.readouterr().out
    assert "against 4 pictures of d" in out and "segmentation" not in out


def test_a_checkpoint_decides_the_size_whatever_the_toys_is(trained, monkeypatch):
    monkeypatch.setattr(semantic_stylegan, "score", lambda *_: None)  # 500 more faces to draw
    for name, options in (("a", ["--adapt", "--data", "toy/goblin"]), ("t", ["--data", "toy"])):
        main(*options, "--checkpoint", trained, "--batch", 4, "--iters", 1, "--out", name)
        (folder,) = Path(name).iterdir()
        assert state_of(folder)["config"] == state_of(trained)["config"]
        main("--resume", folder, "--iters", 2)
        assert state_of(folder)["step"] == 2


# ---- generate, compose, edit, invert, evaluate ----


def names_in(folder):
    return {p.name for p in Path(folder).iterdir()}


def loaded(folder):
    args = types.SimpleNamespace(checkpoint=folder, device="cpu")
    return semantic_stylegan.load_generator(args)[0]


def test_generate_writes_pictures_label_maps_and_latents(trained, capsys):
    main("generate", "--checkpoint", trained, "--seeds", "0-1,7", "--psi", 0.5)
    assert "3 faces" in capsys.readouterr().out
    files = {"classes.txt", "grid.png", "latents.npz"}
    assert names_in("out") == {"images", "labels", "seg"} | files
    assert Path("out/classes.txt").read_text().split() == list(common.TOY_REGIONS)
    names = [f"seed{k:04}" for k in (0, 1, 7)]
    for kind in ("images", "labels", "seg"):
        assert names_in(f"out/{kind}") == {f"{name}.png" for name in names}
    G, latents = loaded(trained), np.load("out/latents.npz")
    ws = G.mapping(common.latents([0, 1, 7], 32), 0.5)
    np.testing.assert_allclose(latents["w"], ws, atol=1e-6)
    assert latents["names"].tolist() == names
    picture = G.synthesis(ws, "const")
    labels = Image.open("out/labels/seed0007.png")
    assert labels.mode == "L" and np.asarray(labels).max() < len(TOY)
    assert np.array_equal(np.asarray(labels), picture.seg[2].argmax(0))
    image = common.to_uint8(picture.img)[2].permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(Image.open("out/images/seed0007.png"), int) - image).max() <= 1
    colors = common.SEG_COLORS[: len(TOY)].numpy()[np.asarray(labels)]
    assert np.array_equal(np.asarray(Image.open("out/seg/seed0007.png")), colors)


def test_faces_of_many_seeds_are_written_as_they_are_made(trained, monkeypatch, capsys):
    written = commands.written_before_each_batch(monkeypatch, "out/images/*")
    main("generate", "--checkpoint", trained, "--seeds", "0-69")
    assert written == [0, 16, 32, 48, 64]
    assert all(len(names_in(f"out/{kind}")) == 70 for kind in ("images", "labels", "seg"))
    assert "70 faces" in (said := capsys.readouterr().out) and "of the first 64" in said
    assert len(np.load("out/latents.npz")["w"]) == 70
    main("generate", "--checkpoint", trained, "--seeds", "69", "--out", "last")
    for kind in ("images", "labels", "seg"):
        last, mine = (np.asarray(Image.open(f"{o}/{kind}/seed0069.png")) for o in ("last", "out"))
        assert (last == mine).mean() > 0.99


def test_mixing_takes_regions_of_other_seeds_and_nothing_else(trained):
    mix = "hair=5, skin.texture=7,nose.structure=5"
    main("generate", "--checkpoint", trained, "--seeds", "0-1", "--psi", 1, "--mix", mix)
    G, w = loaded(trained), np.load("out/latents.npz")["w"]
    own, five, seven = (G.mapping(common.latents([k], 32))[0].numpy() for k in (0, 5, 7))
    rows = dict.fromkeys(codes_of("hair"), five)
    rows |= {codes_of("skin")[1]: seven, codes_of("nose")[0]: five}
    for i in range(G.num_ws):
        np.testing.assert_allclose(w[0, i], rows.get(i, own)[i], atol=1e-6)
    assert {i for i in range(G.num_ws) if np.allclose(w[0, i], w[1, i], atol=1e-4)} == rows.keys()


@pytest.fixture
def rendered(monkeypatch):
    """The ws that commands make pictures of, call by call."""
    found, pictures = [], semantic_stylegan.pictures

    def watch(G, ws, *rest, **options):
        found.append(ws)
        return pictures(G, ws, *rest, **options)

    monkeypatch.setattr(semantic_stylegan, "pictures", watch)
    return found


def test_films_vary_the_codes_that_they_are_named_after(trained, rendered):
    film = "base,hair.texture"
    main("generate", "--checkpoint", trained, "--seeds", 0, "--film", film, "--frames", 12)
    hair = codes_of("hair")[1]
    files = ["00_base.webp", f"{hair:02d}_hair-texture.webp"]
    assert sorted(names_in("out")) == files
    for file, ws, rows in zip(files, rendered[-2:], ([0, 1], [hair]), strict=True):
        with Image.open(f"out/{file}") as film:
            assert film.n_frames > 6 and film.size == (32, 16)  # beside it the segmentation
        assert ws.shape == (12, NUM_WS, 32)
        steps = (ws - ws.roll(1, 0)).abs().amax([0, 2])
        assert steps.nonzero().flatten().tolist() == rows
        assert torch.equal(ws[:, rows[0]], ws[:, rows[-1]])
    everything = ["--film", "all", "--frames", 3, "--without", "hair,mouth"]
    main("generate", "--checkpoint", trained, *everything, "--out", "all")
    assert len(names_in("all")) == 1 + 2 * len(TOY)
    with Image.open("all/00_base.webp") as film, Image.open("out/00_base.webp") as whole:
        assert film.tobytes() != whole.tobytes()


def test_a_face_is_composed_region_by_region(trained):
    main("compose", "--checkpoint", trained, "--seeds", "0,3", "--regions", "background,skin,hair")
    folders = {"seed0000", "seed0003"}
    assert names_in("out") == folders | {f"{name}.png" for name in folders}
    steps = ("00-background", "01-skin", "02-hair")
    kinds = ("image", "depth", "segmentation", "masks")
    assert names_in("out/seed0003") == {f"{s}-{kind}.png" for s in steps for kind in kinds}
    sky, colors = np.asarray(Image.open("out/seed0000/00-background-masks.png")), common.SEG_COLORS
    assert (sky == colors[0].numpy()).all()  # nothing else was shown yet
    seen = np.asarray(Image.open("out/seed0000/02-hair-masks.png")).reshape(-1, 3)
    allowed = {
        tuple(colors[: len(TOY)][TOY.index(r)].tolist()) for r in ("background", "skin", "hair")
    }
    assert {tuple(c) for c in seen.tolist()} <= allowed
    main("compose", "--checkpoint", trained, "--seeds", 0, "--out", "all")
    assert len(names_in("all/seed0000")) == 4 * len(TOY)


@pytest.mark.parametrize("part", ["both", "structure", "texture"])
def test_edit_gives_faces_a_region_of_others_and_says_how_local_that_is(trained, capsys, part):
    options = ["edit", "--checkpoint", trained, "--region", "hair", "--part", part, "--psi", 1]
    main(*options, "--seeds", "0-2", "--others", 9, "--steps", 2)
    said = capsys.readouterr().out
    assert re.search(rf"hair-{part}: locality, medians of 3 pairs, .*\d% are inside", said)
    assert names_in("out") >= {f"hair-{part}.png", "images", "labels", "latents.npz"}
    G, w = loaded(trained), np.load("out/latents.npz")["w"]
    own, nine = (G.mapping(common.latents([k], 32))[0].numpy() for k in (0, 9))
    structure, texture = codes_of("hair")
    rows = dict(structure=[structure], texture=[texture], both=[structure, texture])[part]
    for i in range(G.num_ws):
        np.testing.assert_allclose(w[0, i], (nine if i in rows else own)[i], atol=1e-6)
    # What was edited can be edited again.
    main(*options, "--latents", "out/latents.npz", "--others", 9, "--out", "again")
    assert "3 without any change" in capsys.readouterr().out


def test_edit_moves_faces_along_an_attribute_in_the_codes_of_its_region(trained, capsys, rendered):
    options = ["edit", "--checkpoint", trained, "--direction", "hair.light,clothes.area"]
    main(*options, "--samples", 300, "--seeds", "1-2")
    said = capsys.readouterr().out
    for name in ("hair.light", "clothes.area"):
        assert re.search(rf"{name}: the plane is right on [\d.]+% of held-out samples", said)
        assert f"{name}: locality, medians of 200 pairs, 0 without any change" in said
        assert Path(f"out/{name}.png").exists()
    moved = {tuple((ws != ws[:, :1]).any(2).any(0).nonzero().flatten().tolist()) for ws in rendered}
    assert moved == {(), tuple(codes_of("hair")), tuple(codes_of("clothes"))}
    main(*options, "--samples", 300, "--seeds", 1, "--alpha", 0, "--out", "still")
    assert capsys.readouterr().out.count("200 without any change") == 2


# One w is held near the mean far more strongly than w+, of which many codes share the pull.
@pytest.mark.parametrize(("space", "share"), [("w", 0.75), ("w+", 0.4)])
def test_invert_approaches_a_picture_and_its_latents_can_be_edited(trained, capsys, space, share):
    main("generate", "--checkpoint", trained, "--seeds", 1, "--psi", 1, "--out", "g")
    main("invert", "--checkpoint", trained, "--input", "g/images/seed0001.png", "--space", space,
         "--steps", 200)  # fmt: skip
    said = capsys.readouterr().out
    assert "LPIPS is replaced" in said
    files = {"seed0001-inverted.png", "seed0001.npz", "latents.npz", "inversions.png"}
    assert names_in("out") == files
    w = np.load("out/latents.npz")["w"]
    assert w.shape == (1, NUM_WS, 32) and (np.ptp(w, 1).max() < 1e-6) == (space == "w")
    G, target = loaded(trained), np.asarray(Image.open("g/images/seed0001.png"), int)
    mean = common.to_uint8(G(torch.zeros(1, 32), 0.0, "const").img)[0].permute(1, 2, 0).numpy()
    found = np.asarray(Image.open("out/seed0001-inverted.png"), int)
    error = np.square(found - target).mean()
    assert error < share * np.square(mean - target).mean()
    psnr = float(re.search(r"PSNR ([\d.]+)", said)[1])
    assert psnr == pytest.approx(10 * math.log10(255**2 / error), abs=0.01)
    main("edit", "--checkpoint", trained, "--region", "hair", "--latents", "out/latents.npz",
         "--out", "e")  # fmt: skip
    assert "medians of 1 pairs" in capsys.readouterr().out


def test_finetuning_writes_a_generator_that_makes_the_picture(trained, capsys):
    Path("in").mkdir()
    for k in (5, 6):
        common.toy_face(k, 0, 16).save(f"in/{k}.png")
    invert = ["invert", "--checkpoint", trained, "--input", "in", "--steps", 20]
    main(*invert, "--finetune", 60, "--out", "tuned")
    said = capsys.readouterr().out
    for k in (5, 6):
        before, after = re.findall(rf"{k}.png, (?:inverted|tuned): .*PSNR ([\d.]+)", said)
        assert float(after) > float(before)
    kinds = ("-inverted.png", "-tuned.png", ".pt", ".npz")
    assert names_in("tuned") >= {f"{k}{kind}" for k in (5, 6) for kind in kinds}
    main("generate", "--checkpoint", "tuned/5.pt", "--seeds", 0, "--out", "g")
    ws = torch.from_numpy(np.load("tuned/latents.npz")["w"][:1])
    picture = semantic_stylegan.pictures(loaded("tuned/5.pt"), ws).img[0].permute(1, 2, 0)
    assert np.abs(np.asarray(Image.open("tuned/5-tuned.png"), int) - picture.numpy()).max() <= 1


def test_evaluate_scores_pictures_segmentations_and_how_local_swaps_are(
    trained, capsys, monkeypatch
):
    learn = common.load_segmenter
    monkeypatch.setattr(common, "load_segmenter", lambda *a: learn(*a, steps=40))
    data = labelled_faces("d", 40)
    main("evaluate", "--checkpoint", trained, "--data", data, "--classes", "d/names.txt",
         "--samples", 40, "--metrics", "fd8", "--pairs", 8, "--out", "scores.json")  # fmt: skip
    said, row = capsys.readouterr().out, json.loads(Path("scores.json").read_text())
    assert row["n_fake"] == row["n_real"] == 40 and row["fd8"] > 0
    assert 0 < row["segmentation_iou"] < row["segmentation_accuracy"] < 1
    assert list(row["locality"]) == TOY and "protocol: 40 untruncated samples" in said
    for name, found in row["locality"].items():
        assert f"{name}, {found['area']:.1%} of the pixels: locality, medians of 8 pairs" in said
    assert sum(found["area"] for found in row["locality"].values()) == pytest.approx(1)


# ---- official files ----


def to_official_G(G):
    """The tensors of a generator as the official code names and shapes them, with its filters."""
    found = {"pos_embed.weights": G.position.weight[:, :, None, None]}
    fir = torch.outer(torch.tensor([1.0, 3, 3, 1]), torch.tensor([1.0, 3, 3, 1])) / 64

    def head(name, net, k=0):
        found[f"{name}.conv.weight"] = net.weight[k][:, :, None, None]
        found[f"{name}.conv.modulation"] = net.modulation[k][None, :, None, None]
        found[f"{name}.bias"] = net.bias[k][None, :, None, None]
        found[f"{name}.upsample.kernel"] = 4 * fir

    for i in range(G.mapping.num_layers):
        fc = G.mapping.get_submodule(f"fc{i}")
        found |= {f"style.{i + 1}.weight": fc.weight, f"style.{i + 1}.bias": fc.bias}
    for k in range(len(G.config["regions"])):
        for i, layer in enumerate(G.local.layers):
            name = f"local_nets.{k}.linears.{i}"
            found[f"{name}.conv.weight"] = layer.weight[k][None, :, :, None, None]
            found[f"{name}.conv.modulation.weight"] = layer.affine_weight[k]
            found[f"{name}.conv.modulation.bias"] = layer.affine_bias[k]
            found[f"{name}.activate.bias"] = layer.bias[k]
        head(f"local_nets.{k}.to_feat", G.local.to_feature, k)
        if k:
            head(f"local_nets.{k}.to_depth", G.local.to_depth, k - 1)
    for j, layer in enumerate(G.render.layers):
        found[f"render_net.convs.{j}.weight"] = layer.weight
        found[f"render_net.convs.{j}.modulation"] = layer.modulation[None, :, None, None]
        found[f"render_net.convs.{j}.noise.weight"] = layer.noise_strength[None]
        found[f"render_net.convs.{j}.activate.bias"] = layer.bias
        found[f"render_net.noises.noise_{j}"] = layer.noise_const[None, None]
        if j % 2 == 0:
            found[f"render_net.convs.{j}.blur.kernel"] = 4 * fir
    for i, heads in enumerate(zip(G.render.to_rgb, G.render.to_seg, strict=True)):
        for kind, net in zip(("rgb", "seg"), heads, strict=True):
            head(f"render_net.to_{kind}s.{i}", net)
    return found


def to_official_D(D):
    found, fir = {}, torch.ones(4, 4)
    for branch, net in (("convs_img", D.of_img), ("convs_seg", D.of_seg)):
        found |= {f"{branch}.0.0.weight": net[0].weight, f"{branch}.0.1.bias": net[0].bias}
        for n, block in enumerate(net[1:], 1):
            found[f"{branch}.{n}.conv1.0.weight"] = block.conv0.weight
            found[f"{branch}.{n}.conv1.1.bias"] = block.conv0.bias
            found[f"{branch}.{n}.conv2.0.kernel"] = fir
            found[f"{branch}.{n}.conv2.1.weight"] = block.conv1.weight
            found[f"{branch}.{n}.conv2.2.bias"] = block.conv1.bias
            found[f"{branch}.{n}.skip.0.kernel"] = fir
            found[f"{branch}.{n}.skip.1.weight"] = block.skip.weight
    found |= {"final_conv.0.weight": D.conv.weight, "final_conv.1.bias": D.conv.bias}
    for i, net in enumerate((D.fc, D.out)):
        found |= {f"final_linear.{i}.weight": net.weight, f"final_linear.{i}.bias": net.bias}
    return found


UNSEEN = dict(base_layers=1, depth_layers=2, residual_refine=True, transparent_dims=[2])


def write_official(path, G, D, args=UNSEEN, without=()):
    """A file as the official train.py leaves it; args: those of its options that matter."""
    g = {k: t for k, t in to_official_G(G).items() if not k.endswith(tuple(without) or "-")}
    d = {k: t for k, t in to_official_D(D).items() if not k.endswith(tuple(without) or "-")}
    optimizer = torch.optim.Adam([torch.ones(2, requires_grad=True)]).state_dict()
    state = dict(g=g, d=d, g_ema=g, g_optim=optimizer, d_optim=optimizer)
    if args is not None:
        state["args"] = argparse.Namespace(size=16, seg_dim=3, latent=8, path=None, **args)
    torch.save(state, path)
    return path


def networks(path, **typed):
    args = types.SimpleNamespace(**typed)
    return semantic_stylegan.load_networks(args, path)[0]


@pytest.mark.parametrize(
    ("options", "official"),
    [
        ({}, {}),
        (
            dict(residual_refine=False, see_through=[]),
            dict(residual_refine=False, transparent_dims=[]),
        ),
        (dict(base_layers=2, depth_layers=3), dict(base_layers=2, depth_layers=3)),
        (dict(size=32, layers=5, channels={8: 8, 16: 8, 32: 4}), {}),
        (dict(coarse_size=8, min_size=2, channels={4: 8, 8: 8, 16: 4}), {}),
    ],
    ids=str,
)
def test_an_official_file_makes_the_pictures_and_logits_of_its_networks(options, official):
    G, D = small_G(**options), small_D()
    nets = networks(write_official("a.pt", G, D, UNSEEN | official))
    semantic_stylegan.update_w_avg(nets["G_ema"])  # it is in no file
    assert set(nets) == {"G", "D", "G_ema"}
    for name in ("G", "G_ema"):
        config = dict(nets[name].config)
        assert config.pop("regions") == ["0", "1", "2"]
        assert config == {k: v for k, v in G.config.items() if k != "regions"}
    z, x, seg = torch.randn(4, 8), torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16)
    for psi in (1, 0.5):
        for mine, theirs in zip(nets["G_ema"](z, psi, "const"), G(z, psi, "const"), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nets["D"](x, seg), D(x, seg))
    torch.testing.assert_close(nets["D"](x), D(x))
    main("generate", "--checkpoint", "a.pt", "--seeds", 3, "--psi", 0.7)
    image = common.to_uint8(G(common.latents([3], 8), 0.7, "const").img)[0].permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(Image.open("out/images/seed0003.png"), int) - image).max() <= 1


def test_a_file_without_options_says_which_and_takes_them_from_the_command_line(capsys):
    G = small_G()
    write_official("a.pt", G, small_D(), None)
    line = fails(capsys, "generate", "--checkpoint", "a.pt")
    assert "pass --base-layers, --depth-layers, --residual-refine, --see-through" in line
    options = ["--base-layers", 1, "--depth-layers", 2, "--residual-refine"]
    assert "pass --see-through" in fails(capsys, "generate", "--checkpoint", "a.pt", *options)
    for names, problem in (("hut", "--see-through hut: names of 1, 2"), ("3", "--see-through 3:")):
        assert problem in fails(
            capsys, "generate", "--checkpoint", "a.pt", *options, "--see-through", names
        )
    main("generate", "--checkpoint", "a.pt", *options, "--see-through", "2", "--seeds", 3)
    image = common.to_uint8(G(common.latents([3], 8), 0.7, "const").img)[0].permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(Image.open("out/images/seed0003.png"), int) - image).max() <= 1


def test_noise_maps_and_filters_may_be_missing():
    G = small_G()
    path = write_official("a.pt", G, small_D(), without=("kernel", "noise_0", "noise_3"))
    found, z = networks(path)["G_ema"].eval(), torch.randn(2, 8)
    for name, p in G.named_parameters():
        assert torch.equal(found.get_parameter(name), p), name
    for i in (1, 2):
        assert torch.equal(found.render.layers[i].noise_const, G.render.layers[i].noise_const)
    assert found(z, noise="const").img.isfinite().all()


def test_a_published_file_with_the_average_alone_is_enough_to_generate():
    G = small_G()
    args = argparse.Namespace(**UNSEEN)
    torch.save({"g_ema": to_official_G(G), "args": args}, "a.pt")  # as pivotal tuning leaves it
    assert set(networks("a.pt")) == {"G_ema"}
    main("generate", "--checkpoint", "a.pt", "--seeds", 0)


class Attack:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_an_official_file_that_would_run_code_is_refused(capsys):
    write_official("a.pt", small_G(), small_D(), UNSEEN | dict(extra=Attack()))
    assert "a.pt" in fails(capsys, "generate", "--checkpoint", "a.pt")
    assert not Path("ran").exists() and not Path("out").exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda a: a.pop("render_net.convs.1.activate.bias"), "render.layers.1.bias"),
        (lambda a: a.pop("local_nets.1.to_depth.bias"), "local.to_depth.bias"),
        (lambda a: a.pop("pos_embed.weights"), "of_img.0.weight"),
        (lambda a: a.update({"style.9.extra": torch.ones(3)}), "style.9.extra"),
        (lambda a: a.update({"style.1.bias": torch.ones(3)}), "mapping.fc0.bias"),
        (lambda a: a.clear(), "of_img.0.weight"),
    ],
)
def test_an_official_network_with_something_wrong_is_refused(capsys, change, problem):
    arrays = to_official_G(small_G())
    change(arrays)
    torch.save({"g_ema": arrays, "args": argparse.Namespace(**UNSEEN)}, "a.pt")
    line = fails(capsys, "generate", "--checkpoint", "a.pt")
    assert "a.pt: its G_ema" in line.replace("g_ema", "G_ema") and problem in line, line


# ---- mistakes ----


def test_mistakes_in_options_end_in_one_line(trained, capsys):
    classes = ["--classes", "d/names.txt"]
    for name in ("d", "alone", "shape", "index", "images"):
        labelled_faces(name, 6)
    Path("alone/labels/3.png").unlink()
    Image.new("L", (20, 16)).save("shape/labels/3.png")
    Image.new("L", (16, 16), 77).save("index/labels/3.png")
    Path("few.txt").write_text("sky\nface")
    for path in Path("images/labels").iterdir():
        path.unlink()
    Path("images/labels").rmdir()
    goblins("goblins")
    Path("p").mkdir()
    Image.new("RGB", (16, 16)).save("p/inversions.png")
    np.savez("other.npz", w=np.zeros((1, 4, 32)))
    np.savez("none.npz", v=np.zeros(3))
    torch.save({"model": "cyclegan", "nets": {}}, "cyclegan.pt")
    small, net = ["--data", "d", *classes, *TINY], ["--checkpoint", trained]
    sized = [*TINY, "--coarse-size", 16]
    adapt = ["--adapt", "--data", "goblins", "--out", "runs"]
    cases = [
        (["--data", "alone", *classes, *TINY], "1 pictures without a partner, 3.png"),
        (["--data", "shape", *classes, *TINY], "labels: 3.png is 20x16, its picture 16x16"),
        (
            ["--data", "index", *classes, *TINY],
            "3.png holds label 77; with 11 classes they go to 10",
        ),
        (["--data", "d", "--classes", "few.txt", *TINY, "--see-through", "face"], "they go to 1."),
        ([*small, "--see-through", "glases"], "--see-through glases: names of skin"),
        (["--data", "images", *TINY], "no folder labels"),
        (["--data", "goblins", *TINY], "no folder images"),
        (["--data", "nowhere", *TINY], "nowhere"),
        (["--data", "d", *classes, *sized], "doubling: min_size 4, coarse_size 16, size 16"),
        ([*small, "--min-size", 8], "sides must grow by doubling"),
        ([*small, "--coarse-size", 12, "--min-size", 6], "sides must grow by doubling"),
        ([*small, "--base-layers", 4], "4 base and 3 depth layers of 4"),
        ([*small, "--depth-layers", 5], "depth layers of 4"),
        ([*small, "--size", 20], "a power of two"),
        ([*small, "--precision", "bf16"], "--precision: invalid choice: 'bf16'"),
        ([*small, "--r1-seg", -1], "'-1' is not a finite number of at least 0"),
        ([*small, "--lr", 0], "not a finite number above 0"),
        ([*small, "--mixing", 2], "--mixing"),
        ([*small, "--freeze"], "of --adapt"),
        ([*adapt, *net, "--freeze", "--freeze-local"], "pass one"),
        ([*adapt, *net, "--aug"], "--aug is of pictures with label maps"),
        (["evaluate", *net, "--samples", 1], "--samples 1: scores compare at least 2"),
        ([*small, "--freeze-local"], "of --adapt"),
        ([*small, "--checkpoint", "none.pt"], "none.pt"),
        ([*small, "--checkpoint", "cyclegan.pt"], "holds a cyclegan model"),
        (adapt, "--adapt goes on from a --checkpoint"),
        ([*adapt, *net, "--size", 32], "makes 16 pixels, not 32"),
        ([*adapt, "--checkpoint", "cyclegan.pt"], "holds a cyclegan model"),
        (["--resume", "nowhere"], "--resume nowhere"),
        (["generate"], "--checkpoint"),
        (["generate", "--checkpoint", "cyclegan.pt"], "holds a cyclegan model"),
        (["generate", *net, "--seeds", "a-b"], "'a-b' is no seed"),
        (["generate", *net, "--mix", "hair"], "--mix hair: REGION=SEED"),
        (["generate", *net, "--mix", "hair=x"], "--mix hair=x: REGION=SEED"),
        (["generate", *net, "--mix", "hair=²"], "--mix hair=²: REGION=SEED"),
        (["invert", *net, "--input", "p", "--out", "p"], "would replace an original"),
        (["generate", *net, "--mix", "hair.colour=5"], "--mix hair.colour=5: REGION=SEED"),
        (["generate", *net, "--mix", "beard=5"], "no region 'beard'; there are background"),
        (["generate", *net, "--film", "beard"], "--film: no beard"),
        (["generate", *net, "--latents", "l/latents.npz", "--out", "l"], "would be written over"),
        (["generate", *net, "--psi", "x"], "--psi"),
        (["compose", *net, "--regions", "background,beard"], "no region 'beard'"),
        (["edit", *net], "Either --region, or --direction"),
        (["edit", *net, "--region", "hair", "--direction", "hair.light"], "Either --region"),
        (["edit", *net, "--region", "beard"], "no region 'beard'; there are background"),
        (["edit", *net, "--region", "hair", "--part", "colour"], "--part"),
        (["edit", *net, "--region", "hair", "--latents", "other.npz"], "(1, 4, 32)"),
        (["edit", *net, "--region", "hair", "--latents", "none.npz"], "none.npz"),
        (["edit", *net, "--region", "hair", "--latents", "no.npz"], "no.npz"),
        (["edit", *net, "--direction", "beard.light"], "no 'beard.light'; there are background"),
        (["invert", *net], "--input"),
        (["invert", *net, "--input", "no.png"], "no.png"),
        (["invert", *net, "--input", "few.txt"], "few.txt"),
        (["invert", *net, "--input", "goblins", "--finetune", -1], "whole number of at least 0"),
        (["evaluate", *net, "--metrics", "nonsense"], "nonsense"),
        (["evaluate", *net, "--data", "d", "--classes", "two.txt"], "two.txt"),
    ]
    commands.each_ends_in_one_line(fails, capsys, cases)


def test_a_batch_is_divided_among_processes_or_refused(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    line = fails(capsys, "--data", labelled_faces("d", 6), *TINY)
    assert "--batch 4 cannot be split over 3 processes" in line and not Path("runs").exists()


def test_data_of_other_classes_do_not_evaluate_a_checkpoint(trained, capsys):
    Path("three.txt").write_text("a\nb\nc")
    labelled_faces("d", 6)
    line = fails(
        capsys, "evaluate", "--checkpoint", trained, "--data", "d", "--classes", "three.txt"
    )
    assert "3 classes, the checkpoint 11 regions" in line


def test_the_networks_and_losses_can_be_pasted_elsewhere(trained):
    text = (ROOT / "semantic_stylegan.py").read_text()
    bar = "# " + "=" * 77 + "\n"
    sections = dict(zip(*[iter(text.split(bar)[1:])] * 2, strict=True))
    names = "import math\nfrom collections import namedtuple\nimport torch\n"
    names += "import torch.nn.functional as F\nfrom torch import nn\nimport ops_cuda as ops\n"
    names += "FACES = tuple(range(13))\n"
    here = {}
    exec(names + sections["# Networks\n"] + sections["# Losses\n"], here)
    state, nets = state_of(trained), {}
    for name in ("G_ema", "D"):
        nets[name] = here["build"](state["config"][name]).eval()
        nets[name].load_state_dict(state["nets"][name])
    picture = nets["G_ema"](torch.randn(4, 32), psi=0.7, noise="const")
    reals = [x.detach().requires_grad_() for x in picture[:2]]
    penalties = here["r1_penalties"](nets["D"](*reals), *reals)
    assert all(p.shape == (4,) and p.isfinite().all() for p in penalties)
    assert here["mask_loss"](picture.seg, picture.coarse).isfinite()
