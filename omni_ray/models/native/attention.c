/* Causal attention over packed sequences with the rotary turn, forward and backward; scores never leave the caches.
 *
 * The equations are those of omni_ray/models/packed_attention.py, which holds the form without a compiler.  Every sum runs
 * over its keys, queries or dims in order, so the bits of a sequence depend on itself alone.  The backward makes the
 * probabilities again from the logarithms of their sums.
 * Source: Dao et al., FlashAttention (2022), for the backward's order: P^T and dS^T of a few keys at a time.
 *
 * T packed rows, h heads, L rows of a sequence, n nope dim, R rotary dim, d = n + R query and key dim, e value dim
 */
#include "elements.h"

#define QUERIES (64 * STEP) /* of one step of the backward: their slopes for 2,000 keys take half of a second cache */

#define SOON 8 /* rows before it is read, a row is asked for */

#if LANES == 16
#define NEIGHBOURS 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14
#define SIGNS -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1
#else
#define NEIGHBOURS 1, 0, 3, 2, 5, 4, 7, 6
#define SIGNS -1, 1, -1, 1, -1, 1, -1, 1
#endif

typedef struct {
    int64_t heads, nope, rope, value, rope_down;
    const E *q, *kv, *k_rope; /* [T, h, d], [T, h, n + e], [T, R] in rows `rope_down` apart */
    const float *cos, *sin;   /* [T, R / 2] */
} Attended;

/* One head of one sequence. */
typedef struct {
    int64_t first, length, head;
} Item;

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t even(int64_t count) { return steps_of(count) * STEP; }
static int64_t whole(int64_t count, int64_t of) { return (count + of - 1) / of * of; }
/* Elements of all panels of a matrix. */
static int64_t panels_size(int64_t depth, int64_t columns) { return whole(columns, PANEL) * even(depth); }

static Item item_at(int64_t index, int64_t heads, const int32_t *cu) {
    const int64_t sequence = index / heads;
    return (Item){cu[sequence], cu[sequence + 1] - cu[sequence], index % heads};
}

/* --- rows --------------------------------------------------------------------------------------------------------- */

/* x [count], pairs (2i, 2i + 1), turned by angles of which `cos` and `sin` hold one for each pair. */
static inline V turned_pairs(V x, const float *cos, const float *sin, int64_t count) {
    V c = (V){0}, s = (V){0};
    if (count == LANES) {
        memcpy(&c, cos, LANES / 2 * sizeof *cos);
        memcpy(&s, sin, LANES / 2 * sizeof *sin);
    } else {
        c = floats(cos, count / 2);
        s = floats(sin, count / 2);
    }
    const V swapped = INTERLEAVED(x, x, NEIGHBOURS), sign = {SIGNS};
    return x * INTERLEAVED(c, c, EVEN_HALF) + swapped * (INTERLEAVED(s, s, EVEN_HALF) * sign);
}

/* to [rope] = x turned by the row's angles. */
static void turn_row(const E *x, const float *cos, const float *sin, int64_t rope, E *to) {
    for (int64_t i = 0; i < rope; i += LANES) {
        const int64_t count = least(rope - i, LANES);
        narrow(to + i, turned_pairs(widened(x + i, count), cos + i / 2, sin + i / 2, count), count);
    }
}

/* x [rope] turned back in place. */
static void turn_back(float *x, const float *cos, const float *sin, int64_t rope) {
    for (int64_t p = 0; 2 * p < rope; p++) {
        const float a = x[2 * p], b = x[2 * p + 1];
        x[2 * p] = a * cos[p] + b * sin[p];
        x[2 * p + 1] = b * cos[p] - a * sin[p];
    }
}

/* Queries `first` to `first + rows` of an item, turned: to [rows, even(d)]. */
static void turned_queries(const Attended *a, Item item, int64_t first, int64_t rows, E *to) {
    const int64_t dim = a->nope + a->rope;
    for (int64_t r = item.first + first; r < item.first + first + rows; r++, to += even(dim)) {
        const E *from = a->q + (r * a->heads + item.head) * dim;
        ask_for(from + SOON * a->heads * dim, dim * (int64_t)sizeof(E));
        memcpy(to, from, (size_t)a->nope * sizeof *to);
        turn_row(from + a->nope, a->cos + r * (a->rope / 2), a->sin + r * (a->rope / 2), a->rope, to + a->nope);
        if (dim % STEP) to[dim] = 0;
    }
}

/* All keys of an item, turned, and its values: [L, even(d)], [L, even(e)]. */
static void keys_and_values(const Attended *a, Item item, E *keys, E *values) {
    const int64_t dim = a->nope + a->rope, wide = a->nope + a->value;
    for (int64_t r = item.first; r < item.first + item.length; r++, keys += even(dim), values += even(a->value)) {
        const E *from = a->kv + (r * a->heads + item.head) * wide;
        ask_for(from + SOON * a->heads * wide, wide * (int64_t)sizeof(E));
        memcpy(keys, from, (size_t)a->nope * sizeof *keys);
        turn_row(a->k_rope + r * a->rope_down, a->cos + r * (a->rope / 2), a->sin + r * (a->rope / 2), a->rope,
                 keys + a->nope);
        if (dim % STEP) keys[dim] = 0;
        memcpy(values, from + a->nope, (size_t)a->value * sizeof *values);
        if (a->value % STEP) values[a->value] = 0;
    }
}

/* The panels of b [depth, columns]. */
static void all_panels(Strided b, int64_t depth, int64_t columns, E *to) {
    for (int64_t c = 0; c < columns; c += PANEL) copy_panel(b, depth, c, least(columns - c, PANEL), to + c * even(depth));
}

/* Columns `first` to `end` of out [rows, end] = x [rows, depth], rows `down` apart, and panels whose own depth is
 * `panel_depth`; at most TALL rows, and `first` is a multiple of LANES. */
static void strip_sums(
    int64_t rows, const E *x, int64_t down, int64_t right, const E *panels, int64_t panel_depth, int64_t depth, int64_t first,
    int64_t end, float *out, int64_t out_down, int add) {
    for (int64_t c = first; c < end;) {
        const int64_t inside = c % PANEL, columns = least(end - c, PANEL - inside);
        panel_rows(rows, x, down, right, panels + (c - inside) * even(panel_depth) + inside * STEP, steps_of(depth), out + c,
                   out_down, NULL, 0, columns, add, NOTHING);
        c += columns;
    }
}

/* --- forward ------------------------------------------------------------------------------------------------------ */

int64_t NAMED(attend_scratch_bytes)(int64_t length, int64_t nope, int64_t rope, int64_t value) {
    const int64_t dim = even(nope + rope), width = whole(length, PANEL);
    const int64_t elements = length * (dim + even(value)) + panels_size(dim, length) + panels_size(length, value) +
                             TALL * (dim + width);
    return (int64_t)sizeof(E) * whole(elements, 16) + (int64_t)sizeof(float) * TALL * (width + whole(value, PANEL));
}

/* scores [count] of one query over the keys that it sees become probabilities without their common factor, zeros as far as
 * `filled`, the next multiple of LANES; their sum, and the logarithm of the true one. */
static float weigh(float *scores, int64_t count, int64_t filled, E *to, float *log_sum) {
    const float highest = highest_score(scores, count, filled);
    V sum = (V){0};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const V p = share_of(*(const U *)(scores + i) - highest);
        narrow(to + i, p, LANES);
        sum += p;
    }
    for (; i < filled; i += LANES) { /* exactly zero where nothing is seen */
        const V p = exponential(*(const U *)(scores + i) - highest);
        narrow(to + i, p, LANES);
        sum += p;
    }
    const float all = total(sum);
    *log_sum = highest + logf(all);
    return all;
}

static void attend_item(const Attended *a, Item item, E *out, float *log_sum, void *scratch) {
    const int64_t length = item.length, dim = even(a->nope + a->rope), width = whole(length, PANEL), value = a->value;
    E *keys = scratch, *values = keys + length * dim, *key_panels = values + length * even(value);
    E *value_panels = key_panels + panels_size(dim, length), *queries = value_panels + panels_size(length, value);
    E *shares = queries + TALL * dim;
    float *scores = (float *)((E *)scratch + whole(shares + TALL * width - keys, 16)), *mixed = scores + TALL * width;
    keys_and_values(a, item, keys, values);
    all_panels((Strided){keys, 1, dim}, dim, length, key_panels);
    all_panels((Strided){values, even(value), 1}, length, value, value_panels);
    for (int64_t first = 0; first < length; first += TALL) {
        const int64_t rows = least(length - first, TALL), reach = first + rows, filled = whole(reach, LANES);
        turned_queries(a, item, first, rows, queries);
        strip_sums(rows, queries, dim, STEP, key_panels, dim, dim, 0, reach, scores, width, 0);
        float all[TALL];
        for (int64_t r = 0; r < rows; r++)
            all[r] = weigh(scores + r * width, first + r + 1, filled, shares + r * width, log_sum + first + r);
        strip_sums(rows, shares, width, STEP, value_panels, length, reach, 0, value, mixed, whole(value, PANEL), 0);
        for (int64_t r = 0; r < rows; r++)
            narrow_row(out + ((item.first + first + r) * a->heads + item.head) * value, mixed + r * whole(value, PANEL),
                       1.0f / all[r], value);
    }
}

/* Items `from` to `to`, sequence by sequence and head by head: out [T, h, e], log_sum [h, T]; queries already scaled. */
void NAMED(attend)(
    int64_t from, int64_t to, const int32_t *cu, int64_t rows, int64_t heads, int64_t nope, int64_t rope, int64_t value,
    const E *q, const E *kv, const E *k_rope, int64_t rope_down, const float *cos, const float *sin, E *out, float *log_sum,
    void *scratch) {
    const Attended a = {heads, nope, rope, value, rope_down, q, kv, k_rope, cos, sin};
    for (int64_t i = from; i < to; i++) {
        const Item item = item_at(i, heads, cu);
        attend_item(&a, item, out, log_sum + item.head * rows + item.first, scratch);
    }
}

/* --- backward ----------------------------------------------------------------------------------------------------- */

/* Where one item's parts lie. */
typedef struct {
    E *keys, *values, *key_panels;                           /* of the whole sequence */
    E *queries, *grads;                                      /* rows of a block */
    E *query_columns, *grad_columns, *query_panels, *grad_panels; /* panels of these, by dims and by rows */
    E *shares, *slopes, *strips; /* P^T of some keys [TALL, QUERIES], dS^T of all [L, QUERIES], and its rows as strips */
    float *of_keys, *of_values, *of_queries, *scores, *steeps, *log_sum, *delta;
    int64_t bytes;
} Parts;

static void *taken(char **at, int64_t count, size_t size) {
    void *here = *at;
    *at += whole(count * (int64_t)size, 64);
    return here;
}

static Parts parts_in(void *scratch, int64_t length, int64_t dim, int64_t value) {
    char *at = scratch;
    Parts p;
#define TAKE(NAME, COUNT) p.NAME = taken(&at, COUNT, sizeof *p.NAME)
    TAKE(keys, length * dim);
    TAKE(values, length * even(value));
    TAKE(key_panels, panels_size(length, dim));
    TAKE(queries, QUERIES * dim);
    TAKE(grads, QUERIES * even(value));
    TAKE(query_columns, panels_size(dim, QUERIES));
    TAKE(grad_columns, panels_size(value, QUERIES));
    TAKE(query_panels, panels_size(QUERIES, dim));
    TAKE(grad_panels, panels_size(QUERIES, value));
    TAKE(shares, TALL * QUERIES);
    TAKE(slopes, length * QUERIES);
    TAKE(strips, whole(QUERIES, TALL) / TALL * strip_elements(length));
    TAKE(of_keys, length * dim);
    TAKE(of_values, length * value);
    TAKE(of_queries, QUERIES * dim);
    TAKE(scores, TALL * QUERIES);
    TAKE(steeps, TALL * QUERIES);
    TAKE(log_sum, QUERIES);
    TAKE(delta, QUERIES);
#undef TAKE
    p.bytes = at - (char *)scratch;
    return p;
}

int64_t NAMED(attend_back_scratch_bytes)(int64_t length, int64_t nope, int64_t rope, int64_t value) {
    return parts_in(NULL, length, even(nope + rope), value).bytes;
}

/* Queries `first` to `first + rows`, the gradients of their results, and what each needs of its softmax. */
static void read_block(
    const Attended *a, Item item, int64_t first, int64_t rows, const E *out, const E *grad, const float *log_sum, Parts *p) {
    const int64_t dim = even(a->nope + a->rope), value = a->value;
    turned_queries(a, item, first, rows, p->queries);
    for (int64_t r = 0; r < rows; r++) {
        const int64_t at = ((item.first + first + r) * a->heads + item.head) * value;
        ask_for(out + at + SOON * a->heads * value, value * (int64_t)sizeof(E));
        ask_for(grad + at + SOON * a->heads * value, value * (int64_t)sizeof(E));
        V along = (V){0};
        EACH_VECTOR(value, along += widened(out + at + i, count) * widened(grad + at + i, count);)
        p->delta[r] = total(along);
        p->log_sum[r] = log_sum[first + r];
        memcpy(p->grads + r * even(value), grad + at, (size_t)value * sizeof *grad);
        if (value % STEP) p->grads[r * even(value) + value] = 0;
    }
    /* No key is seen from behind the block's end. */
    for (int64_t r = rows; r < QUERIES; r++) p->delta[r] = 0, p->log_sum[r] = INFINITY;
    all_panels((Strided){p->queries, 1, dim}, dim, rows, p->query_columns);
    all_panels((Strided){p->grads, 1, even(value)}, even(value), rows, p->grad_columns);
    all_panels((Strided){p->queries, dim, 1}, rows, dim, p->query_panels);
    all_panels((Strided){p->grads, even(value), 1}, rows, value, p->grad_panels);
}

/* P^T and dS^T of one key over the block's queries from column `first` on; before `seen` no query sees it. */
static void slopes_of(const Parts *p, int64_t r, int64_t first, int64_t seen, int64_t columns, E *shares, E *slopes) {
    for (int64_t c = first; c < columns; c += LANES) {
        const V share = share_of(*(const U *)(p->scores + r * QUERIES + c) - *(const U *)(p->log_sum + c));
        const V slope = share * (*(const U *)(p->steeps + r * QUERIES + c) - *(const U *)(p->delta + c));
        narrow(shares + c, share, LANES);
        narrow(slopes + c, slope, LANES);
    }
    for (int64_t c = 0; c < seen; c++) shares[c] = slopes[c] = 0;
}

/* A few keys against the block's queries: their own gradients and values', and dS^T. */
static void few_keys(const Attended *a, int64_t first, int64_t rows, int64_t block, int64_t queries, Parts *p) {
    const int64_t dim = even(a->nope + a->rope), value = a->value, filled = whole(queries, LANES);
    /* Whole vectors of queries before these keys see none of them. */
    const int64_t from = first > block ? (first - block) / LANES * LANES : 0, depth = queries - from;
    E *slopes = p->slopes + first * QUERIES;
    strip_sums(rows, p->keys + first * dim, dim, STEP, p->query_columns, dim, dim, from, filled, p->scores, QUERIES, 0);
    strip_sums(rows, p->values + first * even(value), even(value), STEP, p->grad_columns, value, value, from, filled,
               p->steeps, QUERIES, 0);
    for (int64_t r = 0; r < rows; r++)
        slopes_of(p, r, from, most(first + r - block, 0), filled, p->shares + r * QUERIES, slopes + r * QUERIES);
    strip_sums(rows, p->shares + from, QUERIES, STEP, p->grad_panels + from * PANEL, queries, depth, 0, value,
               p->of_values + first * value, value, 1);
    strip_sums(rows, slopes + from, QUERIES, STEP, p->query_panels + from * PANEL, queries, depth, 0, dim,
               p->of_keys + first * dim, dim, 1);
}

/* Gradients of the block's queries, which see the keys up to their own place. */
static void of_block(const Attended *a, Item item, int64_t block, int64_t queries, Parts *p, E *grad_q) {
    const int64_t dim = a->nope + a->rope, reach = block + queries;
    copy_strips((Strided){p->slopes, 1, QUERIES}, queries, reach, p->strips);
    for (int64_t r = 0; r < queries; r += TALL) {
        const int64_t rows = least(queries - r, TALL);
        strip_sums(rows, p->strips + r / TALL * strip_elements(reach), STEP, TALL * STEP, p->key_panels, item.length,
                   block + r + rows, 0, dim, p->of_queries + r * even(dim), even(dim), 0);
    }
    for (int64_t r = 0; r < queries; r++) {
        const int64_t row = item.first + block + r;
        float *x = p->of_queries + r * even(dim);
        turn_back(x + a->nope, a->cos + row * (a->rope / 2), a->sin + row * (a->rope / 2), a->rope);
        narrow_row(grad_q + (row * a->heads + item.head) * dim, x, 1.0f, dim);
    }
}

static void attend_item_back(
    const Attended *a, Item item, const E *out, const E *grad, const float *log_sum, E *grad_q, E *grad_kv, float *grad_rope,
    void *scratch) {
    const int64_t length = item.length, dim = even(a->nope + a->rope), value = a->value;
    Parts p = parts_in(scratch, length, dim, value);
    keys_and_values(a, item, p.keys, p.values);
    all_panels((Strided){p.keys, dim, 1}, length, dim, p.key_panels);
    memset(p.of_keys, 0, (size_t)(length * dim) * sizeof *p.of_keys);
    memset(p.of_values, 0, (size_t)(length * value) * sizeof *p.of_values);
    for (int64_t block = 0; block < length; block += QUERIES) {
        const int64_t queries = least(length - block, QUERIES), reach = block + queries;
        read_block(a, item, block, queries, out, grad, log_sum, &p);
        for (int64_t first = 0; first < reach; first += TALL)
            few_keys(a, first, least(reach - first, TALL), block, queries, &p);
        of_block(a, item, block, queries, &p, grad_q);
    }
    for (int64_t r = 0; r < length; r++) {
        const int64_t row = item.first + r;
        E *to = grad_kv + (row * a->heads + item.head) * (a->nope + value);
        float *x = p.of_keys + r * dim;
        narrow_row(to, x, 1.0f, a->nope);
        narrow_row(to + a->nope, p.of_values + r * value, 1.0f, value);
        turn_back(x + a->nope, a->cos + row * (a->rope / 2), a->sin + row * (a->rope / 2), a->rope);
        if (a->rope) memcpy(grad_rope + row * a->rope, x + a->nope, (size_t)a->rope * sizeof *x);
    }
}

/* Items `from` to `to`: gradients of q and kv, and of the rotary keys head by head in fp32, [h, T, R]. */
void NAMED(attend_back)(
    int64_t from, int64_t to, const int32_t *cu, int64_t rows, int64_t heads, int64_t nope, int64_t rope, int64_t value,
    const E *q, const E *kv, const E *k_rope, int64_t rope_down, const float *cos, const float *sin, const E *out,
    const float *log_sum, const E *grad, E *grad_q, E *grad_kv, float *grad_rope, void *scratch) {
    const Attended a = {heads, nope, rope, value, rope_down, q, kv, k_rope, cos, sin};
    for (int64_t i = from; i < to; i++) {
        const Item item = item_at(i, heads, cu);
        attend_item_back(&a, item, out, grad, log_sum + item.head * rows + item.first, grad_q, grad_kv,
                         grad_rope + item.head * rows * rope, scratch);
    }
}
