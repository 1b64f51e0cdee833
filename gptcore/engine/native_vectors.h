// Vectors of sixteen numbers, bf16, and memory in huge pages: what all parts of the native kernel compute with.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16, PANEL = 64, GROUPS = PANEL / LANES, K_STEP = 32, TILE_ROWS = 16, CACHE_LINE = 64;

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IntVec __attribute__((vector_size(64)));
typedef uint32_t BitVec __attribute__((vector_size(64)));
typedef uint16_t HalfVec __attribute__((vector_size(32)));

struct bf16 {
    uint16_t bits;
};

constexpr IntVec LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline Vec broadcast(float x) { return Vec{} + x; }

inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline Vec load(const bf16* p) {
    HalfVec h;
    std::memcpy(&h, p, sizeof h);
    return (Vec)(__builtin_convertvector(h, BitVec) << 16);
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline void store(bf16* p, Vec v) {  // rounds to nearest, ties to even
    BitVec b = (BitVec)v;
    HalfVec h = __builtin_convertvector((b + 0x7fff + ((b >> 16) & 1)) >> 16, HalfVec);
    std::memcpy(p, &h, sizeof h);
}

inline float sum(Vec v) {
    float s = 0;
    for (int i = 0; i < LANES; i++) s += v[i];
    return s;
}

// exp(x) for x <= 88, relative error below 2e-7: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (as in Cephes).
inline Vec exponential(Vec x) {
    x = x < broadcast(-87.0f) ? broadcast(-87.0f) : x;
    Vec n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * (Vec)((__builtin_convertvector(n, IntVec) + 127) << 23);
}

inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exponential(x > broadcast(-80.0f) ? -x : broadcast(80.0f))); }
inline Vec silu(Vec x) { return x * sigmoid(x); }
inline Vec gelu(Vec x) {  // the tanh approximation: x/2 (1 + tanh u) = x sigmoid(2u)
    return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
}

// Prefetches `count` values into the L2 cache. Any address is allowed.
template <class T>
inline void prefetch(const T* p, int count) {
    for (int i = 0; i < count; i += CACHE_LINE / (int)sizeof(T)) __builtin_prefetch(p + i, 0, 2);
}

inline int round_up(int n, int to) { return (n + to - 1) / to * to; }

// Allocates zeroed memory, in huge pages if the system has them. With small pages, reading the weights misses the TLB.
struct Free {
    void operator()(void* p) const { std::free(p); }
};
template <class T>
using Block = std::unique_ptr<T[], Free>;

template <class T>
Block<T> allocate(size_t count) {
    constexpr size_t HUGE_PAGE = 2 << 20;
    size_t bytes = (std::max<size_t>(count * sizeof(T), 64) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    void* p = nullptr;
    if (posix_memalign(&p, HUGE_PAGE, bytes)) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(p, bytes, MADV_HUGEPAGE);
#endif
    std::memset(p, 0, bytes);
    return Block<T>((T*)p);
}

template <class T>
void put(T* to, float x);
template <>
void put(float* to, float x) { *to = x; }
template <>
void put(bf16* to, float x) {
    uint32_t b;
    std::memcpy(&b, &x, 4);
    to->bits = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
}

inline float value(float x) { return x; }
inline float value(bf16 x) {
    uint32_t b = (uint32_t)x.bits << 16;
    float f;
    std::memcpy(&f, &b, 4);
    return f;
}

}  // namespace
