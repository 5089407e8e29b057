"""Run CUDA C kernels on the CPU: compile the unchanged source with g++ against a tiny CUDA.

The headers below take the place of CUDA's own. A launch runs the blocks one after another, and
the threads of a block as fibers (stacks that take turns on one CPU thread). A fiber runs thread
after thread for as long as they return without waiting; a thread that waits at a __syncthreads()
keeps its fiber, and a fresh one carries on with the next thread. Once every thread of the block has
returned or waits, those that wait go on. So it is the kernel's logic that is tested: neither its
speed nor its races. For the latter, set the library's int emulated_reverse to 1: blocks and threads
then run last to first, and most missing barriers show as a wrong result in one of the two orders.

What g++ cannot parse, the source writes as a macro that it defines itself for nvcc:
    #ifndef LAUNCH
    #define LAUNCH(kernel, grid, block, shared, stream, ...) \\
      kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
    #endif
A kernel with template arguments goes to LAUNCH in parentheses or as a pointer held in a variable.

A launch that CUDA would refuse sets the same kind of error for cudaGetLastError, and so does one
that asks for dynamic shared memory, of which there is none here. A misaligned vector access, or an
index past the end of an array of known size, traps (SIGILL). What the kernels do not use, shuffles
and atomics say, does not compile.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HEADERS = {
    "cuda_runtime.h": r"""
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>
#include <algorithm>
#include <functional>
#include <mutex>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static  // one copy will do, as only one block runs at a time
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define LAUNCH(kernel, grid, block, shared, stream, ...) \
  emulated::launch(kernel, grid, block, shared, stream, ##__VA_ARGS__)

struct alignas(16) float4 { float x, y, z, w; };
struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration = 9 };
typedef struct CUstream_st* cudaStream_t;

extern "C" { int emulated_reverse = 0; }  // 1: blocks and threads run last to first

namespace emulated {
struct Fiber {
  unsigned thread;  // index in the block
  bool started = false;
  jmp_buf context;
  alignas(16) char stack[65536];
};
static std::vector<Fiber*> idle_fibers;  // kept for the next block
static std::vector<Fiber*> waiting;      // by thread; null for one that runs or has returned
static std::function<void()> body;       // the kernel with its arguments
static Fiber* current;
static jmp_buf scheduler;
static unsigned threads, next_thread;  // of this block: how many, and how many have started
static cudaError_t last_error;
static std::mutex one_launch;

static void set_thread(unsigned t) {
  current->thread = t;
  threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
}
__noinline__ static void wait(bool idle) {
  if (idle) idle_fibers.push_back(current);
  else waiting[current->thread] = current;
  if (!_setjmp(current->context)) _longjmp(scheduler, 1);
}
static unsigned ordered(unsigned i, unsigned n) { return emulated_reverse ? n - 1 - i : i; }
static void fiber_main() {
  for (;; wait(true))
    while (next_thread < threads) set_thread(ordered(next_thread++, threads)), body();
}
__noinline__ static void resume(Fiber* fiber) {  // until it waits
  current = fiber;
  if (_setjmp(scheduler)) return;
  if (fiber->started) set_thread(fiber->thread), _longjmp(fiber->context, 1);
  fiber->started = true;
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = fiber->stack;
  start.uc_stack.ss_size = sizeof fiber->stack;
  start.uc_link = nullptr;
  makecontext(&start, fiber_main, 0);
  setcontext(&start);
}
static void run_block() {
  waiting.assign(threads, nullptr);
  for (next_thread = 0;;) {
    while (next_thread < threads) {
      if (idle_fibers.empty()) idle_fibers.push_back(new Fiber);
      Fiber* fiber = idle_fibers.back();
      idle_fibers.pop_back();
      resume(fiber);
    }
    std::vector<Fiber*> ready;  // all threads that have not returned are at the barrier
    for (unsigned i = 0; i < threads; ++i)
      if (Fiber* f = std::exchange(waiting[ordered(i, threads)], nullptr)) ready.push_back(f);
    if (ready.empty()) return;
    for (Fiber* f : ready) resume(f);
  }
}
template <class T> struct Same { using type = T; };
template <class... P>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t bytes, cudaStream_t,
            typename Same<P>::type... args) {
  std::lock_guard<std::mutex> lock(one_launch);
  const uint64_t size = uint64_t(block.x) * block.y * block.z;
  if (!size || size > 1024 || block.z > 64 || !grid.x || !grid.y || !grid.z ||
      grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    last_error = cudaErrorInvalidConfiguration;
  else if (bytes)
    last_error = cudaErrorInvalidValue;
  else {
    threads = size, gridDim = grid, blockDim = block;
    body = [=] { kernel(args...); };
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    for (uint64_t i = 0; i < blocks; ++i) {
      const uint64_t b = emulated_reverse ? blocks - 1 - i : i;
      blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y),
                  unsigned(b / grid.x / grid.y)};
      run_block();
    }
  }
}
template <class To, class From> To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits() keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace emulated

inline void __syncthreads() { emulated::wait(false); }
template <class A, class B> std::common_type_t<A, B> min(A a, B b) {
  return std::min<std::common_type_t<A, B>>(a, b);
}
template <class A, class B> std::common_type_t<A, B> max(A a, B b) {
  return std::max<std::common_type_t<A, B>>(a, b);
}
inline cudaError_t cudaGetLastError() { return std::exchange(emulated::last_error, cudaSuccess); }
""",
    # Both 16-bit types convert explicitly only, so that arithmetic on them, which rounds on a GPU
    # after every step, does not compile here, instead of passing through float unnoticed.
    "cuda_fp16.h": r"""
#pragma once
#include "cuda_runtime.h"

namespace emulated {
inline uint16_t to_half(float value) {  // to nearest, ties to even
  const uint32_t x = bits<uint32_t>(value) & 0x7fffffff, sign = bits<uint32_t>(value) >> 31 << 15;
  if (x > 0x7f800000) return 0x7fff;
  if (x >= 0x47800000) return sign | 0x7c00;
  if (x < 0x38800000)  // subnormal: the sum with 0.5 rounds to the same steps of 2^-24
    return sign | (bits<uint32_t>(bits<float>(x) + 0.5f) - 0x3f000000);
  return sign | ((x - 0x38000000 + 0xfff + (x >> 13 & 1)) >> 13);
}
inline float from_half(uint16_t h) {
  const uint32_t x = h & 0x7fff, sign = uint32_t(h >> 15) << 31;
  if (x < 0x400) return bits<float>(sign | bits<uint32_t>(x * 0x1p-24f));
  return bits<float>(sign | ((x << 13) + (x < 0x7c00 ? 0x38000000 : 0x70000000)));
}
}  // namespace emulated

struct __half {
  uint16_t raw;
  __half() = default;
  explicit __half(float value) : raw(emulated::to_half(value)) {}
  explicit operator float() const { return emulated::from_half(raw); }
};
inline float __half2float(__half value) { return float(value); }
inline __half __float2half_rn(float value) { return __half(value); }
""",
    "cuda_bf16.h": r"""
#pragma once
#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t raw;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) {  // to nearest, ties to even
    const uint32_t x = emulated::bits<uint32_t>(value);
    raw = value != value ? 0x7fff : (x + 0x7fff + (x >> 16 & 1)) >> 16;
  }
  explicit operator float() const { return emulated::bits<float>(uint32_t(raw) << 16); }
};
inline float __bfloat162float(__nv_bfloat16 value) { return float(value); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return __nv_bfloat16(value); }
""",
}

FLAGS = [
    *("-O1", "-std=c++17", "-shared", "-fPIC", "-pthread"),
    "-fno-strict-aliasing",  # nvcc allows the casts to vector types
    "-ffp-contract=off",
    "-fno-gnu-unique",  # two libraries in one process share nothing
    "-U_FORTIFY_SOURCE",  # its longjmp refuses to change stacks
    "-fsanitize=alignment,bounds",
    "-fsanitize-undefined-trap-on-error",
]


def build(source: str, folder) -> Path:
    """Compile the CUDA C `source` for the CPU in `folder` and return the shared library's path.

    An unchanged source is compiled once. Without g++ on Linux, the calling test is skipped.
    """
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("emulating CUDA needs g++ on Linux")
    digest = hashlib.sha256(repr((source, HEADERS, FLAGS)).encode()).hexdigest()[:16]
    folder = Path(folder).resolve() / f"emulated_{digest}"
    library = folder / "kernels.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {**HEADERS, "kernels.cpp": source}.items():
        (folder / name).write_text(text)
    unfinished = folder / f"kernels.{os.getpid()}.so"
    command = ["g++", *FLAGS, f"-I{folder}", str(folder / "kernels.cpp"), "-o", str(unfinished)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ could not compile the kernels:\n{done.stderr}")
    os.replace(unfinished, library)
    return library
