/* The two passes of the resize, for one patch or several above each other. */
#ifndef VJ_RESIZE_H
#define VJ_RESIZE_H

#include <string.h>

#include "filter.h"
#include "platform.h"

#if VJ_X86

enum { VJ_STRIP = 16 }; /* columns of the view that are resized together */

/* Two weights, for products of pixels of two columns or rows. */
VJ_AVX2 VJ_INLINE __m256i vj_weights(const int16_t *weights) {
  int32_t two;
  memcpy(&two, weights, sizeof two);
  return _mm256_set1_epi32(two);
}

/* Adds the products of 16 pixels of `a` with the first weight and of `b` with the second to `sums`. */
VJ_AVX2 VJ_INLINE void vj_accumulate(__m256i sums[2], __m128i a, __m128i b, __m256i weights) {
  __m256i low = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(a, b));
  __m256i high = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(a, b));
  sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(low, weights));
  sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(high, weights));
}

VJ_AVX2 VJ_INLINE __m128i vj_to_pixels(const __m256i sums[2], __m128i precision) {
  __m256i words = _mm256_packs_epi32(_mm256_sra_epi32(sums[0], precision), _mm256_sra_epi32(sums[1], precision));
  words = _mm256_permute4x64_epi64(words, 0xd8);
  return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

/* 32 rows of one column of the view. */
VJ_AVX2 VJ_INLINE void vj_horizontal32(const uint8_t *in, int rows, const int16_t *weights, int n, int precision,
                                       uint8_t *out) {
  const __m256i zero = _mm256_setzero_si256();
  const __m128i shift = _mm_cvtsi32_si128(precision);
  __m256i sums[4];
  for (int i = 0; i < 4; i++) sums[i] = _mm256_set1_epi32(1 << (precision - 1));
  for (int k = 0; k < n; k += 2) {
    __m256i w = vj_weights(weights + k);
    __m256i a = _mm256_loadu_si256((const __m256i *)(in + (size_t)k * (size_t)rows));
    __m256i b = _mm256_loadu_si256((const __m256i *)(in + (size_t)(k + 1) * (size_t)rows));
    __m256i low = _mm256_unpacklo_epi8(a, b);
    __m256i high = _mm256_unpackhi_epi8(a, b);
    sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), w));
    sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), w));
    sums[2] = _mm256_add_epi32(sums[2], _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), w));
    sums[3] = _mm256_add_epi32(sums[3], _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), w));
  }
  for (int i = 0; i < 4; i++) sums[i] = _mm256_sra_epi32(sums[i], shift);
  __m256i low = _mm256_packs_epi32(sums[0], sums[1]);
  __m256i high = _mm256_packs_epi32(sums[2], sums[3]);
  _mm256_storeu_si256((__m256i *)out, _mm256_packus_epi16(low, high));
}

/* 16 rows of one column of the view. */
VJ_AVX2 VJ_INLINE void vj_horizontal16(const uint8_t *in, int rows, const int16_t *weights, int n, int precision,
                                       uint8_t *out) {
  __m256i sums[2];
  for (int i = 0; i < 2; i++) sums[i] = _mm256_set1_epi32(1 << (precision - 1));
  for (int k = 0; k < n; k += 2) {
    __m128i a = _mm_loadu_si128((const __m128i *)(in + (size_t)k * (size_t)rows));
    __m128i b = _mm_loadu_si128((const __m128i *)(in + (size_t)(k + 1) * (size_t)rows));
    vj_accumulate(sums, a, b, vj_weights(weights + k));
  }
  _mm_storeu_si128((__m128i *)out, vj_to_pixels(sums, _mm_cvtsi32_si128(precision)));
}

/* Columns `first` .. `first` + `count` - 1 of the view. `in`: pixels of one channel, column by column from `left` on,
 * of `rows` rows each, and one column more, whose weight is 0. `out`: the same order. A mirrored view takes its columns
 * from the other side. */
VJ_AVX2 static void vj_horizontal(const uint8_t *in, int rows, int left, const vj_filter *filter, int first, int count,
                                  int is_mirrored, uint8_t *out) {
  for (int i = 0; i < count; i++, out += rows) {
    int column = first + i;
    if (is_mirrored) column = filter->outputs - 1 - column;
    const uint8_t *source = in + (size_t)(filter->first[column] - left) * (size_t)rows;
    const int16_t *weights = filter->weights + (size_t)column * (size_t)filter->taps;
    int n = filter->length[column];
    int row = 0;
    for (; row + 32 <= rows; row += 32) vj_horizontal32(source + row, rows, weights, n, filter->precision, out + row);
    if (row < rows) vj_horizontal16(source + row, rows, weights, n, filter->precision, out + row);
  }
}

/* Rows `first` .. `first` + `count` - 1 of the view. `in`: rows of VJ_STRIP pixels of one channel from `top` on, and
 * one row more, whose weight is 0. */
VJ_AVX2 static void vj_vertical(const uint8_t *in, int top, const vj_filter *filter, int first, int count,
                                uint8_t *out) {
  for (int i = 0; i < count; i++, out += VJ_STRIP) {
    int row = first + i;
    const uint8_t *source = in + VJ_STRIP * (filter->first[row] - top);
    const int16_t *weights = filter->weights + (size_t)row * (size_t)filter->taps;
    __m256i sums[2];
    for (int k = 0; k < 2; k++) sums[k] = _mm256_set1_epi32(1 << (filter->precision - 1));
    for (int k = 0; k < filter->length[row]; k += 2) {
      __m128i a = _mm_load_si128((const __m128i *)(source + VJ_STRIP * k));
      __m128i b = _mm_load_si128((const __m128i *)(source + VJ_STRIP * (k + 1)));
      vj_accumulate(sums, a, b, vj_weights(weights + k));
    }
    _mm_store_si128((__m128i *)out, vj_to_pixels(sums, _mm_cvtsi32_si128(filter->precision)));
  }
}

/* 16 columns of 16 rows to 16 rows of 16 columns. */
VJ_AVX2 VJ_INLINE void vj_transpose16(const uint8_t *in, int stride, uint8_t *out) {
  __m128i a[16];
  __m128i b[16];
  for (int i = 0; i < 16; i++) a[i] = _mm_loadu_si128((const __m128i *)(in + i * stride));
  for (int step = 0; step < 4; step++) { /* each step interleaves columns i and i + 8 */
    for (int i = 0; i < 8; i++) {
      b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
      b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
    }
    for (int i = 0; i < 16; i++) a[i] = b[i];
  }
  for (int i = 0; i < 16; i++) _mm_store_si128((__m128i *)(out + VJ_STRIP * i), a[i]);
}

/* Byte 3 * i + channel of 48 interleaved bytes, from byte `part` * 16 on, is byte i of a channel: its place, or -1. */
#define VJ_SPREAD(channel, part, byte) (char)(((byte) + 16 * (part)) % 3 == (channel) ? ((byte) + 16 * (part)) / 3 : -1)
#define VJ_SPREAD4(c, p, b) VJ_SPREAD(c, p, b), VJ_SPREAD(c, p, b + 1), VJ_SPREAD(c, p, b + 2), VJ_SPREAD(c, p, b + 3)
#define VJ_SPREAD16(c, p) \
  _mm_setr_epi8(VJ_SPREAD4(c, p, 0), VJ_SPREAD4(c, p, 4), VJ_SPREAD4(c, p, 8), VJ_SPREAD4(c, p, 12))
#define VJ_PART(p)                                     \
  _mm_or_si128(_mm_shuffle_epi8(r, VJ_SPREAD16(0, p)), \
               _mm_or_si128(_mm_shuffle_epi8(g, VJ_SPREAD16(1, p)), _mm_shuffle_epi8(b, VJ_SPREAD16(2, p))))

/* Rows of `columns` pixels from three channels of VJ_STRIP wide rows; `out_stride` bytes from a row to the next. */
VJ_AVX2 static void vj_interleave_rgb(const uint8_t *red, const uint8_t *green, const uint8_t *blue, int rows,
                                      int columns, uint8_t *out, size_t out_stride) {
  uint8_t row[3 * VJ_STRIP];
  for (int i = 0; i < rows; i++, out += out_stride) {
    __m128i r = _mm_load_si128((const __m128i *)(red + VJ_STRIP * i));
    __m128i g = _mm_load_si128((const __m128i *)(green + VJ_STRIP * i));
    __m128i b = _mm_load_si128((const __m128i *)(blue + VJ_STRIP * i));
    uint8_t *to = out;
    if (columns < VJ_STRIP) to = row;
    _mm_storeu_si128((__m128i *)to, VJ_PART(0));
    _mm_storeu_si128((__m128i *)(to + 16), VJ_PART(1));
    _mm_storeu_si128((__m128i *)(to + 32), VJ_PART(2));
    if (columns < VJ_STRIP) memcpy(out, row, (size_t)(3 * columns));
  }
}

#endif
#endif
