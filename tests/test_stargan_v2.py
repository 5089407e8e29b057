"""stargan_v2.py: networks, losses, official files, and its commands run as a user runs them."""

import json
import math
import shutil
import types
from pathlib import Path

import commands
import numpy as np
import pytest
import torch
from commands import ROOT, no_stray_files, one_thread  # noqa: F401
from eager import Eager
from PIL import Image
from test_stylegan2 import jsonl, shuffled_weights

import common
import stargan_v2

WIDTHS = (
    "--size 32 --channel-base 128 --channel-max 8 --hidden-dim 8 --z-dim 4 --style-dim 4"
).split()
TINY = [*WIDTHS, *"--batch 2 --iters 6 --every 3 --workers 1".split()]
script, run, main, fails = commands.of(stargan_v2)


def domains(root, n=6, size=40, parts=("train", "test"), names=common.TOY_DOMAINS[:2]):
    """A folder of toy faces, PART/DOMAIN/0.jpg, ..."""
    for part in parts:
        for domain, name in enumerate(names):
            folder = Path(root, part, name)
            folder.mkdir(parents=True)
            for i in range(n):
                common.toy_face(i, domain, size).save(folder / f"{i}.jpg")
    return root


def tiny_networks(size=32, w_hpf=0.0, domains=2):
    options = dict(size=size, w_hpf=w_hpf, channels=3, channel_base=max(128, size), channel_max=8)
    options |= dict(z_dim=4, style_dim=4, hidden_dim=8)
    return stargan_v2.new_networks(types.SimpleNamespace(**options), domains)


# ---- networks ----


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        ({"kind": "G", "w_hpf": 1.0}, 43_467_395),
        ({"kind": "G"}, 33_892_995),
        ({"kind": "F"}, 2_438_272),
        ({"kind": "F", "domains": 3}, 3_259_072),
        ({"kind": "E"}, 20_916_928),
        ({"kind": "E", "domains": 3}, 20_949_760),
        ({"kind": "D"}, 20_852_290),
        ({"kind": "D", "domains": 3}, 20_852_803),
        ({"kind": "FAN"}, 6_333_603),
        ({"kind": "G", "size": 128}, 33_632_003),
        ({"kind": "E", "size": 128}, 20_799_744),
        ({"kind": "D", "size": 128}, 20_735_106),
        ({"kind": "G", "size": 512}, 33_964_099),
        ({"kind": "E", "size": 512}, 20_945_824),
        ({"kind": "D", "size": 512}, 20_881_186),
        ({"kind": "G", "size": 1024}, 33_984_803),
        ({"kind": "E", "size": 1024}, 20_952_848),
        ({"kind": "D", "size": 1024}, 20_888_210),
    ],
    ids=str,
)
def test_networks_have_the_official_numbers_of_parameters(config, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in stargan_v2.build(config).parameters()) == parameters


def test_initial_weights_are_he_normal_and_biases_zero():
    nets = stargan_v2.new_networks(types.SimpleNamespace(**stargan_v2.SIZES | {"size": 128}), 2)
    w = nets["G"].encode[2].conv2.weight
    assert abs(w.std() / math.sqrt(2 / w[0].numel()) - 1) < 0.01
    biases = [p for net in nets.values() for n, p in net.named_parameters() if n.endswith("bias")]
    assert all(b.abs().max() == 0 for b in biases)
    assert torch.equal(nets["G"].to_rgb[0].weight, torch.ones(128))


def test_each_sample_gets_the_output_of_its_own_domain():
    nets = tiny_networks(domains=3)
    x, z, y = torch.randn(4, 3, 32, 32), torch.randn(4, 4), torch.tensor([2, 0, 1, 2])
    for net, given, shape in ((nets["D"], x, (4,)), (nets["E"], x, (4, 4)), (nets["F"], z, (4, 4))):
        out = net(given, y)
        assert out.shape == shape
        for k in range(4):
            torch.testing.assert_close(net(given[k : k + 1], y[k : k + 1])[0], out[k])


@pytest.mark.parametrize("up", [False, True])
def test_a_decoder_block_without_residual_returns_the_shortcut_over_the_root_of_two(up):
    block = stargan_v2.AdainResBlock(4, 4, 2, 0.0, up)
    torch.nn.init.zeros_(block.conv2.weight), torch.nn.init.zeros_(block.conv2.bias)
    x = torch.randn(2, 4, 8, 8)
    wanted = x.repeat_interleave(2, 2).repeat_interleave(2, 3) if up else x
    torch.testing.assert_close(block(x, torch.randn(2, 2)), wanted / math.sqrt(2))


def test_with_high_pass_skips_a_decoder_block_has_no_shortcut():
    block = stargan_v2.AdainResBlock(4, 4, 2, 1.0)
    torch.nn.init.zeros_(block.conv2.weight), torch.nn.init.zeros_(block.conv2.bias)
    assert block(torch.randn(2, 4, 8, 8), torch.randn(2, 2)).abs().max() == 0


def test_the_high_pass_filter_drops_what_is_flat():
    y = stargan_v2.HighPass(1.0)(torch.ones(1, 2, 6, 6))
    assert y[:, :, 1:-1, 1:-1].abs().max() == 0 and y[0, 0, 0, 0] == 5


def test_masks_choose_where_detail_is_kept():
    G = tiny_networks(size=64, w_hpf=1.0)["G"]
    x, s = torch.randn(1, 3, 64, 64), torch.randn(1, 4)
    none, all_ = (G(x, s, [torch.full((1, 1, 256, 256), v)] * 2) for v in (0.0, 1.0))
    torch.testing.assert_close(none, G(x, s))
    assert (all_ - none).abs().max() > 0.1
    with pytest.raises(ValueError, match="w_hpf"):
        tiny_networks()["G"](torch.randn(1, 3, 32, 32), s, [torch.ones(1, 1, 8, 8)] * 2)


def test_resampling_in_a_convolution_is_resampling_beside_it():
    x = torch.randn(2, 3, 10, 6, dtype=torch.float64)
    up, down = (stargan_v2.Conv2d(3, 4, 3, 1, kind).double() for kind in ("up", "down"))
    doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    wanted = torch.nn.functional.conv2d(doubled, up.weight, up.bias, padding=1)
    torch.testing.assert_close(up(x), wanted)
    wanted = torch.nn.functional.conv2d(x, down.weight, down.bias, padding=1)
    torch.testing.assert_close(down(x), torch.nn.functional.avg_pool2d(wanted, 2))


# ---- losses and one step ----


def test_lambda_ds_falls_in_a_straight_line_to_zero():
    weights = [
        stargan_v2.lambda_ds_at(i, 2.0, 100_000) for i in (0, 50_000, 99_999, 100_000, 10**6)
    ]
    assert weights[:2] == [2.0, 1.0] and 0 < weights[2] < 1e-4 and weights[3:] == [0.0, 0.0]


def test_r1_of_a_linear_discriminator_is_the_squared_norm_of_its_weights():
    a, x = torch.randn(3, 8, 8), torch.randn(2, 3, 8, 8, requires_grad=True)
    penalty = stargan_v2.r1_penalty((x * a).sum([1, 2, 3]), x)
    torch.testing.assert_close(penalty, a.square().sum())


class Runner(Eager):
    """What train_step needs of common.Run."""

    randn = staticmethod(torch.randn)

    def autocast(self):
        return torch.autocast("cpu", enabled=False)

    def backward(self, loss):
        loss.backward()

    def step(self, *optimizers):
        for opt in optimizers:
            opt.step()
            opt.zero_grad()


def one_step(**rates):
    """train_step on tiny networks. Returns {network: (weights before, after)}."""
    torch.manual_seed(0)
    nets = list(tiny_networks().values())
    ema = [stargan_v2.average_of(net) for net in nets[:3]]
    everything = dict(zip(("G", "F", "E", "D", "G_ema", "F_ema", "E_ema"), nets + ema, strict=True))
    before = {name: [p.clone() for p in net.parameters()] for name, net in everything.items()}
    opts = [
        torch.optim.SGD(net.parameters(), rates.get(name, 0.0))
        for name, net in zip("GFED", nets, strict=True)
    ]
    args = types.SimpleNamespace(r1_gamma=1.0, lambda_sty=1.0, lambda_cyc=1.0, ema_beta=0.999)
    x, ref, ref2 = torch.rand(3, 2, 3, 32, 32) * 2 - 1
    batch = (x, ref, ref2, torch.tensor([0, 1]), torch.tensor([1, 1]))

    losses = stargan_v2.train_step(nets, ema, opts, batch, 1.0, args, Runner())
    assert len(losses) == 14 and all(v.isfinite() for v in losses.values())
    after = {name: list(net.parameters()) for name, net in everything.items()}
    return {name: (before[name], after[name]) for name in everything}


def test_each_optimiser_moves_its_own_network_and_the_average_follows_by_a_thousandth():
    for name in "GFED":
        moved = {
            other: any(not torch.equal(p, q) for p, q in zip(*pair, strict=True))
            for other, pair in one_step(**{name: 0.01}).items()
        }
        assert {other for other, has in moved.items() if has} == {name, f"{name}_ema"} - {"D_ema"}
    weights = one_step(G=0.01)
    for old, new, mean in zip(*weights["G"], weights["G_ema"][1], strict=True):
        torch.testing.assert_close(mean, 0.999 * old + 0.001 * new)


def test_the_style_encoder_is_not_stepped_with_references():
    """In the phase of latents it learns; in that of references it only passes gradients on."""
    steps, original = [], stargan_v2.generator_losses

    def watch(G, E, *rest):
        steps.append(next(E.parameters()).requires_grad)
        return original(G, E, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stargan_v2, "generator_losses", watch)
        one_step()
    assert steps == [True, False]


# ---- data ----


def test_random_parts_are_80_to_100_percent_and_nearly_of_the_pictures_shape():
    rng = np.random.default_rng(0)
    for W, H in ((100, 100), (64, 64), (300, 280)):
        for _ in range(300):
            x0, y0, x1, y1 = common.random_box(W, H, rng)
            assert 0 <= x0 < x1 <= W and 0 <= y0 < y1 <= H
            assert 0.78 < (x1 - x0) * (y1 - y0) / (W * H) <= 1
            assert 0.87 < (x1 - x0) / (y1 - y0) < 1.13
    assert common.random_box(1000, 100, rng) == (445, 0, 555, 100)  # none fits: the middle


def test_domains_are_drawn_alike_however_many_pictures_they_have(tmp_path, monkeypatch):
    domains("d/a", 2, parts=("train",), names=("few",))
    domains("d/b", 9, parts=("train",), names=("many",))
    Path("d/train").mkdir()
    Path("d/a/train/few").rename("d/train/few"), Path("d/b/train/many").rename("d/train/many")
    seen = []
    monkeypatch.setattr(common.Run, "batches", lambda run, item, *_: seen.append(item) or [])
    main("--data", "d/train", *TINY)
    *pictures, ys = seen[0](7)
    assert [x.shape for x in pictures] == [(32, 32, 3)] * 3
    assert all(np.array_equal(a, b) for a, b in zip(seen[0](7), (*pictures, ys), strict=True))
    share = np.mean([seen[0](n)[-1] for n in range(200)], 0)
    assert (abs(share - 0.5) < 0.1).all()


def test_the_toys_domains_share_no_face_and_know_the_true_counterparts():
    source = common.open_data("toy", size=32, toy=common.TOY_DOMAIN_FOLDERS)
    faces = {source.domain_and_seed(name)[1] for name in source.names}
    assert len(faces) == len(source.names) == 3300
    args = types.SimpleNamespace(data="toy", channels=3, cache="off")
    tests = stargan_v2.open_domains(args, source, ["val", "test"], lambda img: img)
    assert list(tests) == ["goblin", "human", "robot"]
    true = tests["human"].counterparts("robot", "RGB", 2)
    seed = source.domain_and_seed("test/human/0001.png")[1]
    assert np.array_equal(true[1].permute(1, 2, 0), np.asarray(common.toy_face(seed, 2, 32)))


# ---- train ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run folder of a short run on two domains."""
    out = tmp_path_factory.mktemp("trained")
    main("--data", domains(out / "d"), *TINY, "--out", out)
    return out / "stargan_v2-d-000"


def weights_of(folder):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return {(n, k): t for n, net in state["nets"].items() for k, t in net.items()}


def test_train_leaves_a_run_folder(trained):
    names = {p.name for p in trained.iterdir()}
    assert {"args.json", "stargan_v2.py", "log.jsonl", "metrics.jsonl", "samples"} <= names
    assert {"checkpoint.pt", "checkpoint-0000006.pt"} <= names
    sheets = sorted(p.name for p in (trained / "samples").iterdir())
    names = ("cycle", "latent", "reference")
    assert sheets == [f"000000{k}-{name}.png" for k in (3, 6) for name in names]
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    assert state["model"] == "stargan_v2" and state["args"]["domains"] == "goblin,human"
    assert list(state["nets"]) == ["G", "F", "E", "D", "G_ema", "F_ema", "E_ema"]
    row = jsonl(trained / "metrics.jsonl")[-1]
    assert row["n_fake"] == 12 and row["diversity"] > 0 and "error" not in row


def test_a_run_killed_twice_ends_as_one_that_was_not():
    options = ["--data", domains("d"), *TINY, "--iters", 60, "--every", 15, "--workers", 0]
    # The log has a line at every snapshot.
    whole, folder = commands.whole_and_killed(stargan_v2, options, [(15, 0.1), (30, 0.1)])
    expected, actual = weights_of(whole), weights_of(folder)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[k], actual[k]) for k in expected)
    logs = [jsonl(f / "log.jsonl") for f in (whole, folder)]
    for line in logs[0] + logs[1]:
        del line["sec"], line["mem_gb"]
    assert logs[0] == logs[1] and logs[0][-1]["step"] == 60
    assert jsonl(whole / "metrics.jsonl") == jsonl(folder / "metrics.jsonl")


def test_a_run_whose_moments_lie_otherwise_in_memory_goes_on_alike(trained):
    """Those of runs from before weights lay channels last did."""
    for name in ("new", "old"):
        shutil.copytree(trained, name)
    state = torch.load("old/checkpoint.pt", weights_only=True)
    for opt in state["opts"].values():
        for held in opt["state"].values():
            held |= {k: v.contiguous() for k, v in held.items()}
    torch.save(state, "old/checkpoint.pt")
    for name in ("new", "old"):
        main("--resume", name, "--iters", 8)
    new, old = weights_of(Path("new")), weights_of(Path("old"))
    assert all(torch.equal(new[k], old[k]) for k in new)


def test_a_finished_run_that_is_lengthened_stays_without_the_weight_of_diversity():
    options = ["--data", domains("d", 2), *TINY, "--batch", 50, "--iters", 2, "--every", 4]
    main(*options, "--out", "r")
    main("--resume", "r/stargan_v2-d-000", "--iters", 4)
    weights = [row["lambda_ds"] for row in jsonl(Path("r/stargan_v2-d-000/log.jsonl"))]
    assert weights == [1.0, 0.0]  # of steps 1 and 3; at --ds-iters 4 the last were 0.5


IN_DOUBLE = """import pathlib, sys, torch, common, stargan_v2
torch.set_default_dtype(torch.float64)
to_float, latents = common.to_float, common.latents
common.to_float = lambda images, device: to_float(images, device).double()
common.latents = lambda *args: latents(*args).double()
status = common.exit_status(stargan_v2.main)
left = [f.read_text().strip() for f in pathlib.Path("/proc/self/task").glob("*/comm")]
assert not any("gloo" in name for name in left), left  # they would abort as Python ends
sys.exit(status)
"""


def test_two_processes_make_the_update_of_one(tmp_path, monkeypatch):
    Path("double.py").write_text(IN_DOUBLE)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    options = ["--data", domains("d"), *TINY, "--batch", 4, "--device", "cpu"]
    commands.on_one_and_two_processes("double.py", *options)
    one, two = (weights_of(tmp_path / n / "stargan_v2-d-000") for n in ("one", "two"))
    for key, t in one.items():
        assert t.dtype == torch.float64
        torch.testing.assert_close(t, two[key], rtol=1e-9, atol=1e-9, msg=str(key))


@pytest.mark.parametrize(("precision", "iters"), [("bf16", 1), ("fp16", 6)])  # its scale falls
def test_half_precision_gives_every_network_its_gradients(precision, iters):
    options = ["--data", domains("d", 2), *TINY, "--iters", iters, "--every", 6]
    main(*options, "--precision", precision, "--out", "r")
    state = torch.load("r/stargan_v2-d-000/checkpoint.pt", weights_only=True)
    for name, opt in state["opts"].items():
        still = [k for k, p in opt["state"].items() if p["exp_avg"].abs().max() == 0]
        assert len(still) < 0.2 * len(opt["state"]), (name, still)  # branches of domains not drawn
    assert all(math.isfinite(v) for v in jsonl(Path("r/stargan_v2-d-000/log.jsonl"))[0].values())


def test_toy_is_scored_against_the_true_counterparts(capsys):
    main("--data", "toy", *TINY, "--iters", 1, "--out", "r")
    row = jsonl(Path("r/stargan_v2-toy-000/metrics.jsonl"))[0]
    assert {"error", "error_of_doing_nothing", "error_in_mean_style", "diversity", "fd8"} <= set(
        row
    )
    assert row["n_fake"] == 300 and "of doing nothing" in capsys.readouterr().out


def test_presets_set_the_papers_options_and_what_is_typed_wins(monkeypatch):
    found = []
    monkeypatch.setattr(stargan_v2, "train", found.append)
    for options in ("celeba_hq", "afhq", "x --preset celeba_hq", "x --preset anime",
                    "celeba_hq --lambda-ds 3", "x", "/disk/celeba_hq", "celeba_hq.zip", "/disk/toy",
                    "/disk/celeba_hq --preset afhq"):  # fmt: skip
        stargan_v2.main(["--data", *options.split()])
    assert [(a.w_hpf, a.lambda_ds) for a in found] == [
        (1.0, 1.0), (None, 2.0), (1.0, 1.0), (None, 2.0), (1.0, 3.0), (None, 2.0), (1.0, 1.0),
        (1.0, 1.0), (None, 2.0), (None, 2.0),
    ]  # fmt: skip
    assert [(a.batch, a.iters, a.lr, a.lr_f) for a in found[:1]] == [(8, 100_000, 1e-4, 1e-6)]


def official_file(path, nets, drop=(), **more):
    """An official checkpoint of networks {"G": ..., ...}."""
    theirs = {ours: name for name, ours in stargan_v2.OFFICIAL.items()}
    state = {theirs[name]: dict(net.state_dict()) for name, net in nets.items()} | more
    for net, name in drop:
        del state[net][name]
    torch.save(state, path)
    return path


def test_transfer_from_an_official_file_starts_D_anew_and_says_so(capsys):
    nets = {k: shuffled_weights(net) for k, net in tiny_networks().items() if k != "D"}
    official_file("010000_nets_ema.ckpt", nets)
    main("--data", domains("d"), "--checkpoint", "010000_nets_ema.ckpt", "--batch", 2, "--iters", 1,
         "--lr", 1e-12, "--lr-f", 1e-12, "--out", "r")  # fmt: skip
    said = capsys.readouterr().out
    assert "D: not in the checkpoint, starts anew" in said
    found = stargan_v2.load_networks("r/stargan_v2-d-000")[0]
    for name, net in nets.items():
        for other in (name, f"{name}_ema"):
            assert found[other].config == net.config
            for p, q in zip(found[other].parameters(), net.parameters(), strict=True):
                torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def wing(tmp_path_factory):
    """A landmark network's file with random weights, and with a key that is not needed."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("wing") / "wing.ckpt"
    state = common.FAN().state_dict() | {"unused.weight": torch.zeros(2)}
    torch.save({"state_dict": state}, path)
    return path


def test_with_high_pass_skips_masks_come_from_the_landmark_network(wing, monkeypatch, capsys):
    def masks(fan, x):  # the network itself takes seconds a step; vectors check its masks
        bright = x.mean(1, keepdim=True) / 2 + 0.5
        return [bright, bright * fan.l0.weight[0, 0].sigmoid()]

    monkeypatch.setattr(common.FAN, "masks", masks)
    data, options = domains("d", 2), [*TINY, "--size", 64, "--w-hpf", 1, "--iters", 1]
    main("--data", data, *options, "--fan", wing, "--out", "r")
    assert "masks of face landmarks are on" in capsys.readouterr().out
    folder = Path("r/stargan_v2-d-000")
    main("--resume", folder, "--iters", 2)  # the checkpoint has the landmark network
    nets = stargan_v2.load_networks(folder)[0]  # weights of shortcuts, unused, do not decay
    pairs = zip(nets["G"].named_parameters(), nets["G_ema"].parameters(), strict=True)
    still = {name for (name, p), q in pairs if torch.equal(p, q)}
    assert {name for name in still if "decode" in name} == {
        f"decode.{k}.conv1x1.weight" for k in (3, 4)
    }
    fan = common.load_fan(wing)
    for name, t in stargan_v2.load_networks(folder)[0]["FAN"].state_dict().items():
        assert torch.equal(t, fan.state_dict()[name])
    main("translate", "--checkpoint", folder, "--input", "d/test/human/0.jpg", "--domain", "goblin",
         "--seeds", 0, "--out", "a.png")  # fmt: skip
    nets = stargan_v2.load_networks(folder)[0]
    held = {name: nets[f"{name}_ema"] for name in "GFE"} | {"FAN": nets["FAN"]}
    official_file("ema.ckpt", held, [("generator", "hpf.filter")])  # as the official one
    main("translate", "--checkpoint", "ema.ckpt", "--input", "d/test/human/0.jpg", "--domain", 0,
         "--seeds", 0, "--out", "b.png")  # fmt: skip
    assert Image.open("a.png").tobytes() == Image.open("b.png").tobytes()


@pytest.mark.parametrize("new", [False, True], ids=["torch before 1.6", "torch since 1.6"])
def test_the_landmark_networks_file_may_hold_what_its_training_left(wing, new):
    """An epoch, NumPy's numbers, an optimiser's state; and lack what only training counts."""
    state, w = torch.load(wing)["state_dict"], torch.ones(2, requires_grad=True)
    more = dict(epoch=80, nme=np.float64(0.04), best=np.int64(3), curve=np.ones(3, np.float32))
    more |= dict(arch="FAN", optimizer=torch.optim.Adam([w]).state_dict())
    state = {k: t for k, t in state.items() if new or not k.endswith("num_batches_tracked")}
    torch.save(more | {"state_dict": state}, "a.ckpt", _use_new_zipfile_serialization=new)
    found = common.load_fan("a.ckpt").state_dict()
    assert all(torch.equal(found[name], state[name]) for name in found.keys() & state)


def test_landmarks_are_found_in_float32_whatever_training_uses(monkeypatch):
    monkeypatch.setattr(common, "landmark_masks", lambda maps: maps)
    fan, x = common.FAN(), torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        found = fan.masks(x)
    assert found.dtype == torch.float32 and torch.equal(found, fan.masks(x))


class Attack:
    def __reduce__(self):
        return Path.touch, (Path("run"),)


@pytest.mark.parametrize("new", [False, True], ids=["torch before 1.6", "torch since 1.6"])
def test_a_landmark_networks_file_that_would_run_code_is_refused(wing, new):
    state = torch.load(wing) | {"args": Attack(), "nme": np.float64(0.04)}
    torch.save(state, "a.ckpt", _use_new_zipfile_serialization=new)
    with pytest.raises(common.UserError, match="a.ckpt does not hold FAN weights"):
        common.load_fan("a.ckpt")
    assert not Path("run").exists()


def test_greyscale_trains_and_translates(tmp_path):
    main("--data", domains("d", 2), *TINY, "--channels", 1, "--iters", 1, "--out", "r")
    main("translate", "--checkpoint", "r/stargan_v2-d-000", "--input", "d/test/human", "--ref",
         "d/test", "--grid", "grid.png")  # fmt: skip
    assert Image.open("grid.png").size


# ---- official files ----


@pytest.mark.parametrize("w_hpf", [0.0, 1.0])
def test_from_official_reads_every_size_off_names_and_shapes(w_hpf):
    nets = tiny_networks(size=64, w_hpf=w_hpf, domains=3)
    theirs = {ours: name for name, ours in stargan_v2.OFFICIAL.items()}
    arrays = {
        f"{theirs[n]}.module.{k}": t.numpy()
        for n, net in nets.items()
        for k, t in net.state_dict().items()
    }
    again = stargan_v2.from_official(arrays)
    assert again.keys() == nets.keys()
    for name, net in nets.items():
        assert again[name].config == net.config
        for key, t in net.state_dict().items():
            assert torch.equal(again[name].state_dict()[key], t), (name, key)


def test_an_official_generator_alone_has_the_official_widths():
    with torch.device("meta"):
        arrays = stargan_v2.Generator(size=128, w_hpf=1.0).state_dict()
    arrays = {
        f"generator.{k}": torch.zeros(t.shape) for k, t in arrays.items() if k != "hpf.filter"
    }
    config = stargan_v2.from_official(arrays)["G"].config
    assert (config["size"], config["w_hpf"], config["channel_base"]) == (128, 1.0, 2**14)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda a: a.pop("generator.from_rgb.weight"), "from_rgb.weight"),
        (lambda a: a.pop("style_encoder.shared.1.conv1.bias"), "conv1.bias"),
        (lambda a: a.update({"generator.tanh.weight": torch.ones(4)}), "tanh.weight"),
        (lambda a: a.update({"netG.weight": torch.ones(4)}), "not a StarGAN v2 network"),
        (lambda a: a.update({"generator.from_rgb.weight": torch.ones(0, 3, 3, 3)}), "of another"),
        (lambda a: a.update({"style_encoder.unshared.x": torch.ones(1)}), "of another"),
    ],
)
def test_from_official_refuses_what_is_not_such_a_network(change, problem):
    theirs = {ours: name for name, ours in stargan_v2.OFFICIAL.items()}
    nets = tiny_networks().items()
    arrays = {f"{theirs[n]}.{k}": t for n, net in nets for k, t in net.state_dict().items()}
    change(arrays)
    with pytest.raises(ValueError, match=problem):
        stargan_v2.from_official(arrays)


@pytest.mark.parametrize("shape", [(), (2, 2)])
def test_an_official_file_with_a_tensor_of_an_odd_shape_ends_in_one_line(shape, capsys):
    domains("d", 1)
    nets = {k: v for k, v in tiny_networks(64, w_hpf=1.0).items() if k != "D"}
    translate = ["translate", "--checkpoint", "odd.ckpt", "--input", "d/test/human", "--domain", 0]
    for name, key in (
        ("G", "from_rgb.weight"),
        ("G", "hpf.filter"),
        ("G", "decode.0.norm1.fc.weight"),
        ("F", "shared.0.weight"),
        ("F", "unshared.0.6.weight"),
        ("E", "shared.0.weight"),
        ("E", "unshared.0.weight"),
    ):
        official_file("odd.ckpt", nets)
        state = torch.load("odd.ckpt")
        theirs = {ours: name for name, ours in stargan_v2.OFFICIAL.items()}
        state[theirs[name]][key] = torch.zeros(shape)
        torch.save(state, "odd.ckpt")
        line = fails(capsys, *translate, "--seeds", 0)
        assert "odd.ckpt does not hold stargan_v2 networks: " in line, (name, key)


# ---- translate ----


def translate(trained, *options):
    main("translate", "--checkpoint", trained, "--input", trained.parent / "d/test/human", *options)


def test_a_folder_goes_to_a_domain_in_the_style_of_a_latent_or_of_a_reference(trained):
    translate(trained, "--domain", "goblin", "--seeds", 3, "--out", "a")
    translate(trained, "--domain", 0, "--seeds", 3, "--out", "b")
    ref = trained.parent / "d/test/goblin/0.jpg"
    translate(trained, "--domain", "goblin", "--ref", ref, "--out", "c")
    pictures = [[p.read_bytes() for p in sorted(Path(out).iterdir())] for out in "abc"]
    assert [p.name for p in sorted(Path("a").iterdir())] == [f"{i}.png" for i in range(6)]
    assert pictures[0] == pictures[1] != pictures[2]
    assert {Image.open(p).size for p in Path("c").iterdir()} == {(32, 32)}


def cells(path, columns, rows):
    """{(column, row): picture} of a sheet of 32 px pictures, enlarged to 128; captions are left."""
    sheet = np.asarray(Image.open(path).convert("RGB"))
    sheet = sheet[18:, sheet.shape[1] - 132 * columns :][2::4, 2::4].copy()
    assert sheet.shape == (33 * rows, 33 * columns, 3)
    return {
        (x, y): sheet[33 * y :, 33 * x :][:32, :32] for x in range(columns) for y in range(rows)
    }


def test_in_grids_the_first_row_has_the_sources_and_the_first_column_the_references(trained):
    data = trained.parent / "d/test"
    humans, goblins = (
        [np.asarray(Image.open(data / name / f"{i}.jpg").resize((32, 32), 2)) for i in range(6)]
        for name in ("human", "goblin")
    )
    translate(trained, "--ref", data, "--grid", "reference.png")
    found = cells("reference.png", 1 + 6, 1 + 12)
    for i in range(6):
        assert np.array_equal(found[1 + i, 0], humans[i])
        assert np.array_equal(found[0, 1 + i], goblins[i])
        assert np.array_equal(found[0, 7 + i], humans[i])
    translate(trained, "--domain", "goblin", "--ref", data / "goblin/3.jpg", "--out", "a")
    assert np.array_equal(found[3, 4], np.asarray(Image.open("a/2.png")))  # source 2, reference 3
    translate(trained, "--domain", "goblin", "--seeds", "0-3", "--psi", 0.7, "--grid", "latent.png")
    found = cells("latent.png", 6, 1 + 4)
    translate(trained, "--domain", "goblin", "--seeds", 3, "--psi", 0.7, "--out", "b")
    assert np.array_equal(found[2, 0], humans[2])
    assert np.array_equal(found[2, 4], np.asarray(Image.open("b/2.png")))


def test_a_grid_says_that_it_leaves_pictures_out(trained, capsys):
    translate(trained, "--domain", "goblin", "--seeds", "0-32", "--grid", "a.png")
    assert "the first 32 of 33 styles" in capsys.readouterr().out
    cells("a.png", 6, 1 + 32)


def test_the_sheet_of_cycles_shows_source_reference_fake_and_reconstruction():
    nets = tiny_networks()
    examples = torch.randint(256, (2, 2, 3, 32, 32), dtype=torch.uint8)
    ema = [nets[name] for name in "GFE"]
    sheets = stargan_v2.sample_sheets(ema, list(examples), ["a", "b"], stargan_v2.no_masks)
    columns, rows = sheets["cycle"]
    assert rows == ["source", "reference", "fake", "reconstruction"]
    assert list(columns) == ["a 0", "a 1", "b 0", "b 1"]
    source, ref, fake, reconstruction = columns["b 1"]
    assert torch.equal(source, examples[1, 1]) and torch.equal(ref, examples[0, 1])
    s = stargan_v2.styles_of_references(nets["E"], source[None], 1)
    again = stargan_v2.translated(nets["G"], fake[None], s)[0].int()
    assert (again - reconstruction).abs().max() <= 1
    s = stargan_v2.styles_of_references(nets["E"], ref[None], 0)
    assert (stargan_v2.translated(nets["G"], source[None], s)[0].int() - fake).abs().max() <= 1


def test_of_a_folder_with_a_folder_per_domain_those_of_the_chosen_domain_are_references(trained):
    data = trained.parent / "d/test"
    translate(trained, "--domain", "goblin", "--ref", data, "--grid", "a.png")
    translate(trained, "--domain", "goblin", "--ref", data / "goblin", "--grid", "b.png")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_a_folder_per_domain_names_the_domains_of_an_official_file(trained, capsys):
    official_file("ema.ckpt", {k: v for k, v in tiny_networks().items() if k != "D"})
    options = ["translate", "--checkpoint", "ema.ckpt", "--input", trained.parent / "d/test/human"]
    domains("refs", 1)
    main(*options, "--ref", "refs/test", "--domain", "human", "--out", "a")
    main(*options, "--ref", "refs/test/human", "--domain", 1, "--out", "b")
    assert Path("a/3.png").read_bytes() == Path("b/3.png").read_bytes()
    assert "has 0, 1" in fails(capsys, *options, "--ref", "refs/test/human", "--domain", "human")


def test_domains_of_the_two_published_files_have_their_names(trained):
    afhq, celeba_hq = (tiny_networks(256, float(n == 2), n) for n in (3, 2))
    assert stargan_v2.domain_names(celeba_hq, {}) == ["female", "male"]
    for other in (tiny_networks(256, 0.0, 2), tiny_networks(128, 1.0, 2)):
        assert stargan_v2.domain_names(other, {}) == ["0", "1"]
    official_file("afhq.ckpt", {k: v for k, v in afhq.items() if k != "D"})
    picture = trained.parent / "d/test/human/0.jpg"
    for out, domain in (("a.png", "dog"), ("b.png", 1)):
        main("translate", "--checkpoint", "afhq.ckpt", "--input", picture, "--domain", domain,
             "--seeds", 0, "--out", out)  # fmt: skip
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_psi_0_gives_every_latent_the_same_style_and_psi_1_leaves_it(trained):
    F, z = stargan_v2.load_networks(trained)[0]["F_ema"], torch.randn(3, 4)
    mean, half, whole = (stargan_v2.styles_of_latents(F, z, 1, psi) for psi in (0.0, 0.5, 1.0))
    torch.testing.assert_close(mean, mean[:1].expand(3, -1))
    torch.testing.assert_close(half, (mean + whole) / 2)
    torch.testing.assert_close(whole, F(z, torch.ones(3, dtype=torch.long)))


def test_a_film_has_31_steps_from_each_style_to_the_next(trained):
    alphas = stargan_v2.film_alphas()
    assert len(alphas) == 31 and alphas[0] == 0 and alphas[-10:] == [1.0] * 10
    assert alphas == sorted(alphas) and alphas[11] == 0.5
    assert alphas[1] == pytest.approx(1 / (1 + math.exp(5)))
    G, sources = stargan_v2.load_networks(trained)[0]["G_ema"], torch.zeros(2, 3, 32, 32).byte()
    styles = {str(k): torch.randn(4) for k in range(3)}
    refs = torch.stack([torch.full((3, 32, 32), k * 100).byte() for k in range(3)])
    frames = list(stargan_v2.film(G, sources, [(0, styles, refs)], stargan_v2.no_masks))
    assert len(frames) == 62 + 10 and frames[0].size == (9 * 32, 6 * 32)  # enlarged three times
    assert [frames[k].getpixel((3, 150))[0] for k in (0, 30, 61, 71)] == [0, 100, 200, 200]
    translate(trained, "--domain", 1, "--seeds", "0-1", "--film", "film.webp")
    assert Image.open("film.webp").n_frames > 15


def test_a_film_that_is_too_large_is_refused_before_a_frame_is_made(trained, capsys, monkeypatch):
    monkeypatch.setattr(stargan_v2, "film", None)
    here = ["translate", "--checkpoint", trained, "--input", trained.parent / "d/test/human"]
    here += ["--domain", 1, "--seeds", "0-2", "--film"]
    monkeypatch.setattr(common, "available_memory", lambda: 8 * 6 * 2 * 96**2 * 62 - 1)
    assert "62 frames of 576x192 need 0.1 GB of memory" in fails(capsys, *here, "a.webp")
    monkeypatch.setattr(common, "grid", lambda images, columns: Image.new("L", (2731, 1)))
    assert "frames of 16386x5462, WebP holds" in fails(capsys, *here, "a.webp")
    assert "GB of memory" in fails(capsys, *here, "a.png") and not list(Path().glob("a.*"))


# ---- mistakes ----


def test_mistakes_in_options_end_in_one_line(trained, capsys, tmp_path):
    data, picture = domains("d", 2), "d/test/human/0.jpg"
    domains("one", 2, names=("human",))
    domains("other", 2, parts=("train",)), domains("more", 2, parts=("test",), names=("a", "b"))
    Path("more/test").rename("other/test")
    domains("comma", 2, parts=("train",), names=("a, b", "c"))
    domains("of_cyclegan", 2, parts=("",), names=("trainA", "trainB", "testA"))
    torch.save({"model": "cyclegan", "nets": {}}, "cyclegan.pt")
    torch.save({"some.weight": torch.zeros(3)}, "foreign.pth")
    Image.open(picture).save("a.png")
    here = ["translate", "--checkpoint", trained, "--input", picture]
    png = [*here[:-1], "a.png"]
    cases = [
        (["--lr-f", "-1"], "'-1' is not a finite number above 0"),
        (["--nonsense"], "unknown: --nonsense. See stargan_v2.py train --help"),
        (["--data", "nowhere"], "nowhere"),
        (["--data", "one", *TINY], "pictures in one/train: human"),
        (["--data", "d/test/human", *TINY], "pictures in d/test/human: none"),
        (["--data", "comma", *TINY], "rename the folder 'a, b'"),
        (["--data", "of_cyclegan", *TINY], "testA, trainA, trainB (CycleGAN's layout). Give each"),
        (["--resume", trained, "--preset", "anime"], "--preset was left out, anime would differ"),
        (["--data", ""], "--data is empty"),
        (["--data", "other", *TINY], "tests are of a, b, not of goblin, human"),
        (["--data", data, *TINY, "--size", 48], "--size 48: a power of two"),
        (["--data", data, *TINY, "--w-hpf", 1], "--size 64 or more"),
        (["--data", data, *TINY, "--size", 64, "--w-hpf", 1, "--fan", "no.ckpt"], "no.ckpt"),
        (["--data", data, *TINY, "--size", 64, "--w-hpf", 1], "wing.ckpt"),
        (["--data", data, *TINY, "--channel-base", 16], "no channels"),
        (["--data", data, *TINY, "--checkpoint", "cyclegan.pt"], "holds a cyclegan model"),
        (["--data", data, *TINY, "--checkpoint", "foreign.pth"], "not a StarGAN v2 network"),
        (["--preset", "cars"], "--preset"),
        (["--resume", "nowhere"], "--resume nowhere"),
        ([*here], "--seeds with --domain"),
        ([*here, "--seeds", 0], "--seeds needs --domain"),
        ([*here, "--seeds", 0, "--domain", "dog"], "the checkpoint has goblin, human"),
        ([*here, "--seeds", "0-3", "--domain", 0], "pass --grid or --film"),
        ([*here, "--seeds", 0, "--domain", 0, "--film", "a.webp"], "give two"),
        ([*here, "--seeds", "0-1", "--domain", 0, "--film", "a.mp4"], ".webp"),
        ([*here, "--seeds", 0, "--domain", 0, "--film", "a.gif", "--grid", "b.png"], "--grid"),
        ([*here, "--seeds", 0, "--domain", 0, "--out", "a", "--grid", "b.png"], "--out"),
        ([*here, "--seeds", 0, "--domain", 0, "--grid", "a.jpg"], "grids are PNG files"),
        ([*here, "--seeds", 0, "--domain", 0, "--out", "a", "--film", "a.gif"], "--out"),
        ([*here, "--ref", picture, "--domain", 0, "--psi", 0.5], "--psi"),
        ([*here, "--ref", picture], "of which domain"),
        ([*png, "--seeds", 0, "--domain", 0, "--grid", "a.png"], "would replace an original"),
        ([*here[:-1], "no", "--seeds", 0, "--domain", 0, "--grid", "b.png"], "--input no does not"),
        ([*png, "--seeds", "0-1", "--domain", 0, "--film", "a.png"], "would replace an original"),
        ([*here, "--ref", "a.png", "--domain", 0, "--out", "a.png"], "would replace an original"),
        (["evaluate", "--checkpoint", trained, "--out", "d"], "no file can be written to 'd'"),
        (["align", "--input", "nowhere"], "--input nowhere does not exist"),
        ([*here, "--ref", "nowhere", "--domain", 0], "--ref nowhere"),
        (["translate", "--checkpoint", "no.pt", *here[3:], "--seeds", 0, "--domain", 0], "no.pt"),
    ]  # fmt: skip
    commands.each_ends_in_one_line(fails, capsys, cases)


def test_an_optimiser_learns_only_with_its_own_rate(trained):
    args = json.loads((trained / "args.json").read_text())
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    rates = {name: float(opt["param_groups"][0]["lr"]) for name, opt in state["opts"].items()}
    assert rates == pytest.approx(dict(G=args["lr"], F=args["lr_f"], E=args["lr"], D=args["lr"]))
    assert {opt["param_groups"][0]["weight_decay"] for opt in state["opts"].values()} == {1e-4}


def test_the_networks_and_losses_can_be_pasted_elsewhere(trained):
    text = (ROOT / "stargan_v2.py").read_text()
    bar = "# " + "=" * 77 + "\n"
    sections = dict(zip(*[iter(text.split(bar)[1:])] * 2, strict=True))
    names = "import math\nimport torch\nfrom torch import nn\nfrom torch.nn import functional\n"
    names += "import ops_cuda as ops\nCHANNEL_BASE, CHANNEL_MAX = 2**14, 512\n"
    names += "SKIPS = {32: 0, 64: 1, 128: 1}\n"
    here = {}
    exec(names + sections["# Networks\n"] + sections["# Losses\n"], here)
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    nets = {}
    for name in ("G_ema", "F_ema", "D"):
        nets[name] = here["build"](state["config"][name]).eval()
        nets[name].load_state_dict(state["nets"][name])
    y, z = torch.tensor([0, 1]), torch.randn(2, state["config"]["F"]["z_dim"])
    x = torch.randn(2, 3, 32, 32)
    fake = nets["G_ema"](x, nets["F_ema"](z, y))
    losses = here["discriminator_losses"](nets["D"], x, y, fake, y)
    assert all(loss.isfinite() for loss in losses.values())
