// Matrix products with weights of 8 or 4 bits.
//
// Along k, 32 weights of one output column are a group with a scale in bf16. Activations are quantised to 8 bits in
// the same groups, row by row. The sum over a group is one of integers, and so exact; the groups' sums are added in
// fp32, in one accumulator per output, in ascending order. So a row's result does not depend on the other rows.

#pragma once

#include <vector>

#include "native_vectors.h"

namespace {

constexpr int GROUP = 32, QUAD = 4, MOST_QUANTISED_ROWS = 4, GROUPS_AT_ONCE = 16, FETCH_BYTES = 4096;

// What the processor multiplies bytes with; plain AVX2 needs another order of activations and other instructions.
#if defined(__AVX512VNNI__)
constexpr const char* QUANTISED_KERNEL = "avx512-vnni";
#elif defined(__AVXVNNI__)
constexpr const char* QUANTISED_KERNEL = "avx-vnni";
#elif defined(__AVX2__)
constexpr const char* QUANTISED_KERNEL = "avx2";
#define PLAIN_AVX2 1
#else
constexpr const char* QUANTISED_KERNEL = "generic";
#endif

// A function of its own: neither inlined nor specialised for an argument, which may round differently.
#ifdef __clang__
#define ONCE __attribute__((noinline))
#else
#define ONCE __attribute__((noinline, noclone))
#endif

// One register of sums, each of one output column. Every lane reads four weights of its column.
#ifdef __AVX512VNNI__
constexpr int SUMS = 16;
#else
constexpr int SUMS = 8;
#endif
typedef int32_t Sums __attribute__((vector_size(4 * SUMS)));
typedef uint32_t Quads __attribute__((vector_size(4 * SUMS)));
typedef float Totals __attribute__((vector_size(4 * SUMS)));
typedef uint16_t Scales __attribute__((vector_size(2 * SUMS)));

template <class V>
inline V read(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// --- weights -------------------------------------------------------------------------------------------------------

// The weight (N, K) of a linear layer. Each panel of 64 columns is a stream of groups: 64 scales, then the weights, to
// which `offset` is added. 8 bits: [k / 4][64][4]; 4 bits: [k / 8][64][4], the second four k in the high nibbles.
struct Quantised {
    int bits = 0, groups = 0;
    Block<uint8_t> data;

    int offset() const { return 1 << (bits - 1); }
    size_t group_bytes() const { return PANEL * (sizeof(bf16) + GROUP * bits / 8); }
    uint8_t* group(int panel, int g) const { return data.get() + ((size_t)panel * groups + g) * group_bytes(); }

    // Where the weight of a column of a group is, and how far it is shifted.
    uint8_t* place(uint8_t* group, int column, int k, int& shift) const {
        int step = bits == 8 ? k / QUAD : k / (2 * QUAD);
        shift = bits == 8 ? 0 : k / QUAD % 2 * 4;
        return group + PANEL * sizeof(bf16) + ((size_t)step * PANEL + column) * QUAD + k % QUAD;
    }
    void put_group(int panel, int g, int column, float scale, const int8_t* q) {
        uint8_t* to = group(panel, g);
        put((bf16*)to + column, scale);
        for (int k = 0; k < GROUP; k++) {
            int shift;
            uint8_t* byte = place(to, column, k, shift);
            *byte |= (q[k] + offset()) << shift;
        }
    }
    float weight(int panel, int column, int k) const {
        int shift;
        uint8_t* from = group(panel, k / GROUP);
        int q = *place(from, column, k % GROUP, shift) >> shift & ((1 << bits) - 1);
        return (q - offset()) * value(((bf16*)from)[column]);
    }
};

inline Vec nearest(Vec x) { return (x + 12582912.0f) - 12582912.0f; }  // 1.5 * 2^23: for |x| <= 2^22

inline float rounded(float x) {
    bf16 b;
    put(&b, x);
    return value(b);
}

// The scale with which 32 numbers, rounded to whole multiples of it, have nearly the least squared error. For each of
// some roundings, the best scale is a least-squares fit; with 8 bits the plain one is good enough.
inline float best_scale(const Vec (&x)[2], int bits) {
    int most = (1 << (bits - 1)) - 1;
    float largest = 0;  // with its sign, as there is one more negative number than positive ones
    for (const Vec& v : x)
        for (int i = 0; i < LANES; i++) largest = std::fabs(v[i]) > std::fabs(largest) ? v[i] : largest;
    if (bits == 8 || largest == 0) return rounded(std::fabs(largest) / most);
    float best = 0, scale = 0;
    for (float steps = -most - 2.0f; steps <= -most + 1.5f; steps += 0.25f) {
        Vec products = {}, squares = {};
        for (const Vec& v : x) {
            Vec q = nearest(v * (steps / largest));
            q = q > (float)most ? broadcast(most) : q < -most - 1.0f ? broadcast(-most - 1) : q;
            products += q * v, squares += q * q;
        }
        float xq = sum(products), qq = sum(squares);
        if (xq * xq > best * qq) best = xq * xq / qq, scale = xq / qq;
    }
    return rounded(scale);
}

// Rounds a group of `count` weights to multiples q (32) of a scale, which it returns. It is compiled once, so that weights
// are rounded alike for a file and while a model is loaded.
template <class Source>
ONCE float quantise_group(const Source* weight, int count, int bits, int8_t* q) {
    int most = (1 << (bits - 1)) - 1, least = bits == 8 ? -most : -most - 1;
    alignas(64) float x[GROUP] = {};
    for (int k = 0; k < count; k++) x[k] = value(weight[k]);
    Vec pair[2] = {load(x), load(x + LANES)};
    float broken = 0 * (sum(pair[0]) + sum(pair[1]));  // NaN if a weight is, or is infinite: then all logits are
    float scale = best_scale(pair, bits) + broken, inverse = scale == 0 || broken != 0 ? 0 : 1 / scale;
    for (int k = 0; k < GROUP; k++) {
        int whole = inverse == 0 ? 0 : (int)std::nearbyint(x[k] * inverse);
        q[k] = std::min(std::max(whole, least), most);
    }
    return scale;
}

template <class Source>
void quantise_panel(Quantised& m, int panel, const Source* weight, int N, int K) {
    int8_t q[GROUP];
    for (int g = 0; g < m.groups; g++)
        for (int c = 0; c < PANEL; c++) {
            int row = panel * PANEL + c, count = row < N ? std::min(GROUP, K - g * GROUP) : 0;
            const Source* from = count ? weight + (size_t)row * K + g * GROUP : weight;
            float scale = quantise_group(from, count, m.bits, q);
            m.put_group(panel, g, c, scale, q);
        }
}

// A weight (N, K) that is quantised: values (N, K / 32, 32) and scales (N, K / 32).
struct Stored {
    const int8_t* values;
    const bf16* scales;
};

inline void quantise_panel(Quantised& m, int panel, Stored weight, int N, int) {
    const int8_t zeros[GROUP] = {};
    for (int g = 0; g < m.groups; g++)
        for (int c = 0; c < PANEL; c++) {
            int row = panel * PANEL + c;
            size_t i = (size_t)row * m.groups + g;
            m.put_group(panel, g, c, row < N ? value(weight.scales[i]) : 0, row < N ? weight.values + i * GROUP : zeros);
        }
}

// --- activations ---------------------------------------------------------------------------------------------------

#ifdef PLAIN_AVX2
constexpr bool SPREAD = true;
#else
constexpr bool SPREAD = false;
#endif

// 32 activations of one row. If SPREAD, those for 8-bit weights take 16 bits, and of four, the first is beside the third
// and the second beside the fourth.
struct Activations {
    int8_t values[SPREAD ? 2 * GROUP : GROUP];
    float scale;
    int32_t sum;
};

// Quantises a row of `groups` groups, for weights of `bits`.
template <class T>
void quantise(const T* x, int groups, int bits, Activations* to) {
    for (int g = 0; g < groups; g++, x += GROUP, to++) {
        Vec pair[2] = {load(x), load(x + LANES)}, most = {}, total = pair[0] + pair[1];
        for (Vec v : pair) {
            v = v < broadcast(0) ? -v : v;
            most = v > most ? v : most;
        }
        float largest = 0, broken = 0 * sum(total);  // NaN if one of them is, or is infinite
        for (int i = 0; i < LANES; i++) largest = std::max(largest, most[i]);
        to->scale = largest / 127 + broken;
        if (broken != 0) pair[0] = pair[1] = Vec{};
        float inverse = largest < 1e-30f || broken != 0 ? 0 : 127 / largest;
        typedef int16_t Shorts __attribute__((vector_size(32)));
        typedef int8_t Bytes __attribute__((vector_size(16)));
        IntVec sums = {};
        for (int i = 0; i < 2; i++) {
            IntVec q = __builtin_convertvector(nearest(pair[i] * inverse), IntVec);
            sums += q;
            if (SPREAD && bits == 8) {
                Shorts h = __builtin_convertvector(q, Shorts);
                h = __builtin_shuffle(h, Shorts{0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15});
                std::memcpy(to->values + i * sizeof h, &h, sizeof h);
            } else {
                Bytes b = __builtin_convertvector(q, Bytes);
                std::memcpy(to->values + i * sizeof b, &b, sizeof b);
            }
        }
        int32_t all = 0;
        for (int i = 0; i < LANES; i++) all += sums[i];
        to->sum = all;
    }
}

// --- products ------------------------------------------------------------------------------------------------------

// acc (ROWS, COLUMNS) += the products of one group's weights, without the offset taken off, with ROWS rows `stride` apart.
// With few rows, weights are loaded one register at a time, so that all sums stay in registers. FETCH: the first pass over
// a panel prefetches what comes next, a little at each step; prefetching a whole group at once gains nothing.
#ifdef PLAIN_AVX2

inline __m256i repeated(const int8_t* p) { return _mm256_set1_epi32(read<int32_t>(p)); }

// Of 8 bits: bytes become 16-bit numbers, whose products are added in pairs.
template <bool FETCH, int ROWS, int COLUMNS>
inline void accumulate8(Sums (&acc)[ROWS][COLUMNS], const uint8_t* w, const Activations* a, int stride) {
    const __m256i low = _mm256_set1_epi16(255);
    for (int k = 0; k < GROUP; k += QUAD, w += PANEL * QUAD) {
        if (FETCH) prefetch(w + FETCH_BYTES, PANEL * QUAD);
        if constexpr (ROWS < COLUMNS) {
            __m256i even[ROWS], odd[ROWS];
            for (int r = 0; r < ROWS; r++) {
                even[r] = repeated(a[(size_t)r * stride].values + 2 * k);
                odd[r] = repeated(a[(size_t)r * stride].values + 2 * k + 4);
            }
            for (int c = 0; c < COLUMNS; c++) {
                __m256i column = read<__m256i>(w + c * sizeof(Sums));
                __m256i first = _mm256_and_si256(column, low), second = _mm256_srli_epi16(column, 8);
                for (int r = 0; r < ROWS; r++) {
                    acc[r][c] += (Sums)_mm256_madd_epi16(first, even[r]);
                    acc[r][c] += (Sums)_mm256_madd_epi16(second, odd[r]);
                }
            }
        } else {
            __m256i first[COLUMNS], second[COLUMNS];
            for (int c = 0; c < COLUMNS; c++) {
                __m256i column = read<__m256i>(w + c * sizeof(Sums));
                first[c] = _mm256_and_si256(column, low), second[c] = _mm256_srli_epi16(column, 8);
            }
            for (int r = 0; r < ROWS; r++) {
                __m256i even = repeated(a[(size_t)r * stride].values + 2 * k);
                for (int c = 0; c < COLUMNS; c++) acc[r][c] += (Sums)_mm256_madd_epi16(first[c], even);
                __m256i odd = repeated(a[(size_t)r * stride].values + 2 * k + 4);
                for (int c = 0; c < COLUMNS; c++) acc[r][c] += (Sums)_mm256_madd_epi16(second[c], odd);
            }
        }
    }
}

// Of 4 bits: the sums of a group fit into 16 bits, as 16 * 15 * 127 < 2^15.
template <bool FETCH, int ROWS, int COLUMNS>
inline void accumulate4(Sums (&acc)[ROWS][COLUMNS], const uint8_t* w, const Activations* a, int stride) {
    const __m256i low = _mm256_set1_epi8(15);
    __m256i pairs[ROWS][COLUMNS];
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < COLUMNS; c++) pairs[r][c] = _mm256_setzero_si256();
    for (int k = 0; k < GROUP; k += 2 * QUAD, w += PANEL * QUAD) {
        if (FETCH) prefetch(w + FETCH_BYTES, PANEL * QUAD);
        if constexpr (ROWS < COLUMNS) {
            __m256i left[ROWS], right[ROWS];
            for (int r = 0; r < ROWS; r++) {
                left[r] = repeated(a[(size_t)r * stride].values + k);
                right[r] = repeated(a[(size_t)r * stride].values + k + QUAD);
            }
            for (int c = 0; c < COLUMNS; c++) {
                __m256i column = read<__m256i>(w + c * sizeof(Sums));
                __m256i first = _mm256_and_si256(column, low);
                __m256i second = _mm256_and_si256(_mm256_srli_epi16(column, 4), low);
                for (int r = 0; r < ROWS; r++) {
                    pairs[r][c] = _mm256_add_epi16(pairs[r][c], _mm256_maddubs_epi16(first, left[r]));
                    pairs[r][c] = _mm256_add_epi16(pairs[r][c], _mm256_maddubs_epi16(second, right[r]));
                }
            }
        } else {
            __m256i first[COLUMNS], second[COLUMNS];
            for (int c = 0; c < COLUMNS; c++) {
                __m256i column = read<__m256i>(w + c * sizeof(Sums));
                first[c] = _mm256_and_si256(column, low);
                second[c] = _mm256_and_si256(_mm256_srli_epi16(column, 4), low);
            }
            for (int r = 0; r < ROWS; r++) {
                __m256i left = repeated(a[(size_t)r * stride].values + k);
                for (int c = 0; c < COLUMNS; c++)
                    pairs[r][c] = _mm256_add_epi16(pairs[r][c], _mm256_maddubs_epi16(first[c], left));
                __m256i right = repeated(a[(size_t)r * stride].values + k + QUAD);
                for (int c = 0; c < COLUMNS; c++)
                    pairs[r][c] = _mm256_add_epi16(pairs[r][c], _mm256_maddubs_epi16(second[c], right));
            }
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < COLUMNS; c++)
            acc[r][c] += (Sums)_mm256_madd_epi16(pairs[r][c], _mm256_set1_epi16(1));
}

#else

// Adds, in each lane, the products of its four weights with the same four activations.
inline Sums dot(Sums acc, Quads w, const int8_t* a) {
#if defined(__AVX512VNNI__)
    return (Sums)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(read<int32_t>(a)));
#elif defined(__AVXVNNI__)
    return (Sums)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, _mm256_set1_epi32(read<int32_t>(a)));
#else
    for (int j = 0; j < QUAD; j++) acc += (Sums)(w >> (8 * j) & 255) * a[j];
    return acc;
#endif
}

template <bool FETCH, int ROWS, int COLUMNS>
inline void accumulate8(Sums (&acc)[ROWS][COLUMNS], const uint8_t* w, const Activations* a, int stride) {
    for (int k = 0; k < GROUP; k += QUAD, w += PANEL * QUAD) {
        if (FETCH) prefetch(w + FETCH_BYTES, PANEL * QUAD);
        for (int c = 0; c < COLUMNS; c++) {
            Quads column = read<Quads>(w + c * sizeof(Sums));
            for (int r = 0; r < ROWS; r++) acc[r][c] = dot(acc[r][c], column, a[(size_t)r * stride].values + k);
        }
    }
}

template <bool FETCH, int ROWS, int COLUMNS>
inline void accumulate4(Sums (&acc)[ROWS][COLUMNS], const uint8_t* w, const Activations* a, int stride) {
    for (int k = 0; k < GROUP; k += 2 * QUAD, w += PANEL * QUAD) {
        if (FETCH) prefetch(w + FETCH_BYTES, PANEL * QUAD);
        for (int c = 0; c < COLUMNS; c++) {
            Quads column = read<Quads>(w + c * sizeof(Sums)), low = column & 0x0f0f0f0fu, high = column >> 4 & 0x0f0f0f0fu;
            for (int r = 0; r < ROWS; r++) {
                acc[r][c] = dot(acc[r][c], low, a[(size_t)r * stride].values + k);
                acc[r][c] = dot(acc[r][c], high, a[(size_t)r * stride].values + k + QUAD);
            }
        }
    }
}

#endif

template <bool FETCH, int BITS, int ROWS, int COLUMNS>
inline void accumulate(Sums (&acc)[ROWS][COLUMNS], const uint8_t* w, const Activations* a, int stride) {
    if constexpr (BITS == 8)
        accumulate8<FETCH>(acc, w, a, stride);
    else
        accumulate4<FETCH>(acc, w, a, stride);
}

// out (ROWS, 64) += a (ROWS, groups) times `groups` groups of a panel.
template <int BITS, int ROWS>
void quantised_product(const Quantised& m, const uint8_t* w, int groups, const Activations* a, int stride, float* out) {
    constexpr int ALL = PANEL / SUMS, COLUMNS = SUMS == 16 ? 4 : ROWS == 1 ? 8 : ROWS == 2 ? 4 : 2;
    const size_t bytes = m.group_bytes();
    for (int first = 0; first < PANEL; first += COLUMNS * SUMS) {
        Totals total[ROWS][COLUMNS];
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < COLUMNS; c++) total[r][c] = read<Totals>(out + r * PANEL + first + c * SUMS);
        const uint8_t* scales = w + first * sizeof(bf16);
        for (int g = 0; g < groups; g++, scales += bytes) {
            const uint8_t* weights = scales + (PANEL - first) * sizeof(bf16) + first * QUAD;
            Sums acc[ROWS][COLUMNS];
            for (int r = 0; r < ROWS; r++)
                for (int c = 0; c < COLUMNS; c++) acc[r][c] = Sums{} - (a[(size_t)r * stride + g].sum << (BITS - 1));
            if (first == 0)
                accumulate<true, BITS>(acc, weights, a + g, stride);
            else
                accumulate<false, BITS>(acc, weights, a + g, stride);
            for (int c = 0; c < COLUMNS; c++) {
                Scales half = read<Scales>(scales + c * sizeof half);
                Totals scale = (Totals)(__builtin_convertvector(half, Quads) << 16);
                for (int r = 0; r < ROWS; r++)
                    total[r][c] += __builtin_convertvector(acc[r][c], Totals) * (scale * a[(size_t)r * stride + g].scale);
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < COLUMNS; c++)
                std::memcpy(out + r * PANEL + first + c * SUMS, &total[r][c], sizeof(Totals));
    }
}

// out (rows, 64) = a (rows, K) times one panel, a block of groups at a time, which stays in the cache for all rows.
template <int BITS>
void quantised_products(const Quantised& m, int panel, const Activations* a, int stride, int rows, float* out) {
    std::memset(out, 0, sizeof(float) * PANEL * rows);
    int tiles = (rows + MOST_QUANTISED_ROWS - 1) / MOST_QUANTISED_ROWS;
    for (int g = 0; g < m.groups; g += GROUPS_AT_ONCE) {
        int groups = std::min(GROUPS_AT_ONCE, m.groups - g);
        const uint8_t* w = m.group(panel, g);
        for (int t = 0; t < tiles; t++) {
            int first = rows * t / tiles, now = rows * (t + 1) / tiles - first;
            const Activations* from = a + (size_t)first * stride + g;
            float* to = out + first * PANEL;
            if (now == 4) quantised_product<BITS, 4>(m, w, groups, from, stride, to);
            if (now == 3) quantised_product<BITS, 3>(m, w, groups, from, stride, to);
            if (now == 2) quantised_product<BITS, 2>(m, w, groups, from, stride, to);
            if (now == 1) quantised_product<BITS, 1>(m, w, groups, from, stride, to);
        }
    }
}

inline void multiply(const Quantised& m, int panel, const Activations* a, int stride, int rows, float* out) {
    m.bits == 8 ? quantised_products<8>(m, panel, a, stride, rows, out) : quantised_products<4>(m, panel, a, stride, rows, out);
}

}  // namespace
