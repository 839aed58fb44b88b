/* The vision encoder between its matrix products: norms, rotary turns, gates and attention inside windows; fp32.
 *
 * The equations are those of omni_ray/models/window_attention.py and vision_passes.py, which hold the form without a
 * compiler and the gradients.  Every sum of a row runs over its own values in their order, so a row's bits depend on its
 * window alone.
 *
 * R rows, D hidden size, h heads, d head size, e = d / 2 angles, L rows of a window, F inner size
 */
#include "vectors.h"

/* --- products of one window --------------------------------------------------------------------------------------- */

/* rows x wide vectors of a product: unlike `tile`, a last panel is computed no wider than it is needed. */
static inline __attribute__((always_inline)) void block(
    const int rows, const int wide, const float *x, int64_t ldx, const float *w, int64_t inputs, float *out, int64_t ldo) {
    V sum[TALL][WIDE];
    panel_sums(rows, wide, x, ldx, 1, w, inputs, NOTHING, sum);
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < wide; v++) *(U *)(out + r * ldo + v * LANES) = sum[r][v];
}

#define ROWS_OF(WIDTH)                                                                                                \
    switch (rows) {                                                                                                   \
    case 1: block(1, WIDTH, x, ldx, w, inputs, out, ldo); break;                                                      \
    case 2: block(2, WIDTH, x, ldx, w, inputs, out, ldo); break;                                                      \
    case 3: block(3, WIDTH, x, ldx, w, inputs, out, ldo); break;                                                      \
    case 4: block(4, WIDTH, x, ldx, w, inputs, out, ldo); break;                                                      \
    case 5: block(TALL < 5 ? TALL : 5, WIDTH, x, ldx, w, inputs, out, ldo); break;                                    \
    default: block(TALL, WIDTH, x, ldx, w, inputs, out, ldo);                                                         \
    }

/* out [rows, vectors] of panels [P, inputs, PANEL]; at most TALL rows. */
static void panels(
    int64_t rows, int64_t vectors, const float *x, int64_t ldx, const float *w, int64_t inputs, float *out, int64_t ldo) {
    for (; vectors > 0; vectors -= WIDE, w += PANEL * inputs, out += PANEL) {
        if (vectors >= WIDE) {
            ROWS_OF(WIDE)
#if WIDE == 4
        } else if (vectors == 3) {
            ROWS_OF(3)
        } else if (vectors == 2) {
            ROWS_OF(2)
#endif
        } else {
            ROWS_OF(1)
        }
    }
}

/* --- softmax ------------------------------------------------------------------------------------------------------ */

/* scores [L, filled up to whole vectors] become e^(score - highest); their sum, and the logarithm of the real one. */
static inline float weigh(float *scores, int64_t length, float *log_sum) {
    const int64_t filled = (length + LANES - 1) / LANES * LANES;
    const float highest = highest_score(scores, length, filled);
    V sum = (V){0};
    for (int64_t i = 0; i < filled; i += LANES) {
        const V p = below_one(*(const U *)(scores + i) - highest);
        *(U *)(scores + i) = p;
        sum += p;
    }
    const float all = total(sum);
    *log_sum = highest + logf(all);
    return all;
}

static int64_t whole_panels(int64_t count) { return (count + PANEL - 1) / PANEL * PANEL; }

/* Floats that `window_attend` needs for windows of at most `length` rows. */
int64_t window_scratch_floats(int64_t length, int64_t head) {
    return whole_panels(length) * (head + TALL) + length * whole_panels(head);
}

/* One head of one window: out [L, d] = softmax(q k^T) v, q already scaled; log_sum [L]. */
static void attend_head(
    int64_t length, int64_t head, const float *q, const float *k, int64_t ldq, const float *v, int64_t ldv, float *out,
    int64_t ldo, float *log_sum, float *scratch) {
    const int64_t width = whole_panels(length);
    float *keys = scratch, *values = keys + width * head, *scores = values + length * whole_panels(head);
    float *to = keys;
    for (int64_t first = 0; first < length; first += PANEL)
        for (int64_t c = 0; c < head; c++, to += PANEL)
            for (int64_t j = 0; j < PANEL; j++) to[j] = first + j < length ? k[(first + j) * ldq + c] : 0;
    to = values;
    for (int64_t c = 0; c < head; c += PANEL)
        for (int64_t j = 0; j < length; j++, to += PANEL)
            memcpy(to, v + j * ldv + c, (head - c < PANEL ? head - c : PANEL) * sizeof(float));
    for (int64_t first = 0; first < length; first += TALL) {
        const int64_t rows = length - first < TALL ? length - first : TALL;
        panels(rows, (length + LANES - 1) / LANES, q + first * ldq, ldq, keys, head, scores, width);
        float share[TALL];
        for (int64_t r = 0; r < rows; r++) share[r] = 1.0f / weigh(scores + r * width, length, log_sum + first + r);
        panels(rows, head / LANES, scores, width, values, length, out + first * ldo, ldo);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < head; c++) out[(first + r) * ldo + c] *= share[r];
    }
}

/* Heads of equal windows, of which (window, head) pairs `from` to `to` are done here.
 * q, k [R, D]; v [R, D] in rows `ldv` apart; out [R, D]; log_sum [windows, h, L]. */
void window_attend(
    int64_t from, int64_t to, int64_t length, int64_t heads, int64_t head, const float *q, const float *k, const float *v,
    int64_t ldv, float *out, float *log_sum, float *scratch) {
    const int64_t size = heads * head;
    for (int64_t pair = from; pair < to; pair++) {
        const int64_t row = pair / heads * length, column = pair % heads * head;
        const int64_t at = row * size + column;
        attend_head(length, head, q + at, k + at, size, v + row * ldv + column, ldv, out + at, size,
                    log_sum + pair * length, scratch);
    }
}

/* --- passes over rows --------------------------------------------------------------------------------------------- */

static inline float inverse_rms(const float *x, int64_t count, float eps) {
    V squares = (V){0};
    for (int64_t i = 0; i < count; i += LANES) { /* sizes are whole vectors */
        const V v = *(const U *)(x + i);
        squares += v * v;
    }
    return 1.0f / sqrtf(total(squares) / (float)count + eps);
}

/* out = x / rms(x) * gain. */
void norm_rows(int64_t from, int64_t to, int64_t size, const float *x, const float *gain, float eps, float *out) {
    for (int64_t r = from; r < to; r++) {
        const float *in = x + r * size;
        float *y = out + r * size;
        const float scale = inverse_rms(in, size, eps);
        for (int64_t i = 0; i < size; i += LANES) *(U *)(y + i) = *(const U *)(in + i) * scale * *(const U *)(gain + i);
    }
}

/* out = x + scale * update. */
void add_scaled_rows(
    int64_t from, int64_t to, int64_t size, const float *x, const float *scale, const float *update, float *out) {
    for (int64_t at = from * size; at < to * size; at += size)
        for (int64_t i = 0; i < size; i += LANES)
            *(U *)(out + at + i) = *(const U *)(x + at + i) + *(const U *)(scale + i) * *(const U *)(update + at + i);
}

/* out = (silu(gate) * up) / rms(silu(gate) * up) * gain. */
void gate_norm_rows(
    int64_t from, int64_t to, int64_t size, const float *gate, const float *up, const float *gain, float eps, float *out) {
    for (int64_t r = from; r < to; r++) {
        const float *g = gate + r * size, *u = up + r * size;
        float *y = out + r * size;
        for (int64_t i = 0; i < size; i += LANES) {
            const V x = *(const U *)(g + i);
            *(U *)(y + i) = x / (1.0f + exponential(-x)) * *(const U *)(u + i);
        }
        const float scale = inverse_rms(y, size, eps);
        for (int64_t i = 0; i < size; i += LANES) *(U *)(y + i) = *(const U *)(y + i) * scale * *(const U *)(gain + i);
    }
}

/* out [R, D] = x turned pair by pair (i, i + e) of every head, over its rms, times gain; x in rows `ldx` apart. */
void turn_norm_rows(
    int64_t from, int64_t to, int64_t heads, int64_t head, const float *x, int64_t ldx, const float *cos, const float *sin,
    const float *gain, float eps, float *out) {
    const int64_t size = heads * head, angles = head / 2;
    for (int64_t r = from; r < to; r++) {
        const float *c = cos + r * angles, *s = sin + r * angles;
        float *y = out + r * size;
        for (int64_t h = 0; h < heads; h++) {
            const float *a = x + r * ldx + h * head, *b = a + angles;
            float *to_a = y + h * head, *to_b = to_a + angles;
            for (int64_t i = 0; i < angles; i++) {
                to_a[i] = a[i] * c[i] - b[i] * s[i];
                to_b[i] = b[i] * c[i] + a[i] * s[i];
            }
        }
        const float scale = inverse_rms(y, size, eps);
        for (int64_t i = 0; i < size; i += LANES) *(U *)(y + i) = *(const U *)(y + i) * scale * *(const U *)(gain + i);
    }
}
