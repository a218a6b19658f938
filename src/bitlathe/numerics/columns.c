/* The loops over columns of numerics/columns.py, for CPUs. Arrays are float32, [columns, rows], rows next to each other.

   A tile of rows is held near to the processor while all of its columns are solved; rows know nothing of each other. The
   function is compiled for several widths of vectors where gcc can (with glibc on x86-64), of which the widest that there is runs;
   the numbers are the same whichever it is. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h> /* also says whether this is glibc */

#define TILE 32     /* rows */
#define COLUMNS 128 /* at most */
#define LEAST 1e-30f /* as in columns.py */

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)
#define WIDEST __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDEST
#endif

#ifdef __GNUC__
#define ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define ALWAYS_INLINE inline
#endif

/* Added and taken off again, it rounds to an integer below 2^22, ties to even. */
static const float ROUNDING = 12582912.0f;

typedef struct {
    float low, high;         /* its ends */
    float normal, mantissa;  /* of a float grid: its smallest normal number, 0 for integers; 2^-(bits of its mantissa) */
} Grid;

typedef struct {
    Py_ssize_t columns, rows, reach_stride;
    float *left;         /* what columns are to come near to by now, or what pulls at them */
    float *found;        /* where they land; where they are before, when descending */
    float *errors;       /* what is fed on; none when descending */
    const float *reach;  /* [columns, columns]: how far one column's error reaches into those after it */
    const float *scale, *taken;
    Grid grid;
} Work;

/* v becomes the number of the grid that is nearest to it. */
static ALWAYS_INLINE void nearest(float *v, const float *scale, const float *taken, Grid grid) {
    for (int r = 0; r < TILE; r++) {
        float x = (taken ? v[r] + taken[r] : v[r]) / scale[r];
        x = x < grid.low ? grid.low : x;
        x = x > grid.high ? grid.high : x;
        float step = 1.0f;
        if (grid.normal > 0.0f) {
            uint32_t bits;
            memcpy(&bits, &x, 4);
            bits &= 0x7F800000u;
            memcpy(&step, &bits, 4);
            step = (step < grid.normal ? grid.normal : step) * grid.mantissa;
            x /= step;
        }
        uint32_t whole, sign;
        float rounded = (x + ROUNDING) - ROUNDING;
        memcpy(&whole, &rounded, 4), memcpy(&sign, &x, 4);
        whole |= sign & 0x80000000u; /* a zero keeps its sign */
        memcpy(&x, &whole, 4);
        v[r] = (x * step) * scale[r] - (taken ? taken[r] : 0.0f);
    }
}

static ALWAYS_INLINE void solve_tile(const Work *w, Py_ssize_t first, Py_ssize_t rows) {
    float left[COLUMNS][TILE], v[TILE], error[TILE], scale[TILE], taken[TILE];
    for (int r = 0; r < TILE; r++) scale[r] = 1.0f, taken[r] = 0.0f, v[r] = 0.0f;
    for (Py_ssize_t j = 0; j < w->columns; j++) {
        for (int r = 0; r < TILE; r++) left[j][r] = 0.0f;
        memcpy(left[j], w->left + j * w->rows + first, rows * sizeof(float));
    }
    for (Py_ssize_t j = 0; j < w->columns; j++) {
        const Py_ssize_t at = j * w->rows + first;
        const float *reach = w->reach + j * w->reach_stride;
        const float pivot = reach[j] > LEAST ? reach[j] : LEAST;
        memcpy(scale, w->scale + at, rows * sizeof(float));
        if (w->taken) memcpy(taken, w->taken + at, rows * sizeof(float));
        if (w->errors) {
            memcpy(v, left[j], sizeof v);
            nearest(v, scale, w->taken ? taken : NULL, w->grid);
            for (int r = 0; r < TILE; r++) error[r] = (left[j][r] - v[r]) / pivot;
            memcpy(w->errors + at, error, rows * sizeof(float));
        } else {
            float now[TILE] = {0};
            memcpy(now, w->found + at, rows * sizeof(float));
            const float inverse = 1.0f / pivot;
            for (int r = 0; r < TILE; r++) v[r] = now[r] + left[j][r] * inverse;
            nearest(v, scale, w->taken ? taken : NULL, w->grid);
            for (int r = 0; r < TILE; r++) error[r] = v[r] - now[r];
        }
        memcpy(w->found + at, v, rows * sizeof(float));
        for (Py_ssize_t k = j + 1; k < w->columns; k++)
            for (int r = 0; r < TILE; r++) left[k][r] -= reach[k] * error[r];
    }
}

WIDEST static void solve(const Work *w, Py_ssize_t start, Py_ssize_t end) {
    for (Py_ssize_t first = start; first < end; first += TILE)
        solve_tile(w, first, end - first < TILE ? end - first : TILE);
}

/* solve((columns, rows, stride of reach), (first row, end), (left, found, errors, reach, scale, taken), (low, high, normal,
   mantissa)): addresses, 0 for what is not there; without errors columns descend; normal is 0 for an integer grid. */
static PyObject *solve_columns(PyObject *self, PyObject *args) {
    Work w;
    Py_ssize_t start, end;
    unsigned long long left, found, errors, reach, scale, taken;
    if (!PyArg_ParseTuple(args, "(nnn)(nn)(KKKKKK)(ffff)", &w.columns, &w.rows, &w.reach_stride, &start, &end, &left, &found,
                          &errors, &reach, &scale, &taken, &w.grid.low, &w.grid.high, &w.grid.normal, &w.grid.mantissa))
        return NULL;
    if (w.columns > COLUMNS) return PyErr_Format(PyExc_ValueError, "%zd columns; at most %d", w.columns, COLUMNS);
    w.left = (float *)(uintptr_t)left;
    w.found = (float *)(uintptr_t)found;
    w.errors = (float *)(uintptr_t)errors;
    w.reach = (const float *)(uintptr_t)reach;
    w.scale = (const float *)(uintptr_t)scale;
    w.taken = (const float *)(uintptr_t)taken;
    Py_BEGIN_ALLOW_THREADS;
    solve(&w, start, end);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {{"solve", solve_columns, METH_VARARGS, NULL}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_columns", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__columns(void) { return PyModule_Create(&module); }
