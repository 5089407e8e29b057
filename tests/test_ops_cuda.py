"""ops_cuda.py: derivatives, the kernels (on a GPU, and emulated on the CPU), their compilation."""

import ctypes
import functools
import itertools
import math
import os
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path

import bench
import emulated_cuda
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import common
import cyclegan
import ops_cuda as ops
import stargan_v2
import stylegan
import stylegan2

ROOT = Path(__file__).parent.parent
F4, F12 = [1, 3, 3, 1], list(range(1, 13))


def double(*shape, seed=0, grad=True):
    torch.manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, requires_grad=grad)


def twice(function, *inputs):
    assert gradcheck(function, inputs) and gradgradcheck(function, inputs)


# ---- the references: exact first and second derivatives, in float64 ----


@pytest.mark.parametrize("act", ops.ACTIVATIONS)
@pytest.mark.parametrize("clamp", [None, 0.9])
def test_fused_act_is_twice_differentiable(act, clamp):
    x, scale, noise = double(2, 3, 4, 3), double(2, 3, seed=1), double(2, 1, 4, 3, seed=2)
    b = double(3, seed=4)
    for strength in (double(seed=3), double(3, seed=3)):  # of all channels, of each
        twice(lambda *t: ops.fused_act(*t, act=act, clamp=clamp), x, scale, noise, strength, b)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_norm_acts_gradient_is_that_of_its_formula_in_any_memory_order(n, order):
    x, gy = torch.randn(2, n, 4, 5, 6, dtype=torch.float64)

    def by_formula(x):
        var, mean = torch.var_mean(x, [2, 3], correction=0, keepdim=True)
        return (x - mean) * (var + 1e-5).rsqrt()

    x = x.contiguous(memory_format=order).requires_grad_(True)
    (wanted,) = torch.autograd.grad(by_formula(x), x, gy)
    for of_gy in (torch.contiguous_format, torch.channels_last):
        (found,) = torch.autograd.grad(ops.norm_act(x), x, gy.contiguous(memory_format=of_gy))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("act", ["linear", "relu", "lrelu"])
@pytest.mark.parametrize("shapes", [(), [3], [2, 3]], ids=str)  # of scale and shift
def test_norm_act_is_torchs_instance_norm_activation_and_padding(act, shapes):
    x, residual = double(2, 3, 5, 4), double(2, 3, 9, 8, seed=1)
    scale, shift = (double(*shapes, seed=k) if shapes else None for k in (2, 3))
    function = {"linear": lambda u: u, "relu": F.relu, "lrelu": lambda u: F.leaky_relu(u, 0.2)}[act]

    def plain(x, residual, scale=None, shift=None):
        y = F.instance_norm(x)
        if scale is not None:
            y = y * scale.expand(2, 3)[:, :, None, None] + shift.expand(2, 3)[:, :, None, None]
        return F.pad(function(y), (2, 2, 2, 2), "reflect") + residual

    def mine(x, residual, *small):
        return ops.norm_act(x, *(small or (None, None)), act, pad=2, residual=residual)

    inputs = [t for t in (x, residual, scale, shift) if t is not None]
    results = []
    for run in (plain, mine):
        y = run(*inputs)
        results.append([y, *torch.autograd.grad(y.sin().sum(), inputs)])
    torch.testing.assert_close(*results)
    twice(mine, *inputs)


@pytest.mark.parametrize("options", [{}, {"up": 2}, {"down": 2}, {"up": (2, 1), "down": (1, 2)}])
@pytest.mark.parametrize("f", [F4, [[1.0, 2.0], [0.5, -1.0], [0.0, 3.0]]])
def test_upfirdn2d_is_twice_differentiable(options, f):
    f = ops.setup_filter(f).double()
    twice(lambda x: ops.upfirdn2d(x, f, padding=(2, 1, -1, 3), **options), double(1, 2, 5, 6))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_are_twice_differentiable(stride, groups):
    x, w = double(2, 4, 6, 5), double(6, 4 // groups, 3, 3, seed=1)
    twice(lambda x, w: ops.conv2d(x, w, stride, 1, groups), x, w)
    w = double(4, 6 // groups, 3, 3, seed=1)
    twice(lambda x, w: ops.conv_transpose2d(x, w, stride, 1, stride - 1, groups), x, w)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_products_from_and_to_images_are_1x1_convolutions(order):
    few, many, w = double(2, 3, 4, 6), double(2, 8, 4, 6, seed=1), double(2, 3, 8, seed=2)
    few, many = (t.detach().contiguous(memory_format=order).requires_grad_() for t in (few, many))

    def by_convolution(x, w):
        return torch.cat(
            [F.conv2d(a[None], b[:, :, None, None]) for a, b in zip(x, w, strict=True)]
        )

    for x, mine, plain in (
        (many, ops.to_image, by_convolution),
        (few, ops.from_image, lambda x, w: by_convolution(x, w.mT)),
    ):
        results = []
        for function in (plain, mine):
            y = function(x, w)
            results.append([y, *torch.autograd.grad(y.sin().sum(), (x, w))])
        torch.testing.assert_close(*results)
        twice(mine, x, w)
        of_y = torch.contiguous_format if x is many else torch.channels_last
        assert y.is_contiguous(memory_format=of_y)
        of_x = order if x is many else torch.contiguous_format
        assert results[1][1].is_contiguous(memory_format=of_x)
        assert mine(x[:0], w[:0]).shape == (0, *y.shape[1:])


@pytest.mark.parametrize(("up", "down", "k"), [*itertools.product((1, 2), (1, 2), (1, 3))])
def test_conv2d_resample_is_twice_differentiable(up, down, k):
    f = ops.setup_filter(F4, separable=True).double()
    x, w = double(1, 2, 4, 6), double(3, 2, k, k, seed=1)
    twice(lambda x, w: ops.conv2d_resample(x, w, f, up, down, k // 2), x, w)


def test_grid_sample_is_twice_differentiable_and_equals_torch():
    x, grid = double(2, 2, 5, 4), double(2, 3, 6, 2, seed=1, grad=False).tanh() * 1.2
    twice(lambda x: ops.grid_sample(x, grid), x)
    assert torch.equal(ops.grid_sample(x, grid), F.grid_sample(x, grid, align_corners=False))


@pytest.mark.parametrize("m", ["turns", "4 times smaller", "shifted"])
@pytest.mark.parametrize("reach", ["all", "some", "none"])
def test_warp_is_twice_differentiable_for_any_padding_that_suffices(m, reach):
    x = double(2, 1, 5, 4)
    run = warping(m, reach, x.shape, "cpu")
    twice(lambda x: run("ref", x), x)
    y = run("ref", x)
    most = min(4, max(map(max, REACHES[reach])))
    G, reach = MAPS[m].double(), torch.tensor(REACHES[reach]).minimum(torch.tensor([3, 4]))
    for pad in range(most, 6):
        torch.testing.assert_close(ops.warp_ref(x, G, reach, WAVELET, pad), y)


def test_warp_refuses_other_filters():
    with pytest.raises(ValueError, match="12 taps"):
        ops.warp(torch.zeros(2, 1, 4, 4), MAPS["turns"], torch.zeros(2, 2), torch.ones(4) / 4)


def test_no_weight_gradients_leaves_out_those_and_nothing_else():
    x, w = double(1, 2, 5, 5), double(3, 2, 3, 3, seed=1)
    with ops.no_weight_gradients():
        gx, gw = torch.autograd.grad(ops.conv2d(x, w).sum(), (x, w), allow_unused=True)
    assert gw is None and torch.equal(gx, torch.autograd.grad(F.conv2d(x, w).sum(), x)[0])
    assert torch.autograd.grad(ops.conv2d(x, w).sum(), w)[0] is not None


def test_an_empty_batch_passes():
    x, f = torch.zeros(0, 3, 8, 8, requires_grad=True), ops.setup_filter(F4)
    y = ops.bias_act(ops.upsample2d(x, f), torch.zeros(3, requires_grad=True), act="lrelu")
    y.sum().backward()
    assert y.shape == (0, 3, 16, 16) and x.grad.shape == x.shape


def test_upsampling_keeps_brightness_and_downsampling_undoes_it():
    f = ops.setup_filter(F4)
    x = torch.full((1, 1, 8, 8), 3.0)
    torch.testing.assert_close(ops.upsample2d(x, f)[..., 2:-2, 2:-2], x.new_full((1, 1, 12, 12), 3))
    torch.testing.assert_close(
        ops.downsample2d(ops.upsample2d(x, f), f)[..., 2:-2, 2:-2], x[..., 2:-2, 2:-2]
    )


@pytest.mark.parametrize(
    ("x", "options"), [((1, 1, 2, 2), {"padding": -1}), ((1, 1, 3, 3), {"padding": (-3, 0, 0, 0)})]
)
def test_what_is_smaller_than_its_filter_is_refused(x, options):
    with pytest.raises(ValueError, match="filter"):
        ops.upfirdn2d(torch.zeros(x), ops.setup_filter(F4), **options)


def test_impl_cuda_is_refused_where_there_is_no_kernel():
    with pytest.raises(RuntimeError, match="no kernels"):
        ops.bias_act(torch.zeros(1, 1, 2, 2), impl="cuda")
    with pytest.raises(ValueError, match="impl"):
        ops.bias_act(torch.zeros(1, 1, 2, 2), impl="fast")


@pytest.fixture(scope="module", autouse=True)
def nvcc(tmp_path_factory):
    """It takes a while: it compiles the kernels beside the tests, from the first one on."""
    if shutil.which("nvcc") is None:
        yield None
        return
    folder = tmp_path_factory.mktemp("nvcc")
    (folder / "kernels.cu").write_text(ops.SOURCE)
    command = ["nvcc", "-c", *ops.flags((9, 0)), "kernels.cu", "-o", "kernels.o"]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


# ---- kernels against references: on a GPU, else the same source emulated on the CPU ----


@pytest.fixture(scope="module", params=["gpu", "emulated"])
def device(request, tmp_path_factory):
    """Where the kernels run. The emulation runs all threads of the source, compiled by g++."""
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        yield "cuda"
        return
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    path = emulated_cuda.build(ops.SOURCE, tmp_path_factory.getbasetemp())
    library = ops.declare(ctypes.CDLL(str(path)))
    backwards = request.param.endswith("backwards")
    ctypes.c_int.in_dll(library, "emulated_reverse").value = backwards

    def call(function, x, *args):
        assert function(*args, None) == 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "kernels", lambda x, impl: None if impl == "ref" else library)
        patch.setattr(ops, "launch", call)
        yield "cpu"


# For kernels whose threads wait for one another: last to first, too.
both_orders = pytest.mark.parametrize(
    "device", ["gpu", "emulated", "emulated backwards"], indirect=True, scope="module"
)


def second_order(function, inputs, v):
    """y, first gradients of sum(y v), and gradients of their weighted squares, by v, too."""
    inputs = {k: t.detach().clone().requires_grad_() for k, t in inputs.items()}
    v = v.to(inputs["x"].dtype).requires_grad_()
    y = function(**inputs)
    first = torch.autograd.grad(y, list(inputs.values()), v, create_graph=True)
    # Of sizes that float16 holds, and with a different weight for every one.
    energy = sum((g.double() ** 2).mean() * (1 + k) for k, g in enumerate(first))
    second = torch.autograd.grad(energy, [v, *inputs.values()], allow_unused=True)
    found = {"y": y} | {f"d{k}": g for k, g in zip(inputs, first, strict=True)}
    found |= {f"dd{k}": g for k, g in zip(["v", *inputs], second, strict=True) if g is not None}
    return found


def first_order(function, inputs, v):
    """y and the gradients of sum(y v), as training has them: not to be differentiated again."""
    inputs = {k: t.detach().clone().requires_grad_() for k, t in inputs.items()}
    y = function(**inputs)
    first = torch.autograd.grad(y, list(inputs.values()), v.to(inputs["x"].dtype))
    return {"y": y} | {f"d{k}": g for k, g in zip(inputs, first, strict=True)}


def compare(function, inputs, dtype, device, last, derivatives=second_order):
    """The kernel against the reference, which computes in float64 from the same rounded x."""
    order = torch.channels_last if last else torch.contiguous_format
    given = {k: t.to(device) for k, t in inputs.items()}
    given["x"] = given["x"].to(dtype).contiguous(memory_format=order)
    with torch.no_grad():
        v = torch.randn(function("ref", **given).shape, device=device).to(dtype)
    mine = derivatives(lambda **t: function("cuda", **t), given, v)
    exact = {k: t.double() for k, t in given.items()}
    wanted = derivatives(lambda **t: function("ref", **t), exact, v)
    assert mine["y"].dtype == dtype
    if min(given["x"].shape[1:]) > 1:
        assert mine["y"].is_contiguous(memory_format=order)
    for name, value in wanted.items():
        if name not in mine:
            assert value.abs().max() == 0, f"{name} is missing"
            continue
        worst = (mine[name].double() - value).abs().max().item()
        allowed = ops.ROUNDING[dtype] * max(value.abs().max().item(), 1e-3)
        assert worst <= allowed, f"{name}: off by {worst:.3g} of {value.abs().max():.3g}"


SHAPES = [(2, 16, 4, 4), (3, 5, 7, 3), (1, 8, 1, 1), (2, 24, 9, 8), (1, 1, 33, 40), (2, 300, 3, 2)]


@both_orders
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", ops.ROUNDING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_of_fused_act_equals_its_reference(device, shape, dtype, last):
    torch.manual_seed(0)
    N, C, H, W = shape
    x = torch.randn(shape)
    full = dict(x=x, scale=torch.rand(N, C) + 0.5, strength=torch.tensor(0.7), b=torch.randn(C))
    noise = torch.randn(N, 1, H, W)

    def run(impl, act="lrelu", clamp=None, noise=noise, **t):
        return ops.fused_act(
            t["x"], t.get("scale"), noise.to(t["x"].device) if noise is not None else None,
            t.get("strength"), t.get("b"), act, clamp=clamp, impl=impl,
        )  # fmt: skip

    compare(run, full, dtype, device, last)
    compare(lambda impl, **t: run(impl, noise=noise[0, 0], **t), full, dtype, device, last)
    compare(run, full | {"strength": torch.randn(C)}, dtype, device, last)
    del full["strength"]
    few = {"x": x, "b": full["b"]}
    compare(lambda impl, **t: run(impl, noise=None, **t), few, dtype, device, last)
    compare(lambda impl, **t: run(impl, "linear", noise=None, **t), {"x": x}, dtype, device, last)
    scaled = {"x": x, "scale": full["scale"]}
    compare(lambda impl, **t: run(impl, "linear", noise=None, **t), scaled, dtype, device, last)
    compare(lambda impl, **t: run(impl, "relu", 0.8, None, **t), few, dtype, device, last)


@both_orders
def test_more_channels_than_a_block_has_threads_are_taken_in_turns(device):
    x, scale, b = torch.randn(2, 1032, 2, 2), torch.rand(2, 1032) + 0.5, torch.randn(1032)

    def run(impl, x, scale, b):
        return ops.fused_act(x, scale, None, None, b, "lrelu", impl=impl)

    compare(run, dict(x=x, scale=scale, b=b), torch.float32, device, True)


@pytest.mark.parametrize(("act", "images"), [("linear", 0), ("lrelu", 1), ("tanh", 2)])
def test_a_gradient_to_differentiate_keeps_what_that_reads(device, act, images):
    x = torch.randn(2, 8, 4, 4, device=device, requires_grad=True)
    y, kept = ops.bias_act(x, torch.zeros(8, device=device), act=act, impl="cuda"), []
    gy = torch.randn_like(y, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        torch.autograd.grad(y, x, gy, create_graph=True)
    assert kept.count(x.shape) == images  # y; x and gy of a smooth kind


def test_tensors_of_wrong_shape_are_refused():
    x = torch.zeros(2, 3, 4, 4)
    for wrong in ({"scale": torch.ones(1, 3)}, {"b": torch.ones(2)}, {"noise": torch.ones(4, 5)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ops.fused_act(x, **wrong)


@pytest.mark.parametrize("act", ops.ACTIVATIONS)
@pytest.mark.parametrize("clamp", [None, 0.7])
def test_the_kernel_knows_every_activation(device, act, clamp):
    torch.manual_seed(1)
    inputs = dict(x=2 * torch.randn(2, 6, 5, 4), scale=torch.rand(2, 6) + 0.5, b=torch.randn(6))
    noise = torch.randn(2, 1, 5, 4, device=device)

    def run(impl, **t):
        return ops.fused_act(
            t["x"], t["scale"], noise, None, t["b"], act, gain=1.3, clamp=clamp, impl=impl
        )

    compare(run, inputs, torch.float32, device, True)


@pytest.mark.parametrize("dtype", ops.ROUNDING, ids=str)
@pytest.mark.parametrize("act", ops.ACTIVATIONS)
def test_values_that_are_not_finite_pass_as_in_the_reference(device, act, dtype):
    values = torch.tensor([math.nan, math.inf, -math.inf, 0.5], device=device, dtype=dtype)
    for pixels, clamp in itertools.product((8, 3), (None, 2.0)):  # vectors, one by one
        results = []
        for impl in ("cuda", "ref"):
            x = values[None, :, None, None].expand(1, 4, 1, pixels).clone().requires_grad_()
            y = ops.bias_act(x, act=act, clamp=clamp, impl=impl)
            y.sum().backward()
            known = clamp and act in ops.PIECEWISE  # else PyTorch's slopes at a NaN are of any kind
            results.append([y, x.grad if known else x.grad[:, 1:]])
        torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.parametrize("function", [ops.fused_act, ops.norm_act])
def test_alpha_is_that_of_lrelu_alone(device, function):
    x = torch.randn(2, 4, 3, 4, device=device)
    for act in ("linear", "relu"):
        for impl in ("cuda", "ref"):
            y = function(x, act=act, alpha=0.5, impl=impl)
            torch.testing.assert_close(y, function(x, act=act, impl="ref"))


@pytest.mark.parametrize("act", ["lrelu", "swish"])
@pytest.mark.parametrize(
    ("shape", "dim"), [((5, 7), 1), ((4, 3, 6), 2), ((6, 2, 2), 0), ((2, 3, 2, 2, 2), 1)]
)
def test_bias_act_takes_any_shape_and_dimension(device, shape, dim, act):
    x, b = torch.randn(shape), torch.randn(shape[dim])
    mine = ops.bias_act(x.to(device), b.to(device), dim, act).cpu()
    b = b.reshape([-1 if k == dim else 1 for k in range(len(shape))])
    u = x + b
    wanted = {"lrelu": F.leaky_relu(u, 0.2), "swish": F.silu(u)}[act] * 2**0.5
    torch.testing.assert_close(mine, wanted)


NORMED = [(2, 16, 9, 8), (3, 5, 7, 4), (1, 8, 1, 6), (2, 1, 3, 5), (2, 300, 3, 2), (2, 24, 17, 13)]


@both_orders
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", ops.ROUNDING, ids=str)
@pytest.mark.parametrize("shape", NORMED, ids=str)
def test_the_kernels_of_norm_act_equal_their_reference(device, shape, dtype, last):
    torch.manual_seed(0)
    N, C, H, W = shape
    x, styles = 2 * torch.randn(shape) + 5, dict(scale=torch.randn(N, C), shift=torch.randn(N, C))
    weights = {k: t[0] for k, t in styles.items()}

    def run(impl, act="lrelu", pad=0, **t):
        if "residual" in t:
            t["residual"] = t["residual"].to(dtype).to(t["x"].dtype)  # of what the kernel reads
        return ops.norm_act(act=act, pad=pad, impl=impl, **t)

    for pad in range(min(H, W, 4)):
        residual = torch.randn(N, C, H + 2 * pad, W + 2 * pad)
        for act, more in (
            ("lrelu", styles | {"residual": residual}),
            ("linear", {"residual": residual}),
            ("relu", {}),
            ("lrelu", weights),
        ):
            padded = functools.partial(run, act=act, pad=pad)
            compare(padded, {"x": x} | more, dtype, device, last, first_order)
    everything = {"x": x, "residual": torch.randn(shape)} | styles
    compare(run, everything, dtype, device, last)  # the second order, by the reference


@both_orders
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
def test_the_moments_of_maps_far_from_0_and_of_one_outlier_are_exact(device, last):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 64, 64)
    x[0] += 3000  # E[x^2] - E[x]^2 would be wrong by half of the variance
    x[1, :, 0, 0] = 1e6
    for offset in (x, x.flip(2, 3)):
        compare(ops_norm, {"x": offset}, torch.float32, device, last, first_order)


def ops_norm(impl, x):
    return ops.norm_act(x, impl=impl)


def test_norm_act_of_no_samples_is_empty_and_of_one_pixel_an_error(device):
    x, scale = (torch.zeros(0, 4, 3, 3, device=device), torch.ones(4, device=device))
    x.requires_grad_(), scale.requires_grad_()
    y = ops.norm_act(x, scale, scale, pad=1, impl="cuda")
    gx, gscale = torch.autograd.grad(y.sum(), (x, scale))
    assert y.shape == (0, 4, 5, 5) and gx.shape == x.shape and gscale.abs().sum() == 0
    for message, wrong in (("residual", {"residual": x}), ("scale", {"scale": scale})):
        with pytest.raises(ValueError, match=message):
            ops.norm_act(x, pad=1, **wrong)
    with pytest.raises(ValueError, match="act"):
        ops.norm_act(torch.zeros(2, 4, 1, 1, device=device))


FILTERS = {
    "2 taps": ([1.0, 2.5], True),
    "3 taps": ([1.0, 2.0, 3.0], True),
    "4 taps": ([1.0, 3.0, 3.5, 1.0], True),
    "12 taps": ([0.5, 1, 2, 3, 4, 5, 6, 5, 3, 2, 1, -1.0], None),
    "4x4": ([1, 3, 3, 1], None),
    "5 taps": ([1.0, 2.0, 3.0, 0.5, -1.0], True),
    "2x3": ([[1.0, 2.0, 3.0], [0.0, -1.0, 5.0]], None),
}
FACTORS = [(1, 1), (2, 1), (1, 2), ((2, 1), (1, 3)), (2, 2)]


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", ops.ROUNDING, ids=str)
@pytest.mark.parametrize("f", FILTERS)
@pytest.mark.parametrize(("up", "down"), FACTORS, ids=str)
def test_the_kernel_of_upfirdn2d_equals_its_reference(device, f, up, down, dtype, last):
    torch.manual_seed(0)
    taps, separable = FILTERS[f]
    taps = ops.setup_filter(taps, separable=separable).to(device)
    shapes = [(2, 8, 11, 6), (1, 3, 8, 8), (1, 40, 3, 37)]
    paddings = [(7, 6, 5, 8), (6, 6, 6, 6), (11, -2, 12, 3)]
    for (shape, pad), flip in zip(zip(shapes, paddings, strict=True), (0, 1, 0), strict=True):

        def run(impl, x, pad=pad, flip=flip):
            return ops.upfirdn2d(x, taps.to(x.dtype), up, down, pad, bool(flip), 1.7, impl)

        compare(run, {"x": torch.randn(shape)}, dtype, device, last)


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", ops.ROUNDING, ids=str)
@pytest.mark.parametrize("function", [ops.pool2, ops.double], ids=["pool2", "double"])
def test_the_kernel_of_two_taps_equals_torch_s_pooling_and_doubling(device, function, dtype, last):
    torch.manual_seed(0)
    for shape in ((2, 8, 11, 6), (1, 3, 2, 3), (1, 40, 7, 37)):
        compare(lambda impl, x: function(x, impl), {"x": torch.randn(shape)}, dtype, device, last)


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", ops.ROUNDING, ids=str)
@pytest.mark.parametrize("function", [ops.box_then_blur, ops.blur_then_box])
def test_box_and_blur_are_one_pass_with_odd_edges(device, function, dtype, last):
    torch.manual_seed(0)
    for shape in ((2, 8, 11, 6), (1, 3, 2, 3), (1, 40, 7, 37), (2, 16, 133, 3)):
        compare(
            lambda impl, x: function(x, 1.7, impl), {"x": torch.randn(shape)}, dtype, device, last
        )


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("blur", [False, True])
@pytest.mark.parametrize("function", [ops.upscale_conv2d, ops.conv2d_downscale])
def test_convolutions_between_sides_equal_their_steps(device, function, blur, last):
    torch.manual_seed(0)
    x, w = torch.randn(2, 8, 10, 6), torch.randn(4, 8, 3, 3)

    def steps(x, w):
        f = ops.setup_filter([1, 2, 1], separable=True).to(x)
        if function is ops.upscale_conv2d:
            y = F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), w, padding=1)
            return ops.filter2d(y, f, impl="ref") if blur else y
        y = F.conv2d(ops.filter2d(x, f, impl="ref") if blur else x, w, padding=1)
        return F.avg_pool2d(y, 2)

    def run(impl, x, w):
        return function(x, w, blur, impl) if impl == "cuda" else steps(x, w)

    with common.exact_float32(torch.device(device)):
        compare(run, {"x": x, "w": w}, torch.float32, device, last)


def test_a_filter_may_be_a_view(device):
    x, f = torch.randn(1, 4, 9, 8, device=device), torch.rand(3, 5, device=device).T
    mine, wanted = (ops.upfirdn2d(x, f, padding=2, impl=impl) for impl in ("cuda", "ref"))
    torch.testing.assert_close(mine, wanted)


def test_layers_around_a_norm_keep_their_own_padding(device):
    layers = [
        torch.nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), torch.nn.InstanceNorm2d(4),
        torch.nn.ReLU(), torch.nn.ReflectionPad2d((1, 0, 2, 0)), torch.nn.InstanceNorm2d(4),
        torch.nn.ReflectionPad2d(1), torch.nn.InstanceNorm2d(4),
    ]  # fmt: skip
    layers, x = torch.nn.Sequential(*layers).to(device), torch.randn(2, 3, 9, 8, device=device)
    with common.exact_float32(torch.device(device)):
        torch.testing.assert_close(ops.through(layers, x), layers(x), rtol=1e-4, atol=1e-4)


def test_long_columns_are_walked_in_bands(device):
    f, x = ops.setup_filter(F4, separable=True).to(device), torch.randn(1, 4, 133, 5, device=device)
    for options in ({}, {"up": 2}, {"down": 2}):
        mine = ops.upfirdn2d(x, f, padding=(2, 1, 2, 1), impl="cuda", **options)
        torch.testing.assert_close(
            mine, ops.upfirdn2d(x, f, padding=(2, 1, 2, 1), impl="ref", **options)
        )


@pytest.mark.parametrize(("I", "O"), [(3, 16), (16, 3)])
def test_half_convolutions_from_and_to_images_are_products(device, monkeypatch, I, O):
    x, w = (double(*shape, seed=k).detach() for k, shape in enumerate([(2, I, 8, 8), (O, I, 1, 1)]))
    monkeypatch.setattr(ops.Convolution, "apply", None)
    half = [t.to(device, torch.float16).requires_grad_() for t in (x, w)]
    y = ops.conv2d(*half)
    found = [y, *torch.autograd.grad(y.sum(), half)]
    exact = [t.half().double().requires_grad_() for t in (x, w)]
    y = F.conv2d(*exact)
    for a, b in zip(found, [y, *torch.autograd.grad(y.sum(), exact)], strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=0, atol=4e-3 * b.abs().max().item())


def test_tensors_that_are_not_dense_and_gradients_that_are_expanded(device):
    x = torch.randn(2, 6, 8, 10, device=device)[:, ::2, :, 1:9].requires_grad_()
    b = torch.randn(3, device=device, requires_grad=True)
    results = []
    for impl in ("cuda", "ref"):
        y = ops.bias_act(x, b, act="lrelu", impl=impl)
        results.append([y, *torch.autograd.grad(y.sum(), (x, b))])  # an expanded gradient of ones
    torch.testing.assert_close(*results)


def maps(*rows):
    return torch.tensor(rows).reshape(-1, 2, 3)


def turned(angle, sx=1.0, sy=1.0, tx=0.0, ty=0.0):
    c, s = math.cos(angle), math.sin(angle)
    return [c * sx, -s * sy, tx, s * sx, c * sy, ty]


MAPS = {  # two samples each
    "identity and quarter turn": maps(turned(0), [0, -1, 0, 1, 0, 0]),
    "turns": maps(turned(0.6), turned(-2.4, tx=0.3, ty=-1.2)),
    "mirrored": maps([-1, 0, 0, 0, 1, 0], [0, 1, 0.5, 1, 0, -0.25]),
    "4 times larger": maps(turned(0.2, 0.25, 0.25), turned(3, 0.25, 0.25, 2, 1)),
    "4 times smaller": maps(turned(0.2, 4, 4), turned(2, 4, 4, -3, 5)),
    "stretched": maps(turned(0.5, 0.3, 3), turned(-1, 2, 0.2, 1, 1)),
    "sheared": maps([1, 5, 0.5, 0, 1, 0], [1, 1, 0, 0.9, 1, 0]),
    "shifted": maps(turned(0, tx=3, ty=-2), turned(0, tx=-4.7, ty=6.1)),
    "shifted out": maps(turned(0, tx=100), turned(1, tx=-14, ty=9)),
    "without an inverse": maps([0, 0, 0.3, 0, 0, -0.2], [1, 0.5, 0.1, 2, 1, 0.3]),
    "hardly with one": maps([1, 0.5, 0.1, 2, 1.00001, 0.3], [1e-30, 0, 0, 0, 1e-30, 1]),
    "one row, one column": maps([1, 0, 0.2, 0, 0, 0.7], [0, 0, 0.2, 0, 1, 0.7]),
}
REACHES = {"all": [[99, 99], [99, 99]], "some": [[2, 0], [1, 3]], "none": [[0, 0], [0, 0]]}
WAVELET = ops.setup_filter([0.5, 1, -2, 3, -4, 15, 16, 5, 3, -2, 1, -1.0])


def warping(m, reach, shape, device):
    """ops.warp of (impl, x), within reach or to the next reflection."""
    most = torch.tensor(shape[:1:-1]) - 1
    given = MAPS[m].to(device), torch.tensor(REACHES[reach]).minimum(most).to(device, torch.float32)

    def run(impl, x):
        kind = torch.promote_types(x.dtype, torch.float32)  # of the reference: float64
        return ops.warp(x, *(t.to(kind) for t in given), WAVELET.to(device), impl)

    return run


@both_orders
@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("m", MAPS)
@pytest.mark.parametrize("shape", [(2, 3, 9, 6), (2, 1, 4, 19), (2, 4, 7, 7), (2, 2, 1, 1)])
def test_the_kernels_of_warp_equal_their_reference(device, shape, m, reach):
    torch.manual_seed(0)
    run = warping(m, reach, shape, device)
    compare(run, {"x": torch.randn(shape)}, torch.float32, device, False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_warp_takes_half_precision_and_any_number_of_channels(device, dtype):
    torch.manual_seed(0)
    shape = (2, 9, 6, 11)
    compare(warping("turns", "all", shape, device), {"x": torch.randn(shape)}, dtype, device, False)


@both_orders
@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("m", MAPS)
def test_the_backward_pass_of_warp_is_the_transposed_matrix(device, m, reach):
    H, W = 5, 7
    x = torch.eye(H * W, device=device).reshape(1, -1, H, W).repeat(2, 1, 1, 1).requires_grad_()
    run = warping(m, reach, x.shape, device)
    K = run("cuda", x)  # (2, pixels of x, OH, OW), pixels in the place of channels
    unit = torch.eye(K[0, 0].numel(), device=device).reshape(1, -1, *K.shape[2:])
    more = torch.zeros(2, unit.shape[1], H, W, device=device, requires_grad=True)
    (gx,) = torch.autograd.grad(run("cuda", more), more, unit.repeat(2, 1, 1, 1))
    torch.testing.assert_close(gx.flatten(2).mT, K.detach().flatten(2), rtol=1e-6, atol=1e-7)


def test_a_batch_of_none_or_with_maps_that_are_not_finite_is_warped_to_zeros(device):
    for N, bad in ((0, 0.0), (1, math.inf), (1, math.nan)):
        x = torch.randn(N, 3, 5, 4, device=device, requires_grad=True)
        for k in range(6):
            G = torch.tensor(turned(0.1), device=device)
            G[k] = bad
            reach = torch.full((2, 2), 3.0, device=device)
            y = ops.warp(x, G.expand(N, 6).reshape(N, 2, 3), reach, WAVELET.to(device), "cuda")
            (gx,) = torch.autograd.grad(y, x, torch.ones_like(y))
            assert y.shape == (N, 3, 22, 20) and not y.any() and not gx.any()


def test_channels_last_images_are_warped_alike(device):
    x = torch.randn(2, 3, 6, 8, device=device)
    run = warping("turns", "some", x.shape, device)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(run("cuda", last), run("cuda", x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_more_than_2_31_elements_on_a_gpu():
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB")
    x = torch.zeros(2, 64, 4100, 4100, dtype=torch.float16, device="cuda")
    x[-1, -1, -1, -1] = 1
    y = ops.bias_act(x, torch.zeros(64, device="cuda"), act="lrelu", impl="cuda")
    assert y[-1, -1, -1, -1].item() == pytest.approx(2**0.5, rel=1e-3) and y.count_nonzero() == 1
    f = ops.setup_filter(F4, separable=True).cuda()
    y = ops.upfirdn2d(x, f, padding=(2, 1, 2, 1), impl="cuda")
    assert y[-1, -1, -1, -1].item() == pytest.approx(9 / 64, rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_captures_the_kernels_in_a_graph():
    x, b = torch.randn(2, 8, 16, 16, device="cuda"), torch.randn(8, device="cuda")
    f = ops.setup_filter(F4, separable=True).cuda()

    def run():
        return ops.upsample2d(ops.bias_act(x, b, act="lrelu", impl="cuda"), f, impl="cuda")

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    x.normal_()
    graph.replay()
    torch.testing.assert_close(y, run())


# ---- compilation ----


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_kernels_compile_with_nvcc(nvcc):
    errors = nvcc.communicate()[1]
    assert nvcc.returncode == 0, errors
    assert "error" not in errors and "warning" not in errors, errors


def test_the_self_check_passes_and_finds_a_wrong_kernel(device, monkeypatch, capsys):
    monkeypatch.setattr(ops, "SHAPES", [(2, 16, 5, 4)])
    assert ops.check(device) == 0
    n = 6 * len(ops.operators(2, 16, 5, 4, "cpu"))  # types, memory orders
    assert f"{n} of {n} cases agree" in capsys.readouterr().out
    monkeypatch.setattr(ops, "SQRT2", 1.0)
    right = ops.fused_act_ref
    monkeypatch.setattr(ops, "fused_act_ref", lambda x, *rest: right(x, *rest[:-2], 1.2, rest[-1]))
    assert ops.check(device) == 18
    assert "WRONG bias_act" in capsys.readouterr().out


def test_values_far_beyond_the_clamp_are_not_drawn_anew_for_ever():
    x = torch.linspace(-3, 3, 601)
    found = ops.away_from_kinks(x, lambda x: (x + 20 * (torch.arange(601) > 300)).clamp(-1, 1))
    assert torch.equal(found[301:], x[301:])
    assert (found[:301].abs() > 0.02).all() and ((found[:301].abs() - 1).abs() > 0.02).all()


@pytest.mark.parametrize(("given", "done"), [([], "cm"), (["check"], "c"), (["measure"], "m")])
def test_either_part_of_the_self_check_runs_alone(monkeypatch, given, done):
    ran = []
    monkeypatch.setattr(ops, "check", lambda device: ran.append("c") or 3)
    monkeypatch.setattr(ops, "measure", lambda device: ran.append("m"))
    monkeypatch.setattr(ops, "build", lambda capability: "kernels")
    found = dict(is_available=True, get_device_name="", get_device_capability=())
    for name, value in found.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(sys, "argv", ["ops_cuda.py", *given])
    assert ops.main() == ("c" in done) and "".join(ran) == done


def test_the_table_of_speeds_has_a_line_for_each_pass(device, monkeypatch, capsys):
    if device == "cpu":
        monkeypatch.setattr(ops, "milliseconds", lambda function: function() is None or 1.0)
        empty = torch.empty
        small = lambda *a, **k: empty(8) if a == (2**28,) else empty(*a, **k)  # noqa: E731
        monkeypatch.setattr(torch, "empty", small)
    ops.measure(device, [(1, 16, 8, 8)])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(ops.operators(1, 16, 8, 8, "cpu")) * 2 * 2 * 2


def test_without_a_gpu_the_self_check_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, ROOT / "ops_cuda.py"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "no CUDA device" in done.stderr and not done.stdout


@pytest.fixture
def fake_build(tmp_path, tmp_path_factory, monkeypatch):
    """ops.build without a GPU or nvcc: g++ makes the library, in the way of load_inline."""
    from torch.utils import cpp_extension

    made, emulated = [], emulated_cuda.build(ops.SOURCE, tmp_path_factory.getbasetemp())

    def load_inline(name, cpp, cuda, build_directory, **options):
        (Path(build_directory) / "lock").touch()  # torch's own lock, which a kill leaves behind
        library = Path(build_directory) / f"{name}.so"
        shutil.copy(emulated, library)
        made.append(library)
        return str(library)

    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("nvcc", "ninja", "c++", "g++"):
        (tools / tool).symlink_to(shutil.which("true"))
    monkeypatch.setattr(cpp_extension, "load_inline", load_inline)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setenv("GANS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.delenv("CXX", raising=False)
    ops.build.cache_clear()
    yield types.SimpleNamespace(made=made, tools=tools, cache=tmp_path / "cache" / "kernels")
    ops.build.cache_clear()


def test_a_build_is_cached_and_leaves_nothing_else(fake_build):
    assert ops.build((9, 0)) is not None
    ops.build.cache_clear()
    assert ops.build((9, 0)) is not None
    assert len(fake_build.made) == 1 and len(list(fake_build.cache.iterdir())) == 1
    assert ops.build((8, 0)) is not None and len(fake_build.made) == 2  # another GPU


def test_what_a_killed_build_left_does_not_stop_the_next(fake_build):
    left = fake_build.cache / "build-killed"
    left.mkdir(parents=True)
    (left / "lock").touch()
    assert ops.build((9, 0)) is not None


def test_two_builds_at_once_both_end_well(fake_build):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(ops.build.__wrapped__((9, 0))))
        for _ in range(2)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 2 and None not in found and len(list(fake_build.cache.iterdir())) == 1


@pytest.mark.parametrize("tool", ["nvcc", "ninja"])
def test_a_missing_tool_is_named_once(fake_build, monkeypatch, capsys, tool):
    (fake_build.tools / tool).unlink()
    monkeypatch.setenv("PATH", str(fake_build.tools))
    monkeypatch.setattr(sys, "executable", str(fake_build.tools / "python"))
    assert ops.build((9, 0)) is None and ops.build((9, 0)) is None
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"no {tool} on PATH" in err and "PyTorch expressions" in err


def test_a_failing_build_names_its_log(fake_build, monkeypatch, capsys):
    from torch.utils import cpp_extension

    def fail(*args, **options):
        raise RuntimeError("nvcc: line 7: error")

    monkeypatch.setattr(cpp_extension, "load_inline", fail)
    assert ops.build((9, 0)) is None
    err = capsys.readouterr().err
    (log,) = fake_build.cache.glob("*.log")
    assert err.count("\n") == 1 and str(log) in err and "line 7" in log.read_text()


def test_a_cache_that_cannot_be_written_is_one_line(fake_build, monkeypatch, capsys):
    fake_build.cache.parent.mkdir()
    fake_build.cache.write_text("a file where the folder should be")
    assert ops.build((9, 0)) is None
    assert capsys.readouterr().err.count("\n") == 1


# ---- whole networks on the kernels ----


class Draws:
    """Stands in for common.Run in the training phases."""

    def __init__(self, device):
        self.device, self.generator = device, torch.Generator().manual_seed(1)

    def rand(self, n, shared=False):
        return torch.rand(n, generator=self.generator).to(self.device)

    def randn(self, *shape):
        return torch.randn(shape, generator=self.generator).to(self.device)

    def mean(self, x):
        return x

    def backward(self, loss):
        loss.backward()


def gradients_of_phases(G, D, device):
    """The gradients of each training phase of StyleGAN2, as one vector each."""
    args = types.SimpleNamespace(
        mixing=0.9, pl_weight=2, pl_every=4, r1_gamma=1, r1_every=16, batch_gpu=None
    )
    run = Draws(device)
    real, pl_mean = run.randn(4, 3, 32, 32), torch.tensor(0.1, device=device)
    rest, found = (lambda n: None, args, run, run.randn), {}

    def keep(name, net):
        found[name] = torch.cat(
            [(p.grad if p.grad is not None else p * 0).flatten() for p in net.parameters()]
        )
        net.zero_grad()

    D.requires_grad_(False)
    stylegan2.generator_phase(G, D, 4, *rest)
    keep("G", G)
    stylegan2.path_length_phase(G, pl_mean, 4, *rest)
    keep("path length", G)
    D.requires_grad_(True)
    stylegan2.discriminator_phase(G, D, real, None, *rest)
    keep("D", D)
    stylegan2.r1_phase(D, real, None, args, run)
    keep("R1", D)
    return found


@pytest.mark.parametrize(
    ("half", "allowed", "architectures"),
    [
        (None, 1e-4, ("skip", "resnet")),
        ("float16", 0.1, ("skip", "resnet")),
        ("bfloat16", 0.2, ("skip", "resnet")),
        (None, 1e-4, ("orig", "orig")),
        ("float16", 0.1, ("resnet", "skip")),
    ],
)
def test_stylegan2_trains_on_the_kernels(device, monkeypatch, half, allowed, architectures):
    torch.manual_seed(0)
    both = dict(img_resolution=32, channel_base=256, channel_max=16)
    both |= dict(half_res=4, half=half, clamp=256.0) if half else {}
    G = stylegan2.Generator(16, 0, 16, map_layers=2, architecture=architectures[0], **both)
    D = stylegan2.Discriminator(architecture=architectures[1], mbstd_group=2, **both)
    for name, p in G.named_parameters():
        if name.endswith("noise_strength"):
            p.data.fill_(0.3)
    G, D = (net.to(device, memory_format=torch.channels_last) for net in (G, D))
    if device == "cpu":  # where the networks would stay in float32
        of_weights = stylegan2.block_type
        monkeypatch.setattr(stylegan2, "block_type", lambda b: b.half or of_weights(b))
    with common.exact_float32(device):  # the rounding of TF32 is larger than what is allowed
        mine = gradients_of_phases(G, D, device)
        monkeypatch.setattr(stylegan2, "block_type", lambda b: b.conv1.weight.dtype)
        monkeypatch.setattr(ops, "kernels", lambda x, impl: None)
        exact = gradients_of_phases(G, D, device)
    for name, wanted in exact.items():
        off = (mine[name] - wanted).norm() / wanted.norm()
        assert off <= allowed, f"{name}: off by {off:.2g}"


@pytest.mark.parametrize(("half", "allowed"), [(None, 1e-4), ("float16", 0.1)])
def test_stylegan_trains_on_the_kernels(device, monkeypatch, half, allowed):
    torch.manual_seed(0)
    both = dict(img_resolution=16, channel_base=128, channel_max=16, lod=0.5)
    both |= dict(half_res=4, half=half) if half else {}
    G = stylegan.Generator(16, 0, 16, map_layers=2, **both)
    D = stylegan.Discriminator(mbstd_group=2, **both, **dict(clamp=256.0) if half else {})
    for name, p in G.named_parameters():
        if name.endswith("noise_strength"):
            p.data.fill_(0.3)
    G, D = (net.to(device, memory_format=torch.channels_last) for net in (G, D))
    of_weights = stylegan.block_type
    if device == "cpu":  # where the networks would stay in float32
        monkeypatch.setattr(stylegan, "block_type", lambda b: b.half or of_weights(b))
    options = dict(r1_gamma=1, r2_gamma=0, gp_lambda=0, loss="logistic", mixing=0.9, batch_gpu=None)
    args, filters = types.SimpleNamespace(**options), []
    apply = ops.Upfirdn2d.apply
    monkeypatch.setattr(ops.Upfirdn2d, "apply", lambda *rest: (filters.append(0), apply(*rest))[1])

    def gradients():
        run = Draws(device)
        real = run.randn(4, 3, 16, 16)
        D.requires_grad_(False)
        stylegan.generator_phase(G, D, 4, lambda n: None, args, run, run.randn)
        D.requires_grad_(True)
        stylegan.discriminator_phase(G, D, real, None, args, run, run.randn)
        found = []
        for net in (G, D):
            used = [p.grad for p in net.parameters() if p.grad is not None]
            found.append(torch.cat([g.flatten() for g in used]))
            net.zero_grad()
        return found

    with common.exact_float32(device):  # the rounding of TF32 is larger than what is allowed
        mine = gradients()
        assert filters
        monkeypatch.setattr(stylegan, "block_type", lambda b: b.conv1.weight.dtype)
        monkeypatch.setattr(ops, "kernels", lambda x, impl: None)
        exact = gradients()
    for a, b in zip(mine, exact, strict=True):
        off = (a - b).norm() / b.norm()
        assert off <= allowed, f"off by {off:.2g}"


TRANSLATORS = [
    *({"kind": "resnet", "blocks": 2, "ngf": 4, "norm": norm} for norm in ("instance", "batch")),
    {"kind": "resnet", "blocks": 1, "ngf": 4, "dropout": True},
    {"kind": "unet", "downs": 3, "ngf": 4},
    *({"kind": "patch", "ndf": 4, "norm": norm} for norm in ("instance", "none")),
    {"kind": "pixel", "ndf": 4},
    {"kind": "G", "size": 32, "channel_base": 256, "channel_max": 16, "style_dim": 4},
]


@pytest.mark.parametrize("config", TRANSLATORS, ids=lambda c: "-".join(map(str, c.values())))
def test_translators_train_on_the_kernels(device, monkeypatch, config):
    torch.manual_seed(0)
    module = stargan_v2 if config["kind"] == "G" else cyclegan
    net = module.build(config).to(device, memory_format=torch.channels_last)
    net.train(not config.get("dropout"))  # or its draws differ
    x, s = torch.randn(2, 3, 32, 32, device=device), torch.randn(2, 4, device=device)
    norms = sum(isinstance(m, torch.nn.InstanceNorm2d | stargan_v2.AdaIN) for m in net.modules())
    called, launch = [], ops.launch

    def counted(function, *rest):
        called.append(function.__name__)
        launch(function, *rest)

    monkeypatch.setattr(ops, "launch", counted)

    def gradients():
        y = net(x, s) if config["kind"] == "G" else net(x)
        loss = (y * y.detach().cos()).mean()
        if "ndf" in config:  # differentiates twice
            alpha = torch.full((2, 1), 0.3, device=device)
            loss = loss + cyclegan.gradient_penalty(net, x, x.flip(0), alpha)
        # A bias before an instance norm has none in one case, and rounding errors in the other.
        found = torch.autograd.grad(loss, list(net.parameters()), materialize_grads=True)
        return y, torch.cat([g.flatten() for g in found])

    with common.exact_float32(device):
        mine = gradients()
        assert called.count("norm_act") >= 2 * norms and bool(called) == bool(norms)
        monkeypatch.setattr(ops, "kernels", lambda x, impl: None)
        exact = gradients()
    for a, b in zip(mine, exact, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_autocast_casts_convolutions_as_it_does_those_of_pytorch():
    x, w, each = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(2, 4, 3)
    calls = {
        "conv2d": (lambda x: ops.conv2d(x, w), lambda x: F.conv2d(x, w)),
        "transposed": (
            lambda x: ops.conv_transpose2d(x, w.transpose(0, 1)),
            lambda x: F.conv_transpose2d(x, w.transpose(0, 1)),
        ),
        "to_image": (
            lambda x: ops.to_image(x, each),
            lambda x: (each @ x.flatten(2)).view(2, 4, 8, 8),
        ),
    }
    for name, (ours, theirs) in calls.items():
        found = []
        for function in (ours, theirs):
            leaf = x.clone().requires_grad_(True)
            with torch.autocast("cpu", torch.bfloat16):
                y = function(leaf)
            found.append((y, *torch.autograd.grad(y.float().square().sum(), leaf)))
        for a, b in zip(*found, strict=True):
            assert a.dtype == b.dtype, name
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.3, msg=name)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.conv2d(x.double(), w.double()).dtype == torch.float64
    assert ops.conv2d(x.to("meta"), w.to("meta")).shape == (2, 4, 6, 6)


# ---- tests/bench.py ----


def test_kernels_that_overlap_keep_a_gpu_busy_once():
    spans = [("kernel", 0, 4), ("kernel", 2, 4), ("gpu_memset", 3, 1), ("cpu_op", 5, 90)]
    events = [dict(cat=kind, ts=ts, dur=dur) for kind, ts, dur in [*spans, ("kernel", 8, 2)]]
    events = bench.of_gpu([*events, {"ph": "M"}])
    assert bench.busy(events, 2) == (pytest.approx(4e-6), 1.5)


def test_kernels_are_listed_by_the_time_that_they_take_in_all():
    events = [dict(name=name, dur=dur) for name, dur in [("a", 900), ("b", 700), ("b", 500)]]
    assert [line.split() for line in bench.longest(events, 2, 1)] == ["0.600 ms 1.0x b".split()]


def test_a_row_of_the_bench_is_compared_with_the_original_if_there_is_one():
    found = {"images/s": 87.0, "ms": "G 1.0, D 2.0", "busy": 0.987, "kernels": 812.4, "GiB": 7.5}
    original = "| train | 87.0 | x0.50 | no, 522 | G 1.0, D 2.0 | 99% | 812 | 7.50 (8.0) |"
    assert bench.row_text("train", found, (174, 8.0, 522)) == original
    assert "x2.00 | yes, 87 |" in bench.row_text("train", found, (43.5, None, 87))
    on_cpu = {"images/s": 87.0, "ms": "11.49", "GiB": 0.5}
    assert bench.row_text("train", on_cpu) == "| train | 87.0 | - | - | 11.49 | - | - | 0.50 |"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, ValueError, common.UserError])
def test_the_bench_takes_the_rows_that_are_named_and_survives_one_that_fails(
    monkeypatch, capsys, error
):
    def measured(work, device, repeats, profile):
        if work[1] == "generate":
            raise error("CUDA out of memory. Tried\nmore")
        return {"images/s": 1.0, "ms": "", "GiB": 1.0, "longest": ["a kernel"] * profile}

    monkeypatch.setattr(bench, "work_of", lambda *row: row)
    monkeypatch.setattr(bench, "measured", measured)
    options = ["--device=cpu", "--full", "--profile=2", "--rows", "256 px, batch 32"]
    assert bench.main(["stylegan2", *options]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("a kernel") == 4
    rows = [line for line in lines if line.startswith("| style")]
    assert len(rows) == 3 and all("256 px, batch 32" in row for row in rows)
    assert [row for row in rows if "generate" in row and "| CUDA out of memory. Tried |" in row]


@pytest.mark.parametrize(
    "options", ["stylegan4", "stylegan --rows nothing", "--repeats 0", "--device cuda:99"]
)
def test_the_bench_refuses_what_it_cannot_measure(capsys, options):
    with pytest.raises(SystemExit, match="2"):
        bench.main(options.split())
    assert "error: " in capsys.readouterr().err


def test_every_row_of_the_bench_has_options_that_its_script_knows(monkeypatch):
    for name, (paper, _) in bench.OF.items():
        monkeypatch.setitem(bench.OF, name, (paper, lambda what, args, device: args))
        for full in (True, False):
            for what, size, batch, precision, *original in bench.rows_of(name, full):
                args = bench.work_of(name, what, size, batch, precision, full, "cpu")
                assert (args.batch, args.precision, len(original) in (0, 3)) == (
                    batch, precision, True,
                )  # fmt: skip
                assert args.data == ("afhq" if full else "toy")  # or the paper's sizes are toys


@pytest.mark.parametrize("name", bench.OF)
def test_every_paper_of_the_bench_trains_in_its_stand_in_for_a_run(name):
    row = next(row for row in bench.rows_of(name, False) if row[0].startswith("train"))
    work = bench.work_of(name, *row[:4], False, torch.device("cpu"))
    spent = work.run.seconds(lambda: work.call(0))
    assert len(spent) == len(work.phases) and all(t > 0 for t in spent)
