/* Elements <-> byte planes, with or without a delta base, in one pass over memory.
 *
 * The same functions exist in numpy (transform.py), which is used where no compiler was at hand; a test compares the two bit for
 * bit. A pass in C runs at the speed of memory, numpy needs one pass for each step.
 *
 *     split(raw, base or None, planes, kept or None, width, mode, alpha, counts or None) -> number of elements kept
 *     merge(planes, kept or None, base or None, out, width, mode, alpha, ordered)
 *
 *     sample(raw, base or None, width, mode, alpha, windows, window_bytes, grouped, segment_items, table)
 *         -> (information, distinct, kept, zeros, segments)  what entropy coding can make of the planes: entropy.py
 *
 *     ratio(raw, base, windows, window_bytes, items_max) -> (median, usable)
 *                                                          of new to old float32, and of how many: entropy.py
 *
 *     derive(master, out, rule)                            float32 rounded to 16 bits, by the rules of rounding.py
 *
 * `split` changes each element by the mode and writes plane k (0 is the least significant byte of the changed elements) to
 * planes[k * items] and on. Elements are unsigned integers that wrap around:
 *
 *     mode  0  as they are
 *           1  rotated left by one bit
 *           2  zigzag(element - base)
 *           3  element ^ base
 *           4  zigzag(element - prediction), width 4 only; the prediction is the float32 product alpha * base, rounded to
 *              nearest even, where the exponent field of base is in 8..246, and the base itself elsewhere. With
 *              0.5 <= alpha <= 2 neither factor nor product is then subnormal or infinite, so that no flush-to-zero
 *              setting and no processor's NaN can change it.
 *
 * zigzag(d) = (d << 1) ^ (d >> (bits - 1)), the shift to the right being arithmetic: small differences of either sign get
 * small codes. Modes 2 to 4 need a base. Where `kept` is given, groups of 32 elements that are all zero after the change
 * are left out; bit i of `kept` (least significant bit of a byte first) tells that group i was kept. `merge` takes a tuple
 * of `width` planes and undoes all of it.
 *
 * Ordered planes (width 2, 4 and 8, with a base) hold the kept elements sorted by class, those of one class in their own
 * order: the class of an element is the top byte of its base rotated left by one bit, of a float its exponent or most of
 * it. `split` makes them where it is given `counts`, to which it writes how many elements each of the 256 classes has (uint32).
 *
 * All buffers are contiguous bytes; lengths are checked here, once, before the GIL is released. Little-endian machines only:
 * elsewhere the build stops and numpy is used.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the kernel is written for little-endian machines"
#endif

/* gcc and clang on x86-64 compile each loop twice and pick at load time: a wheel runs on any processor. */
#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__) && !defined(__clang__)
#define FAST __attribute__((target_clones("avx2", "default"), optimize("O3")))
#else
#define FAST
#endif

#define ZIGZAG(U, S, d) ((U)(((U)(d) << 1) ^ (U)((S)(d) >> (8 * sizeof(U) - 1))))
#define UNZIGZAG(U, z) ((U)(((U)(z) >> 1) ^ (U)(0 - (U)((z) & 1))))
#define ROTATE_LEFT(U, x) ((U)(((U)(x) << 1) | ((U)(x) >> (8 * sizeof(U) - 1))))
#define ROTATE_RIGHT(U, x) ((U)(((U)(x) >> 1) | ((U)(x) << (8 * sizeof(U) - 1))))

#ifndef __GNUC__
#error "the kernel reads elements that are not aligned in the way of gcc and clang"
#endif

/* Elements are handled in blocks that stay in the first-level cache. Buffers need not be aligned: types any_... */
#define BLOCK 1024

enum mode { PLAIN, ROTATE, DIFFERENCE, XOR, SCALED };

#define DEFINE_WIDTH(W, U, S)                                                                                          \
    typedef U any_##U __attribute__((aligned(1), may_alias));                                                          \
    FAST static void transform_##W(const uint8_t *raw, const uint8_t *base, U *block, Py_ssize_t count, int mode)      \
    {                                                                                                                  \
        const any_##U *from = (const any_##U *)raw, *other = (const any_##U *)base;                                    \
        if (mode == PLAIN) {                                                                                           \
            memcpy(block, raw, count * sizeof(U));                                                                     \
        } else if (mode == ROTATE) {                                                                                   \
            for (Py_ssize_t i = 0; i < count; i++) block[i] = ROTATE_LEFT(U, from[i]);                                 \
        } else if (mode == XOR) {                                                                                      \
            for (Py_ssize_t i = 0; i < count; i++) block[i] = from[i] ^ other[i];                                      \
        } else {                                                                                                       \
            for (Py_ssize_t i = 0; i < count; i++) {                                                                   \
                U d = (U)(from[i] - other[i]);                                                                         \
                block[i] = ZIGZAG(U, S, d);                                                                            \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    FAST static void untransform_##W(const U *block, const uint8_t *base, uint8_t *out, Py_ssize_t count, int mode)    \
    {                                                                                                                  \
        const any_##U *other = (const any_##U *)base;                                                                  \
        any_##U *to = (any_##U *)out;                                                                                  \
        if (mode == PLAIN) {                                                                                           \
            memcpy(out, block, count * sizeof(U));                                                                     \
        } else if (mode == ROTATE) {                                                                                   \
            for (Py_ssize_t i = 0; i < count; i++) to[i] = ROTATE_RIGHT(U, block[i]);                                  \
        } else if (mode == XOR) {                                                                                      \
            for (Py_ssize_t i = 0; i < count; i++) to[i] = block[i] ^ other[i];                                        \
        } else {                                                                                                       \
            for (Py_ssize_t i = 0; i < count; i++) to[i] = (U)(UNZIGZAG(U, block[i]) + other[i]);                      \
        }                                                                                                              \
    }

DEFINE_WIDTH(1, uint8_t, int8_t)
DEFINE_WIDTH(2, uint16_t, int16_t)
DEFINE_WIDTH(4, uint32_t, int32_t)
DEFINE_WIDTH(8, uint64_t, int64_t)

FAST static void scale(const uint8_t *base, uint32_t *scaled, Py_ssize_t count, float alpha)
{
    const any_uint32_t *bits = (const any_uint32_t *)base;
    for (Py_ssize_t i = 0; i < count; i++) {
        uint32_t old = bits[i], exponent = old >> 23 & 255, product_bits;
        /* A safe factor keeps the multiplication free of subnormals even where its result is not used. */
        uint32_t safe = exponent - 8 <= 238 ? old : 0x3f800000u;
        float product;
        memcpy(&product, &safe, 4);
        product *= alpha;
        memcpy(&product_bits, &product, 4);
        scaled[i] = exponent - 8 <= 238 ? product_bits : old;
    }
}

/* What the elements are compared with: the base itself, or in mode SCALED its product in `scaled` (BLOCK elements). */
static const uint8_t *predict(const uint8_t *base, uint32_t *scaled, Py_ssize_t count, int mode, float alpha)
{
    if (mode != SCALED) return base;
    scale(base, scaled, count, alpha);
    return (const uint8_t *)scaled;
}

FAST static void scatter_2(const uint16_t *block, uint8_t *p0, uint8_t *p1, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++) p0[i] = (uint8_t)block[i];
    for (Py_ssize_t i = 0; i < count; i++) p1[i] = (uint8_t)(block[i] >> 8);
}

FAST static void gather_2(const uint8_t *p0, const uint8_t *p1, uint16_t *block, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++) block[i] = (uint16_t)(p0[i] | (uint16_t)p1[i] << 8);
}

FAST static void scatter_4(const uint32_t *block, uint8_t *p0, uint8_t *p1, uint8_t *p2, uint8_t *p3, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++) p0[i] = (uint8_t)block[i];
    for (Py_ssize_t i = 0; i < count; i++) p1[i] = (uint8_t)(block[i] >> 8);
    for (Py_ssize_t i = 0; i < count; i++) p2[i] = (uint8_t)(block[i] >> 16);
    for (Py_ssize_t i = 0; i < count; i++) p3[i] = (uint8_t)(block[i] >> 24);
}

FAST static void gather_4(const uint8_t *p0, const uint8_t *p1, const uint8_t *p2, const uint8_t *p3, uint32_t *block,
                          Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++)
        block[i] = p0[i] | (uint32_t)p1[i] << 8 | (uint32_t)p2[i] << 16 | (uint32_t)p3[i] << 24;
}

FAST static void scatter_8(const uint64_t *block, uint8_t *planes, Py_ssize_t items, Py_ssize_t start, Py_ssize_t count)
{
    for (int k = 0; k < 8; k++) {
        uint8_t *plane = planes + k * items + start;
        for (Py_ssize_t i = 0; i < count; i++) plane[i] = (uint8_t)(block[i] >> (8 * k));
    }
}

FAST static void gather_8(const uint8_t *const *planes, Py_ssize_t start, uint64_t *block, Py_ssize_t count)
{
    memset(block, 0, count * sizeof(uint64_t));
    for (int k = 0; k < 8; k++) {
        const uint8_t *plane = planes[k] + start;
        for (Py_ssize_t i = 0; i < count; i++) block[i] |= (uint64_t)plane[i] << (8 * k);
    }
}

/* Groups of zeros: rows that no token has touched, elements that did not change. */
#define GROUP 32
#define GROUPS_OF(items) (((items) + GROUP - 1) / GROUP)

#define DEFINE_GROUPS(W, U)                                                                                            \
    /* Move the groups that are not all zero together; returns how many elements are left. first is a group number. */ \
    FAST static Py_ssize_t compact_##W(U *block, Py_ssize_t count, uint8_t *kept, Py_ssize_t first)                    \
    {                                                                                                                  \
        Py_ssize_t left = 0;                                                                                           \
        for (Py_ssize_t at = 0; at < count; at += GROUP, first++) {                                                    \
            Py_ssize_t length = count - at < GROUP ? count - at : GROUP;                                               \
            U any = 0;                                                                                                 \
            for (Py_ssize_t i = 0; i < length; i++) any |= block[at + i];                                              \
            if (!any) continue;                                                                                        \
            kept[first / 8] |= (uint8_t)(1u << (first % 8));                                                           \
            if (left != at) memmove(block + left, block + at, length * sizeof(U));                                     \
            left += length;                                                                                            \
        }                                                                                                              \
        return left;                                                                                                   \
    }                                                                                                                  \
    /* The inverse: spread the kept groups over `count` elements, from the end so that nothing is overwritten. */      \
    FAST static void expand_##W(U *block, Py_ssize_t left, Py_ssize_t count, const uint8_t *kept, Py_ssize_t first)    \
    {                                                                                                                  \
        for (Py_ssize_t group = GROUPS_OF(count) - 1; group >= 0; group--) {                                           \
            Py_ssize_t at = group * GROUP;                                                                             \
            Py_ssize_t length = count - at < GROUP ? count - at : GROUP;                                               \
            if (kept[(first + group) / 8] >> ((first + group) % 8) & 1) {                                              \
                left -= length;                                                                                        \
                if (left != at) memmove(block + at, block + left, length * sizeof(U));                                 \
            } else {                                                                                                   \
                memset(block + at, 0, length * sizeof(U));                                                             \
            }                                                                                                          \
        }                                                                                                              \
    }

DEFINE_GROUPS(1, uint8_t)
DEFINE_GROUPS(2, uint16_t)
DEFINE_GROUPS(4, uint32_t)
DEFINE_GROUPS(8, uint64_t)

/* How many of the elements start..start+count lie in kept groups; start is a multiple of GROUP. */
static Py_ssize_t count_kept(const uint8_t *kept, Py_ssize_t start, Py_ssize_t count)
{
    Py_ssize_t left = 0;
    for (Py_ssize_t at = 0; at < count; at += GROUP) {
        Py_ssize_t group = (start + at) / GROUP;
        if (kept[group / 8] >> (group % 8) & 1) left += count - at < GROUP ? count - at : GROUP;
    }
    return left;
}

#define SPLIT_BLOCK(W, U, SCATTER)                                                                                     \
    {                                                                                                                  \
        U block[BLOCK];                                                                                                \
        uint32_t scaled[BLOCK];                                                                                        \
        transform_##W(raw + start * W, predict(from, scaled, count, mode, alpha), block, count, mode);                 \
        if (kept) count = compact_##W(block, count, kept, start / GROUP);                                              \
        SCATTER;                                                                                                       \
    }

static Py_ssize_t split_all(const uint8_t *raw, const uint8_t *base, uint8_t *planes, uint8_t *kept, Py_ssize_t items,
                            int width, int mode, float alpha)
{
    Py_ssize_t done = 0;
    if (kept) memset(kept, 0, (GROUPS_OF(items) + 7) / 8);
    for (Py_ssize_t start = 0; start < items; start += BLOCK) {
        Py_ssize_t count = items - start < BLOCK ? items - start : BLOCK;
        const uint8_t *from = base ? base + start * width : NULL;
        uint8_t *p = planes + done;
        if (width == 1) SPLIT_BLOCK(1, uint8_t, memcpy(p, block, count))
        else if (width == 2) SPLIT_BLOCK(2, uint16_t, scatter_2(block, p, p + items, count))
        else if (width == 4) SPLIT_BLOCK(4, uint32_t, scatter_4(block, p, p + items, p + 2 * items, p + 3 * items, count))
        else SPLIT_BLOCK(8, uint64_t, scatter_8(block, planes, items, done, count))
        done += count;
    }
    return done;
}

#define MERGE_BLOCK(W, U, GATHER)                                                                                      \
    {                                                                                                                  \
        U block[BLOCK];                                                                                                \
        uint32_t scaled[BLOCK];                                                                                        \
        GATHER;                                                                                                        \
        if (kept) expand_##W(block, left, count, kept, start / GROUP);                                                 \
        untransform_##W(block, predict(from, scaled, count, mode, alpha), to, count, mode);                            \
    }

static void merge_all(const uint8_t *const *planes, const uint8_t *kept, const uint8_t *base, uint8_t *out,
                      Py_ssize_t items, int width, int mode, float alpha)
{
    Py_ssize_t done = 0;
    for (Py_ssize_t start = 0; start < items; start += BLOCK) {
        Py_ssize_t count = items - start < BLOCK ? items - start : BLOCK;
        Py_ssize_t left = kept ? count_kept(kept, start, count) : count;
        const uint8_t *from = base ? base + start * width : NULL;
        uint8_t *to = out + start * width;
        if (width == 1) MERGE_BLOCK(1, uint8_t, memcpy(block, planes[0] + done, left))
        else if (width == 2) MERGE_BLOCK(2, uint16_t, gather_2(planes[0] + done, planes[1] + done, block, left))
        else if (width == 4)
            MERGE_BLOCK(4, uint32_t,
                        gather_4(planes[0] + done, planes[1] + done, planes[2] + done, planes[3] + done, block, left))
        else MERGE_BLOCK(8, uint64_t, gather_8(planes, done, block, left))
        done += left;
    }
}

/* ---- ordered by the exponents of the base: see the head of this file ---- */

#define CLASSES 256

#define DEFINE_CLASSES(W, U)                                                                                           \
    FAST static void classes_##W(const uint8_t *base, uint8_t *classes, Py_ssize_t count)                              \
    {                                                                                                                  \
        const any_##U *from = (const any_##U *)base;                                                                   \
        for (Py_ssize_t i = 0; i < count; i++) classes[i] = (uint8_t)(from[i] >> (8 * W - 9));                         \
    }

DEFINE_CLASSES(2, uint16_t)
DEFINE_CLASSES(4, uint32_t)
DEFINE_CLASSES(8, uint64_t)

static int is_kept(const uint8_t *kept, Py_ssize_t item)
{
    return kept == NULL || (kept[item / GROUP / 8] >> (item / GROUP % 8) & 1);
}

/* The class of each kept element. Counts and places are then taken from `classes` alone, so that they agree whatever happens
 * to the base meanwhile. */
static void classify(const uint8_t *base, const uint8_t *kept, Py_ssize_t items, int width, uint8_t *classes)
{
    for (Py_ssize_t start = 0, end; start < items; start = end) {
        for (end = start; end < items && is_kept(kept, end);) end = kept && items - end > GROUP ? end + GROUP : items;
        if (width == 2) classes_2(base + start * 2, classes, end - start);
        else if (width == 4) classes_4(base + start * 4, classes, end - start);
        else classes_8(base + start * 8, classes, end - start);
        classes += end - start;
        while (end < items && !is_kept(kept, end)) end += GROUP;
    }
}

/* Counters and places that were just written are slow to read, and neighbours are of one class more often than not: so the
 * elements are dealt with in stretches, one of each in turn, and each stretch has its own. What is left over belongs to the
 * last. */
#define STRETCHES 4

struct places {
    uint32_t counts[STRETCHES][CLASSES], next[STRETCHES][CLASSES];
};

static void find_places(const uint8_t *classes, Py_ssize_t count, struct places *places)
{
    Py_ssize_t length = count / STRETCHES;
    uint32_t place = 0;
    memset(places->counts, 0, sizeof places->counts);
    for (Py_ssize_t i = 0; i < length; i++)
        for (int k = 0; k < STRETCHES; k++) places->counts[k][classes[k * length + i]]++;
    for (Py_ssize_t i = STRETCHES * length; i < count; i++) places->counts[STRETCHES - 1][classes[i]]++;
    for (int class = 0; class < CLASSES; class++)
        for (int k = 0; k < STRETCHES; k++) {
            places->next[k][class] = place;
            place += places->counts[k][class];
        }
}

static void add_stretches(const struct places *places, uint32_t counts[CLASSES])
{
    for (int class = 0; class < CLASSES; class++) {
        counts[class] = 0;
        for (int k = 0; k < STRETCHES; k++) counts[class] += places->counts[k][class];
    }
}

static void gather_all_2(const uint8_t *const *planes, Py_ssize_t count, uint16_t *words)
{
    gather_2(planes[0], planes[1], words, count);
}

static void gather_all_4(const uint8_t *const *planes, Py_ssize_t count, uint32_t *words)
{
    gather_4(planes[0], planes[1], planes[2], planes[3], words, count);
}

static void gather_all_8(const uint8_t *const *planes, Py_ssize_t count, uint64_t *words)
{
    gather_8(planes, 0, words, count);
}

static void scatter_all_2(const uint16_t *words, uint8_t *planes, Py_ssize_t items, Py_ssize_t count)
{
    scatter_2(words, planes, planes + items, count);
}

static void scatter_all_4(const uint32_t *words, uint8_t *planes, Py_ssize_t items, Py_ssize_t count)
{
    scatter_4(words, planes, planes + items, planes + 2 * items, planes + 3 * items, count);
}

static void scatter_all_8(const uint64_t *words, uint8_t *planes, Py_ssize_t items, Py_ssize_t count)
{
    scatter_8(words, planes, items, 0, count);
}

#define FOR_EACH_PLACE(ACTION)                                                                                         \
    Py_ssize_t length = count / STRETCHES;                                                                             \
    for (Py_ssize_t i = 0; i < length; i++)                                                                            \
        for (int k = 0; k < STRETCHES; k++) {                                                                          \
            Py_ssize_t item = k * length + i;                                                                          \
            uint32_t place = places->next[k][classes[item]]++;                                                         \
            ACTION;                                                                                                    \
        }                                                                                                              \
    for (Py_ssize_t item = STRETCHES * length; item < count; item++) {                                                 \
        uint32_t place = places->next[STRETCHES - 1][classes[item]]++;                                                 \
        ACTION;                                                                                                        \
    }

#define DEFINE_ORDER(W, U)                                                                                             \
    static void sort_##W(const U *plain, U *sorted, const uint8_t *classes, Py_ssize_t count, struct places *places)   \
    {                                                                                                                  \
        FOR_EACH_PLACE(sorted[place] = plain[item])                                                                    \
    }                                                                                                                  \
    static void unsort_##W(const U *sorted, U *plain, const uint8_t *classes, Py_ssize_t count, struct places *places) \
    {                                                                                                                  \
        FOR_EACH_PLACE(plain[item] = sorted[place])                                                                    \
    }                                                                                                                  \
    /* Ordered planes to the kept elements in their own order. words: memory for twice `count` elements. */              \
    static const U *disorder_##W(const uint8_t *classes, Py_ssize_t count, const uint8_t *const *planes,               \
                                 struct places *places, void *words)                                                   \
    {                                                                                                                  \
        U *plain = words, *sorted = plain + count;                                                                     \
        gather_all_##W(planes, count, sorted);                                                                         \
        unsort_##W(sorted, plain, classes, count, places);                                                             \
        return plain;                                                                                                  \
    }

DEFINE_ORDER(2, uint16_t)
DEFINE_ORDER(4, uint32_t)
DEFINE_ORDER(8, uint64_t)

#define SPLIT_ORDERED(W, U)                                                                                            \
    {                                                                                                                  \
        U *plain = words, *sorted = plain + items;                                                                     \
        for (Py_ssize_t start = 0; start < items; start += BLOCK) {                                                    \
            Py_ssize_t count = items - start < BLOCK ? items - start : BLOCK;                                          \
            const uint8_t *from = base + start * W;                                                                    \
            SPLIT_BLOCK(W, U, memcpy(plain + done, block, count * W))                                                  \
            done += count;                                                                                             \
        }                                                                                                              \
        classify(base, kept, items, W, classes);                                                                       \
        find_places(classes, done, places);                                                                            \
        sort_##W(plain, sorted, classes, done, places);                                                                \
        scatter_all_##W(sorted, planes, items, done);                                                                  \
    }

/* As split_all, the elements sorted. words: ORDER_MEMORY. */
static Py_ssize_t split_ordered(const uint8_t *raw, const uint8_t *base, uint8_t *planes, uint8_t *kept, Py_ssize_t items,
                                int width, int mode, float alpha, struct places *places, void *words)
{
    Py_ssize_t done = 0;
    uint8_t *classes = (uint8_t *)words + 2 * items * width;
    if (kept) memset(kept, 0, (GROUPS_OF(items) + 7) / 8);
    if (width == 2) SPLIT_ORDERED(2, uint16_t)
    else if (width == 4) SPLIT_ORDERED(4, uint32_t)
    else SPLIT_ORDERED(8, uint64_t)
    return done;
}

#define MERGE_ORDERED(W, U)                                                                                            \
    {                                                                                                                  \
        const U *plain = disorder_##W(classes, kept_count, planes, &places, words);                                    \
        for (Py_ssize_t start = 0; start < items; start += BLOCK) {                                                    \
            Py_ssize_t count = items - start < BLOCK ? items - start : BLOCK;                                          \
            Py_ssize_t left = kept ? count_kept(kept, start, count) : count;                                           \
            const uint8_t *from = base + start * W;                                                                    \
            uint8_t *to = out + start * W;                                                                             \
            MERGE_BLOCK(W, U, memcpy(block, plain, left * W))                                                          \
            plain += left;                                                                                             \
        }                                                                                                              \
    }

/* Bytes of memory to split or merge in order: the elements twice, and their classes. */
#define ORDER_MEMORY(count, width) ((count) * (2 * (width) + 1))

/* As merge_all, of `kept_count` ordered elements. */
static void merge_ordered(const uint8_t *const *planes, const uint8_t *kept, const uint8_t *base, uint8_t *out,
                          Py_ssize_t items, Py_ssize_t kept_count, int width, int mode, float alpha, void *words)
{
    struct places places;
    uint8_t *classes = (uint8_t *)words + 2 * kept_count * width;
    classify(base, kept, items, width, classes);
    find_places(classes, kept_count, &places);
    if (width == 2) MERGE_ORDERED(2, uint16_t)
    else if (width == 4) MERGE_ORDERED(4, uint32_t)
    else MERGE_ORDERED(8, uint64_t)
}

static int arguments_are_valid(int width, int mode, float alpha, PyObject *base)
{
    if (width != 1 && width != 2 && width != 4 && width != 8)
        PyErr_Format(PyExc_ValueError, "width must be 1, 2, 4 or 8, not %d", width);
    else if (mode < PLAIN || mode > SCALED || (mode == SCALED && width != 4))
        PyErr_Format(PyExc_ValueError, "mode %d does not exist for width %d", mode, width);
    else if (mode >= DIFFERENCE && base == Py_None)
        PyErr_Format(PyExc_ValueError, "mode %d needs a base", mode);
    else if (mode == SCALED && !(alpha >= 0.5f && alpha <= 2.0f))
        PyErr_SetString(PyExc_ValueError, "alpha must be between 0.5 and 2");
    else
        return 1;
    return 0;
}

/* An optional buffer; None leaves the view empty (obj NULL). */
static int get_optional(PyObject *object, Py_buffer *view, int flags, Py_ssize_t needed)
{
    view->obj = NULL;
    view->buf = NULL;
    if (object == Py_None) return 0;
    if (PyObject_GetBuffer(object, view, flags) < 0) {
        view->obj = NULL;
        return -1;
    }
    if (view->len >= needed) return 0;
    PyErr_SetString(PyExc_ValueError, "the base, the kept groups or the counts are shorter than the elements need");
    PyBuffer_Release(view);
    view->obj = NULL;
    return -1;
}

static void release(Py_buffer *view)
{
    if (view->obj != NULL) PyBuffer_Release(view);
}

static PyObject *kernel_split(PyObject *module, PyObject *args)
{
    Py_buffer raw, planes, base, kept, counts;
    PyObject *base_object, *kept_object, *counts_object, *result = NULL;
    struct places places;
    void *words = NULL;
    int width, mode;
    float alpha;
    Py_ssize_t done;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*Ow*OiifO", &raw, &base_object, &planes, &kept_object, &width, &mode, &alpha,
                          &counts_object))
        return NULL;
    base.obj = kept.obj = counts.obj = NULL;
    if (!arguments_are_valid(width, mode, alpha, base_object)) goto done;
    if (counts_object != Py_None && (width == 1 || base_object == Py_None)) {
        PyErr_SetString(PyExc_ValueError, "ordered planes need a base and elements of 2, 4 or 8 bytes");
        goto done;
    }
    Py_ssize_t items = raw.len / width;
    if (planes.len < items * width) {
        PyErr_SetString(PyExc_ValueError, "the planes are shorter than the elements");
        goto done;
    }
    if (get_optional(base_object, &base, PyBUF_SIMPLE, items * width) < 0) goto done;
    if (get_optional(kept_object, &kept, PyBUF_WRITABLE, (GROUPS_OF(items) + 7) / 8) < 0) goto done;
    if (get_optional(counts_object, &counts, PyBUF_WRITABLE, CLASSES * (Py_ssize_t)sizeof(uint32_t)) < 0) goto done;
    if (counts.obj != NULL && (words = PyMem_Malloc(ORDER_MEMORY(items, width))) == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    const uint8_t *from = base.obj ? base.buf : NULL;
    uint8_t *groups = kept.obj ? kept.buf : NULL;
    if (counts.obj == NULL) {
        done = split_all(raw.buf, from, planes.buf, groups, items, width, mode, alpha);
    } else {
        done = split_ordered(raw.buf, from, planes.buf, groups, items, width, mode, alpha, &places, words);
        add_stretches(&places, counts.buf);
    }
    Py_END_ALLOW_THREADS
    result = PyLong_FromSsize_t(done);
done:
    PyMem_Free(words);
    release(&base);
    release(&kept);
    release(&counts);
    PyBuffer_Release(&raw);
    PyBuffer_Release(&planes);
    return result;
}

static PyObject *kernel_merge(PyObject *module, PyObject *args)
{
    Py_buffer out, base, kept, views[8];
    const uint8_t *planes[8];
    void *words = NULL;
    PyObject *tuple, *base_object, *kept_object, *result = NULL;
    int width, mode, ordered, held = 0;
    float alpha;
    (void)module;
    if (!PyArg_ParseTuple(args, "O!OOw*iifp", &PyTuple_Type, &tuple, &kept_object, &base_object, &out, &width, &mode,
                          &alpha, &ordered))
        return NULL;
    base.obj = kept.obj = NULL;
    if (!arguments_are_valid(width, mode, alpha, base_object)) goto done;
    if (ordered && (width == 1 || base_object == Py_None)) {
        PyErr_SetString(PyExc_ValueError, "ordered planes need a base and elements of 2, 4 or 8 bytes");
        goto done;
    }
    if (PyTuple_Size(tuple) != width) {
        PyErr_SetString(PyExc_ValueError, "one plane is needed for each byte of the width");
        goto done;
    }
    Py_ssize_t items = out.len / width;
    if (get_optional(base_object, &base, PyBUF_SIMPLE, items * width) < 0) goto done;
    if (get_optional(kept_object, &kept, PyBUF_SIMPLE, (GROUPS_OF(items) + 7) / 8) < 0) goto done;
    Py_ssize_t left = kept.obj ? count_kept(kept.buf, 0, items) : items;
    for (; held < width; held++) {
        if (PyObject_GetBuffer(PyTuple_GetItem(tuple, held), &views[held], PyBUF_SIMPLE) < 0) goto done;
        if (views[held].len != left) {
            PyErr_SetString(PyExc_ValueError, "a plane has another length than the kept elements");
            held++;
            goto done;
        }
        planes[held] = views[held].buf;
    }
    if (ordered && (words = PyMem_Malloc(ORDER_MEMORY(left, width))) == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    const uint8_t *groups = kept.obj ? kept.buf : NULL;
    if (ordered) merge_ordered(planes, groups, base.buf, out.buf, items, left, width, mode, alpha, words);
    else merge_all(planes, groups, base.obj ? base.buf : NULL, out.buf, items, width, mode, alpha);
    Py_END_ALLOW_THREADS
    result = Py_None;
    Py_INCREF(result);
done:
    PyMem_Free(words);
    while (held > 0) PyBuffer_Release(&views[--held]);
    release(&base);
    release(&kept);
    PyBuffer_Release(&out);
    return result;
}

/* Windows spread evenly over a buffer, each starting on an element; a short buffer is one window. */
struct windows {
    Py_ssize_t count, bytes, step;
};

static struct windows spread(Py_ssize_t length, int width, Py_ssize_t count, Py_ssize_t bytes)
{
    struct windows all = {1, length / width * width, 0};
    if (length > count * bytes) {
        all.count = count;
        all.bytes = bytes;
        all.step = (length - bytes) / (count - 1) / width * width;
    }
    return all;
}

/* Counts the bytes of `count` changed elements, one table for each byte of an element. */
#define SAMPLE_BLOCK(W, U)                                                                                             \
    {                                                                                                                  \
        U block[BLOCK], old;                                                                                           \
        uint32_t scaled[BLOCK];                                                                                        \
        transform_##W(raw + at, predict(from, scaled, count, mode, alpha), block, count, mode);                        \
        for (Py_ssize_t i = 0; i < count; i++) zeros += block[i] == 0;                                                 \
        for (Py_ssize_t i = 0; i < count; i += GROUP) {                                                                \
            Py_ssize_t end = count - i < GROUP ? count : i + GROUP;                                                    \
            U any = 0;                                                                                                 \
            for (Py_ssize_t j = i; j < end; j++) any |= block[j];                                                      \
            if (grouped && !any) continue;                                                                             \
            for (Py_ssize_t j = i; j < end; j++, sampled++) {                                                          \
                if (segment_items) {                                                                                   \
                    memcpy(&old, from + j * W, W);                                                                     \
                    classes[sampled] = (uint8_t)(ROTATE_LEFT(U, old) >> (8 * W - 8));                                  \
                }                                                                                                      \
                for (int k = 0; k < W; k++) bytes[sampled * W + k] = (uint8_t)(block[j] >> (8 * k));                   \
            }                                                                                                          \
        }                                                                                                              \
    }

#define SAMPLE_BYTES_MAX 16384

struct estimate {
    int64_t information, distinct;
    Py_ssize_t kept, zeros, segments;
};

static void count_segment(const uint32_t tables[8][256], Py_ssize_t items, int width, const int64_t *table,
                          struct estimate *found)
{
    for (int k = 0; k < width; k++) {
        found->information += table[items];
        for (int value = 0; value < 256; value++) {
            found->information -= table[tables[k][value]];
            found->distinct += tables[k][value] != 0;
        }
    }
    found->segments++;
}

static void to_starts(const uint32_t counts[CLASSES], Py_ssize_t starts[CLASSES])
{
    Py_ssize_t start = 0;
    for (int class = 0; class < CLASSES; class++) {
        starts[class] = start;
        start += counts[class];
    }
}

/* table[n] is n log2 n in fixed point: sums of integers are the same in any order, so the twin agrees to the last bit. */
static void sample_all(const uint8_t *raw, const uint8_t *base, struct windows windows, int width, int mode, float alpha,
                       int grouped, Py_ssize_t segment_items, const int64_t *table, struct estimate *found)
{
    uint32_t tables[8][256], counts[CLASSES];
    uint8_t bytes[SAMPLE_BYTES_MAX], classes[SAMPLE_BYTES_MAX];
    uint16_t places[SAMPLE_BYTES_MAX];
    Py_ssize_t sampled = 0, zeros = 0, starts[CLASSES];
    for (Py_ssize_t window = 0; window < windows.count; window++) {
        Py_ssize_t end = window * windows.step + windows.bytes;
        for (Py_ssize_t at = window * windows.step; at < end; at += BLOCK * width) {
            Py_ssize_t count = (end - at) / width < BLOCK ? (end - at) / width : BLOCK;
            const uint8_t *from = base ? base + at : NULL;
            if (width == 1) SAMPLE_BLOCK(1, uint8_t)
            else if (width == 2) SAMPLE_BLOCK(2, uint16_t)
            else if (width == 4) SAMPLE_BLOCK(4, uint32_t)
            else SAMPLE_BLOCK(8, uint64_t)
        }
    }
    memset(found, 0, sizeof *found);
    found->kept = sampled;
    found->zeros = zeros;
    if (sampled == 0) return;
    memset(tables, 0, width * sizeof tables[0]);
    if (segment_items == 0) {
        for (Py_ssize_t i = 0; i < sampled; i++)
            for (int k = 0; k < width; k++) tables[k][bytes[i * width + k]]++;
        count_segment(tables, sampled, width, table, found);
        return;
    }
    memset(counts, 0, sizeof counts);
    for (Py_ssize_t i = 0; i < sampled; i++) counts[classes[i]]++;
    to_starts(counts, starts);
    for (Py_ssize_t i = 0; i < sampled; i++) places[starts[classes[i]]++] = (uint16_t)i;
    Py_ssize_t begin = 0, end = 0;
    for (int class = 0; class < CLASSES; class++) {
        end += counts[class];
        if (end - begin < segment_items && !(end == sampled && end > begin)) continue;
        for (Py_ssize_t at = begin; at < end; at++)
            for (int k = 0; k < width; k++) tables[k][bytes[places[at] * width + k]]++;
        count_segment(tables, end - begin, width, table, found);
        memset(tables, 0, width * sizeof tables[0]);
        begin = end;
    }
}

static PyObject *kernel_sample(PyObject *module, PyObject *args)
{
    Py_buffer raw, base, table;
    PyObject *base_object, *result = NULL;
    int width, mode, grouped;
    float alpha;
    Py_ssize_t count, bytes, segment_items;
    struct estimate found;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*Oiifnnpny*", &raw, &base_object, &width, &mode, &alpha, &count, &bytes, &grouped,
                          &segment_items, &table))
        return NULL;
    base.obj = NULL;
    if (!arguments_are_valid(width, mode, alpha, base_object)) goto done;
    if (count < 2 || bytes < 1 || bytes % (GROUP * width) != 0 || bytes > SAMPLE_BYTES_MAX / count) {
        PyErr_Format(PyExc_ValueError, "a sample needs two windows of whole groups of elements, at most %d bytes in all",
                     SAMPLE_BYTES_MAX);
        goto done;
    }
    if (segment_items < 0 || (segment_items > 0 && (width == 1 || base_object == Py_None))) {
        PyErr_SetString(PyExc_ValueError, "ordered planes need a base and elements of 2, 4 or 8 bytes");
        goto done;
    }
    struct windows windows = spread(raw.len, width, count, bytes);
    if (table.len < (windows.count * windows.bytes / width + 1) * (Py_ssize_t)sizeof(int64_t)) {
        PyErr_SetString(PyExc_ValueError, "the table is shorter than the sample");
        goto done;
    }
    if (get_optional(base_object, &base, PyBUF_SIMPLE, raw.len / width * width) < 0) goto done;
    Py_BEGIN_ALLOW_THREADS
    sample_all(raw.buf, base.obj ? base.buf : NULL, windows, width, mode, alpha, grouped, segment_items, table.buf, &found);
    Py_END_ALLOW_THREADS
    result = Py_BuildValue("(LLnnn)", (long long)found.information, (long long)found.distinct, found.kept, found.zeros,
                           found.segments);
done:
    release(&base);
    PyBuffer_Release(&raw);
    PyBuffer_Release(&table);
    return result;
}

/* The element that sorting would put at `rank` (Hoare's selection). */
static float selected(float *values, Py_ssize_t count, Py_ssize_t rank)
{
    Py_ssize_t low = 0, high = count - 1;
    while (low < high) {
        float pivot = values[low + (high - low) / 2];
        Py_ssize_t i = low, j = high;
        while (i <= j) {
            while (values[i] < pivot) i++;
            while (values[j] > pivot) j--;
            if (i <= j) {
                float swapped = values[i];
                values[i++] = values[j];
                values[j--] = swapped;
            }
        }
        if (rank <= j) high = j;
        else if (rank >= i) low = i;
        else break;
    }
    return values[rank];
}

#define RATIOS_MAX 4096

/* Both are finite, and the old one is far from zero and from the subnormals. */
#define IS_USABLE(x, y) (((x) >> 23 & 255) < 255 && ((y) >> 23 & 255) - 28 < 227)

static PyObject *kernel_ratio(PyObject *module, PyObject *args)
{
    Py_buffer raw, base;
    PyObject *result = NULL;
    Py_ssize_t count, bytes, items_max, usable = 0;
    float ratios[RATIOS_MAX], found = 0;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*y*nnn", &raw, &base, &count, &bytes, &items_max)) return NULL;
    if (count < 2 || bytes < 4 || bytes % 4 || items_max < 1 || items_max > RATIOS_MAX || base.len < raw.len) {
        PyErr_SetString(PyExc_ValueError, "a ratio needs two windows of float32, and a base as long as the elements");
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    struct windows windows = spread(raw.len, 4, count, bytes);
    Py_ssize_t items = windows.count * windows.bytes / 4, per_window = windows.bytes / 4;
    Py_ssize_t step = (items + items_max - 1) / items_max;
    for (Py_ssize_t item = 0; item < items; item += step) {
        Py_ssize_t at = item / per_window * windows.step + item % per_window * 4;
        uint32_t now, old;
        float x, y;
        memcpy(&now, (const uint8_t *)raw.buf + at, 4);
        memcpy(&old, (const uint8_t *)base.buf + at, 4);
        if (!IS_USABLE(now, old)) continue;
        memcpy(&x, &now, 4);
        memcpy(&y, &old, 4);
        ratios[usable++] = x / y;
    }
    if (usable) found = selected(ratios, usable, (usable - 1) / 2);
    Py_END_ALLOW_THREADS
    result = Py_BuildValue("(fn)", found, usable);
done:
    PyBuffer_Release(&raw);
    PyBuffer_Release(&base);
    return result;
}

/* Rules of rounding.py. Integers only: a flush-to-zero setting or a processor's way with NaN must not show. */
enum rule { BFLOAT16_NEAREST = 1, BFLOAT16_CUT, FLOAT16_NEAREST, FLOAT16_CUT };

/* Both roundings of an integer shifted right: `even` adds just less than half and the bit that decides a tie. */
#define SHIFTED(u, shift, even) (((u) + ((even) ? (1u << ((shift) - 1)) - 1 + ((u) >> (shift) & 1) : 0u)) >> (shift))

#define TO_FLOAT16(even)                                                                                               \
    for (Py_ssize_t i = 0; i < count; i++) {                                                                           \
        uint32_t u = from[i], magnitude = u & 0x7fffffffu;                                                             \
        uint32_t exponent = magnitude >> 23, lacking = exponent < 95 ? 31 : exponent > 125 ? 1 : 126 - exponent;       \
        uint32_t significand = (magnitude & 0x7fffffu) | 0x800000u, rebiased = magnitude - 0x38000000u;                \
        uint32_t small = SHIFTED(significand, lacking, even), normal = SHIFTED(rebiased, 13, even);                    \
        uint32_t large = (even) || magnitude == 0x7f800000u ? 0x7c00u : 0x7bffu;                                       \
        uint32_t nan = 0x7e00u | (magnitude >> 13 & 0x3ffu);                                                           \
        uint32_t rounded = magnitude < 0x38800000u ? small : normal;                                                   \
        rounded = magnitude >= 0x47800000u ? large : rounded;                                                          \
        rounded = magnitude > 0x7f800000u ? nan : rounded;                                                             \
        to[i] = (uint16_t)(rounded | (u >> 16 & 0x8000u));                                                             \
    }

FAST static void derive_block(const uint32_t *from, uint16_t *to, Py_ssize_t count, int rule)
{
    if (rule == BFLOAT16_CUT) {
        for (Py_ssize_t i = 0; i < count; i++) to[i] = (uint16_t)(from[i] >> 16);
    } else if (rule == BFLOAT16_NEAREST) {
        for (Py_ssize_t i = 0; i < count; i++) {
            uint32_t u = from[i];
            to[i] = (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? u >> 16 | 0x40u : SHIFTED(u, 16, 1));
        }
    } else if (rule == FLOAT16_NEAREST) {
        TO_FLOAT16(1)
    } else {
        TO_FLOAT16(0)
    }
}

static void derive_all(const uint8_t *master, uint8_t *out, Py_ssize_t items, int rule)
{
    uint32_t from[BLOCK];
    uint16_t to[BLOCK];
    for (Py_ssize_t start = 0; start < items; start += BLOCK) {
        Py_ssize_t count = items - start < BLOCK ? items - start : BLOCK;
        memcpy(from, master + start * 4, count * 4);
        derive_block(from, to, count, rule);
        memcpy(out + start * 2, to, count * 2);
    }
}

static PyObject *kernel_derive(PyObject *module, PyObject *args)
{
    Py_buffer master, out;
    PyObject *result = NULL;
    int rule;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*w*i", &master, &out, &rule)) return NULL;
    if (rule < BFLOAT16_NEAREST || rule > FLOAT16_CUT || out.len % 2 || master.len != 2 * out.len) {
        PyErr_SetString(PyExc_ValueError, "derive needs a rule of 1 to 4 and a master twice as long as the copy");
    } else {
        Py_BEGIN_ALLOW_THREADS
        derive_all(master.buf, out.buf, out.len / 2, rule);
        Py_END_ALLOW_THREADS
        result = Py_None;
        Py_INCREF(result);
    }
    PyBuffer_Release(&master);
    PyBuffer_Release(&out);
    return result;
}

static PyMethodDef methods[] = {
    {"split", kernel_split, METH_VARARGS, "split(raw, base, planes, kept, width, mode, alpha, counts): elements to planes"},
    {"merge", kernel_merge, METH_VARARGS, "merge(planes, kept, base, out, width, mode, alpha, ordered): planes to elements"},
    {"derive", kernel_derive, METH_VARARGS, "derive(master, out, rule): float32 rounded to 16 bits"},
    {"sample", kernel_sample, METH_VARARGS,
     "sample(raw, base, width, mode, alpha, windows, window_bytes, grouped, segment_items, table): what entropy coding can make of it"},
    {"ratio", kernel_ratio, METH_VARARGS, "ratio(raw, base, windows, window_bytes, items_max): median of new to old floats"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_kernel", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernel(void)
{
    return PyModule_Create(&definition);
}
