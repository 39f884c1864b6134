/* Inverse DCT of a block, with the bits of libjpeg-turbo's "islow" (Loeffler, Ligtenberg and Moschytz, ICASSP 1989). */
#ifndef VJ_IDCT_H
#define VJ_IDCT_H

#include "platform.h"

#if VJ_X86

/* libjpeg-turbo has this transform in C (jidctint.c) and for several vector units (as jidctint-avx2.asm). They give the
 * same bits as long as nothing overflows: C computes with 32 bits and cuts off the highest bits of a pixel, the others
 * have sums of 16 bits and saturate. These functions report blocks in which a number leaves the range where all agree.
 * No 8-bit image has such blocks, unless its coefficients were quantised very coarsely or are damaged. */

/* Constants of jidctint.c times 2^13. */
enum {
  FIX_0_298631336 = 2446,
  FIX_0_390180644 = 3196,
  FIX_0_541196100 = 4433,
  FIX_0_765366865 = 6270,
  FIX_0_899976223 = 7373,
  FIX_1_175875602 = 9633,
  FIX_1_501321110 = 12299,
  FIX_1_847759065 = 15137,
  FIX_1_961570560 = 16069,
  FIX_2_053119869 = 16819,
  FIX_2_562915447 = 20995,
  FIX_3_072711026 = 25172,
  FIX_BITS = 13
};

/* a[i] * left + b[i] * right of eight lanes, in 32 bits. */
VJ_AVX2 VJ_INLINE __m256i vj_combine(__m256i interleaved, int left, int right) {
  return _mm256_madd_epi16(interleaved, _mm256_set1_epi32((int)((uint32_t)right << 16 | (uint16_t)left)));
}

VJ_AVX2 VJ_INLINE __m256i vj_interleave(__m128i a, __m128i b) {
  return _mm256_set_m128i(_mm_unpackhi_epi16(a, b), _mm_unpacklo_epi16(a, b));
}

VJ_AVX2 VJ_INLINE __m256i vj_widen(__m128i a) { return _mm256_slli_epi32(_mm256_cvtepi16_epi32(a), FIX_BITS); }

/* One dimension: `in` has eight vectors of eight coefficients, `out` eight sums, rounded and shifted by `shift`. */
VJ_AVX2 VJ_INLINE void vj_idct_pass(const __m128i in[8], __m256i out[8], int shift) {
  __m256i even = vj_interleave(in[2], in[6]);
  __m256i t2 = vj_combine(even, FIX_0_541196100, FIX_0_541196100 - FIX_1_847759065);
  __m256i t3 = vj_combine(even, FIX_0_541196100 + FIX_0_765366865, FIX_0_541196100);
  __m256i rounding = _mm256_set1_epi32(1 << (shift - 1));
  __m256i t0 = _mm256_add_epi32(vj_widen(_mm_add_epi16(in[0], in[4])), rounding);
  __m256i t1 = _mm256_add_epi32(vj_widen(_mm_sub_epi16(in[0], in[4])), rounding);
  __m256i e0 = _mm256_add_epi32(t0, t3);
  __m256i e1 = _mm256_add_epi32(t1, t2);
  __m256i e2 = _mm256_sub_epi32(t1, t2);
  __m256i e3 = _mm256_sub_epi32(t0, t3);

  __m256i sums = vj_interleave(_mm_add_epi16(in[7], in[3]), _mm_add_epi16(in[5], in[1]));
  __m256i z3 = vj_combine(sums, FIX_1_175875602 - FIX_1_961570560, FIX_1_175875602);
  __m256i z4 = vj_combine(sums, FIX_1_175875602, FIX_1_175875602 - FIX_0_390180644);
  __m256i in71 = vj_interleave(in[7], in[1]);
  __m256i in53 = vj_interleave(in[5], in[3]);
  __m256i o0 = vj_combine(in71, FIX_0_298631336 - FIX_0_899976223, -FIX_0_899976223);
  __m256i o1 = vj_combine(in53, FIX_2_053119869 - FIX_2_562915447, -FIX_2_562915447);
  __m256i o2 = vj_combine(in53, -FIX_2_562915447, FIX_3_072711026 - FIX_2_562915447);
  __m256i o3 = vj_combine(in71, -FIX_0_899976223, FIX_1_501321110 - FIX_0_899976223);
  o0 = _mm256_add_epi32(o0, z3);
  o1 = _mm256_add_epi32(o1, z4);
  o2 = _mm256_add_epi32(o2, z3);
  o3 = _mm256_add_epi32(o3, z4);

  out[0] = _mm256_srai_epi32(_mm256_add_epi32(e0, o3), shift);
  out[7] = _mm256_srai_epi32(_mm256_sub_epi32(e0, o3), shift);
  out[1] = _mm256_srai_epi32(_mm256_add_epi32(e1, o2), shift);
  out[6] = _mm256_srai_epi32(_mm256_sub_epi32(e1, o2), shift);
  out[2] = _mm256_srai_epi32(_mm256_add_epi32(e2, o1), shift);
  out[5] = _mm256_srai_epi32(_mm256_sub_epi32(e2, o1), shift);
  out[3] = _mm256_srai_epi32(_mm256_add_epi32(e3, o0), shift);
  out[4] = _mm256_srai_epi32(_mm256_sub_epi32(e3, o0), shift);
}

/* Eight rows of 32-bit numbers, saturated to 16 bits and transposed. Sets bits 15 of `*overflow` if one of them is not
 * in -16384 .. 16383, so that a sum of two could have more than 16 bits. */
VJ_AVX2 VJ_INLINE void vj_transpose(const __m256i rows[8], __m128i columns[8], __m256i *overflow) {
  __m128i a[8];
  __m128i b[8];
  for (int i = 0; i < 8; i += 2) {
    __m256i two = _mm256_packs_epi32(rows[i], rows[i + 1]);
    *overflow = _mm256_or_si256(*overflow, _mm256_xor_si256(two, _mm256_slli_epi16(two, 1)));
    two = _mm256_permute4x64_epi64(two, 0xd8);
    a[i] = _mm256_castsi256_si128(two);
    a[i + 1] = _mm256_extracti128_si256(two, 1);
  }
  for (int i = 0; i < 4; i++) { /* rows i and i + 4 */
    b[2 * i] = _mm_unpacklo_epi16(a[i], a[i + 4]);
    b[2 * i + 1] = _mm_unpackhi_epi16(a[i], a[i + 4]);
  }
  for (int i = 0; i < 4; i++) {
    a[2 * i] = _mm_unpacklo_epi16(b[i], b[i + 4]);
    a[2 * i + 1] = _mm_unpackhi_epi16(b[i], b[i + 4]);
  }
  for (int i = 0; i < 4; i++) {
    columns[2 * i] = _mm_unpacklo_epi16(a[i], a[i + 4]);
    columns[2 * i + 1] = _mm_unpackhi_epi16(a[i], a[i + 4]);
  }
}

/* Four columns as pixels, saturated, with 128 added. Sets bits 10 to 15 of `*overflow` if a pixel before that is not in
 * -512 .. 511. */
VJ_AVX2 VJ_INLINE void vj_store_columns(const __m256i columns[4], uint8_t *out, size_t stride, __m256i *overflow) {
  __m256i words01 = _mm256_packs_epi32(columns[0], columns[1]);
  __m256i words23 = _mm256_packs_epi32(columns[2], columns[3]);
  __m256i bias = _mm256_set1_epi16(512);
  *overflow = _mm256_or_si256(*overflow, _mm256_add_epi16(words01, bias));
  *overflow = _mm256_or_si256(*overflow, _mm256_add_epi16(words23, bias));
  __m256i bytes = _mm256_packs_epi16(words01, words23);
  bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  bytes = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
  __m128i low = _mm256_castsi256_si128(bytes);
  __m128i high = _mm256_extracti128_si256(bytes, 1);
  _mm_storel_epi64((__m128i *)out, low);
  _mm_storel_epi64((__m128i *)(out + stride), _mm_unpackhi_epi64(low, low));
  _mm_storel_epi64((__m128i *)(out + 2 * stride), high);
  _mm_storel_epi64((__m128i *)(out + 3 * stride), _mm_unpackhi_epi64(high, high));
}

/* Coefficients times their quantisation. Sets bits 1 to 15 of `*overflow` if a product is not in -4096 .. 4095; bit 0
 * has no meaning. Coefficients have at most 12 bits. */
VJ_AVX2 VJ_INLINE void vj_dequantise(const int16_t *coefficients, const int16_t *quantisation, __m128i rows[8],
                                     __m256i *overflow) {
  for (int i = 0; i < 8; i += 2) {
    __m256i c = _mm256_load_si256((const __m256i *)(coefficients + 8 * i));
    __m256i q = _mm256_load_si256((const __m256i *)(quantisation + 8 * i));
    __m256i product = _mm256_mullo_epi16(c, q);
    __m256i high = _mm256_mulhi_epi16(_mm256_slli_epi16(c, 4), q); /* the product divided by 4096: -1 or 0 */
    *overflow = _mm256_or_si256(*overflow, _mm256_add_epi16(high, _mm256_set1_epi16(1)));
    rows[i] = _mm256_castsi256_si128(product);
    rows[i + 1] = _mm256_extracti128_si256(product, 1);
  }
}

/* Dequantises and transforms a block of 64 coefficients in natural order. Pixels of a column follow each other in
 * `out`, columns are `stride` apart. Returns 0 if a number leaves the range. */
VJ_AVX2 VJ_INLINE int vj_idct(const int16_t *coefficients, const int16_t *quantisation, uint8_t *out, size_t stride) {
  __m128i rows[8];
  __m256i wide[8];
  __m256i product = _mm256_setzero_si256();
  __m256i sum = product;
  __m256i pixel = product;
  vj_dequantise(coefficients, quantisation, rows, &product);
  vj_idct_pass(rows, wide, FIX_BITS - 2);
  vj_transpose(wide, rows, &sum);
  vj_idct_pass(rows, wide, FIX_BITS + 2 + 3);
  vj_store_columns(wide, out, stride, &pixel);
  vj_store_columns(wide + 4, out + 4 * stride, stride, &pixel);
  __m256i overflow = _mm256_and_si256(product, _mm256_set1_epi16((short)0xfffe));
  overflow = _mm256_or_si256(overflow, _mm256_and_si256(sum, _mm256_set1_epi16((short)0x8000)));
  overflow = _mm256_or_si256(overflow, _mm256_and_si256(pixel, _mm256_set1_epi16((short)0xfc00)));
  return _mm256_testz_si256(overflow, overflow);
}

/* The same for a block with a DC coefficient alone. */
VJ_AVX2 VJ_INLINE int vj_idct_flat(int dc, int quantisation, uint8_t *out, size_t stride) {
  int value = dc * quantisation;
  if (value < -4096 || value > 4091) return 0;
  int pixel = ((value + 4) >> 3) + 128;
  if (pixel < 0) pixel = 0;
  if (pixel > 255) pixel = 255;
  __m128i column = _mm_set1_epi8((char)pixel);
  for (int i = 0; i < 8; i++) _mm_storel_epi64((__m128i *)(out + (size_t)i * stride), column);
  return 1;
}

#endif
#endif
