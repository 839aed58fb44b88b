/* What products and attention need to know of an element: fp32, or with HALF bf16, two neighbours at a time.
 *
 * A step of a sum takes STEP inputs: one float, or the two bf16 that the processor's dot instruction multiplies. Sums are
 * fp32 in both. Panels are [steps, PANEL, STEP], strips [steps, TALL, STEP]; an odd last input stands beside a zero.
 */
#ifndef OMNI_RAY_ELEMENTS_H
#define OMNI_RAY_ELEMENTS_H

#include "vectors.h"

#ifdef HALF
#include <immintrin.h>
typedef uint16_t E;
#define STEP 2
#define NAMED(name) half_##name
#else
typedef float E;
#define STEP 1
#define NAMED(name) name
#endif

/* A matrix whose entry [i, j] lies at values[i * down + j * right]. */
typedef struct {
    const E *values;
    int64_t down, right;
} Strided;

#define LINE 64 /* bytes that memory brings at once */

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t steps_of(int64_t depth) { return (depth + STEP - 1) / STEP; }
static inline int64_t panel_elements(int64_t depth) { return steps_of(depth) * PANEL * STEP; }
/* A strip has room for a vector behind it: a whole one is written at a time. */
static inline int64_t strip_elements(int64_t depth) { return (steps_of(depth) * TALL + LANES) * STEP; }

/* The first `count` floats, at most LANES, and zeros. */
static inline V floats(const float *from, int64_t count) {
    if (count >= LANES) return *(const U *)from;
    V out = (V){0};
    memcpy(&out, from, (size_t)count * sizeof *from);
    return out;
}

/* --- one vector of elements --------------------------------------------------------------------------------------- */

#ifdef HALF

static inline __mmask16 first_lanes(int64_t count) { return count >= LANES ? 0xffff : (__mmask16)((1 << count) - 1); }

/* The first `count` elements, at most LANES, and zeros. */
static inline V widened(const E *from, int64_t count) {
    return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(count), from)), 16);
}

/* Rounded to nearest, ties to even. */
static inline void narrow(E *to, V values, int64_t count) {
    _mm256_mask_storeu_epi16(to, first_lanes(count), (__m256i)_mm512_cvtneps_pbh((__m512)values));
}

#else

static inline V widened(const E *from, int64_t count) {
    if (count >= LANES) return *(const U *)from;
    V out = (V){0};
    for (int64_t i = 0; i < count; i++) out[i] = from[i];
    return out;
}

static inline void narrow(E *to, V values, int64_t count) {
    if (count >= LANES)
        *(U *)to = values;
    else
        for (int64_t i = 0; i < count; i++) to[i] = values[i];
}

#endif

/* Vectors of a row of `size`: `i` and `count`, which is LANES, known to the compiler, for all but a last one. */
#define EACH_VECTOR(SIZE, ...)                                                                                        \
    {                                                                                                                 \
        int64_t i = 0;                                                                                                \
        for (; i + LANES <= (SIZE); i += LANES) {                                                                     \
            const int64_t count = LANES;                                                                              \
            __VA_ARGS__                                                                                               \
        }                                                                                                             \
        if (i < (SIZE)) {                                                                                             \
            const int64_t count = (SIZE)-i;                                                                           \
            __VA_ARGS__                                                                                               \
        }                                                                                                             \
    }

/* to [size] = from [size] x factor, in the element's precision. */
static inline void narrow_row(E *to, const float *from, float factor, int64_t size) {
    EACH_VECTOR(size, narrow(to + i, floats(from + i, count) * factor, count);)
}

/* --- functions of values, as exact as the element ----------------------------------------------------------------- */

#ifdef HALF

/* 2^y, right to 3e-6 where bf16 has 4e-3; y is held between -126 and 126, and what is no number stays none. */
static inline V power_of_two(V y) {
    const __m512 held = _mm512_min_ps(_mm512_set1_ps(126.0f), _mm512_max_ps(_mm512_set1_ps(-126.0f), (__m512)y));
    const __m512 whole = _mm512_roundscale_ps(held, 0);
    const V r = (V)held - (V)whole;
    V p = (V){0} + 9.58285294e-3f;
    p = p * r + 5.59064262e-2f;
    p = p * r + 2.40240991e-1f;
    p = p * r + 6.93124175e-1f;
    p = p * r + 1.0f;
    return (V)_mm512_scalef_ps((__m512)p, whole);
}

/* e^x for x <= 0; below e^-87 it stays there. */
static inline V share_of(V x) { return power_of_two(x * 1.44269504f); }

/* 1 / (1 + e^-x), its quotient right to 6e-5. */
static inline V sigmoid(V x) { return (V)_mm512_rcp14_ps((__m512)(1.0f + power_of_two(x * -1.44269504f))); }

#else

static inline V share_of(V x) { return below_one(x); }
static inline V sigmoid(V x) { return 1.0f / (1.0f + exponential(-x)); }

#endif

/* Memory brings a row of `bytes`, of many that lie too far apart for the processor to foresee. */
static inline void ask_for(const void *row, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += LINE) __builtin_prefetch((const char *)row + at, 0, 3);
}

/* --- copies ------------------------------------------------------------------------------------------------------- */

#if LANES == 16
#define EVEN_HALF 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define ODD_HALF 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define STAGES 4
#else
#define EVEN_HALF 0, 8, 1, 9, 2, 10, 3, 11
#define ODD_HALF 4, 12, 5, 13, 6, 14, 7, 15
#define STAGES 3
#endif
#if defined(__clang__)
#define INTERLEAVED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define INTERLEAVED(a, b, ...) __builtin_shuffle(a, b, (I){__VA_ARGS__})
#endif

/* A vector of steps wherever elements may lie. */
typedef float Anywhere __attribute__((vector_size(LANES * 4), aligned(__alignof__(E)), may_alias));

/* LANES rows of LANES steps, turned over the diagonal: each stage interleaves vector i with i + LANES / 2. */
static inline void turned(const E *from, int64_t down, E *to, int64_t to_down) {
    V a[LANES], b[LANES];
    for (int i = 0; i < LANES; i++) a[i] = *(const Anywhere *)(from + i * down);
    for (int stage = 0; stage < STAGES; stage++) {
        for (int i = 0; i < LANES / 2; i++) {
            b[2 * i] = INTERLEAVED(a[i], a[i + LANES / 2], EVEN_HALF);
            b[2 * i + 1] = INTERLEAVED(a[i], a[i + LANES / 2], ODD_HALF);
        }
        memcpy(a, b, sizeof a);
    }
    for (int i = 0; i < LANES; i++) *(U *)(to + i * to_down) = a[i];
}

/* Inputs of one step of a column: a row's own where they are there, zeros behind the last. */
static inline void copy_step(const E *from, int64_t down, int64_t step, int64_t depth, E *to) {
    for (int64_t s = 0; s < STEP; s++) to[s] = STEP * step + s < depth ? from[(STEP * step + s) * down] : 0;
}

/* One step of PANEL columns that lie beside each other. */
static inline void copy_columns(const E *from, int64_t down, int64_t inputs, int64_t columns, E *to) {
#ifdef HALF
    const __m512i low = _mm512_set_epi16(
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_or_si512(low, _mm512_set1_epi16(16));
    for (int64_t c = 0; c < PANEL; c += 2 * LANES) {
        const int64_t there = columns - c;
        const __mmask32 mask = there >= 2 * LANES ? ~0u : there <= 0 ? 0 : (1u << there) - 1;
        const __m512i first = _mm512_maskz_loadu_epi16(mask, from + c);
        const __m512i second = _mm512_maskz_loadu_epi16(inputs > 1 ? mask : 0, from + down + c);
        _mm512_storeu_si512(to + 2 * c, _mm512_permutex2var_epi16(first, low, second));
        _mm512_storeu_si512(to + 2 * c + 2 * LANES, _mm512_permutex2var_epi16(first, high, second));
    }
#else
    (void)down, (void)inputs;
    if (columns == PANEL)
        for (int v = 0; v < WIDE; v++) *(U *)(to + v * LANES) = *(const U *)(from + v * LANES);
    else
        for (int64_t c = 0; c < PANEL; c++) to[c] = c < columns ? from[c] : 0;
#endif
}

/* Columns first to first + columns of b [depth, ...], whose rows or columns lie together, as one panel filled with zeros. */
static inline void copy_panel(Strided b, int64_t depth, int64_t first, int64_t columns, E *to) {
    const E *from = b.values + first * b.right;
    const int64_t steps = steps_of(depth);
    if (b.right == 1) {
        for (int64_t k = 0; k < steps; k++, from += STEP * b.down, to += PANEL * STEP)
            copy_columns(from, b.down, depth - STEP * k, columns, to);
        return;
    }
    if (columns < PANEL) memset(to, 0, (size_t)panel_elements(depth) * sizeof *to);
    int64_t c = 0;
    for (; c + LANES <= columns; c += LANES) {
        int64_t k = 0;
        for (; STEP * (k + LANES) <= depth; k += LANES)
            turned(from + c * b.right + STEP * k, b.right, to + (k * PANEL + c) * STEP, PANEL * STEP);
        for (; k < steps; k++)
            for (int i = 0; i < LANES; i++)
                copy_step(from + (c + i) * b.right, b.down, k, depth, to + (k * PANEL + c + i) * STEP);
    }
    for (; c < columns; c++)
        for (int64_t k = 0; k < steps; k++) copy_step(from + c * b.right, b.down, k, depth, to + (k * PANEL + c) * STEP);
}

/* Rows of a [rows, depth] as strips; where rows lie together, a whole vector is written at a time, and what it holds too
 * much the next one overwrites. */
static inline void copy_strips(Strided a, int64_t rows, int64_t depth, E *to) {
    const int64_t next = strip_elements(depth), steps = steps_of(depth);
    for (int64_t k = 0; k < steps; k++) {
        const E *from = a.values + STEP * k * a.right;
        E *at = to + k * TALL * STEP;
        int64_t r = 0;
        for (int64_t s = 0; a.down == 1 && s < STEP; s++)
            ask_for(from + (8 * STEP + s) * a.right, rows * (int64_t)sizeof(E));
        for (; a.down == 1 && r + 8 <= rows; r += TALL, at += next) {
#ifdef HALF
            const __m128i none = _mm_setzero_si128(), first = _mm_loadu_si128((const void *)(from + r));
            const __m128i second = 2 * k + 1 < depth ? _mm_loadu_si128((const void *)(from + a.right + r)) : none;
            _mm_storeu_si128((void *)at, _mm_unpacklo_epi16(first, second));
            _mm_storeu_si128((void *)(at + 8), _mm_unpackhi_epi16(first, second));
#else
            memcpy(at, from + r, 8 * sizeof *at);
#endif
        }
        for (; r < rows; r += TALL, at += next)
            for (int64_t i = 0; i < TALL && r + i < rows; i++)
                copy_step(a.values + (r + i) * a.down, a.right, k, depth, at + i * STEP);
    }
}

/* --- sums --------------------------------------------------------------------------------------------------------- */

#ifdef HALF

/* sum of x [rows, steps], its rows and steps `down` and `right` elements apart, and a panel: to `out` in bf16 where there
 * is one, else to `sums`; with `add` onto what `sums` holds. */
static inline __attribute__((always_inline)) void element_tile(
    const int rows, const int wide, const E *x, int64_t down, int64_t right, const E *w, int64_t steps, float *sums,
    int64_t sums_down, E *out, int64_t out_down, int64_t columns, int add, Ahead ahead) {
    __m512 sum[TALL][WIDE];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < wide; v++)
            sum[r][v] = add ? _mm512_maskz_loadu_ps(
                                  first_lanes(columns > v * LANES ? columns - v * LANES : 0), sums + r * sums_down + v * LANES)
                            : _mm512_setzero_ps();
    for (int64_t k = 0; k < steps; k++, w += PANEL * STEP, x += right) {
        __m512bh in[WIDE];
        __builtin_prefetch(ahead.from + k * ahead.by, 0, 2);
        for (int v = 0; v < wide; v++) in[v] = (__m512bh)_mm512_loadu_si512(w + v * LANES * STEP);
        for (int r = 0; r < rows; r++) {
            int32_t both;
            memcpy(&both, x + r * down, sizeof both);
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(both);
            for (int v = 0; v < wide; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], pair, in[v]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < wide; v++) {
            const int64_t there = columns > v * LANES ? columns - v * LANES : 0;
            if (out)
                narrow(out + r * out_down + v * LANES, (V)sum[r][v], there);
            else
                _mm512_mask_storeu_ps(sums + r * sums_down + v * LANES, first_lanes(there), sum[r][v]);
        }
}

#else

static inline __attribute__((always_inline)) void element_tile(
    const int rows, const int wide, const E *x, int64_t down, int64_t right, const E *w, int64_t steps, float *sums,
    int64_t sums_down, E *out, int64_t out_down, int64_t columns, int add, Ahead ahead) {
    (void)out, (void)out_down;
    tile(rows, wide, x, down, right, w, steps, sums, sums_down, columns, add, ahead);
}

#endif

#define TILE(COUNT, COLUMNS, RIGHT, DOWN)                                                                             \
    element_tile(COUNT, COLUMNS, x, DOWN, RIGHT, w, steps, sums, sums_down, out, out_down, columns, add, ahead)
/* As few vectors as hold the columns: those of zeros cost as much as others. */
#if WIDE == 4
#define STRIP(COUNT, RIGHT, DOWN)                                                                                     \
    (columns > 3 * LANES   ? TILE(COUNT, 4, RIGHT, DOWN)                                                              \
     : columns > 2 * LANES ? TILE(COUNT, 3, RIGHT, DOWN)                                                              \
     : columns > LANES     ? TILE(COUNT, 2, RIGHT, DOWN)                                                              \
                           : TILE(COUNT, 1, RIGHT, DOWN))
#else
#define STRIP(COUNT, RIGHT, DOWN) (columns > LANES ? TILE(COUNT, 2, RIGHT, DOWN) : TILE(COUNT, 1, RIGHT, DOWN))
#endif

/* At most TALL rows of x, read as they lie (`right` is STEP) or from a strip, and one panel. */
static inline void panel_rows(
    int64_t rows, const E *x, int64_t down, int64_t right, const E *w, int64_t steps, float *sums, int64_t sums_down, E *out,
    int64_t out_down, int64_t columns, int add, Ahead ahead) {
    if (!ahead.from) ahead.from = (const char *)x; /* a line that is there costs less than a branch */
    switch (rows) {
    case 1: STRIP(1, right, down); break;
    case 2: STRIP(2, right, down); break;
    case 3: STRIP(3, right, down); break;
#if TALL == 6
    case 4: STRIP(4, right, down); break;
    case 5: STRIP(5, right, down); break;
#endif
    default: right == STEP ? STRIP(TALL, STEP, down) : STRIP(TALL, TALL * STEP, STEP);
    }
}

#endif
