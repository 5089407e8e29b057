"""The vectors of StyleGAN, for test_golden.py."""

import copy
import functools
import types

import numpy as np
import pytest
import torch
from eager import Eager
from golden_stylegan2 import Vectors, grads
from torch.func import functional_call

import stylegan


def tensors(case, tag, prefix="", gradient=False):
    """The variables of a network in official layout, without the prefix G_ of their names."""
    found = {
        (k.removeprefix("G_") if k.startswith("G_") else prefix + k): case.to(t)
        for k, t in case.weights[tag].items()
    }
    if gradient:
        for name, t in found.items():
            t.requires_grad_(not is_buffer(name))
    return found


def is_buffer(name):
    return name == "dlatent_avg" or "/noise" in name


def with_mapping(arrays, a):
    """The arrays of a synthesis network and a mapping network that nobody asks."""
    z, w, features = a["latent_size"], a["dlatent_size"], a["mapping_fmaps"]
    widths = [z] + [features] * (a["mapping_layers"] - 1) + [w]
    extra = {"dlatent_avg": torch.zeros(w)}
    for i, (I, O) in enumerate(zip(widths, widths[1:], strict=False)):
        extra |= {f"mapping/Dense{i}/weight": torch.zeros(I, O)}
        extra |= {f"mapping/Dense{i}/bias": torch.zeros(O)}
    return extra | arrays


def network(case, arrays, kind):
    """The network of official variables, by way of from_official, and the call of a function of it
    in which these variables are what gradients are of."""
    a = dict(case.args[kind])
    plain = {k: t.detach().cpu() for k, t in arrays.items()}
    case.set(stylegan, "W_AVG_BETA", a.get("dlatent_avg_beta", 0.995), 0.995)
    net = stylegan.from_official(plain, a).to(case.file.device, case.file.dtype)
    checks = dict(img_resolution=a["resolution"], c_dim=a["label_size"])
    checks |= dict(channel_max=a["fmap_max"]) if a["fmap_max"] == net.config["channel_max"] else {}
    assert all(net.config[k] == v for k, v in checks.items()), net.config
    # The official "fixed" structure knows no growing: it does not look at lod.
    fixed = case.args.get("structure") == "fixed"
    net.grow(0.0 if fixed else case.args.get("lod", 0.0))
    ours = {
        k: t.reshape(net.state_dict()[k].shape)
        for k, t in stylegan.official_tensors(arrays, a.get("fused_scale", "auto")).items()
    }

    def call(function, *args):
        return functional_call(
            Wrapped(net, function), {f"net.{k}": v for k, v in ours.items()}, args
        )

    return net, call


class Wrapped(torch.nn.Module):
    """A function of a network as a module, for functional_call."""

    def __init__(self, net, function):
        super().__init__()
        self.net, self.function = net, function

    def forward(self, *args):
        return self.function(self.net, *args)


def gradients(case, tag, arrays, prefix="dparam."):
    """Compares the gradients of official variables, in official layout and order."""
    of = {k: t for k, t in arrays.items() if not is_buffer(k)}
    grad = {k: torch.zeros_like(t) if t.grad is None else t.grad for k, t in of.items()}
    order = [k.removeprefix("G_") if k.startswith("G_") else k for k in case.weights[tag]]
    norms = [grad[k].norm() for k in order if not is_buffer(k)]
    case.equal("gradnorm", torch.stack(norms))
    for name in case.outputs:
        if name.startswith(prefix):
            key = name.removeprefix(prefix)
            case.equal(name, grad[key.removeprefix("G_") if key.startswith("G_") else key])


# ---- operators ----


def gain_of(kwargs):
    return kwargs.get("gain", 2**0.5)


def scaled(w, kwargs):
    """A weight in official layout, (kh, kw, I, O) or (I, O), in ours and scaled."""
    w = w.permute(3, 2, 0, 1) if w.ndim == 4 else w.T
    return w * runtime_scale(w[0].numel(), kwargs)


def runtime_scale(fan_in, kwargs):
    he = gain_of(kwargs) / fan_in**0.5
    return (he if kwargs.get("use_wscale", False) else 1) * kwargs.get("lrmul", 1)


def dense(x, p, kwargs):
    """stylegan.Linear with the weight in the place of its own."""
    I, O = p["weight"].shape
    layer = stylegan.Linear(I, O, bias=False, lr_mul=kwargs.get("lrmul", 1), gain=gain_of(kwargs))
    layer.gain = runtime_scale(I, kwargs)
    return functional_call(layer, {"weight": p["weight"].T}, (x.flatten(1),))


class Filter(torch.autograd.Function):
    """The official blur, of any taps: its gradient is the same again with the taps in reverse. The
    padding stays, so that for an even number of them this is not quite the adjoint."""

    @staticmethod
    def forward(ctx, x, f):
        ctx.f = f
        n = len(f)
        pad = [(n - 1) // 2, n // 2] * 2
        return stylegan.ops.upfirdn2d(x, f, padding=pad, flip_filter=True)

    @staticmethod
    def backward(ctx, gy):
        return Filter.apply(gy, ctx.f.flip(0)), None


def blur2d(x, kwargs):
    if not set(kwargs) - {"normalize"} and kwargs.get("normalize", True):
        return stylegan.ops.filter2d(x, stylegan.ops.binomial(3, x.device))  # its own taps
    normalize = kwargs.get("normalize", True)
    f = stylegan.ops.setup_filter(kwargs.get("f", [1, 2, 1]), normalize, separable=True)
    return Filter.apply(x, f.to(x))


def convolved(x, p, kwargs):
    w = scaled(p["weight"], kwargs)
    return stylegan.ops.conv2d(x, w, padding=w.shape[2] // 2)


def doubled(x, p, kwargs):
    w, fused = scaled(p["weight"], kwargs), kwargs.get("fused_scale", "auto")
    fused = 2 * min(x.shape[2:]) >= 128 if fused == "auto" else fused
    return stylegan.ops.upscale_conv2d(x, w.flip([2, 3]) if fused else w)


def style_mod(x, p, dlatent, kwargs):
    C = x.shape[1]
    layer = stylegan.Linear(dlatent.shape[1], 2 * C)
    layer.gain = runtime_scale(dlatent.shape[1], kwargs | {"gain": 1})
    given = {"weight": p["StyleMod/weight"].T, "bias": p["StyleMod/bias"]}
    scale, shift = functional_call(layer, given, (dlatent,)).chunk(2, 1)
    return x * (scale + 1)[:, :, None, None] + shift[:, :, None, None]


def pixel_norm(x, epsilon=1e-8):
    assert epsilon == 1e-8  # that of stylegan.normalize
    return stylegan.normalize(x)


OPS = {
    "blur2d": lambda t, p, k: blur2d(t["x"], k),
    "upscale2d": lambda t, p, k: stylegan.upscale(t["x"], k.get("factor", 2)),
    "downscale2d": lambda t, p, k: stylegan.downscale(t["x"], k.get("factor", 2)),
    "dense": lambda t, p, k: dense(t["x"], p, k),
    "conv2d": lambda t, p, k: convolved(t["x"], p, k),
    "upscale2d_conv2d": lambda t, p, k: doubled(t["x"], p, k),
    "conv2d_downscale2d": lambda t, p, k: stylegan.ops.conv2d_downscale(
        t["x"], scaled(p["weight"], k)
    ),
    "apply_bias": lambda t, p, k: stylegan.ops.bias_act(t["x"], p["bias"] * k.get("lrmul", 1)),
    "leaky_relu": lambda t, p, k: stylegan.ops.bias_act(
        t["x"], act="lrelu", alpha=k.get("alpha", 0.2), gain=1
    ),
    "pixel_norm": lambda t, p, k: pixel_norm(t["x"], **k),
    "instance_norm": lambda t, p, k: stylegan.ops.norm_act(t["x"], eps=k.get("epsilon", 1e-8)),
    "style_mod": lambda t, p, k: style_mod(t["x"], p, t["dlatent"], k),
    "apply_noise": lambda t, p, k: stylegan.ops.fused_act(
        t["x"], None, t["noise"], p["Noise/weight"]
    ),
    "minibatch_stddev_layer": lambda t, p, k: stylegan.minibatch_std(
        t["x"], k.get("group_size", 4), k.get("num_new_features", 1)
    ),
    "lerp_clip": lambda t, p, k: t["a"].lerp(t["b"], t["t"].clamp(0, 1)),
}


def tf_op(case):
    args = dict(case.args)
    op, kwargs = args.pop("op"), args.pop("kwargs", {})
    assert not set(args) - {"order", "second_x"}, args
    if op == "process_reals":
        assert not kwargs.get("mirror_augment", False)
        assert (kwargs["drange_data"], kwargs["drange_net"]) == ([0, 255], [-1, 1])
        real = stylegan.faded(case.inputs["x"] / 127.5 - 1, kwargs["lod"])
        case.equal("y", stylegan.upscale(real, 2 ** int(kwargs["lod"])))
        return
    params = {k: case.to(t).requires_grad_() for k, t in case.weights["net"].items()}
    first = [k for k in case.inputs if k != "v"]

    def run(t):
        return OPS[op](t, params, kwargs)

    x = "x" if "x" in first else "a"
    given = {k: t.requires_grad_() for k, t in case.inputs.items()}
    y = run(given)
    case.equal("y", y)
    v = given["v"]
    wanted = {k: given[k] for k in first} | params
    d = grads((y * v).sum(), wanted, create_graph=True)
    for k, g in d.items():
        case.equal(f"dparam.{k}" if k in params else f"d{k}", g)
    r = d[x].square().sum()
    second = {k: given[k] for k in ("x", "v") if f"g2{k}" in case.outputs}
    for k, g in grads(r, second).items():
        case.equal(f"g2{k}", g)


# ---- networks ----


def labels(case):
    c = case.get("labels")
    return c if c is not None and c.shape[-1] else None


def tf_mapping(case):
    a, arrays = case.args["G"], tensors(case, "net", gradient=True)
    net = stylegan.MappingNetwork(
        a["latent_size"], a["label_size"], a["dlatent_size"], 2 * int(np.log2(a["resolution"])) - 2,
        a["mapping_layers"], a["mapping_fmaps"], a.get("normalize_latents", True),
        a.get("mapping_nonlinearity", "lrelu"),
    ).to(case.file.device, case.file.dtype).eval()  # fmt: skip
    ours = {k.removeprefix("mapping."): t for k, t in stylegan.official_tensors(arrays).items()} | {
        "w_avg": net.w_avg
    }
    assert set(ours) == set(net.state_dict()) and a.get("use_wscale", True)
    times = a.get("mapping_lrmul", 0.01) / 0.01
    ours = {k: t * times if k.startswith("fc") else t for k, t in ours.items()}
    z, c = case.inputs["z"].requires_grad_(), labels(case)
    ws = functional_call(net, ours, (z, c))
    case.equal("dlatents", ws)
    (ws * case.inputs["v"]).sum().backward()
    case.equal("dz", z.grad)
    gradients(case, "net", arrays)


def tf_synthesis(case):
    arrays = tensors(case, "net", gradient=True)
    full = {k: case.to(t) for k, t in with_mapping(arrays, case.args["G"]).items()}
    net, call = network(case, full, "G")
    net.eval()
    ws = case.inputs["dlatents"].requires_grad_()
    img = call(lambda G, ws: G.synthesis(ws, "const"), ws)
    case.equal("images", img)
    (img * case.inputs["v"]).sum().backward()
    case.equal("ddlatents", ws.grad)
    gradients(case, "net", arrays)


class Recorded(Eager):
    """Stands in for common.Run: recorded draws in, gradients out."""

    def __init__(self, case, layers=None):
        self.draws, self.layers = list(case.inputs.get("draws", [])), layers

    def take(self, *kinds):
        """The next draw of one of these kinds."""
        i = next(i for i, (kind, _) in enumerate(self.draws) if kind in kinds)
        return self.draws.pop(i)[1]

    def rand(self, n, *shape, shared=False):
        if not shared:
            u = self.take("uniform")
            assert tuple(u.shape) == (n, *shape)
            return u
        gate, cutoff = self.take("uniform"), self.take("randint")
        return torch.stack([gate, (cutoff - 0.5) / (self.layers() - 1)])

    def randn(self, *shape):
        kind, draw = self.draws.pop(0)
        assert kind == "randn" and tuple(draw.shape) == shape
        return draw

    def backward(self, loss):
        loss.backward()

    def step(self, opt):
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        opt.step()
        opt.zero_grad(set_to_none=True)


@torch.no_grad()
def tf_generator(case):
    forward = dict(case.args["forward"])
    assert forward.pop("randomize_noise") is False
    beta = forward.pop("dlatent_avg_beta", case.args["G"].get("dlatent_avg_beta", 0.995))
    beta = 1.0 if beta is None else beta  # the average does not move
    G, _ = network(case, tensors(case, "G"), "G")
    case.set(stylegan, "W_AVG_BETA", beta, 0.995)
    training, validation = (forward.pop(f"is_{k}", False) for k in ("training", "validation"))
    psi, cutoff = forward.pop("truncation_psi", 0.7), forward.pop("truncation_cutoff", 8)
    for_validation = [forward.pop(f"truncation_{k}_val", None) for k in ("psi", "cutoff")]
    psi, cutoff = for_validation if validation else (psi, cutoff)
    # Officially nothing is truncated without a psi, without a cutoff, and up to layer 0.
    psi = 1 if psi is None or cutoff is None or cutoff <= 0 else psi
    mixing = forward.pop("style_mixing_prob", case.args["G"].get("style_mixing_prob", 0.9)) or 0
    G.train(training)
    z, c = case.inputs["z"], labels(case)
    if training:
        run = Recorded(case, lambda: G.num_ws - 2 * int(G.synthesis.lod))
        args = types.SimpleNamespace(mixing=mixing)
        ws = stylegan.mix(G, z, c, args, run)
        assert not run.draws
    else:
        ws = G.mapping(z, c, psi, cutoff)
    assert not forward
    case.equal("images", G.synthesis(ws, "const"))
    case.equal("dlatent_avg_after", G.mapping.w_avg)


def tf_discriminator(case):
    arrays = tensors(case, "D", gradient=True)
    _, call = network(case, arrays, "D")
    img = case.inputs["images"].requires_grad_()
    scores = call(lambda D, img: D(img, labels(case)), img)
    case.equal("scores", scores)
    (scores * case.inputs["v"]).sum().backward()
    case.equal("dimages", img.grad)
    gradients(case, "D", arrays)


# ---- losses, schedule, training ----

KINDS_OF_LOSS = {  # official name: ours
    "G_logistic_nonsaturating": "logistic", "G_logistic_saturating": "saturating",
    "G_wgan": "wgan", "D_logistic": "logistic", "D_logistic_simplegp": "logistic",
    "D_wgan": "wgan", "D_wgan_gp": "wgan-gp", "D_hinge": "hinge", "D_hinge_gp": "hinge-gp",
}  # fmt: skip


def options(case, loss, kwargs):
    """The options of the training that the phases read, of an official loss; DRIFT is set."""
    kind, kwargs = KINDS_OF_LOSS[loss], dict(kwargs)
    gp = stylegan.LOSSES[kind].get("gp_lambda", 0.0)
    r1_gamma = 10.0 if loss.endswith("simplegp") else 0.0
    args = types.SimpleNamespace(
        loss=kind, batch_gpu=None, mixing=case.args["G"].get("style_mixing_prob", 0.9) or 0,
        r1_gamma=kwargs.pop("r1_gamma", r1_gamma), r2_gamma=kwargs.pop("r2_gamma", 0.0),
        gp_lambda=kwargs.pop("wgan_lambda", gp), gp_target=kwargs.pop("wgan_target", 1.0),
    )  # fmt: skip
    case.set(stylegan, "DRIFT", kwargs.pop("wgan_epsilon", 0.001), 0.001)
    assert not kwargs, kwargs
    return args


class Watch:
    """Adds up, for D and for G, what single images cost, as the phases call for it.

    Official losses of logits are (N, 1) and penalties (N,), which makes sums of both (N, N).
    """

    def __init__(self, args, patch):
        self.total = {"D": 0, "G": 0}
        gammas = iter([g for g in (args.r2_gamma, args.r1_gamma) if g])  # fakes come first
        share = stylegan.share_of

        def watch(name, weigh):
            function = getattr(stylegan, name)

            def watched(*a, **k):
                value = function(*a, **k)
                weigh(value.detach(), *a)
                return value

            patch.setattr(stylegan, name, watched)

        def add(net, value):
            self.total[net] = self.total[net] + value

        def add_r1(value, logits, img):
            if not args.gp_lambda:
                add("D", next(gammas) / 2 * value * share(self.D, img))

        watch("generator_loss", lambda value, *a: add("G", value[:, None]))
        watch("discriminator_loss", lambda value, *a: add("D", value[:, None]))
        watch("gradient_penalty", lambda value, *a: add("D", args.gp_lambda * value))
        watch("r1_penalty", add_r1)


def tf_loss(case):
    tag = case.args["loss"][0]
    args = options(case, case.args["loss"], case.args["loss_kwargs"])
    arrays = {k: tensors(case, k, gradient=True) for k in "GD"}
    G, call_G = network(case, arrays["G"], "G")
    D, call_D = network(case, arrays["D"], "D")
    G.train()
    run = Recorded(case, lambda: G.num_ws - 2 * int(G.synthesis.lod))
    # D averages images over boxes of 2^floor(lod) pixels anyway: here they come as our loop's do.
    real = stylegan.downscale(case.inputs["reals"], 2 ** int(case.args["lod"]))

    def none(n):
        return None

    def generator(G):
        return stylegan.generator_phase(G, D, len(real), none, args, run, "const")

    def discriminator(D):
        return stylegan.discriminator_phase(G, D, real, None, args, run, "const")

    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(args, patch)
        watch.D = D
        call_G(generator) if tag == "G" else call_D(discriminator)
    assert not run.draws
    case.equal("loss", watch.total[tag])
    gradients(case, tag, arrays[tag], "grad.")


def tf_schedule(case):
    a = case.args
    sched = {k: numbered(v) for k, v in a["sched"].items()}
    names = {
        "lod_initial_resolution": "start_size", "lod_training_kimg": "train_kimg",
        "lod_transition_kimg": "fade_kimg", "minibatch_base": "batch", "minibatch_dict": "batches",
        "max_minibatch_per_gpu": "batch_max", "lrate_rampup_kimg": "rampup_kimg",
    }  # fmt: skip
    both = dict(size=2 ** a["resolution_log2"], world=a["num_gpus"], start_size=4, batch=16)
    both |= dict(batches={})  # the defaults of the official function, not of its training
    both |= {names[k]: v for k, v in sched.items() if k in names}
    rates = {}
    for net in "GD":
        lr = sched.get(f"{net}_lrate_base", 0.001)
        table = {k: v / lr for k, v in sched.get(f"{net}_lrate_dict", {}).items()}
        rates[net] = dict(lr=lr, rates=table)
    ticks, base = sched.pop("tick_kimg_dict", stylegan.TICKS), sched.pop("tick_kimg_base", 160)
    ticks = {2**k: ticks.get(2**k, base) for k in range(2, 17)}
    case.patch.setattr(stylegan, "TICKS", ticks)
    known = set(names) | {f"{net}_lrate_{k}" for net in "GD" for k in ("base", "dict")}
    assert set(sched) <= known, set(sched) - known
    kimg = case.inputs["cur_nimg"].double() / 1000
    G, D = ([stylegan.schedule(k, **both, **rates[net]) for k in kimg.tolist()] for net in "GD")
    case.equal("kimg", kimg, 1e-12)
    case.equal("lod", [s.lod for s in G], 1e-12)
    case.equal("resolution", [s.res for s in G], 0)
    case.equal("minibatch", [s.batch for s in G], 0)
    case.equal("G_lrate", [s.lr for s in G], 1e-12)
    case.equal("D_lrate", [s.lr for s in D], 1e-12)
    case.equal("tick_kimg", [s.tick for s in G], 0)


def numbered(table):
    return {int(k): v for k, v in table.items()} if isinstance(table, dict) else table


def tf_trajectory(case):
    """Steps of train_step at falling lods with recorded draws; everything at 1e-5."""
    a = case.args
    args = options(case, a["D_loss"], a["D_loss_kwargs"])
    if a["G_loss"] == "G_logistic_saturating":
        args.loss = {"logistic": "saturating"}[args.loss]  # D's is the same
    else:
        assert KINDS_OF_LOSS[a["G_loss"]] == ("logistic" if args.loss == "logistic" else "wgan")
    nets = {k: network(case, tensors(case, k), k)[0].train() for k in "GD"}
    nets["Gs"] = copy.deepcopy(nets["G"]).eval()
    start = {k: copy.deepcopy(dict(net.named_parameters())) for k, net in nets.items()}
    G, D, G_ema = nets.values()
    opts, BETAS, EPS = [], stylegan.BETAS, stylegan.EPS
    for net in "GD":
        adam = a[f"{net}_opt"]
        betas = (adam["beta1"], adam["beta2"])
        case.set(stylegan, "BETAS", betas, (0.0, 0.99))
        case.set(stylegan, "EPS", adam["epsilon"], 1e-8)
        # Where the file has the official defaults ours must be right by themselves. TensorFlow's
        # Adam keeps its numbers and the powers of beta2 in float32 for any type.
        betas = [float(np.float32(beta)) for beta in (BETAS if betas == (0.0, 0.99) else betas)]
        eps = EPS if adam["epsilon"] == 1e-8 else adam["epsilon"]
        opts.append(torch.optim.Adam(nets[net].parameters(), a["lrate"], betas, eps))
    run = Recorded(case, lambda: G.num_ws - 2 * int(G.synthesis.lod))
    half_life = 1000 * a["G_smoothing_kimg"]
    beta = 0.5 ** (a["minibatch"] / half_life) if half_life else 0.0
    found, age, before = {"D_loss": [], "G_loss": [], "dlatent_avg": [], "reset": []}, 0, -1
    for s, lod in enumerate(a["lods"]):
        found["reset"].append(float(stylegan.is_growth(lod, before)))
        age, before = 0 if found["reset"][-1] else age, lod
        for net, opt in zip((G, D), opts, strict=True):
            net.grow(lod)
            if age == 0:
                opt.state.clear()
            if a["adam"] == "tf":
                opt.param_groups[0]["eps"] = stylegan.tensorflow_eps(age + 1)
        age += 1
        for opt in opts:
            beta2 = np.float32(opt.param_groups[0]["betas"][1])
            power = functools.reduce(np.multiply, [beta2] * age)  # each product is rounded
            correction = (1 - float(power)) / (1 - float(beta2) ** age)
            opt.param_groups[0]["lr"] = float(np.float32(a["lrate"])) * correction**0.5
        scale = float(np.float32(2) / np.float32(255))  # float32 in the original's float64 run
        real = stylegan.faded(case.inputs[f"reals_{s}"] * scale - 1, lod)
        with pytest.MonkeyPatch.context() as patch:
            watch = Watch(args, patch)
            watch.D = D
            stylegan.train_step(
                G, D, G_ema, opts, real, None, lambda n: None, beta, args, run, "const"
            )
        found["D_loss"].append(watch.total["D"])
        found["G_loss"].append(watch.total["G"])
        found["dlatent_avg"].append(G.mapping.w_avg.clone())
    assert not run.draws
    for name, values in found.items():
        values = torch.stack([torch.as_tensor(v) for v in values])
        case.equal(name, values.to(torch.float64), 1e-5)
    for name, net in nets.items():
        tag = name[0]
        official = {k: t for k, t in tensors(case, tag).items() if not is_buffer(k)}
        now, then = dict(net.named_parameters()), start[name]
        # Our names in official order: each tensor is filled with its number and renamed.
        numbers = {k: torch.full_like(t, i) for i, (k, t) in enumerate(official.items())}
        place = {int(t.flatten()[0]): k for k, t in stylegan.official_tensors(numbers).items()}
        ours = [place[i] for i in range(len(official))]
        moves = {k: now[k].detach() - then[k].detach() for k in ours}
        case.equal(f"{name}.norm", torch.stack([now[k].norm() for k in ours]), 1e-5)
        case.equal(f"{name}.move_norm", torch.stack([m.norm() for m in moves.values()]), 1e-5)
        case.equal(f"{name}.move_sum", torch.stack([m.sum() for m in moves.values()]), 1e-5)
        for output in case.outputs:
            if output.startswith(f"{name}.move."):
                key = output.removeprefix(f"{name}.move.").removeprefix("G_")
                mine = moves[ours[list(official).index(key)]]
                if mine.ndim == 4:
                    mine = mine.permute(2, 3, 1, 0)
                elif mine.ndim == 2:
                    mine = mine.T
                mine = mine[None] if key.endswith("const") else mine
                case.equal(output, mine, 1e-5)


KINDS = {
    f.__name__: f
    for f in (
        tf_op, tf_mapping, tf_synthesis, tf_generator, tf_discriminator, tf_loss, tf_schedule,
        tf_trajectory,
    )
}  # fmt: skip


def check(path, **how):
    for case in Vectors(path, **how).cases():
        with pytest.MonkeyPatch.context() as case.patch:
            KINDS[case.kind](case)
        case.finish()
