/* The streaming codec decoder, one frame at a time: state in, state and sound out; fp32, one core.
 *
 * The equations are those of omni_ray/models/codec_stream.py, which is the form without a compiler.  Every frame runs the
 * same loops over the same shapes, so that the bits depend on the codes alone, however they were cut.
 *
 * D input width, C channels and T samples a frame of a stage; a stage's samples lie channel after channel, each row with
 * room for the samples before the frame and for whole vectors behind it.
 */
#include "vectors.h"

#define TAPS 7
#define MOST_VECTORS 2 /* vectors of time that one block of sums covers */
#define MOST_OUTPUTS 4 /* outputs of one block */

typedef struct {
    const float *weight, *bias; /* [outputs, inputs, taps], [outputs] */
    int64_t inputs, outputs, taps, dilation;
} Conv;

typedef struct {
    const float *alpha, *inverse; /* [C] */
} Snake;

typedef struct {
    Snake snake_in, snake_mid;
    Conv wide, point;
} Unit;

typedef struct {
    Snake snake;
    Matrix up;         /* [C in, C out * rate] */
    const float *bias; /* [C out] */
    int64_t rate, inputs, outputs, samples;
    Unit unit[3];
} Stage;

typedef struct {
    Matrix gates; /* [2 D, 4 D] */
    const float *bias, *scale, *shift;
} Lstm;

typedef struct {
    int64_t width, lstms, stages, samples;
    float norm_eps;
    const Lstm *lstm;
    Matrix inlet;
    const float *in_bias;
    const Stage *stage;
    Snake snake_out;
    Conv out;
} Decoder;

static int64_t whole(int64_t samples) { return (samples + LANES - 1) / LANES * LANES; }
static int64_t before(const Conv *conv) { return (conv->taps - 1) * conv->dilation; }

/* Floats of a state: h and c of every LSTM, the window, the samples before each convolution's frame. */
int64_t codec_state_floats(const Decoder *d) {
    int64_t floats = (2 * d->lstms + TAPS) * d->width + d->out.inputs * before(&d->out);
    for (int64_t s = 0; s < d->stages; s++)
        for (int u = 0; u < 3; u++) floats += d->stage[s].outputs * before(&d->stage[s].unit[u].wide);
    return floats;
}

/* Floats that `codec_render` needs: two frames of the largest stage with room around, and its input by samples. */
int64_t codec_scratch_floats(const Decoder *d) {
    int64_t most = d->inlet.outputs + (d->out.inputs + 1) * (whole(d->samples) + before(&d->out));
    for (int64_t s = 0; s < d->stages; s++) {
        const Stage *stage = d->stage + s;
        const int64_t row = whole(stage->samples) + before(&stage->unit[2].wide) + before(&stage->unit[0].wide);
        const int64_t floats = 3 * stage->outputs * row + stage->inputs * (whole(stage->samples / stage->rate) + 1) * 2;
        most = floats > most ? floats : most;
    }
    return 2 * most;
}

/* 1 / (1 + e^-x) */
static inline V sigmoid(V x) { return 1.0f / (1.0f + exponential(-x)); }
static inline V tangent(V x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }

/* sin(x)^2, which has the period pi. */
static inline V sine_squared(V x) {
    const V turns = (x * 0.318309886f + 12582912.0f) - 12582912.0f;
    V r = x - turns * 3.140625f;
    r = r - turns * 9.67502593994140625e-4f;
    r = r - turns * 1.509957990978376e-7f;
    const V q = r * r;
    V p = (V){0} - 2.3889859e-8f;
    p = p * q + 2.7525562e-6f;
    p = p * q - 1.9840874e-4f;
    p = p * q + 8.3333310e-3f;
    p = p * q - 1.6666667e-1f;
    const V sine = p * q * r + r;
    return sine * sine;
}

/* out = x + sin(alpha x)^2 / alpha, row by row; `samples` may run into the room behind. */
static void snake(const Snake *s, int64_t channels, int64_t samples, const float *x, int64_t ldx, float *out, int64_t ldo) {
    for (int64_t c = 0; c < channels; c++) {
        const float alpha = s->alpha[c], inverse = s->inverse[c];
        for (int64_t t = 0; t < samples; t += LANES) {
            const V v = *(const U *)(x + c * ldx + t);
            *(U *)(out + c * ldo + t) = v + sine_squared(alpha * v) * inverse;
        }
    }
}

static inline __attribute__((always_inline)) void block(
    const int outputs, const int vectors, const Conv *conv, int64_t first, const float *in, int64_t ldi, float *out,
    int64_t ldo, int add) {
    V sum[MOST_OUTPUTS][MOST_VECTORS];
    for (int o = 0; o < outputs; o++)
        for (int v = 0; v < vectors; v++) sum[o][v] = (V){0} + conv->bias[first + o];
    const int64_t taps = conv->taps, row = conv->inputs * taps;
    const float *weight = conv->weight + first * row;
    for (int64_t c = 0; c < conv->inputs; c++)
        for (int64_t k = 0; k < taps; k++, weight++) {
            const float *at = in + c * ldi + k * conv->dilation;
            V x[MOST_VECTORS];
            for (int v = 0; v < vectors; v++) x[v] = *(const U *)(at + v * LANES);
            for (int o = 0; o < outputs; o++)
                for (int v = 0; v < vectors; v++) sum[o][v] += weight[o * row] * x[v];
        }
    for (int o = 0; o < outputs; o++)
        for (int v = 0; v < vectors; v++) {
            U *to = (U *)(out + (first + o) * ldo + v * LANES);
            *to = add ? (V)*to + sum[o][v] : sum[o][v];
        }
}

/* out [outputs, samples] (+)= the convolution of in, whose rows begin with the samples before the frame. */
static void convolve(const Conv *conv, int64_t samples, const float *in, int64_t ldi, float *out, int64_t ldo, int add) {
    for (int64_t t = 0; t < samples; t += MOST_VECTORS * LANES) {
        const int two = samples - t > LANES;
        for (int64_t o = 0; o < conv->outputs; o += MOST_OUTPUTS) {
            if (conv->outputs - o >= MOST_OUTPUTS) {
                if (two) block(MOST_OUTPUTS, 2, conv, o, in + t, ldi, out + t, ldo, add);
                else block(MOST_OUTPUTS, 1, conv, o, in + t, ldi, out + t, ldo, add);
            } else
                for (int64_t one = o; one < conv->outputs; one++) {
                    if (two) block(1, 2, conv, one, in + t, ldi, out + t, ldo, add);
                    else block(1, 1, conv, one, in + t, ldi, out + t, ldo, add);
                }
        }
    }
}

/* Rows that begin with `past` samples; gives where the frame begins and keeps the newest samples for the next frame. */
static void take_past(float *rows, int64_t ld, int64_t channels, int64_t past, const float *state) {
    for (int64_t c = 0; c < channels; c++) memcpy(rows + c * ld, state + c * past, past * sizeof(float));
}
static void keep_past(const float *rows, int64_t ld, int64_t channels, int64_t past, int64_t samples, float *state) {
    for (int64_t c = 0; c < channels; c++) memcpy(state + c * past, rows + c * ld + samples, past * sizeof(float));
}

/* One more input row x [D] into the GLSTM and the window; none: the silence after the last frame. */
void codec_take(const Decoder *d, const float *x, const float *state, float *next, float *scratch) {
    const int64_t D = d->width;
    float *both = scratch, *gates = scratch + 2 * D; /* [x, h], [4 D] */
    const float *window = state + 2 * d->lstms * D;
    memcpy(next, state, codec_state_floats(d) * sizeof(float));
    float *after = next + 2 * d->lstms * D;
    memmove(after, window + D, (TAPS - 1) * D * sizeof(float));
    float *y = after + (TAPS - 1) * D;
    memset(y, 0, D * sizeof(float));
    if (!x) return;
    memcpy(both, x, D * sizeof(float));
    for (int64_t l = 0; l < d->lstms; l++) {
        const Lstm *lstm = d->lstm + l;
        float *hidden = next + 2 * l * D, *cell = hidden + D;
        memcpy(both + D, hidden, D * sizeof(float));
        memcpy(gates, lstm->bias, 4 * D * sizeof(float));
        product(1, both, 2 * D, &lstm->gates, gates, 4 * D, 1);
        float sum = 0, squares = 0;
        for (int64_t i = 0; i < D; i += LANES) { /* D is a multiple of LANES */
            const V take = sigmoid(*(const U *)(gates + i)), forget = sigmoid(*(const U *)(gates + D + i));
            const V new = tangent(*(const U *)(gates + 2 * D + i)), give = sigmoid(*(const U *)(gates + 3 * D + i));
            const V kept = forget * *(const U *)(cell + i) + take * new;
            const V told = give * tangent(kept);
            *(U *)(cell + i) = kept;
            *(U *)(hidden + i) = told;
            sum += total(told);
        }
        const float mean = sum / D;
        for (int64_t i = 0; i < D; i += LANES) {
            const V off = *(const U *)(hidden + i) - mean;
            squares += total(off * off);
        }
        const float size = sqrtf(squares / D + d->norm_eps);
        for (int64_t i = 0; i < D; i++) both[i] = (hidden[i] - mean) / size * lstm->scale[i] + lstm->shift[i];
    }
    memcpy(y, both, D * sizeof(float));
}

static const float *stage_frame(
    const Stage *stage, const float *x, int64_t ldx, const float **state, float **next, float *scratch, int64_t *ld) {
    const int64_t C = stage->outputs, T = stage->samples, from = T / stage->rate;
    const int64_t padded = whole(from), most = whole(T) + before(&stage->unit[2].wide);
    float *live = scratch, *long_rows = live + C * most, *mid = long_rows + C * most;
    float *turned = mid + C * most, *risen = mid; /* mid is not in use yet */
    float *snaked = turned + stage->inputs * from;
    snake(&stage->snake, stage->inputs, from, x, ldx, snaked, padded);
    for (int64_t t = 0; t < from; t++)
        for (int64_t c = 0; c < stage->inputs; c++) turned[t * stage->inputs + c] = snaked[c * padded + t];
    product(from, turned, stage->inputs, &stage->up, risen, C * stage->rate, 0);
    for (int64_t c = 0; c < C; c++)
        for (int64_t t = 0; t < from; t++)
            for (int64_t r = 0; r < stage->rate; r++)
                live[c * most + t * stage->rate + r] = risen[(t * C + c) * stage->rate + r] + stage->bias[c];
    for (int u = 0; u < 3; u++) {
        const Unit *unit = stage->unit + u;
        const int64_t past = before(&unit->wide);
        take_past(long_rows, most, C, past, *state);
        snake(&unit->snake_in, C, T, live, most, long_rows + past, most);
        keep_past(long_rows, most, C, past, T, *next);
        convolve(&unit->wide, T, long_rows, most, mid, most, 0);
        snake(&unit->snake_mid, C, T, mid, most, mid, most);
        convolve(&unit->point, T, mid, most, live, most, 1);
        *state += C * past;
        *next += C * past;
    }
    *ld = most;
    return live;
}

/* Sound [samples] of the frame in the middle of the window. */
void codec_render(const Decoder *d, const float *state, float *next, float *sound, float *scratch, int64_t half) {
    const int64_t kept = (2 * d->lstms + TAPS) * d->width;
    memcpy(next, state, kept * sizeof(float));
    float *x = scratch;
    memcpy(x, d->in_bias, d->inlet.outputs * sizeof(float));
    product(1, state + 2 * d->lstms * d->width, d->inlet.inputs, &d->inlet, x, d->inlet.outputs, 1);
    const float *frame = x;
    int64_t ld = 1;
    state += kept;
    next += kept;
    for (int64_t s = 0; s < d->stages; s++) /* a stage reads one half of the scratch and writes the other */
        frame = stage_frame(d->stage + s, frame, ld, &state, &next, scratch + (s % 2 ? 0 : half), &ld);
    const int64_t C = d->out.inputs, past = before(&d->out), row = whole(d->samples) + past;
    float *rows = scratch + (d->stages % 2 ? 0 : half), *out = rows + C * row;
    take_past(rows, row, C, past, state);
    snake(&d->snake_out, C, d->samples, frame, ld, rows + past, row);
    keep_past(rows, row, C, past, d->samples, next);
    convolve(&d->out, d->samples, rows, row, out, row, 0);
    for (int64_t t = 0; t < d->samples; t += LANES) {
        const V v = tangent(*(const U *)(out + t));
        const int64_t left = d->samples - t < LANES ? d->samples - t : LANES;
        memcpy(sound + t, &v, left * sizeof(float));
    }
}
