"""Run CUDA C kernels on the CPU: compile the unchanged source with g++ against a tiny CUDA.

The headers below take the place of CUDA's own. A launch runs the blocks one after another, and
the threads of a block as fibers (stacks that take turns on one CPU thread). A fiber runs thread
after thread for as long as they return without waiting; a thread that waits at a __syncthreads()
or a shuffle keeps its fiber, and a fresh one carries on with the next thread. Once every thread
of the block has returned or waits, those whose partners have all arrived go on. So it is the
kernel's logic that is tested: neither its speed nor its races. For the latter, set the library's
int emulated_reverse to 1: blocks and threads then run last to first, and most missing barriers show
as a wrong result in one of the two orders.

What g++ cannot parse, the source writes as two macros that it defines itself for nvcc:
    #ifndef LAUNCH
    #define LAUNCH(kernel, grid, block, shared, stream, ...) \\
      kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
    #define SHARED_FLOATS(name) extern __shared__ __align__(16) float name[]
    #endif
A kernel with template arguments goes to LAUNCH in parentheses or as a pointer held in a variable.

A launch that CUDA would refuse sets the same kind of error for cudaGetLastError. A deadlock, or a
write just past the end of the dynamic shared memory, aborts with a message; a misaligned vector
access, or an index past the end of an array of known size, traps (SIGILL). Dynamic shared memory
starts as NaN, and so does what a shuffle reads from a lane that takes no part in it.
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
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <algorithm>
#include <functional>
#include <mutex>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static  // one copy will do, as only one block runs at a time
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define LAUNCH(kernel, grid, block, shared, stream, ...) \
  emulated::launch(kernel, grid, block, shared, stream, ##__VA_ARGS__)
#define SHARED_FLOATS(name) float* name = reinterpret_cast<float*>(emulated::shared.data())

#define VECTORS(T, name) \
  struct alignas(8) name##2 { T x, y; }; \
  struct name##3 { T x, y, z; }; \
  struct alignas(16) name##4 { T x, y, z, w; }; \
  static inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  static inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  static inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTORS(float, float)
VECTORS(int, int)
VECTORS(unsigned, uint)
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;
constexpr int warpSize = 32;

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration = 9 };
typedef struct CUstream_st* cudaStream_t;

extern "C" { int emulated_reverse = 0; }  // 1: blocks and threads run last to first

namespace emulated {
enum State { running, idle, at_barrier, at_shuffle };
struct Fiber {
  State state = running;
  unsigned thread, mask, source;  // thread: index in the block; source: whose value it wants
  uint64_t value, result;         // what a shuffle takes from this thread and gives to it
  bool started = false;
  jmp_buf context;
  alignas(16) char stack[65536];
};
static std::vector<Fiber*> idle_fibers;  // kept for the next block
static std::vector<Fiber*> waiting;      // by thread; null for one that runs or has returned
static std::function<void()> body;       // the kernel with its arguments
static std::vector<float4> shared;       // the dynamic shared memory, then a guard
static Fiber* current;
static jmp_buf scheduler;
static unsigned threads, next_thread;  // of this block: how many, and how many have started
static cudaError_t last_error;
static std::mutex one_launch;

[[noreturn]] static void fail(const char* why) {
  const uint3 b = blockIdx;
  fprintf(stderr, "emulated CUDA, block (%u, %u, %u): %s\n", b.x, b.y, b.z, why);
  abort();
}
static void set_thread(unsigned t) {
  current->thread = t;
  threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
}
__noinline__ static void wait(State state) {
  current->state = state;
  if (state == idle) idle_fibers.push_back(current);
  else waiting[current->thread] = current;
  if (!_setjmp(current->context)) _longjmp(scheduler, 1);
}
static unsigned ordered(unsigned i, unsigned n) { return emulated_reverse ? n - 1 - i : i; }
static void fiber_main() {
  for (;; wait(idle))
    while (next_thread < threads) set_thread(ordered(next_thread++, threads)), body();
}
__noinline__ static void resume(Fiber* fiber) {  // until it waits
  current = fiber;
  fiber->state = running;
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
static bool may_shuffle(Fiber* fiber) {  // every thread in the mask has returned or is here too
  fiber->result = ~0ull;
  for (unsigned lane = 0, t = fiber->thread & ~31u; lane < 32 && t < threads; ++lane, ++t) {
    if (!(fiber->mask >> lane & 1) || !waiting[t]) continue;
    if (waiting[t]->state != at_shuffle) return false;
    if (t == fiber->source && waiting[t]->mask == fiber->mask) fiber->result = waiting[t]->value;
  }
  return true;
}
static void run_block() {
  waiting.assign(threads, nullptr);
  memset(shared.data(), 0xff, shared.size() * sizeof(float4));
  for (next_thread = 0;;) {
    while (next_thread < threads) {
      if (idle_fibers.empty()) idle_fibers.push_back(new Fiber);
      Fiber* fiber = idle_fibers.back();
      idle_fibers.pop_back();
      resume(fiber);
    }
    std::vector<Fiber*> here[2], ready;  // at a barrier, at a shuffle
    for (unsigned i = 0; i < threads; ++i)
      if (Fiber* f = waiting[ordered(i, threads)]) here[f->state == at_shuffle].push_back(f);
    for (Fiber* f : here[1])
      if (may_shuffle(f)) ready.push_back(f);
    if (here[1].empty()) ready = here[0];
    if (here[0].empty() && here[1].empty()) return;
    if (ready.empty()) fail("deadlock: a shuffle waits for threads that are at __syncthreads()");
    for (Fiber* f : ready) waiting[f->thread] = nullptr;
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
  else if (bytes > 48 << 10)
    last_error = cudaErrorInvalidValue;
  else {
    threads = size, gridDim = grid, blockDim = block;
    body = [=] { kernel(args...); };
    shared.resize((bytes + 15) / 16 + 64);
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    for (uint64_t i = 0; i < blocks; ++i) {
      const uint64_t b = emulated_reverse ? blocks - 1 - i : i;
      blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y),
                  unsigned(b / grid.x / grid.y)};
      run_block();
      const char* end = reinterpret_cast<const char*>(shared.data() + shared.size());
      for (const char* p = reinterpret_cast<const char*>(shared.data()) + bytes; p < end; ++p)
        if (*p != char(0xff)) fail("a write past the end of the dynamic shared memory");
    }
  }
}
template <class To, class From> To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits() keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
// a value of another lane: of one below `width` lanes of the warp, or else of the thread's own
template <class T> T shuffle(unsigned mask, T value, unsigned lane, int width) {
  static_assert(sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
  const unsigned t = current->thread;
  current->mask = mask;
  current->source = lane > (t % 32 | (width - 1)) ? t : (t & ~31u) + lane;
  memcpy(&current->value, &value, sizeof value);
  wait(at_shuffle);
  memcpy(&value, &current->result, sizeof value);
  return value;
}
}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::at_barrier); }
inline void __syncwarp(unsigned mask = ~0u) { emulated::shuffle(mask, 0, 0, 32); }
template <class T> T __shfl_xor_sync(unsigned mask, T value, int d, int width = 32) {
  return emulated::shuffle(mask, value, emulated::current->thread % 32 ^ d, width);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned d, int width = 32) {
  return emulated::shuffle(mask, value, emulated::current->thread % 32 + d, width);
}
template <class T> T atomicAdd(T* p, typename emulated::Same<T>::type value) {
  return std::exchange(*p, *p + value);
}
template <class T> T __ldg(const T* p) { return *p; }
template <class A, class B> std::common_type_t<A, B> min(A a, B b) {
  return std::min<std::common_type_t<A, B>>(a, b);
}
template <class A, class B> std::common_type_t<A, B> max(A a, B b) {
  return std::max<std::common_type_t<A, B>>(a, b);
}
#define __expf(x) expf(x)  // a macro, as math.h declares a function of this name
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
struct alignas(4) __half2 { __half x, y; };
inline float __half2float(__half value) { return float(value); }
inline __half __float2half_rn(float value) { return __half(value); }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline float2 __half22float2(__half2 v) { return {float(v.x), float(v.y)}; }
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
