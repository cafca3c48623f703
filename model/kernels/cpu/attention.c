/* Softmax attention of packed sequences, causal, in blocks of BLOCK queries by BLOCK keys.
 *
 * Scores are held turned, [key, query]: what softmax needs of a query's keys is then a sum over
 * rows, with the queries side by side in a vector. With s = scale q k^T (../attention/op.py):
 *
 *     p = exp(s - lse)    out = p v    dv = p^T d    ds = p (d v^T - sum_d (d out))
 *     dq = scale ds k     dk = scale ds^T q
 *
 * All products and sums are fp32. Forward, a sequence and query head is one thread's; backward, a
 * sequence and key head with all its query heads, in order: no bit depends on others.
 */

#include "products.h"

/* the score of a key that is not seen; no score is as low */
static const float HIDDEN = -1e30f;

typedef struct {
    Rows q, k, v, out, grad, to_q, to_k, to_v; /* grad: of out; it and to_q.. in the backward */
    float *lse;                                /* [H, T] by its steps */
    i64 lse_step, lse_head_step;
    const i64 *starts; /* [S + 1] */
    i64 heads, key_heads, size, window;
    float scale;
    int is_short;
} Attention;

/* what one thread works on: keys and values of a sequence, and a block of its queries */
typedef struct {
    const Attention *t;
    i64 start, length, head, key_head, width;
    i64 first, n;                               /* of the block of queries, in the sequence */
    float *keys, *values, *to_keys, *to_values; /* [length rounded up to BLOCK, width] */
    float q[BLOCK * MAX_WIDTH], d[BLOCK * MAX_WIDTH], out[BLOCK * MAX_WIDTH];
    float q_turned[BLOCK * MAX_WIDTH], d_turned[BLOCK * MAX_WIDTH];
    float scores[BLOCK * BLOCK], slopes[BLOCK * BLOCK];
    float most[BLOCK], total[BLOCK], lse[BLOCK], along[BLOCK];
} Work;

INLINE void get(float *to, const Work *w, Rows rows, i64 first, i64 head) {
    i64 n = least(BLOCK, w->length - first);
    get_block(to, rows, w->start + first, n, head, w->t->size, w->width, w->t->is_short);
}

INLINE void put(const Work *w, Rows rows, const float *from, i64 first, i64 head) {
    i64 n = least(BLOCK, w->length - first);
    put_block(rows, w->start + first, n, head, from, w->t->size, w->width, w->t->is_short);
}

INLINE void begin(Work *w, const Attention *t, i64 sequence, i64 key_head) {
    w->t = t;
    w->start = t->starts[sequence], w->length = t->starts[sequence + 1] - w->start;
    w->width = (t->size + LANES - 1) / LANES * LANES;
    w->key_head = key_head;
    for (i64 first = 0; first < w->length; first += BLOCK) {
        get(w->keys + first * w->width, w, t->k, first, key_head);
        get(w->values + first * w->width, w, t->v, first, key_head);
    }
}

INLINE void go_to_queries(Work *w, i64 first, i64 head) {
    w->first = first, w->head = head, w->n = least(BLOCK, w->length - first);
    get(w->q, w, w->t->q, first, head);
    scale_row(w->q, w->t->scale, BLOCK * w->width);
    transpose(w->q_turned, w->q, BLOCK, w->width);
    memset(w->out, 0, BLOCK * w->width * sizeof(float));
}

/* the first block of keys that the block of queries sees */
INLINE i64 first_key(const Work *w) {
    i64 before = w->first - w->t->window + 1;
    return before <= 0 ? 0 : before / BLOCK * BLOCK;
}

/* how many rows of a block are worked on: the last block of a sequence may hold few */
INLINE i64 count(i64 n) { return least((n + TILE - 1) / TILE * TILE, BLOCK); }

/* [key, query], HIDDEN behind the query and before its window */
INLINE void get_scores(Work *w, i64 first) {
    float *restrict s = w->scores;
    i64 keys = count(w->length - first);
    multiply(s, BLOCK, w->keys + first * w->width, w->width, 1, w->q_turned, BLOCK, keys, BLOCK,
             w->width, 0);
    if (first < w->first && w->first + BLOCK - first <= w->t->window) return;
    for (int j = 0; j < keys; j++) {
        int key = (int)(first - w->first) + j;
        int end = (int)least(w->t->window + key, BLOCK);
        for (int i = 0; i < BLOCK; i++) {
            float score = s[j * BLOCK + i];
            s[j * BLOCK + i] = (i >= key) & (i < end) ? score : HIDDEN;
        }
    }
}

INLINE void attend(Work *w, i64 first) {
    get_scores(w, first);
    i64 keys = count(w->length - first);
    float *restrict s = w->scores, *restrict most = w->most, *restrict total = w->total;
    float before[BLOCK];
    memcpy(before, most, sizeof before);
    for (int j = 0; j < keys; j++)
        for (int i = 0; i < BLOCK; i++)
            most[i] = s[j * BLOCK + i] > most[i] ? s[j * BLOCK + i] : most[i];
    for (int i = 0; i < BLOCK; i++) {
        before[i] = exponential(before[i] - most[i]);
        total[i] *= before[i];
    }
    for (int j = 0; j < keys; j++)
        for (int i = 0; i < BLOCK; i++) {
            float p = exponential(s[j * BLOCK + i] - most[i]);
            s[j * BLOCK + i] = p = s[j * BLOCK + i] <= HIDDEN ? 0.0f : p;
            total[i] += p;
        }
    for (i64 i = 0; i < BLOCK; i++) scale_row(w->out + i * w->width, before[i], w->width);
    multiply(w->out, w->width, s, 1, BLOCK, w->values + first * w->width, w->width, count(w->n),
             w->width, keys, 1);
}

EACH_CPU void attention_fwd_one(const Attention *t, i64 task, Work *w) {
    i64 head = task % t->heads;
    begin(w, t, task / t->heads, head / (t->heads / t->key_heads));
    for (i64 first = 0; first < w->length; first += BLOCK) {
        go_to_queries(w, first, head);
        for (i64 i = 0; i < BLOCK; i++) w->most[i] = HIDDEN, w->total[i] = 0;
        for (i64 key = first_key(w); key <= first; key += BLOCK) attend(w, key);
        float *lse = t->lse + head * t->lse_head_step + (w->start + first) * t->lse_step;
        for (i64 i = 0; i < w->n; i++) {
            scale_row(w->out + i * w->width, 1.0f / w->total[i], w->width);
            lse[i * t->lse_step] = w->most[i] + logf(w->total[i]);
        }
        put(w, t->out, w->out, first, head);
    }
}

/* of the block of queries: gradient of out, sum_d (d out), lse. Behind the last query all are 0 */
INLINE void get_grads(Work *w) {
    const Attention *t = w->t;
    get(w->out, w, t->out, w->first, w->head);
    get(w->d, w, t->grad, w->first, w->head);
    transpose(w->d_turned, w->d, BLOCK, w->width);
    const float *lse = t->lse + w->head * t->lse_head_step + (w->start + w->first) * t->lse_step;
    for (i64 i = 0; i < BLOCK; i++) {
        w->along[i] = dot(w->d + i * w->width, w->out + i * w->width, w->width);
        w->lse[i] = i < w->n ? lse[i * t->lse_step] : 0.0f;
    }
    memset(w->out, 0, BLOCK * w->width * sizeof(float));
}

/* adds what a block of keys gives to dq, in out, and what it gets */
INLINE void attend_back(Work *w, i64 first) {
    i64 width = w->width, at = first * width;
    float *restrict s = w->scores, *restrict slopes = w->slopes;
    const float *restrict lse = w->lse, *restrict along = w->along;
    i64 keys = count(w->length - first), queries = count(w->n);
    get_scores(w, first);
    multiply(slopes, BLOCK, w->values + at, width, 1, w->d_turned, BLOCK, keys, BLOCK, width, 0);
    for (int j = 0; j < keys; j++)
        for (int i = 0; i < BLOCK; i++) {
            float p = exponential(s[j * BLOCK + i] - lse[i]);
            s[j * BLOCK + i] = p = s[j * BLOCK + i] <= HIDDEN ? 0.0f : p;
            slopes[j * BLOCK + i] = p * (slopes[j * BLOCK + i] - along[i]);
        }
    multiply(w->to_values + at, width, s, BLOCK, 1, w->d, width, keys, width, queries, 1);
    multiply(w->to_keys + at, width, slopes, BLOCK, 1, w->q, width, keys, width, queries, 1);
    multiply(w->out, width, slopes, 1, BLOCK, w->keys + at, width, queries, width, keys, 1);
}

EACH_CPU void attention_bwd_one(const Attention *t, i64 task, Work *w) {
    i64 group = t->heads / t->key_heads, key_head = task % t->key_heads;
    begin(w, t, task / t->key_heads, key_head);
    i64 rows = (w->length + BLOCK - 1) / BLOCK * BLOCK;
    memset(w->to_keys, 0, rows * w->width * sizeof(float));
    memset(w->to_values, 0, rows * w->width * sizeof(float));
    for (i64 head = key_head * group; head < (key_head + 1) * group; head++)
        for (i64 first = 0; first < w->length; first += BLOCK) {
            go_to_queries(w, first, head);
            get_grads(w);
            for (i64 key = first_key(w); key <= first; key += BLOCK) attend_back(w, key);
            scale_row(w->out, t->scale, BLOCK * w->width);
            put(w, t->to_q, w->out, first, head);
        }
    for (i64 first = 0; first < w->length; first += BLOCK) {
        put(w, t->to_k, w->to_keys + first * w->width, first, key_head);
        put(w, t->to_v, w->to_values + first * w->width, first, key_head);
    }
}

typedef void One(const Attention *, i64, Work *);

static i64 longest(const Attention *t, i64 sequences) {
    i64 most = 0;
    for (i64 i = 0; i < sequences; i++) {
        i64 length = t->starts[i + 1] - t->starts[i];
        most = length > most ? length : most;
    }
    return most;
}

/* tables: how many rooms of the longest sequence's rows a thread needs */
static void run(One *one, const Attention *t, i64 sequences, i64 tasks, i64 tables, int threads) {
    i64 room = (longest(t, sequences) + BLOCK) * (t->size + LANES);
#pragma omp parallel num_threads(threads)
    {
        Work *work = malloc(sizeof(Work) + tables * room * sizeof(float));
        float *rows = (float *)(work + 1);
        work->keys = rows, work->values = rows + room;
        work->to_keys = rows + 2 * room, work->to_values = rows + 3 * room;
#pragma omp for schedule(dynamic)
        for (i64 task = 0; task < tasks; task++) one(t, task, work);
        free(work);
    }
}

void attention_fwd(const Attention *t, i64 sequences, int threads) {
    run(attention_fwd_one, t, sequences, sequences * t->heads, 2, threads);
}

void attention_bwd(const Attention *t, i64 sequences, int threads) {
    run(attention_bwd_one, t, sequences, sequences * t->key_heads, 4, threads);
}

/* ---- one query a sequence, which sees all keys from its start to the next one's ---- */

EACH_CPU void attention_one_head(const Attention *t, i64 sequence, i64 head, float *restrict p) {
    float q[MAX_WIDTH], row[MAX_WIDTH], out[MAX_WIDTH] = {0}, most = HIDDEN, total = 0;
    i64 size = t->size, first = t->starts[sequence], n = t->starts[sequence + 1] - first;
    i64 key_head = head / (t->heads / t->key_heads);
    load(q, t->q.at, sequence * t->q.step + head * t->q.head_step, size, t->is_short);
    for (i64 j = 0; j < n; j++) {
        load(row, t->k.at, (first + j) * t->k.step + key_head * t->k.head_step, size, t->is_short);
        p[j] = t->scale * dot(q, row, size);
        most = p[j] > most ? p[j] : most;
    }
    for (i64 j = 0; j < n; j++) p[j] = exponential(p[j] - most);
    for (i64 j = 0; j < n; j++) {
        load(row, t->v.at, (first + j) * t->v.step + key_head * t->v.head_step, size, t->is_short);
        total += p[j];
        for (i64 l = 0; l < size; l++) out[l] += p[j] * row[l];
    }
    scale_row(out, 1.0f / total, size);
    store(t->out.at, sequence * t->out.step + head * t->out.head_step, out, size, t->is_short);
}

void attention_one(const Attention *t, i64 sequences, int threads) {
#pragma omp parallel num_threads(threads) if (sequences > TILE)
    {
        float *p = malloc((longest(t, sequences) + 1) * sizeof(float));
#pragma omp for schedule(dynamic)
        for (i64 i = 0; i < sequences; i++)
            for (i64 head = 0; head < t->heads; head++) attention_one_head(t, i, head, p);
        free(p);
    }
}
