/* Rows of many sequences through the shortcut-connected layers over the latent cache: fp32, one core.
 *
 * The equations are those of omni_ray/inference/row_forward.py, which is the form without a compiler.  Every sum of a
 * row runs over its own inputs in their order, whoever stands beside it: a row's bits depend on the rows before it in
 * its sequence alone, for any number of rows and any cut of a prompt.
 *
 * T rows, K inputs, N outputs, H model dim, h heads, n nope dim, C latent rank, R rotary dim, X = C + R, e value dim
 */
#include "vectors.h"

#define PAGE 64 /* rows of a page of the cache */
#define KEYS 8  /* keys that are read together; divides PAGE */
#define AHEAD 4 /* blocks of keys that are fetched ahead */
#define LINE 16 /* floats of a cache line */
#define HEADS 8 /* queries that look back together: a model of few heads would leave wider vectors empty */

typedef float N __attribute__((vector_size(HEADS * 4)));
typedef float NU __attribute__((vector_size(HEADS * 4), aligned(4), may_alias));
typedef int32_t NI __attribute__((vector_size(HEADS * 4)));

typedef struct {
    Matrix qkv_a, q_b, out;
    const Matrix *key_up, *value_up; /* of every head */
} Attention;

typedef struct {
    Attention attention[2];
    Matrix gate_up[2], down[2], router;
    const Matrix *expert_gate_up, *expert_down;
    const double *bias;
    const float *shared_gain;
} Layer;

typedef struct {
    int64_t layers, hidden, heads, nope, rope, value, q_rank, kv_rank, inner, experts, zeros, top_k, expert_inner;
    double scaling;
    float hidden_eps, q_eps, kv_eps; /* times the number of values that a norm sums */
    const Layer *layer;
    const float *final_gain;
} Model;

typedef struct {
    int64_t rows, spans;
    const int64_t *span_rows;  /* of every span */
    const int64_t *span_start; /* rows of its sequence before it */
    const int64_t *span_pages; /* where its pages begin in `pages` */
    const int32_t *pages;
    const int64_t *place;  /* storage row of every row */
    const float *cos, *sin; /* [T, R / 2] */
    float *cache;          /* [slots, storage rows, X] */
    int64_t slot_stride;
} Rows;

int64_t panel_columns(void) { return PANEL; }
int64_t lanes(void) { return LANES; }

/* --- functions of values ------------------------------------------------------------------------------------------ */

EXPONENTIAL(exponential_narrow, pick_narrow, N, NI)

/* x / sqrt(sum(x^2) + eps); gain and sqrt(n) lie in the weights behind it. */
static void norm(const float *x, int64_t count, float eps, float *out) {
    V squares = (V){0};
    float rest = 0;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const V v = *(const U *)(x + i);
        squares += v * v;
    }
    for (; i < count; i++) rest += x[i] * x[i];
    const float size = sqrtf(total(squares) + rest + eps);
    for (i = 0; i < count; i++) out[i] = x[i] / size;
}

/* gate = gate / (1 + e^-gate) * up * share, in place. */
static void gate_rows(int64_t rows, float *gate_up, int64_t inner, const float *share) {
    for (int64_t r = 0; r < rows; r++, gate_up += 2 * inner) {
        const float factor = share ? share[r] : 1.0f;
        for (int64_t i = 0; i < inner; i += LANES) { /* inner is a multiple of LANES */
            U *gate = (U *)(gate_up + i);
            const V up = *(const U *)(gate_up + inner + i), g = *gate;
            *gate = g / (1.0f + exponential(-g)) * up * factor;
        }
    }
}

static void turn(float *x, const float *cos, const float *sin, int64_t rope, float *out) {
    for (int64_t i = 0; i < rope / 2; i++) {
        const float a = x[2 * i], b = x[2 * i + 1];
        out[2 * i] = a * cos[i] - b * sin[i];
        out[2 * i + 1] = a * sin[i] + b * cos[i];
    }
}

/* --- attention ---------------------------------------------------------------------------------------------------- */

/* HEADS queries of one sequence, each a (row, head), against its keys; `seen` keys are visible to each. */
static void look_back(
    const Model *m, const float *cache, const int32_t *pages, int64_t count, const float *const *query, const int32_t *seen,
    float *const *mixed, float *scratch) {
    const int64_t rank = m->kv_rank, width = rank + m->rope;
    float *turned = scratch, *scores = scratch + width * HEADS; /* [X, HEADS], [L, HEADS] */
    int64_t most = 0;
    NI visible;
    for (int lane = 0; lane < HEADS; lane++) {
        const float *q = query[lane < count ? lane : 0];
        visible[lane] = seen[lane < count ? lane : 0];
        if (visible[lane] > most) most = visible[lane];
        for (int64_t x = 0; x < width; x++) turned[x * HEADS + lane] = q[x];
    }
    N highest = (N){0} - INFINITY;
    for (int64_t l = 0; l < most; l += KEYS) {
        const float *key = cache + ((int64_t)pages[l / PAGE] * PAGE + l % PAGE) * width;
        /* Rows of a key are too short for the processor to foresee the next block. */
        for (int64_t ahead = AHEAD * KEYS * width; ahead < (AHEAD + 1) * KEYS * width; ahead += LINE)
            __builtin_prefetch(key + ahead);
        N sum[KEYS];
        for (int j = 0; j < KEYS; j++) sum[j] = (N){0};
        for (int64_t x = 0; x < width; x++) {
            const N q = *(const NU *)(turned + x * HEADS);
            for (int j = 0; j < KEYS; j++) sum[j] += key[j * width + x] * q;
        }
        for (int j = 0; j < KEYS; j++) {
            const NI there = visible > (int32_t)(l + j);
            const N score = pick_narrow(there, sum[j], (N){0} - INFINITY);
            *(NU *)(scores + (l + j) * HEADS) = score;
            highest = pick_narrow(score > highest, score, highest);
        }
    }
    N all = (N){0};
    for (int64_t l = 0; l < most; l++) {
        NU *at = (NU *)(scores + l * HEADS);
        const N p = exponential_narrow(*at - highest);
        *at = p;
        all += p;
    }
    for (int64_t first = 0; first < count; first += 4)
        for (int64_t c = 0; c < rank; c += 4 * LANES) {
            const int wide = rank - c < 4 * LANES ? (int)((rank - c) / LANES) : 4; /* rank is a multiple of LANES */
            V sum[4][4];
            for (int j = 0; j < 4; j++)
                for (int v = 0; v < 4; v++) sum[j][v] = (V){0};
            for (int64_t l = 0; l < most; l++) {
                const float *value = cache + ((int64_t)pages[l / PAGE] * PAGE + l % PAGE) * width + c;
                const float *p = scores + l * HEADS + first;
                if (wide == 4) {
                    for (int v = 0; v < 4; v++) {
                        const V in = *(const U *)(value + v * LANES);
                        for (int j = 0; j < 4; j++) sum[j][v] += p[j] * in;
                    }
                } else {
                    for (int v = 0; v < wide; v++) {
                        const V in = *(const U *)(value + v * LANES);
                        for (int j = 0; j < 4; j++) sum[j][v] += p[j] * in;
                    }
                }
            }
            for (int j = 0; j < 4 && first + j < count; j++)
                for (int v = 0; v < wide; v++)
                    *(U *)(mixed[first + j] + c + v * LANES) = sum[j][v] / all[first + j];
        }
}

static void look_back_rows(
    const Model *m, const Rows *rows, const float *cache, const float *queries, float *mixed, float *scratch) {
    const int64_t heads = m->heads, width = m->kv_rank + m->rope;
    int64_t row = 0;
    for (int64_t s = 0; s < rows->spans; row += rows->span_rows[s], s++) {
        const int32_t *pages = rows->pages + rows->span_pages[s];
        const int64_t pairs = rows->span_rows[s] * heads;
        for (int64_t first = 0; first < pairs; first += HEADS) {
            const int64_t count = pairs - first < HEADS ? pairs - first : HEADS;
            const float *query[HEADS];
            float *to[HEADS];
            int32_t seen[HEADS];
            for (int64_t lane = 0; lane < count; lane++) {
                const int64_t pair = row * heads + first + lane;
                query[lane] = queries + pair * width;
                to[lane] = mixed + pair * m->kv_rank;
                seen[lane] = (int32_t)(rows->span_start[s] + (first + lane) / heads + 1);
            }
            look_back(m, cache, pages, count, query, seen, to, scratch);
        }
    }
}

/* --- layers ------------------------------------------------------------------------------------------------------- */

typedef struct {
    float *normed, *wide, *queries, *mixed, *values, *shortcut, *u, *rest;
} Buffers;

static void attend(const Model *m, const Attention *a, const Rows *rows, int64_t slot, float *x, const Buffers *b) {
    const int64_t T = rows->rows, H = m->hidden, heads = m->heads, C = m->kv_rank, R = m->rope, X = C + R;
    const int64_t A = m->q_rank + C + R, D = m->nope + R;
    float *cache = rows->cache + slot * rows->slot_stride;
    for (int64_t t = 0; t < T; t++) norm(x + t * H, H, m->hidden_eps, b->normed + t * H);
    product(T, b->normed, H, &a->qkv_a, b->wide, A, 0);
    for (int64_t t = 0; t < T; t++) {
        float *qkv = b->wide + t * A, *kept = cache + rows->place[t] * X;
        norm(qkv, m->q_rank, m->q_eps, qkv);
        norm(qkv + m->q_rank, C, m->kv_eps, kept);
        turn(qkv + m->q_rank + C, rows->cos + t * (R / 2), rows->sin + t * (R / 2), R, kept + C);
    }
    float *q = b->rest; /* [T, h, n + R] */
    product(T, b->wide, A, &a->q_b, q, heads * D, 0);
    for (int64_t h = 0; h < heads; h++) product(T, q + h * D, heads * D, a->key_up + h, b->queries + h * X, heads * X, 0);
    for (int64_t t = 0; t < T; t++)
        for (int64_t h = 0; h < heads; h++)
            turn(q + (t * heads + h) * D + m->nope, rows->cos + t * (R / 2), rows->sin + t * (R / 2), R,
                 b->queries + (t * heads + h) * X + C);
    look_back_rows(m, rows, cache, b->queries, b->mixed, b->rest);
    for (int64_t h = 0; h < heads; h++)
        product(T, b->mixed + h * C, heads * C, a->value_up + h, b->values + h * m->value, heads * m->value, 0);
    product(T, b->values, heads * m->value, &a->out, x, H, 1);
}

static void mlp(const Model *m, const Layer *layer, int part, int64_t rows, const float *u, float *x, float *wide) {
    product(rows, u, m->hidden, &layer->gate_up[part], wide, 2 * m->inner, 0);
    gate_rows(rows, wide, m->inner, 0);
    product(rows, wide, 2 * m->inner, &layer->down[part], x, m->hidden, 1);
}

/* The top_k experts of a row: by corrected score, of equal ones the first; their shares are the scores, scaled. */
static void choose(const Model *m, const double *bias, float *scores, int32_t *expert, float *share) {
    const int64_t all = m->experts + m->zeros;
    float highest = -INFINITY, sum = 0;
    for (int64_t i = 0; i < all; i++) highest = scores[i] > highest ? scores[i] : highest;
    for (int64_t i = 0; i < all; i += LANES) { /* behind the scores is room for a vector */
        U *at = (U *)(scores + i);
        *at = exponential(*at - highest);
    }
    for (int64_t i = 0; i < all; i++) sum += scores[i];
    for (int64_t i = 0; i < all; i++) scores[i] /= sum;
    for (int64_t k = 0; k < m->top_k; k++) {
        double best = -INFINITY;
        int32_t found = -1;
        for (int32_t i = 0; i < all; i++) {
            const double corrected = (double)scores[i] + bias[i];
            if (corrected > best || found < 0) {
                int taken = 0;
                for (int64_t j = 0; j < k; j++) taken |= expert[j] == i;
                if (!taken) best = corrected, found = i;
            }
        }
        expert[k] = found;
        share[k] = (float)((double)scores[found] * m->scaling);
    }
}

/* shortcut [T, H] of u [T, H]; experts in their order, so that a row's sum does not depend on others' choices. */
static void mixture(const Model *m, const Layer *layer, int64_t T, const Buffers *b) {
    const int64_t H = m->hidden, K = m->top_k, F = m->expert_inner, all = m->experts + m->zeros;
    float *scores = b->wide, *share = scores + T * all + LANES; /* [T, E + Z], [T, K] */
    int32_t *expert = (int32_t *)(share + T * K);
    float *shares = share + 2 * T * K; /* of one expert's rows */
    int32_t *mine = (int32_t *)(shares + T);
    float *gathered = shares + 2 * T, *made = gathered + T * H, *inner = made + T * H;
    product(T, b->u, H, &layer->router, scores, all, 0);
    for (int64_t t = 0; t < T; t++) {
        /* A row's softmax writes up to a vector behind its scores: it works on a copy. */
        float *own = gathered;
        memcpy(own, scores + t * all, all * sizeof(float));
        choose(m, layer->bias, own, expert + t * K, share + t * K);
        double zero = 0;
        for (int64_t k = 0; k < K; k++)
            if (expert[t * K + k] >= m->experts) zero += share[t * K + k];
        const float factor = (float)zero;
        for (int64_t i = 0; i < H; i++) b->shortcut[t * H + i] = b->u[t * H + i] * factor;
    }
    for (int64_t e = 0; e < m->experts; e++) {
        int64_t count = 0;
        for (int64_t t = 0; t < T; t++)
            for (int64_t k = 0; k < K; k++)
                if (expert[t * K + k] == e) {
                    mine[count] = (int32_t)t;
                    shares[count] = share[t * K + k];
                    memcpy(gathered + count * H, b->u + t * H, H * sizeof(float));
                    count++;
                }
        if (!count) continue;
        product(count, gathered, H, layer->expert_gate_up + e, inner, 2 * F, 0);
        gate_rows(count, inner, F, shares);
        product(count, inner, 2 * F, layer->expert_down + e, made, H, 0);
        for (int64_t i = 0; i < count; i++) {
            float *to = b->shortcut + mine[i] * H;
            for (int64_t j = 0; j < H; j++) to[j] += made[i * H + j];
        }
    }
}

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t rest_floats(const Model *m, int64_t rows, int64_t longest) {
    const int64_t X = m->kv_rank + m->rope;
    return most(m->heads * (m->nope + m->rope) * rows, (X + longest + KEYS) * HEADS);
}

/* Floats that `rows_advance` needs for so many rows, of which none sees more than `longest` keys. */
int64_t rows_scratch_floats(const Model *m, int64_t rows, int64_t longest) {
    const int64_t X = m->kv_rank + m->rope, all = m->experts + m->zeros;
    const int64_t mixing = (all + 2 * m->top_k + 2 + 2 * m->hidden + 2 * m->expert_inner) * rows + 2 * LANES + all;
    const int64_t wide = most(most((m->q_rank + X) * rows, 2 * m->inner * rows), mixing);
    const int64_t kept = (3 * m->hidden + m->heads * (X + m->kv_rank + m->value)) * rows;
    return kept + wide + rest_floats(m, rows, longest) + LANES;
}

/* x [T, H] goes through all layers, `longest` keys seen at most; last [spans, H]: final-normed state of every span's last row. */
void rows_advance(const Model *m, const Rows *rows, float *x, float *last, float *scratch, int64_t longest) {
    const int64_t T = rows->rows, H = m->hidden, X = m->kv_rank + m->rope;
    Buffers b;
    b.normed = scratch;
    b.u = b.normed + T * H;
    b.shortcut = b.u + T * H;
    b.queries = b.shortcut + T * H;
    b.mixed = b.queries + T * m->heads * X;
    b.values = b.mixed + T * m->heads * m->kv_rank;
    b.rest = b.values + T * m->heads * m->value;
    b.wide = b.rest + rest_floats(m, T, longest);
    for (int64_t l = 0; l < m->layers; l++) {
        const Layer *layer = m->layer + l;
        attend(m, &layer->attention[0], rows, 2 * l, x, &b);
        for (int64_t t = 0; t < T; t++) {
            norm(x + t * H, H, m->hidden_eps, b.u + t * H);
            for (int64_t i = 0; i < H; i++) b.u[t * H + i] *= layer->shared_gain[i];
        }
        mixture(m, layer, T, &b);
        mlp(m, layer, 0, T, b.u, x, b.wide);
        attend(m, &layer->attention[1], rows, 2 * l + 1, x, &b);
        for (int64_t t = 0; t < T; t++) norm(x + t * H, H, m->hidden_eps, b.normed + t * H);
        mlp(m, layer, 1, T, b.normed, x, b.wide);
        for (int64_t i = 0; i < T * H; i++) x[i] += b.shortcut[i];
    }
    int64_t row = 0;
    for (int64_t s = 0; s < rows->spans; s++) {
        row += rows->span_rows[s];
        norm(x + (row - 1) * H, H, m->hidden_eps, last + s * H);
        for (int64_t i = 0; i < H; i++) last[s * H + i] *= m->final_gain[i];
    }
}
