/* Lightning attention, block after block of each sequence and head, forward and backward.
 *
 * In a block of BLOCK tokens, with decay d and the state S before it (see ../lightning/blocks.py):
 *
 *     o_i  = sum_{j<=i} d^(i-j) (q_i . k_j) v_j + d^(i+1) q_i S
 *     S'   = d^n S + sum_j d^(n-1-j) k_j^T v_j
 *
 * All products and sums are fp32. A sequence and head is one thread's: no bit depends on others.
 * Rows are cut off at size and held with `width` columns, a multiple of LANES, zero behind.
 */

#include "products.h"

typedef struct {
    Rows q, k, v, out, to_q, to_k, to_v; /* out is its gradient in the backward */
    const float *powers;                 /* [H, BLOCK + 1] of each head's decay */
    const float *initial, *to_final;     /* [S, H, D, D], may be null */
    float *final, *to_initial;           /* [S, H, D, D], may be null */
    const i64 *starts;                   /* [S + 1] */
    i64 heads, size;
    int is_short;
} Lightning;

/* what one thread works on: a block's rows, and a state of [width, width] */
typedef struct {
    const Lightning *t;
    i64 sequence, head, width, first, n; /* of the block: first token and how many */
    const float *power;
    float decay[BLOCK * BLOCK]; /* [query, key], of those the query sees */
    float q[BLOCK * MAX_WIDTH], k[BLOCK * MAX_WIDTH], v[BLOCK * MAX_WIDTH], d[BLOCK * MAX_WIDTH];
    float turned[BLOCK * MAX_WIDTH], out[BLOCK * MAX_WIDTH];
    float scores[BLOCK * BLOCK], slopes[BLOCK * BLOCK];
    float state[MAX_WIDTH * MAX_WIDTH], state_turned[MAX_WIDTH * MAX_WIDTH];
} Work;

INLINE void get(float *to, const Work *w, Rows rows) {
    get_block(to, rows, w->first, w->n, w->head, w->t->size, w->width, w->t->is_short);
}

INLINE void put(const Work *w, Rows rows, const float *from) {
    put_block(rows, w->first, w->n, w->head, from, w->t->size, w->width, w->t->is_short);
}

/* a state of [size, size] in and out; is_turned: of the transpose */
INLINE void get_state(Work *w, const float *states, int is_turned) {
    i64 size = w->t->size, width = w->width;
    memset(w->state, 0, width * width * sizeof(float));
    if (!states) return;
    states += (w->sequence * w->t->heads + w->head) * size * size;
    for (i64 i = 0; i < size; i++)
        for (i64 j = 0; j < size; j++)
            w->state[is_turned ? j * width + i : i * width + j] = states[i * size + j];
}

INLINE void put_state(const Work *w, float *states) {
    i64 size = w->t->size;
    if (!states) return;
    states += (w->sequence * w->t->heads + w->head) * size * size;
    for (i64 i = 0; i < size; i++)
        memcpy(states + i * size, w->state + i * w->width, size * sizeof(float));
}

/* out = a b^T where the key is not later than the query, times the decay between them */
INLINE void decayed_products(float *out, Work *w, const float *a, const float *b) {
    transpose(w->turned, b, BLOCK, w->width);
    multiply(out, BLOCK, a, w->width, 1, w->turned, BLOCK, BLOCK, BLOCK, w->width, 0);
    for (int i = 0; i < BLOCK; i++)
        for (int j = 0; j < BLOCK; j++) {
            float product = out[i * BLOCK + j] * w->decay[i * BLOCK + j];
            out[i * BLOCK + j] = j <= i ? product : 0;
        }
}

INLINE void scale_queries(const Work *w, float *x) {
    for (i64 i = 0; i < w->n; i++) scale_row(x + i * w->width, w->power[i + 1], w->width);
}

INLINE void scale_keys(const Work *w, float *x) {
    for (i64 i = 0; i < w->n; i++) scale_row(x + i * w->width, w->power[w->n - 1 - i], w->width);
}

/* out += rows state */
INLINE void add_through_state(Work *w, const float *rows, const float *state) {
    multiply(w->out, w->width, rows, w->width, 1, state, w->width, BLOCK, w->width, w->width, 1);
}

/* state = d^n state + a^T b */
INLINE void update_state(Work *w, const float *a, const float *b) {
    i64 width = w->width;
    scale_row(w->state, w->power[w->n], width * width);
    multiply(w->state, width, a, 1, width, b, width, width, width, BLOCK, 1);
}

INLINE void begin(Work *w, const Lightning *t, i64 task) {
    w->t = t;
    w->sequence = task / t->heads, w->head = task % t->heads;
    w->width = (t->size + LANES - 1) / LANES * LANES;
    w->power = t->powers + w->head * (BLOCK + 1);
    for (i64 i = 0; i < BLOCK; i++)
        for (i64 j = 0; j <= i; j++) w->decay[i * BLOCK + j] = w->power[i - j];
}

INLINE i64 count_blocks(const Work *w) {
    const i64 *start = w->t->starts + w->sequence;
    return (start[1] - start[0] + BLOCK - 1) / BLOCK;
}

INLINE void go_to_block(Work *w, i64 block) {
    const i64 *start = w->t->starts + w->sequence;
    w->first = start[0] + block * BLOCK;
    w->n = least(BLOCK, start[1] - w->first);
}

EACH_CPU void lightning_fwd_one(const Lightning *t, i64 task, Work *w) {
    begin(w, t, task);
    i64 width = w->width;
    get_state(w, t->initial, 0);
    for (i64 block = 0; block < count_blocks(w); block++) {
        go_to_block(w, block);
        get(w->q, w, t->q), get(w->k, w, t->k), get(w->v, w, t->v);
        decayed_products(w->scores, w, w->q, w->k);
        multiply(w->out, width, w->scores, BLOCK, 1, w->v, width, BLOCK, width, BLOCK, 0);
        scale_queries(w, w->q);
        add_through_state(w, w->q, w->state);
        put(w, t->out, w->out);
        scale_keys(w, w->k);
        update_state(w, w->k, w->v);
    }
    put_state(w, t->final);
}

/* forward once more with the transposed state for dq, then back in time for dk and dv */
EACH_CPU void lightning_bwd_one(const Lightning *t, i64 task, Work *w) {
    begin(w, t, task);
    i64 width = w->width;
    get_state(w, t->initial, 1);
    for (i64 block = 0; block < count_blocks(w); block++) {
        go_to_block(w, block);
        get(w->k, w, t->k), get(w->v, w, t->v), get(w->d, w, t->out);
        decayed_products(w->slopes, w, w->d, w->v);
        multiply(w->out, width, w->slopes, BLOCK, 1, w->k, width, BLOCK, width, BLOCK, 0);
        scale_queries(w, w->d);
        add_through_state(w, w->d, w->state);
        put(w, t->to_q, w->out);
        scale_keys(w, w->k);
        update_state(w, w->v, w->k);
    }
    get_state(w, t->to_final, 0);
    for (i64 block = count_blocks(w); block-- > 0;) {
        go_to_block(w, block);
        get(w->q, w, t->q), get(w->k, w, t->k), get(w->v, w, t->v), get(w->d, w, t->out);
        decayed_products(w->scores, w, w->q, w->k);
        decayed_products(w->slopes, w, w->d, w->v);
        multiply(w->out, width, w->scores, 1, BLOCK, w->d, width, BLOCK, width, BLOCK, 0);
        scale_keys(w, w->k);
        add_through_state(w, w->k, w->state);
        put(w, t->to_v, w->out);
        multiply(w->out, width, w->slopes, 1, BLOCK, w->q, width, BLOCK, width, BLOCK, 0);
        scale_keys(w, w->v);
        transpose(w->state_turned, w->state, width, width);
        add_through_state(w, w->v, w->state_turned);
        put(w, t->to_k, w->out);
        scale_queries(w, w->q);
        update_state(w, w->q, w->d);
    }
    put_state(w, t->to_initial);
}

typedef void One(const Lightning *, i64, Work *);

static void run(One *one, const Lightning *t, i64 sequences, int threads) {
#pragma omp parallel num_threads(threads)
    {
        /* a quarter to one MB: too much for some stacks */
        Work *work = malloc(sizeof(Work));
#pragma omp for schedule(dynamic)
        for (i64 task = 0; task < sequences * t->heads; task++) one(t, task, work);
        free(work);
    }
}

void lightning_fwd(const Lightning *t, i64 sequences, int threads) {
    run(lightning_fwd_one, t, sequences, threads);
}

void lightning_bwd(const Lightning *t, i64 sequences, int threads) {
    run(lightning_bwd_one, t, sequences, threads);
}

/* ---- one token of each sequence: state = d state + k^T v in place, out = q state ---- */

typedef struct {
    Rows q, k, v, out;
    float *states;      /* [N, H, D, D], slot_step between slots */
    const float *decay; /* [H] */
    const i64 *index;   /* [S]: the slot of each sequence */
    i64 slot_step, heads, size;
    int is_short;
} Step;

EACH_CPU void lightning_step_one(const Step *t, i64 sequence, i64 head) {
    float q[MAX_WIDTH], k[MAX_WIDTH], v[MAX_WIDTH], out[MAX_WIDTH] = {0};
    i64 size = t->size;
    load(q, t->q.at, sequence * t->q.step + head * t->q.head_step, size, t->is_short);
    load(k, t->k.at, sequence * t->k.step + head * t->k.head_step, size, t->is_short);
    load(v, t->v.at, sequence * t->v.step + head * t->v.head_step, size, t->is_short);
    float *restrict state = t->states + t->index[sequence] * t->slot_step + head * size * size;
    float decay = t->decay[head];
    for (i64 i = 0; i < size; i++, state += size)
        for (i64 j = 0; j < size; j++) {
            state[j] = decay * state[j] + k[i] * v[j];
            out[j] += q[i] * state[j];
        }
    store(t->out.at, sequence * t->out.step + head * t->out.head_step, out, size, t->is_short);
}

void lightning_step(const Step *t, i64 sequences, int threads) {
#pragma omp parallel for num_threads(threads) if (sequences > TILE)
    for (i64 i = 0; i < sequences; i++)
        for (i64 head = 0; head < t->heads; head++) lightning_step_one(t, i, head);
}
