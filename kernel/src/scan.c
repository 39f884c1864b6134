#include "scan.h"

#include "bits.h"
#include "idct.h"

/* clang-format off */
const uint8_t vj_zigzag[64 + 256] = {
  0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5,
  12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14, 21, 28,
  35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51,
  58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
  [64 ... 64 + 255] = 64
};
/* clang-format on */

#if VJ_X86

enum { LAST = 63, INVALID = -1, LOOK_UPS = 56 / VJ_ENTRY_BITS /* without a refill */ };

/* Parts of an entry of `ac`, see huffman.h. */
#define FIRST_BITS(entry) ((entry) >> 6 & 15)
#define ADVANCE(entry) ((int)((entry) >> 16 & 255))
#define FIRST_ADVANCE(entry) ((int)((entry) >> 24 & 255))
#define FIRST_VALUE(entry) ((int16_t)((entry) >> 32))
#define LAST_VALUE(entry) ((int16_t)((entry) >> 48))

/* The bits of the last value that lie behind the index. */
VJ_INLINE int behind_index(uint64_t bits, vj_ac_entry entry) {
  return (int)(bits << VJ_LOOK >> 1 >> (entry >> 10 & 63));
}

/* The state after the end of a block: coefficient 63, or an end-of-block code after coefficient 0 .. 62. */
VJ_INLINE int is_end(int k) { return k == LAST || (unsigned)(k - VJ_END_OF_BLOCK) < (unsigned)LAST; }

/* AC coefficients of one block (T.81, F.2.2.2), which `coefficients` has zeros for. Returns 1, or 0 if there are none,
 * or INVALID. */
VJ_AVX2 VJ_INLINE int read_ac(vj_bits *b, const vj_huffman *table, int16_t *coefficients) {
  int k = 0; /* index of the last coefficient */
  for (;;) {
    vj_refill(b);
    for (int i = 0; i < LOOK_UPS; i++) {
      vj_ac_entry entry = table->ac[b->bits >> (64 - VJ_LOOK)];
      if (VJ_UNLIKELY(entry == 0)) goto is_long;
      int first = k + FIRST_ADVANCE(entry);
      int last = k + ADVANCE(entry);
      coefficients[vj_zigzag[first]] = FIRST_VALUE(entry);
      coefficients[vj_zigzag[last]] = (int16_t)(LAST_VALUE(entry) + behind_index(b->bits, entry));
      if (last >= LAST) {
        if (VJ_UNLIKELY(first == LAST && last != LAST)) { /* the second symbol belongs to the next block */
          vj_drop(b, FIRST_BITS(entry));
          return 1;
        }
        vj_drop(b, entry);
        if (last == VJ_END_OF_BLOCK) return 0;
        return is_end(last) ? 1 : INVALID;
      }
      vj_drop(b, entry);
      k = last;
    }
    continue;
  is_long : {
    vj_refill(b);
    vj_ac_entry entry = vj_long_ac(b->bits, table);
    if (entry == 0) return INVALID;
    vj_drop(b, entry);
    if (k == 0 && ADVANCE(entry) == VJ_END_OF_BLOCK) return 0;
    k += ADVANCE(entry);
    coefficients[vj_zigzag[k]] = LAST_VALUE(entry);
    if (k >= LAST) return is_end(k) ? 1 : INVALID;
  }
  }
}

/* The same without the coefficients. Returns 1 or INVALID. */
VJ_AVX2 VJ_INLINE int skip_ac(vj_bits *b, const vj_huffman *table) {
  int k = 0;
  for (;;) {
    vj_refill(b);
    for (int i = 0; i < LOOK_UPS; i++) {
      vj_skip_entry entry = table->skip[b->bits >> (64 - VJ_SKIP_LOOK)];
      if (VJ_UNLIKELY(entry == 0)) goto is_slow;
      int end = k + (entry >> 6);
      if (end >= LAST) {
        if (end < VJ_END_OF_BLOCK || !is_end(end)) goto is_slow; /* look at each symbol */
        vj_drop(b, entry);
        return 1;
      }
      vj_drop(b, entry);
      k = end;
    }
    continue;
  is_slow : {
    vj_refill(b);
    vj_ac_entry entry = vj_long_ac(b->bits, table);
    if (entry == 0) return INVALID;
    vj_drop(b, entry);
    k += ADVANCE(entry);
    if (k >= LAST) return is_end(k) ? 1 : INVALID;
  }
  }
}

/* Decodes the blocks of an MCU. Returns VJ_OK, VJ_CODE or VJ_RANGE. */
VJ_AVX2 VJ_INLINE vj_reason read_mcu(const vj_picture *picture, int x, int y, int is_needed, vj_bits *b, int dc[3]) {
  int16_t coefficients[72] __attribute__((aligned(32)));
  int bad_dc = 0;
  int is_in_range = 1;
  for (int i = 0; i < picture->header->components; i++) {
    const vj_plane *plane = picture->plane + i;
    for (int v = 0; v < plane->vertical; v++)
      for (int h = 0; h < plane->horizontal; h++) {
        int block_x = x * plane->horizontal + h;
        int block_y = y * plane->vertical + v;
        vj_refill(b);
        if (!vj_read_dc(b, plane->dc, dc + i)) return VJ_CODE;
        bad_dc |= dc[i] + 2048; /* quantised, 8 bits: -1024 .. 1023, and the encoder's rounding */
        if (!is_needed || !plane->is_needed[block_y * plane->blocks_x + block_x]) {
          if (skip_ac(b, plane->ac) == INVALID) return VJ_CODE;
          continue;
        }
        memset(coefficients, 0, 64 * sizeof *coefficients);
        int has_ac = read_ac(b, plane->ac, coefficients);
        if (has_ac == INVALID) return VJ_CODE;
        uint8_t *out = plane->pixels + (size_t)block_x * 8 * plane->stride + (size_t)block_y * 8;
        coefficients[0] = (int16_t)dc[i];
        if (has_ac)
          is_in_range &= vj_idct(coefficients, plane->quantisation, out, plane->stride);
        else
          is_in_range &= vj_idct_flat(dc[i], plane->quantisation[0], out, plane->stride);
      }
  }
  if (bad_dc & ~4095 || !is_in_range) return VJ_RANGE;
  return VJ_OK;
}

/* Decodes MCUs `first` .. `stop` - 1, whose code is the `length` bytes of `segment`. Less than a byte may be left. */
VJ_AVX2 static vj_reason read_interval(const vj_picture *picture, int first, int stop, const uint8_t *segment,
                                       size_t length) {
  vj_bits b = {0, 0, segment};
  int dc[3] = {0, 0, 0};
  int mcus_x = picture->header->mcus_x;
  int x = first % mcus_x;
  int y = first / mcus_x;
  for (int mcu = first; mcu < stop; mcu++) {
    vj_reason reason = read_mcu(picture, x, y, picture->is_needed[mcu], &b, dc);
    if (reason != VJ_OK) return reason;
    if (b.next > segment + length + 8) return VJ_LENGTH; /* before the margin of the segment ends */
    x++;
    if (x == mcus_x) {
      x = 0;
      y++;
    }
  }
  int64_t bits = 8 * (b.next - segment) - (int64_t)(b.count & 63);
  int64_t left = 8 * (int64_t)length - bits;
  return left >= 0 && left < 8 ? VJ_OK : VJ_LENGTH;
}

/* Copies the bytes up to the next marker without stuffed zeros (T.81, F.1.2.3) and returns their number; `*at` is then
 * the marker. SIZE_MAX: the file ends before. */
static size_t unstuff(const uint8_t **at, const uint8_t *end, uint8_t *out) {
  uint8_t *begin = out;
  for (;;) {
    const uint8_t *ff = memchr(*at, 0xff, (size_t)(end - *at));
    if (ff == NULL || end - ff < 2) return SIZE_MAX;
    size_t length = (size_t)(ff - *at);
    memcpy(out, *at, length);
    out += length;
    if (ff[1] != 0) {
      *at = ff;
      return (size_t)(out - begin);
    }
    *out++ = 0xff;
    *at = ff + 2;
  }
}

/* Moves `*at` to the next marker. Returns 0 if the file ends before. */
static int pass_over(const uint8_t **at, const uint8_t *end) {
  for (;;) {
    const uint8_t *ff = memchr(*at, 0xff, (size_t)(end - *at));
    if (ff == NULL || end - ff < 2) return 0;
    *at = ff;
    if (ff[1] != 0) return 1;
    *at += 2;
  }
}

static int needs_any(const vj_picture *picture, int first, int stop) {
  return memchr(picture->is_needed + first, 1, (size_t)(stop - first)) != NULL;
}

vj_reason vj_read_scan(const vj_picture *picture, uint8_t *segment, int is_verified) {
  enum { RST0 = 0xd0, EOI = 0xd9 };
  const vj_header *header = picture->header;
  const uint8_t *at = header->scan;
  int mcus = header->mcus_x * header->mcus_y;
  int interval = header->restart_interval != 0 ? header->restart_interval : mcus;
  int restarts = 0;
  for (int first = 0; first < mcus; first += interval) {
    int stop = mcus - first < interval ? mcus : first + interval;
    if (is_verified && !needs_any(picture, first, stop)) {
      if (!pass_over(&at, header->end)) return VJ_TRUNCATED;
    } else {
      size_t length = unstuff(&at, header->end, segment);
      if (length == SIZE_MAX) return VJ_TRUNCATED;
      vj_reason reason = read_interval(picture, first, stop, segment, length);
      if (reason != VJ_OK) return reason;
    }
    if (stop < mcus) {
      if (at[1] != RST0 + (restarts & 7)) return VJ_RESTART;
      restarts++;
    } else if (at[1] != EOI) {
      return VJ_END;
    }
    at += 2;
  }
  return VJ_OK;
}

#endif
