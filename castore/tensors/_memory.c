/* Copies of many pieces of memory in one call, by several threads, past the caches: staging.py.
 *
 *     start(pieces, helpers) -> copying      begins to copy in so many threads, if any, and returns. pieces: a tuple of (target,
 *                                            address): a writable buffer of bytes, and where as many bytes lie, which the
 *                                            caller keeps alive until
 *     finish(copying, parallel, threads)     which takes part, and returns when all is there; called by one thread. Unless
 *                                            `parallel` is 0, it is the address of GOMP_parallel of an OpenMP library,
 *                                            whose team of so many threads takes part too
 *
 * What is copied is larger than any cache, and is not read again at once. Stores that go around the caches ("non-temporal")
 * spare the processor reading every line of the target before it is overwritten, a third of the traffic: they take half the
 * time of memcpy, which uses them only for single pieces of several megabytes.
 *
 * Where the system gives no threads, `finish` does it all; in a forked child too. Where `copying` is dropped without it, what has
 * been begun is waited for, and the rest is left out.
 *
 * A team that has just computed waits in a loop for more to do, for some milliseconds: threads of our own would share the
 * processors with that loop, and get their turn when the copy is nearly over. So where the program has a team, it copies.
 *
 * Other processors than x86-64 copy with memcpy.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define HELPERS_MAX 64
#define LINE 64
#define LINES_AHEAD 16
/* Pieces below this are copied through the caches: the start and the end of going around them cost more than they spare. */
#define AROUND_BYTES_MIN (16 << 10)

struct piece {
    uint8_t *target;
    const uint8_t *source;
    Py_ssize_t length;
};

struct work {
    const struct piece *pieces;
    Py_ssize_t count;
    /* The piece that the next thread takes; beyond `count` there is none left. */
    Py_ssize_t next;
};

static void copy_piece(uint8_t *to, const uint8_t *from, Py_ssize_t left)
{
#if defined(__SSE2__)
    if (left >= AROUND_BYTES_MIN) {
        Py_ssize_t head = (Py_ssize_t)(-(uintptr_t)to % LINE);
        memcpy(to, from, head);
        to += head, from += head, left -= head;
        for (; left >= LINE; to += LINE, from += LINE, left -= LINE) {
            _mm_prefetch((const char *)((uintptr_t)from + LINES_AHEAD * LINE), _MM_HINT_NTA);
            __m128i words[4];
            memcpy(words, from, LINE);
            for (int i = 0; i < 4; i++) _mm_stream_si128((__m128i *)to + i, words[i]);
        }
        _mm_sfence();
    }
#endif
    memcpy(to, from, left);
}

static void *copy_pieces(void *argument)
{
    struct work *work = argument;
    Py_ssize_t at;
    while ((at = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED)) < work->count)
        copy_piece(work->pieces[at].target, work->pieces[at].source, work->pieces[at].length);
    return NULL;
}

/* The interface that gcc compiles `#pragma omp parallel` to; other OpenMP libraries have it too. */
typedef void parallel_function(void (*body)(void *), void *argument, unsigned threads, unsigned flags);

static void copy_in_team(void *work)
{
    copy_pieces(work);
}

#define NAME "castore.tensors._memory.copying"

/* A copy under way. */
struct copying {
    struct work work;
    Py_ssize_t held;
    Py_buffer *views;
    struct piece *pieces;
    int started;
    pid_t pid;
    pthread_t helpers[HELPERS_MAX];
};

/* Takes part until all is copied, or only waits for what has been begun. A forked child has none of its parent's threads. */
static void wait_for(struct copying *copying, int take_part, parallel_function *parallel, unsigned threads)
{
    if (copying->pid != getpid()) copying->started = 0, copying->work.next = 0, parallel = NULL;
    if (take_part && parallel) parallel(copy_in_team, &copying->work, threads, 0);
    else if (take_part) copy_pieces(&copying->work);
    else __atomic_store_n(&copying->work.next, copying->work.count, __ATOMIC_RELAXED);
    while (copying->started > 0) pthread_join(copying->helpers[--copying->started], NULL);
}

static void let_go(struct copying *copying)
{
    while (copying->held > 0) PyBuffer_Release(&copying->views[--copying->held]);
    PyMem_Free(copying->views);
    PyMem_Free(copying->pieces);
    PyMem_Free(copying);
}

static void capsule_ends(PyObject *capsule)
{
    struct copying *copying = PyCapsule_GetPointer(capsule, NAME);
    if (PyCapsule_GetContext(capsule) == NULL) {
        wait_for(copying, 0, NULL, 0); /* the caller has given up: the sources may be gone already */
        let_go(copying);
    }
}

static PyObject *memory_start(PyObject *module, PyObject *args)
{
    PyObject *tuple, *capsule;
    int helpers;
    (void)module;
    if (!PyArg_ParseTuple(args, "O!i", &PyTuple_Type, &tuple, &helpers)) return NULL;
    if (helpers < 0 || helpers > HELPERS_MAX)
        return PyErr_Format(PyExc_ValueError, "expected 0 to %d helpers, found %d", HELPERS_MAX, helpers);
    Py_ssize_t count = PyTuple_Size(tuple);
    struct copying *copying = PyMem_Calloc(1, sizeof *copying);
    if (copying == NULL) return PyErr_NoMemory();
    copying->views = PyMem_Calloc(count + 1, sizeof *copying->views);
    copying->pieces = PyMem_Calloc(count + 1, sizeof *copying->pieces);
    if (copying->views == NULL || copying->pieces == NULL) {
        let_go(copying);
        return PyErr_NoMemory();
    }
    for (; copying->held < count; copying->held++) {
        PyObject *target;
        unsigned long long address;
        Py_buffer *view = &copying->views[copying->held];
        PyObject *piece = PyTuple_GetItem(tuple, copying->held);
        if (!PyTuple_Check(piece)) PyErr_SetString(PyExc_TypeError, "a piece is a tuple of target and address");
        if (!PyTuple_Check(piece) || !PyArg_ParseTuple(piece, "OK", &target, &address) ||
            PyObject_GetBuffer(target, view, PyBUF_WRITABLE) < 0) {
            let_go(copying);
            return NULL;
        }
        copying->pieces[copying->held] = (struct piece){view->buf, (const uint8_t *)(uintptr_t)address, view->len};
    }
    capsule = PyCapsule_New(copying, NAME, capsule_ends);
    if (capsule == NULL) {
        let_go(copying);
        return NULL;
    }
    copying->work = (struct work){copying->pieces, count, 0};
    copying->pid = getpid();
    while (copying->started < helpers &&
           pthread_create(&copying->helpers[copying->started], NULL, copy_pieces, &copying->work) == 0)
        copying->started++;
    return capsule;
}

static PyObject *memory_finish(PyObject *module, PyObject *args)
{
    PyObject *capsule;
    unsigned long long parallel;
    int threads;
    struct copying *copying;
    (void)module;
    if (!PyArg_ParseTuple(args, "OKi", &capsule, &parallel, &threads)) return NULL;
    if (parallel && threads < 1) return PyErr_Format(PyExc_ValueError, "expected a team of 1 or more, found %d", threads);
    copying = PyCapsule_GetPointer(capsule, NAME);
    if (copying == NULL) return NULL;
    if (PyCapsule_GetContext(capsule) == NULL) {
        /* The caller keeps the capsule; what it names is gone from here on. */
        if (PyCapsule_SetContext(capsule, capsule) < 0) return NULL;
        Py_BEGIN_ALLOW_THREADS
        wait_for(copying, 1, (parallel_function *)(uintptr_t)parallel, (unsigned)threads);
        Py_END_ALLOW_THREADS
        let_go(copying);
    }
    Py_INCREF(Py_None);
    return Py_None;
}

static PyMethodDef methods[] = {
    {"start", memory_start, METH_VARARGS, "start(pieces, helpers): begin to copy them in threads; give the result to finish"},
    {"finish", memory_finish, METH_VARARGS, "finish(copying, parallel, threads): take part, and return when all is copied"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_memory", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__memory(void)
{
    return PyModule_Create(&definition);
}
