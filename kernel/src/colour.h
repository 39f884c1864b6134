/* Upsampling and colour conversion of a rectangle of an image, with the bits of libjpeg-turbo (jdsample.c "fancy
 * upsampling", jdcolor.c). */
#ifndef VJ_COLOUR_H
#define VJ_COLOUR_H

#include "platform.h"
#include "scan.h"

#if VJ_X86

/* Pixels of columns `left` .. `right` - 1 and `rows` rows from `top` on, by channel (RGB), column and row. `top` is
 * even if chroma has half of the rows; `rows` is a multiple of 16. For grey images there is one channel.
 * `channel_size`: bytes from a channel to the next; after the columns each has room for 32 more bytes. */
static inline size_t vj_rectangle_bytes(int columns, int rows) { return (size_t)(columns + 1) * (size_t)rows + 32; }

/* Chroma samples above and below the image are the first and the last ones of it: upsampling needs these. */
static inline void vj_extend_chroma(const vj_picture *picture) {
  for (int i = 1; i < picture->header->components; i++) {
    const vj_plane *plane = picture->plane + i;
    for (int x = 0; x < plane->width; x++) {
      uint8_t *column = plane->pixels + (size_t)x * plane->stride;
      column[-1] = column[0];
      column[plane->height] = column[plane->height - 1];
    }
  }
}

/* Thirty-two chroma values, minus 128, as 16-bit numbers: `low` has rows 0 to 7 and 16 to 23, `high` the others, the
 * order of _mm256_unpacklo_epi8 and _mm256_unpackhi_epi8. */
typedef struct {
  __m256i low, high;
} vj_chroma;

VJ_AVX2 VJ_INLINE __m256i vj_times3(__m256i v) { return _mm256_add_epi16(_mm256_add_epi16(v, v), v); }

VJ_AVX2 VJ_INLINE __m256i vj_load16(const uint8_t *bytes) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)bytes));
}

/* Full rows: the nearer column counts three times, the farther one once (h2v1), if it has half of the columns. */
VJ_AVX2 VJ_INLINE vj_chroma vj_chroma_of_row(const uint8_t *near, const uint8_t *far, int is_halved, int rounding) {
  __m256i zero = _mm256_setzero_si256();
  __m256i a = _mm256_loadu_si256((const __m256i *)near);
  vj_chroma c = {_mm256_unpacklo_epi8(a, zero), _mm256_unpackhi_epi8(a, zero)};
  if (!is_halved) return c;
  __m256i b = _mm256_loadu_si256((const __m256i *)far);
  __m256i r = _mm256_set1_epi16((short)rounding);
  __m256i low = _mm256_add_epi16(_mm256_unpacklo_epi8(b, zero), r);
  __m256i high = _mm256_add_epi16(_mm256_unpackhi_epi8(b, zero), r);
  c.low = _mm256_srli_epi16(_mm256_add_epi16(vj_times3(c.low), low), 2);
  c.high = _mm256_srli_epi16(_mm256_add_epi16(vj_times3(c.high), high), 2);
  return c;
}

/* 3 * near + far of 16 rows from `row` on. */
VJ_AVX2 VJ_INLINE __m256i vj_column_sum(const uint8_t *near, const uint8_t *far, int row) {
  return _mm256_add_epi16(vj_times3(vj_load16(near + row)), vj_load16(far + row));
}

/* Half of the rows and columns (h2v2): sixteen rows of sums become 32 rows. */
VJ_AVX2 VJ_INLINE vj_chroma vj_chroma_of_square(const uint8_t *near, const uint8_t *far, int rounding) {
  __m256i own = vj_column_sum(near, far, 0);
  __m256i above = vj_column_sum(near, far, -1);
  __m256i below = vj_column_sum(near, far, 1);
  __m256i weighted = _mm256_add_epi16(vj_times3(own), _mm256_set1_epi16((short)rounding));
  __m256i even = _mm256_srli_epi16(_mm256_add_epi16(weighted, above), 4);
  __m256i odd = _mm256_srli_epi16(_mm256_add_epi16(weighted, below), 4);
  vj_chroma c = {_mm256_unpacklo_epi16(even, odd), _mm256_unpackhi_epi16(even, odd)};
  return c;
}

/* Products of 16-bit numbers with fractions, by jdcolor.c's constants times 2^16:
 * R = Y + 1.40200 Cr, G = Y - 0.34414 Cb - 0.71414 Cr, B = Y + 1.77200 Cb, each product rounded (green: the sum).
 * 1.402 Cr = Cr + 0.402 Cr and 1.772 Cb = 2 Cb - 0.228 Cb, so that constants fit into 16 bits. The high half of a
 * product with twice the number has one bit more, with which it is rounded. */
enum { FIX_0_40200 = 26345, FIX_0_22800 = 14942, FIX_0_34414 = 22554, FIX_0_28586 = 18734 };

VJ_AVX2 VJ_INLINE __m256i vj_rounded_product(__m256i v, int constant) {
  __m256i product = _mm256_mulhi_epi16(_mm256_add_epi16(v, v), _mm256_set1_epi16((short)constant));
  return _mm256_srai_epi16(_mm256_add_epi16(product, _mm256_set1_epi16(1)), 1);
}

/* -0.34414 Cb - 0.71414 Cr, as -0.34414 Cb + 0.28586 Cr - Cr. */
VJ_AVX2 VJ_INLINE __m256i vj_green_part(__m256i cb, __m256i cr) {
  __m256i constants = _mm256_set1_epi32((int)((uint32_t)FIX_0_28586 << 16 | (uint16_t)-FIX_0_34414));
  __m256i half = _mm256_set1_epi32(1 << 15);
  __m256i low = _mm256_madd_epi16(_mm256_unpacklo_epi16(cb, cr), constants);
  __m256i high = _mm256_madd_epi16(_mm256_unpackhi_epi16(cb, cr), constants);
  low = _mm256_srai_epi32(_mm256_add_epi32(low, half), 16);
  high = _mm256_srai_epi32(_mm256_add_epi32(high, half), 16);
  return _mm256_sub_epi16(_mm256_packs_epi32(low, high), cr);
}

typedef struct {
  __m256i red, green, blue;
} vj_rgb16;

VJ_AVX2 VJ_INLINE vj_rgb16 vj_colour16(__m256i y, __m256i cb, __m256i cr) {
  __m256i bias = _mm256_set1_epi16(128);
  cb = _mm256_sub_epi16(cb, bias);
  cr = _mm256_sub_epi16(cr, bias);
  __m256i red = _mm256_add_epi16(cr, vj_rounded_product(cr, FIX_0_40200));
  __m256i blue = _mm256_add_epi16(_mm256_add_epi16(cb, cb), vj_rounded_product(cb, -FIX_0_22800));
  vj_rgb16 rgb;
  rgb.red = _mm256_add_epi16(y, red);
  rgb.green = _mm256_add_epi16(y, vj_green_part(cb, cr));
  rgb.blue = _mm256_add_epi16(y, blue);
  return rgb;
}

VJ_AVX2 VJ_INLINE void vj_colour32(const uint8_t *luma, vj_chroma cb, vj_chroma cr, uint8_t *out, size_t channel_size) {
  __m256i zero = _mm256_setzero_si256();
  __m256i y = _mm256_loadu_si256((const __m256i *)luma);
  vj_rgb16 low = vj_colour16(_mm256_unpacklo_epi8(y, zero), cb.low, cr.low);
  vj_rgb16 high = vj_colour16(_mm256_unpackhi_epi8(y, zero), cb.high, cr.high);
  _mm256_storeu_si256((__m256i *)out, _mm256_packus_epi16(low.red, high.red));
  _mm256_storeu_si256((__m256i *)(out + channel_size), _mm256_packus_epi16(low.green, high.green));
  _mm256_storeu_si256((__m256i *)(out + 2 * channel_size), _mm256_packus_epi16(low.blue, high.blue));
}

/* The chroma columns of an image's column x: the nearer one, and the farther one that counts a quarter. */
typedef struct {
  int near, far;
} vj_columns;

VJ_INLINE vj_columns vj_chroma_columns(int x, const vj_plane *plane, int is_halved) {
  vj_columns c = {x, x};
  if (!is_halved) return c;
  c.near = x >> 1;
  c.far = c.near - 1;
  if (x & 1) c.far = c.near + 1;
  if (c.far < 0) c.far = 0;
  if (c.far >= plane->width) c.far = plane->width - 1;
  return c;
}

VJ_AVX2 static void vj_rectangle(const vj_picture *picture, int left, int right, int top, int rows, uint8_t *out,
                                 size_t channel_size) {
  const vj_plane *luma = picture->plane;
  const vj_plane *blue = picture->plane + 1;
  const vj_plane *red = picture->plane + 2;
  int is_halved_x = picture->header->horizontal == 2;
  int is_halved_y = picture->header->vertical == 2;
  for (int x = left; x < right; x++, out += rows) {
    const uint8_t *y = luma->pixels + (size_t)x * luma->stride + top;
    if (picture->header->components == 1) {
      memcpy(out, y, (size_t)rows);
      continue;
    }
    vj_columns c = vj_chroma_columns(x, blue, is_halved_x);
    const uint8_t *near[2] = {blue->pixels + (size_t)c.near * blue->stride, red->pixels + (size_t)c.near * red->stride};
    const uint8_t *far[2] = {blue->pixels + (size_t)c.far * blue->stride, red->pixels + (size_t)c.far * red->stride};
    for (int row = 0; row < rows; row += 32) {
      vj_chroma chroma[2];
      int at = top + row;
      for (int i = 0; i < 2; i++) {
        if (is_halved_y)
          chroma[i] = vj_chroma_of_square(near[i] + (at >> 1), far[i] + (at >> 1), x & 1 ? 7 : 8);
        else
          chroma[i] = vj_chroma_of_row(near[i] + at, far[i] + at, is_halved_x, x & 1 ? 2 : 1);
      }
      vj_colour32(y + row, chroma[0], chroma[1], out + row, channel_size);
    }
  }
}

#endif
#endif
