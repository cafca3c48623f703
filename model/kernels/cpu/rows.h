/* Numbers of rows, read into fp32 and rounded once when written, and their sums. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* the loader of glibc picks one for the processor that it finds */
#if defined(__x86_64__) && defined(__gnu_linux__) && __GNUC__ >= 12
/* AVX-512 with 16-bit numbers, without which bf16 takes a third longer, and AVX2 with fused products */
#define EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__gnu_linux__)
#define EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EACH_CPU
#endif
#define INLINE static inline __attribute__((always_inline))

/* numbers at once in fp32, and rows that a thread takes at once */
enum { PIECE = 256, ROWS = 64, LANES = 16 };

typedef int64_t i64;

INLINE i64 least(i64 a, i64 b) { return a < b ? a : b; }

/* ---- numbers ---- */

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE void load(float *restrict to, const void *from, i64 at, i64 n, int is_short) {
    if (!is_short) {
        memcpy(to, (const float *)from + at, n * sizeof(float));
        return;
    }
    const uint16_t *restrict half = (const uint16_t *)from + at;
    for (i64 j = 0; j < n; j++) to[j] = float_of((uint32_t)half[j] << 16);
}

/* to the nearest, ties to even; NaN stays NaN */
INLINE void store(void *to, i64 at, const float *restrict from, i64 n, int is_short) {
    if (!is_short) {
        memcpy((float *)to + at, from, n * sizeof(float));
        return;
    }
    uint16_t *restrict half = (uint16_t *)to + at;
    for (i64 j = 0; j < n; j++) {
        uint32_t bits = bits_of(from[j]), even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        half[j] = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : even);
    }
}

INLINE float load_one(const void *from, i64 at, int is_short) {
    float value;
    load(&value, from, at, 1, is_short);
    return value;
}

/* Cephes' polynomial, 2 ulp; NaN stays NaN. Ends at e^80 and e^-80, so that neither this nor its
 * products with small numbers are denormal: those take a hundred times as long */
INLINE float exponential(float x) {
    const float round = 0x1.8p23f;
    x = x > 80.0f ? 80.0f : x;
    x = x < -80.0f ? -80.0f : x;
    float shifted = x * 1.44269504f + round, power = shifted - round;
    float r = x - power * 0.693145752f - power * 1.42860682e-6f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * float_of((bits_of(shifted) << 23) + 0x3f800000u);
}

INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

/* sums of LANES lanes, then of the lanes in order: vectors without reordering by the compiler */
INLINE float dot(const float *restrict a, const float *restrict b, i64 n) {
    float lanes[LANES] = {0};
    i64 j = 0;
    for (; j + LANES <= n; j += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] += a[j + l] * b[j + l];
    for (; j < n; j++) lanes[j % LANES] += a[j] * b[j];
    float total = 0;
    for (int l = 0; l < LANES; l++) total += lanes[l];
    return total;
}

