/* Words to lanes and back, in one pass over memory: a tile at a time is predicted, subtracted, transformed and cut. */
#include "words.h"

INLINE uint32_t apart_32(uint32_t x) {
    return (x & 0xFFFF) | (x >> 8 & 0x800000) | (x & 0x7F0000) | (x << 1 & 0xFF000000);
}
INLINE uint32_t together_32(uint32_t y) {
    return (y & 0xFFFF) | (y << 8 & 0x80000000) | (y & 0x7F0000) | (y >> 1 & 0x7F800000);
}
INLINE uint16_t apart_16(uint16_t x) { return (uint16_t)((x >> 8 & 0x80) | (x & 0x7F) | (x << 1 & 0xFF00)); }
INLINE uint16_t together_16(uint16_t y) { return (uint16_t)((y << 8 & 0x8000) | (y & 0x7F) | (y >> 1 & 0x7F80)); }
/* Words of other widths are never floats: module.c refuses such a layout. */
INLINE uint8_t apart_8(uint8_t x) { return x; }
INLINE uint8_t together_8(uint8_t y) { return y; }
INLINE uint64_t apart_64(uint64_t x) { return x; }
INLINE uint64_t together_64(uint64_t y) { return y; }

#define WORD uint8_t
#define ANY any8
#define NAME(x) x##_8
#include "width.h"
#undef WORD
#undef ANY
#undef NAME
#define WORD uint16_t
#define ANY any16
#define NAME(x) x##_16
#include "width.h"
#undef WORD
#undef ANY
#undef NAME
#define WORD uint32_t
#define ANY any32
#define NAME(x) x##_32
#include "width.h"
#undef WORD
#undef ANY
#undef NAME
#define WORD uint64_t
#define ANY any64
#define NAME(x) x##_64
#include "width.h"

#define BY_WIDTH(width, call8, call16, call32, call64) \
    ((width) == 1 ? call8 : (width) == 2 ? call16 : (width) == 4 ? call32 : call64)

static void transform(int width, const uint8_t *new, const uint8_t *predicted, uint8_t *y, size_t count, int kind) {
    BY_WIDTH(width, transform_8(new, predicted, y, count, kind),
             transform_16((const any16 *)new, (const any16 *)predicted, (any16 *)y, count, kind),
             transform_32((const any32 *)new, (const any32 *)predicted, (any32 *)y, count, kind),
             transform_64((const any64 *)new, (const any64 *)predicted, (any64 *)y, count, kind));
}

static void restore(int width, uint8_t *y, const uint8_t *predicted, uint8_t *out, size_t count, int kind) {
    BY_WIDTH(width, restore_8(y, predicted, out, count, kind),
             restore_16((any16 *)y, (const any16 *)predicted, (any16 *)out, count, kind),
             restore_32((any32 *)y, (const any32 *)predicted, (any32 *)out, count, kind),
             restore_64((any64 *)y, (const any64 *)predicted, (any64 *)out, count, kind));
}

static void emit(int width, const uint8_t *y, size_t count, const struct lane *lane, uint8_t *out) {
    const int shift = 8 * lane->start;
    BY_WIDTH(width, emit_8(y, count, shift, 1, out), emit_16((const any16 *)y, count, shift, lane->width, out),
             emit_32((const any32 *)y, count, shift, lane->width, out),
             emit_64((const any64 *)y, count, shift, lane->width, out));
}

static void gather(int width, uint8_t *y, size_t count, const struct lane *lane, const uint8_t *in) {
    const int shift = 8 * lane->start;
    BY_WIDTH(width, gather_8(y, count, shift, 1, in), gather_16((any16 *)y, count, shift, lane->width, in),
             gather_32((any32 *)y, count, shift, lane->width, in),
             gather_64((any64 *)y, count, shift, lane->width, in));
}

static void fill(int width, uint8_t *y, size_t count, uint64_t value) {
    BY_WIDTH(width, fill_8(y, count, value), fill_16((any16 *)y, count, value), fill_32((any32 *)y, count, value),
             fill_64((any64 *)y, count, value));
}

static uint64_t deviation(int width, const uint8_t *y, size_t count, uint64_t background) {
    return BY_WIDTH(width, deviation_8(y, count, background), deviation_16((const any16 *)y, count, background),
                    deviation_32((const any32 *)y, count, background),
                    deviation_64((const any64 *)y, count, background));
}

/* At most TILE bytes: sums of 64 columns fit a byte each. */
CLONES static size_t count_others(const uint8_t *restrict plane, size_t size, uint8_t background) {
    uint8_t columns[64] = {0};
    size_t found = 0, whole = size / 64 * 64;
    for (size_t i = 0; i < whole; i += 64)
        for (size_t k = 0; k < 64; k++) columns[k] = (uint8_t)(columns[k] + (plane[i + k] != background));
    for (size_t k = 0; k < 64; k++) found += columns[k];
    for (size_t i = whole; i < size; i++) found += plane[i] != background;
    return found;
}

/* Bytes that every word has in common. */
static uint64_t constants(const struct layout *layout, const uint8_t *const *sources) {
    uint64_t found = 0;
    for (int n = 0; n < layout->lanes; n++) {
        const struct lane *lane = &layout->lane[n];
        for (int k = 0; k < lane->width; k++) {
            uint64_t byte = lane->background;
            if (sources && sources[n]) byte = lane->mode == CONSTANT ? sources[n][k] : 0;
            found |= byte << 8 * (lane->start + k);
        }
    }
    return found;
}

static const uint8_t *predicted_tile(const struct step *step, const uint8_t *const *bases, size_t at, size_t count,
                                     int width, uint8_t *held) {
    if (step->formula == NOTHING) return NULL;
    if (step->formula == PREDECESSOR) return bases[0] + at * (size_t)width;
    predict_tile(step, bases, at, count, held);
    return held;
}

/* Every base, and the words, are streams of their own, more than the processor follows by itself: the next tile is
 * asked for while this one is worked on. */
static void fetch(const uint8_t *from, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

static void fetch_next(const struct step *step, const uint8_t *const *bases, size_t at, size_t count, size_t width) {
    for (int n = 0; n < step->bases; n++) {
        const size_t bytes = step->formula == PREDECESSOR ? width : step->dtypes[n] == FLOAT32 ? 4 : 2;
        fetch(bases[n] + at * bytes, count * bytes);
    }
}

/* A lane that is nearly always background is written from its first other value on: most blocks have none.
 * ``others`` counts them, of the lanes in the set ``rare``, which are one byte wide. */
void split_tiles(const struct layout *layout, const struct step *step, const uint8_t *new,
                 const uint8_t *const *bases, uint8_t *const *targets, uint32_t rare, size_t count, size_t *others) {
    _Alignas(64) uint8_t y[8 * TILE], held[8 * TILE];
    const int width = layout->width;
    const uint64_t background = constants(layout, NULL);
    for (size_t at = 0; at < count; at += TILE) {
        const size_t n = count - at < TILE ? count - at : TILE;
        const size_t next = at + n, coming = count - next < TILE ? count - next : TILE;
        fetch(new + next * (size_t)width, coming * (size_t)width);
        fetch_next(step, bases, next, coming, (size_t)width);
        const uint8_t *predicted = predicted_tile(step, bases, at, n, width, held);
        transform(width, new + at * (size_t)width, predicted, y, n, layout->transform);
        const uint64_t differ = rare ? deviation(width, y, n, background) : 0;
        for (int k = 0; k < layout->lanes; k++) {
            const struct lane *lane = &layout->lane[k];
            if (!targets[k]) continue;
            uint8_t *to = targets[k] + at * lane->width;
            const bool watched = rare >> k & 1;
            if (watched && !(differ >> 8 * lane->start & 0xFF)) {
                if (others[k]) memset(to, lane->background, n);
                continue;
            }
            if (watched && !others[k]) memset(targets[k], lane->background, at);
            emit(width, y, n, lane, to);
            if (watched) others[k] += count_others(to, n, lane->background);
        }
    }
}

/* ``sources``: the lanes; one that is NULL is all background, and a constant one is its only value. */
void join_tiles(const struct layout *layout, const struct step *step, const uint8_t *const *sources,
                const uint8_t *const *bases, uint8_t *out, size_t count) {
    _Alignas(64) uint8_t y[8 * TILE], held[8 * TILE];
    const int width = layout->width;
    const uint64_t common = constants(layout, sources);
    for (size_t at = 0; at < count; at += TILE) {
        const size_t n = count - at < TILE ? count - at : TILE;
        const size_t next = at + n;
        fetch_next(step, bases, next, count - next < TILE ? count - next : TILE, (size_t)width);
        fill(width, y, n, common);
        for (int k = 0; k < layout->lanes; k++) {
            const struct lane *lane = &layout->lane[k];
            if (sources[k] && lane->mode != CONSTANT) gather(width, y, n, lane, sources[k] + at * lane->width);
        }
        const uint8_t *predicted = predicted_tile(step, bases, at, n, width, held);
        restore(width, y, predicted, out + at * (size_t)width, n, layout->transform);
    }
}

/* How often every value of every byte occurs, 256 counts for each byte of a word. */
void count_bytes(const struct layout *layout, const uint8_t *words, size_t count, uint32_t *counts) {
    _Alignas(64) uint8_t y[8 * TILE];
    const int width = layout->width;
    for (size_t at = 0; at < count; at += TILE) {
        const size_t n = count - at < TILE ? count - at : TILE;
        transform(width, words + at * (size_t)width, NULL, y, n, layout->transform);
        for (size_t i = 0; i < n; i++)
            for (int k = 0; k < width; k++) counts[256 * k + y[i * (size_t)width + (size_t)k]]++;
    }
}
