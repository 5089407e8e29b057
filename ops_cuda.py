"""The operators of the six papers, with exact first and second derivatives (R1 and path length
differentiate twice). Passes over memory stand here as maths, plain PyTorch reference, CUDA kernel
and the function that chooses; convolutions and grid_sample are PyTorch's, with derivatives of their
own.

In this file                                what it is
    build                                   compiles the kernels below, once per machine and GPU
    fused_act, bias_act                     clamp(gain * act(x * scale + noise * strength + b))
    norm_act                                pad(act(instance_norm(x) * scale + shift)) + residual
    through                                 a sequence of layers, by norm_act where that pays
    setup_filter, upfirdn2d, filter2d, ...  pad, upsample, FIR filter, downsample
    pool2, double                           the mean of 2x2 pixels; each pixel 2x2 times
    box_then_blur, blur_then_box            [1, 1] and [1, 2, 1] in one pass
    conv2d, conv_transpose2d                convolutions whose second derivatives are fast
    no_weight_gradients                     a context for penalties of gradients
    to_image, from_image                    1x1 convolutions to and from few channels
    conv2d_resample                         a convolution that also resamples, in the best order
    upscale_conv2d, conv2d_downscale        3x3 convolutions of doubled pixels, or averaged after
    grid_sample                             twice differentiable in the image
    warp                                    upsample by a lowpass and read through an affine map

    python ops_cuda.py        # a new GPU: check every kernel, and measure it against a copy
    python ops_cuda.py check  # or one of the two alone; the other is `measure`

What has a kernel takes impl="cuda" or "ref" (the PyTorch expression, on any device); None picks the
kernel for float32, float16 and bfloat16 on a GPU, and the reference elsewhere. In the environment
GAN_OPS=ref turns the kernels off, and GANS_CACHE is the folder that they are kept in. Kernels load
and store the tensor's type and compute in float32. Needs torch 2.9 or newer.
"""

import argparse
import collections
import contextlib
import ctypes
import functools
import hashlib
import itertools
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# =============================================================================
# CUDA: the source, its compilation, the choice
# =============================================================================

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

PRELUDE = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#ifndef LAUNCH
#define LAUNCH(kernel, grid, block, shared, stream, ...) \
    kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#endif

// V neighbours in memory, moved by one instruction of up to 16 bytes; computed with as floats.
template <class T, int V> struct alignas(sizeof(T) * V) Pack { T v[V]; };
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half_rn(x);
}
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}
template <int V, class T> __device__ __forceinline__ Pack<T, V> fetch(const T* from) {
    return *reinterpret_cast<const Pack<T, V>*>(from);
}
template <int V, class T> __device__ __forceinline__ void load(float* to, const T* from) {
    Pack<T, V> p = fetch<V>(from);
#pragma unroll
    for (int j = 0; j < V; j++) to[j] = to_float(p.v[j]);
}
template <int V, class T> __device__ __forceinline__ void store(T* to, const float* from) {
    Pack<T, V> p;
#pragma unroll
    for (int j = 0; j < V; j++) p.v[j] = from_float<T>(from[j]);
    *reinterpret_cast<Pack<T, V>*>(to) = p;
}

// These kernels wait for memory. A thread issues the loads of BATCH slots before it uses the first;
// so no load may stand behind a branch on which threads differ, or each waits for the one before.
template <int V> constexpr int BATCH = V == 8 ? 2 : 4;

"""


@functools.cache
def build(capability):
    """The compiled kernels for GPUs of this (major, minor) capability, as a ctypes library; None,
    after one line that says why, where they cannot be built. torch.utils.cpp_extension compiles
    plain CUDA without torch's headers in seconds; the result is kept in $GANS_CACHE/kernels.

    Every process builds in a folder of its own and moves the result into place at once: a build
    that is killed leaves no lock, and two that race leave one good file.
    """
    digest = f"{SOURCE} {flags(capability)} {torch.version.cuda} {platform.machine()}"
    digest = hashlib.sha256(digest.encode()).hexdigest()[:16]
    try:
        cache = Path(os.environ.get("GANS_CACHE") or "~/.cache/gans").expanduser() / "kernels"
        library = cache / f"ops_cuda-{digest}.so"
        try:
            found = ctypes.CDLL(str(library))
        except OSError:  # none yet, or of another toolkit, or damaged
            compile_to(library, flags(capability))
            found = ctypes.CDLL(str(library))
    except (BuildError, OSError, RuntimeError) as e:  # RuntimeError: there is no home folder
        print(
            f"ops_cuda: {e}; using the PyTorch expressions (same results, slower)."
            " GAN_OPS=ref silences this.",
            file=sys.stderr,
        )
        return None
    return declare(found)


def flags(capability):
    """nvcc's options for a GPU."""
    arch = "{}{}".format(*capability)
    return ["-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}"]


def declare(library):
    """The library, its functions' arguments declared."""
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    integer, real = ctypes.c_int, ctypes.c_float
    library.fused_act.argtypes = [integer] * 4 + [number] * 2 + [integer] * 7 + [real] * 3
    library.fused_act.argtypes += [ctypes.POINTER(pointer), number, integer, pointer]
    library.norm_act.argtypes = [integer] * 4 + [ctypes.POINTER(number), real, real]
    library.norm_act.argtypes += [ctypes.POINTER(pointer), pointer]
    library.upfirdn2d.argtypes = [integer] * 3 + [number, ctypes.POINTER(integer), real]
    library.upfirdn2d.argtypes += [pointer] * 4
    library.warp.argtypes = [integer] * 6 + [pointer] * 6
    return library


class BuildError(Exception):
    """Why the kernels cannot be compiled here."""


def compile_to(library, flags):
    """Compiles SOURCE to a shared library. Raises BuildError, naming what is missing or the log."""
    try:
        from torch.utils import cpp_extension  # slow, and not needed once there is a cache
    except ImportError as e:
        raise BuildError(f"no {e.name}: pip install {e.name}") from e

    # pip puts ninja beside python, which is on PATH in an activated environment only.
    path = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = os.pathsep.join([path, str(Path(sys.executable).parent)])
    compiler = cpp_extension.get_cxx_compiler().split()[0]  # CXX="ccache g++"
    tools = {"nvcc": "install the CUDA toolkit", compiler: "install a C++ compiler"}
    tools["ninja"] = "pip install ninja"
    if cpp_extension.CUDA_HOME and Path(cpp_extension.CUDA_HOME, "bin/nvcc").exists():
        del tools["nvcc"]  # found there, on PATH or not
    for tool, remedy in tools.items():
        if not shutil.which(tool):
            raise BuildError(f"no {tool} on PATH: {remedy}")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as folder:
        try:
            made = cpp_extension.load_inline(
                "ops_cuda", [""], [SOURCE], extra_cuda_cflags=flags, build_directory=folder,
                is_python_module=False, no_implicit_headers=True,
            )  # fmt: skip
        except (RuntimeError, OSError, TypeError) as e:  # TypeError: of a torch too old
            log = library.with_suffix(".log")
            log.write_text(str(e))
            raise BuildError(f"the kernels did not compile, see {log}") from e
        os.replace(made, library)


def kernels(x, impl):
    """The kernels' library for x and impl, or None for the reference. Raises RuntimeError where
    impl="cuda" cannot be had."""
    if impl not in (None, "cuda", "ref"):
        raise ValueError(f'impl {impl!r}: "cuda", "ref" or None')
    library = None
    wanted = impl or os.environ.get("GAN_OPS")
    if wanted != "ref" and x.is_cuda and x.dtype in DTYPES:
        library = build(torch.cuda.get_device_capability(x.device))
    if impl == "cuda" and library is None:
        raise RuntimeError(f'impl="cuda": no kernels for {x.dtype} on {x.device}')
    return library


def launch(function, x, *args):
    """Calls a launcher of SOURCE on x's device, in its current stream."""
    with torch.cuda.device(x.device):
        status = function(*args, torch.cuda.current_stream().cuda_stream)
    if status:
        raise RuntimeError(f"{function.__name__}: CUDA error {status}")


def pointer(t):
    return None if t is None else t.data_ptr()


def dense(x):
    """x without gaps, channels last if it is so. Copies only what is neither order."""
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if last else x.contiguous()


def memory_order(x):
    """That of a dense x."""
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


# =============================================================================
# fused_act, bias_act
# =============================================================================
#   forward    u = x * scale[n, c] + noise[n, h, w] * strength[c] + b[c],  y = clamp(gain * f(u))
#   backward   with s = dL/dy * dy/du:   dx = s * scale,   dscale = sum_hw s * x,
#              dstrength = sum s * noise,   dnoise = strength * sum_c s,   db = sum_nhw s
#   second     all of these are linear in dL/dy. Given gdx, a gradient of dx, and gscale, gstrength
#              and gb of those sums:   q = gdx * scale + gscale * x + gstrength * noise + gb,
#              h = q * dL/dy * d2y/du2, which is 0 of the piecewise linear f of all networks here.
#              The gradient of dL/dy is q * dy/du, that of x s * gscale + h * scale; those of scale,
#              strength and b are the sums of s * gdx + h * x, of h * noise, of h
# After a modulated convolution this is one pass over the network's largest tensors instead of six.

SQRT2 = math.sqrt(2)
Activation = collections.namedtuple("Activation", "f alpha gain")  # f(u, alpha)
ACTIVATIONS = {  # the kernels know them by their number
    "linear": Activation(lambda u, alpha: u, 0.0, 1.0),
    "relu": Activation(lambda u, alpha: F.relu(u), 0.0, SQRT2),
    "lrelu": Activation(F.leaky_relu, 0.2, SQRT2),
    "tanh": Activation(lambda u, alpha: torch.tanh(u), 0.0, 1.0),
    "sigmoid": Activation(lambda u, alpha: torch.sigmoid(u), 0.0, 1.0),
    "elu": Activation(lambda u, alpha: F.elu(u), 0.0, 1.0),
    "selu": Activation(lambda u, alpha: F.selu(u), 0.0, 1.0),
    "softplus": Activation(lambda u, alpha: F.softplus(u), 0.0, 1.0),
    "swish": Activation(lambda u, alpha: F.silu(u), 0.0, SQRT2),
}
PIECEWISE = ("linear", "relu", "lrelu")


def fused_act_ref(x, scale, noise, strength, b, act, alpha, gain, clamp):
    dtype, f = x.dtype, ACTIVATIONS[act].f
    x = x.float() if dtype in (torch.float16, torch.bfloat16) else x
    # gain * f(u) = f(gain * u) of the piecewise linear kinds: gain goes to the small tensors.
    inner = gain if act in PIECEWISE and gain > 0 else 1.0
    b = x.new_zeros(()) if b is None else b.to(x.dtype).reshape(-1, *[1] * (x.ndim - 2)) * inner
    if scale is not None:
        x = torch.addcmul(b, x, scale.to(x.dtype)[:, :, None, None] * inner)
    elif inner != 1 or b.ndim:
        x = torch.add(b, x, alpha=inner)
    if noise is not None:
        each = inner if strength is None else strength.to(x.dtype).reshape(-1, 1, 1) * inner
        x = x + noise.to(x.dtype) * each
    x = f(x, alpha)
    x = x if gain == inner else x * gain
    return (x if clamp is None else x.clamp(-clamp, clamp)).to(dtype)


FUSED_ACT = r"""
// ---- fused_act ------------------------------------------------------------------------------

struct Act { int kind; float alpha, gain, clamp; };  // kind: index in ACTIVATIONS; clamp < 0: none

// f, f' and f'' at u of a smooth kind, without gain and clamp.
__device__ __forceinline__ void curve(const Act& a, float u, float& f, float& f1, float& f2) {
    f = u; f1 = 1; f2 = 0;
    float s = 1 / (1 + expf(-u)), e;
    switch (a.kind) {
        case 3: f = tanhf(u); f1 = 1 - f * f; f2 = -2 * f * f1; break;
        case 4: f = s; f1 = s * (1 - s); f2 = f1 * (1 - 2 * s); break;
        case 5: if (u <= 0) { f = expm1f(u); f1 = f2 = f + 1; } break;
        case 6:
            e = 1.0507009873554805f;
            f = e * u; f1 = e;
            if (u <= 0) { e *= 1.6732632423543772f; f = e * expm1f(u); f1 = f2 = f + e; }
            break;
        case 7: f = fmaxf(u, 0) + log1pf(expf(-fabsf(u))); f1 = s; f2 = s * (1 - s); break;
        case 8: f = u * s; f1 = s + f * (1 - s); f2 = s * (1 - s) * (2 + u * (1 - 2 * s)); break;
    }
}
// A NaN stays one, and has slope 0, as in PyTorch: a network that diverged has to show it.
__device__ __forceinline__ float limit(const Act& a, float y) {
    return (a.clamp >= 0) & (fabsf(y) > a.clamp) ? copysignf(a.clamp, y) : y;
}
__device__ __forceinline__ bool limited(const Act& a, float y) {
    return (a.clamp >= 0) & !(fabsf(y) < a.clamp);
}
// The slope dy/du: of the piecewise linear kinds from y, so that u need not be kept.
__device__ __forceinline__ float slope(const Act& a, float y) {
    float s = (a.kind > 0) & (y * a.gain <= 0) ? a.alpha : 1;
    return limited(a, y) ? 0 : s * a.gain;
}

// One thread walks over slots (V elements each) of one channel (NCHW), or of V channels (CL,
// channels last). A group is a plane (n, c) in NCHW, a sample n in CL; a block works on a chunk of
// the slots of one group. In CL the threads of a block form rows x lanes, lanes side by side.
struct Grid { int64_t HW; int C, chunks, slots, lanes; };  // slots: per chunk
template <int V, bool CL> struct Place {
    int64_t group, sample, base, slot, last;
    int c, lane, row, rows;
    bool inside;
    __device__ __forceinline__ Place(const Grid& g) {
        int chunk = blockIdx.x % g.chunks;
        group = blockIdx.x / g.chunks;
        lane = threadIdx.x % g.lanes; row = threadIdx.x / g.lanes; rows = blockDim.x / g.lanes;
        c = CL ? (blockIdx.y * g.lanes + lane) * V : int(group % g.C);
        sample = CL ? group : group / g.C;
        base = CL ? group * g.HW * g.C + c : group * g.HW;
        inside = c < g.C;
        slot = int64_t(chunk) * g.slots + row;
        last = int64_t(chunk + 1) * g.slots;
        int64_t all = CL ? g.HW : g.HW / V;
        if (last > all) last = all;
        if (!inside) last = 0;
    }
    __device__ __forceinline__ int64_t at(const Grid& g, int64_t slot) const {  // its first element
        return base + slot * (CL ? g.C : V);
    }
};

// Pointers that may be null: scale, noise, strength, b; and as said at each kernel.
template <class T> struct Tensors {
    const T *x, *y, *gy, *gdx;
    const float *scale, *noise, *strength, *b, *gscale, *gstrength, *gb;
    int64_t noise_step;  // elements between the noise of two samples; 0: one map for all
    int strength_step;  // 1: a strength for each channel; 0: one for all
    T *out, *gx;
    float* sums;
};
template <int K>
__device__ __forceinline__ void channels(float* to, const float* from, float none) {
#pragma unroll
    for (int j = 0; j < K; j++) to[j] = from ? from[j] : none;
}
template <int K, class T>
__device__ __forceinline__ void strengths(float* to, const Tensors<T>& t, int c) {
#pragma unroll
    for (int j = 0; j < K; j++) to[j] = t.strength ? t.strength[(c + j) * t.strength_step] : 1;
}

// The noise of a slot's pixels: one in CL.
template <int V, bool CL>
__device__ __forceinline__ void noises(float* to, const float* noise, int64_t slot) {
#pragma unroll
    for (int j = 0; j < (CL ? 1 : V); j++) to[j] = noise[CL ? slot : slot * V + j];
}

// y = clamp(gain * f(x * scale + noise * strength + b)) to out. Smooth kinds come with V = 1, so
// that vectorized kernels need no branch to their curves in every element.
template <class T, int V, bool CL>
__global__ void __launch_bounds__(256) fused_act_kernel(Grid g, Act a, Tensors<T> t) {
    Place<V, CL> p(g);
    constexpr int K = CL ? V : 1, B = BATCH<V>;  // K: channels of a thread
    if (!p.inside) return;
    float scale[K], b[K], strength[K];
    channels<K>(scale, t.scale ? t.scale + p.sample * g.C + p.c : nullptr, 1);
    channels<K>(b, t.b ? t.b + p.c : nullptr, 0);
    strengths<K>(strength, t, p.c);
    const float* noise = t.noise ? t.noise + p.sample * t.noise_step : nullptr;
    for (; p.slot < p.last; p.slot += B * p.rows) {
        Pack<T, V> xs[B];
        float ns[B][V / K] = {}, v[V];
#pragma unroll
        for (int i = 0; i < B; i++) {
            int64_t slot = min(p.slot + i * p.rows, p.last - 1);
            xs[i] = fetch<V>(t.x + p.at(g, slot));
            if (noise) noises<V, CL>(ns[i], noise, slot);
        }
#pragma unroll
        for (int i = 0; i < B; i++) {
            if (p.slot + i * p.rows >= p.last) break;
#pragma unroll
            for (int j = 0; j < V; j++) {
                int k = CL ? j : 0;
                float u = to_float(xs[i].v[j]) * scale[k] + b[k] + ns[i][CL ? 0 : j] * strength[k];
                float below = a.kind == 1 ? 0 : u * a.alpha;  // relu: 0 of minus infinity, too
                float f = (a.kind > 0) & (u <= 0) ? below : u, f1, f2;
                if (V == 1 && a.kind > 2) curve(a, u, f, f1, f2);
                v[j] = limit(a, f * a.gain);
            }
            store<V>(t.out + p.at(g, p.slot + i * p.rows), v);
        }
    }
}

// v[S] summed over the rows of a block, in a fixed order, in all its threads.
template <int V, bool CL, int S>
__device__ __forceinline__ void total(const Place<V, CL>& p, const Grid& g, float* v) {
    __shared__ float shared[S][256];
#pragma unroll
    for (int k = 0; k < S; k++) shared[k][threadIdx.x] = v[k];
    __syncthreads();
    for (int n = p.rows; n > 1;) {
        int half = (n + 1) / 2;
        if (p.row + half < n)
#pragma unroll
            for (int k = 0; k < S; k++)
                shared[k][threadIdx.x] += shared[k][threadIdx.x + half * g.lanes];
        __syncthreads();
        n = half;
    }
#pragma unroll
    for (int k = 0; k < S; k++) v[k] = shared[k][p.lane];
    __syncthreads();
}
// What a block knows of its channels, v[S][K], to sums[group, chunk, k, channel].
template <int S, int K, int V, bool CL>
__device__ __forceinline__ void put(const Place<V, CL>& p, const Grid& g, float (*v)[K],
                                    float* sums) {
    if (p.row > 0 || !p.inside) return;
#pragma unroll
    for (int k = 0; k < S; k++)
#pragma unroll
        for (int j = 0; j < K; j++)
            sums[(int64_t(blockIdx.x) * S + k) * (CL ? g.C : 1) + (CL ? p.c : 0) + j] = v[k][j];
}

// With s = gy * dy/du:
//   first derivative    out = s * scale;   sums of s, s * x, s * noise
// ORDER 2, with q and h as above: out = q * dy/du (for gy), gx = s * gscale + h * scale, and the
// sums of h, s * gdx + h * x, h * noise.
// x is null where neither a scale nor a smooth kind needs it; y is null for smooth kinds, and for
// linear without a clamp, where slope(a, 0) is the gain.
template <class T, int V, bool CL, int ORDER>
__global__ void __launch_bounds__(256, 2) fused_act_grad_kernel(Grid g, Act a, Tensors<T> t) {
    Place<V, CL> p(g);
    constexpr int K = CL ? V : 1, B = BATCH<V> / ORDER;
    float scale[K] = {}, b[K] = {}, strength[K] = {}, gscale[K] = {}, gb[K] = {}, gs[K] = {};
    float acc[3][K] = {};
    if (t.y && a.clamp >= 0) a.clamp = to_float(from_float<T>(a.clamp));  // as y holds it
    if (p.inside) {
        channels<K>(scale, t.scale ? t.scale + p.sample * g.C + p.c : nullptr, 1);
        channels<K>(b, t.b ? t.b + p.c : nullptr, 0);
        strengths<K>(strength, t, p.c);
        if (ORDER == 2) {
            channels<K>(gscale, t.gscale ? t.gscale + p.sample * g.C + p.c : nullptr, 0);
            channels<K>(gb, t.gb ? t.gb + p.sample * g.C + p.c : nullptr, 0);
            channels<K>(gs, t.gstrength ? t.gstrength + p.sample * g.C + p.c : nullptr, 0);
        }
    }
    const float* noise = t.noise ? t.noise + p.sample * t.noise_step : nullptr;
    for (; p.slot < p.last; p.slot += B * p.rows) {
        Pack<T, V> gys[B] = {}, xs[B] = {}, ys[B] = {}, gdxs[B] = {};
        float ns[B][V / K] = {}, out[V], gx[V];
#pragma unroll
        for (int i = 0; i < B; i++) {
            int64_t slot = min(p.slot + i * p.rows, p.last - 1), at = p.at(g, slot);
            if (ORDER == 1 || t.x) gys[i] = fetch<V>(t.gy + at);
            if (t.x) xs[i] = fetch<V>(t.x + at);
            if (t.y) ys[i] = fetch<V>(t.y + at);
            if (ORDER == 2 && t.gdx) gdxs[i] = fetch<V>(t.gdx + at);
            if (noise) noises<V, CL>(ns[i], noise, slot);
        }
#pragma unroll
        for (int i = 0; i < B; i++) {
            int64_t slot = p.slot + i * p.rows;
            if (slot >= p.last) break;
#pragma unroll
            for (int j = 0; j < V; j++) {
                int k = CL ? j : 0;
                float gy = to_float(gys[i].v[j]), x = to_float(xs[i].v[j]);
                float n = ns[i][CL ? 0 : j], m = slope(a, to_float(ys[i].v[j])), m2 = 0;
                if (V == 1 && a.kind > 2) {
                    float f, f1, f2;
                    curve(a, x * scale[k] + n * strength[k] + b[k], f, f1, f2);
                    float open = limited(a, f * a.gain) ? 0 : a.gain;
                    m = f1 * open; m2 = f2 * open;
                }
                float s = gy * m;
                if (ORDER == 1) {
                    acc[0][k] += s; acc[1][k] += s * x; acc[2][k] += s * n;
                    out[j] = s * scale[k];
                } else {
                    float gdx = to_float(gdxs[i].v[j]);
                    float q = gdx * scale[k] + gscale[k] * x + gb[k] + gs[k] * n, h = q * gy * m2;
                    acc[0][k] += h; acc[1][k] += s * gdx + h * x; acc[2][k] += h * n;
                    gx[j] = s * gscale[k] + h * scale[k];
                    out[j] = q * m;
                }
            }
            store<V>(t.out + p.at(g, slot), out);
            if (ORDER == 2 && t.gx) store<V>(t.gx + p.at(g, slot), gx);
        }
    }
    if (!t.sums) return;
    total<V, CL, 3 * K>(p, g, acc[0]);
    put<3>(p, g, acc, t.sums);
}

template <class T, int V, bool CL>
static void fused_act_order(int order, dim3 grid, int threads, cudaStream_t stream, const Grid& g,
                            const Act& a, const Tensors<T>& t) {
    auto k = fused_act_kernel<T, V, CL>;
    if (order == 1) k = fused_act_grad_kernel<T, V, CL, 1>;
    if (order == 2) k = fused_act_grad_kernel<T, V, CL, 2>;
    LAUNCH(k, grid, threads, 0, stream, g, a, t);
}
template <class T>
static void fused_act_type(int order, int vector, int cl, dim3 grid, int threads, cudaStream_t s,
                           const Grid& g, const Act& a, void** p, int64_t noise_step,
                           int strength_step) {
    const float** f = (const float**)p;
    Tensors<T> t = {(T*)p[0], (T*)p[1], (T*)p[2], (T*)p[3], f[4], f[5], f[6], f[7], f[8], f[9],
                    f[10], noise_step, strength_step, (T*)p[11], (T*)p[12], (float*)p[13]};
    constexpr int V = 16 / sizeof(T);
    if (vector && cl) fused_act_order<T, V, true>(order, grid, threads, s, g, a, t);
    else if (vector) fused_act_order<T, V, false>(order, grid, threads, s, g, a, t);
    else if (cl) fused_act_order<T, 1, true>(order, grid, threads, s, g, a, t);
    else fused_act_order<T, 1, false>(order, grid, threads, s, g, a, t);
}
extern "C" int fused_act(int order, int type, int vector, int cl, int64_t groups, int64_t HW, int C,
                         int chunks, int slots, int lanes, int lane_blocks, int threads, int kind,
                         float alpha, float gain, float clamp, void** p, int64_t noise_step,
                         int strength_step, void* stream) {
    Grid g = {HW, C, chunks, slots, lanes};
    Act a = {kind, alpha, gain, clamp};
    dim3 grid((unsigned)(groups * chunks), lane_blocks);
    auto f = fused_act_type<float>;
    if (type == 1) f = fused_act_type<__half>;
    if (type == 2) f = fused_act_type<__nv_bfloat16>;
    f(order, vector, cl, grid, threads, (cudaStream_t)stream, g, a, p, noise_step, strength_step);
    return cudaGetLastError();
}

"""


def fused_act(
    x, scale=None, noise=None, strength=None, b=None, act="linear", alpha=None, gain=None,
    clamp=None, impl=None,
):  # fmt: skip
    """y = clamp(gain * f(x * scale + noise * strength + b)), in one pass.

    x: (N, C, H, W); scale: (N, C); noise: (N, 1, H, W), (1, 1, H, W) or (H, W); strength: () or
    (C,); b: (C,), each of them may be None. act: a key of ACTIVATIONS, which holds the defaults of
    alpha (the slope below 0 of lrelu, not negative) and gain; clamp: None or the largest |y|.
    Returns the type of x. Raises ValueError for other shapes.
    """
    alpha = slope_below_0(act, alpha)
    gain = ACTIVATIONS[act].gain if gain is None else float(gain)
    check_shapes(x, scale, noise, strength, b)
    library = kernels(x, impl)
    # A noise map that is trained (only `project` does) takes the reference, whatever impl says.
    if library is None or (noise is not None and noise.requires_grad):
        return fused_act_ref(x, scale, noise, strength, b, act, alpha, gain, clamp)
    spec = (library, act, alpha, gain, clamp)
    x = dense(x)
    scale, noise, strength, b = (
        None if t is None else t.float() for t in (scale, noise, strength, b)
    )
    return FusedAct.apply(x, scale, noise, strength, b, spec)


def slope_below_0(act, alpha):
    """alpha, or its default; only lrelu has one to choose."""
    return float(alpha) if act == "lrelu" and alpha is not None else ACTIVATIONS[act].alpha


def check_shapes(x, scale, noise, strength, b):
    N, C, *sides = x.shape
    allowed = {"scale": [(N, C)], "strength": [(), (C,)], "b": [(C,)]}
    allowed["noise"] = [(N, 1, *sides), (1, 1, *sides), tuple(sides)]
    for name, t in dict(scale=scale, noise=noise, strength=strength, b=b).items():
        if t is not None and (tuple(t.shape) not in allowed[name] or t.device != x.device):
            needed = f"{allowed[name][0]} on {x.device}"
            raise ValueError(f"{name} {tuple(t.shape)} on {t.device}: {needed} is needed")


def bias_act(x, b=None, dim=1, act="linear", alpha=None, gain=None, clamp=None, impl=None):
    """y = clamp(gain * act(x + b)). x: any shape; b: (x.shape[dim],) or None; see fused_act."""
    if x.ndim == 4 and dim == 1:
        return fused_act(x, b=b, act=act, alpha=alpha, gain=gain, clamp=clamp, impl=impl)
    C = x.shape[dim] if x.ndim else 1
    rows = x.reshape(math.prod(x.shape[:dim]), C, -1, 1) if x.numel() else x.reshape(0, C, 1, 1)
    return bias_act(rows, b, 1, act, alpha, gain, clamp, impl).reshape(x.shape)


class FusedAct(Function):
    """x (dense), scale, noise, strength, b -> y; keeps of x and y what derivatives depend on."""

    @staticmethod
    def forward(ctx, x, scale, noise, strength, b, spec):
        y = torch.empty_like(x)
        run_fused_act(0, spec, y, scale=scale, noise=noise, strength=strength, b=b, x=x, out=y)
        _, act, _, _, clamp = ctx.spec = spec
        smooth, linear = act not in PIECEWISE, act == "linear" and clamp is None
        ctx.save_for_backward(
            x if smooth or scale is not None else None, None if smooth or linear else y,
            scale, noise, strength, b,
        )  # fmt: skip
        ctx.order = memory_order(x)
        return y

    @staticmethod
    def backward(ctx, gy):
        x, y, *small = ctx.saved_tensors
        y = None if y is None else y.detach()  # dy/du of the piecewise linear kinds is constant
        need = ctx.needs_input_grad
        summed = need[1] or (_weight_gradients and (need[3] or need[4]))
        gy = gy.contiguous(memory_format=ctx.order)
        dx, sums = FusedActGrad.apply(gy, x, y, *small, ctx.spec, summed)
        return dx, *gradients_of_sums(sums, *small)


class FusedActGrad(Function):
    """gy, ... -> dx, and, if summed, the sums (N, 3, C) over pixels of s, s * x and s * noise."""

    @staticmethod
    def forward(ctx, gy, x, y, scale, noise, strength, b, spec, summed):
        dx, small = torch.empty_like(gy), dict(scale=scale, noise=noise, strength=strength, b=b)
        sums = run_fused_act(1, spec, gy, summed, gy=gy, x=x, y=y, out=dx, **small)
        # Without x the second derivative does not depend on gy: R1 keeps a third less.
        ctx.save_for_backward(None if x is None else gy, x, y, scale, noise, strength, b)
        ctx.spec, ctx.order = spec, memory_order(gy)
        return dx, sums

    @staticmethod
    @once_differentiable
    def backward(ctx, gdx, gsums):
        gy, x, y, *small = ctx.saved_tensors
        given = dict(zip(("scale", "noise", "strength", "b"), small, strict=True))
        if gsums is not None:
            given |= dict(zip(("gb", "gscale", "gstrength"), gsums.unbind(1), strict=True))
        gdx = gdx.contiguous(memory_format=ctx.order)
        ggy, gx = torch.empty_like(gdx), None if x is None else torch.empty_like(gdx)
        summed = x is not None  # the rest is linear in gy alone
        sums = run_fused_act(
            2, ctx.spec, gdx, summed, gy=gy, x=x, y=y, gdx=gdx, out=ggy, gx=gx, **given
        )
        return ggy, gx, None, *gradients_of_sums(sums, *small), None


def gradients_of_sums(sums, scale, noise, strength, b):
    """What the backward passes return for scale, noise, strength, b and spec."""
    if sums is None:
        return [None] * 5
    dscale = None if scale is None else sums[:, 1]
    dstrength = None if strength is None else sums[:, 2].sum(0 if strength.ndim else None)
    return dscale, None, dstrength, None if b is None else sums[:, 0].sum(0), None


def run_fused_act(order, spec, reference, summed=False, **tensors):
    """Launches the kernel of an order of differentiation. tensors: by the names of struct Tensors;
    reference: one of them, for shape and memory order. Returns sums (N, 3, C) if summed, else None;
    N is 1 where samples need not be told apart."""
    library, act, alpha, gain, clamp = spec
    get = tensors.get
    N, C, *sides = reference.shape
    HW = math.prod(sides)
    last = HW == 1 or not reference.is_contiguous()  # channels last
    if last and get("scale") is None and get("noise") is None:
        N, HW = 1, N * HW
    if reference.numel() == 0:
        return torch.zeros(N, 3, C, device=reference.device) if summed else None

    images = [get(k) for k in ("x", "y", "gy", "gdx", "out", "gx")]
    V = 16 // reference.element_size()
    aligned = all(t is None or t.data_ptr() % 16 == 0 for t in images)
    V = V if aligned and act in PIECEWISE and (C if last else HW) % V == 0 else 1
    groups, slots = (N, HW) if last else (N * C, HW // V)
    lanes = min(C // V, 256) if last else 1
    lane_blocks = -(-C // (V * lanes)) if last else 1
    rows = min(256 // lanes, -(-slots // 32) * 32)
    # Long walks make the sums cheap, short ones keep a small tensor's work spread over the GPU.
    walk = min(32 if summed else 8, max(1, groups * slots // (rows * 1024)))
    chunks = -(-slots // (rows * walk))
    sums = None
    if summed:
        size = (groups, chunks, 3, C if last else 1)
        sums = torch.empty(size, dtype=torch.float32, device=reference.device)
    noise_step, noise = 0, get("noise")
    if noise is not None:
        noise = noise.contiguous()
        noise_step = HW if noise.ndim == 4 and len(noise) > 1 else 0
    small = [get(k) for k in ("scale", "strength", "b", "gscale", "gstrength", "gb")]
    small = [None if t is None else t.contiguous() for t in small]
    held = [*images[:4], small[0], noise, *small[1:], *images[4:], sums]
    launch(
        library.fused_act, reference, order, DTYPES[reference.dtype], V > 1, last, groups, HW, C,
        chunks, rows * walk, lanes, lane_blocks, rows * lanes, list(ACTIVATIONS).index(act), alpha,
        gain, -1.0 if clamp is None else clamp, (ctypes.c_void_p * 14)(*map(pointer, held)),
        noise_step, int(get("strength") is not None and get("strength").ndim == 1),
    )  # fmt: skip
    if summed:
        sums = sums.sum(1)
        sums = sums if last else sums.reshape(N, C, 3).transpose(1, 2)
    return sums


# =============================================================================
# norm_act
# =============================================================================
#   forward    xhat = (x - mean) / sqrt(var + eps) of each map (n, c),  u = xhat * scale + shift,
#              y = pad(f(u)) + residual               f: (leaky) ReLU; pad: by reflection
#   backward   with s = pad'(dL/dy) * f'(u), where pad' sums over a pixel and its mirror images:
#              dx = scale / sqrt(var + eps) * (s - mean_hw s - xhat * mean_hw (s * xhat)),
#              dscale = sum_hw s * xhat,   dshift = sum_hw s,   dresidual = dL/dy
#   second     of the reference, which a backward pass with create_graph=True turns to: wanted only
#              by gradient penalties of networks with norms
# Either pass reads its tensors twice: for sums over their maps, and for the result.


def norm_act_ref(x, scale, shift, residual, act, alpha, pad, eps):
    N, C, dtype = *x.shape[:2], x.dtype
    x = x.float() if dtype in (torch.float16, torch.bfloat16) else x
    scale, shift = (
        None if t is None else t.to(x.dtype).expand(N, C).flatten() for t in (scale, shift)
    )
    # A batch norm of N * C channels: one pass for the moments, one for the rest. In four dimensions
    # its gradients are wrong on a CPU where N is 1 and dL/dy is channels last.
    maps = x.contiguous().view(1, N * C, x.shape[2] * x.shape[3])
    y = F.batch_norm(maps, None, None, scale, shift, training=True, eps=eps).view(x.shape)
    y = ACTIVATIONS[act].f(y, alpha)
    y = F.pad(y, (pad,) * 4, "reflect") if pad else y
    return (y if residual is None else y + residual).to(dtype)


NORM_ACT = r"""
// ---- norm_act -------------------------------------------------------------------------------
// Each pass is two kernels. A block of the first writes what it found in its chunk of x to sums;
// every block of the second first combines what there is of its channels. There are few blocks, so
// that this is short. Grid, Place, channels, total and put are those of fused_act.

struct Norm {
    int H, W, pad, scale_step;  // scale_step: elements between two samples' scales, C or 0
    float alpha, eps;           // alpha: the activation's slope below 0
    const float *scale, *shift;  // both may be null: 1 and 0
    float *mean, *rstd, *gshift, *gscale;  // (N, C) each
    float* sums;  // [group, chunk, 2, channel]
};

// The moments, scale and shift of K channels.
template <int K> struct Moments {
    float mean[K] = {}, rstd[K] = {}, scale[K] = {}, shift[K] = {};
    __device__ __forceinline__ float xhat(int k, float x) const {
        return (x - mean[k]) * rstd[k];
    }
};
template <int K, int V, bool CL>
__device__ __forceinline__ void affine(Moments<K>& m, const Norm& n, const Place<V, CL>& p) {
    int64_t at = p.sample * n.scale_step + p.c;
    channels<K>(m.scale, n.scale ? n.scale + at : nullptr, 1);
    channels<K>(m.shift, n.shift ? n.shift + at : nullptr, 0);
}
__device__ __forceinline__ float slope_at(const Norm& n, float u) { return u > 0 ? 1 : n.alpha; }

// The number of pixels of a chunk; the place in sums of what was found in it.
template <int V, bool CL> __device__ __forceinline__ float pixels(const Grid& g, int chunk) {
    int64_t left = (CL ? g.HW : g.HW / V) - int64_t(chunk) * g.slots;
    return float((left < g.slots ? left : g.slots) * (CL ? 1 : V));
}
template <int V, bool CL>
__device__ __forceinline__ const float* known(const Norm& n, const Grid& of, int chunk,
                                              const Place<V, CL>& p) {
    return n.sums + (p.group * of.chunks + chunk) * 2 * (CL ? of.C : 1) + (CL ? p.c : 0);
}

// Mean and sum of squared deviations of a chunk. A thread sums x minus its first x. Its own squared
// deviation is then part of the result, so n pixels cost at most a factor n in precision. Threads
// and chunks are merged by the formula for the variance of a mixture.
template <class T, int V, bool CL>
__global__ void __launch_bounds__(256, 2) norm_moments_kernel(Grid g, const T* x, float* sums) {
    Place<V, CL> p(g);
    constexpr int K = CL ? V : 1;
    const int64_t hop = int64_t(p.rows) * (CL ? g.C : V);
    float first[K] = {}, sum[K] = {}, squares[K] = {}, found[2][K] = {}, count = 0;
    if (p.slot < p.last) load<K>(first, x + p.at(g, p.slot));
    for (; p.slot < p.last; p.slot += BATCH<V> * p.rows) {
        float v[BATCH<V>][V];
#pragma unroll
        for (int i = 0; i < BATCH<V>; i++)
            if (p.slot + i * p.rows < p.last) load<V>(v[i], x + p.at(g, p.slot) + i * hop);
#pragma unroll
        for (int i = 0; i < BATCH<V>; i++) {
            if (p.slot + i * p.rows >= p.last) break;
            count += CL ? 1 : V;
#pragma unroll
            for (int j = 0; j < V; j++) {
                float d = v[i][j] - first[CL ? j : 0];
                sum[CL ? j : 0] += d;
                squares[CL ? j : 0] += d * d;
            }
        }
    }
    float share = count > 0 ? 1 / count : 0, all = pixels<V, CL>(g, blockIdx.x % g.chunks);
#pragma unroll
    for (int k = 0; k < K; k++) {
        squares[k] = fmaxf(squares[k] - sum[k] * sum[k] * share, 0);
        first[k] += sum[k] * share;  // from here on the mean
        found[0][k] = count / all * first[k];
    }
    total<V, CL, K>(p, g, found[0]);
#pragma unroll
    for (int k = 0; k < K; k++) {
        float d = first[k] - found[0][k];
        found[1][k] = squares[k] + count * d * d;
    }
    total<V, CL, K>(p, g, found[1]);
    put<2>(p, g, found, sums);
}

// y = pad(f(norm(x) * scale + shift)) + residual. g: of y; of: of x, in whose chunks sums are.
template <class T, int V, bool CL>
__global__ void __launch_bounds__(256, 2)
norm_act_kernel(Grid g, Grid of, Norm n, const T* __restrict__ x, const T* __restrict__ residual,
                T* __restrict__ y) {
    Place<V, CL> p(g);
    constexpr int K = CL ? V : 1;
    Moments<K> m;
    const float share = 1.0f / of.HW;
    for (int i = p.row; p.inside && i < of.chunks; i += p.rows)
#pragma unroll
        for (int k = 0; k < K; k++)
            m.mean[k] += pixels<V, CL>(of, i) * share * known(n, of, i, p)[k];
    total<V, CL, K>(p, g, m.mean);
    for (int i = p.row; p.inside && i < of.chunks; i += p.rows)
#pragma unroll
        for (int k = 0; k < K; k++) {
            float d = known(n, of, i, p)[k] - m.mean[k];
            m.rstd[k] += known(n, of, i, p)[(CL ? of.C : 1) + k] + pixels<V, CL>(of, i) * d * d;
        }
    total<V, CL, K>(p, g, m.rstd);  // the variance, times pixels
    if (!p.inside) return;
#pragma unroll
    for (int k = 0; k < K; k++) {
        m.rstd[k] = 1 / sqrtf(m.rstd[k] * share + n.eps);
        if (p.row > 0 || blockIdx.x % g.chunks > 0) continue;
        n.mean[p.sample * g.C + p.c + k] = m.mean[k];
        n.rstd[p.sample * g.C + p.c + k] = m.rstd[k];
    }
    affine(m, n, p);

    const int step = CL ? g.C : V;
    const unsigned wide = n.W + 2 * n.pad;
    const int64_t hop = int64_t(p.rows) * step;
    x += CL ? p.group * of.HW * g.C + p.c : p.group * of.HW;
    for (; p.slot < p.last; p.slot += BATCH<V> * p.rows) {
        Pack<T, V> xs[BATCH<V>], rs[BATCH<V>] = {};
#pragma unroll
        for (int i = 0; i < BATCH<V>; i++) {
            int64_t slot = min(p.slot + i * p.rows, p.last - 1);
            if (residual) rs[i] = fetch<V>(residual + p.base + slot * step);
            if (n.pad) {  // of the pixel that is mirrored here
                int iy = int(unsigned(slot) / wide) - n.pad;
                int ix = int(unsigned(slot) % wide) - n.pad;
                iy = iy < 0 ? -iy : iy < n.H ? iy : 2 * (n.H - 1) - iy;
                ix = ix < 0 ? -ix : ix < n.W ? ix : 2 * (n.W - 1) - ix;
                slot = int64_t(iy) * n.W + ix;
            }
            xs[i] = fetch<V>(x + slot * step);
        }
#pragma unroll
        for (int i = 0; i < BATCH<V>; i++) {
            if (p.slot + i * p.rows >= p.last) break;
            float v[V];
#pragma unroll
            for (int j = 0; j < V; j++) {
                int k = CL ? j : 0;
                float u = m.xhat(k, to_float(xs[i].v[j])) * m.scale[k] + m.shift[k];
                v[j] = u * slope_at(n, u) + to_float(rs[i].v[j]);
            }
            store<V>(y + p.at(g, p.slot) + i * hop, v);
        }
    }
}

// Adds to s what gy is at the mirror images of pixel iy, ix. Coordinate i of n is mirrored, at its
// first and at its last pixel, to -i and 2 (n - 1) - i.
template <int V, class T>
__device__ __forceinline__ void add_mirrored(float* s, const T* gy, const Norm& n, int iy, int ix,
                                             int step) {
    const int pad = n.pad, H = n.H, W = n.W;
    if (iy > pad && iy < H - 1 - pad && ix > pad && ix < W - 1 - pad) return;
#pragma unroll 1
    for (int i = 1; i < 9; i++) {
        int a = i / 3, b = i % 3;
        int oy = a == 0 ? iy : a == 1 ? -iy : 2 * (H - 1) - iy;
        int ox = b == 0 ? ix : b == 1 ? -ix : 2 * (W - 1) - ix;
        if ((a && oy == iy) || oy < -pad || oy >= H + pad) continue;
        if ((b && ox == ix) || ox < -pad || ox >= W + pad) continue;
        float more[V];
        load<V>(more, gy + (int64_t(oy + pad) * (W + 2 * pad) + ox + pad) * step);
#pragma unroll
        for (int j = 0; j < V; j++) s[j] += more[j];
    }
}

// With s, the sum of gy at a pixel and its mirror images, times the activation's slope:
//   !APPLY    sums of s and s * xhat
//   APPLY     gx = scale * rstd * (s - mean of s - xhat * mean of s * xhat), gshift, gscale
template <class T, int V, bool CL, bool APPLY>
__global__ void __launch_bounds__(256, 2)
norm_grad_kernel(Grid g, Norm n, const T* __restrict__ x, const T* __restrict__ gy,
                 T* __restrict__ gx) {
    Place<V, CL> p(g);
    constexpr int K = CL ? V : 1;
    Moments<K> m;
    float acc[2][K] = {};
    if (APPLY) {
        for (int i = p.row; p.inside && i < g.chunks; i += p.rows)
#pragma unroll
            for (int k = 0; k < K; k++) {
                acc[0][k] += known(n, g, i, p)[k];
                acc[1][k] += known(n, g, i, p)[(CL ? g.C : 1) + k];
            }
        total<V, CL, 2 * K>(p, g, acc[0]);
    }
    if (p.inside) {
        affine(m, n, p);
        channels<K>(m.mean, n.mean + p.sample * g.C + p.c, 0);
        channels<K>(m.rstd, n.rstd + p.sample * g.C + p.c, 0);
    }
    if (APPLY && p.inside && p.row == 0 && blockIdx.x % g.chunks == 0)
#pragma unroll
        for (int k = 0; k < K; k++) {
            n.gshift[p.sample * g.C + p.c + k] = acc[0][k];
            n.gscale[p.sample * g.C + p.c + k] = acc[1][k];
        }

    const int step = CL ? g.C : V, wide = n.W + 2 * n.pad;
    const int64_t hop = int64_t(p.rows) * step;
    const float share = 1.0f / g.HW;
    if (p.inside)
        gy += (CL ? p.group * g.C : p.group) * (n.H + 2 * n.pad) * wide + (CL ? p.c : 0);
    for (; p.slot < p.last; p.slot += BATCH<V> * p.rows) {
        Pack<T, V> xs[BATCH<V>], gys[BATCH<V>];
#pragma unroll
        for (int i = 0; i < BATCH<V>; i++) {
            int64_t slot = min(p.slot + i * p.rows, p.last - 1);
            xs[i] = fetch<V>(x + p.base + slot * step);
            if (n.pad) slot += int64_t(unsigned(slot) / n.W) * 2 * n.pad + n.pad * (wide + 1);
            gys[i] = fetch<V>(gy + slot * step);
        }
#pragma unroll
        for (int i = 0; i < BATCH<V>; i++) {
            unsigned slot = p.slot + i * p.rows;
            if (p.slot + i * p.rows >= p.last) break;
            float v[V], s[V];
#pragma unroll
            for (int j = 0; j < V; j++) s[j] = to_float(gys[i].v[j]);
            if (n.pad) add_mirrored<V>(s, gy, n, slot / n.W, slot % n.W, step);
#pragma unroll
            for (int j = 0; j < V; j++) {
                int k = CL ? j : 0;
                float xhat = m.xhat(k, to_float(xs[i].v[j]));
                s[j] *= slope_at(n, xhat * m.scale[k] + m.shift[k]);
                if (APPLY) {
                    float rest = share * (acc[0][k] + xhat * acc[1][k]);
                    v[j] = m.rstd[k] * m.scale[k] * (s[j] - rest);
                } else {
                    acc[0][k] += s[j];
                    acc[1][k] += s[j] * xhat;
                }
            }
            if (APPLY) store<V>(gx + p.at(g, p.slot) + i * hop, v);
        }
    }
    if (APPLY) return;
    total<V, CL, 2 * K>(p, g, acc[0]);
    put<2>(p, g, acc, n.sums);
}

template <class T, int V, bool CL>
static void norm_act_launch(int backward, const Grid& of, const Grid& g, const Norm& n,
                            int64_t groups, int lane_blocks, int threads, cudaStream_t stream,
                            const T* x, const T* other, T* out) {
    dim3 over_x((unsigned)(groups * of.chunks), lane_blocks);
    dim3 over_y((unsigned)(groups * g.chunks), lane_blocks);
    auto moments = norm_moments_kernel<T, V, CL>;
    auto apply = norm_act_kernel<T, V, CL>;
    auto grad_sums = norm_grad_kernel<T, V, CL, false>;
    auto grad = norm_grad_kernel<T, V, CL, true>;
    if (backward) {
        LAUNCH(grad_sums, over_x, threads, 0, stream, of, n, x, other, out);
        LAUNCH(grad, over_x, threads, 0, stream, of, n, x, other, out);
    } else {
        LAUNCH(moments, over_x, threads, 0, stream, of, x, n.sums);
        LAUNCH(apply, over_y, threads, 0, stream, g, of, n, x, other, out);
    }
}
template <class T>
static void norm_act_type(int backward, int vector, int cl, const Grid& of, const Grid& g,
                          const Norm& n, int64_t groups, int lane_blocks, int threads,
                          cudaStream_t stream, void** p) {
    constexpr int V = 16 / sizeof(T);
    auto k = norm_act_launch<T, 1, false>;
    if (vector && cl) k = norm_act_launch<T, V, true>;
    else if (vector) k = norm_act_launch<T, V, false>;
    else if (cl) k = norm_act_launch<T, 1, true>;
    k(backward, of, g, n, groups, lane_blocks, threads, stream, (T*)p[0], (T*)p[1], (T*)p[2]);
}
extern "C" int norm_act(int backward, int type, int vector, int cl, const int64_t* s, float alpha,
                        float eps, void** p, void* stream) {
    int C = int(s[1]), H = int(s[2]), W = int(s[3]), pad = int(s[4]), lanes = int(s[6]);
    Grid of = {int64_t(H) * W, C, int(s[9]), int(s[10]), lanes};
    Grid g = {int64_t(H + 2 * pad) * (W + 2 * pad), C, int(s[11]), int(s[12]), lanes};
    float** f = (float**)p;
    Norm n = {H, W, pad, int(s[5]), alpha, eps, f[3], f[4], f[5], f[6], f[7], f[8], f[9]};
    auto k = norm_act_type<float>;
    if (type == 1) k = norm_act_type<__half>;
    if (type == 2) k = norm_act_type<__nv_bfloat16>;
    k(backward, vector, cl, of, g, n, s[0], int(s[7]), int(s[8]), (cudaStream_t)stream, p);
    return cudaGetLastError();
}

"""


def norm_act(
    x, scale=None, shift=None, act="linear", alpha=None, pad=0, residual=None, eps=1e-5, impl=None
):
    """y = pad(f(norm(x) * scale + shift)) + residual, with norm the instance norm: every map of
    every sample to mean 0 and variance 1.

    x: (N, C, H, W), more than one pixel; scale and shift: both (C,), both (N, C) as in AdaIN, or
    None; act: "linear", "relu" or "lrelu", of gain 1, with alpha the slope below 0 of lrelu, 0.2;
    pad: by reflection, on all sides; residual: None or of y's shape. Returns the type of x. Raises
    ValueError for other shapes and kinds.
    """
    N, C, H, W = x.shape
    if act not in PIECEWISE or H * W == 1 or not 0 <= pad < min(H, W):
        raise ValueError(
            f"act {act!r}, padding {pad} of {tuple(x.shape)}: linear, relu or lrelu, padding below"
            " both sides, and more than one pixel are needed"
        )
    alpha = slope_below_0(act, alpha)
    given = [None if t is None else tuple(t.shape) for t in (scale, shift, residual)]
    if given[0] != given[1] or given[0] not in (None, (C,), (N, C)):
        raise ValueError(f"scale {given[0]}, shift {given[1]}: {(N, C)} or {(C,)} is needed")
    if given[2] not in (None, (N, C, H + 2 * pad, W + 2 * pad)):
        raise ValueError(f"residual {given[2]} of {tuple(x.shape)}, padding {pad}")
    if any(t is not None and t.device != x.device for t in (scale, shift, residual)):
        raise ValueError(f"scale, shift and residual have to be on {x.device}")
    library = kernels(x, impl)
    if library is None:
        return norm_act_ref(x, scale, shift, residual, act, alpha, pad, eps)
    x = dense(x)
    scale, shift = (None if t is None else t.float() for t in (scale, shift))
    residual = None if residual is None else residual.to(x.dtype)
    return NormAct.apply(x, scale, shift, residual, (library, act, alpha, pad, eps))


def through(layers, x, residual=None):
    """x through the layers, then plus the residual. Where there are kernels, an instance norm
    (which knows neither weights nor running statistics) and what follows of ReLU, reflection
    padding and that sum are one pass over memory, and a bias before it is neither added nor
    trained: the norm takes it out again."""
    if kernels(x, None) is None:
        for layer in layers:
            x = layer(x)
        return x if residual is None else x + residual
    layers = list(layers)
    while layers:
        layer = layers.pop(0)
        if not isinstance(layer, torch.nn.InstanceNorm2d):
            normed = layers and isinstance(layers[0], torch.nn.InstanceNorm2d)
            normed = normed and isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d)
            plain = normed and layer.padding_mode == "zeros"
            x = without_bias(layer, x) if plain else layer(x)
            continue
        if layer.affine or layer.track_running_stats:
            raise ValueError(f"{layer} has weights or running statistics")
        slope, pad = 1.0, 0
        if layers and isinstance(layers[0], torch.nn.ReLU | torch.nn.LeakyReLU):
            slope = getattr(layers.pop(0), "negative_slope", 0.0)
        if layers and isinstance(layers[0], torch.nn.ReflectionPad2d):
            if len(set(layers[0].padding)) == 1:  # on all sides alike
                pad = layers.pop(0).padding[0]
        added, residual = (None, residual) if layers else (residual, None)
        x = norm_act(x, act="lrelu", alpha=slope, pad=pad, residual=added, eps=layer.eps)
    return x if residual is None else x + residual


def without_bias(conv, x):
    """conv(x) of a convolution as of one that has no bias."""
    options = dict(stride=conv.stride, padding=conv.padding, dilation=conv.dilation)
    options |= dict(groups=conv.groups)
    if isinstance(conv, torch.nn.Conv2d):
        return F.conv2d(x, conv.weight, **options)
    return F.conv_transpose2d(x, conv.weight, **options, output_padding=conv.output_padding)


class NormAct(Function):
    """x (dense), scale, shift, residual -> y; keeps x, and mean and 1 / deviation of its maps."""

    @staticmethod
    def forward(ctx, x, scale, shift, residual, spec):
        (N, C, H, W), pad, order = x.shape, spec[3], memory_order(x)
        size = (N, C, H + 2 * pad, W + 2 * pad)
        y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=order)
        residual = None if residual is None else residual.contiguous(memory_format=order)
        moments = torch.empty(2, N, C, dtype=torch.float32, device=x.device)
        run_norm_act(spec, x, residual, y, scale, shift, moments)
        ctx.save_for_backward(x, scale, shift, moments)
        ctx.spec = spec
        return y

    @staticmethod
    def backward(ctx, gy):
        x, scale, shift, moments = ctx.saved_tensors
        *need, need_residual = ctx.needs_input_grad[:4]
        # In x's order, as what it is summed with: sums of two orders are slow.
        gy = gy.contiguous(memory_format=memory_order(x))
        gresidual = gy if need_residual else None
        if torch.is_grad_enabled():  # create_graph: these gradients will have some of their own
            inputs = [t if t is None else t.view_as(t) for t in (x, scale, shift)]
            y = norm_act_ref(*inputs, None, *ctx.spec[1:])
            wanted = [t for t, needed in zip(inputs, need, strict=True) if needed]
            found = iter(torch.autograd.grad(y, wanted, gy, create_graph=True) if wanted else ())
            return *[next(found) if needed else None for needed in need], gresidual, None
        gx, sums = torch.empty_like(x), torch.empty_like(moments)
        run_norm_act(ctx.spec, x, gy, gx, scale, shift, moments, sums)
        gshift, gscale = (
            None if t is None else g.sum(0) if t.ndim == 1 else g
            for t, g in zip((shift, scale), sums, strict=True)
        )
        return gx, gscale, gshift, gresidual, None


def run_norm_act(spec, x, other, out, scale, shift, moments, sums=None):
    """Launches both kernels of the forward pass, or, with sums, of the backward pass. other: the
    residual or gy; out: y or gx; sums: (2, N, C), the gradients of shift and scale by samples."""
    if x.numel() == 0:
        return
    library, act, alpha, pad, eps = spec
    N, C, H, W = x.shape
    last = not x.is_contiguous()  # channels last
    V = 16 // x.element_size()
    aligned = all(t is None or t.data_ptr() % 16 == 0 for t in (x, other, out))
    V = V if aligned and (C % V == 0 if last else H * W % V == 0 and pad == 0) else 1
    groups = N if last else N * C
    lanes = min(C // V, 128 // (V * x.element_size())) if last else 1  # 128 bytes: many rows
    lane_blocks = -(-C // (V * lanes)) if last else 1
    slots, out_slots = (n // (1 if last else V) for n in (H * W, (H + 2 * pad) * (W + 2 * pad)))
    rows = min(256 // lanes, -(-slots // 32) * 32)
    # Two blocks for each processor of a large GPU; each reads what all blocks of its maps found.
    most = max(1, 256 // (groups * lane_blocks))
    walk, out_walk = (-(-n // (rows * most)) for n in (slots, out_slots))
    chunks, out_chunks = -(-slots // (rows * walk)), -(-out_slots // (rows * out_walk))
    size = (groups, chunks, 2, C if last else 1)
    partial = torch.empty(size, dtype=torch.float32, device=x.device)
    small = [None if t is None else t.contiguous() for t in (scale, shift)]
    step = C if scale is not None and scale.ndim == 2 else 0
    shape = (groups, C, H, W, pad, step, lanes, lane_blocks, rows * lanes)
    shape += (chunks, rows * walk, out_chunks, rows * out_walk)
    held = (x, other, out, *small, *moments, *((None, None) if sums is None else sums), partial)
    launch(
        library.norm_act, x, sums is not None, DTYPES[x.dtype], V > 1, last,
        (ctypes.c_int64 * 13)(*shape), 1.0 if act == "linear" else alpha, eps,
        (ctypes.c_void_p * 10)(*map(pointer, held)),
    )  # fmt: skip


# =============================================================================
# upfirdn2d
# =============================================================================
#   forward    zeros after every sample (up), zeros around (pad; negative: crop), convolution with
#              f (flip_filter: correlation) times gain, every down-th sample kept
#   backward   linear in x, hence the same again with up and down exchanged, the filter flipped and
#              padding (FW - pad0 - 1, W * up - OW * down + pad0 - up + 1); and so on, to any order


def setup_filter(f, normalize=True, flip_filter=False, gain=1, separable=None, device=None):
    """A FIR filter as upfirdn2d takes it: (n,) separable, or (h, w). f: number, list, tensor, None.

    One-dimensional ones of less than 8 taps become their outer product, unless `separable`.
    normalize: make the sum 1; gain: of the whole, two-dimensional filter.
    """
    f = torch.as_tensor(1 if f is None else f, dtype=torch.get_default_dtype(), device=device)
    if f.ndim > 2 or f.numel() == 0:
        raise ValueError(f"a filter has 0, 1 or 2 dimensions and some taps, not {tuple(f.shape)}")
    f = f.reshape(1) if f.ndim == 0 else f
    if f.ndim == 1 and not (f.numel() >= 8 if separable is None else separable):
        f = f.outer(f)
    f = f / f.sum() if normalize else f
    f = f.flip(list(range(f.ndim))) if flip_filter else f
    return f * gain ** (f.ndim / 2)


def pair(value):
    """(x, y) of an int or a pair."""
    return (value, value) if isinstance(value, int) else tuple(value)


def four(padding):
    """(left, right, above, below) of an int, a pair (x, y) or all four."""
    padding = pair(padding)
    return padding if len(padding) == 4 else (padding[0],) * 2 + (padding[1],) * 2


def sizes(f):
    """(width, height) of a filter; None is a single tap."""
    return (1, 1) if f is None else (f.shape[-1], f.shape[0])


def upfirdn2d_ref(x, f, up, down, padding, flip_filter, gain):
    f = f.outer(f) if f.ndim == 1 and len(f) < 8 else f  # few taps: one pass is faster than two
    if x.device.type == "cpu":  # depthwise convolutions are several times faster in this order
        x = x.contiguous(memory_format=torch.channels_last)
    f = f.to(x.dtype) * gain ** (f.ndim / 2)
    if f.ndim == 2:
        return fir_ref(x, f, up, down, padding, flip_filter)
    x = fir_ref(x, f[None, :], (up[0], 1), (down[0], 1), (*padding[:2], 0, 0), flip_filter)
    return fir_ref(x, f[:, None], (1, up[1]), (1, down[1]), (0, 0, *padding[2:]), flip_filter)


def fir_ref(x, f, up, down, padding, flip_filter):
    C, (FH, FW), (x0, x1, y0, y1) = x.shape[1], f.shape, padding
    if up == (1, 1):
        f = f if flip_filter else f.flip([0, 1])  # F.conv2d correlates
        even = x0 == x1 >= 0 and y0 == y1 >= 0  # what a convolution pads by itself
        x, pad = (x, (y0, x0)) if even else (F.pad(x, padding), 0)
        return F.conv2d(x, f.repeat(C, 1, 1, 1), None, down[::-1], pad, groups=C)
    # Zeros and convolution at once. It pads by F - 1 before and by F - up after, less `crop`.
    f = f.flip([0, 1]) if flip_filter else f
    x0, x1, y0, y1 = x0 - FW + 1, x1 - FW + up[0], y0 - FH + 1, y1 - FH + up[1]
    even = x0 == x1 <= 0 and y0 == y1 <= 0
    crop = (-y0, -x0) if even else 0
    x = F.conv_transpose2d(x, f.repeat(C, 1, 1, 1), None, up[::-1], crop, groups=C)
    x = x if even else F.pad(x, [x0, x1, y0, y1])
    return x[:, :, :: down[1], :: down[0]]


UPFIRDN2D = r"""
// ---- upfirdn2d ------------------------------------------------------------------------------

struct Fir {
    int64_t groups;  // NCHW: planes, CL: samples
    int C, H, W, OH, OW, FH, FW, upx, upy, downx, downy, padx, pady, flip, odd;
    float gain;
    int lanes, tiles, bands, steps;  // of fir_kernel: columns and rows of blocks; steps of a thread
};

__device__ __forceinline__ bool outside(int i, int n) { return unsigned(i) >= unsigned(n); }
// Odd edges, see box_then_blur: the outermost pixels of the padding are minus those of the image,
// others 0. Pixel i of the padded image is `sign` times pixel `nearest` of the image.
__device__ __forceinline__ int nearest(int i, int n) { return min(max(i, 0), n - 1); }
__device__ __forceinline__ float sign(int i, int n, int pad) {
    return !outside(i, n) ? 1 : max(-i, i - n + 1) == pad ? -1 : 0;
}

// Any factors, padding and 2-D filter: one thread per output,
//   y[oy, ox] = gain * sum_k f[k] x[(o * down + k - pad) / up], where that is a whole number
template <class T, bool CL>
__global__ void __launch_bounds__(256) fir_any_kernel(Fir p, const T* x, const float* f, T* y) {
    int64_t n = p.groups * p.OH * p.OW * (CL ? p.C : 1);
    int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
    if (i >= n) return;
    int64_t rest = i;
    int c = CL ? int(rest % p.C) : 0;
    if (CL) rest /= p.C;
    int ox = int(rest % p.OW); rest /= p.OW;
    int oy = int(rest % p.OH);
    x += rest / p.OH * p.H * p.W * (CL ? p.C : 1) + c;
    float sum = 0;
    for (int ky = 0; ky < p.FH; ky++) {
        int64_t qy = int64_t(oy) * p.downy + ky - p.pady;
        float sign_y = p.odd ? sign(qy, p.H, p.pady) : 1;
        if (p.odd) qy = nearest(qy, p.H);
        if (qy < 0 || qy % p.upy || qy / p.upy >= p.H) continue;
        for (int kx = 0; kx < p.FW; kx++) {
            int64_t qx = int64_t(ox) * p.downx + kx - p.padx;
            float minus = p.odd ? sign_y * sign(qx, p.W, p.padx) : 1;
            if (p.odd) qx = nearest(qx, p.W);
            if (qx < 0 || qx % p.upx || qx / p.upx >= p.W) continue;
            int k = p.flip ? ky * p.FW + kx : (p.FH - 1 - ky) * p.FW + p.FW - 1 - kx;
            float v = to_float(x[(qy / p.upy * p.W + qx / p.upx) * (CL ? p.C : 1)]);
            sum += f[k] * minus * v;
        }
    }
    y[i] = from_float<T>(sum * p.gain);
}

// Read in place of pixels outside of the image: choosing an address needs no branch.
__device__ const float4 zeros = {0, 0, 0, 0};

// The separable case f[ky] f[kx] with TAPS taps, the factors UP and DOWN on both axes.
// A thread owns RX * UP neighbouring output columns (of V channels in CL) and walks down: per step
// it filters DOWN new input rows horizontally, keeps the last WIN such rows in registers, and
// writes UP output rows. Output o of a step meets input j with tap k = UP * j + r - o * DOWN, where
// r = (-pad) mod UP; so UP rows of WIN coefficients per axis say it all.
template <class T, int V, bool CL, int TAPS, int UP, int DOWN, int RX, bool ODD>
__global__ void __launch_bounds__(128) fir_kernel(Fir p, const T* x, const float* f, T* y) {
    constexpr int WIN = ((UP - 1) * DOWN + TAPS - 1) / UP + 1, WIDE = WIN + (RX - 1) * DOWN;
    constexpr int OUT = RX * UP;
    int lane = threadIdx.x % p.lanes, columns = blockDim.x / p.lanes;
    int64_t rest = blockIdx.x;
    int tile = int(rest % p.tiles); rest /= p.tiles;
    int band = int(rest % p.bands);
    int64_t group = rest / p.bands;
    int c = CL ? (blockIdx.y * p.lanes + lane) * V : 0;
    int column = tile * columns + threadIdx.x / p.lanes, ox = column * OUT;
    if (ox >= p.OW || (CL && c >= p.C)) return;
    int step = CL ? p.C : 1;  // elements from one column to the next
    x += group * p.H * p.W * step + c;
    y += group * p.OH * p.OW * step + c;

    int firstx = p.padx >= 0 ? -(p.padx / UP) : (-p.padx + UP - 1) / UP;  // ceil(-pad / UP)
    int firsty = p.pady >= 0 ? -(p.pady / UP) : (-p.pady + UP - 1) / UP;
    int rx = UP * firstx + p.padx, ry = UP * firsty + p.pady;
    float cx[UP][WIN], cy[UP][WIN];
#pragma unroll
    for (int b = 0; b < UP; b++)
#pragma unroll
        for (int j = 0; j < WIN; j++) {
            int kx = UP * j + rx - b * DOWN, ky = UP * j + ry - b * DOWN;
            cx[b][j] = kx < 0 || kx >= TAPS ? 0 : f[p.flip ? kx : TAPS - 1 - kx] * p.gain;
            cy[b][j] = ky < 0 || ky >= TAPS ? 0 : f[p.flip ? ky : TAPS - 1 - ky];
        }

    float rows[WIN][OUT][V];
    int s = band * p.steps, end = min(s + p.steps, (p.OH + UP - 1) / UP);
    int fill = (WIN + DOWN - 1) / DOWN;  // rounds until the window is full
    int left = column * RX * DOWN + firstx, next = s * DOWN + firsty + WIN - fill * DOWN;
    bool whole = p.OW % OUT == 0;  // outputs of a thread can be stored as one vector
    int at[WIDE];  // only of odd edges: constants take fewer registers
    float edge[WIDE];
#pragma unroll
    for (int i = 0; i < WIDE; i++) {
        at[i] = (nearest(left + i, p.W) - left) * step;
        edge[i] = ODD ? sign(left + i, p.W, p.padx) : 1;
    }

    for (; s < end; next += DOWN) {
        Pack<T, V> pixels[DOWN][WIDE];  // loaded all at once, before any is waited for
#pragma unroll
        for (int d = 0; d < DOWN; d++) {
            int r = ODD ? nearest(next + d, p.H) : next + d;
            bool inside = !outside(r, p.H);
            const T *from = x + (int64_t(r) * p.W + left) * step, *zero = (const T*)&zeros;
#pragma unroll
            for (int i = 0; i < WIDE; i++) {
                bool known = ODD | (inside & !outside(left + i, p.W));
                pixels[d][i] = fetch<V>(known ? from + (ODD ? at[i] : int64_t(i) * step) : zero);
            }
        }
#pragma unroll
        for (int j = 0; j < WIN - DOWN; j++)
#pragma unroll
            for (int o = 0; o < OUT; o++)
#pragma unroll
                for (int v = 0; v < V; v++) rows[j][o][v] = rows[j + DOWN][o][v];
#pragma unroll
        for (int d = 0; d < DOWN; d++) {
            float(*row)[V] = rows[WIN - DOWN + d];
#pragma unroll
            for (int o = 0; o < OUT; o++)
#pragma unroll
                for (int v = 0; v < V; v++) row[o][v] = 0;
#pragma unroll
            for (int i = 0; i < WIDE; i++) {
#pragma unroll
                for (int o = 0; o < OUT; o++) {
                    int j = i - o / UP * DOWN;
                    if (j < 0 || j >= WIN) continue;
                    float c = cx[o % UP][j] * edge[i];
#pragma unroll
                    for (int v = 0; v < V; v++) row[o][v] += c * to_float(pixels[d][i].v[v]);
                }
            }
            if (ODD && outside(next + d, p.H)) {
                float minus = sign(next + d, p.H, p.pady);
#pragma unroll
                for (int o = 0; o < OUT; o++)
#pragma unroll
                    for (int v = 0; v < V; v++) row[o][v] *= minus;
            }
        }
        if (--fill > 0) continue;
#pragma unroll
        for (int b = 0; b < UP; b++) {
            int oy = s * UP + b;
            if (oy >= p.OH) break;
            float out[OUT][V];
#pragma unroll
            for (int o = 0; o < OUT; o++)
#pragma unroll
                for (int v = 0; v < V; v++) {
                    out[o][v] = 0;
#pragma unroll
                    for (int j = 0; j < WIN; j++) out[o][v] += cy[b][j] * rows[j][o][v];
                }
            T* to = y + (int64_t(oy) * p.OW + ox) * step;
            if (V == 1 && !CL && whole) store<OUT>(to, &out[0][0]);
            else
#pragma unroll
                for (int o = 0; o < OUT; o++)
                    if (ox + o < p.OW) store<V>(to + int64_t(o) * step, out[o]);
        }
        s++;
    }
}

template <class T, int V, bool CL, int TAPS, int UP, int DOWN, int RX, bool ODD = false>
static void fir_launch(Fir p, cudaStream_t stream, const T* x, const float* f, T* y) {
    int columns = (p.OW + RX * UP - 1) / (RX * UP), total = (p.OH + UP - 1) / UP;
    p.lanes = CL ? min(p.C / V, 128) : 1;
    int wide = min(columns, CL ? max(128 / p.lanes, 1) : 64);
    p.tiles = (columns + wide - 1) / wide;
    p.steps = 16;  // enough to spread the first fill; fewer where the GPU would stand idle
    while (p.steps > 4 && p.groups * p.tiles * (total / p.steps + 1) < 1024) p.steps /= 2;
    p.bands = (total + p.steps - 1) / p.steps;
    dim3 grid((unsigned)(p.groups * p.tiles * p.bands), CL ? (p.C / V + p.lanes - 1) / p.lanes : 1);
    auto k = fir_kernel<T, V, CL, TAPS, UP, DOWN, RX, ODD>;
    LAUNCH(k, grid, wide * p.lanes, 0, stream, p, x, f, y);
}
template <class T, int TAPS>
static void fir_factors(const Fir& p, int cl, cudaStream_t s, const T* x, const float* f, T* y) {
    constexpr int V = TAPS <= 4 ? 16 / sizeof(T) : 4;
    if (cl && p.upx == 2) fir_launch<T, V, true, TAPS, 2, 1, 1>(p, s, x, f, y);
    else if (cl && p.downx == 2) fir_launch<T, V, true, TAPS, 1, 2, 1>(p, s, x, f, y);
    else if (cl) fir_launch<T, V, true, TAPS, 1, 1, 1>(p, s, x, f, y);
    else if (p.upx == 2) fir_launch<T, 1, false, TAPS, 2, 1, 2>(p, s, x, f, y);
    else if (p.downx == 2) fir_launch<T, 1, false, TAPS, 1, 2, 4>(p, s, x, f, y);
    else fir_launch<T, 1, false, TAPS, 1, 1, 4>(p, s, x, f, y);
}
template <class T>
static void fir_type(const Fir& p, int cl, int taps, cudaStream_t s, const void* x, const float* f,
                     void* y) {
    constexpr int V = 16 / sizeof(T);
    if (taps == 4 && p.odd && cl)
        return fir_launch<T, V, true, 4, 1, 1, 1, true>(p, s, (const T*)x, f, (T*)y);
    if (taps == 4 && p.odd)
        return fir_launch<T, 1, false, 4, 1, 1, 4, true>(p, s, (const T*)x, f, (T*)y);
    if (taps == 2) return fir_factors<T, 2>(p, cl, s, (const T*)x, f, (T*)y);
    if (taps == 3) return fir_factors<T, 3>(p, cl, s, (const T*)x, f, (T*)y);
    if (taps == 4) return fir_factors<T, 4>(p, cl, s, (const T*)x, f, (T*)y);
    if (taps == 12) return fir_factors<T, 12>(p, cl, s, (const T*)x, f, (T*)y);
    int64_t blocks = (p.groups * p.OH * p.OW * (cl ? p.C : 1) + 255) / 256;
    auto k = fir_any_kernel<T, false>;
    if (cl) k = fir_any_kernel<T, true>;
    LAUNCH(k, dim3((unsigned)blocks), 256, 0, s, p, (const T*)x, f, (T*)y);
}
extern "C" int upfirdn2d(int type, int cl, int taps, int64_t groups, const int* s, float gain,
                         const void* x, const void* f, void* y, void* stream) {
    Fir p = {groups, s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11],
             s[12], s[13], s[14], gain};
    auto k = fir_type<float>;
    if (type == 1) k = fir_type<__half>;
    if (type == 2) k = fir_type<__nv_bfloat16>;
    k(p, cl, taps, (cudaStream_t)stream, x, (const float*)f, y);
    return cudaGetLastError();
}

"""


def upfirdn2d(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1, impl=None):
    """Pads, upsamples, filters and downsamples the images x (N, C, H, W).

    f: (n,) separable, (h, w), or None: one tap of 1; never trained. up, down: int or (x, y);
    padding: of the upsampled image, int, (x, y) or (left, right, above, below), negative: crop.
    Raises ValueError where the filter does not fit into the image.
    Source: Karras et al. 2019, StyleGAN2, sec. 4; for the filter, Zhang 2019 (arXiv:1904.11486).
    """
    f = torch.ones(1, device=x.device) if f is None else f
    (ux, uy), (dx, dy), (FW, FH) = pair(up), pair(down), sizes(f)
    x0, x1, y0, y1 = four(padding)
    H, W = x.shape[2:]
    OW, OH = (W * ux + x0 + x1 - FW) // dx + 1, (H * uy + y0 + y1 - FH) // dy + 1
    if W * ux + x0 + x1 < FW or H * uy + y0 + y1 < FH:
        raise ValueError(
            f"a {FH}x{FW} filter does not fit into {tuple(x.shape)}, padding {padding}"
        )
    if f.device != x.device:
        raise ValueError(f"the filter is on {f.device}, x on {x.device}")
    library = kernels(x, impl)
    if library is None:
        return upfirdn2d_ref(x, f, (ux, uy), (dx, dy), (x0, x1, y0, y1), flip_filter, gain)
    return Upfirdn2d.apply(x, f.float(), (ux, uy), (dx, dy), (x0, y0), (OW, OH), flip_filter, gain)


class Upfirdn2d(Function):
    """See upfirdn2d. pad: (left, above); size: (width, height) of the result."""

    @staticmethod
    def forward(ctx, x, f, up, down, pad, size, flip_filter, gain, odd=False):
        x = dense(x)
        last = not x.is_contiguous()  # channels last
        N, C, H, W = x.shape
        (OW, OH), (FW, FH) = size, sizes(f)
        y = torch.empty(N, C, OH, OW, dtype=x.dtype, device=x.device, memory_format=memory_order(x))
        ctx.save_for_backward(f)
        ctx.rest = up, down, pad, (W, H), flip_filter, gain, odd
        if y.numel() == 0 or x.numel() == 0:
            return y.zero_()
        # The fast kernel: separable, equal factors on both axes, one of them 1.
        taps, factors = len(f), {(up[0], down[0]), (up[1], down[1])}
        V = 16 // x.element_size() if taps <= 4 else 4
        fast = f.ndim == 1 and taps in ((4,) if odd else (2, 3, 4, 12)) and len(factors) == 1
        fast = fast and factors <= {(1, 1), (2, 1), (1, 2)}
        fast = fast and not (last and C % V) and x.data_ptr() % 16 == 0
        full = (f if fast or f.ndim == 2 else f.outer(f)).contiguous()
        shape = (C, H, W, OH, OW, FH, FW, *up, *down, *pad, flip_filter, odd)
        launch(
            kernels(x, "cuda").upfirdn2d, x, DTYPES[x.dtype], last, taps if fast else 0,
            N if last else N * C, (ctypes.c_int * 15)(*shape), gain, pointer(x),
            pointer(full), pointer(y),
        )  # fmt: skip
        return y

    @staticmethod
    def backward(ctx, gy):
        (f,) = ctx.saved_tensors
        up, down, (x0, y0), (W, H), flip_filter, gain, odd = ctx.rest
        FW, FH = sizes(f)
        pad = (FW - x0 - 1, FH - y0 - 1)
        gx = Upfirdn2d.apply(gy, f, down, up, pad, (W, H), not flip_filter, gain, odd)
        return (gx, *[None] * 8)


def upsampling(padding, f, up):
    """The padding, and what a filter takes from the upsampled image."""
    (x0, x1, y0, y1), (FW, FH), (ux, uy) = four(padding), sizes(f), pair(up)
    x0, x1 = x0 + (FW + ux - 1) // 2, x1 + (FW - ux) // 2
    return x0, x1, y0 + (FH + uy - 1) // 2, y1 + (FH - uy) // 2


def downsampling(padding, f, down):
    """The padding, and what a filter takes before every down-th pixel is kept."""
    (x0, x1, y0, y1), (FW, FH), (dx, dy) = four(padding), sizes(f), pair(down)
    x0, x1 = x0 + (FW - dx + 1) // 2, x1 + (FW - dx) // 2
    return x0, x1, y0 + (FH - dy + 1) // 2, y1 + (FH - dy) // 2


def filter2d(x, f, padding=0, flip_filter=False, gain=1, impl=None):
    """Filters x without changing its size, beyond padding. See upfirdn2d."""
    return upsample2d(x, f, 1, padding, flip_filter, gain, impl)


def upsample2d(x, f, up=2, padding=0, flip_filter=False, gain=1, impl=None):
    """Enlarges x `up` times, keeping brightness: the gain is multiplied by up^2."""
    padding = upsampling(padding, f, up)
    return upfirdn2d(x, f, up, 1, padding, flip_filter, gain * math.prod(pair(up)), impl)


def downsample2d(x, f, down=2, padding=0, flip_filter=False, gain=1, impl=None):
    """Shrinks x `down` times."""
    return upfirdn2d(x, f, 1, down, downsampling(padding, f, down), flip_filter, gain, impl)


@functools.cache
def binomial(taps, device):
    """[1, 1], [1, 2, 1], [1, 3, 3, 1], ..., scaled to a sum of 1, once per device."""
    f = [math.comb(taps - 1, k) for k in range(taps)]
    with torch.inference_mode(False):  # kept for training as well
        return setup_filter(f, separable=True, device=device)


def pool2(x, impl=None):
    """The means of 2x2 pixels, half of both sides: F.avg_pool2d(x, 2)."""
    if kernels(x, impl) is None:  # as fast on a CPU, and its second derivative several times
        return F.avg_pool2d(x, 2)
    return downsample2d(x, binomial(2, x.device), impl=impl)


def double(x, impl=None):
    """Each pixel 2x2 times, twice both sides: nearest F.interpolate."""
    if kernels(x, impl) is None:
        return F.interpolate(x, scale_factor=2, mode="nearest")
    return upsample2d(x, binomial(2, x.device), impl=impl)


# Box and blur, [1, 1] and [1, 2, 1], are [1, 3, 3, 1], but for the edges: outside of the image
# between the two is zero. One pass gets that from odd edges, where the outermost pixels of the
# padding are minus those of x: the box makes 0 of -a and a.
#   box_then_blur   padding 1: -x_0, x_0, x_1, ...
#   blur_then_box   padding 2: -x_0, 0, x_0, x_1, ...    each is the adjoint of the other


def box_then_blur(x, gain=1, impl=None):
    """The box where it fits, then the blur, times gain: (N, C, H, W) -> (N, C, H - 1, W - 1)"""
    if kernels(x, impl) is not None:
        return odd_edged(x, 1, gain)
    x = upfirdn2d(x, binomial(2, x.device), gain=gain, impl=impl)
    return filter2d(x, binomial(3, x.device), impl=impl)


def blur_then_box(x, gain=1, impl=None):
    """The blur, then the box at every place that it meets: (N, C, H, W) -> (N, C, H + 1, W + 1)"""
    if kernels(x, impl) is not None:
        return odd_edged(x, 2, gain)
    x = filter2d(x, binomial(3, x.device), impl=impl)
    return upfirdn2d(x, binomial(2, x.device), padding=1, gain=gain, impl=impl)


def odd_edged(x, pad, gain):
    (H, W), f = x.shape[2:], binomial(4, x.device).float()
    size = (W + 2 * pad - 3, H + 2 * pad - 3)
    return Upfirdn2d.apply(x, f, (1, 1), (1, 1), (pad, pad), size, False, gain, True)


# =============================================================================
# Convolutions
# =============================================================================
#   forward    y = x * w
#   backward   dx of dy and w: the transposed convolution; dw of dy and x, by
#              aten::convolution_backward
#   second     all three are bilinear, and the derivatives of each are the other two
# PyTorch's own second derivative convolves with dy as a kernel as large as the image instead.

_weight_gradients = True


@contextlib.contextmanager
def no_weight_gradients():
    """Within, backward passes leave out the gradients of convolution weights, and kernels those of
    fused_act's b and strength: for the gradients with respect to images or ws of R1 and path
    length, which would only throw them away. Not where any of these depends on images or ws, as
    the weights of a fused modulated convolution do."""
    global _weight_gradients
    before, _weight_gradients = _weight_gradients, False
    try:
        yield
    finally:
        _weight_gradients = before


def cast(*tensors):
    """The tensors, but for float64, in autocast's type: as PyTorch does for its own layers."""
    kind = tensors[0].device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    half = torch.get_autocast_dtype(kind)
    return tuple(t if t.dtype == torch.float64 else t.to(half) for t in tensors)


def conv2d(x, w, stride=1, padding=0, groups=1):
    """F.conv2d without bias. x: (N, I, H, W); w: (O, I / groups, kh, kw). Where there are kernels,
    1x1 convolutions from or to images in half precision are products: with less than 8 channels
    cuDNN's are slow."""
    x, w = cast(x, w)
    stride, padding, (O, I) = pair(stride), pair(padding), w.shape[:2]
    plain = w.shape[2:] == (1, 1) and groups == 1 and (stride, padding) == ((1, 1), (0, 0))
    if plain and min(O, I) < 8 and x.element_size() == 2 and kernels(x, None) is not None:
        few_by_many = w.flatten(1) if O < I else w.flatten(1).mT.contiguous()
        return (to_image if O < I else from_image)(x, few_by_many.expand(len(x), -1, -1))
    return Convolution.apply(x, w, stride, padding, groups, False, (0, 0))


def conv_transpose2d(x, w, stride=1, padding=0, output_padding=0, groups=1):
    """F.conv_transpose2d without bias. x: (N, I, H, W); w: (I, O / groups, kh, kw)."""
    x, w = cast(x, w)
    extra = pair(output_padding)
    return Convolution.apply(x, w, pair(stride), pair(padding), groups, True, extra)


class Convolution(Function):
    """y of x and w. rest: stride, padding, groups, transposed, output padding."""

    @staticmethod
    def forward(ctx, x, w, *rest):
        # A w that learns nothing, as D's in a phase of G, saves the memory of x.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w)
        ctx.shape, ctx.rest = x.shape, rest
        stride, padding, groups, transposed, extra = rest
        return torch.convolution(x, w, None, stride, padding, (1, 1), transposed, extra, groups)

    @staticmethod
    def backward(ctx, gy):
        x, w = ctx.saved_tensors
        need_x, need_w = ctx.needs_input_grad[:2]
        gx = input_gradient(gy, w, ctx.shape, ctx.rest) if need_x else None
        need_w = need_w and _weight_gradients
        gw = WeightGradient.apply(gy, x, w.detach(), ctx.rest) if need_w else None
        return gx, gw, *[None] * 5


def input_gradient(gy, w, shape, rest):
    """That of a convolution of x of a shape is a transposed convolution, and the reverse."""
    stride, padding, groups, transposed, _ = rest
    extra = (0, 0)
    if not transposed:  # rows and columns that no step of the stride reached
        sizes = zip(shape[2:], gy.shape[2:], stride, padding, w.shape[2:], strict=True)
        extra = tuple(n - (m - 1) * s + 2 * p - k for n, m, s, p, k in sizes)
    return Convolution.apply(gy, w, stride, padding, groups, not transposed, extra)


class WeightGradient(Function):
    """gw of gy and x; w only has the right shape."""

    @staticmethod
    def forward(ctx, gy, x, w, rest):
        ctx.save_for_backward(gy, x)
        ctx.rest = stride, padding, groups, transposed, extra = rest
        return torch.ops.aten.convolution_backward(
            gy, x, w, None, stride, padding, (1, 1), transposed, extra, groups,
            (False, True, False),
        )[1]  # fmt: skip

    @staticmethod
    def backward(ctx, ggw):
        gy, x = ctx.saved_tensors
        need_y, need_x = ctx.needs_input_grad[:2]
        ggy = Convolution.apply(x, ggw, *ctx.rest) if need_y else None
        gx = input_gradient(gy, ggw, x.shape, ctx.rest) if need_x else None
        return ggy, gx, None, None


# 1x1 convolutions to and from images, which have few channels, as products. With X (few, H W)
# of an image, Y (H W, many) of features, w (few, many):
#   to_image    X = w Y^T;  backward: dY = dX^T w, which is from_image;  dw = dX Y
#   from_image  Y = X^T w;  backward: dX = w dY^T, which is to_image;  dw = X dY
# Products are fast where rows of matrices are long in memory. So images are NCHW, and features, as
# always, channels last; the other way round rows would have 3 elements.


def to_image(x, w):
    """A 1x1 convolution with the weights of each sample, which have gradients even within
    no_weight_gradients, as they depend on ws. x: (N, I, H, W), w: (N, O, I), O few channels
    -> (N, O, H, W)."""
    return ToImage.apply(*cast(x, w))


def from_image(x, w):
    """Its transpose; within no_weight_gradients the weights have no gradients. x: (N, I, H, W), I
    few channels, w: (N, I, O) -> (N, O, H, W)."""
    return FromImage.apply(*cast(x, w))


def rows_of(x):
    """(N, C, H W)"""
    return x.contiguous().flatten(2)


def pixels_of(x):
    """(N, H W, C)"""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


class ToImage(Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return (w @ pixels_of(x).mT).unflatten(2, x.shape[2:])

    @staticmethod
    def backward(ctx, gy):
        x, w = ctx.saved_tensors
        need_x, need_w = ctx.needs_input_grad
        gx = FromImage.apply(gy, w).contiguous(memory_format=memory_order(x)) if need_x else None
        return gx, image_weight_gradient(gy, x) if need_w else None


class FromImage(Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return (rows_of(x).mT @ w).mT.unflatten(2, x.shape[2:])

    @staticmethod
    def backward(ctx, gy):
        x, w = ctx.saved_tensors
        need_x, need_w = ctx.needs_input_grad
        gx = ToImage.apply(gy, w) if need_x else None
        need_w = need_w and _weight_gradients
        return gx, image_weight_gradient(x, gy) if need_w else None


def image_weight_gradient(image, features):
    """(N, few, many), summed over pixels in parts: one sum would keep few of a GPU's processors
    busy."""
    size = image.shape[2:].numel()
    part = math.gcd(size, 4096)
    part = part if part >= 64 else size
    image = rows_of(image).unflatten(2, (-1, part)).transpose(1, 2)
    return (image @ pixels_of(features).unflatten(1, (-1, part))).sum(1)


def conv2d_resample(
    x, w, f=None, up=1, down=1, padding=0, groups=1, flip_weight=True, flip_filter=False, impl=None
):
    """Upsamples x by zeros, pads, filters with f, convolves with w, downsamples.

    x: (N, I, H, W); w: (O, I / groups, kh, kw); padding: of the upsampled image, as in upfirdn2d,
    where that of the filter is added by itself; flip_weight: True: correlation, as F.conv2d. The
    steps commute but for borders, and are taken in the order that computes least.
    """
    padding = upsampling(padding, f, up) if up > 1 else padding
    padding = downsampling(padding, f, down) if down > 1 else padding
    x0, x1, y0, y1 = pads = four(padding)
    kh, kw = w.shape[2:]
    w = w if flip_weight or up > 1 else w.flip([2, 3])
    resample = functools.partial(upfirdn2d, f=f, flip_filter=flip_filter, impl=impl)

    if (kw, kh) == (1, 1) and up == 1 and down > 1:
        return conv2d(resample(x, down=down, padding=pads), w, groups=groups)
    if (kw, kh) == (1, 1) and up > 1 and down == 1:
        return resample(conv2d(x, w, groups=groups), up=up, padding=pads, gain=up**2)
    if up == 1 and down > 1:
        return conv2d(resample(x, padding=pads), w, stride=down, groups=groups)
    if up > 1:
        # Stride `up` in a transposed convolution is the zeros and the full convolution at once,
        # which pads by k - 1 before and k - up after; what is left of the padding goes to the
        # filter, or, where it is negative, is cropped by the convolution.
        O, I = w.shape[:2]
        w = w.flip([2, 3]) if flip_weight else w
        w = (
            w.reshape(groups, O // groups, I, kh, kw)
            .transpose(1, 2)
            .reshape(-1, O // groups, kh, kw)
        )
        x0, x1, y0, y1 = x0 - kw + 1, x1 - kw + up, y0 - kh + 1, y1 - kh + up
        crop = max(min(-y0, -y1), 0), max(min(-x0, -x1), 0)
        x = conv_transpose2d(x, w, up, crop, groups=groups)
        pads = (x0 + crop[1], x1 + crop[1], y0 + crop[0], y1 + crop[0])
        x = resample(x, padding=pads, gain=up**2)
        return x if down == 1 else upfirdn2d(x, f, 1, down, 0, flip_filter, impl=impl)
    if x0 == x1 >= 0 and y0 == y1 >= 0:
        return conv2d(x, w, padding=(y0, x0), groups=groups)
    return conv2d(F.pad(x, pads), w, groups=groups)


# 3x3 convolutions between sides of 1 : 2. Doubling or averaging pixels is the box [1, 1]; with w it
# makes one 4x4 kernel of stride 2, and the blur [1, 2, 1] is a further pass. Where kernels are, w
# alone has stride 2, 9/16 of the work, and box and blur are one pass.


def upscale_conv2d(x, w, blur=False, impl=None):
    """Each pixel 2x2 times, a 3x3 convolution, and, with `blur`, the filter [1, 2, 1]; zeros are
    outside. x: (N, I, H, W), w: (O, I, 3, 3) -> (N, O, 2 H, 2 W)"""
    fused = blur and kernels(x, impl) is not None
    w = (w if fused else widened(w)).flip([2, 3]).transpose(0, 1)
    if fused:
        return box_then_blur(conv_transpose2d(x, w, stride=2), gain=4, impl=impl)
    x = conv_transpose2d(x, w, stride=2, padding=1)
    return filter2d(x, binomial(3, x.device), impl=impl) if blur else x


def conv2d_downscale(x, w, blur=False, impl=None):
    """With `blur`, the filter [1, 2, 1], a 3x3 convolution, means of 2x2 pixels; zeros are outside.
    x: (N, I, H, W), sides even, w: (O, I, 3, 3) -> (N, O, H / 2, W / 2)"""
    if blur and kernels(x, impl) is not None:
        return conv2d(blur_then_box(x, impl=impl), w, stride=2)
    x = filter2d(x, binomial(3, x.device), impl=impl) if blur else x
    return conv2d(x, widened(w) / 4, stride=2, padding=1)


def widened(w):
    """3x3 kernels (O, I, 3, 3) with a 2x2 box of ones convolved into them: (O, I, 4, 4)."""
    return F.avg_pool2d(w, 2, stride=1, padding=1, divisor_override=1)


# =============================================================================
# grid_sample
# =============================================================================
#   forward    bilinear, zeros outside, align_corners=False; linear in the image
#   backward   aten::grid_sampler_2d_backward; its derivative by dy is grid_sample itself


def grid_sample(x, grid):
    """F.grid_sample(x, grid) of images x (N, C, H, W) at grid (N, OH, OW, 2), twice differentiable
    in x on every torch; the grid gets no gradient."""
    return GridSample.apply(x, grid)


class GridSample(Function):
    @staticmethod
    def forward(ctx, x, grid):
        ctx.save_for_backward(grid)
        ctx.shape = x.shape
        return F.grid_sample(x, grid, "bilinear", "zeros", align_corners=False)

    @staticmethod
    def backward(ctx, gy):
        return GridSampleGrad.apply(gy, *ctx.saved_tensors, ctx.shape), None


class GridSampleGrad(Function):
    @staticmethod
    def forward(ctx, gy, grid, shape):
        ctx.save_for_backward(grid)
        x = gy.new_zeros(()).expand(shape)  # only its shape matters: the grid gets no gradient
        backward = torch.ops.aten.grid_sampler_2d_backward
        return backward(gy, x, grid, 0, 0, False, (True, False))[0]

    @staticmethod
    def backward(ctx, ggx):
        return GridSample.apply(ggx, ctx.saved_tensors[0]), None, None


# =============================================================================
# warp
# =============================================================================
# The geometry of StyleGAN2-ADA (Karras et al. 2020, appendix B): an image, continued by reflection,
# is upsampled by a wavelet's lowpass and read bilinearly at twice the resolution. On either axis
#   upsampled  u[k] = 2 sum_i x[reflect(i)] f[k - 2 i + 5];   0 where i or k / 2 is beyond reach
#   forward    v = (1 - t) u[j] + t u[j + 1] where the map leads to j + t: a sum of 7 pixels, with
#              coefficients c_i = 2 (1 - t) f[j - 2 i + 5] + 2 t f[j - 2 i + 6]
#   backward   the adjoint: a pixel's sum of dv, with the same coefficients, over all v that read it
#   second     linear in x, hence each is the other's backward
# A sum of 7 x 7 pixels, instead of padding by all that a reflection can be, to nine times the
# pixels: how far a batch reaches is known to the GPU only.


def warp_ref(x, G, reach, f, most):
    """most: pixels to pad with, or all that there can be; at least what reach says."""
    dtype, (H, W) = x.dtype, x.shape[2:]
    x = x.to(torch.promote_types(dtype, torch.float32)).contiguous()
    pad = min(most, W - 1), min(most, H - 1)

    def inside(scale):
        """1 where the padded image, scaled, is within reach, else 0. (H, W)"""
        ranges = []
        for axis, side in enumerate((W, H)):
            k = torch.arange(scale * (side + 2 * pad[axis]), device=x.device)
            first, end = pad[axis] - reach[0, axis], pad[axis] + side + reach[1, axis]
            ranges.append(((k >= scale * first) & (k < scale * end)).to(x.dtype))
        return ranges[1][:, None] * ranges[0]

    x = F.pad(x, (pad[0], pad[0], pad[1], pad[1]), "reflect") * inside(1)
    x = upsample2d(x, f, impl="ref") * inside(2)

    # The upsampled pixels are half of such a pixel off (the filter has an even length), and
    # grid_sample counts from -1 to 1 over all of them.
    u, v = (torch.arange(1 - n, n + 1, device=G.device) / 2 for n in (W + 6, H + 6))
    G = G.to(torch.promote_types(G.dtype, x.dtype))[:, None, None]
    places = G[..., 0] * u[:, None] + G[..., 1] * v[:, None, None] + G[..., 2]
    sides = torch.stack([G.new_full((), side + 2 * p) for side, p in zip((W, H), pad, strict=True)])
    grid = (2 * places - 0.5) / sides  # (N, 2H + 12, 2W + 12, 2)
    return grid_sample(x, grid.to(x.dtype)).to(dtype)


WARP = r"""
// ---- warp -----------------------------------------------------------------------------------

struct Images { int C, H, W, OH, OW; };  // x: (N, C, H, W), y: (N, C, OH, OW)
struct Axis { int side, first, count; };  // the pixels within reach: first <= 0 and following
struct Reading { int j; float here, next; };  // here u[j] + next u[j + 1]
constexpr int CHANNELS = 4;  // at a time

__device__ __forceinline__ Axis axis(const float* reach, int k, int side) {
    int before = int(fminf(fmaxf(reach[k], 0), side - 1));
    int after = int(fminf(fmaxf(reach[2 + k], 0), side - 1));
    return {side, -before, before + side + after};
}
__device__ __forceinline__ bool within(const Axis& s, int i, int scale = 1) {
    return unsigned(i - s.first * scale) < unsigned(s.count * scale);
}

// The map of a sample: output (a, b), counted from the centre, is read at x(a, row_x(b)) and
// y(a, row_y(b)) of the upsampled image. Explicit fmaf: both kernels find the very same places.
struct Map {
    float xx, xy, x0, yx, yy, y0;
    __device__ __forceinline__ Map(const float* G, const Images& p) {
        xx = G[0]; xy = G[1]; x0 = fmaf(2, G[2], p.W - 1);
        yx = G[3]; yy = G[4]; y0 = fmaf(2, G[5], p.H - 1);
    }
    __device__ __forceinline__ float row_x(float b) const { return fmaf(xy, b, x0); }
    __device__ __forceinline__ float row_y(float b) const { return fmaf(yy, b, y0); }
    __device__ __forceinline__ float x(float a, float row) const { return fmaf(xx, a, row); }
    __device__ __forceinline__ float y(float a, float row) const { return fmaf(yx, a, row); }
};

// Bilinear reading at q, which becomes a place where all is 0 if it is far off or not a number.
__device__ __forceinline__ Reading reading(const Axis& s, float q) {
    q = fminf(fmaxf(q, 2 * s.first - 2), 2 * (s.first + s.count));
    float whole = floorf(q), t = q - whole;
    int j = int(whole);
    return {j, within(s, j, 2) ? 1 - t : 0, within(s, j + 1, 2) ? t : 0};
}
// What pixel i contributes to it. taps: two zeros, 2 f, two zeros.
__device__ __forceinline__ float contribution(const Axis& s, const Reading& r, const float* taps,
                                              int i) {
    int k = within(s, i) ? min(max(r.j - 2 * i + 7, 0), 14) : 0;
    return r.here * taps[k] + r.next * taps[k + 1];
}
__device__ __forceinline__ void load_taps(float* taps, const float* f) {
    int k = threadIdx.y * 8 + threadIdx.x;
    if (k < 16) taps[k] = k >= 2 && k < 14 ? 2 * f[k - 2] : 0;
    __syncthreads();
}
__device__ __forceinline__ int reflected(const Axis& s, int i) {
    i = i < 0 ? -i : i >= s.side ? 2 * (s.side - 1) - i : i;
    return min(max(i, 0), s.side - 1);  // what is beyond reach counts nothing
}

// The sum of 7 pixels of a row, which are neighbours in memory or not.
template <bool NEAR, class T>
__device__ __forceinline__ float weighted(const T* row, const float* cx, const int* ix) {
    if (NEAR) row += ix[0];
    float sum = 0;
#pragma unroll
    for (int k = 0; k < 7; k++) sum += cx[k] * to_float(row[NEAR ? k : ix[k]]);
    return sum;
}

// A thread has one pixel, all channels; a warp has 4 rows of 8, which stay neighbours when turned.
struct Pixel {
    int n, x, y;
    __device__ __forceinline__ Pixel(int H, int W) {
        int wide = (W + 7) / 8, high = (H + 15) / 16, tile = blockIdx.x % (wide * high);
        n = blockIdx.x / (wide * high);
        x = tile % wide * 8 + threadIdx.x;
        y = tile / wide * 16 + threadIdx.y;
    }
};

template <class T>
__global__ void __launch_bounds__(128) warp_kernel(Images p, const T* x, const float* G,
                                                   const float* reach, const float* f, T* y) {
    __shared__ float taps[16];
    load_taps(taps, f);
    Pixel o(p.OH, p.OW);
    if (o.x >= p.OW || o.y >= p.OH) return;
    Axis across = axis(reach, 0, p.W), down = axis(reach, 1, p.H);
    Map map(G + o.n * 6, p);
    float a = o.x + 1 - p.OW / 2, b = o.y + 1 - p.OH / 2;
    Reading rx = reading(across, map.x(a, map.row_x(b)));
    Reading ry = reading(down, map.y(a, map.row_y(b)));
    // Odd and even j alike have their 6 or 7 pixels around these. Where they are mirrored, they go
    // the other way across, so that nearly always they are neighbours in memory.
    int mid = (rx.j + (rx.j & 1)) / 2, top = (ry.j + (ry.j & 1)) / 2 - 3;
    int step = mid < 0 || mid >= p.W ? -1 : 1;
    float cx[7];
    int ix[7];
#pragma unroll
    for (int k = 0; k < 7; k++) {
        cx[k] = contribution(across, rx, taps, mid + (k - 3) * step);
        ix[k] = reflected(across, mid + (k - 3) * step);
    }
    bool near = ix[6] - ix[0] == 6;
    int64_t size = int64_t(p.H) * p.W, out = int64_t(p.OH) * p.OW;
    x += o.n * p.C * size;
    y += o.n * p.C * out + int64_t(o.y) * p.OW + o.x;
    for (int c0 = 0; c0 < p.C; c0 += CHANNELS) {
        float sum[CHANNELS] = {};
#pragma unroll 1
        for (int i = top; i < top + 7; i++) {
            float cy = contribution(down, ry, taps, i);
            const T* row = x + c0 * size + reflected(down, i) * p.W;
#pragma unroll
            for (int c = 0; c < CHANNELS; c++, row += size) {
                if (c0 + c >= p.C) break;
                sum[c] += cy * (near ? weighted<true>(row, cx, ix) : weighted<false>(row, cx, ix));
            }
        }
#pragma unroll
        for (int c = 0; c < CHANNELS; c++)
            if (c0 + c < p.C) y[(c0 + c) * out] = from_float<T>(sum[c]);
    }
}

// The adjoint: pixel i and each of its mirror images m within reach gather from the outputs that
// read them. Those have |q - 2 m - 1/2| <= 6.5 on both axes, a parallelogram of (a, b): its rows
// and, in each, its columns, with a little more for rounding; contribution() then decides. Where a
// map has no inverse, a division by 0 makes a bound infinite: all rows, or all columns. One that is
// not finite reads nothing.
template <class T>
__global__ void __launch_bounds__(128) warp_adjoint_kernel(Images p, const T* y, const float* G,
                                                           const float* reach, const float* f,
                                                           T* x) {
    constexpr float FAR = 6.6f;
    __shared__ float taps[16];
    load_taps(taps, f);
    Pixel i(p.H, p.W);
    if (i.x >= p.W || i.y >= p.H) return;
    Axis across = axis(reach, 0, p.W), down = axis(reach, 1, p.H);
    Map map(G + i.n * 6, p);
    float det = float(double(map.xx) * map.yy - double(map.xy) * map.yx);
    float bx = -map.yx / det, by = map.xx / det, high = FAR * (fabsf(bx) + fabsf(by));
    float ax = 1 / map.xx, ay = 1 / map.yx;
    float a0 = 1 - p.OW / 2, a1 = p.OW / 2, b0 = 1 - p.OH / 2, b1 = p.OH / 2;  // first and last
    int mirrors = isfinite(det + map.x0 + map.y0) ? 9 : 0;
    int64_t size = int64_t(p.H) * p.W, out = int64_t(p.OH) * p.OW;
    x += i.n * p.C * size + int64_t(i.y) * p.W + i.x;
    for (int c0 = 0; c0 < p.C; c0 += CHANNELS) {
        const T* from = y + (i.n * int64_t(p.C) + c0) * out;
        float sum[CHANNELS] = {};
        for (int mirror = 0; mirror < mirrors; mirror++) {
            int kx = mirror % 3, ky = mirror / 3;
            int mx = kx == 0 ? i.x : kx == 1 ? -i.x : 2 * (p.W - 1) - i.x;
            int my = ky == 0 ? i.y : ky == 1 ? -i.y : 2 * (p.H - 1) - i.y;
            if ((kx && mx == i.x) || (ky && my == i.y)) continue;  // on the mirror itself
            if (!within(across, mx) || !within(down, my)) continue;
            float qx = 2 * mx + 0.5f, qy = 2 * my + 0.5f;
            float middle = bx * (qx - map.x0) + by * (qy - map.y0);
            float low = fmaxf(ceilf(middle - high), b0), top = fminf(floorf(middle + high), b1);
            for (float b = low; b <= top; b++) {
                float rx = map.row_x(b), ry = map.row_y(b);
                float x0 = (qx - FAR - rx) * ax, x1 = (qx + FAR - rx) * ax;
                float y0 = (qy - FAR - ry) * ay, y1 = (qy + FAR - ry) * ay;
                float left = fmaxf(fminf(x0, x1), fminf(y0, y1));
                float right = fminf(fmaxf(x0, x1), fmaxf(y0, y1));
                left = fmaxf(ceilf(left), a0);
                right = fminf(right, a1);
                if (!(left <= right)) continue;
                const T* at = from + int64_t(b - b0) * p.OW + int(left - a0);
                for (float a = left; a <= right; a++, at++) {
                    float w = contribution(across, reading(across, map.x(a, rx)), taps, mx) *
                              contribution(down, reading(down, map.y(a, ry)), taps, my);
#pragma unroll
                    for (int c = 0; c < CHANNELS; c++)
                        if (c0 + c < p.C) sum[c] += w * to_float(at[c * out]);
                }
            }
        }
#pragma unroll
        for (int c = 0; c < CHANNELS; c++)
            if (c0 + c < p.C) x[(c0 + c) * size] = from_float<T>(sum[c]);
    }
}

template <class T>
static void warp_type(int adjoint, int N, const Images& p, cudaStream_t s, const void* from,
                      const float* G, const float* reach, const float* f, void* to) {
    int64_t H = adjoint ? p.H : p.OH, W = adjoint ? p.W : p.OW;
    dim3 grid((unsigned)(N * ((H + 15) / 16) * ((W + 7) / 8))), block(8, 16);
    auto k = warp_kernel<T>;
    if (adjoint) k = warp_adjoint_kernel<T>;
    LAUNCH(k, grid, block, 0, s, p, (const T*)from, G, reach, f, (T*)to);
}
extern "C" int warp(int adjoint, int type, int N, int C, int H, int W, const void* from,
                    const void* G, const void* reach, const void* f, void* to, void* stream) {
    Images p = {C, H, W, 2 * H + 12, 2 * W + 12};
    auto k = warp_type<float>;
    if (type == 1) k = warp_type<__half>;
    if (type == 2) k = warp_type<__nv_bfloat16>;
    k(adjoint, N, p, (cudaStream_t)stream, from, (const float*)G, (const float*)reach,
      (const float*)f, to);
    return cudaGetLastError();
}
"""


def warp(x, G, reach, f, impl=None):
    """Images x (N, C, H, W), at twice the resolution and mapped by G -> (N, C, 2H + 12, 2W + 12).

    G: (N, 2, 3), from output to input positions, in pixels of x from its centre, x to the right, y
    down; the output's n-th pixel from the centre lies at n / 2. f: 12 taps, of sum 1; half of its
    length in pixels of x is the rim around the output. reach: (2, 2), whole numbers up to W - 1 and
    H - 1: pixels beyond the image (x, y) to the left and up, to the right and down, that reflection
    fills; beyond is 0. Twice differentiable in x; the others get no gradient. Raises ValueError for
    other shapes.
    """
    if tuple(f.shape) != (12,):
        raise ValueError(f"a lowpass of 12 taps is needed, not {tuple(f.shape)}")
    if tuple(G.shape) != (len(x), 2, 3) or tuple(reach.shape) != (2, 2):
        raise ValueError(f"G {tuple(G.shape)}, reach {tuple(reach.shape)} for {tuple(x.shape)}")
    if any(t.device != x.device for t in (G, reach, f)):
        raise ValueError(f"G, reach and f have to be on {x.device}")
    if kernels(x, impl) is None:  # on a CPU it costs nothing to look how far the batch reaches
        most = int(reach.max()) if x.device.type == "cpu" else max(x.shape[2:])
        return warp_ref(x, G, reach, f, most)
    return Warp.apply(x, *(t.float().contiguous() for t in (G, reach, f)), False)


class Warp(Function):
    """x -> y; adjoint: dy -> dx."""

    @staticmethod
    def forward(ctx, x, G, reach, f, adjoint):
        ctx.save_for_backward(G, reach, f)
        ctx.adjoint = adjoint
        N, C, *sides = x.shape
        to = x.new_empty(N, C, *(n // 2 - 6 if adjoint else 2 * n + 12 for n in sides))
        if to.numel():
            small = to if adjoint else x
            x = x.contiguous()
            launch(
                kernels(x, "cuda").warp, x, adjoint, DTYPES[x.dtype], *small.shape,
                *map(pointer, (x, G, reach, f, to)),
            )  # fmt: skip
        return to

    @staticmethod
    def backward(ctx, gy):
        return (Warp.apply(gy, *ctx.saved_tensors, not ctx.adjoint), *[None] * 4)


# What is compiled.
SOURCE = PRELUDE + FUSED_ACT[1:] + NORM_ACT[1:] + UPFIRDN2D[1:] + WARP[1:]


# =============================================================================
# python ops_cuda.py: checks and measurements
# =============================================================================

ROUNDING = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of the largest value
SHAPES = [(2, 16, 9, 8), (3, 5, 7, 3), (2, 24, 33, 40), (1, 8, 1, 1)]
TRAINING = [(32, 64, 256, 256), (32, 256, 64, 64), (8, 64, 512, 512)]
ORDERS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}


def operators(N, C, H, W, device):
    """{name: (function of x and impl, further tensors that it trains)}."""
    torch.manual_seed(0)  # the same numbers on every machine
    b, scale, noise = torch.randn(C), torch.rand(N, C) + 0.5, torch.randn(N, 1, H, W)
    small = [t.to(device) for t in (scale, noise, torch.tensor(0.7), b)]
    f2 = setup_filter([1, 1], separable=True, device=device)
    f4 = setup_filter([1, 3, 3, 1], separable=True, device=device)
    f12 = setup_filter([1, 2, 3, 4, 5, 6, 6, 5, 4, 3, 2, 1], device=device)
    G = (torch.eye(2, 3) + 0.3 * torch.randn(N, 2, 3)).to(device)
    reach = torch.tensor([[W - 1.0, H - 1.0], [W // 2, 0.0]], device=device)

    def fir(f, **options):
        edge = len(f) // 2
        pad = (edge, edge - 1, edge, edge - 1)
        return lambda x, impl, *_: upfirdn2d(x, f.to(x.dtype), padding=pad, impl=impl, **options)

    def warped(x, impl):
        exact = torch.promote_types(x.dtype, torch.float32)
        return warp(x, G.to(exact), reach, f12, impl)

    far = 6 * scale.sub(1).sign().to(device)  # of 0, the kink, for most x
    of_many_pixels = {
        "norm, lrelu": (lambda x, impl, *t: norm_act(x, *t, "lrelu", impl=impl), [small[0], far]),
        "norm, pad": (lambda x, impl, *_: norm_act(x, pad=1, impl=impl), []),
        "box, blur": (lambda x, impl, *_: box_then_blur(x, impl=impl), []),
    }
    return (of_many_pixels if H * W > 1 else {}) | {
        "bias_act": (lambda x, impl, b: bias_act(x, b, act="lrelu", impl=impl), small[3:]),
        "fused_act": (
            lambda x, impl, s, t, b: fused_act(x, s, small[1], t, b, "lrelu", clamp=1, impl=impl),
            [small[0], *small[2:]],
        ),
        "modulate": (lambda x, impl, s: fused_act(x, s, impl=impl), small[:1]),
        "upsample, 2 taps": (fir(f2, up=2, gain=4), []),
        "downsample, 2 taps": (fir(f2, down=2), []),
        "filter, 4 taps": (fir(f4), []),
        "upsample, 4 taps": (fir(f4, up=2, gain=4), []),
        "downsample, 4 taps": (fir(f4, down=2), []),
        "blur, box": (lambda x, impl, *_: blur_then_box(x, impl=impl), []),
        "filter, 12 taps": (fir(f12), []),
        "upsample, 12 taps": (fir(f12, up=2, gain=4), []),
        "downsample, 12 taps": (fir(f12, down=2), []),
        "warp": (warped, []),
    }


def derivatives(function, impl, tensors, v):
    """y, the gradients of sum(y v), and those of the sum of their mean squares. The first ones as
    training has them: those with a graph of their own can come from elsewhere."""
    tensors = [t.detach().clone().requires_grad_() for t in (*tensors, v.to(tensors[0].dtype))]
    *inputs, v = tensors
    y = function(inputs[0], impl, *inputs[1:])
    first = torch.autograd.grad(y, inputs, v, retain_graph=True)
    again = torch.autograd.grad(y, inputs, v, create_graph=True)
    energy = sum(g.double().square().mean() for g in again)
    second = torch.autograd.grad(energy, tensors, allow_unused=True)
    return [
        torch.zeros_like(t) if g is None else g
        for t, g in zip([y, *inputs, *tensors], [y, *first, *second], strict=True)
    ]


def away_from_kinks(x, function):
    """x, drawn anew where y = function(x) has a kink so near, at 0 or at the clamp of 1, that
    rounding decides about its slope."""
    step = 0.05 * torch.randn(x.shape).sign().to(x.device)  # a norm takes out one for all
    while True:
        below, above = function(x.float() - step), function(x.float() + step)
        near = ((below > 0) != (above > 0)) | ((below.abs() >= 1) != (above.abs() >= 1))
        if not near.any():
            return x
        x = torch.where(near, torch.randn(x.shape).to(x), x)


def check(device):
    """Compares every kernel with its reference in float64, to second order. Returns the number of
    cases that are off, and prints them, and a line for each operator.

    References run on the CPU: a GPU would look for an algorithm, or compile one, for each of
    hundreds of convolutions.
    """
    wrong, count = 0, 0
    tables = {shape: [operators(*shape, d) for d in (device, "cpu")] for shape in SHAPES}
    for name in tables[SHAPES[0]][0]:
        agreed, cases = 0, 0
        for shape, dtype in itertools.product(SHAPES, ROUNDING):
            if name not in tables[shape][0]:  # too small for it
                continue
            (function, more), (reference, more_exact) = (t[name] for t in tables[shape])
            x = torch.randn(shape).to(dtype)
            if name.endswith("act"):
                x = away_from_kinks(x, lambda x: reference(x, "ref", *more_exact))  # noqa: B023
            exact = [t.double() for t in (x, *more_exact)]
            v = torch.randn(reference(exact[0], "ref", *exact[1:]).shape).to(dtype)
            wanted = derivatives(reference, "ref", exact, v)
            for order, memory in ORDERS.items():
                inputs = [x.to(device).contiguous(memory_format=memory), *more]
                mine = derivatives(function, "cuda", inputs, v.to(device))
                off = max(
                    ((a.cpu().double() - b).abs().max() / b.abs().max().clamp(min=1e-3)).item()
                    for a, b in zip(mine, wanted, strict=True)
                )
                cases += 1
                agreed += off <= ROUNDING[dtype]
                if not off <= ROUNDING[dtype]:
                    print(f"WRONG {name} {tuple(shape)} {dtype} {order}: off by {off:.2g}")
        print(f"{name}: {agreed} of {cases} cases agree", flush=True)
        wrong, count = wrong + cases - agreed, count + cases
    print(f"{count - wrong} of {count} cases agree with float64: values, first and second"
          " gradients")  # fmt: skip
    return wrong


def milliseconds(function, repeats=9):
    """Median time of a call on the GPU."""
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[3:])[repeats // 2]


def copy_speed(device):
    """GB/s of a copy of 1 GB, read and written."""
    x = torch.empty(2**28, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / milliseconds(lambda: y.copy_(x)) / 1e6


def measure(device, shapes=TRAINING):
    """Prints time, GB/s and percent of a copy's GB/s for forward and backward passes."""
    copy = copy_speed(device)
    print(f"copy: {copy:.0f} GB/s\n")
    print("| operator | shape | type | order | pass | ms | GB/s | of copy |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for shape in shapes:
        for name, (function, more) in operators(*shape, device).items():
            N, C, H, W = shape
            sides = (N, min(C, 3), H, W) if name == "warp" else shape  # it is for images
            for dtype in (torch.float16, torch.float32):
                for order, memory in ORDERS.items():
                    what = f"{name} | {'x'.join(map(str, sides))} | {str(dtype)[6:]} | {order}"
                    x = torch.randn(sides, device=device).to(dtype, memory_format=memory)
                    for kind, ms, size in passes(name, function, x, more):
                        speed = size / ms / 1e6
                        row = f"| {what} | {kind} | {ms:.3f} | {speed:.0f} | {speed / copy:.0%} |"
                        print(row, flush=True)


def passes(name, function, x, more):
    """(forward or backward, milliseconds, bytes that have to be moved at least)."""
    inputs = [t.requires_grad_() for t in (x, *more)]
    y = function(x, "cuda", *more)
    v = torch.randn_like(y)
    ms = milliseconds(lambda: function(x, "cuda", *more))
    yield "forward", ms, x.nbytes + y.nbytes
    ms = milliseconds(lambda: torch.autograd.grad(y, inputs, v, retain_graph=True))
    also = {"bias_act": y.nbytes, "fused_act": x.nbytes + y.nbytes, "modulate": x.nbytes}
    also |= {"norm, lrelu": x.nbytes, "norm, pad": x.nbytes}
    yield "backward", ms, x.nbytes + y.nbytes + also.get(name, 0)


def main():
    p = argparse.ArgumentParser(description="Checks the CUDA kernels, and measures their speed.")
    p.add_argument("what", nargs="?", choices=("check", "measure"), help="default: both")
    what = p.parse_args().what
    if not torch.cuda.is_available():
        print(
            "ops_cuda.py: no CUDA device. On a CPU the PyTorch expressions are used; there is"
            " nothing to check.",
            file=sys.stderr,
        )
        return 2
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    began = time.monotonic()
    if build(torch.cuda.get_device_capability()) is None:
        return 1
    print(f"kernels ready after {time.monotonic() - began:.1f} s", flush=True)
    wrong = 0 if what == "measure" else check(device)
    if what != "check":
        measure(device)
    print(f"{time.monotonic() - began:.0f} s")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
