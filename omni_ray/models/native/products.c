/* Products of matrices that change from step to step, of any orientation: out [R, N] = a [R, K] b [K, N].
 *
 * b is copied into panels that stay in a cache, a is read as it lies or, where its inputs lie apart, copied into strips of
 * TALL rows. Every sum runs over its inputs in order, DEEP of them at a time: its bits depend on no other row or column,
 * on neither operand's layout, and on no thread.
 * Source for the order of the loops: Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication (2008).
 */
#include "vectors.h"

#define DEEP 512  /* inputs of one pass: a panel and the strips beside it fit into the second cache */
#define ROWS 96   /* rows of one pass, in strips of TALL */
#define COLUMNS 2048

/* A matrix whose entry [i, j] lies at values[i * down + j * right]; one of the steps is 1. */
typedef struct {
    const float *values;
    int64_t down, right;
} Strided;

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

/* LANES rows of LANES values, turned over the diagonal: each stage interleaves vector i with i + LANES / 2. */
static inline void turned(const float *from, int64_t down, float *to, int64_t to_down) {
    V a[LANES], b[LANES];
    for (int i = 0; i < LANES; i++) a[i] = *(const U *)(from + i * down);
    for (int stage = 0; stage < STAGES; stage++) {
        for (int i = 0; i < LANES / 2; i++) {
            b[2 * i] = INTERLEAVED(a[i], a[i + LANES / 2], EVEN_HALF);
            b[2 * i + 1] = INTERLEAVED(a[i], a[i + LANES / 2], ODD_HALF);
        }
        memcpy(a, b, sizeof a);
    }
    for (int i = 0; i < LANES; i++) *(U *)(to + i * to_down) = a[i];
}

/* Columns first to first + columns of b, as one panel [depth, PANEL] filled up with zeros. */
static void copy_panel(Strided b, int64_t depth, int64_t first, int64_t columns, float *to) {
    const float *from = b.values + first * b.right;
    if (b.right == 1) {
        for (int64_t k = 0; k < depth; k++, from += b.down, to += PANEL) {
            if (columns == PANEL)
                for (int v = 0; v < WIDE; v++) *(U *)(to + v * LANES) = *(const U *)(from + v * LANES);
            else
                for (int64_t c = 0; c < PANEL; c++) to[c] = c < columns ? from[c] : 0;
        }
        return;
    }
    if (columns < PANEL) memset(to, 0, (size_t)(depth * PANEL) * sizeof *to);
    int64_t c = 0;
    for (; c + LANES <= columns; c += LANES) {
        int64_t k = 0;
        for (; k + LANES <= depth; k += LANES) turned(from + c * b.right + k, b.right, to + k * PANEL + c, PANEL);
        for (; k < depth; k++)
            for (int i = 0; i < LANES; i++) to[k * PANEL + c + i] = from[(c + i) * b.right + k];
    }
    for (; c < columns; c++)
        for (int64_t k = 0; k < depth; k++) to[k * PANEL + c] = from[c * b.right + k];
}

/* Rows of a whose inputs lie apart, as strips [depth, TALL] with LANES floats of room behind each; a whole vector is
 * written at a time, and what it holds too much the next one overwrites. */
static void copy_strips(Strided a, int64_t rows, int64_t depth, float *to) {
    const int64_t next = depth * TALL + LANES;
    for (int64_t k = 0; k < depth; k++) {
        const float *from = a.values + k * a.right;
        float *at = to + k * TALL;
        int64_t r = 0;
        for (; r + 8 <= rows; r += TALL, at += next) memcpy(at, from + r, 8 * sizeof *at);
        for (; r < rows; r += TALL, at += next)
            for (int64_t i = 0; i < TALL && r + i < rows; i++) at[i] = from[r + i];
    }
}

/* --- sums --------------------------------------------------------------------------------------------------------- */

/* Half a panel's width where the last has no more: columns of zeros cost as much as others. */
#define STRIP(COUNT, RIGHT, DOWN)                                                                                     \
    (columns <= PANEL / 2 ? tile(COUNT, WIDE / 2, x, DOWN, RIGHT, w, depth, out, out_down, columns, add)             \
                          : tile(COUNT, WIDE, x, DOWN, RIGHT, w, depth, out, out_down, columns, add))

static void rows_of_panel(
    int64_t rows, const float *x, int64_t down, int64_t right, const float *w, int64_t depth, float *out, int64_t out_down,
    int64_t columns, int add) {
    switch (rows) {
    case 1: STRIP(1, right, down); break;
    case 2: STRIP(2, right, down); break;
    case 3: STRIP(3, right, down); break;
#if TALL == 6
    case 4: STRIP(4, right, down); break;
    case 5: STRIP(5, right, down); break;
#endif
    default: right == 1 ? STRIP(TALL, 1, down) : STRIP(TALL, TALL, 1);
    }
}

/* --- the product -------------------------------------------------------------------------------------------------- */

int64_t product_scratch_floats(void) {
    return (COLUMNS + ROWS) * DEEP + ROWS / TALL * LANES;
}

/* Sums over `depth` inputs of rows `first` to `end` and `outputs` columns, at most COLUMNS. */
static void pass(
    int64_t first, int64_t end, int64_t outputs, int64_t depth, Strided a, Strided b, float *out, int64_t out_down, int add,
    float *panels, float *strips) {
    for (int64_t c = 0; c < outputs; c += PANEL)
        copy_panel(b, depth, c, outputs - c < PANEL ? outputs - c : PANEL, panels + c * depth);
    for (int64_t block = first; block < end; block += ROWS) {
        const int64_t rows = end - block < ROWS ? end - block : ROWS;
        const Strided from = {a.values + block * a.down, a.down, a.right};
        if (a.right != 1) copy_strips(from, rows, depth, strips);
        for (int64_t c = 0; c < outputs; c += PANEL) {
            const int64_t columns = outputs - c < PANEL ? outputs - c : PANEL;
            float *to = out + block * out_down + c;
            for (int64_t r = 0; r < rows; r += TALL) {
                const int64_t tall = rows - r < TALL ? rows - r : TALL;
                if (a.right == 1)
                    rows_of_panel(tall, from.values + r * a.down, a.down, 1, panels + c * depth, depth, to + r * out_down,
                                  out_down, columns, add);
                else
                    rows_of_panel(tall, strips + r / TALL * (depth * TALL + LANES), 1, TALL, panels + c * depth, depth,
                                  to + r * out_down, out_down, columns, add);
            }
        }
    }
}

/* Rows `first` to `end` of out [R, N] = a [R, K] b [K, N], or added to what is there; steps are in floats, and one of each
 * operand's is 1. */
void product_rows(
    int64_t first, int64_t end, int64_t outputs, int64_t inputs, const float *a, int64_t a_down, int64_t a_right,
    const float *b, int64_t b_down, int64_t b_right, float *out, int64_t out_down, int64_t add, float *scratch) {
    if (inputs == 0 && !add)
        for (int64_t r = first; r < end; r++) memset(out + r * out_down, 0, (size_t)outputs * sizeof *out);
    for (int64_t c = 0; c < outputs; c += COLUMNS)
        for (int64_t k = 0; k < inputs; k += DEEP)
            pass(first, end, outputs - c < COLUMNS ? outputs - c : COLUMNS, inputs - k < DEEP ? inputs - k : DEEP,
                 (Strided){a + k * a_right, a_down, a_right}, (Strided){b + k * b_down + c * b_right, b_down, b_right},
                 out + c, out_down, add || k > 0, scratch, scratch + COLUMNS * DEEP);
}

/* Products `first` to `end` of a batch: out [batch, R, N] = a [batch, R, K] b [batch, K, N], or added to what is there. */
void product_batches(
    int64_t first, int64_t end, int64_t rows, int64_t outputs, int64_t inputs, const float *a, int64_t a_next, int64_t a_down,
    int64_t a_right, const float *b, int64_t b_next, int64_t b_down, int64_t b_right, float *out, int64_t out_next,
    int64_t out_down, int64_t add, float *scratch) {
    for (int64_t i = first; i < end; i++)
        product_rows(0, rows, outputs, inputs, a + i * a_next, a_down, a_right, b + i * b_next, b_down, b_right,
                     out + i * out_next, out_down, add, scratch);
}

/* Groups `first` to `end` of rows, each with its own b: out [R, N], a [R, K], b [groups, K, N]. */
void product_groups(
    int64_t first, int64_t end, const int32_t *ends, int64_t outputs, int64_t inputs, const float *a, int64_t a_down,
    int64_t a_right, const float *b, int64_t b_next, int64_t b_down, int64_t b_right, float *out, int64_t out_down,
    float *scratch) {
    for (int64_t g = first; g < end; g++)
        product_rows(g ? ends[g - 1] : 0, ends[g], outputs, inputs, a, a_down, a_right, b + g * b_next, b_down, b_right, out,
                     out_down, 0, scratch);
}

/* Groups `first` to `end` of inputs: out [groups, R, N], a [R, K], b [K, N]. */
void product_inner_groups(
    int64_t first, int64_t end, const int32_t *ends, int64_t rows, int64_t outputs, const float *a, int64_t a_down,
    int64_t a_right, const float *b, int64_t b_down, int64_t b_right, float *out, float *scratch) {
    for (int64_t g = first; g < end; g++) {
        const int64_t begin = g ? ends[g - 1] : 0;
        product_rows(0, rows, outputs, ends[g] - begin, a + begin * a_right, a_down, a_right, b + begin * b_down, b_down,
                     b_right, out + g * rows * outputs, outputs, 0, scratch);
    }
}
