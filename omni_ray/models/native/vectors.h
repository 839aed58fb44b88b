/* Vectors of a processor's width, products with matrices in panels, and functions of values; GCC's vector types, fp32.
 *
 * Every sum of a row runs over its own inputs in their order, whoever stands beside it.
 */
#ifndef OMNI_RAY_VECTORS_H
#define OMNI_RAY_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16 /* floats of one vector */
#define WIDE 4   /* vectors of one panel */
#define TALL 6   /* rows that pass a panel together: TALL x WIDE sums fit into the registers */
#else
#define LANES 8
#define WIDE 2
#define TALL 4
#endif
#define PANEL (LANES * WIDE)

typedef float V __attribute__((vector_size(LANES * 4)));
typedef float U __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t I __attribute__((vector_size(LANES * 4)));

/* A matrix [K, N] as panels of PANEL columns, each [K, PANEL]; the last is filled up with zeros. */
typedef struct {
    const float *values;
    int64_t inputs, outputs;
} Matrix;

/* --- products ----------------------------------------------------------------------------------------------------- */

/* What memory is asked for meanwhile: a line at `from` with the first input, then each `by` bytes further. */
typedef struct {
    const char *from;
    int64_t by;
} Ahead;
#define NOTHING ((Ahead){NULL, 0})

/* sum [rows, wide vectors] of x [rows, inputs], its rows and inputs `down` and `right` apart, and a panel's first vectors. */
static inline __attribute__((always_inline)) void panel_sums(
    const int rows, const int wide, const float *x, int64_t down, int64_t right, const float *w, int64_t inputs,
    Ahead ahead, V sum[TALL][WIDE]) {
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < wide; v++) sum[r][v] = (V){0};
    for (int64_t k = 0; k < inputs; k++, w += PANEL, x += right) {
        V in[WIDE];
        for (int v = 0; v < wide; v++) in[v] = *(const U *)(w + v * LANES);
        if (ahead.from) __builtin_prefetch(ahead.from + k * ahead.by, 0, 2);
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < wide; v++) sum[r][v] += x[r * down] * in[v];
    }
}

static inline __attribute__((always_inline)) void tile(
    const int rows, const int wide, const float *x, int64_t down, int64_t right, const float *w, int64_t inputs, float *out,
    int64_t ldo, int64_t columns, int add, Ahead ahead) {
    V sum[TALL][WIDE];
    panel_sums(rows, wide, x, down, right, w, inputs, ahead, sum);
    for (int r = 0; r < rows; r++) {
        float *to = out + r * ldo;
        if (columns == wide * LANES) {
            for (int v = 0; v < wide; v++) {
                U *at = (U *)(to + v * LANES);
                *at = add ? (V)*at + sum[r][v] : sum[r][v];
            }
        } else {
            float part[PANEL];
            memcpy(part, sum[r], sizeof part);
            for (int64_t c = 0; c < columns; c++) to[c] = add ? to[c] + part[c] : part[c];
        }
    }
}

static inline void product(int64_t rows, const float *x, int64_t ldx, const Matrix *m, float *out, int64_t ldo, int add) {
    const float *w = m->values;
    for (int64_t first = 0; first < m->outputs; first += PANEL, w += PANEL * m->inputs) {
        const int64_t columns = m->outputs - first < PANEL ? m->outputs - first : PANEL;
        for (int64_t r = 0; r < rows; r += TALL) {
            const float *from = x + r * ldx;
            float *to = out + r * ldo + first;
            switch (rows - r) {
            case 1: tile(1, WIDE, from, ldx, 1, w, m->inputs, to, ldo, columns, add, NOTHING); break;
            case 2: tile(2, WIDE, from, ldx, 1, w, m->inputs, to, ldo, columns, add, NOTHING); break;
            case 3: tile(3, WIDE, from, ldx, 1, w, m->inputs, to, ldo, columns, add, NOTHING); break;
#if TALL == 6
            case 4: tile(4, WIDE, from, ldx, 1, w, m->inputs, to, ldo, columns, add, NOTHING); break;
            case 5: tile(5, WIDE, from, ldx, 1, w, m->inputs, to, ldo, columns, add, NOTHING); break;
#endif
            default: tile(TALL, WIDE, from, ldx, 1, w, m->inputs, to, ldo, columns, add, NOTHING);
            }
        }
    }
}

/* --- functions of values ------------------------------------------------------------------------------------------ */

/* e^x to about one unit in the last place, for vectors of two widths: NAME of any x, at most e^88, and 0 below e^-87;
 * NAME##_between of an x that lies between these. */
#define EXPONENTIAL(NAME, PICK, V, I)                                                                                 \
    static inline V PICK(I chosen, V yes, V no) { return (V)((chosen & (I)yes) | (~chosen & (I)no)); }                \
    static inline V NAME##_between(V x) {                                                                             \
        const V whole = (x * 1.44269504f + 12582912.0f) - 12582912.0f; /* rounds: no bits are left for fractions */   \
        V r = x - whole * 0.693359375f;                                                                               \
        r = r - whole * -2.12194440e-4f;                                                                              \
        V p = (V){0} + 1.9875691500e-4f;                                                                              \
        p = p * r + 1.3981999507e-3f;                                                                                 \
        p = p * r + 8.3334519073e-3f;                                                                                 \
        p = p * r + 4.1665795894e-2f;                                                                                 \
        p = p * r + 1.6666665459e-1f;                                                                                 \
        p = p * r + 5.0000001201e-1f;                                                                                 \
        p = p * r * r + r + 1.0f;                                                                                     \
        const I power = (__builtin_convertvector(whole, I) + 127) << 23;                                              \
        return p * (V)power;                                                                                          \
    }                                                                                                                 \
    static inline V NAME(V x) {                                                                                       \
        const I below = x < -87.0f;                                                                                   \
        x = PICK(x > 88.0f, (V){0} + 88.0f, x);                                                                       \
        return PICK(below, (V){0}, NAME##_between(PICK(below, (V){0}, x)));                                           \
    }
EXPONENTIAL(exponential, pick, V, I)

/* e^x for x <= 0; below e^-87 it stays there, and what is no number stays none. */
static inline V below_one(V x) {
    const V least = (V){0} - 87.0f;
    return exponential_between(pick(x < least, least, x));
}

static inline float highest_of(V v) {
    float highest = v[0];
    for (int i = 1; i < LANES; i++) highest = v[i] > highest ? v[i] : highest;
    return highest;
}

/* The highest of scores [count], behind which -infinity is written as far as `filled`, the next multiple of LANES. */
static inline float highest_score(float *scores, int64_t count, int64_t filled) {
    for (int64_t i = count; i < filled; i++) scores[i] = -INFINITY;
    V most = *(const U *)scores;
    for (int64_t i = LANES; i < filled; i += LANES) {
        const V s = *(const U *)(scores + i);
        most = pick(s > most, s, most);
    }
    return highest_of(most);
}

static inline float total(V v) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
}

#endif
