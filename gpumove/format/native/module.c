/* The native core as a Python module. Buffers come in, are measured, and only then are the loops entered, without the
 * interpreter's lock; every length follows from the number of elements. No state, and no memory but what is returned.
 *
 * gpumove/format/native.py says what the functions take. Their callers have checked stored bytes already and speak of
 * damage; a ValueError here is a mistake of gpumove's own, or the last line of defence. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "words.h"

enum { MAX_VIEWS = 4 + MAX_BASES + MAX_LANES };
enum { SPARSE = 2, QUADS = 3 };
enum { WORTH_UNLOCKING = 1 << 15 };

struct held {
    Py_buffer views[MAX_VIEWS];
    int count;
};

static void let_go(struct held *held) {
    while (held->count) PyBuffer_Release(&held->views[--held->count]);
}

static Py_buffer *hold(struct held *held, PyObject *object, int flags) {
    if (held->count == MAX_VIEWS) {
        PyErr_SetString(PyExc_ValueError, "too many buffers");
        return NULL;
    }
    Py_buffer *view = &held->views[held->count];
    if (PyObject_GetBuffer(object, view, flags) < 0) return NULL;
    held->count++;
    return view;
}

/* The start of a buffer that must have this size. */
static uint8_t *exactly(struct held *held, PyObject *object, size_t size, int flags) {
    Py_buffer *view = hold(held, object, flags);
    if (!view) return NULL;
    if ((size_t)view->len != size) {
        PyErr_Format(PyExc_ValueError, "a buffer of %zd bytes where %zu were expected", view->len, size);
        return NULL;
    }
    static uint8_t nothing;
    return view->buf ? view->buf : &nothing;
}

static bool arguments(Py_ssize_t found, Py_ssize_t wanted) {
    if (found != wanted) PyErr_Format(PyExc_TypeError, "%zd arguments where %zd were expected", found, wanted);
    return found == wanted;
}

static bool number(PyObject *object, size_t at_most, size_t *out) {
    *out = PyLong_AsSize_t(object);
    if (*out == (size_t)-1 && PyErr_Occurred()) return false;
    if (*out > at_most) PyErr_Format(PyExc_ValueError, "%zu where at most %zu is possible", *out, at_most);
    return *out <= at_most;
}

/* Other threads run meanwhile, if it is long enough to be worth it. */
#define UNLOCKED(bytes, statement)                                                             \
    do {                                                                                       \
        PyThreadState *lock = (bytes) >= WORTH_UNLOCKING ? PyEval_SaveThread() : NULL;         \
        statement;                                                                             \
        if (lock) PyEval_RestoreThread(lock);                                                  \
    } while (0)

static bool is_width(size_t width) { return width == 1 || width == 2 || width == 4 || width == 8; }

static bool is_transform(size_t width, size_t transform) {
    return is_width(width) && transform <= CENTRED && (transform != FLOATS || width == 2 || width == 4);
}

/* The header of a stream up to its lanes, which must cover every byte of the word once. */
static bool read_layout(PyObject *object, struct layout *out) {
    struct held held = {.count = 0};
    Py_buffer *view = hold(&held, object, PyBUF_SIMPLE);
    if (!view) return false;
    const uint8_t *bytes = view->buf;
    bool good = view->len >= 4 && bytes[3] >= 1 && bytes[3] <= MAX_LANES && view->len == 4 + 4 * bytes[3] &&
                is_transform(bytes[0], bytes[1]);
    unsigned covered = 0;
    if (good) {
        *out = (struct layout){.width = bytes[0], .transform = bytes[1], .lanes = bytes[3]};
        memcpy(out->lane, bytes + 4, 4 * (size_t)out->lanes);
    }
    for (int n = 0; good && n < out->lanes; n++) {
        const struct lane *lane = &out->lane[n];
        good = is_width(lane->width) && lane->start + lane->width <= out->width && lane->start % lane->width == 0;
        const unsigned bytes_of_lane = good ? ((1u << lane->width) - 1) << lane->start : 0;
        good = good && !(covered & bytes_of_lane);
        covered |= bytes_of_lane;
    }
    good = good && covered == (1u << out->width) - 1;
    if (!good) PyErr_SetString(PyExc_ValueError, "an impossible layout");
    let_go(&held);
    return good;
}

/* No bytes: nothing is subtracted. */
static bool read_step(PyObject *object, int width, struct step *out) {
    _Static_assert(sizeof *out == 32 && offsetof(struct step, scalars) == 12, "native.py packs it so");
    struct held held = {.count = 0};
    Py_buffer *view = hold(&held, object, PyBUF_SIMPLE);
    if (!view) return false;
    *out = (struct step){.formula = NOTHING};
    bool good = view->len == 0 || view->len == sizeof *out;
    if (view->len && good) {
        memcpy(out, view->buf, sizeof *out);
        const int needed = out->dtypes[0] == FLOAT32 ? 4 : 2;
        good = out->formula == PREDECESSOR ? out->bases == 1 : is_step(out) && width == needed;
    }
    if (!good) PyErr_SetString(PyExc_ValueError, "an impossible step");
    let_go(&held);
    return good;
}

static bool read_bases(struct held *held, PyObject *tuple, const struct step *step, int width, size_t count,
                       const uint8_t **out) {
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != step->bases) {
        PyErr_SetString(PyExc_ValueError, "another number of bases");
        return false;
    }
    for (int n = 0; n < step->bases; n++) {
        const int bytes = step->formula == PREDECESSOR ? width : step->dtypes[n] == FLOAT32 ? 4 : 2;
        out[n] = exactly(held, PyTuple_GET_ITEM(tuple, n), count * (size_t)bytes, PyBUF_SIMPLE);
        if (!out[n]) return false;
    }
    return true;
}

/* One buffer per lane, or None. */
static bool read_lanes(struct held *held, PyObject *tuple, const struct layout *layout, size_t count, int flags,
                       uint8_t **out) {
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != layout->lanes) {
        PyErr_SetString(PyExc_ValueError, "another number of lanes");
        return false;
    }
    for (int n = 0; n < layout->lanes; n++) {
        PyObject *item = PyTuple_GET_ITEM(tuple, n);
        const size_t words = layout->lane[n].mode == CONSTANT ? 1 : count;
        out[n] = NULL;
        if (item == Py_None) continue;
        out[n] = exactly(held, item, words * layout->lane[n].width, flags);
        if (!out[n]) return false;
    }
    return true;
}

/* Everything that split and join have in common: (layout, step, words, bases, lanes, ...). */
struct job {
    struct layout layout;
    struct step step;
    uint8_t *words;
    const uint8_t *bases[MAX_BASES];
    uint8_t *lanes[MAX_LANES];
    size_t count;
    struct held held;
};

static bool read_job(PyObject *const *args, bool splits, struct job *out) {
    out->held.count = 0;
    if (!read_layout(args[0], &out->layout)) return false;
    const int width = out->layout.width;
    if (!read_step(args[1], width, &out->step)) return false;
    Py_buffer *view = hold(&out->held, args[2], splits ? PyBUF_SIMPLE : PyBUF_WRITABLE);
    if (!view) return false;
    out->words = view->buf;
    out->count = (size_t)view->len / (size_t)width;
    if (view->len % width) {
        PyErr_SetString(PyExc_ValueError, "words that end in their middle");
        return false;
    }
    return read_bases(&out->held, args[3], &out->step, width, out->count, out->bases) &&
           read_lanes(&out->held, args[4], &out->layout, out->count, splits ? PyBUF_WRITABLE : PyBUF_SIMPLE,
                      out->lanes);
}

static PyObject *split(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    struct job job;
    size_t rare, others[MAX_LANES] = {0};
    PyObject *found = NULL;
    (void)module;
    if (!arguments(count, 6) || !number(args[5], (1u << MAX_LANES) - 1, &rare)) return NULL;
    if (!read_job(args, true, &job)) goto done;
    for (int n = 0; n < job.layout.lanes; n++) {
        const bool constant = job.layout.lane[n].mode == CONSTANT && job.lanes[n];
        if (constant || ((rare >> n & 1) && job.layout.lane[n].width != 1)) {
            PyErr_SetString(PyExc_ValueError, "a lane that cannot be split off so");
            goto done;
        }
    }
    UNLOCKED(job.count * job.layout.width, split_tiles(&job.layout, &job.step, job.words, job.bases, job.lanes,
                                                       (uint32_t)rare, job.count, others));
    found = PyTuple_New(job.layout.lanes);
    for (int n = 0; found && n < job.layout.lanes; n++) {
        PyObject *item = PyLong_FromSize_t(others[n]);
        if (!item)
            Py_CLEAR(found);
        else
            PyTuple_SET_ITEM(found, n, item);
    }
done:
    let_go(&job.held);
    return found;
}

static PyObject *join(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    struct job job;
    PyObject *found = NULL;
    (void)module;
    if (!arguments(count, 5)) return NULL;
    if (read_job(args, false, &job)) {
        UNLOCKED(job.count * job.layout.width, join_tiles(&job.layout, &job.step, (const uint8_t *const *)job.lanes,
                                                          job.bases, job.words, job.count));
        found = Py_NewRef(Py_None);
    }
    let_go(&job.held);
    return found;
}

static PyObject *count(PyObject *module, PyObject *const *args, Py_ssize_t given) {
    struct held held = {.count = 0};
    size_t width, transform;
    PyObject *found = NULL;
    (void)module;
    if (!arguments(given, 3) || !number(args[0], 8, &width) || !number(args[1], CENTRED, &transform)) return NULL;
    Py_buffer *view = hold(&held, args[2], PyBUF_SIMPLE);
    if (!view) return NULL;
    if (!is_transform(width, transform) || (size_t)view->len % width || (size_t)view->len / width > UINT32_MAX) {
        PyErr_SetString(PyExc_ValueError, "words that cannot be counted");
    } else if ((found = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(4 * 256 * width)))) {
        uint32_t *counts = (uint32_t *)(void *)PyBytes_AS_STRING(found);
        const struct layout layout = {.width = (uint8_t)width, .transform = (uint8_t)transform};
        memset(counts, 0, 4 * 256 * width);
        UNLOCKED(view->len, count_bytes(&layout, view->buf, (size_t)view->len / width, counts));
    }
    let_go(&held);
    return found;
}

static PyObject *pack(PyObject *module, PyObject *const *args, Py_ssize_t given) {
    struct held held = {.count = 0};
    size_t kind, background, limit, others = 0;
    (void)module;
    if (!arguments(given, 4) || !number(args[0], QUADS, &kind) || !number(args[2], 0xFF, &background)) return NULL;
    Py_buffer *view = hold(&held, args[1], PyBUF_SIMPLE);
    if (!view) return NULL;
    const size_t size = (size_t)view->len, each = kind == QUADS ? 4 : 8;
    const Py_ssize_t coded = (Py_ssize_t)((size + each - 1) / each);
    PyObject *codes = NULL, *rest = NULL, *found = NULL;
    if (number(args[3], size, &limit) && (codes = PyBytes_FromStringAndSize(NULL, coded)) &&
        (rest = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)limit))) {
        size_t (*packer)(const uint8_t *, size_t, uint8_t, uint8_t *, uint8_t *, size_t) =
            kind == QUADS ? pack_quads : pack_sparse;
        UNLOCKED(size, others = packer(view->buf, size, (uint8_t)background, (uint8_t *)PyBytes_AS_STRING(codes),
                                       (uint8_t *)PyBytes_AS_STRING(rest), limit));
        if (others == SIZE_MAX)
            found = Py_NewRef(Py_None);
        else if (_PyBytes_Resize(&rest, (Py_ssize_t)others) == 0)
            found = PyTuple_Pack(2, codes, rest);
    }
    Py_XDECREF(codes);
    Py_XDECREF(rest);
    let_go(&held);
    return found;
}

/* The codes of so many values, by kind. */
static const uint8_t *read_codes(struct held *held, PyObject *kind, PyObject *codes, size_t size, bool *quads) {
    size_t found;
    if (!number(kind, QUADS, &found)) return NULL;
    *quads = found == QUADS;
    return exactly(held, codes, *quads ? size / 4 + (size % 4 > 0) : size / 8 + (size % 8 > 0), PyBUF_SIMPLE);
}

static PyObject *others(PyObject *module, PyObject *const *args, Py_ssize_t given) {
    struct held held = {.count = 0};
    size_t size, found = 0;
    bool quads;
    (void)module;
    if (!arguments(given, 3) || !number(args[2], PY_SSIZE_T_MAX, &size)) return NULL;
    const uint8_t *codes = read_codes(&held, args[0], args[1], size, &quads);
    if (codes) UNLOCKED(size, found = quads ? count_quads(codes, size) : count_ones(codes, size));
    let_go(&held);
    return codes ? PyLong_FromSize_t(found) : NULL;
}

static PyObject *spread(PyObject *module, PyObject *const *args, Py_ssize_t given) {
    struct held held = {.count = 0};
    size_t background;
    bool quads;
    PyObject *found = NULL;
    (void)module;
    if (!arguments(given, 5) || !number(args[2], 0xFF, &background)) return NULL;
    Py_buffer *out = hold(&held, args[4], PyBUF_WRITABLE);
    const uint8_t *codes = out ? read_codes(&held, args[0], args[1], (size_t)out->len, &quads) : NULL;
    if (codes) {
        const size_t size = (size_t)out->len, count = quads ? count_quads(codes, size) : count_ones(codes, size);
        const uint8_t *rest = exactly(&held, args[3], count, PyBUF_SIMPLE);
        if (rest) {
            void (*spreader)(const uint8_t *, size_t, uint8_t, const uint8_t *, size_t, uint8_t *) =
                quads ? spread_quads : spread_sparse;
            UNLOCKED(size, spreader(codes, size, (uint8_t)background, rest, count, out->buf));
            found = Py_NewRef(Py_None);
        }
    }
    let_go(&held);
    return found;
}

static PyObject *fold(PyObject *module, PyObject *const *args, Py_ssize_t given) {
    struct held held = {.count = 0};
    bool good = false;
    (void)module;
    if (!arguments(given, 2)) return NULL;
    Py_buffer *plane = hold(&held, args[0], PyBUF_SIMPLE);
    uint8_t *out = plane ? exactly(&held, args[1], (size_t)(plane->len - plane->len / 8), PyBUF_WRITABLE) : NULL;
    if (out) UNLOCKED(plane->len, good = fold_plane(plane->buf, (size_t)plane->len, out));
    let_go(&held);
    return out ? PyBool_FromLong(good) : NULL;
}

static PyObject *unfold(PyObject *module, PyObject *const *args, Py_ssize_t given) {
    struct held held = {.count = 0};
    (void)module;
    if (!arguments(given, 2)) return NULL;
    Py_buffer *out = hold(&held, args[1], PyBUF_WRITABLE);
    const uint8_t *folded = out ? exactly(&held, args[0], (size_t)(out->len - out->len / 8), PyBUF_SIMPLE) : NULL;
    if (folded) UNLOCKED(out->len, unfold_plane(folded, (size_t)out->len, out->buf));
    let_go(&held);
    return folded ? Py_NewRef(Py_None) : NULL;
}

static PyObject *estimate(PyObject *module, PyObject *const *args, Py_ssize_t given) {
    struct held held = {.count = 0};
    PyObject *found = NULL;
    (void)module;
    if (!arguments(given, 4)) return NULL;
    const float weight = (float)PyFloat_AsDouble(args[2]);
    if (PyErr_Occurred()) return NULL;
    Py_buffer *out = hold(&held, args[3], PyBUF_WRITABLE);
    const size_t size = out ? (size_t)out->len / 2 : 0;
    const uint8_t *old = out ? exactly(&held, args[0], 4 * size, PyBUF_SIMPLE) : NULL;
    const uint8_t *new = old ? exactly(&held, args[1], 4 * size, PyBUF_SIMPLE) : NULL;
    if (new) {
        UNLOCKED(4 * size, gradients(old, new, weight, size, out->buf));
        found = Py_NewRef(Py_None);
    }
    let_go(&held);
    return found;
}

static PyObject *rounded(PyObject *module, PyObject *const *args, Py_ssize_t given) {
    struct held held = {.count = 0};
    size_t dtype;
    (void)module;
    if (!arguments(given, 3) || !number(args[0], FLOAT16, &dtype)) return NULL;
    Py_buffer *out = hold(&held, args[2], PyBUF_WRITABLE);
    const size_t size = out ? (size_t)out->len / 2 : 0;
    const uint8_t *wide = out ? exactly(&held, args[1], 4 * size, PyBUF_SIMPLE) : NULL;
    if (wide) UNLOCKED(4 * size, round_words((int)dtype, wide, size, out->buf));
    let_go(&held);
    return wide ? Py_NewRef(Py_None) : NULL;
}

static PyMethodDef METHODS[] = {
#define METHOD(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}
    METHOD(split), METHOD(join), METHOD(count), METHOD(pack),     METHOD(others),  METHOD(spread),
    METHOD(fold),  METHOD(unfold), METHOD(estimate), METHOD(rounded), {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT,
    .m_name = "gpumove.format._native",
    .m_doc = "The loops of the codecs; gpumove/format/native.py describes them.",
    .m_methods = METHODS,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&MODULE); }
