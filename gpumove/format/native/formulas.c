/* What an optimizer step makes of the state before it: section 5 of docs/codecs.md, and predict.py in C.
 *
 * Every operation is one of binary32, rounded once, in the order written: compiled without contraction and without
 * reassociation. Each formula is a function of one element; ``own`` is known when it is compiled, so the loops have no
 * branches and become vectors. */
#include "words.h"

#include <math.h>

enum { DECAY = 1, GRADIENT, SQUARE, SQUARES, STEP, FIT, BUFFER = 17, DESCENT, NESTEROV, FIT_BUFFER };
enum { EACH = 1, BFLOAT16_GRADIENT = 2 };

bool is_step(const struct step *step) {
    static const uint8_t bases[FIT_BUFFER + 1] = {
        [DECAY] = 1,  [GRADIENT] = 2, [SQUARE] = 3,  [SQUARES] = 3,  [STEP] = 3,
        [FIT] = 5,    [BUFFER] = 1,   [DESCENT] = 2, [NESTEROV] = 3, [FIT_BUFFER] = 3,
    };
    if (step->formula > FIT_BUFFER || !bases[step->formula] || bases[step->formula] != step->bases) return false;
    for (int n = 0; n < step->bases; n++)
        if (step->dtypes[n] > FLOAT16) return false;
    return step->repeats <= MAX_REPEATS && !(step->flags & ~(EACH | BFLOAT16_GRADIENT));
}

/* The product is exact in binary64; the sum is rounded there and then to binary32. */
INLINE float fused(float a, float x, float c) { return (float)((double)a * (double)x + (double)c); }

/* Rounded to the state's own 16-bit type, where every operation is. */
INLINE float own_type(float value, int own) {
    if (own == BFLOAT16) return of_bfloat16(to_bfloat16(value));
    if (own == FLOAT16) return of_float16(to_float16(value));
    return value;
}

CLONES static void load(const uint8_t *restrict bits, int dtype, size_t count, float *restrict out) {
    const any16 *half = (const any16 *)bits;
    if (dtype == FLOAT32)
        memcpy(out, bits, 4 * count);
    else if (dtype == BFLOAT16)
        for (size_t i = 0; i < count; i++) out[i] = of_bfloat16(half[i]);
    else
        for (size_t i = 0; i < count; i++) out[i] = of_float16(half[i]);
}

/* The bits of what was computed; where that is no finite number, the old ones. */
CLONES static void store(const float *restrict values, const uint8_t *restrict old, int dtype, size_t count,
                         uint8_t *restrict out) {
    any16 *half = (any16 *)out;
    const any16 *old_half = (const any16 *)old;
    if (dtype == FLOAT32) {
        any32 *word = (any32 *)out;
        const any32 *old_word = (const any32 *)old;
        for (size_t i = 0; i < count; i++) {
            const uint32_t bits = bits_of(values[i]);
            word[i] = (bits & 0x7F800000) == 0x7F800000 ? old_word[i] : bits;
        }
    } else if (dtype == BFLOAT16) {
        for (size_t i = 0; i < count; i++) {
            const uint16_t bits = to_bfloat16(values[i]);
            half[i] = (bits & 0x7F80) == 0x7F80 ? old_half[i] : bits;
        }
    } else {
        for (size_t i = 0; i < count; i++) {
            const uint16_t bits = to_float16(values[i]);
            half[i] = (bits & 0x7C00) == 0x7C00 ? old_half[i] : bits;
        }
    }
}

typedef const float *restrict Base;
typedef float *restrict Out;
typedef const float *const Scalars;

INLINE void decay(Base m0, Out out, size_t count, Scalars s, int repeats, int own) {
    for (size_t i = 0; i < count; i++) out[i] = repeats ? m0[i] : own_type(m0[i] * s[1], own);
    for (int r = 0; r < repeats; r++)
        for (size_t i = 0; i < count; i++) out[i] = own_type(fused(s[0], -out[i], out[i]), own);
}

INLINE float estimate(float before, float after, float weight) { return (after - before) / weight + before; }

INLINE void square(Base v0, Base m0, Base m1, Out out, size_t count, Scalars s, int own, bool narrow) {
    for (size_t i = 0; i < count; i++) {
        float g = estimate(m0[i], m1[i], s[0]);
        g = narrow ? of_bfloat16(to_bfloat16(g)) : g;
        out[i] = fused(g, g * s[2], own_type(v0[i] * s[1], own));
    }
}

INLINE void squares(Base v0, Base m0, Base m1, Out out, size_t count, Scalars s, int repeats, int own) {
    for (size_t i = 0; i < count; i++) out[i] = repeats ? v0[i] : v0[i] * s[3];
    for (int r = 0; r < repeats; r++)
        for (size_t i = 0; i < count; i++) out[i] = own_type(out[i] * s[2], own);
    for (size_t i = 0; i < count; i++) {
        const float d = (m1[i] - m0[i] * s[0]) / s[1];
        out[i] = out[i] + (d * s[4]) * d;
    }
}

INLINE void adam(Base p0, Base m1, Base v1, Out out, size_t count, Scalars s, int own) {
    for (size_t i = 0; i < count; i++) {
        const float root = own_type(own_type(own_type(sqrtf(v1[i]), own) / s[1], own) + s[2], own);
        out[i] = own_type(p0[i] * s[0], own) + (m1[i] * s[3]) / root;
    }
}

INLINE void buffer(Base b0, Out out, size_t count, Scalars s, int own) {
    for (size_t i = 0; i < count; i++) out[i] = own_type(b0[i] * s[0], own);
}

INLINE void nesterov(Base p0, Base b1, Base b0, Out out, size_t count, Scalars s, int own) {
    for (size_t i = 0; i < count; i++) {
        const float g = (b1[i] - b0[i] * s[1]) / s[2];
        out[i] = fused(s[0], own_type(fused(s[1], b1[i], g), own), p0[i]);
    }
}

/* The formulas in which operations may be rounded to the state's own type. */
INLINE void compute_own(const struct step *step, const float (*b)[TILE], Out out, size_t count, int own) {
    switch (step->formula) {
        case DECAY: decay(b[0], out, count, step->scalars, step->repeats, own); break;
        case SQUARE:
            if (step->flags & BFLOAT16_GRADIENT)
                square(b[0], b[1], b[2], out, count, step->scalars, own, true);
            else
                square(b[0], b[1], b[2], out, count, step->scalars, own, false);
            break;
        case SQUARES: squares(b[0], b[1], b[2], out, count, step->scalars, step->repeats, own); break;
        case STEP: adam(b[0], b[1], b[2], out, count, step->scalars, own); break;
        case BUFFER: buffer(b[0], out, count, step->scalars, own); break;
        case NESTEROV: nesterov(b[0], b[1], b[2], out, count, step->scalars, own); break;
        default: break;
    }
}

INLINE void gradient(Base m0, Base g, Out out, size_t count, Scalars s) {
    for (size_t i = 0; i < count; i++) out[i] = fused(s[0], g[i] - m0[i], m0[i]);
}

INLINE void fit(Base p0, Base m1, Base v1, Base m0, Base v0, Out out, size_t count, Scalars s) {
    for (size_t i = 0; i < count; i++) {
        const float t1 = m1[i] / (sqrtf(v1[i]) + s[3]), t2 = m0[i] / (sqrtf(v0[i]) + s[3]);
        out[i] = ((p0[i] + t1 * s[0]) + t2 * s[1]) + p0[i] * s[2];
    }
}

INLINE void descent(Base p0, Base b1, Out out, size_t count, Scalars s) {
    for (size_t i = 0; i < count; i++) out[i] = fused(s[0], b1[i], p0[i]);
}

INLINE void fit_buffer(Base p0, Base b1, Base b0, Out out, size_t count, Scalars s) {
    for (size_t i = 0; i < count; i++) out[i] = ((p0[i] + b1[i] * s[0]) + b0[i] * s[1]) + p0[i] * s[2];
}

CLONES static void compute(const struct step *step, const float (*b)[TILE], float *restrict out, size_t count) {
    const int own = step->flags & EACH ? step->dtypes[0] : FLOAT32;
    switch (step->formula) {
        case GRADIENT: gradient(b[0], b[1], out, count, step->scalars); break;
        case FIT: fit(b[0], b[1], b[2], b[3], b[4], out, count, step->scalars); break;
        case DESCENT: descent(b[0], b[1], out, count, step->scalars); break;
        case FIT_BUFFER: fit_buffer(b[0], b[1], b[2], out, count, step->scalars); break;
        default:
            if (own == BFLOAT16)
                compute_own(step, b, out, count, BFLOAT16);
            else if (own == FLOAT16)
                compute_own(step, b, out, count, FLOAT16);
            else
                compute_own(step, b, out, count, FLOAT32);
    }
}

/* The bits that are expected of up to TILE elements from ``at`` on. */
void predict_tile(const struct step *step, const uint8_t *const *bases, size_t at, size_t count, uint8_t *out) {
    _Alignas(64) float loaded[MAX_BASES][TILE], values[TILE];
    for (int n = 0; n < step->bases; n++)
        load(bases[n] + at * (step->dtypes[n] == FLOAT32 ? 4u : 2u), step->dtypes[n], count, loaded[n]);
    compute(step, (const float(*)[TILE])loaded, values, count);
    store(values, bases[0] + at * (step->dtypes[0] == FLOAT32 ? 4u : 2u), step->dtypes[0], count, out);
}

/* The gradient, as bfloat16, that took exp_avg from old to new. */
CLONES void gradients(const uint8_t *old, const uint8_t *new, float weight, size_t count, uint8_t *out) {
    const any32 *before = (const any32 *)old, *after = (const any32 *)new;
    any16 *restrict to = (any16 *)out;
    for (size_t i = 0; i < count; i++) to[i] = to_bfloat16(estimate(float_of(before[i]), float_of(after[i]), weight));
}

/* What a 16-bit copy of a float32 original holds. */
CLONES void round_words(int dtype, const uint8_t *restrict wide, size_t count, uint8_t *restrict out) {
    const any32 *from = (const any32 *)wide;
    any16 *to = (any16 *)out;
    if (dtype == BFLOAT16)
        for (size_t i = 0; i < count; i++) to[i] = upper_half(from[i]);
    else
        for (size_t i = 0; i < count; i++) to[i] = to_float16(float_of(from[i]));
}
