/* Products of matrices that change from step to step, of any orientation: out [R, N] = a [R, K] b [K, N].
 *
 * b is copied into panels that stay in a cache, a is read as it lies or, where its inputs lie apart, copied into strips of
 * TALL rows. Every sum runs over its inputs in order, in fp32: its bits depend on no other row or column, on neither
 * operand's layout, and on no thread.
 * Source for the order of the loops: Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication (2008).
 */
#include "elements.h"

#define DEEP (STEP == 1 ? 512 : 2048) /* inputs of one pass: a panel and the strips beside it fit into the second cache */
#define ROWS 96                       /* rows of one pass, in strips of TALL */
#define COLUMNS (STEP == 1 ? 2048 : 1024)
#define TOGETHER 480 /* rows whose sums wait in fp32, where bf16 needs more than one pass */

typedef struct {
    E *panels, *strips;
    float *sums;
} Room;

static Room room_in(void *scratch) {
    E *panels = scratch, *strips = panels + COLUMNS * DEEP;
    return (Room){panels, strips, (float *)(strips + ROWS / TALL * strip_elements(DEEP))};
}

int64_t NAMED(product_scratch_bytes)(void) {
    return (int64_t)sizeof(E) * (COLUMNS * DEEP + ROWS / TALL * strip_elements(DEEP)) + (STEP > 1 ? 4 * TOGETHER * COLUMNS : 0);
}

/* While a strip is multiplied, memory brings its part of what the panel of columns from `first` on is copied from. */
static Ahead next_panel(Strided b, int64_t depth, int64_t first, int64_t columns, int64_t strip) {
    const char *from = (const char *)(b.values + first * b.right);
    if (columns > 0 && b.right == 1) { /* a line of each row, then the next line */
        const int64_t lines = least(columns, PANEL) * (int64_t)sizeof(E) / LINE + 1;
        return (Ahead){from + strip % lines * LINE + strip / lines * steps_of(depth) * b.down * (int64_t)sizeof(E),
                       b.down * (int64_t)sizeof(E)};
    }
    if (columns > 0 && b.right == depth) return (Ahead){from + strip * steps_of(depth) * LINE, LINE};
    return NOTHING;
}

/* The same of a panel that was copied, and may have left the second cache. */
static Ahead copied_panel(const E *panel, int64_t steps, int64_t columns, int64_t strip) {
    const int64_t bytes = steps * PANEL * STEP * (int64_t)sizeof(E), done = strip * steps * LINE;
    return columns > 0 && done < bytes ? (Ahead){(const char *)panel + done, LINE} : NOTHING;
}

/* Memory brings the lines that the next strip will write. */
static void ask_for_rows(void *first, int64_t rows, int64_t down, int64_t bytes) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t at = 0; at < bytes; at += LINE) __builtin_prefetch((char *)first + r * down + at, 1, 3);
}

/* Sums over `depth` inputs of all rows of a and `outputs` columns, at most COLUMNS: to `out` where there is one, else to
 * `sums`; with `add` onto what `sums` holds. */
static void pass(
    int64_t all, int64_t outputs, int64_t depth, Strided a, Strided b, float *sums, int64_t sums_down, E *out,
    int64_t out_down, int add, Room room) {
    const int64_t steps = steps_of(depth);
    const int as_they_lie = a.right == 1 && depth % STEP == 0;
    for (int64_t block = 0; block < all; block += ROWS) {
        const int64_t rows = least(all - block, ROWS);
        const Strided from = {a.values + block * a.down, a.down, a.right};
        if (!as_they_lie) copy_strips(from, rows, depth, room.strips);
        for (int64_t c = 0; c < outputs; c += PANEL) {
            const int64_t columns = least(outputs - c, PANEL);
            E *panel = room.panels + c * steps * STEP;
            if (block == 0) copy_panel(b, depth, c, columns, panel);
            for (int64_t r = 0; r < rows; r += TALL) {
                const E *x = as_they_lie ? from.values + r * a.down : room.strips + r / TALL * strip_elements(depth);
                const int64_t later = outputs - c - columns;
                float *sum = sums + (block + r) * sums_down + c;
                E *to = out ? out + (block + r) * out_down + c : NULL;
                const int64_t wide = out ? sizeof(E) : sizeof(float), down = wide * (out ? out_down : sums_down);
                ask_for_rows((char *)(out ? (void *)to : (void *)sum) + TALL * down, least(rows - r - TALL, TALL), down,
                             columns * wide);
                panel_rows(least(rows - r, TALL), x, as_they_lie ? a.down : STEP, as_they_lie ? STEP : TALL * STEP, panel,
                           steps, sum, sums_down, to, out_down, columns, add,
                           block ? copied_panel(panel + steps * PANEL * STEP, steps, later, r / TALL)
                                 : next_panel(b, depth, c + PANEL, later, r / TALL));
            }
        }
    }
}

/* Rows of one product whose sums wait together. */
static void rows_together(
    int64_t rows, int64_t outputs, int64_t inputs, Strided a, Strided b, void *out, int64_t out_down, int64_t add, Room room) {
    const int wide = STEP == 1 || add;
    for (int64_t c = 0; c < outputs; c += COLUMNS)
        for (int64_t k = 0; k < inputs; k += DEEP) {
            const int64_t columns = least(outputs - c, COLUMNS), depth = least(inputs - k, DEEP);
            pass(rows, columns, depth, (Strided){a.values + k * a.right, a.down, a.right},
                 (Strided){b.values + k * b.down + c * b.right, b.down, b.right}, wide ? (float *)out + c : room.sums,
                 wide ? out_down : COLUMNS, wide || k + DEEP < inputs ? NULL : (E *)out + c, out_down, add || k > 0, room);
        }
}

/* Rows `first` to `end` of out [R, N] = a [R, K] b [K, N]; with `add`, added to what is there, and `out` is fp32 whatever
 * the operands are. Steps are in elements, and one of each operand's is 1. */
void NAMED(product_rows)(
    int64_t first, int64_t end, int64_t outputs, int64_t inputs, const E *a, int64_t a_down, int64_t a_right, const E *b,
    int64_t b_down, int64_t b_right, void *out, int64_t out_down, int64_t add, void *scratch) {
    const int64_t size = STEP == 1 || add ? sizeof(float) : sizeof(E);
    const int64_t together = size < (int64_t)sizeof(float) && inputs > DEEP ? TOGETHER : end - first;
    if (inputs == 0 && outputs && !add)
        for (int64_t r = first; r < end; r++) memset((char *)out + r * out_down * size, 0, (size_t)(outputs * size));
    for (int64_t r = first; r < end; r += together)
        rows_together(least(end - r, together), outputs, inputs, (Strided){a + r * a_down, a_down, a_right},
                      (Strided){b, b_down, b_right}, (char *)out + r * out_down * size, out_down, add, room_in(scratch));
}

/* Groups `first` to `end` of rows, each with its own b: out [R, N], a [R, K], b [groups, K, N]. */
void NAMED(product_groups)(
    int64_t first, int64_t end, const int32_t *ends, int64_t outputs, int64_t inputs, const E *a, int64_t a_down,
    int64_t a_right, const E *b, int64_t b_next, int64_t b_down, int64_t b_right, E *out, int64_t out_down, void *scratch) {
    for (int64_t g = first; g < end; g++)
        NAMED(product_rows)(g ? ends[g - 1] : 0, ends[g], outputs, inputs, a, a_down, a_right, b + g * b_next, b_down, b_right,
                            out, out_down, 0, scratch);
}

/* Groups `first` to `end` of inputs: out [groups, R, N], a [R, K], b [K, N]. */
void NAMED(product_inner_groups)(
    int64_t first, int64_t end, const int32_t *ends, int64_t rows, int64_t outputs, const E *a, int64_t a_down,
    int64_t a_right, const E *b, int64_t b_down, int64_t b_right, E *out, void *scratch) {
    for (int64_t g = first; g < end; g++) {
        const int64_t begin = g ? ends[g - 1] : 0;
        NAMED(product_rows)(0, rows, outputs, ends[g] - begin, a + begin * a_right, a_down, a_right, b + begin * b_down, b_down,
                            b_right, out + g * rows * outputs, outputs, 0, scratch);
    }
}
