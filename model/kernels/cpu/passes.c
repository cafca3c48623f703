/* Passes over rows that torch makes of many: SwiGLU, sums into rows, norms, SiLU of q, k and v,
 * softmax of the head.
 *
 * Plain C on addresses: no header of torch or Python. setup.py builds it where a compiler is;
 * passes.py calls it, and the torch forms of each op serve where it was not built.
 *
 * Numbers are fp32 or bf16 (`_short`), read into fp32, rounded once when written. A row's bits
 * depend on that row alone, and sums have one order: neither neighbours nor the number of threads
 * change a bit. No flag lets the compiler reorder sums or forget NaN and inf.
 *
 * Dimensions: n rows, c columns; steps between rows are in numbers, and rows are dense.
 */

#include "rows.h"

/* ---- SwiGLU ---- */

EACH_CPU void swiglu_fwd_rows(const void *inner, void *out, i64 c, int is_short, i64 i, i64 end) {
    float g[PIECE], u[PIECE];
    for (; i < end; i++)
        for (i64 j = 0; j < c; j += PIECE) {
            i64 n = least(PIECE, c - j);
            load(g, inner, 2 * i * c + j, n, is_short);
            load(u, inner, (2 * i + 1) * c + j, n, is_short);
            for (i64 l = 0; l < n; l++) g[l] = g[l] * sigmoid(g[l]) * u[l];
            store(out, i * c + j, g, n, is_short);
        }
}

void swiglu_fwd(const void *inner, void *out, i64 n, i64 c, int is_short, int threads) {
#pragma omp parallel for num_threads(threads) if (n > ROWS)
    for (i64 i = 0; i < n; i += ROWS)
        swiglu_fwd_rows(inner, out, c, is_short, i, least(i + ROWS, n));
}

/* back is the gradient of silu(g) * u before `scale`, and becomes scale * silu(g) * u; dots are the
 * products of both before that */
EACH_CPU void swiglu_bwd_rows(const void *inner, void *back, const void *scale, void *slope,
                              void *dots, i64 c, int is_short, i64 i, i64 end) {
    float g[PIECE], u[PIECE], b[PIECE], y[PIECE];
    for (; i < end; i++) {
        float weight = load_one(scale, i, is_short), total = 0;
        for (i64 j = 0; j < c; j += PIECE) {
            i64 n = least(PIECE, c - j);
            load(g, inner, 2 * i * c + j, n, is_short);
            load(u, inner, (2 * i + 1) * c + j, n, is_short);
            load(b, back, i * c + j, n, is_short);
            for (i64 l = 0; l < n; l++) {
                float s = sigmoid(g[l]), active = g[l] * s;
                y[l] = active * u[l];
                g[l] = b[l] * weight * u[l] * (s + active * (1.0f - s));
                u[l] = b[l] * weight * active;
            }
            total += dot(b, y, n);
            for (i64 l = 0; l < n; l++) y[l] *= weight;
            store(back, i * c + j, y, n, is_short);
            store(slope, 2 * i * c + j, g, n, is_short);
            store(slope, (2 * i + 1) * c + j, u, n, is_short);
        }
        store(dots, i, &total, 1, is_short);
    }
}

void swiglu_bwd(const void *inner, void *back, const void *scale, void *slope, void *dots, i64 n,
                i64 c, int is_short, int threads) {
#pragma omp parallel for num_threads(threads) if (n > ROWS)
    for (i64 i = 0; i < n; i += ROWS)
        swiglu_bwd_rows(inner, back, scale, slope, dots, c, is_short, i, least(i + ROWS, n));
}

/* ---- out[row[i]] += scale[i] * x[i], in the order of i ---- */

EACH_CPU void add_rows_columns(void *out, const i64 *row, const void *x, const void *scale, i64 n,
                               i64 c, int is_short, i64 begin, i64 end) {
    float a[PIECE], b[PIECE];
    for (i64 i = 0; i < n; i++) {
        float weight = scale ? load_one(scale, i, is_short) : 1.0f;
        for (i64 j = begin; j < end; j += PIECE) {
            i64 m = least(PIECE, end - j);
            load(a, out, row[i] * c + j, m, is_short);
            load(b, x, i * c + j, m, is_short);
            for (i64 l = 0; l < m; l++) a[l] += weight * b[l];
            store(out, row[i] * c + j, a, m, is_short);
        }
    }
}

/* threads share the columns, not the rows: two rows may go to one */
void add_rows(void *out, const i64 *row, const void *x, const void *scale, i64 n, i64 c,
              int is_short, int threads) {
    i64 each = (c + threads - 1) / threads;
    each = (each + 31) / 32 * 32;
#pragma omp parallel for num_threads(threads) if (n > ROWS)
    for (i64 j = 0; j < c; j += each)
        add_rows_columns(out, row, x, scale, n, c, is_short, j, least(j + each, c));
}

/* ---- the norms of a block ----
 *
 *     sum = alpha * x + beta * branch      out = sum / rms(sum) * weight * sigmoid(gate)
 */

typedef struct {
    const void *x, *branch, *gate; /* branch and gate may be null; at most one is given */
    const float *weight;           /* [c] */
    i64 x_step, other_step, c;
    float alpha, beta, eps;
    int is_short, is_other_short;
} Norm;

INLINE void load_sum(float *restrict x, float *restrict other, const Norm *t, i64 i, i64 j, i64 n) {
    load(x, t->x, i * t->x_step + j, n, t->is_short);
    if (!t->branch) return;
    load(other, t->branch, i * t->other_step + j, n, t->is_other_short);
    for (i64 l = 0; l < n; l++) x[l] = t->alpha * x[l] + t->beta * other[l];
}

INLINE void load_gate(float *restrict gate, const Norm *t, i64 i, i64 j, i64 n) {
    load(gate, t->gate, i * t->other_step + j, n, t->is_other_short);
    for (i64 l = 0; l < n; l++) gate[l] = sigmoid(gate[l]);
}

EACH_CPU void norm_fwd_rows(const Norm *t, void *sum, void *out, float *rstd, i64 i, i64 end) {
    float x[PIECE], other[PIECE];
    for (; i < end; i++) {
        float square = 0;
        for (i64 j = 0; j < t->c; j += PIECE) {
            i64 n = least(PIECE, t->c - j);
            load_sum(x, other, t, i, j, n);
            square += dot(x, x, n);
        }
        rstd[i] = 1.0f / __builtin_sqrtf(square / t->c + t->eps);
        for (i64 j = 0; j < t->c; j += PIECE) {
            i64 n = least(PIECE, t->c - j);
            load_sum(x, other, t, i, j, n);
            if (sum) store(sum, i * t->c + j, x, n, t->is_short);
            for (i64 l = 0; l < n; l++) x[l] = x[l] * rstd[i] * t->weight[j + l];
            if (t->gate) {
                load_gate(other, t, i, j, n);
                for (i64 l = 0; l < n; l++) x[l] *= other[l];
            }
            store(out, i * t->c + j, x, n, t->is_short);
        }
    }
}

void norm_fwd(const Norm *t, void *sum, void *out, float *rstd, i64 n, int threads) {
#pragma omp parallel for num_threads(threads) if (n > ROWS)
    for (i64 i = 0; i < n; i += ROWS) norm_fwd_rows(t, sum, out, rstd, i, least(i + ROWS, n));
}

typedef struct {
    const void *out;   /* gradient of out */
    const void *twin;  /* of out where it was given twice; may be null */
    const void *sum;   /* of the sum; may be null */
    void *x, *other;   /* to be written: of x and of branch or gate; may be null */
    float *weight;     /* [(n + ROWS - 1) / ROWS, c]: sums of ROWS rows each */
    i64 out_step, twin_step, sum_step;
} NormGrads;

INLINE void load_grad(float *restrict d, float *restrict other, const Norm *t, const NormGrads *to,
                      i64 i, i64 j, i64 n) {
    load(d, to->out, i * to->out_step + j, n, t->is_short);
    if (to->twin) {
        load(other, to->twin, i * to->twin_step + j, n, t->is_short);
        for (i64 l = 0; l < n; l++) d[l] += other[l];
    }
    if (t->gate) {
        load_gate(other, t, i, j, n);
        for (i64 l = 0; l < n; l++) d[l] *= other[l];
    }
}

EACH_CPU void norm_bwd_rows(const Norm *t, const NormGrads *to, const float *rstd, i64 i, i64 end) {
    float x[PIECE], d[PIECE], other[PIECE];
    float *to_weight = to->weight + i / ROWS * t->c;
    memset(to_weight, 0, t->c * sizeof(float));
    for (; i < end; i++) {
        float along = 0;
        for (i64 j = 0; j < t->c; j += PIECE) {
            i64 n = least(PIECE, t->c - j);
            load_sum(x, other, t, i, j, n);
            load_grad(d, other, t, to, i, j, n);
            for (i64 l = 0; l < n; l++) {
                d[l] *= x[l] * rstd[i];
                to_weight[j + l] += d[l];
            }
            along += dot(d, t->weight + j, n);
            if (t->gate && to->other) {
                /* d sigmoid = sigmoid (1 - sigmoid), of which d holds one factor */
                for (i64 l = 0; l < n; l++) d[l] *= t->weight[j + l] * (1.0f - other[l]);
                store(to->other, i * t->c + j, d, n, t->is_other_short);
            }
        }
        along /= t->c;
        for (i64 j = 0; j < t->c; j += PIECE) {
            i64 n = least(PIECE, t->c - j);
            load_sum(x, other, t, i, j, n);
            load_grad(d, other, t, to, i, j, n);
            for (i64 l = 0; l < n; l++)
                x[l] = (d[l] * t->weight[j + l] - x[l] * rstd[i] * along) * rstd[i];
            if (to->sum) {
                load(other, to->sum, i * to->sum_step + j, n, t->is_short);
                for (i64 l = 0; l < n; l++) x[l] += other[l];
            }
            for (i64 l = 0; l < n; l++) d[l] = t->alpha * x[l];
            if (to->x) store(to->x, i * t->c + j, d, n, t->is_short);
            if (!t->branch || !to->other) continue;
            for (i64 l = 0; l < n; l++) d[l] = t->beta * x[l];
            store(to->other, i * t->c + j, d, n, t->is_other_short);
        }
    }
}

void norm_bwd(const Norm *t, const NormGrads *to, const float *rstd, i64 n, int threads) {
#pragma omp parallel for num_threads(threads) if (n > ROWS)
    for (i64 i = 0; i < n; i += ROWS) norm_bwd_rows(t, to, rstd, i, least(i + ROWS, n));
}

/* ---- SiLU of [n, heads, 3, c] into [3, heads, n, c], and back; c <= PIECE ---- */

EACH_CPU void qkv_fwd_rows(const void *x, void *out, i64 n, i64 heads, i64 c, int is_short, i64 i,
                           i64 end) {
    float a[PIECE];
    i64 parts = 3 * heads, each = PIECE / c;
    for (; i < end; i++)
        for (i64 first = 0; first < parts; first += each) {
            i64 count = least(each, parts - first);
            load(a, x, (i * parts + first) * c, count * c, is_short);
            for (i64 l = 0; l < count * c; l++) a[l] *= sigmoid(a[l]);
            for (i64 k = 0; k < count; k++) {
                i64 head = (first + k) / 3, which = (first + k) % 3;
                store(out, ((which * heads + head) * n + i) * c, a + k * c, c, is_short);
            }
        }
}

void qkv_fwd(const void *x, void *out, i64 n, i64 heads, i64 c, int is_short, int threads) {
#pragma omp parallel for num_threads(threads) if (n > ROWS)
    for (i64 i = 0; i < n; i += ROWS)
        qkv_fwd_rows(x, out, n, heads, c, is_short, i, least(i + ROWS, n));
}

/* grads are those of q, k and v; steps those between their rows and heads */
EACH_CPU void qkv_bwd_rows(const void *x, const void *const *grads, const i64 *steps, void *out,
                           i64 heads, i64 c, int is_short, i64 i, i64 end) {
    float a[PIECE], d[PIECE];
    i64 parts = 3 * heads, each = PIECE / c;
    for (; i < end; i++)
        for (i64 first = 0; first < parts; first += each) {
            i64 count = least(each, parts - first);
            load(a, x, (i * parts + first) * c, count * c, is_short);
            for (i64 k = 0; k < count; k++) {
                i64 head = (first + k) / 3, which = (first + k) % 3;
                i64 at = i * steps[2 * which] + head * steps[2 * which + 1];
                load(d + k * c, grads[which], at, c, is_short);
            }
            for (i64 l = 0; l < count * c; l++) {
                float s = sigmoid(a[l]);
                d[l] *= s * (1.0f + a[l] * (1.0f - s));
            }
            store(out, (i * parts + first) * c, d, count * c, is_short);
        }
}

void qkv_bwd(const void *x, const void *const *grads, const i64 *steps, void *out, i64 n, i64 heads,
             i64 c, int is_short, int threads) {
#pragma omp parallel for num_threads(threads) if (n > ROWS)
    for (i64 i = 0; i < n; i += ROWS)
        qkv_bwd_rows(x, grads, steps, out, heads, c, is_short, i, least(i + ROWS, n));
}

/* ---- the head: logits [n, c] fp32 to probabilities in place, and the gradient of the logits ---- */

EACH_CPU void softmax_fwd_rows(float *logits, const i64 *target, float *logprobs, i64 c,
                               float temperature, i64 i, i64 end) {
    float ones[PIECE];
    for (i64 l = 0; l < PIECE; l++) ones[l] = 1.0f;
    for (; i < end; i++) {
        float *row = logits + i * c, lanes[LANES], most, total = 0;
        for (int l = 0; l < LANES; l++) lanes[l] = row[0];
        for (i64 j = 0; j + LANES <= c; j += LANES)
            for (int l = 0; l < LANES; l++) lanes[l] = row[j + l] > lanes[l] ? row[j + l] : lanes[l];
        for (i64 j = c / LANES * LANES; j < c; j++) lanes[0] = row[j] > lanes[0] ? row[j] : lanes[0];
        most = lanes[0];
        for (int l = 1; l < LANES; l++) most = lanes[l] > most ? lanes[l] : most;
        float own = (row[target[i]] - most) / temperature;
        for (i64 j = 0; j < c; j += PIECE) {
            i64 n = least(PIECE, c - j);
            for (i64 l = 0; l < n; l++) row[j + l] = exponential((row[j + l] - most) / temperature);
            total += dot(row + j, ones, n);
        }
        logprobs[i] = own - logf(total);
        for (i64 j = 0; j < c; j++) row[j] /= total;
    }
}

void softmax_fwd(float *logits, const i64 *target, float *logprobs, i64 n, i64 c,
                 float temperature, int threads) {
#pragma omp parallel for num_threads(threads) if (n > ROWS)
    for (i64 i = 0; i < n; i += ROWS)
        softmax_fwd_rows(logits, target, logprobs, c, temperature, i, least(i + ROWS, n));
}

/* share is the gradient of each logprob over the temperature */
EACH_CPU void softmax_bwd_rows(const float *restrict p, const i64 *target, const float *share,
                               float *restrict slope, i64 c, i64 i, i64 end) {
    for (; i < end; i++) {
        for (i64 j = 0; j < c; j++) slope[i * c + j] = -share[i] * p[i * c + j];
        slope[i * c + target[i]] += share[i];
    }
}

void softmax_bwd(const float *p, const i64 *target, const float *share, float *slope, i64 n, i64 c,
                 int threads) {
#pragma omp parallel for num_threads(threads) if (n > ROWS)
    for (i64 i = 0; i < n; i += ROWS)
        softmax_bwd_rows(p, target, share, slope, c, i, least(i + ROWS, n));
}
