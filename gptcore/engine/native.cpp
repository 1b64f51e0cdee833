// Runs the model on a CPU: one forward pass over a flat batch of tokens, each with the slot of its sequence and its
// position. `gptcore.engine.native` compiles this file for the machine that it runs on, and calls it with ctypes.
//
// forward() takes token ids, slots and positions, and returns fp32 logits for the requested rows. Keys and values stay
// in their slots. choose() takes logits and sampling parameters, and returns tokens.
//
// The order of every sum depends only on a token's own prefix, never on the other tokens in the pass. So a token's
// logits are bit for bit the same, whether it runs alone or in a batch, in one chunk or in several.
//
// Weights are packed once, into panels of 64 output columns. A panel is contiguous along k, so it is read as one
// stream; memory bandwidth is what limits decoding. In bf16 a panel stores pairs of k side by side, a layout that AMX,
// AVX512-BF16 and plain shifts can all read.

#include <atomic>
#include <condition_variable>
#include <functional>
#include <limits>
#include <mutex>
#include <thread>
#include <vector>

#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "native_quantised.h"
#include "native_vectors.h"

namespace {

// --- matrix products -----------------------------------------------------------------------------------------------

// The weight (N, K) of a linear layer, in panels. fp32: [panel][k][64]; bf16: [panel][k / 2][64][2]. Padding is zero.
template <class T>
struct Matrix {
    int N = 0, K = 0, panels = 0;
    Block<T> data;
    Quantised quantised;  // the weight, if it has bits
    std::vector<float> bias;

    const T* panel(int p) const { return data.get() + (size_t)p * PANEL * K; }
};

template <class T, class Source>
void pack(Matrix<T>& m, const Source* weight, int N, int K) {
    constexpr int PAIR = sizeof(T) == 2 ? 2 : 1;
    m.N = N, m.K = round_up(K, K_STEP), m.panels = round_up(N, PANEL) / PANEL;
    m.data = allocate<T>((size_t)m.panels * PANEL * m.K);
    m.bias.assign((size_t)m.panels * PANEL, 0.0f);
    for (int p = 0; p < m.panels; p++) {
        T* to = m.data.get() + (size_t)p * PANEL * m.K;
        int columns = std::min(PANEL, N - p * PANEL);
        for (int k = 0; k < K; k++)  // writes nearly in order, reads 64 streams
            for (int c = 0; c < columns; c++)
                put(to + ((size_t)(k / PAIR) * PANEL + c) * PAIR + k % PAIR, value(weight[(size_t)(p * PANEL + c) * K + k]));
    }
}

// One register of fp32 numbers. The compiler keeps arrays of these in registers, but not of Vec where it takes two.
#ifdef __AVX512F__
constexpr int WIDTH = 16;
#else
constexpr int WIDTH = 8;
#endif
constexpr int MOST_ROWS = 6, K_BLOCK = 512, AHEAD = 64;
typedef float Register __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Bits __attribute__((vector_size(4 * WIDTH)));

// How many registers of columns are computed at a time: with ROWS of each and one for the weights, they fill the file.
constexpr int columns_of(int rows) {
    int columns = WIDTH == 16 ? 4 : rows == 1 ? 8 : rows <= 3 ? 4 : 2;
    return std::min(columns, PANEL / WIDTH);
}

inline Register load_register(const float* p) {
    Register v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// acc (ROWS, COLUMNS) += a (ROWS, count) times `count` rows of a panel. One accumulator per output, k ascending. With many
// rows, the weights of one k are loaded first and then each row's value, so that all accumulators stay in registers.
// FETCH: the pass uses only a part of each cache line's neighbours, so the processor does not see what comes next.
template <bool FETCH, int ROWS, int COLUMNS>
inline void accumulate(Register (&acc)[ROWS][COLUMNS], const float* w, int count, const float* a, int stride) {
    for (int k = 0; k < count; k++, w += PANEL) {
        if (FETCH) prefetch(w + AHEAD * PANEL, PANEL);
        if constexpr (ROWS < COLUMNS) {
            for (int c = 0; c < COLUMNS; c++) {
                Register column = load_register(w + c * WIDTH);
                for (int r = 0; r < ROWS; r++) acc[r][c] += column * a[(size_t)r * stride + k];
            }
        } else {
            Register columns[COLUMNS];
            for (int c = 0; c < COLUMNS; c++) columns[c] = load_register(w + c * WIDTH);
            for (int r = 0; r < ROWS; r++)
                for (int c = 0; c < COLUMNS; c++) acc[r][c] += columns[c] * a[(size_t)r * stride + k];
        }
    }
}

inline Register even(Register pairs) { return (Register)((Bits)pairs << 16); }
inline Register odd(Register pairs) { return (Register)((Bits)pairs & 0xffff0000u); }

template <bool FETCH, int ROWS, int COLUMNS>
inline void accumulate(Register (&acc)[ROWS][COLUMNS], const bf16* weights, int count, const float* a, int stride) {
    const float* w = (const float*)weights;  // pairs
    for (int k = 0; k < count; k += 2, w += PANEL) {
        if (FETCH) prefetch(w + AHEAD * PANEL, PANEL);
        if constexpr (ROWS < COLUMNS) {
            for (int c = 0; c < COLUMNS; c++) {
                Register pairs = load_register(w + c * WIDTH);
                for (int r = 0; r < ROWS; r++) acc[r][c] += even(pairs) * a[(size_t)r * stride + k];
                for (int r = 0; r < ROWS; r++) acc[r][c] += odd(pairs) * a[(size_t)r * stride + k + 1];
            }
        } else {
            Register columns[COLUMNS];
            for (int c = 0; c < COLUMNS; c++) columns[c] = even(load_register(w + c * WIDTH));
            for (int r = 0; r < ROWS; r++)
                for (int c = 0; c < COLUMNS; c++) acc[r][c] += columns[c] * a[(size_t)r * stride + k];
            for (int c = 0; c < COLUMNS; c++) columns[c] = odd(load_register(w + c * WIDTH));
            for (int r = 0; r < ROWS; r++)
                for (int c = 0; c < COLUMNS; c++) acc[r][c] += columns[c] * a[(size_t)r * stride + k + 1];
        }
    }
}

// out (ROWS, 64) += a (ROWS, count) times `count` rows of a panel.
template <int ROWS, class T>
void product(const T* w, int count, const float* a, int stride, float* out) {
    constexpr int COLUMNS = columns_of(ROWS), PAIR = sizeof(T) == 2 ? 2 : 1;
    for (int first = 0; first < PANEL; first += COLUMNS * WIDTH) {
        Register acc[ROWS][COLUMNS];
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < COLUMNS; c++)
                acc[r][c] = load_register(out + r * PANEL + first + c * WIDTH);
        if (first == 0 && COLUMNS * WIDTH < PANEL)
            accumulate<true>(acc, w, count, a, stride);
        else
            accumulate<false>(acc, w + first * PAIR, count, a, stride);
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < COLUMNS; c++)
                std::memcpy(out + r * PANEL + first + c * WIDTH, &acc[r][c], sizeof(Register));
    }
}

inline const float* as_floats(const float* a, int, int, int&, float*) { return a; }

// Converts a (rows, count); `stride` becomes that of the result.
inline const float* as_floats(const bf16* a, int rows, int count, int& stride, float* to) {
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < count; k += LANES) store(to + r * K_BLOCK + k, load(a + (size_t)r * stride + k));
    stride = K_BLOCK;
    return to;
}

// out (rows, 64) = a (rows, K) times one panel, a block of k at a time, which stays in the cache for all rows.
template <class T>
void products(const T* w, int K, const T* a, int stride, int rows, float* out) {
    alignas(64) float converted[TILE_ROWS * K_BLOCK];
    std::memset(out, 0, sizeof(float) * PANEL * rows);
    int groups = (rows + MOST_ROWS - 1) / MOST_ROWS;
    for (int k = 0; k < K; k += K_BLOCK, a += K_BLOCK, w += (size_t)K_BLOCK * PANEL) {
        int count = std::min(K_BLOCK, K - k), step = stride;
        const float* x = as_floats(a, rows, count, step, converted);
        for (int g = 0; g < groups; g++) {
            int first = rows * g / groups, now = rows * (g + 1) / groups - first;
            const float* from = x + (size_t)first * step;
            float* to = out + first * PANEL;
            if (now == 6) product<6>(w, count, from, step, to);
            if (now == 5) product<5>(w, count, from, step, to);
            if (now == 4) product<4>(w, count, from, step, to);
            if (now == 3) product<3>(w, count, from, step, to);
            if (now == 2) product<2>(w, count, from, step, to);
            if (now == 1) product<1>(w, count, from, step, to);
        }
    }
}

#ifdef __AVX512BF16__
// out (ROWS, 64) = a (ROWS, K) times one panel. One accumulator per output, k ascending.
template <int ROWS>
void bf16_product(const bf16* w, int K, const bf16* a, int stride, float* out) {
    __m512 acc[ROWS][GROUPS];
    for (int r = 0; r < ROWS; r++)
        for (int g = 0; g < GROUPS; g++) acc[r][g] = _mm512_setzero_ps();
    for (int k = 0; k < K; k += 2, w += 2 * PANEL) {
        __m512i columns[GROUPS];
        for (int g = 0; g < GROUPS; g++) columns[g] = _mm512_loadu_si512(w + 2 * g * LANES);
        for (int r = 0; r < ROWS; r++) {
            int32_t pair;
            std::memcpy(&pair, a + (size_t)r * stride + k, 4);
            for (int g = 0; g < GROUPS; g++)
                acc[r][g] = _mm512_dpbf16_ps(acc[r][g], (__m512bh)_mm512_set1_epi32(pair), (__m512bh)columns[g]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int g = 0; g < GROUPS; g++) _mm512_storeu_ps(out + r * PANEL + g * LANES, acc[r][g]);
}

inline void products(const bf16* w, int K, const bf16* a, int stride, int rows, float* out) {
    while (rows > 0) {
        int now = std::min(rows, 4);
        if (now == 4) bf16_product<4>(w, K, a, stride, out);
        if (now == 3) bf16_product<3>(w, K, a, stride, out);
        if (now == 2) bf16_product<2>(w, K, a, stride, out);
        if (now == 1) bf16_product<1>(w, K, a, stride, out);
        rows -= now, a += (size_t)now * stride, out += now * PANEL;
    }
}
#endif

#ifdef __AMX_BF16__
// AMX multiplies tiles of 16 rows. Rows past the last one that was asked for hold garbage, which nothing reads.
void amx_product(const bf16* w, int K, const bf16* a, int stride, float* out) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int k = 0; k < K; k += K_STEP, w += (size_t)K_STEP * PANEL) {
        _tile_loadd(4, a + k, stride * 2);
        _tile_loadd(5, w, 4 * PANEL);
        _tile_loadd(6, w + 2 * LANES, 4 * PANEL);
        _tile_dpbf16ps(0, 4, 5);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(5, w + 4 * LANES, 4 * PANEL);
        _tile_loadd(6, w + 6 * LANES, 4 * PANEL);
        _tile_dpbf16ps(2, 4, 5);
        _tile_dpbf16ps(3, 4, 6);
    }
    _tile_stored(0, out, 4 * PANEL);
    _tile_stored(1, out + LANES, 4 * PANEL);
    _tile_stored(2, out + 2 * LANES, 4 * PANEL);
    _tile_stored(3, out + 3 * LANES, 4 * PANEL);
}

bool amx_allowed() {
#ifdef __linux__
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static const bool allowed = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return allowed;
#else
    return false;
#endif
}

struct TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {};
    uint8_t rows[16] = {};
    TileConfig() {
        for (int i = 0; i < 7; i++) bytes_per_row[i] = 64, rows[i] = TILE_ROWS;
    }
};
#else
bool amx_allowed() { return false; }
#endif

// out (rows, 64) = a (rows, K) times panel p, rows <= TILE_ROWS.
template <class T>
void multiply(const Matrix<T>& m, int p, const T* a, int stride, int rows, float* out) {
    const T* w = m.panel(p);
#ifdef __AMX_BF16__
    if constexpr (sizeof(T) == 2)
        if (amx_allowed()) return amx_product(w, m.K, a, stride, out);
#endif
    products(w, m.K, a, stride, rows, out);
}

// --- threads -------------------------------------------------------------------------------------------------------

// A thread pool of fixed size. run(f) calls f(thread) on every thread, including the caller's. barrier() waits until
// all threads have reached it. Between runs the threads sleep. Within a run they spin before they sleep, because a pass
// has about a hundred barriers. The work between two barriers is handed out in portions, so a thread that loses its
// core delays one portion and not a fixed share of the work. If the pool has as many threads as the machine has cores,
// each thread is pinned to a core: otherwise two threads may share one for milliseconds and wait for each other.
class ThreadPool {
  public:
    explicit ThreadPool(int size) : size(size) {
        for (int t = 1; t < size; t++) threads.emplace_back([this, t] { work_until_end(t); });
#ifdef __linux__
        cpu_set_t present;
        if (size == 1 || sched_getaffinity(0, sizeof present, &present) || CPU_COUNT(&present) != size) return;
        for (int core = 0; core < CPU_SETSIZE; core++)
            if (CPU_ISSET(core, &present)) cores.push_back(core);
        for (int t = 1; t < size; t++) pin(cores[t], threads[t - 1].native_handle());
#endif
    }

    ~ThreadPool() {
        {
            std::lock_guard<std::mutex> lock(mutex);
            ending = true, round++;
        }
        wake.notify_all();
        for (auto& thread : threads) thread.join();
    }

    template <class F>
    void run(F&& f) {
        work = [](void* context, int t) { (*(std::remove_reference_t<F>*)context)(t); };
        context = &f;
        {
            std::lock_guard<std::mutex> lock(mutex);
            round++;
        }
        wake.notify_all();
#ifdef __linux__
        cpu_set_t before;  // the caller's thread is pinned for this run only
        if (!cores.empty()) {
            pthread_getaffinity_np(pthread_self(), sizeof before, &before);
            pin(cores[0], pthread_self());
        }
#endif
        work(context, 0);
        barrier();
#ifdef __linux__
        if (!cores.empty()) pthread_setaffinity_np(pthread_self(), sizeof before, &before);
#endif
    }

    void barrier() {
        uint32_t now = phase.load();
        if (arrived.fetch_add(1) == size - 1) {
            arrived.store(0);
            taken.store(0);
            phase.store(now + 1);
            if (asleep.load()) {
                std::lock_guard<std::mutex> lock(mutex);
                passed.notify_all();
            }
            return;
        }
        for (int spins = 0; spins < SPINS; spins++) {
            if (phase.load() != now) return;
#ifdef __x86_64__
            _mm_pause();
#endif
        }
        asleep++;  // the last thread has lost its core, and more spinning here would only delay it
        {
            std::unique_lock<std::mutex> lock(mutex);
            passed.wait(lock, [&] { return phase.load() != now; });
        }
        asleep--;
    }

    // Calls f(i) once for every i below count, on any thread. Use at most once between two barriers.
    template <class F>
    void for_each(int count, F&& f) {
        int portion = std::min(std::max(1, count / (size * 8)), 4);
        for (int begin; (begin = taken.fetch_add(portion, std::memory_order_relaxed)) < count;)
            for (int i = begin; i < std::min(begin + portion, count); i++) f(i);
    }

    const int size;

  private:
    static constexpr int SPINS = 20000;  // about a millisecond; waking up takes long, especially on a virtual machine

#ifdef __linux__
    static void pin(int core, pthread_t thread) {
        cpu_set_t own;
        CPU_ZERO(&own);
        CPU_SET(core, &own);
        pthread_setaffinity_np(thread, sizeof own, &own);
    }
#endif

    void work_until_end(int t) {
        uint64_t seen = 0;
        for (;;) {
            {
                std::unique_lock<std::mutex> lock(mutex);
                wake.wait(lock, [&] { return round != seen; });
                seen = round;
                if (ending) return;
            }
            work(context, t);
            barrier();
        }
    }

    std::vector<std::thread> threads;
    std::vector<int> cores;  // the core of each thread; empty if threads are not pinned
    std::mutex mutex;
    std::condition_variable wake, passed;
    uint64_t round = 0;
    bool ending = false;
    void (*work)(void*, int) = nullptr;
    void* context = nullptr;
    std::atomic<int> arrived{0}, taken{0}, asleep{0};
    std::atomic<uint32_t> phase{0};
};

struct Range {
    int begin, end;
};
inline Range share(int count, int t, int threads) {
    return {(int)((int64_t)count * t / threads), (int)((int64_t)count * (t + 1) / threads)};
}

// --- sampling ------------------------------------------------------------------------------------------------------

// How to choose the token of one row. Must match the struct in gptcore.engine.native.
struct Draw {
    double point;  // random, in [0, 1): selects the token whose share of the total weight contains it
    double top_p, min_p;
    float temperature;  // 0: take the likeliest token
    int32_t top_k;      // 0: no limit
    int32_t changes;    // how many of the row's logits are replaced
};

// Does what gptcore.sampling.next_tokens does, one row at a time. Weights are whole numbers, so their sums are exact.
class Sampler {
  public:
    // Chooses a token from logits (V). logits[ids[i]] is first replaced by values[i].
    int choose(const float* logits, int V, const Draw& how, const int32_t* ids, const float* values) {
        weights.assign(round_up(V, BLOCK), -INFINITY);
        std::copy(logits, logits + V, weights.begin());
        for (int i = 0; i < how.changes; i++) weights[ids[i]] = values[i];
        if (how.top_k > 0 || how.top_p < 1) order = weights;
        int likeliest = to_weights(how.temperature);
        if (how.temperature == 0) return likeliest;
        if (how.top_k > 0 || how.top_p < 1 || how.min_p > 0) filter(how);
        int token = token_at(how.point);
        return token < 0 ? likeliest : token;
    }

  private:
    static constexpr int BLOCK = 512, MANTISSA_BITS = 5, LOWEST = 127 << MANTISSA_BITS;
    static constexpr int BUCKETS = (36 << MANTISSA_BITS) + 1;
    static constexpr float ONE = 34359738368.0f, WHOLE = 8388608.0f;  // 2^35; 2^23, above which floats are whole

    // Turns logits into weights, the largest of which is ONE. Returns the index of the first largest one.
    int to_weights(float temperature) {
        int width = weights.size();
        Vec most = broadcast(-INFINITY);
        IntVec at = {};
        for (int i = 0; i < width; i += LANES) {
            Vec x = load(&weights[i]);
            at = x > most ? LANE + i : at;
            most = x > most ? x : most;
        }
        int best = 0;
        for (int i = 1; i < LANES; i++)
            if (most[i] > most[best] || (most[i] == most[best] && at[i] < at[best])) best = i;
        if (temperature > 0) {
            Vec top = broadcast(most[best]), heat = broadcast(std::min(std::max(temperature, 1e-30f), 1e30f));
            for (int i = 0; i < width; i += LANES) {
                Vec e = exponential((load(&weights[i]) - top) / heat) * ONE;
                store(&weights[i], e < broadcast(WHOLE) ? (e + WHOLE) - WHOLE : e);
            }
        }
        return at[best];
    }

    // Sets the weights that top_k, top_p and min_p rule out to 0. Only the bucket in which a filter ends is sorted.
    // A greater weight always has a greater logit, since to_weights() keeps the order. Equal weights may have different
    // logits.
    void filter(const Draw& how) {
        uint32_t counts[BUCKETS] = {};
        double sums[BUCKETS] = {}, total = 0;
        for (float w : weights)
            if (w >= 1) {
                int b = bucket(w);
                counts[b]++, sums[b] += w, total += w;
            }
        int64_t most = how.top_k > 0 ? how.top_k : (int64_t)weights.size();
        if (how.top_k > 0) total = likeliest(counts, sums, [&](int64_t before, double) { return before < most; }).sum;
        double enough = how.top_p < 1 ? how.top_p * total : INFINITY;
        Kept kept = likeliest(counts, sums, [&](int64_t before, double sum) { return before < most && sum < enough; });
        float least = std::max(1.0f, (float)(how.min_p * ONE));
        if (least < how.min_p * ONE) least = std::nextafter(least, INFINITY);
        if (least > kept.least) kept.least = least, kept.equals = std::numeric_limits<int>::max();
        ties.clear();
        for (int i = 0; i < (int)weights.size(); i++) {
            if (weights[i] == kept.least)
                ties.push_back(i);
            else if (!(weights[i] > kept.least))
                weights[i] = 0;
        }
        if (kept.equals >= (int)ties.size()) return;
        std::nth_element(ties.begin(), ties.begin() + kept.equals, ties.end(), [&](int a, int b) {
            return order[a] > order[b] || (order[a] == order[b] && a < b);
        });
        for (size_t i = kept.equals; i < ties.size(); i++) weights[ties[i]] = 0;
    }

    struct Kept {
        double sum = 0;
        float least = 0;  // the smallest weight kept
        int equals = 0;   // how many of those that have it are kept
        int64_t count = 0;
    };

    // Takes the likeliest tokens until keep(number taken, sum taken) is false.
    template <class F>
    Kept likeliest(const uint32_t* counts, const double* sums, F&& keep) {
        Kept kept;
        for (int b = BUCKETS - 1; b >= 0; b--) {
            if (!counts[b]) continue;
            if (keep(kept.count + counts[b], kept.sum + sums[b])) {
                kept.count += counts[b], kept.sum += sums[b];
                continue;
            }
            members.clear();
            for (float w : weights)
                if (w >= 1 && bucket(w) == b) members.push_back(w);
            std::sort(members.begin(), members.end(), std::greater<float>());
            for (float w : members) {
                if (!keep(kept.count, kept.sum)) break;
                kept.equals = w == kept.least ? kept.equals + 1 : 1;
                kept.least = w, kept.count++, kept.sum += w;
            }
            break;
        }
        return kept;
    }

    // The bucket of a weight from 1 to ONE: its exponent and the first bits of its mantissa. Greater weights never have
    // a lower bucket.
    static int bucket(float w) {
        uint32_t bits;
        std::memcpy(&bits, &w, 4);
        return std::min((int)(bits >> (23 - MANTISSA_BITS)) - LOWEST, BUCKETS - 1);
    }

    // The first token at which the running sum exceeds `point` times the total weight; -1 if the weights are NaN.
    int token_at(double point) {
        int blocks = weights.size() / BLOCK;
        sums.assign(blocks, 0.0);
        double total = 0;
        for (int b = 0; b < blocks; b++) {
            double lanes[LANES] = {};
            for (int i = 0; i < BLOCK; i += LANES)
                for (int j = 0; j < LANES; j++) lanes[j] += weights[(size_t)b * BLOCK + i + j];
            for (double lane : lanes) sums[b] += lane;
            total += sums[b];
        }
        if (!(total >= 1)) return -1;
        double share = std::min(std::floor(point * total), total - 1);
        int b = 0;
        while (share >= sums[b]) share -= sums[b++];
        int i = b * BLOCK;
        while (share >= weights[i]) share -= weights[i++];
        return i;
    }

    std::vector<float> weights, order, members;  // order: the logits, which break ties between equal weights
    std::vector<double> sums;
    std::vector<int> ties;
};

// --- the network ---------------------------------------------------------------------------------------------------

// The fields of `shape` and the numbers of the weights. Both must match gptcore.engine.native.
struct Shape {
    int32_t rotary, layers, C, H, K, D, M, V, S, slots, threads, weight_bits, head_bits;  // bits 0: as the dtype
};
enum Weight { EMBED, POSITIONS, COS, SIN, FINAL_GAIN, FINAL_BIAS, HEAD, NORM1_GAIN, NORM1_BIAS, QKV, QKV_BIAS,
              Q_NORM, K_NORM, OUT, OUT_BIAS, NORM2_GAIN, NORM2_BIAS, GATE, UP, UP_BIAS, DOWN, DOWN_BIAS };

struct Network {
    virtual ~Network() = default;
    virtual void set(int what, int layer, const void* data, bool is_bf16, int rows, int columns) = 0;
    virtual void set_stored(int what, int layer, Stored data, int rows, int columns) = 0;
    virtual void forward(int n, const int32_t* tokens, const int32_t* slots, const int32_t* positions, int wanted,
                         const int32_t* rows, float* logits) = 0;
    virtual void choose(int count, const float* logits, int stride, int V, const Draw* draws, const int32_t* ids,
                        const float* values, int32_t* tokens) = 0;
    virtual void copy(int source, int target, int length) = 0;
    virtual int64_t cache_bytes() const = 0;
};

template <class T>
class Decoder : public Network {
    typedef std::vector<float> Floats;
    struct Layer {
        Floats norm1_gain, norm1_bias, q_norm, k_norm, norm2_gain, norm2_bias;
        Matrix<T> qkv, out, gate, up, down;
    };

  public:
    Decoder(Shape shape, float eps)
        : s(shape), eps(eps), pool(shape.threads), samplers(shape.threads), layers(shape.layers), blocks(round_up(shape.S, LANES) / LANES) {
        head_cache = (size_t)blocks * LANES * s.D;
        size_t count = (size_t)s.layers * s.slots * s.K * head_cache;
        keys = allocate<T>(count), values = allocate<T>(count);
        scores.assign(s.threads, Floats(blocks * LANES));
    }

    void set(int what, int layer, const void* data, bool is_bf16, int rows, int columns) override {
        is_bf16 ? set(what, layer, (const bf16*)data, rows, columns) : set(what, layer, (const float*)data, rows, columns);
    }

    void set_stored(int what, int layer, Stored data, int rows, int columns) override {
        Layer* l = layer < 0 ? nullptr : &layers[layer];
        switch (what) {
            case HEAD: pack(head, data, rows, columns, s.head_bits); break;
            case QKV: pack(l->qkv, data, rows, columns, s.weight_bits); break;
            case OUT: pack(l->out, data, rows, columns, s.weight_bits); break;
            case GATE: pack(l->gate, data, rows, columns, s.weight_bits); break;
            case UP: pack(l->up, data, rows, columns, s.weight_bits); break;
            case DOWN: pack(l->down, data, rows, columns, s.weight_bits); break;
        }
    }

    int64_t cache_bytes() const override { return 2 * (int64_t)s.layers * s.slots * s.K * head_cache * sizeof(T); }

    void copy(int source, int target, int length) override {
        size_t count = (size_t)round_up(length, LANES) * s.D;  // whole blocks of keys; the excess is never read
        for (int l = 0; l < s.layers; l++)
            for (int g = 0; g < s.K; g++) {
                std::memcpy(at(keys, l, target, g), at(keys, l, source, g), count * sizeof(T));
                std::memcpy(at(values, l, target, g), at(values, l, source, g), count * sizeof(T));
            }
    }

    void forward(int n, const int32_t* tokens, const int32_t* slots, const int32_t* positions, int wanted,
                 const int32_t* rows, float* logits) override {
        reserve(n);
        pool.run([&](int t) {
#ifdef __AMX_BF16__
            TileConfig tiles;
            if (sizeof(T) == 2 && amx_allowed()) _tile_loadconfig(&tiles);
#endif
            Range own = share(n, t, pool.size);
            for (int r = own.begin; r < own.end; r++) {
                float* x = &residual[(size_t)r * s.C];
                embedding(tokens[r], x);
                if (!s.rotary)
                    for (int c = 0; c < s.C; c += LANES) store(x + c, load(x + c) + load(&position_embed[(size_t)positions[r] * s.C + c]));
            }
            for (int l = 0; l < s.layers; l++) {
                const Layer& layer = layers[l];
                for (int r = own.begin; r < own.end; r++)  // this thread's own rows, so no barrier
                    normalise(&residual[(size_t)r * s.C], layer.norm1_gain, layer.norm1_bias, normed(r));
                pool.barrier();
                linear(n, layer.qkv, normed(0), hidden_stride, [&](int r, int c, Vec x) { store(&qkv(r)[c], x); });
                pool.barrier();
                pool.for_each(n * s.K, [&](int i) { write_cache(l, slots[i / s.K], positions[i / s.K], i / s.K, i % s.K); });
                pool.barrier();
                pool.for_each(n * s.K, [&](int i) { attend(t, l, slots[i / s.K], positions[i / s.K], i / s.K, i % s.K); });
                pool.barrier();
                linear(n, layer.out, attended(0), attended_stride, [&](int r, int c, Vec x) { add(r, c, x); });
                pool.barrier();
                for (int r = own.begin; r < own.end; r++)
                    normalise(&residual[(size_t)r * s.C], layer.norm2_gain, layer.norm2_bias, normed(r));
                pool.barrier();
                if (s.rotary)
                    gated(n, layer);
                else
                    linear(n, layer.up, normed(0), hidden_stride, [&](int r, int c, Vec x) { store(&middle(r)[c], gelu(x)); });
                pool.barrier();
                linear(n, layer.down, middle(0), middle_stride, [&](int r, int c, Vec x) { add(r, c, x); });
                pool.barrier();
            }
            Range asked = share(wanted, t, pool.size);
            for (int i = asked.begin; i < asked.end; i++)
                normalise(&residual[(size_t)rows[i] * s.C], final_gain, final_bias, normed(i));
            pool.barrier();
            int width = head.panels * PANEL;
            linear(wanted, head, normed(0), hidden_stride, [&](int r, int c, Vec x) { store(logits + (size_t)r * width + c, x); });
#ifdef __AMX_BF16__
            if (sizeof(T) == 2 && amx_allowed()) _tile_release();
#endif
        });
    }

    // Chooses a token for each of `count` rows of logits. `ids` and `values` list the replaced logits of all rows, row
    // by row.
    void choose(int count, const float* logits, int stride, int V, const Draw* draws, const int32_t* ids,
                const float* values, int32_t* tokens) override {
        std::vector<int> begin(count + 1, 0);
        for (int i = 0; i < count; i++) begin[i + 1] = begin[i] + draws[i].changes;
        auto one = [&](int t, int i) {
            tokens[i] = samplers[t].choose(logits + (size_t)i * stride, V, draws[i], ids + begin[i], values + begin[i]);
        };
        if (count == 1) return one(0, 0);  // not worth waking the other threads
        pool.run([&](int t) { pool.for_each(count, [&](int i) { one(t, i); }); });
    }

  private:
    template <class Source>
    void set(int what, int layer, const Source* data, int rows, int columns) {
        Layer* l = layer < 0 ? nullptr : &layers[layer];
        size_t count = (size_t)rows * columns;
        auto vector = [&](Floats& to) {
            to.resize(count);
            for (size_t i = 0; i < count; i++) to[i] = value(data[i]);
        };
        auto pack = [&](Matrix<T>& m, int bits) { bits ? this->pack(m, data, rows, columns, bits) : ::pack(m, data, rows, columns); };
        auto bias = [&](Matrix<T>& m) {
            for (size_t i = 0; i < count; i++) m.bias[i] = value(data[i]);
        };
        switch (what) {
            case EMBED:
                embed = allocate<T>(count);
                for (size_t i = 0; i < count; i++) put(embed.get() + i, value(data[i]));
                break;
            case POSITIONS: vector(position_embed); break;
            case COS: vector(cosine); break;
            case SIN: vector(sine); break;
            case FINAL_GAIN: vector(final_gain); break;
            case FINAL_BIAS: vector(final_bias); break;
            case HEAD: pack(head, s.head_bits); break;
            case NORM1_GAIN: vector(l->norm1_gain); break;
            case NORM1_BIAS: vector(l->norm1_bias); break;
            case QKV: pack(l->qkv, s.weight_bits); break;
            case QKV_BIAS: bias(l->qkv); break;
            case Q_NORM: vector(l->q_norm); break;
            case K_NORM: vector(l->k_norm); break;
            case OUT: pack(l->out, s.weight_bits); break;
            case OUT_BIAS: bias(l->out); break;
            case NORM2_GAIN: vector(l->norm2_gain); break;
            case NORM2_BIAS: vector(l->norm2_bias); break;
            case GATE: pack(l->gate, s.weight_bits); break;
            case UP: pack(l->up, s.weight_bits); break;
            case UP_BIAS: bias(l->up); break;
            case DOWN: pack(l->down, s.weight_bits); break;
            case DOWN_BIAS: bias(l->down); break;
        }
    }

    template <class Source>
    void pack(Matrix<T>& m, Source weight, int N, int K, int bits) {
        m.N = N, m.K = round_up(K, K_STEP), m.panels = round_up(N, PANEL) / PANEL;
        m.bias.assign((size_t)m.panels * PANEL, 0.0f);
        m.quantised.bits = bits, m.quantised.groups = m.K / GROUP;
        m.quantised.data = allocate<uint8_t>(m.quantised.group_bytes() * m.quantised.groups * m.panels);
        pool.run([&](int) { pool.for_each(m.panels, [&](int p) { quantise_panel(m.quantised, p, weight, N, K); }); });
    }

    // The embedding (C) of a token. A tied one is a column of the head's panels.
    void embedding(int token, float* to) const {
        if (embed) {
            for (int c = 0; c < s.C; c += LANES) store(to + c, load(embed.get() + (size_t)token * s.C + c));
            return;
        }
        if (head.quantised.bits) {
            for (int c = 0; c < s.C; c++) to[c] = head.quantised.weight(token / PANEL, token % PANEL, c);
            return;
        }
        constexpr int PAIR = sizeof(T) == 2 ? 2 : 1;
        const T* from = head.panel(token / PANEL) + token % PANEL * PAIR;
        for (int c = 0; c < s.C; c++) to[c] = value(from[(size_t)(c / PAIR) * PANEL * PAIR + c % PAIR]);
    }

    T* at(Block<T>& cache, int layer, int slot, int g) {
        return cache.get() + (((size_t)layer * s.slots + slot) * s.K + g) * head_cache;
    }

    // Makes room for n rows, rounded up to whole tiles, because AMX reads whole tiles.
    void reserve(int n) {
        if (n <= room) return;
        room = round_up(n, TILE_ROWS);
        hidden_stride = round_up(s.C, K_STEP), middle_stride = round_up(s.M, K_STEP);
        attended_stride = round_up(s.H * s.D, K_STEP), qkv_stride = (s.H + 2 * s.K) * s.D;
        residual.assign((size_t)room * s.C, 0.0f);
        qkv_rows.assign((size_t)room * qkv_stride, 0.0f);
        normed_rows.assign((size_t)room * hidden_stride, T{});
        attended_rows.assign((size_t)room * attended_stride, T{});
        middle_rows.assign((size_t)room * middle_stride, T{});
        activations.resize(s.head_bits ? (size_t)room * std::max({hidden_stride, middle_stride, attended_stride}) / GROUP : 0);
    }
    T* normed(int r) { return &normed_rows[(size_t)r * hidden_stride]; }
    T* attended(int r) { return &attended_rows[(size_t)r * attended_stride]; }
    T* middle(int r) { return &middle_rows[(size_t)r * middle_stride]; }
    float* qkv(int r) { return &qkv_rows[(size_t)r * qkv_stride]; }

    // Quantises n rows for the products with `m`, if its weights are.
    void prepare(int n, const Matrix<T>& m, const T* a, int stride) {
        if (!m.quantised.bits) return;
        int groups = m.quantised.groups;
        pool.for_each(n, [&](int r) {
            quantise(a + (size_t)r * stride, groups, m.quantised.bits, &activations[(size_t)r * groups]);
        });
        pool.barrier();
    }

    // out (rows, 64) = rows from `first` on of a times panel p; prepare() comes before it.
    void multiply(const Matrix<T>& m, int p, int first, const T* a, int stride, int rows, float* out) {
        int groups = m.quantised.groups;
        if (m.quantised.bits)
            ::multiply(m.quantised, p, &activations[(size_t)first * groups], groups, rows, out);
        else
            ::multiply(m, p, a + (size_t)first * stride, stride, rows, out);
    }

    // Computes a (n, K) W^T + bias and passes it to `take(row, column, values)`, sixteen columns at a time.
    template <class F>
    void linear(int n, const Matrix<T>& m, const T* a, int stride, F&& take) {
        alignas(64) float out[TILE_ROWS * PANEL];
        prepare(n, m, a, stride);
        pool.for_each(m.panels, [&](int p) {
            for (int first = 0; first < n; first += TILE_ROWS) {
                int rows = std::min(TILE_ROWS, n - first), columns = std::min(PANEL, round_up(m.N - p * PANEL, LANES));
                multiply(m, p, first, a, stride, rows, out);
                for (int r = 0; r < rows; r++)
                    for (int c = 0; c < columns; c += LANES)
                        take(first + r, p * PANEL + c, load(out + r * PANEL + c) + load(&m.bias[p * PANEL + c]));
            }
        });
    }

    // The first half of SwiGLU: silu(gate) * up.
    void gated(int n, const Layer& layer) {
        alignas(64) float gate[TILE_ROWS * PANEL], up[TILE_ROWS * PANEL];
        prepare(n, layer.up, normed(0), hidden_stride);
        pool.for_each(layer.up.panels, [&](int p) {
            for (int first = 0; first < n; first += TILE_ROWS) {
                int rows = std::min(TILE_ROWS, n - first), columns = std::min(PANEL, s.M - p * PANEL);
                multiply(layer.gate, p, first, normed(0), hidden_stride, rows, gate);
                multiply(layer.up, p, first, normed(0), hidden_stride, rows, up);
                for (int r = 0; r < rows; r++)
                    for (int c = 0; c < columns; c += LANES)
                        store(middle(first + r) + p * PANEL + c, silu(load(gate + r * PANEL + c)) * load(up + r * PANEL + c));
            }
        });
    }

    void add(int r, int c, Vec x) {
        float* to = &residual[(size_t)r * s.C + c];
        store(to, load(to) + x);
    }

    // LayerNorm (gpt2) or RMSNorm (rotary) of one row.
    void normalise(const float* x, const Floats& gain, const Floats& bias, T* out) {
        Vec total = {};
        if (!s.rotary)
            for (int c = 0; c < s.C; c += LANES) total += load(x + c);
        Vec mean = broadcast(sum(total) / s.C), squares = {};
        for (int c = 0; c < s.C; c += LANES) squares += (load(x + c) - mean) * (load(x + c) - mean);
        Vec scale = broadcast(1.0f / std::sqrt(sum(squares) / s.C + eps));
        for (int c = 0; c < s.C; c += LANES) {
            Vec y = (load(x + c) - mean) * scale * load(&gain[c]);
            store(out + c, s.rotary ? y : y + load(&bias[c]));
        }
    }

    // RMSNorm of one head (D) in place, if there are gains.
    void normalise_head(float* x, const Floats& gain) {
        if (gain.empty()) return;
        Vec squares = {};
        for (int d = 0; d < s.D; d += LANES) squares += load(x + d) * load(x + d);
        float scale = 1.0f / std::sqrt(sum(squares) / s.D + eps);
        for (int d = 0; d < s.D; d++) x[d] = x[d] * scale * gain[d];
    }

    // RoPE of one head (D), in place.
    void rotate(float* x, int position) {
        const float *cos = &cosine[(size_t)position * s.D], *sin = &sine[(size_t)position * s.D];
        int half = s.D / 2;
        for (int d = 0; d < half; d++) {
            float left = x[d], right = x[d + half];
            x[d] = left * cos[d] - right * sin[d];
            x[d + half] = right * cos[d + half] + left * sin[d + half];
        }
    }

    // Writes the key and the value of one token and one head group to the cache. Keys are stored as
    // [block of 16 positions][D][16], so that sixteen scores are summed side by side, and values as [position][D].
    void write_cache(int l, int slot, int position, int r, int g) {
        int per_group = s.H / s.K;
        float *query = qkv(r) + g * per_group * s.D, *key = qkv(r) + (s.H + g) * s.D, *value = key + s.K * s.D;
        for (int h = 0; h < per_group; h++) normalise_head(query + h * s.D, layers[l].q_norm);
        normalise_head(key, layers[l].k_norm);
        if (s.rotary) {
            for (int h = 0; h < per_group; h++) rotate(query + h * s.D, position);
            rotate(key, position);
        }
        T* to = at(keys, l, slot, g) + (size_t)(position / LANES) * s.D * LANES + position % LANES;
        for (int d = 0; d < s.D; d++) put(to + (size_t)d * LANES, key[d]);
        T* row = at(values, l, slot, g) + (size_t)position * s.D;
        for (int d = 0; d < s.D; d += LANES) store(row + d, load(value + d));
    }

    void attend(int t, int l, int slot, int position, int r, int g) {
        switch (s.D / LANES) {  // with a width known at compile time, the sums stay in registers
            case 1: return attend_wide<1>(t, l, slot, position, r, g);
            case 2: return attend_wide<2>(t, l, slot, position, r, g);
            case 4: return attend_wide<4>(t, l, slot, position, r, g);
            case 5: return attend_wide<5>(t, l, slot, position, r, g);
            case 6: return attend_wide<6>(t, l, slot, position, r, g);
            case 8: return attend_wide<8>(t, l, slot, position, r, g);
            case 12: return attend_wide<12>(t, l, slot, position, r, g);
            case 16: return attend_wide<16>(t, l, slot, position, r, g);
        }
        for (int d = 0; d < s.D; d += LANES) attend_wide<1>(t, l, slot, position, r, g, d);
    }

    // softmax(q k^T / sqrt(D)) v of one token, for the heads that share key/value head g. Of v, it takes WIDE * 16
    // features, starting at `first`. Meanwhile it prefetches the keys and values of the next head: these streams are
    // too short for the hardware prefetcher.
    template <int WIDE>
    void attend_wide(int t, int l, int slot, int position, int r, int g, int first = 0) {
        const T *key = at(keys, l, slot, g), *value = at(values, l, slot, g) + first;
        float* p = scores[t].data();
        int per_group = s.H / s.K, length = position + 1;
        for (int h = g * per_group; h < (g + 1) * per_group; h++) {
            float share = 1.0f / softmax_weights(qkv(r) + h * s.D, key, length, p);
            Vec acc[2][WIDE] = {};
            int j = 0;
            for (; j + 2 <= length; j += 2) {
                prefetch(value + head_cache + (size_t)j * s.D, 2 * WIDE * LANES);
                for (int i = 0; i < 2; i++)
                    for (int w = 0; w < WIDE; w++) acc[i][w] += load(value + (size_t)(j + i) * s.D + w * LANES) * p[j + i];
            }
            for (; j < length; j++)
                for (int w = 0; w < WIDE; w++) acc[0][w] += load(value + (size_t)j * s.D + w * LANES) * p[j];
            for (int w = 0; w < WIDE; w++) store(attended(r) + h * s.D + first + w * LANES, (acc[0][w] + acc[1][w]) * share);
        }
    }

    // p[j] = exp(score_j - max score), where score_j = q k_j / sqrt(D), for the first `length` keys, and 0 after them.
    // Returns their sum.
    float softmax_weights(const float* q, const T* key, int length, float* p) {
        float scale = 1.0f / std::sqrt((float)s.D);
        Vec most = broadcast(-INFINITY);
        for (int j = 0; j < length; j += LANES, key += s.D * LANES) {
            prefetch(key + head_cache, s.D * LANES);
            Vec acc[4] = {};
            for (int d = 0; d < s.D; d += 4)
                for (int i = 0; i < 4; i++) acc[i] += load(key + (d + i) * LANES) * q[d + i];
            Vec score = ((acc[0] + acc[1]) + (acc[2] + acc[3])) * scale;
            score = LANE < length - j ? score : broadcast(-INFINITY);
            most = score > most ? score : most;
            store(p + j, score);
        }
        float top = most[0];
        for (int i = 1; i < LANES; i++) top = std::max(top, most[i]);
        Vec total = {};
        for (int j = 0; j < length; j += LANES) {
            Vec e = LANE < length - j ? exponential(load(p + j) - top) : broadcast(0.0f);
            total += e;
            store(p + j, e);
        }
        return sum(total);
    }

    const Shape s;
    const float eps;
    ThreadPool pool;
    std::vector<Sampler> samplers;  // one per thread
    std::vector<Layer> layers;
    const int blocks;
    size_t head_cache;
    Block<T> embed, keys, values;
    Matrix<T> head;
    Floats position_embed, cosine, sine, final_gain, final_bias, residual, qkv_rows;
    std::vector<Floats> scores;
    std::vector<T> normed_rows, attended_rows, middle_rows;
    std::vector<Activations> activations;
    int room = 0, hidden_stride = 0, middle_stride = 0, attended_stride = 0, qkv_stride = 0;
};

}  // namespace

extern "C" {

void* gpt_create(const int32_t* shape, float eps) {
    Shape s;
    std::memcpy(&s, shape, sizeof s);
    try {
        return new Decoder<NUMBER>(s, eps);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

void gpt_set(void* g, int what, int layer, const void* data, int is_bf16, int rows, int columns) {
    ((Network*)g)->set(what, layer, data, is_bf16, rows, columns);
}

// A matrix that is quantised, with columns in multiples of 32.
void gpt_set_quantised(void* g, int what, int layer, const int8_t* values, const void* scales, int rows, int columns) {
    ((Network*)g)->set_stored(what, layer, Stored{values, (const bf16*)scales}, rows, columns);
}

// Rounds a matrix (rows, columns) as gpt_set does.
void gpt_quantise(int bits, const void* data, int is_bf16, int rows, int columns, int8_t* values, void* scales) {
    for (size_t i = 0; i < (size_t)rows * columns / GROUP; i++) {
        size_t first = i * GROUP;
        float scale = is_bf16 ? quantise_group((const bf16*)data + first, GROUP, bits, values + first)
                              : quantise_group((const float*)data + first, GROUP, bits, values + first);
        put((bf16*)scales + i, scale);
    }
}

void gpt_forward(void* g, int n, const int32_t* tokens, const int32_t* slots, const int32_t* positions, int wanted,
                 const int32_t* rows, float* logits) {
    ((Network*)g)->forward(n, tokens, slots, positions, wanted, rows, logits);
}

void gpt_choose(void* g, int count, const float* logits, int stride, int V, const void* draws, const int32_t* ids,
                const float* values, int32_t* tokens) {
    ((Network*)g)->choose(count, logits, stride, V, (const Draw*)draws, ids, values, tokens);
}

void gpt_copy(void* g, int source, int target, int length) { ((Network*)g)->copy(source, target, length); }

int64_t gpt_cache_bytes(void* g) { return ((Network*)g)->cache_bytes(); }

void gpt_destroy(void* g) { delete (Network*)g; }

const char* gpt_kernel(int bits) {
    constexpr bool half = sizeof(NUMBER) == 2;
    if (bits) return QUANTISED_KERNEL;
    if (half && amx_allowed()) return "amx-bf16";
#if defined(__AVX512BF16__)
    if (half) return "avx512-bf16";
#endif
#if defined(__AVX512F__)
    return "avx512";
#elif defined(__AVX2__)
    return "avx2";
#elif defined(__ARM_NEON)
    return "neon";
#else
    return "generic";
#endif
}
}
