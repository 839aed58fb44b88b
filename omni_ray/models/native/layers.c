/* What stands between the products of the language model: norms, gates and the loss of a row of logits, forward and back.
 *
 * The equations are those of omni_ray/models/layers.py, grouped_experts.py and cross_entropy.py, which hold the form
 * without a compiler. Arithmetic is fp32 whatever the elements are, every sum runs over a row's own values in order.
 *
 * R rows, D size, F inner size, V vocabulary
 */
#include "elements.h"

/* --- norm --------------------------------------------------------------------------------------------------------- */

/* out = x / rms(x) * gain; scale: 1 / rms(x), for the backward. Rows of x lie `down` apart. */
void NAMED(rms_rows)(
    int64_t from, int64_t to, int64_t size, const E *x, int64_t down, const float *gain, float eps, E *out, float *scale) {
    for (int64_t r = from; r < to; r++) {
        const E *in = x + r * down;
        V squares = (V){0};
        EACH_VECTOR(size, const V v = widened(in + i, count); squares += v * v;)
        scale[r] = 1.0f / sqrtf(total(squares) / (float)size + eps);
        EACH_VECTOR(size, narrow(out + r * size + i, widened(in + i, count) * scale[r] * floats(gain + i, count), count);)
    }
}

/* Blocks of `block` rows from `from` to `to`: the norm's gradient, and the sums of its gain's over each block's rows.
 * With s the row's scale: dx = s (g w) - x s^3 mean(g w x), dw = sum over rows of s g x. */
void NAMED(rms_back_blocks)(
    int64_t from, int64_t to, int64_t block, int64_t rows, int64_t size, const E *x, int64_t down, const float *gain,
    const float *scale, const E *grad, E *grad_x, float *grad_gain) {
    for (int64_t b = from; b < to; b++) {
        float *sums = grad_gain + b * size;
        memset(sums, 0, (size_t)size * sizeof *sums);
        for (int64_t r = b * block; r < rows && r < (b + 1) * block; r++) {
            const E *in = x + r * down, *g = grad + r * size;
            V along = (V){0};
            EACH_VECTOR(size, const V product = widened(g + i, count) * widened(in + i, count);
                        const V sum = floats(sums + i, count) + product * scale[r];
                        memcpy(sums + i, &sum, (size_t)count * sizeof *sums); along += product * floats(gain + i, count);)
            const float pull = total(along) * scale[r] * scale[r] * scale[r] / (float)size;
            EACH_VECTOR(size, const V slope = widened(g + i, count) * floats(gain + i, count);
                        narrow(grad_x + r * size + i, slope * scale[r] - widened(in + i, count) * pull, count);)
        }
    }
}

/* --- gate --------------------------------------------------------------------------------------------------------- */

/* out [R, F] = silu(gate) * up of gate_up [R, 2F], times the row's share where there is one. */
void NAMED(swiglu_rows)(int64_t from, int64_t to, int64_t size, const E *gate_up, const float *share, E *out) {
    for (int64_t r = from; r < to; r++) {
        const E *gate = gate_up + 2 * r * size, *up = gate + size;
        const float factor = share ? share[r] : 1.0f;
        EACH_VECTOR(size, const V g = widened(gate + i, count);
                    narrow(out + r * size + i, g * sigmoid(g) * widened(up + i, count) * factor, count);)
    }
}

/* grad_gate_up of swiglu_rows; with a share also its own gradient, `along`, and the rows of the forward, `again`. */
void NAMED(swiglu_back_rows)(
    int64_t from, int64_t to, int64_t size, const E *gate_up, const float *share, const E *grad, E *grad_gate_up,
    float *along, E *again) {
    for (int64_t r = from; r < to; r++) {
        const E *gate = gate_up + 2 * r * size, *up = gate + size;
        E *grad_gate = grad_gate_up + 2 * r * size, *grad_up = grad_gate + size;
        const float factor = share ? share[r] : 1.0f;
        V sum = (V){0};
        EACH_VECTOR(
            size, const V g = widened(gate + i, count); const V u = widened(up + i, count);
            const V d = widened(grad + r * size + i, count); const V open = sigmoid(g), activated = g * open;
            narrow(grad_gate + i, d * factor * u * (open + activated * (1.0f - open)), count);
            narrow(grad_up + i, d * factor * activated, count); if (share) {
                sum += d * activated * u;
                narrow(again + r * size + i, activated * u * factor, count);
            })
        if (share) along[r] = total(sum);
    }
}

/* --- loss --------------------------------------------------------------------------------------------------------- */

/* Cross-entropy of every row of logits [R, V] and its label; with `slopes` the logits become softmax - onehot. */
void NAMED(cross_entropy_rows)(
    int64_t from, int64_t to, int64_t size, E *logits, const int64_t *labels, float *loss, int64_t slopes) {
    for (int64_t r = from; r < to; r++) {
        E *row = logits + r * size;
        V high = (V){0} - INFINITY, sum = (V){0};
        EACH_VECTOR(size, V v = widened(row + i, count); for (int64_t j = count; j < LANES; j++) v[j] = -INFINITY;
                    high = pick(v > high, v, high);)
        const float highest = highest_of(high);
        EACH_VECTOR(size, V p = share_of(widened(row + i, count) - highest);
                    for (int64_t j = count; j < LANES; j++) p[j] = 0; sum += p;)
        const float all = total(sum);
        loss[r] = logf(all) - (widened(row + labels[r], 1)[0] - highest);
        if (!slopes) continue;
        const float share = 1.0f / all;
        const float label = share_of((V){0} + (widened(row + labels[r], 1)[0] - highest))[0] * share - 1.0f;
        EACH_VECTOR(size, narrow(row + i, share_of(widened(row + i, count) - highest) * share, count);)
        narrow(row + labels[r], (V){0} + label, 1);
    }
}
