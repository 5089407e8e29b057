"""StarGAN v2's vectors: networks, losses, trajectories, and the landmark network's masks.

The format is that of CycleGAN's, so `case` and the formulas are test_golden's.
"""

import types
from pathlib import Path
from unittest import mock

import numpy as np
import test_golden as golden  # which imports this file: its names are looked up when called
import torch
from eager import Eager

import common
import stargan_v2

CLASSES = {  # official class: official name in checkpoints
    "Generator": "generator",
    "MappingNetwork": "mapping_network",
    "StyleEncoder": "style_encoder",
    "Discriminator": "discriminator",
    "FAN": "fan",
}
ARGUMENTS = {  # official constructor argument: ours
    "img_size": "size",
    "style_dim": "style_dim",
    "max_conv_dim": "channel_max",
    "w_hpf": "w_hpf",
    "latent_dim": "z_dim",
    "num_domains": "domains",
}
ORDER = ("generator", "mapping_network", "style_encoder", "discriminator")  # our G, F, E, D


def official_networks(specs):
    """{official name: network}: from_official on the formula weights, whose configs must be what
    the official arguments say."""
    arrays = {}
    for spec in specs.values():
        name = CLASSES[spec["class"]]
        arrays |= {f"{name}.{key}": a for key, a in golden.weights(spec).items()}
    images = [spec for spec in specs.values() if spec["class"] not in ("MappingNetwork", "FAN")]
    (base,) = {spec["base"] for spec in images} or {stargan_v2.CHANNEL_BASE}
    with mock.patch.object(stargan_v2, "CHANNEL_BASE", base):  # G alone does not tell
        nets = stargan_v2.from_official(arrays)
    assert len(nets) == len(specs)
    found = {}
    for label, spec in specs.items():
        net = found[label] = golden.ready(nets[stargan_v2.OFFICIAL[CLASSES[spec["class"]]]]).train()
        if "generator.hpf.filter" in arrays and spec["class"] == "Generator":
            ours = net.hpf.filter
            theirs = torch.as_tensor(arrays["generator.hpf.filter"]).to(ours)  # it is of float32
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
            ours.copy_(theirs)
        if spec["class"] != "FAN":
            wanted = {ARGUMENTS[k]: v for k, v in spec["kwargs"].items()}
            if spec["class"] != "MappingNetwork":
                wanted["channel_base"] = base
            wanted.pop("channel_max", None)  # which need not be reached: shapes tell
            for key, value in wanted.items():
                assert abs(net.config[key] - value) <= 1e-6, (wanted, net.config)
        assert sorted(n for n, _ in net.named_parameters()) == sorted(spec["param_names"])
    return found


def by_name(spec, value_of):
    """An array of value_of(parameter name) in the order of the file."""
    with torch.no_grad():
        return [float(value_of(name)) for name in spec["param_names"]]


def grad_norms(net, spec):
    def norm(name):
        grad = net.get_parameter(name).grad
        return -1.0 if grad is None else grad.norm()

    return by_name(spec, norm)


def clear(nets):
    for net in nets:
        net.zero_grad(set_to_none=True)


# ---- one network ----


def check_network(case, label):
    """Output, activations, gradients."""
    spec, given = case.meta["nets"][label], golden.inputs(case.meta[f"{label}_inputs"])
    (net,) = official_networks({label: spec}).values()
    for key in case:
        if key.startswith(f"{label}/act/"):
            layer = net.get_submodule(key.split("/")[-1])
            layer.register_forward_hook(lambda m, x, y, key=key: case.equal(key, golden.stats(y)))
    cot, y = given.pop("cot"), torch.tensor(spec.get("y", 0))
    inputs = {name: t.requires_grad_(not name.startswith("mask")) for name, t in given.items()}
    x = inputs.get("x", inputs.get("z"))
    if spec["class"] == "Generator":
        masks = [inputs["mask0"], inputs["mask1"]] if "mask0" in inputs else None
        assert len(inputs) == (4 if masks else 2), list(inputs)
        out = net(x, inputs["s"], masks)
    else:
        assert len(inputs) == 1, list(inputs)
        out = net(x, y)
    case.equal(f"{label}/y", out)
    (out * cot).sum().backward()
    case.equal(f"{label}/grad_norm", grad_norms(net, spec))
    for name in spec["full_grads"]:
        case.equal(f"{label}/grad/{name}", net.get_parameter(name).grad)
    for name, t in inputs.items():
        case.equal(f"{label}/grad_{name}", t.grad)
    case.equal(f"{label}/grad_x_stats", golden.stats(x.grad))
    case.equal(f"{label}/grad_x_sub", x.grad[..., ::4, ::4])
    if spec["class"] == "Discriminator":
        case.equal(f"{label}/all_domains", net.main(x).flatten(1))


def check_highpass(case):
    x = golden.inputs(case.meta["inputs"])["x"]
    for i, w_hpf in enumerate(case.meta["w_hpf"]):
        highpass = stargan_v2.HighPass(w_hpf)
        case.equal(f"{i}/filter", highpass.filter)
        case.equal(f"{i}/y", highpass(x))


# ---- losses ----


def check_losses(case):
    """Losses of one iteration and the gradients of all networks that get one."""
    meta, args = case.meta, case.meta["args"]
    nets = official_networks(meta["nets"])
    G, F, E, D = (nets[name] for name in ORDER)
    given, y, y_fake = (
        golden.inputs(meta["inputs"]),
        *map(torch.tensor, (meta["y_org"], meta["y_trg"])),
    )
    real = given["x_real"]

    def masks_of(x):
        kind = "mask" if x is real else "cmask"
        return [given[f"{kind}{k}"] for k in (0, 1)] if args["w_hpf"] else None

    def gradients(group, names, full):
        for name in names:
            case.equal(f"{group}/grad_norm/{name}", grad_norms(nets[name], meta["nets"][name]))
            for key in full.get(name, ()):
                case.equal(f"{group}/grad/{name}/{key}", nets[name].get_parameter(key).grad)
        clear(nets.values())

    styles = {
        "latent": lambda k: F(given[f"z_trg{'2' * k}"], y_fake),
        "ref": lambda k: E(given[f"x_ref{'2' * k}"], y_fake),
    }
    for phase, style in styles.items():
        s = style(0)
        fake = G(real, s, masks_of(real)).detach()
        case.equal(f"piece/s_trg_{phase}", s)
        case.equal(f"piece/x_fake_{phase}", fake[:, :, ::2, ::2])
        losses = stargan_v2.discriminator_losses(D, real, y, fake, y_fake)
        loss = losses["D_real"] + losses["D_fake"] + args["lambda_reg"] / 2 * losses["reg/r1"]
        clear(nets.values())
        loss.backward()
        case.equal(f"d_{phase}/real", losses["D_real"])
        case.equal(f"d_{phase}/fake", losses["D_fake"])
        case.equal(f"d_{phase}/reg", losses["reg/r1"] / 2)
        case.equal(f"d_{phase}/loss", loss)
        gradients(f"d_{phase}", ["discriminator"], meta["full_grads"].get("d", {}))

        other = G(real, style(1), masks_of(real))
        rest = (y, style(0), y_fake, other, masks_of(real), masks_of)
        losses = stargan_v2.generator_losses(G, E, D, real, *rest)
        loss = losses["adv"] + args["lambda_sty"] * losses["sty"]
        loss = loss - args["lambda_ds"] * losses["ds"] + args["lambda_cyc"] * losses["cyc"]
        clear(nets.values())
        loss.backward()
        for name, value in (losses | {"loss": loss}).items():
            case.equal(f"g_{phase}/{name}", value)
        names = [name for name in ORDER if f"g_{phase}/grad_norm/{name}" in case]
        gradients(f"g_{phase}", names, meta["full_grads"].get("g", {}))

    x = real.clone().requires_grad_(True)
    logits = D(x, y)
    case.equal("r1/logits", logits)
    case.equal("r1/value", stargan_v2.r1_penalty(logits, x) / 2)
    for target in (1, 0) if "pred" in given else ():
        logits = given["pred"].clone().requires_grad_(True)
        loss = stargan_v2.adversarial_loss(logits, target == 1)
        loss.backward()
        case.equal(f"adv_loss/{target}", loss)
        case.equal(f"adv_loss/{target}_grad", logits.grad)


# ---- trajectories ----


class Recorded(Eager):
    """Stands in for common.Run in train_step: recorded latents in, plain steps."""

    def __init__(self, latents):
        self.latents = list(latents)

    def autocast(self):
        return torch.autocast("cpu", enabled=False)

    def randn(self, *shape):
        z = self.latents.pop(0)
        assert z.shape == shape
        return z

    def backward(self, loss):
        loss.backward()

    def step(self, *optimizers):
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)


def check_trajectory(case):
    """Iterations of train_step."""
    meta, a = case.meta, case.meta["args"]
    official = official_networks(meta["nets"])
    nets = [official[name] for name in ORDER]
    ema = [stargan_v2.average_of(net) for net in nets[:3]]
    averages = dict(zip(ORDER, ema, strict=False))
    start = {
        k: {n: p.detach().clone() for n, p in m.named_parameters()} for k, m in official.items()
    }
    assert a["w_hpf"] == 0  # no masks
    betas, decay = (a["beta1"], a["beta2"]), a["weight_decay"]
    if (betas, decay) == ((0.0, 0.99), 1e-4):  # the official defaults: ours must be right
        betas, decay = stargan_v2.BETAS, stargan_v2.WEIGHT_DECAY
    opts = [
        torch.optim.Adam(net.parameters(), lr, betas, weight_decay=decay)
        for net, lr in zip(nets, (a["lr"], a["f_lr"], a["lr"], a["lr"]), strict=True)
    ]
    args = types.SimpleNamespace(r1_gamma=a["lambda_reg"], lambda_sty=a["lambda_sty"])
    args.lambda_cyc, args.ema_beta = a["lambda_cyc"], stargan_v2.EMA_BETA
    given = golden.inputs(meta["inputs"])
    rows, weights, lambda_ds = {}, [], a["lambda_ds"]
    for step in range(meta["steps"]):
        x, ref, ref2, z, z2 = (
            given[f"{name}/{step}"] for name in ("x_src", "x_ref", "x_ref2", "z_trg", "z_trg2")
        )
        y, y_ref = (torch.tensor(meta[name][step]) for name in ("y_src", "y_ref"))
        # Officially it falls for as long as it is above 0: rounding may make that a step too many.
        weights.append(lambda_ds)
        ours = stargan_v2.lambda_ds_at(step, a["lambda_ds"], a["ds_iter"])
        assert abs(ours - max(lambda_ds, 0)) <= 1e-9
        lambda_ds -= a["lambda_ds"] / a["ds_iter"] if lambda_ds > 0 else 0
        batch, run = (x, ref, ref2, y, y_ref), Recorded([z, z2])
        losses = stargan_v2.train_step(nets, ema, opts, batch, weights[-1], args, run)
        assert not run.latents
        for phase in ("latent", "ref"):
            real, fake, r1, adv, sty, ds, cyc = (
                losses[f"{name}_{phase}"].item()
                for name in ("D_real", "D_fake", "reg/r1", "adv", "sty", "ds", "cyc")
            )
            reg = r1 * a["lambda_reg"] / 2
            total = adv + a["lambda_sty"] * sty - weights[-1] * ds + a["lambda_cyc"] * cyc
            rows.setdefault(f"D/{phase}", []).append([real, fake, reg, real + fake + reg])
            rows.setdefault(f"G/{phase}", []).append([adv, sty, ds, cyc, total])
    for name, values in rows.items():
        case.equal(f"losses/{name}", values, each=True)
    case.equal("lambda_ds_used", weights)
    case.equal("lambda_ds_after", np.float64(lambda_ds))
    ours = stargan_v2.lambda_ds_at(meta["steps"], a["lambda_ds"], a["ds_iter"])
    assert abs(ours - max(lambda_ds, 0)) <= 1e-9
    for name, net in official.items():
        spec, final, then = meta["nets"][name], dict(net.named_parameters()), start[name]
        mean = dict(averages[name].named_parameters()) if name in averages else None
        norms = by_name(spec, lambda k, final=final: final[k].norm())
        case.equal(f"final/param_norm/{name}", norms, 1e-7)
        moved = by_name(spec, lambda k, final=final, then=then: (final[k] - then[k]).norm())
        case.equal(f"final/update_norm/{name}", moved, 1e-7)
        for key in meta["final_tensors"][name]:
            case.equal(f"final/param/{name}/{key}", final[key], 1e-7)
        if mean:
            moved = by_name(spec, lambda k, mean=mean, then=then: (mean[k] - then[k]).norm())
            case.equal(f"final/ema_update_norm/{name}", moved, 1e-7)
            for key in meta["final_tensors"][name]:
                case.equal(f"final/ema/{name}/{key}", mean[key], 1e-7)


# ---- landmarks ----

# FAN computes its coordinates in float32, with a root that is not the same on all processors: on
# those with AVX-512, where the vectors were made, MKL goes by way of a reciprocal root and rounds
# the roots of these numbers down, among the numbers in coordinates of 8 to 512 pixels.
ROUNDED_DOWN = np.load(Path(__file__).parent / "golden" / "avx512_roots.npy")


def root_of_the_vectors(x):
    """torch.sqrt of float32 where the vectors were made."""
    given = x.cpu().numpy()
    root = np.sqrt(given)
    root = np.where(np.isin(given, ROUNDED_DOWN), np.nextafter(root, np.float32(0)), root)
    return torch.from_numpy(root).to(x.device)


def check_fan(case):
    with mock.patch.object(torch, "sqrt", root_of_the_vectors):
        check_landmarks(case)


def check_landmarks(case):
    (fan,) = official_networks(case.meta["nets"]).values()
    x = golden.inputs(case.meta["inputs"])["x"]
    maps = fan(x)
    case.equal("heatmap_sub", maps[:, :, ::4, ::4])
    case.equal("heatmap_mean", maps.mean([2, 3]))
    case.equal("heatmap_rms", maps.square().mean([2, 3]).sqrt())
    case.equal("get_heatmap_raw_mean", maps[:, :-1].mean([2, 3]))
    for k, mask in enumerate(fan.masks(x)):
        case.equal(f"mask{k}_sub", mask[:, :, ::4, ::4])
        case.equal(f"mask{k}_rows", mask.sum(3))


def check_fan_preprocess(case):
    cx, cy, sigma, amp = (
        torch.as_tensor(case[f"in/{name}"]).double()[:, :, None, None]
        for name in ("cx", "cy", "sigma", "amp")
    )
    side = torch.arange(256, dtype=torch.float64)
    distance = (side - cx).square() + (side[:, None] - cy).square()
    maps = (amp * (-distance / (2 * sigma.square())).exp()).float().double()
    for k, mask in enumerate(common.landmark_masks(maps)):
        case.equal(f"mask{k}_sub", mask[:, :, ::2, ::2])
        case.equal(f"mask{k}_rows", mask.sum(3))
        case.equal(f"mask{k}_cols", mask.sum(2))


KINDS = {  # how a case's name begins: its check; all others are of networks
    "highpass": check_highpass,
    "fan_preprocess": check_fan_preprocess,
    "fan": check_fan,
    "losses": check_losses,
    "trajectory": check_trajectory,
}


def check(case):
    for kind, function in KINDS.items():
        if case.name.startswith(kind):
            function(case)
            return
    assert all(f"{label}_inputs" in case.meta for label in case.meta["nets"]), case.name
    for label in case.meta["nets"]:
        check_network(case, label)
