// y = x W^T and tiles of W from packed weights (docs/compressed-files.md), bfloat16 or float16.
//
// A row of W is a string of codes, one byte for 8 columns, and its stored values in order. For `bitmask` a code
// is 8 bits of the mask; for 2:4 (`nm`) it is the places of 2 x 2 values. Either way a table says where the next
// values of a code go, so 8 columns are one byte shuffle, and both formats share all that follows.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define HAS_AVX2 1
#define AVX2 __attribute__((target("avx2,fma,f16c,popcnt")))
// Compilers that know all of it. A test defines AVX512 and functions in place of the instructions.
#if defined(AVX512) || (defined(__clang__) ? __clang_major__ >= 11 : __GNUC__ >= 11)
#define HAS_AVX512 1
#endif
#if defined(HAS_AVX512) && !defined(AVX512)
// One list for both paths: bf16 instructions appear only where they are called by name, in PAIRS.
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,popcnt")))
#endif
#endif

namespace {

enum Layout { BITMASK = 0, TWO_OF_FOUR = 1 };
enum Path { PORTABLE = 0, VECTOR = 1, VECTOR_512 = 2, PAIRS_512 = 3 };
constexpr int64_t STEP = 8;     // columns a step of AVX2: one code
constexpr int64_t CHUNK = 32;   // columns a step of AVX-512: four codes
constexpr int64_t SPAN = 16;    // chunks whose codes are read at once
constexpr int64_t BLOCK = 32;   // rows a task
constexpr int BATCH = 8;        // rows of x that share a decompression
constexpr int8_t NONE = -1;     // of a shuffle: writes zero
constexpr int CODES = 256;

// For each code where each of 8 columns finds its value among the next ones, and how many those are.
struct Table {
    alignas(16) int8_t shuffle[CODES][16];
    alignas(32) int8_t wide[CODES][32];  // the bytes of bfloat16 as the upper half of float32
    int8_t source[CODES][8];
    uint8_t count[CODES];

    explicit Table(Layout layout) {
        for (int code = 0; code < CODES; ++code) {
            int8_t* row = source[code];
            std::fill(row, row + 8, NONE);
            count[code] = 0;
            if (layout == BITMASK) {
                for (int column = 0; column < 8; ++column)
                    if (code >> column & 1) row[column] = static_cast<int8_t>(count[code]++);
            } else {
                for (; count[code] < 4; ++count[code])
                    row[count[code] / 2 * 4 + (code >> 2 * count[code] & 3)] = static_cast<int8_t>(count[code]);
            }
            for (int byte = 0; byte < 16; ++byte) {
                int8_t from = row[byte / 2];
                shuffle[code][byte] = from == NONE ? NONE : static_cast<int8_t>(2 * from + byte % 2);
            }
            for (int byte = 0; byte < 32; ++byte)
                wide[code][byte] = byte % 4 < 2 ? NONE : shuffle[code][byte / 4 * 2 + byte % 2];
        }
    }
};

const Table TABLES[2] = {Table(BITMASK), Table(TWO_OF_FOUR)};

// One packed matrix. Row r has the codes codes[r * width ...] and the values values[offsets[r] ...].
struct Matrix {
    int64_t rows, columns, width;
    const uint8_t* codes;
    const uint16_t* values;
    const int64_t* offsets;  // rows + 1
    Layout layout;
    bool half;  // float16, else bfloat16

    const uint8_t* code(int64_t row) const { return codes + row * width; }
    const uint16_t* value(int64_t row) const { return values + offsets[row]; }
    // Quick code reads `some` values at a time, of which not all are the row's: not in rows near the end of `values`.
    bool reads_within(int64_t row, int64_t some = 8) const { return offsets[row + 1] + some <= offsets[rows]; }
};

float widened(uint16_t bits, bool half) {
    uint32_t wide;
    if (half) {
        const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
        if (exponent == 0) {
            const float small = static_cast<float>(fraction) * 0x1p-24f;
            return bits >> 15 ? -small : small;
        }
        wide = uint32_t(bits >> 15) << 31 | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
    } else {
        wide = uint32_t(bits) << 16;
    }
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

// ---- portable ----

float sum_of(const float* lane) {
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

// Writes a row of W, rounded up to whole codes.
void expand_row(const Matrix& w, int64_t row, uint16_t* out) {
    const Table& table = TABLES[w.layout];
    const uint16_t* next = w.value(row);
    const bool free_of_branches = w.reads_within(row);
    for (int64_t at = 0; at < w.width; ++at, out += 8) {
        const uint8_t code = w.code(row)[at];
        const int8_t* source = table.source[code];
        if (free_of_branches)
            for (int column = 0; column < 8; ++column)
                out[column] = next[source[column] & 7] & static_cast<uint16_t>(~(source[column] >> 7));
        else
            for (int column = 0; column < 8; ++column) out[column] = source[column] == NONE ? 0 : next[source[column]];
        next += table.count[code];
    }
}

// How AVX-512 brings weights to x: widened by halves of a chunk (float16), widened by even and odd columns (bfloat16),
// or two columns an instruction, both bfloat16. All others widen them in the order of columns.
enum Product { HALVES, EVEN_ODD, PAIRS };

// The batch of x as the paths read it, with zeros behind the last column. In `steps` and `narrow` the rows lie side by
// side, a step of the first, the same step of the second: rows a power of two apart would share few lines of a cache.
struct Inputs {
    const float* plain;      // row after row, `stride` numbers apart
    const float* steps;      // EVEN_ODD: of every chunk the even columns first
    const uint16_t* narrow;  // PAIRS: in bfloat16
    int64_t stride;
    int batch;
};

// y[m * rows + row] for the rows of a range.
void multiply_portable(const Matrix& w, int64_t first, int64_t last, const Inputs& x, float* y) {
    if (first == last) return;
    std::vector<uint16_t> packed(w.width * 8);
    std::vector<float> row_of_w(w.width * 8);
    for (int64_t row = first; row < last; ++row) {
        expand_row(w, row, packed.data());
        for (size_t column = 0; column < packed.size(); ++column)
            row_of_w[column] = widened(packed[column], w.half);
        for (int m = 0; m < x.batch; ++m) {
            const float* row_of_x = x.plain + m * x.stride;
            float sum[8] = {};  // apart, so that a compiler may use vectors
            for (int64_t column = 0; column < w.width * 8; column += 8)
                for (int lane = 0; lane < 8; ++lane) sum[lane] += row_of_w[column + lane] * row_of_x[column + lane];
            y[m * w.rows + row] = sum_of(sum);
        }
    }
}

// Rows [first, last) of W, `columns` apart.
void unpack_portable(const Matrix& w, int64_t first, int64_t last, uint16_t* out) {
    std::vector<uint16_t> packed(w.width * 8);
    for (int64_t row = first; row < last; ++row, out += w.columns) {
        expand_row(w, row, packed.data());
        std::copy_n(packed.data(), w.columns, out);
    }
}

// ---- AVX2 ----
#ifdef HAS_AVX2

AVX2 inline __m128i load_eight(const uint16_t* next) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(next));
}

// The 8 columns of a code in the dtype of the file.
template <Layout L>
AVX2 inline __m128i expand_code(uint32_t code, const uint16_t* next) {
    const auto* places = reinterpret_cast<const __m128i*>(TABLES[L].shuffle[code]);
    return _mm_shuffle_epi8(load_eight(next), _mm_load_si128(places));
}

// The same in float32, which for bfloat16 takes no more: its bytes are the upper ones.
template <Layout L, bool HALF>
AVX2 inline __m256 widen_code(uint32_t code, const uint16_t* next) {
    if (HALF) return _mm256_cvtph_ps(expand_code<L>(code, next));
    const auto* places = reinterpret_cast<const __m256i*>(TABLES[L].wide[code]);
    const __m256i twice = _mm256_broadcastsi128_si256(load_eight(next));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(twice, _mm256_load_si256(places)));
}

// How many values a code has.
template <Layout L>
AVX2 inline int64_t count_of(uint32_t code) {
    return L == BITMASK ? _mm_popcnt_u32(code) : 4;
}

AVX2 inline float sum_of(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

// ROWS rows of W side by side: their streams do not wait for each other, and they share what is read of x.
template <Layout L, bool HALF, int M, int ROWS>
AVX2 void dot_rows(const Matrix& w, int64_t row, const Inputs& x, float* y) {
    const uint16_t* next[ROWS];
    __m256 sum[ROWS][M];
    for (int k = 0; k < ROWS; ++k) {
        next[k] = w.value(row + k);
        for (int m = 0; m < M; ++m) sum[k][m] = _mm256_setzero_ps();
    }
    const uint8_t* codes = w.code(row);
    const float* step = x.steps;
    for (int64_t at = 0; at < w.width; ++at, step += M * STEP)
        for (int k = 0; k < ROWS; ++k) {
            const uint8_t code = codes[k * w.width + at];
            const __m256 columns = widen_code<L, HALF>(code, next[k]);
            next[k] += count_of<L>(code);
            for (int m = 0; m < M; ++m)
                sum[k][m] = _mm256_fmadd_ps(columns, _mm256_loadu_ps(step + m * STEP), sum[k][m]);
        }
    for (int k = 0; k < ROWS; ++k)
        for (int m = 0; m < M; ++m) y[m * w.rows + row + k] = sum_of(sum[k][m]);
}

template <Layout L, bool HALF>
struct Vector {
    template <int M>
    AVX2 static void multiply(const Matrix& w, int64_t row, int64_t last, const Inputs& x, float* y) {
        // Sums of many rows of x find no registers, and still more than one row of W gains: x is read less often.
        constexpr int ROWS = M <= 3 ? 4 : M == 4 ? 3 : 2;
        for (; row + ROWS <= last && w.reads_within(row + ROWS - 1); row += ROWS)
            dot_rows<L, HALF, M, ROWS>(w, row, x, y);
        for (; row < last && w.reads_within(row); ++row) dot_rows<L, HALF, M, 1>(w, row, x, y);
        multiply_portable(w, row, last, x, y);
    }
};

template <Layout L>
AVX2 void unpack_vector(const Matrix& w, int64_t row, int64_t last, uint16_t* out) {
    for (; row < last && w.reads_within(row); ++row, out += w.columns) {
        const uint8_t* code = w.code(row);
        const uint16_t* next = w.value(row);
        for (int64_t at = 0; at < w.width; ++at) {
            const __m128i columns = expand_code<L>(code[at], next);
            next += count_of<L>(code[at]);
            const int64_t left = w.columns - at * STEP;
            if (left >= STEP) {
                _mm_storeu_si128(reinterpret_cast<__m128i*>(out + at * STEP), columns);
            } else {
                uint16_t rest[STEP];
                _mm_storeu_si128(reinterpret_cast<__m128i*>(rest), columns);
                std::copy_n(rest, left, out + at * STEP);
            }
        }
    }
    unpack_portable(w, row, last, out);
}

AVX2 void widen_half(const uint16_t* from, int64_t count, float* out) {
    int64_t at = 0;
    for (; at + STEP <= count; at += STEP) _mm256_storeu_ps(out + at, _mm256_cvtph_ps(load_eight(from + at)));
    for (; at < count; ++at) out[at] = widened(from[at], true);
}
#endif

// ---- AVX-512 with VBMI2: an expand puts the next values where the bits of a mask are ----
#ifdef HAS_AVX512

// 64 codes of 2:4 as masks of 8 columns: four bits name two places of four.
AVX512 inline __m512i masks_of_places(__m512i codes) {
    const __m512i places = _mm512_broadcast_i32x4(_mm_setr_epi8(1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8));
    const __m512i low_bits = _mm512_set1_epi32(0x0f0f0f0f);
    const __m512i low = _mm512_shuffle_epi8(places, _mm512_and_si512(codes, low_bits));
    const __m512i high = _mm512_shuffle_epi8(places, _mm512_and_si512(_mm512_srli_epi16(codes, 4), low_bits));
    return _mm512_or_si512(low, _mm512_slli_epi16(high, 4));
}

// The masks of a span of a row from a code on; behind the row there is nothing.
AVX512 inline void read_masks(const Matrix& w, int64_t row, int64_t at, uint32_t* masks) {
    const int64_t left = w.width - at;
    const __mmask64 there = left < 64 ? (uint64_t(1) << left) - 1 : ~uint64_t(0);
    __m512i codes = _mm512_maskz_loadu_epi8(there, w.code(row) + at);
    if (w.layout == TWO_OF_FOUR) codes = _mm512_maskz_mov_epi8(there, masks_of_places(codes));
    _mm512_storeu_si512(masks, codes);
}

// The next 32 columns in the dtype of the file; `next` moves on.
AVX512 inline __m512i expand_chunk(uint32_t mask, const uint16_t*& next) {
    const __m512i values = _mm512_loadu_si512(next);
    next += _mm_popcnt_u32(mask);
    return _mm512_maskz_expand_epi16(mask, values);
}

// sum + 32 columns of a row of W times those of a row of x, which begin at `at`.
// The instruction of PAIRS takes numbers below 1.2e-38 for zero.
template <Product P>
AVX512 inline __m512 add_products(__m512 sum, __m512i w, const Inputs& x, int64_t at) {
    if (P == PAIRS) return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_loadu_si512(x.narrow + at));
    const __m512 a = P == HALVES ? _mm512_cvtph_ps(_mm512_castsi512_si256(w))
                                 : _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
    const __m512 b = P == HALVES ? _mm512_cvtph_ps(_mm512_extracti64x4_epi64(w, 1))
                                 : _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(int(0xffff0000))));
    sum = _mm512_fmadd_ps(a, _mm512_loadu_ps(x.steps + at), sum);
    return _mm512_fmadd_ps(b, _mm512_loadu_ps(x.steps + at + CHUNK / 2), sum);
}

AVX512 inline float sum_of_512(__m512 v) {
    float lane[16];
    _mm512_storeu_ps(lane, v);
    for (int i = 0; i < 8; ++i) lane[i] += lane[i + 8];
    return sum_of(lane);
}

// ROWS rows of W side by side: where the values of a chunk begin is known only after the chunk before, and while one
// row waits for that the others go on. They share what is read of x.
template <Product P, int M, int ROWS>
AVX512 void dot_rows_512(const Matrix& w, int64_t row, const Inputs& x, float* y) {
    const uint16_t* next[ROWS];
    __m512 sum[ROWS][M];
    uint32_t masks[ROWS][SPAN];
    for (int k = 0; k < ROWS; ++k) {
        next[k] = w.value(row + k);
        for (int m = 0; m < M; ++m) sum[k][m] = _mm512_setzero_ps();
    }
    const int64_t chunks = (w.columns + CHUNK - 1) / CHUNK;
    for (int64_t first = 0; first < chunks; first += SPAN) {
        for (int k = 0; k < ROWS; ++k) read_masks(w, row + k, first * 4, masks[k]);
        const int64_t some = std::min(SPAN, chunks - first);
        for (int64_t chunk = 0; chunk < some; ++chunk)
            for (int k = 0; k < ROWS; ++k) {
                const __m512i expanded = expand_chunk(masks[k][chunk], next[k]);
                for (int m = 0; m < M; ++m)
                    sum[k][m] = add_products<P>(sum[k][m], expanded, x, ((first + chunk) * M + m) * CHUNK);
            }
    }
    for (int k = 0; k < ROWS; ++k)
        for (int m = 0; m < M; ++m) y[m * w.rows + row + k] = sum_of_512(sum[k][m]);
}

template <Product P>
struct Vector512 {
    template <int M>
    AVX512 static void multiply(const Matrix& w, int64_t row, int64_t last, const Inputs& x, float* y) {
        constexpr int ROWS = M <= 4 ? 4 : 2;  // 16 sums at most, of 32 registers
        for (; row + ROWS <= last && w.reads_within(row + ROWS - 1, CHUNK); row += ROWS)
            dot_rows_512<P, M, ROWS>(w, row, x, y);
        for (; row < last && w.reads_within(row, CHUNK); ++row) dot_rows_512<P, M, 1>(w, row, x, y);
        multiply_portable(w, row, last, x, y);
    }
};

AVX512 void unpack_512(const Matrix& w, int64_t row, int64_t last, uint16_t* out) {
    uint32_t masks[SPAN];
    for (; row < last && w.reads_within(row, CHUNK); ++row, out += w.columns) {
        const uint16_t* next = w.value(row);
        for (int64_t column = 0; column < w.columns; column += CHUNK) {
            const int64_t chunk = column / CHUNK, left = w.columns - column;
            if (chunk % SPAN == 0) read_masks(w, row, chunk * 4, masks);
            const __m512i expanded = expand_chunk(masks[chunk % SPAN], next);
            const __mmask32 there = left < CHUNK ? (uint32_t(1) << left) - 1 : ~uint32_t(0);
            _mm512_mask_storeu_epi16(out + column, there, expanded);
        }
    }
    unpack_portable(w, row, last, out);
}
#endif

// ---- which of them ----

using Multiply = void (*)(const Matrix&, int64_t, int64_t, const Inputs&, float*);
using Unpack = void (*)(const Matrix&, int64_t, int64_t, uint16_t*);

int best_path() {
#ifdef HAS_AVX512  // the system's support of the registers is looked at too
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("popcnt"))
        return __builtin_cpu_supports("avx512bf16") ? PAIRS_512 : VECTOR_512;
#endif
#ifdef HAS_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
        __builtin_cpu_supports("popcnt"))
        return VECTOR;
#endif
    return PORTABLE;
}

// The function of K for a batch of 1 to BATCH rows.
template <typename K, int... LESS>
Multiply of_batch(int batch, std::integer_sequence<int, LESS...>) {
    constexpr Multiply all[] = {K::template multiply<LESS + 1>...};
    return all[batch - 1];
}

template <typename K>
Multiply of_batch(int batch) {
    return of_batch<K>(batch, std::make_integer_sequence<int, BATCH>());
}

Multiply multiply_for(const Matrix& w, int batch, int path, Product product) {
#ifdef HAS_AVX512
    if (path >= VECTOR_512 && product == PAIRS) return of_batch<Vector512<PAIRS>>(batch);
    if (path >= VECTOR_512) return w.half ? of_batch<Vector512<HALVES>>(batch) : of_batch<Vector512<EVEN_ODD>>(batch);
#endif
#ifdef HAS_AVX2
    if (path >= VECTOR && w.layout == BITMASK)
        return w.half ? of_batch<Vector<BITMASK, true>>(batch) : of_batch<Vector<BITMASK, false>>(batch);
    if (path >= VECTOR)
        return w.half ? of_batch<Vector<TWO_OF_FOUR, true>>(batch) : of_batch<Vector<TWO_OF_FOUR, false>>(batch);
#endif
    return multiply_portable;
}

Unpack unpack_for(const Matrix& w, int path) {
#ifdef HAS_AVX512
    if (path >= VECTOR_512) return unpack_512;
#endif
#ifdef HAS_AVX2
    if (path >= VECTOR) return w.layout == BITMASK ? unpack_vector<BITMASK> : unpack_vector<TWO_OF_FOUR>;
#endif
    return unpack_portable;
}

void widen_row(const Matrix& w, const uint16_t* from, float* out, int path) {
#ifdef HAS_AVX2
    if (path >= VECTOR && w.half) return widen_half(from, w.columns, out);
#else
    (void)path;
#endif
    for (int64_t column = 0; column < w.columns; ++column) out[column] = widened(from[column], w.half);
}

// Owns a batch of x as the paths read it.
class Arranged {
  public:
    Arranged(int64_t columns, Product product, int path)
        : columns(columns), stride((columns + CHUNK - 1) / CHUNK * CHUNK), product(product), path(path) {}

    Inputs of(const float* x, int batch) {
        plain.assign(batch * stride, 0.0f);
        for (int m = 0; m < batch; ++m) std::copy_n(x + m * columns, columns, plain.data() + m * stride);
        const auto in_order = [](const float* from, int64_t column) { return from[column]; };
        if (path == VECTOR)
            arrange<STEP>(batch, steps, in_order);
        else if (path >= VECTOR_512 && product == HALVES)
            arrange<CHUNK>(batch, steps, in_order);
        else if (path >= VECTOR_512 && product == EVEN_ODD)
            arrange<CHUNK>(batch, steps, [](const float* from, int64_t column) {
                return from[column < CHUNK / 2 ? 2 * column : 2 * column - CHUNK + 1];
            });
        else if (path >= VECTOR_512)  // the numbers are of bfloat16: the rest of their bits is zero
            arrange<CHUNK>(batch, narrow, [](const float* from, int64_t column) {
                uint32_t bits;
                std::memcpy(&bits, from + column, sizeof bits);
                return static_cast<uint16_t>(bits >> 16);
            });
        return {plain.data(), steps.data(), narrow.data(), stride, batch};
    }

  private:
    // `read` gives a column of the steps from a step of `plain`.
    template <int64_t COLUMNS, typename T, typename Read>
    void arrange(int batch, std::vector<T>& to, Read read) {
        to.resize(plain.size());
        T* next = to.data();
        for (int64_t at = 0; at < stride; at += COLUMNS)
            for (int m = 0; m < batch; ++m, next += COLUMNS)
                for (int64_t column = 0; column < COLUMNS; ++column)
                    next[column] = read(plain.data() + m * stride + at, column);
    }

    const int64_t columns, stride;
    const Product product;
    const int path;
    std::vector<float> plain, steps;
    std::vector<uint16_t> narrow;
};

// Tasks are dealt out one by one: rows differ in what they hold, and cores in what else they do.
template <typename Task>
void for_blocks(int64_t first, int64_t last, int threads, Task task) {
    const int64_t blocks = (last - first + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && blocks > 1)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t from = first + block * BLOCK;
        task(from, std::min(from + BLOCK, last));
    }
}

}  // namespace

extern "C" {

// The best path that this processor has.
int secateur_path() {
    static const int best = best_path();
    return best;
}

// y (batch, rows) = x (batch, columns) W^T, all float32 and contiguous. `half`: W is float16, else bfloat16;
// `narrow`: so are all numbers of x bfloat16, though they are given as float32.
void secateur_multiply(int64_t rows, int64_t columns, const uint8_t* codes, const uint16_t* values,
                       const int64_t* offsets, int layout, int half, int narrow, const float* x, int64_t batch,
                       float* y, int threads, int path) {
    const Matrix w{rows, columns, (columns + 7) / 8, codes, values, offsets, Layout(layout), half != 0};
    const Product product = half ? HALVES : narrow && path >= PAIRS_512 ? PAIRS : EVEN_ODD;
    Arranged arranged(columns, product, path);
    for (int64_t start = 0; start < batch; start += BATCH) {
        const int some = static_cast<int>(std::min<int64_t>(BATCH, batch - start));
        const Inputs inputs = arranged.of(x + start * columns, some);
        const Multiply multiply = multiply_for(w, some, path, product);
        for_blocks(0, rows, threads, [&](int64_t from, int64_t to) { multiply(w, from, to, inputs, y + start * rows); });
    }
}

// Rows [first, last) of W: out (last - first, columns), as they were before packing or, if `wide`, in float32.
void secateur_unpack(int64_t rows, int64_t columns, const uint8_t* codes, const uint16_t* values,
                     const int64_t* offsets, int layout, int half, int64_t first, int64_t last, void* out, int wide,
                     int threads, int path) {
    const Matrix w{rows, columns, (columns + 7) / 8, codes, values, offsets, Layout(layout), half != 0};
    const Unpack unpack = unpack_for(w, path);
    for_blocks(first, last, threads, [&](int64_t from, int64_t to) {
        const int64_t begin = (from - first) * columns;
        if (!wide) return unpack(w, from, to, static_cast<uint16_t*>(out) + begin);
        std::vector<uint16_t> row_of_w(columns);  // of the cache, until it is widened
        float* next = static_cast<float*>(out) + begin;
        for (int64_t row = from; row < to; ++row, next += columns) {
            unpack(w, row, row + 1, row_of_w.data());
            widen_row(w, row_of_w.data(), next, path);
        }
    });
}
}
