/* Types, sizes and single-value arithmetic that all parts of the native core share. docs/codecs.md is the
 * specification; gpumove/format/kernels.py and predict.py are the same in numpy, and what is stored must not depend on
 * which one ran. */
#ifndef GPUMOVE_WORDS_H
#define GPUMOVE_WORDS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "little-endian only: elsewhere gpumove runs on numpy"
#endif
#if defined(__FAST_MATH__) || (defined(__FLT_EVAL_METHOD__) && __FLT_EVAL_METHOD__ != 0)
#error "predictions need plain IEEE 754 arithmetic, one rounding per operation"
#endif

/* One build for all x86-64 machines: the loader picks the widest vectors that this one has. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

/* Buffers come as they are: at odd addresses, and as bytes. */
typedef uint8_t any8;
typedef uint16_t any16 __attribute__((aligned(1), may_alias));
typedef uint32_t any32 __attribute__((aligned(1), may_alias));
typedef uint64_t any64 __attribute__((aligned(1), may_alias));

/* Elements per pass: everything that a tile needs stays in the first-level cache, so passes over it cost little. Of
 * those tried, 256 was the fastest; predictions by tiles of 1024 were 1.2 to 1.4 times slower. */
enum { TILE = 256 };
enum { MAX_LANES = 8, MAX_BASES = 5, MAX_SCALARS = 5, MAX_REPEATS = 32 };
enum { PLAIN, FLOATS, CENTRED };
enum { CONSTANT, RAW, SEVEN, CODED };
enum { FLOAT32, BFLOAT16, FLOAT16 };

struct lane {
    uint8_t start, width, mode, background;
};

/* What a stored stream's header says of its words. */
struct layout {
    uint8_t width, transform, lanes;
    struct lane lane[MAX_LANES];
};

/* What is subtracted from the words before they are stored. */
struct step {
    uint8_t formula, flags, repeats, bases;
    uint8_t dtypes[MAX_BASES];
    float scalars[MAX_SCALARS];
};
enum { NOTHING = 0, PREDECESSOR = 255 };

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Rounded to nearest, ties to even, as integers: whatever they may mean. */
INLINE uint16_t upper_half(uint32_t bits) { return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16); }

INLINE bool is_nan(uint32_t bits) { return (bits & 0x7FFFFFFF) > 0x7F800000; }

/* In 16 bits there is one NaN: machines differ in theirs. */
INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits = bits_of(value);
    return is_nan(bits) ? 0x7FFF : upper_half(bits);
}

INLINE float of_bfloat16(uint16_t half) { return float_of((uint32_t)half << 16); }

INLINE uint16_t to_float16(float value) {
    uint32_t bits = bits_of(value), size = bits & 0x7FFFFFFF;
    /* Results that are normal: a new bias for the exponent, and the 13 lowest bits rounded off. */
    uint32_t normal = (size - (112u << 23) + 0xFFF + ((size >> 13) & 1)) >> 13;
    /* Denormal ones: adding 0.5 leaves their last place the last place of the sum, so the sum rounds as it should. */
    uint32_t small = bits_of(float_of(size) + 0.5f) - bits_of(0.5f);
    uint32_t half = size < (113u << 23) ? small : normal;
    half = size >= (143u << 23) ? 0x7C00 : half;
    half |= (bits >> 16) & 0x8000;
    return (uint16_t)(is_nan(bits) ? 0x7FFF : half);
}

INLINE float of_float16(uint16_t half) {
    /* The exponent in its new place is too small by 112; a product with a power of two is exact, denormals included. */
    float value = float_of((uint32_t)(half & 0x7FFF) << 13) * float_of((127u + 112u) << 23);
    uint32_t bits = bits_of(value) | ((half & 0x7C00) == 0x7C00 ? 0x7F800000 : 0);
    return float_of(bits | (uint32_t)(half & 0x8000) << 16);
}

/* lanes.c */
void split_tiles(const struct layout *layout, const struct step *step, const uint8_t *new,
                 const uint8_t *const *bases, uint8_t *const *targets, uint32_t rare, size_t count, size_t *others);
void join_tiles(const struct layout *layout, const struct step *step, const uint8_t *const *sources,
                const uint8_t *const *bases, uint8_t *out, size_t count);
void count_bytes(const struct layout *layout, const uint8_t *words, size_t count, uint32_t *counts);

/* formulas.c */
bool is_step(const struct step *step);
void predict_tile(const struct step *step, const uint8_t *const *bases, size_t at, size_t count, uint8_t *out);
void gradients(const uint8_t *old, const uint8_t *new, float weight, size_t count, uint8_t *out);
void round_words(int dtype, const uint8_t *wide, size_t count, uint8_t *out);

/* planes.c */
size_t pack_quads(const uint8_t *plane, size_t size, uint8_t background, uint8_t *quads, uint8_t *others,
                  size_t limit);
size_t count_quads(const uint8_t *quads, size_t size);
void spread_quads(const uint8_t *quads, size_t size, uint8_t background, const uint8_t *others, size_t count,
                  uint8_t *out);
size_t pack_sparse(const uint8_t *plane, size_t size, uint8_t background, uint8_t *bitmap, uint8_t *others,
                   size_t limit);
size_t count_ones(const uint8_t *bitmap, size_t size);
void spread_sparse(const uint8_t *bitmap, size_t size, uint8_t background, const uint8_t *others, size_t count,
                   uint8_t *out);
bool fold_plane(const uint8_t *plane, size_t size, uint8_t *out);
void unfold_plane(const uint8_t *folded, size_t size, uint8_t *out);

#endif
