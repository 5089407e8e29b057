"""cyclegan.py: networks, losses, preprocessing, and its commands run as a user runs them."""

import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import commands
import numpy as np
import pytest
import torch
from commands import ROOT, no_stray_files, one_thread  # noqa: F401
from eager import Eager
from PIL import Image

import common
import cyclegan

TINY = (
    "--load-size 36 --crop-size 32 --ngf 4 --ndf 4 --blocks 1 --batch 2 --D n_layers --n-layers 2"
)


script, run, main, fails = commands.of(cyclegan)


def faces(folder, n=4, size=40, domain=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        common.toy_face(i, domain, size).save(folder / f"{i}.jpg")
    return folder


# ---- networks ----


@pytest.mark.parametrize(
    ("net", "parameters"),
    [
        ({"kind": "resnet", "blocks": 9}, 11_378_179),
        ({"kind": "resnet", "blocks": 6}, 7_837_699),
        ({"kind": "unet", "downs": 8}, 54_409_603),
        ({"kind": "unet", "downs": 7}, 41_825_667),
        ({"kind": "patch", "n_layers": 3}, 2_764_737),
        ({"kind": "patch", "n_layers": 1}, 136_385),
        ({"kind": "patch", "n_layers": 2}, 662_977),
        ({"kind": "patch", "n_layers": 4}, 6_959_553),
        ({"kind": "patch", "n_layers": 5}, 11_154_369),
        ({"kind": "pixel"}, 8_705),
    ],
    ids=str,
)
def test_networks_have_the_published_numbers_of_parameters(net, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in cyclegan.build(net).parameters()) == parameters


@pytest.mark.parametrize("n_layers, field", [(1, 16), (2, 34), (3, 70), (4, 142)])
def test_a_logit_of_the_patch_discriminator_sees_its_receptive_field(n_layers, field):
    D = cyclegan.PatchDiscriminator(ndf=2, n_layers=n_layers, norm="none").double()
    side = 2 ** (n_layers + 5)
    x = torch.randn(1, 3, side, side, dtype=torch.float64, requires_grad=True)
    logits = D(x)
    assert logits.shape == (1, 1, side // 2**n_layers - 2, side // 2**n_layers - 2)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    rows = x.grad.abs().sum([0, 1, 3]).nonzero()
    assert rows.max() - rows.min() + 1 == field


@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
@pytest.mark.parametrize(
    "config",
    [
        {"kind": "resnet", "blocks": 2, "ngf": 4, "in_channels": 1},
        {"kind": "resnet", "blocks": 1, "ngf": 4, "dropout": True},
        {"kind": "unet", "downs": 5, "ngf": 2, "out_channels": 1},
        {"kind": "unet", "downs": 8, "ngf": 1},
        {"kind": "patch", "n_layers": 1, "ndf": 4},
        {"kind": "patch", "n_layers": 5, "ndf": 2, "in_channels": 1},
        {"kind": "pixel", "ndf": 4},
    ],
    ids=lambda c: "-".join(map(str, c.values())),
)
def test_from_official_reads_every_variant_off_names_and_shapes(config, norm):
    net = cyclegan.build({**config, "norm": norm})
    arrays = {f"module.{name}": a.numpy() for name, a in net.state_dict().items()}
    again = cyclegan.from_official(arrays)
    assert again.config == net.config
    for name, a in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], a), name


def test_running_statistics_of_old_instance_norms_are_dropped():
    net = cyclegan.ResnetGenerator(ngf=4, blocks=1)
    arrays = dict(net.state_dict())
    for name in ("model.2", "model.5", "model.10.conv_block.2"):
        arrays |= {f"{name}.running_mean": torch.ones(4), f"{name}.running_var": torch.ones(4)}
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(cyclegan.from_official(arrays)(x), net(x))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda a: a.pop("model.1.weight"), "model.1.weight"),
        (lambda a: a.update({"model.2.weight": torch.ones(4)}), "affine"),
        (lambda a: a.update({"model.99.weight": torch.ones(4)}), "model.99.weight"),
        (lambda a: a.clear(), "not a CycleGAN network"),
    ],
)
def test_from_official_refuses_what_is_not_such_a_network(change, problem):
    arrays = dict(cyclegan.ResnetGenerator(ngf=4, blocks=1).state_dict())
    change(arrays)
    with pytest.raises(ValueError, match=problem):
        cyclegan.from_official(arrays)


def test_initial_weights_have_the_papers_deviation():
    G = cyclegan.init_weights(cyclegan.ResnetGenerator(blocks=1))
    weights = torch.cat([p.flatten() for n, p in G.named_parameters() if n.endswith("weight")])
    assert abs(weights.std() - 0.02) < 1e-4 and abs(weights.mean()) < 1e-4
    assert all(p.abs().max() == 0 for n, p in G.named_parameters() if n.endswith("bias"))


# ---- losses and one step ----


def test_gradient_penalty_of_a_linear_discriminator_is_that_of_its_weights():
    a = torch.randn(3, 8, 8, dtype=torch.float64)
    x, y = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64)
    gp = cyclegan.gradient_penalty(lambda x: x * a, x, y, torch.rand(4, 1, dtype=torch.float64))
    torch.testing.assert_close(gp, (a.norm() - 1).square())


class Runner(Eager):
    """What train_step needs of common.Run."""

    rand = staticmethod(torch.rand)

    def autocast(self):
        return torch.autocast("cpu", enabled=False)

    def backward(self, loss):
        loss.backward()

    def step(self, opt):
        opt.step()
        opt.zero_grad()


def tiny_step(lr_G=0.0, lr_D=0.0, norm="instance", **options):
    """train_step on tiny networks; returns (losses, {network: has it moved})."""
    torch.manual_seed(0)
    G = {"ngf": 4, "blocks": 1, "norm": norm}
    D = {"ndf": 4, "n_layers": 1, "norm": norm}
    nets = [cyclegan.ResnetGenerator(**G) for _ in "AB"]
    nets += [cyclegan.PatchDiscriminator(**D) for _ in "AB"]
    before = [[p.clone() for p in net.parameters()] for net in nets]
    opts = [
        torch.optim.SGD([p for net in pair for p in net.parameters()], lr)
        for pair, lr in ((nets[:2], lr_G), (nets[2:], lr_D))
    ]

    defaults = {"gan_mode": "lsgan", "lambda_A": 10.0, "lambda_B": 10.0, "lambda_id": 0.5}
    args = types.SimpleNamespace(**defaults | options)
    pools = [cyclegan.ImagePool(4), cyclegan.ImagePool(4)]
    real_A, real_B = torch.rand(2, 2, 3, 16, 16) * 2 - 1
    losses = cyclegan.train_step(nets, opts, pools, real_A, real_B, args, Runner())
    pairs = zip(nets, before, strict=True)
    moved = [
        any(not torch.equal(p, q) for p, q in zip(n.parameters(), b, strict=True)) for n, b in pairs
    ]
    return losses, dict(zip(("G_AB", "G_BA", "D_A", "D_B"), moved, strict=True))


@pytest.mark.parametrize("kind", [dict(kind="resnet", blocks=1), dict(kind="unet", downs=5)])
@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_do_not_depend_on_the_memory_order(kind, batch):
    """At batch 1 those of PyTorch's instance norm do."""
    G = cyclegan.build(kind | dict(ngf=4)).double()
    x, found = torch.rand(batch, 3, 32, 32, dtype=torch.float64) * 2 - 1, []
    for order in (torch.contiguous_format, torch.channels_last):
        net = copy.deepcopy(G).to(memory_format=order)
        net(x.contiguous(memory_format=order)).abs().mean().backward()
        found.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(*found)


def test_a_generator_step_leaves_the_discriminators_untouched_and_the_reverse():
    assert tiny_step(lr_G=0.1)[1] == {"G_AB": True, "G_BA": True, "D_A": False, "D_B": False}
    assert tiny_step(lr_D=0.1)[1] == {"G_AB": False, "G_BA": False, "D_A": True, "D_B": True}


@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
@pytest.mark.parametrize("gan_mode", ["lsgan", "vanilla", "wgangp"])
def test_every_loss_and_norm_gives_finite_losses(gan_mode, norm):
    losses, _ = tiny_step(gan_mode=gan_mode, norm=norm)
    assert all(v.isfinite() for v in losses.values())
    assert ("reg/gp_A" in losses) == (gan_mode == "wgangp")


def test_without_identity_loss_everything_else_stays_the_same():
    with_id, without = tiny_step()[0], tiny_step(lambda_id=0.0)[0]
    assert set(with_id) - set(without) == {"idt_A", "idt_B"}
    for name, value in without.items():
        torch.testing.assert_close(value, with_id[name])


def test_the_pool_returns_old_images_half_of_the_time_and_keeps_its_size():
    pool, old = cyclegan.ImagePool(50), 0
    generator = torch.Generator().manual_seed(0)
    for i in range(2000):
        u, slot = torch.rand(2, 1, generator=generator)
        returned = pool.query(torch.full((1, 1, 1, 1), float(i)), u, slot)
        assert i >= 50 or returned.item() == i
        old += returned.item() != i
    assert len(pool.images) == pool.count == 50
    assert abs(old / 1950 - 0.5) < 0.04


# ---- preprocessing ----


@pytest.mark.parametrize(
    ("mode", "size", "resized", "final"),
    [
        ("resize_and_crop", (100, 50), (36, 36), (32, 32)),
        ("crop", (100, 50), (100, 50), (32, 32)),
        ("scale_width", (72, 80), (36, 40), (36, 40)),
        ("scale_width", (100, 20), (36, 32), (36, 32)),  # never lower than the crop
        ("scale_width", (36, 52), (36, 52), (36, 52)),  # already as wide
        ("scale_width_and_crop", (36, 50), (36, 50), (32, 32)),
        ("scale_width", (72, 82), (36, 40), (36, 40)),  # 41 is no multiple of 4
        ("scale_width_and_crop", (72, 80), (36, 40), (32, 32)),
        ("none", (101, 49), (100, 48), (100, 48)),  # the nearest multiple of 4
        ("none", (64, 48), (64, 48), (64, 48)),
    ],
)
def test_preprocess_modes(mode, size, resized, final):
    img = common.resize_for(mode, 36, 32, 4, Image.new("RGB", size))
    assert img.size == resized
    crop = 32 if mode.endswith("crop") else None
    pixels = common.crop_and_flip(common.pixels(img), crop, True, np.random.default_rng(0))
    assert pixels.shape == (final[1], final[0], 3)


def test_crops_reach_every_offset_and_half_are_mirrored():
    x = np.arange(4, dtype=np.uint8).reshape(1, 4, 1).repeat(4, 0)
    seen = [
        common.crop_and_flip(x, 2, True, np.random.default_rng(i))[0, :, 0].tolist()
        for i in range(400)
    ]
    assert {tuple(s) for s in seen} == {(0, 1), (1, 2), (2, 3), (1, 0), (2, 1), (3, 2)}
    assert abs(np.mean([s[0] > s[1] for s in seen]) - 0.5) < 0.1


# ---- train ----


training, trained = commands.trained_beside_the_tests(cyclegan, f"{TINY} --epochs 1 --every 400")


def test_train_leaves_a_run_folder(trained):
    folder, text = trained, (trained.parent / "printed.txt").read_text()
    names = {p.name for p in folder.iterdir()}
    assert {"args.json", "cyclegan.py", "log.jsonl", "metrics.jsonl", "samples"} <= names
    assert {"checkpoint.pt", "checkpoint-0000400.pt"} <= names
    assert json.loads((folder / "args.json").read_text())["ngf"] == 4
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 400
    assert {"loss/G_AB", "loss/cycle_A", "loss/idt_A", "loss/D_A", "sec", "mem_gb"} <= set(log[0])
    assert log[-1]["loss/cycle_A"] < log[0]["loss/cycle_A"]
    assert [p.name for p in sorted((folder / "samples").iterdir())] == [
        "0000200.png", "0000400.png",
    ]  # fmt: skip
    assert "error to the true counterpart" in text and "AtoB" in text and "BtoA" in text


def test_a_checkpoint_needs_no_unpickling_of_code(trained):
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    assert state["model"] == "cyclegan" and state["step"] == 400
    assert state["config"]["G_AB"]["blocks"] == 1


def weights_of(folder):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return {(n, k): t for n, net in state["nets"].items() for k, t in net.items()}


def test_a_run_killed_three_times_ends_as_one_that_was_not(tmp_path):
    options = ["--data", tmp_path / "d", *TINY.split(), "--epochs", 1, "--every", 40]
    options += ["--pool-size", 20, "--dropout", "--gan-mode", "wgangp", "--workers", 0]
    faces(tmp_path / "d/trainA", 160), faces(tmp_path / "d/trainB", 90, domain=1)
    faces(tmp_path / "d/testA"), faces(tmp_path / "d/testB")
    steps = sorted(random.Random(0).sample(range(2, 70), 3))  # of 80
    whole, folder = commands.whole_and_killed(cyclegan, options, [(k, 0) for k in steps])
    expected, actual = weights_of(whole), weights_of(folder)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[k], actual[k]) for k in expected)
    logs = [[json.loads(x) for x in (f / "log.jsonl").open()] for f in (whole, folder)]
    for line in logs[0] + logs[1]:
        del line["sec"], line["mem_gb"]
    assert logs[0] == logs[1]


def test_ctrl_c_saves_and_says_how_to_continue(tmp_path):
    options = ["--data", "toy", *TINY.split(), "--epochs", 50, "--out", tmp_path]
    process = subprocess.Popen(
        script(*options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    folder = tmp_path / "cyclegan-toy-000"
    while commands.logged_steps(folder) == 0:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    err = process.communicate()[1]
    assert process.returncode == 130 and f"--resume {folder}" in err and "Traceback" not in err
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] >= 50


def test_a_run_that_still_trains_is_not_resumed_beside_it(tmp_path, capsys):
    folder = tmp_path / "cyclegan-toy-000"
    options = ["--data", "toy", *TINY.split(), "--epochs", 50, "--out", tmp_path]
    process = subprocess.Popen(script(*options), stdout=subprocess.DEVNULL)
    try:
        while commands.logged_steps(folder) < 100:
            assert process.poll() is None
            time.sleep(0.02)
        assert "still training" in fails(capsys, "--resume", folder, "--epochs", 1)
        assert json.loads((folder / "log.jsonl").read_text().splitlines()[0])["step"] == 50
    finally:
        process.kill()


IN_DOUBLE = """import sys, torch, common, cyclegan
torch.set_default_dtype(torch.float64)
to_float = common.to_float
common.to_float = lambda images, device: to_float(images, device).double()
sys.exit(common.exit_status(cyclegan.main))
"""


def test_two_processes_make_the_update_of_one(tmp_path, monkeypatch):
    # In float64: Adam makes whole steps of what rounding leaves of gradients that should be 0, as
    # those of biases before an instance norm.
    Path("double.py").write_text(IN_DOUBLE)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    faces(tmp_path / "d/trainA", 20), faces(tmp_path / "d/trainB", 20, domain=1)
    faces(tmp_path / "d/testA"), faces(tmp_path / "d/testB")
    options = ["--data", tmp_path / "d", *TINY.split(), "--batch", 4, "--epochs", 1]
    options += ["--gan-mode", "wgangp", "--lr", 1e-4, "--device", "cpu"]
    commands.on_one_and_two_processes("double.py", *options)
    one, two = (weights_of(tmp_path / n / "cyclegan-d-000") for n in ("one", "two"))
    assert torch.load(tmp_path / "two/cyclegan-d-000/checkpoint.pt", weights_only=True)["step"] == 5
    for key in one:
        assert one[key].dtype == torch.float64
        torch.testing.assert_close(one[key], two[key], rtol=1e-6, atol=1e-6, msg=str(key))


def test_transfer_starts_from_given_weights(trained, tmp_path):
    faces(tmp_path / "d/trainA"), faces(tmp_path / "d/trainB", domain=1)
    options = ["--data", tmp_path / "d", "--load-size", 32, "--crop-size", 32, "--batch", 2]
    options += ["--checkpoint", trained / "checkpoint.pt", "--lr", 1e-12, "--epochs", 1]
    cyclegan.main([str(o) for o in [*options, "--out", tmp_path]])
    folder = tmp_path / "cyclegan-d-000"
    cyclegan.main(["--resume", str(folder), "--epochs", "3"])  # the networks are not those of args
    start, end = weights_of(trained), weights_of(folder)
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 6
    assert all(torch.allclose(start[k], end[k], atol=1e-8) for k in start)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_on_the_cpu_too(tmp_path, precision):
    faces(tmp_path / "d/trainA"), faces(tmp_path / "d/trainB", domain=1)
    options = ["--data", tmp_path / "d", *TINY.split(), "--epochs", 1, "--out", tmp_path]
    cyclegan.main([str(o) for o in [*options, "--precision", precision]])
    log = (tmp_path / "cyclegan-d-000/log.jsonl").read_text()
    assert all(np.isfinite(v) for v in json.loads(log.splitlines()[0]).values())


# ---- translate and evaluate ----


def test_translate_keeps_sizes_and_relative_paths_of_all_files(trained, tmp_path):
    for name, size in (
        ("a.jpg", (45, 31)),
        ("sub/a.jpg", (32, 33)),
        ("sub/b.png", (7, 5)),
        ("b.bmp", (9, 90)),
        ("a.jpg.png", (6, 8)),
    ):
        (tmp_path / "in/sub").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, "tan").save(tmp_path / "in" / name)
    Image.new("L", (50, 40)).save(tmp_path / "in/a.png")  # beside a.jpg
    run("translate", "--checkpoint", trained / "checkpoint.pt", "--input", tmp_path / "in")
    out = {str(p.relative_to("out")): Image.open(p).size for p in Path("out").rglob("*.png")}
    assert out == {
        "a.jpg.png": (45, 31),
        "a.png.png": (50, 40),
        "a.jpg.png.png": (6, 8),
        "b.png": (9, 90),
        "sub/a.png": (32, 33),
        "sub/b.png": (7, 5),
    }


def test_each_direction_uses_its_own_generator(trained, tmp_path):
    picture = faces(tmp_path / "in", 1) / "0.jpg"
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    for direction, name in (("AtoB", "G_AB"), ("BtoA", "G_BA")):
        out = tmp_path / f"{direction}.png"
        options = ["--checkpoint", trained / "checkpoint.pt", "--input", picture, "--out", out]
        cyclegan.main([str(o) for o in ["translate", *options, "--direction", direction]])
        G = cyclegan.build(state["config"][name])
        G.load_state_dict(state["nets"][name])
        x = common.to_float(common.stack([common.pixels(Image.open(picture))]), "cpu")
        expected = common.to_uint8(G.eval()(x))[0].permute(1, 2, 0)
        assert np.array_equal(np.asarray(Image.open(out)), expected.detach().numpy())


@pytest.mark.parametrize(
    ("option", "size"),
    [("--size 20", (40, 20)), ("--width 20", (20, 10)), ("--square 24", (24, 24))],
)
def test_translate_resizes_on_request(trained, tmp_path, option, size):
    Image.new("RGB", (80, 40)).save(tmp_path / "a.png")
    options = ["--checkpoint", trained / "checkpoint.pt", "--input", "a.png", "--out", "b.png"]
    cyclegan.main([str(o) for o in ["translate", *options, *option.split()]])
    assert Image.open("b.png").size == size


def test_an_official_file_is_taken_wherever_a_checkpoint_is(trained, tmp_path):
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    official = {"G_A": "G_AB", "G_B": "G_BA", "D_A": "D_B", "D_B": "D_A"}
    for theirs, ours in official.items():
        (tmp_path / "pth").mkdir(exist_ok=True)
        torch.save(state["nets"][ours], tmp_path / f"pth/latest_net_{theirs}.pth")
    picture = faces(tmp_path / "in", 1) / "0.jpg"
    sources = (trained / "checkpoint.pt", trained, "pth/latest_net_G_B.pth", "pth")
    for checkpoint in sources:
        options = [
            "--checkpoint",
            checkpoint,
            "--input",
            picture,
            "--out",
            f"{Path(checkpoint).name}-{len(str(checkpoint))}" + ".png",
        ]
        cyclegan.main([str(o) for o in ["translate", *options, "--direction", "BtoA"]])
    pictures = [Image.open(p).tobytes() for p in tmp_path.glob("*.png")]
    assert len(pictures) == 4 and len(set(pictures)) == 1

    for checkpoint in ("pth", "pth/latest_net_G_A.pth"):
        options = ["evaluate", "--checkpoint", checkpoint, "--data", "toy", "--size", "32"]
        cyclegan.main([*options, "--out", f"{checkpoint}.json"])
    both, one = (
        json.loads(Path(f).read_text()) for f in ("pth.json", "pth/latest_net_G_A.pth.json")
    )
    assert set(both) == {"AtoB", "BtoA"} and set(one) == {"AtoB"}
    assert "cycle_error" in both["AtoB"] and "cycle_error" not in one["AtoB"]
    assert both["AtoB"]["error"] == one["AtoB"]["error"]

    faces(tmp_path / "d/trainA"), faces(tmp_path / "d/trainB", domain=1)
    options = f"--data d {TINY} --checkpoint pth --epochs 1 --lr 1e-12 --out r".split()
    cyclegan.main(options)
    start, end = weights_of(trained), weights_of(tmp_path / "r/cyclegan-d-000")
    assert all(torch.allclose(start[k], end[k], atol=1e-8) for k in start)


def test_evaluate_says_its_protocol_and_agrees_with_the_end_of_training(trained):
    text = run("evaluate", "--checkpoint", trained / "checkpoint.pt", "--out", "scores.json")
    assert "protocol: " in text and "32x32" in text and "FID" in text
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    scores = json.loads(Path("scores.json").read_text())
    for direction in ("AtoB", "BtoA"):
        assert scores[direction]["n_real"] == scores[direction]["n_fake"] == 100
        assert scores[direction]["error"] == pytest.approx(last[direction]["error"])


# ---- mistakes ----


def test_mistakes_in_options_end_in_one_line(capsys, tmp_path):
    faces(tmp_path / "d/trainA", 3), faces(tmp_path / "d/trainB", 3)
    (tmp_path / "no_B/trainB").mkdir(parents=True), faces(tmp_path / "no_B/trainA", 3)
    faces(tmp_path / "only_A/trainA", 3)
    small = [*TINY.split(), "--epochs", "1"]
    cases = [
        (["--lr", "-1"], "'-1' is not a finite number above 0"),
        (["--lr", "nan"], "'nan' is not a finite number"),
        (["--batch", "0"], "'0' is not a whole number above 0"),
        (["--epochs", "x"], "--epochs"),
        (["--nonsense"], "unknown: --nonsense. See cyclegan.py train --help"),
        (["trian"], "train, translate, evaluate"),
        (["--device", "mps"], "--device mps"),
        (["translate", "--checkpoint", "a", "--input", "d", "--out", "a.jpg"], "a: no such file"),
        (["--data", "nowhere"], "nowhere"),
        (["--data", "d", *small, "--batch", "4"], "batch is 4"),
        (["--data", "no_B", *small], "empty"),
        (["--data", "only_A", *small], "trainB"),
        (["--data", "d", *small, "--crop-size", "30"], "multiple of 4"),
        (["--data", "d", *small, "--crop-size", "40"], "is above --load-size 36"),
        (["--data", "d", *small, "--G", "unet_256"], "multiple of 256"),
        (["--data", "d", *small, "--channels-A", "1"], "--lambda-id 0"),
        (["--epochs", "3", "--epochs-decay", "4"], "--epochs-decay 4"),
        (["--beta1", "1.5"], "not a number from 0 to below 1"),
        (["--gan-mode", "wgangp", "--preprocess", "none"], "that crops"),
        (["--device", "warp"], "--device warp"),
        (["--device", "cuda:1000"], "CUDA devices"),
        (["--resume", "nowhere"], "--resume nowhere"),
        (["--data", "d", *small, "--checkpoint", "none.pt"], "none.pt"),
        (["translate", "--checkpoint", "none.pt", "--input", "d"], "none.pt"),
        (["translate", "--input", "d"], "--checkpoint"),
        (["--resume", "d/trainA/0.jpg"], "no args.json"),
        (["--data", "~nobody/d"], "~nobody/d"),
        (["--data", "d" * 300], "too long"),
        (["evaluate", "--checkpoint", "d"], "a folder"),
    ]
    if not torch.cuda.is_available():
        cases.append((["--device", "cuda"], "--device cpu"))
    for args, message in cases:
        assert message in fails(capsys, *args), args
    assert not Path("runs").exists() and not Path("out").exists()  # a mistake leaves nothing


def test_a_picture_smaller_than_the_crop_is_named(capsys, tmp_path):
    faces(tmp_path / "d/trainA", 3), faces(tmp_path / "d/trainB", 3)
    options = ["--data", "d", *TINY.split(), "--preprocess", "crop", "--crop-size", "64"]
    assert "40x40 picture is smaller than --crop-size 64" in fails(capsys, *options)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_checkpoint(capsys, tmp_path):
    faces(tmp_path / "d/trainA", 4), faces(tmp_path / "d/trainB", 4)
    options = ["--data", "d", *TINY.split(), "--epochs", "40", "--every", "4", "--lr", "1e30"]
    line = fails(capsys, *options)
    assert "became" in line and "last good checkpoint" in line


def test_weights_that_are_not_finite_are_not_saved(capsys, tmp_path):
    faces(tmp_path / "d/trainA", 4), faces(tmp_path / "d/trainB", 4)
    options = ["--data", "d", *TINY.split(), "--epochs", "1", "--every", "2", "--lr", "3e38"]
    line = fails(capsys, *options)  # of the first step, whose losses are those of good weights
    assert "G_AB is not finite by step 1; last good checkpoint none yet" in line
    assert not list(Path("runs").glob("*/*.pt"))


def test_a_resumed_run_removes_what_killed_ones_left_half_written(tmp_path):
    faces(tmp_path / "d/trainA", 4), faces(tmp_path / "d/trainB", 4)
    main("--data", "d", *TINY.split(), "--epochs", 1)
    folder = Path("runs/cyclegan-d-000")
    (folder / "checkpoint-0000001.pt.4242.part").write_bytes(b"half of it")
    main("--resume", folder, "--epochs", 2)
    assert not list(folder.glob("*.part"))


def test_damaged_and_foreign_checkpoints_are_refused(trained, capsys, tmp_path):
    good = (trained / "checkpoint.pt").read_bytes()
    Path("cut.pt").write_bytes(good[: len(good) // 2])
    Path("start.pt").write_bytes(good[:1000])
    Path("text.pt").write_text("not a checkpoint")
    Path("empty.pt").write_bytes(b"")
    torch.save({"model": "stylegan2", "nets": {}}, "other.pt")
    torch.save({"some.weight": torch.zeros(3)}, "foreign.pth")
    torch.save([1, 2], "list.pt")
    torch.save({"model": "cyclegan", "config": 3}, "config.pt")
    Path("strange.pt").write_bytes(b"\x80\x02.")  # an IndexError of torch.load
    picture = faces(tmp_path / "in", 1)
    for name, message in (
        ("cut.pt", "damaged"),
        ("start.pt", "damaged"),
        ("text.pt", "not a checkpoint"),
        ("empty.pt", "not a checkpoint"),
        ("other.pt", "stylegan2"),
        ("foreign.pth", "not a CycleGAN network"),
        ("list.pt", "neither"),
        ("config.pt", "does not hold"),
        ("strange.pt", "not a checkpoint"),
    ):
        line = fails(capsys, "translate", "--checkpoint", name, "--input", picture)
        assert message in line and name in line


class Malicious:
    def __reduce__(self):
        return os.system, ("touch /tmp/cyclegan-test-was-here",)


@pytest.mark.parametrize("old_format", [False, True])
def test_a_checkpoint_that_would_run_code_is_refused_by_name(capsys, tmp_path, old_format):
    mark = Path("/tmp/cyclegan-test-was-here")
    mark.unlink(missing_ok=True)
    torch.save(
        {"model.1.weight": Malicious()}, "evil.pth", _use_new_zipfile_serialization=not old_format
    )
    line = fails(
        capsys, "translate", "--checkpoint", "evil.pth", "--input", faces(tmp_path / "in", 1)
    )
    assert "system" in line and not mark.exists()


def test_checkpoints_that_do_not_suit_the_command_are_refused(trained, capsys, tmp_path):
    ours = trained / "checkpoint.pt"
    state = torch.load(ours, weights_only=True)
    torch.save(state["nets"]["D_B"], "latest_net_D_A.pth")
    torch.save({"model.0.weight": torch.zeros(4, 3, 4, 4)}, "short.pth")
    faces(tmp_path / "d/trainA", 4), faces(tmp_path / "d/trainB", 4)
    small = ["--data", "d", *TINY.split()]
    cases = [
        (["translate", "--checkpoint", "latest_net_D_A.pth", "--input", "d"], "no D_B|no G_AB"),
        (["evaluate", "--checkpoint", "latest_net_D_A.pth", "--data", "d"], "no generator|no G_AB"),
        (
            ["translate", "--checkpoint", "short.pth", "--input", "d"],
            "model.2.weight|model.5.weight",
        ),
        (["evaluate", "--checkpoint", ours, "--size", "30"], "--size 30"),
        ([*small, "--checkpoint", ours, "--channels-A", "1", "--channels-B", "1"], "channels"),
        (["--resume", trained, "--batch", "4"], "--batch was 2"),
    ]
    before = (trained / "args.json").read_bytes()
    for args, message in cases:
        line = fails(capsys, *args)
        assert any(m in line for m in message.split("|")), line
    assert (trained / "args.json").read_bytes() == before


def test_scores_of_a_single_test_picture_and_without_any(capsys, tmp_path):
    faces(tmp_path / "d/trainA"), faces(tmp_path / "d/trainB", domain=1)
    options = ["--data", "d", *TINY.split(), "--epochs", "1", "--workers", "0", "--out", "r"]
    cyclegan.main(options)
    faces(tmp_path / "d/testA", 1), faces(tmp_path / "d/testB", 1)
    cyclegan.main(options)
    assert "cycle error" in capsys.readouterr().out
    assert "fd8" not in json.loads(Path("r/cyclegan-d-001/metrics.jsonl").read_text())["AtoB"]


@pytest.mark.parametrize("mode", ["crop", "scale_width", "scale_width_and_crop", "none"])
def test_every_preprocess_mode_trains(tmp_path, mode):
    faces(tmp_path / "d/trainA", 2, size=45), faces(tmp_path / "d/trainB", 2, size=50, domain=1)
    options = ["--data", "d", *TINY.split(), "--batch", "1", "--epochs", "1", "--out", "r"]
    cyclegan.main([*options, "--preprocess", mode, "--pool-size", "0"])


def test_resuming_may_change_length_pool_and_precision_and_remembers_it(tmp_path):
    faces(tmp_path / "d/trainA", 4), faces(tmp_path / "d/trainB", 4, domain=1)
    options = ["--data", "d", *TINY.split(), "--epochs", "1", "--out", "r", "--workers", "0"]
    cyclegan.main(options)
    folder = Path("r/cyclegan-d-000")
    more = ["--epochs", "3", "--pool-size", "7", "--precision", "bf16"]
    cyclegan.main(["--resume", str(folder), *more])
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 6
    args = json.loads((folder / "args.json").read_text())
    assert (args["epochs"], args["epochs_decay"], args["pool_size"]) == (3, None, 7)


@pytest.mark.parametrize("other", ["--norm batch", "--ngf 3", "--G unet_128", "--dropout"])
def test_resuming_with_other_networks_is_refused(trained, capsys, other):
    before = (trained / "args.json").read_bytes()
    option = other.split()[0]
    assert f"--resume: {option} was" in fails(capsys, "--resume", trained, *other.split())
    assert (trained / "args.json").read_bytes() == before


def test_a_reader_that_has_read_enough_ends_a_command_in_one_line():
    command = f"{sys.executable} {ROOT / 'cyclegan.py'} --data toy --epochs 1 | true"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert found.stderr == "cyclegan.py: stopped: nobody reads the output any more.\n"


def test_a_picture_is_not_scaled_beyond_memory(trained, capsys):
    faces(Path("in"), 1)
    here = ["translate", "--checkpoint", trained, "--input", "in", "--size", 10**7]
    assert "10000000 x 10000000 pixels" in fails(capsys, *here)


def test_a_run_goes_on_from_the_last_kept_checkpoint_if_that_is_all(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    (folder / "checkpoint.pt").unlink()
    (folder / "checkpoint-0000200.pt").write_bytes(b"an older one")
    run("translate", "--checkpoint", folder, "--input", faces(tmp_path / "in", 1), "--out", "out")
    assert "resumed at step 400" in run("--resume", folder)
    assert (folder / "log.jsonl").read_bytes() == (trained / "log.jsonl").read_bytes()


def test_resuming_with_a_damaged_checkpoint_keeps_what_was_there(trained, capsys, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("args.json", "log.jsonl"):
        (folder / name).write_bytes((trained / name).read_bytes())
    log = (folder / "log.jsonl").read_bytes()
    (folder / "checkpoint.pt").write_bytes(b"PK damaged")
    assert fails(capsys, "--resume", folder).endswith("not a checkpoint, or a damaged one.")
    shutil.copy(trained / "checkpoint-0000400.pt", folder)
    error = fails(capsys, "--resume", folder)
    assert error.endswith("Move it away to go on from checkpoint-0000400.pt beside it.")
    assert (folder / "log.jsonl").read_bytes() == log
    error = fails(capsys, "translate", "--checkpoint", folder / "log.jsonl", "--input", folder)
    assert error.endswith("not a checkpoint, or a damaged one.")  # not to be moved away


def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path):
    faces(tmp_path / "d/trainA", 40), faces(tmp_path / "d/trainB", 40)
    options = ["--data", "d", *TINY.split(), "--epochs", 1, "--every", 1000, "--out", tmp_path]
    run(*options)
    folder = tmp_path / "cyclegan-d-000"
    before = (folder / "checkpoint.pt").read_bytes()
    command = " ".join(script("--resume", folder, "--epochs", 2))
    limit = f"ulimit -f {len(before) // 2048}; exec {command}"
    done = subprocess.run(["bash", "-c", limit], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "cannot write" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert not list(folder.glob("*.part"))


def test_unreadable_pictures_are_named_and_skipped_by_translate(trained, capsys, tmp_path):
    folder = faces(tmp_path / "in", 2)
    (folder / "text.png").write_text("hello")
    (folder / "cut.jpg").write_bytes((folder / "0.jpg").read_bytes()[:300])
    options = ["--checkpoint", trained / "checkpoint.pt", "--input", folder]
    cyclegan.main([str(o) for o in ["translate", *options]])
    captured = capsys.readouterr()
    assert "text.png" in captured.err and "cut.jpg" in captured.err
    assert "2 written, 2 skipped" in captured.out
    for name in ("0.jpg", "1.jpg"):
        (folder / name).unlink()
    assert "not one readable" in fails(capsys, "translate", *options)


def test_translate_never_replaces_its_input(trained, capsys, tmp_path):
    Image.new("RGB", (16, 16), "red").save("a.png")
    before = Path("a.png").read_bytes()
    options = ["translate", "--checkpoint", trained / "checkpoint.pt", "--input"]
    assert "PNG files" in fails(capsys, *options, "a.png", "--out", "b.jpg")
    for where in (["a.png", "--out", "a.png"], ["a.png", "--out", "."], [".", "--out", "."]):
        assert "original" in fails(capsys, *options, *where)
    assert Path("a.png").read_bytes() == before


def test_training_skips_one_bad_file_in_a_hundred_and_refuses_more(capsys, tmp_path):
    faces(tmp_path / "d/trainA", 120), faces(tmp_path / "d/trainB", 3)
    (tmp_path / "d/trainA/007.jpg").write_text("not a picture")
    options = ["--data", "d", *TINY.split(), "--batch", "20", "--epochs", "1", "--out", "r"]
    cyclegan.main(options)
    assert "skipped" in capsys.readouterr().err
    (tmp_path / "d/trainA/008.jpg").write_text("not a picture")
    line = fails(capsys, *options)
    assert "2 of 122" in line and ".jpg" in line


def test_the_networks_and_losses_can_be_pasted_elsewhere():
    text = (ROOT / "cyclegan.py").read_text()
    bar = "# " + "=" * 77 + "\n"
    sections = dict(zip(*[iter(text.split(bar)[1:])] * 2, strict=True))
    names = "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n"
    names += "import ops_cuda as ops\nINIT_STD = 0.02\n"
    here = {}
    exec(names + sections["# Networks\n"] + sections["# Losses\n"], here)
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    for kind in ("resnet", "unet"):
        size = dict(blocks=1) if kind == "resnet" else dict(downs=5)
        G = here["init_weights"](here["build"](dict(kind=kind, ngf=4, **size)))
        for D in (here["PatchDiscriminator"](ndf=4), here["PixelDiscriminator"](ndf=4)):
            loss = here["discriminator_loss"](D, x, G(x))
            loss += here["gradient_penalty"](D, x, G(x), torch.rand(2, 1))
            assert loss.isfinite() and loss > 0
