/* One block of one lane, packed: values that are nearly always the background, and values of seven bits. */
#include "words.h"

/* Values per pass: there are fewer streams than for words. */
enum { STRETCH = 4096 };
static const uint64_t ONES = 0x0101010101010101u, PAIRS = 0x5555555555555555u;

INLINE uint64_t load_64(const uint8_t *from) { return *(const any64 *)from; }

/* The next so many bytes, at most 8, and zeros. */
INLINE uint64_t load_part(const uint8_t *from, size_t size) {
    uint64_t found = 0;
    memcpy(&found, from, size < 8 ? size : 8);
    return found;
}

/* 0 the background, 1 and 2 one less and one more, 3 all others; four of them in a byte. */
CLONES static void codes_of(const uint8_t *restrict plane, size_t size, uint8_t background, uint8_t *restrict codes) {
    for (size_t i = 0; i < size; i++) {
        const uint8_t far = (uint8_t)(plane[i] - background), folded = (uint8_t)(far << 1 ^ (far & 0x80 ? 0xFF : 0));
        codes[i] = folded < 3 ? folded : 3;
    }
}

CLONES static void pack_codes(const uint8_t *restrict codes, size_t quads, uint8_t *restrict out) {
    const any32 *from = (const any32 *)codes;
    for (size_t i = 0; i < quads; i++) out[i] = (uint8_t)(from[i] | from[i] >> 6 | from[i] >> 12 | from[i] >> 18);
}

/* How many other values there are; SIZE_MAX if more than ``limit``, and then ``quads`` is rubbish. */
size_t pack_quads(const uint8_t *plane, size_t size, uint8_t background, uint8_t *quads, uint8_t *others,
                  size_t limit) {
    _Alignas(64) uint8_t codes[STRETCH];
    size_t found = 0;
    for (size_t at = 0; at < size; at += STRETCH) {
        const size_t n = size - at < STRETCH ? size - at : STRETCH, padded = (n + 7) / 8 * 8;
        codes_of(plane + at, n, background, codes);
        memset(codes + n, 0, padded - n);
        pack_codes(codes, (n + 3) / 4, quads + at / 4);
        for (size_t i = 0; i < padded; i += 8) {
            const uint64_t group = load_64(codes + i);
            for (uint64_t left = group & group >> 1 & ONES; left; left &= left - 1) {
                if (found == limit) return SIZE_MAX;
                others[found++] = plane[at + i + (size_t)__builtin_ctzll(left) / 8];
            }
        }
    }
    return found;
}

/* The codes 3 of a group of up to 32, one bit each at every second place. */
INLINE uint64_t others_of(uint64_t group, size_t codes) {
    const uint64_t found = group & group >> 1 & PAIRS;
    return codes < 32 ? found & ((1ull << 2 * codes) - 1) : found;
}

CLONES size_t count_quads(const uint8_t *quads, size_t size) {
    size_t found = 0, at = 0;
    for (; at + 32 <= size; at += 32) found += (size_t)__builtin_popcountll(others_of(load_64(quads + at / 4), 32));
    if (at < size)
        found += (size_t)__builtin_popcountll(others_of(load_part(quads + at / 4, (size - at + 3) / 4), size - at));
    return found;
}

/* ``count``: how many others there are. They were counted before, but not by the same look at the codes. */
void spread_quads(const uint8_t *quads, size_t size, uint8_t background, const uint8_t *others, size_t count,
                  uint8_t *out) {
    const uint8_t *end = others + count;
    static const uint8_t steps[4] = {0, 0xFF, 1, 0};
    uint32_t four[256];
    for (unsigned n = 0; n < 256; n++) {
        four[n] = 0;
        for (unsigned k = 0; k < 4; k++) four[n] |= (uint32_t)(uint8_t)(background + steps[n >> 2 * k & 3]) << 8 * k;
    }
    size_t at = 0;
    for (; at + 32 <= size; at += 32) {
        for (size_t i = 0; i < 8; i++) *(any32 *)(out + at + 4 * i) = four[quads[at / 4 + i]];
        for (uint64_t left = others_of(load_64(quads + at / 4), 32); left && others < end; left &= left - 1)
            out[at + (size_t)__builtin_ctzll(left) / 2] = *others++;
    }
    for (; at < size; at++) {
        const unsigned code = quads[at / 4] >> 2 * (at % 4) & 3;
        out[at] = code == 3 && others < end ? *others++ : (uint8_t)(background + steps[code]);
    }
}

/* A bit for every byte, and those that are not the background. How many; SIZE_MAX if more than ``limit``. */
size_t pack_sparse(const uint8_t *plane, size_t size, uint8_t background, uint8_t *bitmap, uint8_t *others,
                   size_t limit) {
    uint8_t last[8] = {0};
    size_t found = 0;
    for (size_t at = 0; at < size; at += 8) {
        const size_t n = size - at < 8 ? size - at : 8;
        const uint64_t low = 0x7F * ONES, far = load_part(plane + at, n) ^ background * ONES;
        const uint64_t differ = (((far & low) + low) | far) >> 7 & ONES;
        uint64_t bits = differ * 0x0102040810204080u >> 56;  /* the lowest bits of eight bytes, side by side */
        bits &= (1u << n) - 1;
        bitmap[at / 8] = (uint8_t)bits;
        if (!bits) continue;
        if (limit - found < 8) {  /* too little room to write first and count then */
            for (; bits; bits &= bits - 1) {
                if (found == limit) return SIZE_MAX;
                others[found++] = plane[at + (size_t)__builtin_ctzll(bits)];
            }
            continue;
        }
        const uint8_t *from = n == 8 ? plane + at : last;  /* eight to read, whatever there is */
        if (n < 8) memcpy(last, plane + at, n);
        for (size_t i = 0; i < 8; i++) {  /* without a branch: which bytes differ cannot be guessed */
            others[found] = from[i];
            found += bits >> i & 1;
        }
    }
    return found;
}

INLINE uint64_t ones_of(const uint8_t *bitmap, size_t at, size_t size) {
    const size_t n = size - at;
    return n < 64 ? load_part(bitmap + at / 8, (n + 7) / 8) & ((1ull << n) - 1) : load_64(bitmap + at / 8);
}

CLONES size_t count_ones(const uint8_t *bitmap, size_t size) {
    size_t found = 0;
    for (size_t at = 0; at < size; at += 64) found += (size_t)__builtin_popcountll(ones_of(bitmap, at, size));
    return found;
}

void spread_sparse(const uint8_t *bitmap, size_t size, uint8_t background, const uint8_t *others, size_t count,
                   uint8_t *out) {
    const uint8_t *end = others + count;
    memset(out, background, size);
    for (size_t at = 0; at < size; at += 64)
        for (uint64_t left = ones_of(bitmap, at, size); left && others < end; left &= left - 1)
            out[at + (size_t)__builtin_ctzll(left)] = *others++;
}

/* False, and rubbish in ``out``, if a top bit is set. */
CLONES bool fold_plane(const uint8_t *restrict plane, size_t size, uint8_t *restrict out) {
    const size_t part = size / 8, kept = size - part;
    const uint8_t *last = plane + kept;
    uint8_t seen = 0;
    for (size_t i = 0; i < size; i++) seen |= plane[i];
    memcpy(out, plane, kept);
    for (size_t n = 0; n < 7; n++)
        for (size_t k = 0; k < part; k++) out[n * part + k] |= (uint8_t)(last[k] << (7 - n) & 0x80);
    return seen < 0x80;
}

CLONES void unfold_plane(const uint8_t *restrict folded, size_t size, uint8_t *restrict out) {
    const size_t part = size / 8, kept = size - part;
    uint8_t *last = out + kept;
    for (size_t i = 0; i < kept; i++) out[i] = folded[i] & 0x7F;
    memset(last, 0, part);
    for (size_t n = 0; n < 7; n++)
        for (size_t k = 0; k < part; k++) last[k] |= (uint8_t)(folded[n * part + k] >> 7 << n);
}
