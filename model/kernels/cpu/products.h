/* Products of small blocks in fp32, and blocks of rows read and written.
 *
 * Rows are cut off at size and held with `width` columns, a multiple of LANES, zero behind.
 */

#include "rows.h"

enum { BLOCK = 32, MAX_WIDTH = 256, TILE = 8 };

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float four __attribute__((vector_size(16), aligned(4), may_alias));

/* `each` vectors of TILE rows of c = a b; a constant once inlined, so that sums stay in registers */
INLINE void multiply_tile(float *c, i64 c_row, const float *a, i64 a_row, i64 a_column,
                          const float *b, i64 b_row, i64 k, int adds, const int each) {
    lanes sum[TILE][2] = {0};
    for (i64 l = 0; l < k; l++) {
        lanes y[2];
        for (int e = 0; e < each; e++) y[e] = *(const lanes *)(b + l * b_row + e * LANES);
        for (int r = 0; r < TILE; r++)
            for (int e = 0; e < each; e++) sum[r][e] += a[r * a_row + l * a_column] * y[e];
    }
    /* c is added last: a sum over many blocks is one of their sums, and rounds as often */
    for (int r = 0; r < TILE; r++)
        for (int e = 0; e < each; e++) {
            lanes *to = (lanes *)(c + r * c_row + e * LANES);
            if (adds) sum[r][e] += *to;
            *to = sum[r][e];
        }
}

/* c = a b, or c += a b: [m, k], [k, n]; m a multiple of TILE, n of LANES, a of any strides */
INLINE void multiply(float *c, i64 c_row, const float *a, i64 a_row, i64 a_column, const float *b,
                     i64 b_row, i64 m, i64 n, i64 k, int adds) {
    for (i64 i = 0; i < m; i += TILE) {
        i64 j = 0;
        for (; j + 2 * LANES <= n; j += 2 * LANES)
            multiply_tile(c + i * c_row + j, c_row, a + i * a_row, a_row, a_column, b + j, b_row, k,
                          adds, 2);
        if (j < n)
            multiply_tile(c + i * c_row + j, c_row, a + i * a_row, a_row, a_column, b + j, b_row, k,
                          adds, 1);
    }
}

INLINE void scale_row(float *restrict x, float by, i64 n) {
    for (i64 i = 0; i < n; i++) x[i] *= by;
}

/* four by four at once; both are multiples of four */
INLINE void transpose(float *restrict to, const float *restrict from, i64 rows, i64 columns) {
    for (i64 i = 0; i < rows; i += 4)
        for (i64 j = 0; j < columns; j += 4) {
            const float *x = from + i * columns + j;
            four a = *(const four *)x, b = *(const four *)(x + columns);
            four c = *(const four *)(x + 2 * columns), d = *(const four *)(x + 3 * columns);
            four ac = {a[0], c[0], a[1], c[1]}, ac_high = {a[2], c[2], a[3], c[3]};
            four bd = {b[0], d[0], b[1], d[1]}, bd_high = {b[2], d[2], b[3], d[3]};
            float *y = to + j * rows + i;
            *(four *)y = (four){ac[0], bd[0], ac[1], bd[1]};
            *(four *)(y + rows) = (four){ac[2], bd[2], ac[3], bd[3]};
            *(four *)(y + 2 * rows) = (four){ac_high[0], bd_high[0], ac_high[1], bd_high[1]};
            *(four *)(y + 3 * rows) = (four){ac_high[2], bd_high[2], ac_high[3], bd_high[3]};
        }
}

/* numbers of one tensor [T, H, D], its steps between tokens and heads */
typedef struct {
    void *at;
    i64 step, head_step;
} Rows;

/* n rows of one head into a block of BLOCK, zero behind them, and back */
INLINE void get_block(float *restrict to, Rows rows, i64 first, i64 n, i64 head, i64 size, i64 width,
                      int is_short) {
    if (n == BLOCK && size == width && rows.step == size) {
        load(to, rows.at, first * rows.step + head * rows.head_step, BLOCK * size, is_short);
        return;
    }
    memset(to, 0, BLOCK * width * sizeof(float));
    for (i64 i = 0; i < n; i++)
        load(to + i * width, rows.at, (first + i) * rows.step + head * rows.head_step, size, is_short);
}

INLINE void put_block(Rows rows, i64 first, i64 n, i64 head, const float *restrict from, i64 size,
                      i64 width, int is_short) {
    for (i64 i = 0; i < n; i++)
        store(rows.at, (first + i) * rows.step + head * rows.head_step, from + i * width, size,
              is_short);
}
