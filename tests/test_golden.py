"""The vectors of the official implementations: every SYSTEM/*.npz below $GOLDEN_DIR is one test.

Each file names its case, its networks by their official arguments, and formulas for weights and
inputs; outputs are compared in float64. A file, a case or an output that is not understood fails.
GOLDEN_DIR defaults to tests/golden, a part of the set.
"""

import functools
import json
import os
import types
import zlib
from pathlib import Path

import golden_semantic_stylegan
import golden_stargan_v2
import golden_stylegan
import golden_stylegan2
import numpy as np
import pytest
import torch
from eager import Eager

import common
import cyclegan

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
STYLEGANS = dict.fromkeys(golden_stylegan2.PAPERS, golden_stylegan2.check)
STYLEGANS |= {"stylegan": golden_stylegan.check}
FILES = sorted(GOLDEN_DIR.glob("*/*.npz"))


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("path", FILES, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_golden(path):
    if path.parent.name in STYLEGANS:
        STYLEGANS[path.parent.name](path)
        return
    case = Case(path)
    SYSTEMS[path.parent.name](case)
    case.all_compared()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("impl", ["cuda", "ref"])
@pytest.mark.parametrize("path", FILES, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_golden_on_a_gpu_in_float32(path, impl, monkeypatch):
    no_kernels = path.parent.name not in (*STYLEGANS, "semantic_stylegan", "stargan_v2")
    if no_kernels or path.stem.startswith(("trajectory", "ada_controller", "schedule")):
        pytest.skip("its layers, one by one, use no kernels, or float32 drifts in eight steps")
    monkeypatch.setenv("GAN_OPS", impl)  # for networks; operators are given impl
    torch.set_default_dtype(torch.float32)
    with common.exact_float32(torch.device("cuda")):
        if path.parent.name in STYLEGANS:
            STYLEGANS[path.parent.name](path, device="cuda", dtype=torch.float32, impl=impl)
            return
        with torch.device("cuda"):
            case = Case(path)
            SYSTEMS[path.parent.name](case)
            case.all_compared()


def test_there_are_vectors_of_every_system():
    found, known = {f.parent.name for f in FILES}, {*STYLEGANS, *SYSTEMS}
    assert found == known if "GOLDEN_DIR" not in os.environ else found and found <= known, found


# ---- the format ----


def formula(entry, tag):
    """The array that an entry of `meta` describes: standard draws from a seed made of its name."""
    dtype, shape = entry.get("dtype", "float32"), tuple(entry["shape"])
    if "values" in entry:
        return np.array(entry["values"], dtype).reshape(shape)
    if entry["dist"] == "const":
        return np.full(shape, entry["add"], dtype)
    rng = np.random.RandomState(zlib.crc32((tag + entry["name"]).encode()))
    draw = rng.standard_normal(shape) if entry["dist"] == "normal" else rng.random_sample(shape)
    draw = np.abs(draw) if entry.get("abs") else draw
    return np.asarray(draw * entry["mul"] + entry["add"]).astype(dtype)


def group(spec):
    """{official name: array} of a network or of a group of inputs."""
    return {e["name"]: formula(e, spec["tag"]) for e in spec["entries"]}


def weights(spec):
    """A network's arrays, checked against the sum that the file states."""
    arrays = group(spec)
    total = sum(np.abs(a.astype(np.float64)).sum() for a in arrays.values())
    assert abs(total - spec["abs_sum"]) < 1e-9 * spec["abs_sum"]
    return arrays


def ready(x):
    """A tensor or network of the default type, on the default device."""
    return x.to(torch.get_default_device(), torch.get_default_dtype())


def inputs(spec):
    return {name: ready(torch.as_tensor(a)) for name, a in group(spec).items()}


def stats(t):
    """The four-number summary of a tensor; the last number feels the order of the elements."""
    t = t.detach().flatten()
    k = torch.arange(1, t.numel() + 1, dtype=t.dtype)
    return torch.stack(
        [t.mean(), t.square().mean().sqrt(), t.abs().max(), (t * (0.1 * k).cos()).mean()]
    )


def numpy_stats(array):
    return stats(torch.as_tensor(np.asarray(array, np.float64))).numpy()


class Case:
    """One file: its meta, its arrays, and which of them have been compared."""

    def __init__(self, path):
        self.arrays = np.load(path)
        self.meta = json.loads(str(self.arrays["meta"]))
        self.name = self.meta["case"]
        self.compared = set()

    def __getitem__(self, key):
        return self.arrays[key]

    def __contains__(self, key):
        return key in self.arrays.files

    def __iter__(self):
        return iter(self.arrays.files)

    def equal(self, key, mine, rel=None, least=1e-12, each=False):
        """|mine - stored| <= rel * max|stored| + least, or, each, rel * |stored| + least; rel: what
        storing in its type leaves. What the file does not hold is not compared; see all_compared.
        """
        if key not in self:
            return
        stored = self.arrays[key]
        mine = np.asarray(mine.detach().cpu() if torch.is_tensor(mine) else mine)
        assert mine.shape == stored.shape, f"{key}: {mine.shape}, stored {stored.shape}"
        assert np.isfinite(mine).all(), key
        if torch.get_default_dtype() == torch.float32:
            self.equal_in_float32(key, mine, stored)
            return
        rel = (2e-7 if stored.dtype == np.float32 else 1e-9) if rel is None else rel
        error, size = np.abs(mine.astype(np.float64) - stored), np.abs(stored.astype(np.float64))
        allowed = rel * (size if each else size.max(initial=0)) + least
        assert (error <= allowed).all(), f"{key}: off by {error.max():.3g}, allowed {allowed}"
        self.compared.add(key)

    def equal_in_float32(self, key, mine, stored):
        """The rules for float32: gradients as a whole, everything else by the drift of the official
        code's own float32 run."""
        error = np.abs(mine.astype(np.float64) - stored)
        if "grad_norm" in key:
            allowed = 2e-3 * np.abs(stored) + 1e-6 * np.abs(stored).max(initial=0)
        elif "grad" in key and not key.endswith("_stats"):
            error, allowed = np.linalg.norm(error), 2e-2 * np.linalg.norm(stored)
        else:
            largest, drift = self.meta["tol"][key]
            allowed = 10 * drift + 5e-6 * largest
        assert (error <= allowed).all(), f"{key}: off by {error.max():.3g}, allowed {allowed}"
        self.compared.add(key)

    def all_compared(self):
        outputs = {
            k for k in self.arrays.files if k != "meta" and not k.startswith(("in/", "f32/"))
        }
        outputs -= {"loss_names"}
        assert outputs, "nothing to compare"
        assert self.compared == outputs, f"not compared: {sorted(outputs - self.compared)}"


# ---- CycleGAN ----

# The official code names D_A what judges domain B; ours are named by what they judge.
OURS = {"G_A": "G_AB", "G_B": "G_BA", "D_A": "D_B", "D_B": "D_A"}
LOSSES = {
    **OURS,
    "cycle_A": "cycle_A",
    "cycle_B": "cycle_B",
    "idt_A": "idt_B",  # what G_A makes of a B
    "idt_B": "idt_A",
}


def official_network(spec):
    """from_official on the formula weights; its config must be what the official arguments say."""
    net, kwargs = cyclegan.from_official(weights(spec)), spec["kwargs"]
    assert spec["class"] in ("define_G", "define_D"), spec["class"]
    assert net.config["norm"] == kwargs.get("norm", "batch")
    assert net.config["in_channels"] == kwargs["input_nc"]
    kinds = {
        "resnet_9blocks": {"kind": "resnet", "blocks": 9},
        "resnet_6blocks": {"kind": "resnet", "blocks": 6},
        "unet_128": {"kind": "unet", "downs": 7},
        "unet_256": {"kind": "unet", "downs": 8},
        "basic": {"kind": "patch", "n_layers": 3},
        "n_layers": {"kind": "patch", "n_layers": kwargs.get("n_layers_D", 3)},
        "pixel": {"kind": "pixel"},
    }
    wanted = kinds[kwargs.get("netG") or kwargs["netD"]]
    wanted["ngf" if "netG" in kwargs else "ndf"] = kwargs["ngf" if "netG" in kwargs else "ndf"]
    assert wanted.items() <= net.config.items(), (wanted, net.config)
    assert [n for n, _ in net.named_parameters()] == spec["param_names"]
    return net.double().train(spec.get("train", True))


def grad_norms(net):
    return [-1.0 if p.grad is None else p.grad.norm().item() for p in net.parameters()]


def check_network(case, label):
    """One network: output, activations, gradients, running statistics."""
    net = official_network(case.meta["nets"][label])
    layers = net.net if net.config["kind"] == "pixel" else net.model
    if net.config["kind"] == "unet":  # here activations are those of the convolutions
        convs = (torch.nn.Conv2d, torch.nn.ConvTranspose2d)
        layers = [m for m in net.modules() if isinstance(m, convs)]
    for i, layer in enumerate(layers):
        key = f"{label}/act/{i:02d}"
        layer.register_forward_hook(lambda m, x, y, key=key: case.equal(key, stats(y)))
    given = inputs(case.meta.get(f"{label}_inputs") or case.meta["inputs"])
    x = given["x"].requires_grad_(True)
    y = net(x)
    case.equal(f"{label}/y", y)
    (y * given["cot"]).sum().backward()
    case.equal(f"{label}/grad_x", x.grad)
    case.equal(f"{label}/grad_norm", grad_norms(net))
    for name in case.meta["nets"][label]["full_grads"]:
        case.equal(f"{label}/grad/{name}", net.get_parameter(name).grad)
    for name, buffer in net.named_buffers():
        case.equal(f"{label}/buf/{name}", buffer)


class Recorder(Eager):
    """Stands in for common.Run in train_step: recorded draws in, losses and gradients out."""

    def __init__(self, draws=()):
        self.draws, self.losses = list(draws), []

    def autocast(self):
        return torch.autocast("cpu", enabled=False)

    def rand(self, n):
        return torch.as_tensor(self.draws.pop(0)) if self.draws else torch.zeros(n)

    def backward(self, loss):
        loss.backward()
        self.losses.append(loss.detach())

    def step(self, opt):
        opt.step()
        opt.zero_grad(set_to_none=True)


def options(opt):
    return types.SimpleNamespace(
        gan_mode=opt["gan_mode"],
        lambda_A=opt["lambda_A"],
        lambda_B=opt["lambda_B"],
        lambda_id=opt["lambda_identity"],
    )


def weighted(name, losses, opt):
    """A loss of the official list, which are weighted, from ours, which are not."""
    weight = {"cycle_A": opt["lambda_A"], "cycle_B": opt["lambda_B"]}
    weight["idt_A"] = opt["lambda_B"] * opt["lambda_identity"]
    weight["idt_B"] = opt["lambda_A"] * opt["lambda_identity"]
    return losses.get(LOSSES[name], torch.zeros(())) * weight.get(name, 1.0)


def official_step(*args):
    """train_step without the gradient penalty, which the official CycleGAN never adds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cyclegan, "LAMBDA_GP", 0.0)
        return cyclegan.train_step(*args)


def check_losses(case):
    """Losses of one iteration, from given images and pooled fakes, and their gradients."""
    meta, opt = case.meta, case.meta["opt"]
    official = {k: official_network(spec) for k, spec in meta["nets"].items()}
    nets = [official[k] for k in ("G_A", "G_B", "D_B", "D_A")]
    given = inputs(meta["inputs"])
    real_A, real_B = given["real_A"], given["real_B"]

    run = Recorder()
    run.step = lambda opt: None  # gradients stay
    pools = [
        types.SimpleNamespace(query=lambda *_, k=k: given[k])
        for k in ("pool_fake_A", "pool_fake_B")
    ]
    losses = official_step(nets, [None, None], pools, real_A, real_B, options(opt), run)
    for name in ("G_A", "G_B", "cycle_A", "cycle_B", "idt_A", "idt_B"):
        case.equal(f"loss/{name}", weighted(name, losses, opt))
    case.equal("loss/G", run.losses[0])
    for name in ("D_A", "D_B"):
        case.equal(f"loss/{name}", losses[OURS[name]])

    for k, net in official.items():
        case.equal(f"grad_norm/{k}", grad_norms(net))
        for name in meta["full_grads"].get(k, ()):
            case.equal(f"grad/{k}/{name}", net.get_parameter(name).grad)

    with torch.no_grad():
        G_A, G_B = official["G_A"], official["G_B"]
        made = {"fake_B": G_A(real_A), "fake_A": G_B(real_B)}
        if opt["lambda_identity"] > 0:
            made |= {"idt_A": G_A(real_B), "idt_B": G_B(real_A)}
        made |= {"rec_A": G_B(made["fake_B"]), "rec_B": G_A(made["fake_A"])}
    for name, img in made.items():
        case.equal(f"img_stats/{name}", stats(img))
    case.equal("img/fake_B", made["fake_B"])

    for name in ("real", "fake") if "pred" in given else ():
        logits = given["pred"].clone().requires_grad_(True)
        loss = cyclegan.adversarial_loss(logits, name == "real", opt["gan_mode"])
        loss.backward()
        case.equal(f"ganloss/{name}", loss)
        case.equal(f"ganloss/{name}_grad", logits.grad)

    if "alpha" in given:
        check_gradient_penalty(case, official["D_A"], real_B, given["pool_fake_B"], given["alpha"])


def check_gradient_penalty(case, D, real, fake, alpha):
    mixes = {"mixed": alpha, "real": torch.ones_like(alpha), "fake": torch.zeros_like(alpha)}
    for name, alpha in mixes.items():
        D.zero_grad(set_to_none=True)
        gp = cyclegan.LAMBDA_GP * cyclegan.gradient_penalty(D, real, fake, alpha)
        gp.backward()
        case.equal(f"gp/{name}", gp)
        norms = [-1.0 if p.grad is None else p.grad.norm().item() for p in D.parameters()]
        case.equal(f"gp/{name}_grad_norm/D_A", norms)
        for key in case.arrays.files:
            if key.startswith(f"gp/{name}_grad/D_A/"):
                case.equal(key, D.get_parameter(key.split("/")[-1]).grad)
        a = alpha[:, :, None, None]
        x = (a * real + (1 - a) * fake).requires_grad_(True)
        (rows,) = torch.autograd.grad(D(x).sum(), x)
        case.equal(f"gp/{name}_grad_rows_norm", (rows.flatten(1) + 1e-16).norm(2, dim=1))


def pool_draws(p, slot, size):
    """Recorded draws as ImagePool takes them: u, and a number in [0, 1) that falls on the slot."""
    return torch.as_tensor(p), (torch.as_tensor(slot).clamp(min=0) + 0.5) / max(size, 1)


def check_image_pool(case):
    for i, pool_spec in enumerate(case.meta["pools"]):
        size = pool_spec["pool_size"]
        pool, returned, first = cyclegan.ImagePool(size), [], 0
        u, slot = pool_draws(case[f"in/{i}/p"], case[f"in/{i}/id"], size)
        for n in pool_spec["batches"]:
            k = slice(first, first + n)
            images = torch.arange(first, first + n).double().reshape(n, 1, 1, 1)
            returned += pool.query(images, u[k], slot[k]).flatten().tolist()
            first += n
        case.equal(f"{i}/returned", returned)
        held = [] if size == 0 else pool.images.flatten()[: int(pool.count)].tolist()
        case.equal(f"{i}/final_pool", held)


def check_lr_schedule(case):
    for i, s in enumerate(case.meta["schedules"]):
        flat, decay, first = s["n_epochs"], s["n_epochs_decay"], s["epoch_count"]
        epochs = range(first, flat + decay + 1)
        # The official step and cosine schedules start anew wherever a run does; linear does not.
        shift = 0 if s["lr_policy"] == "linear" else first - 1

        def rate(e, s=s, flat=flat, decay=decay, shift=shift):
            factor = cyclegan.lr_factor(
                e - shift, s["lr_policy"], flat + decay, decay, s.get("lr_decay_iters", 50)
            )
            return s["lr"] * factor

        case.equal(f"{i}/step_after_epoch", [rate(e) for e in epochs])
        case.equal(f"{i}/step_before_epoch", [rate(e + 1) for e in epochs])


def check_trajectory(case):
    """Iterations of train_step with the recorded pool draws."""
    meta, opt = case.meta, case.meta["opt"]
    official = {k: official_network(spec) for k, spec in meta["nets"].items()}
    nets = [official[k] for k in ("G_A", "G_B", "D_B", "D_A")]
    before = {k: [p.detach().clone() for p in net.parameters()] for k, net in official.items()}
    adam = {"lr": opt["lr"], "betas": (opt["beta1"], cyclegan.BETAS[1])}
    opts = [
        torch.optim.Adam([*nets[0].parameters(), *nets[1].parameters()], **adam),
        torch.optim.Adam([*nets[2].parameters(), *nets[3].parameters()], **adam),
    ]
    pools = [cyclegan.ImagePool(opt["pool_size"]), cyclegan.ImagePool(opt["pool_size"])]
    given, size = inputs(meta["inputs"]), opt["pool_size"]
    N = len(given["real_A/0"])
    draws = {
        k: pool_draws(case[f"in/{k}_pool_p"], case[f"in/{k}_pool_id"], size)
        for k in ("fake_A", "fake_B")
    }
    rows = []
    for step in range(meta["steps"]):
        k = slice(step * N, step * N + N)
        run = Recorder([draws[f][j][k] for f in ("fake_B", "fake_A") for j in (0, 1)])
        with torch.no_grad():
            fake_B = official["G_A"](given[f"real_A/{step}"])
        real_A, real_B = given[f"real_A/{step}"], given[f"real_B/{step}"]
        losses = official_step(nets, opts, pools, real_A, real_B, options(opt), run)
        rows.append([weighted(n, losses, opt).item() for n in case["loss_names"]])
        if step == 0:
            for key in [k for k in case.arrays.files if k.startswith("step0/param_norm/")]:
                case.equal(key, [p.norm().item() for p in official[key[-3:]].parameters()], 1e-7)
    case.equal("losses", rows, each=True)
    case.equal("final/fake_B", fake_B, 1e-7)
    for k, net in official.items():
        case.equal(f"final/param_norm/{k}", [p.norm().item() for p in net.parameters()], 1e-7)
        moved = [(p - q).norm().item() for p, q in zip(net.parameters(), before[k], strict=True)]
        if (key := f"final/update_norm/{k}") in case:
            still = case[key] < 1e-8  # biases before an instance norm
            case.equal(key, np.where(still, case[key], moved), 1e-7)
        for name in meta["final_tensors"][k]:
            case.equal(f"final/param/{k}/{name}", net.get_parameter(name), 1e-7)


def check_cyclegan(case):
    checks = {
        "image_pool": check_image_pool,
        "lr_schedule": check_lr_schedule,
        "trajectory": check_trajectory,
    }
    kind = next((k for k in checks if case.name.startswith(k)), None)
    if kind:
        checks[kind](case)
    elif case.name.startswith("losses"):
        check_losses(case)
    else:
        assert case.meta["nets"], case.name
        for label in case.meta["nets"]:
            check_network(case, label)


# ---- FID and KID ----

STAGE_WIDTHS = (64, 192, 768, 2048)


def formula_images(n, size, seed):
    rng = np.random.RandomState(seed)
    base = rng.randint(0, 256, (n, 3, 8, 8))
    times = -(-size // 8)
    base = base.repeat(times, 2).repeat(times, 3)[:, :, :size, :size]
    return (base + rng.randint(-40, 41, (n, 3, size, size))).clip(0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=1)
def inception(spec):
    """InceptionV3 in float64 with the weights of a net spec, as JSON: one serves all cases."""
    arrays = weights(json.loads(spec))
    with torch.device("meta"):
        net = common.InceptionV3()
    arrays = {name: torch.from_numpy(np.asarray(a)) for name, a in arrays.items()}
    net.load_state_dict(arrays, strict=True, assign=True)
    return net.double().eval()


def net_of(meta):
    return inception(json.dumps(meta["nets"]["inception"], sort_keys=True))


def stored(ref):
    """The tolerance of a float64 run: what storing it in float32 or float64 leaves."""
    return 1e-9 if ref.dtype == np.float64 else 2e-7


@torch.no_grad()
def inception_case(case, meta):
    net = net_of(meta)
    images = torch.from_numpy(formula_images(meta["N"], meta["size"], meta["image_seed"]))
    if "in/images" in case:
        assert np.array_equal(images, case["in/images"]), "formula images differ from in/images"
    modes = sorted({key.split("/")[0] for key in case if not key.startswith(("in/", "meta"))})
    known = []  # (input, its stages): at 299 pixels "tf1" and "clean" see the same input
    for mode in modes:
        x = common.resize_for_inception(images, mode, torch.float64)
        stages = next((s for y, s in known if torch.equal(x, y)), None)
        if stages is None:
            stages = [s.numpy() for s in net.stages(x)]
            known.append((x, stages))
        pool3 = stages[3].mean((2, 3))
        resized = (x.numpy() + 1) / 2 if mode == "pytorch_fid" else x.numpy() * 128 + 128
        yield f"{mode}/resized_sub", resized[:, :, ::13, ::13]
        yield f"{mode}/resized_stats", np.stack([numpy_stats(image) for image in resized])
        yield f"{mode}/pool3", pool3
        yield f"{mode}/logits_unbiased", pool3 @ net.fc.weight.numpy().T
        for k, (width, maps) in enumerate(zip(STAGE_WIDTHS, stages, strict=True)):
            rng = np.random.RandomState(zlib.crc32(f"idx:block{k}".encode()))
            yield f"{mode}/{width}", maps.mean((2, 3))
            yield f"{mode}/block{k}_channel_mean", maps.mean((2, 3))
            yield f"{mode}/block{k}_stats", np.stack([numpy_stats(image) for image in maps])
            yield f"{mode}/block{k}_samples", maps[0].ravel()[rng.randint(0, maps[0].size, 200)]


def inception_tolerance(key, ref, meta):
    if key.startswith(("tf1/", "clean/")):  # their resizing is in float32
        return 1e-5, 1e-12
    return stored(ref), 1e-12


def frechet_case(case, meta):
    for i in range(len(meta["cases"])):
        moments = [case[f"in/{i}/{name}"] for name in ("mu1", "sigma1", "mu2", "sigma2")]
        distance = common.frechet_distance(*moments)
        for key in ("exact", "pytorch_fid", "nvidia"):
            yield f"{i}/{key}", distance


def frechet_tolerance(key, ref, meta):
    return 0, 1e-6 * max(1, abs(float(ref)))


def features_case(case, meta):
    sets = group(meta["inputs"])
    for name in meta["cases"]:
        real, fake = (torch.from_numpy(sets[f"{name}/{k}"]) for k in (1, 2))
        mus = [common.mean_cov(f)[0] for f in (real, fake)]
        yield f"{name}/mu_stats", np.stack([numpy_stats(mu) for mu in mus])
        for ddof, official in ((1, "pytorch_fid"), (0, "nvidia")):
            moments = [common.mean_cov(f, ddof) for f in (real, fake)]
            yield f"{name}/sigma_ddof{ddof}_stats", np.stack([numpy_stats(c) for _, c in moments])
            distance = common.frechet_distance_of_features(real, fake, ddof)
            yield f"{name}/fid_{official}", distance
            yield f"{name}/fid_exact_ddof{ddof}", distance
            if real.shape[1] <= 512 or ddof == 1:  # eigenvalues take seconds in 2048 dimensions
                eigen = common.frechet_distance(*moments[0], *moments[1])
                assert abs(eigen - distance) <= 1e-6 * distance, f"{name} by eigenvalues: {eigen}"
        for j, (subsets, size) in enumerate(meta.get("kid", {}).get(name, [])):
            index = case[f"in/{name}/kid{j}_index"].reshape(subsets, 2, size)
            mean, _ = common.kid(real, fake, indices=[(r, f) for f, r in index])
            yield f"{name}/kid{j}_float64", mean
            yield f"{name}/kid{j}_nvidia", mean


def features_tolerance(key, ref, meta):
    if "/kid" in key:
        return (0, 1e-6) if key.endswith("_nvidia") else (1e-9, 1e-12)
    shapes = {e["name"]: e["shape"] for e in meta["inputs"]["entries"]}
    name = key.split("/")[0]
    # With fewer samples than dimensions the official square root is good to 1e-6 only.
    singular = any(samples <= d for samples, d in (shapes[f"{name}/{k}"] for k in (1, 2)))
    return (1e-6, 0) if "/fid_" in key and singular else (stored(ref), 1e-12)


@torch.no_grad()
def end_to_end_case(case, meta):
    net, moments = net_of(meta), []
    stage = STAGE_WIDTHS.index(meta["dims"])
    for name, seed in sorted(meta["seeds"].items()):
        images = formula_images(meta["N"], meta["size"], seed)
        images = torch.from_numpy(images if name == "a" else images // 2 + 60)
        features = []
        for batch in images.split(2):
            stages = net.stages(common.resize_for_inception(batch, "pytorch_fid", torch.float64))
            maps = next(maps for k, maps in enumerate(stages) if k == stage)
            features.append(maps.mean([2, 3]))
        mu, sigma = common.mean_cov(torch.cat(features))
        moments += [mu, sigma]
        yield f"{name}/mu", mu
        yield f"{name}/sigma_diag", sigma.diag()
        yield f"{name}/sigma_stats", numpy_stats(sigma)
    yield "fid", common.frechet_distance(*moments)


def end_to_end_tolerance(key, ref, meta):
    singular = meta["N"] <= meta["dims"]  # there the official square root is good to 1e-6 only
    return (1e-6 if key == "fid" and singular else stored(ref)), 1e-12


FID_KINDS = {  # how a case's name begins: (what we compute, how close it must be)
    "inception": (inception_case, inception_tolerance),
    "frechet": (frechet_case, frechet_tolerance),
    "features": (features_case, features_tolerance),
    "end_to_end_dims": (end_to_end_case, end_to_end_tolerance),
}


def check_fid(case):
    kind = next(k for k in FID_KINDS if case.name.startswith(k))
    compute, tolerance = FID_KINDS[kind]
    for key, mine in compute(case, case.meta):
        if key in case:
            case.equal(key, mine, *tolerance(key, case[key], case.meta))


SYSTEMS = {"cyclegan": check_cyclegan, "fid": check_fid, "stargan_v2": golden_stargan_v2.check}
SYSTEMS |= {"semantic_stylegan": golden_semantic_stylegan.check}
