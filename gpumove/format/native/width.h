/* The loops over words of one width: a template, included once for each. WORD is the type, ANY the same at any address,
 * and NAME(x) what x is called for this width. */

CLONES static void NAME(transform)(const ANY *restrict new, const ANY *restrict predicted, ANY *restrict y,
                                   size_t count, int transform) {
    const WORD centre = transform == CENTRED ? (WORD)0x8080808080808080u : 0;
    if (predicted)
        for (size_t i = 0; i < count; i++) y[i] = (WORD)(new[i] - predicted[i] + centre);
    else if (transform != FLOATS)
        for (size_t i = 0; i < count; i++) y[i] = (WORD)(new[i] + centre);
    else
        for (size_t i = 0; i < count; i++) y[i] = NAME(apart)(new[i]);
    if (predicted && transform == FLOATS)
        for (size_t i = 0; i < count; i++) y[i] = NAME(apart)(y[i]);
}

/* ``y`` is overwritten. */
CLONES static void NAME(restore)(ANY *restrict y, const ANY *restrict predicted, ANY *restrict out, size_t count,
                                 int transform) {
    const WORD centre = transform == CENTRED ? (WORD)0x8080808080808080u : 0;
    if (predicted && transform == FLOATS)
        for (size_t i = 0; i < count; i++) y[i] = NAME(together)(y[i]);
    if (predicted)
        for (size_t i = 0; i < count; i++) out[i] = (WORD)(y[i] - centre + predicted[i]);
    else if (transform != FLOATS)
        for (size_t i = 0; i < count; i++) out[i] = (WORD)(y[i] - centre);
    else
        for (size_t i = 0; i < count; i++) out[i] = NAME(together)(y[i]);
}

CLONES static void NAME(emit)(const ANY *restrict y, size_t count, int shift, int width, uint8_t *restrict out) {
    if (width == 1) {
        for (size_t i = 0; i < count; i++) out[i] = (uint8_t)(y[i] >> shift);
    } else if (width == 2) {
        any16 *to = (any16 *)out;
        for (size_t i = 0; i < count; i++) to[i] = (uint16_t)(y[i] >> shift);
    } else if (width == 4) {
        any32 *to = (any32 *)out;
        for (size_t i = 0; i < count; i++) to[i] = (uint32_t)(y[i] >> shift);
    } else {
        memcpy(out, y, count * 8);
    }
}

CLONES static void NAME(gather)(ANY *restrict y, size_t count, int shift, int width, const uint8_t *restrict in) {
    if (width == 1) {
        for (size_t i = 0; i < count; i++) y[i] |= (WORD)((WORD)in[i] << shift);
    } else if (width == 2) {
        const any16 *from = (const any16 *)in;
        for (size_t i = 0; i < count; i++) y[i] |= (WORD)((WORD)from[i] << shift);
    } else if (width == 4) {
        const any32 *from = (const any32 *)in;
        for (size_t i = 0; i < count; i++) y[i] |= (WORD)((WORD)from[i] << shift);
    } else {
        memcpy(y, in, count * 8);
    }
}

CLONES static void NAME(fill)(ANY *restrict y, size_t count, uint64_t value) {
    for (size_t i = 0; i < count; i++) y[i] = (WORD)value;
}

/* The bits in which any word differs from the background. */
CLONES static uint64_t NAME(deviation)(const ANY *restrict y, size_t count, uint64_t background) {
    WORD found = 0;
    for (size_t i = 0; i < count; i++) found |= (WORD)(y[i] ^ (WORD)background);
    return found;
}
