/* Reads the bits of an entropy-coded segment without stuffed bytes, and decodes symbols and blocks (T.81, F.2.2).
 *
 * Reads are not checked one by one. A block has at most 64 symbols of at most 16 + 11 bits, so that it ends less than
 * VJ_BLOCK_BYTES after its start; the caller leaves so much room, and checks the position afterwards. */
#ifndef VJ_BITS_H
#define VJ_BITS_H

#include <string.h>

#include "huffman.h"
#include "platform.h"

typedef struct {
  uint64_t bits;       /* the next bits, the first one highest */
  uint64_t count;      /* valid ones of them, at least, in bits 0-5; its other bits mean nothing */
  const uint8_t *next; /* the byte after them */
} vj_bits;

/* Afterwards at least 56 bits are valid. */
VJ_INLINE void vj_refill(vj_bits *b) {
  uint64_t bytes;
  memcpy(&bytes, b->next, 8);
  b->bits |= __builtin_bswap64(bytes) >> (b->count & 63);
  b->next += (~b->count & 63) >> 3;
  b->count |= 56;
}

/* Drops as many bits as bits 0-5 of `n` say: entries of tables have their number there, so that none is masked. */
VJ_INLINE void vj_drop(vj_bits *b, uint64_t n) {
  b->bits <<= n & 63;
  b->count -= n;
}

/* The value of the next `size` bits, 0 to 11 (T.81, F.2.2.1, RECEIVE and EXTEND). */
VJ_INLINE int vj_value(vj_bits *b, int size) {
  int value = (int)(b->bits >> 1 >> (63 - size));
  vj_drop(b, (uint64_t)size);
  if (size == 0) return 0;
  return value < 1 << (size - 1) ? value - (1 << size) + 1 : value;
}

/* The next symbol, or -1 for an invalid code. */
static int vj_symbol(vj_bits *b, const vj_huffman *table) {
  int code = table->code[b->bits >> (64 - VJ_LOOK)];
  if (code != 0) {
    vj_drop(b, (uint64_t)(code >> 8));
    return code & 255;
  }
  int next = (int)(b->bits >> 48);
  int length = VJ_LOOK + 1;
  while (length <= 16 && next >= table->first_too_large[length]) length++;
  if (length > 16) return -1;
  vj_drop(b, (uint64_t)length);
  return table->symbol[((next >> (16 - length)) + table->offset[length]) & 255];
}

/* Adds the difference of a DC coefficient to `*dc`. Returns 0 for an invalid code. */
VJ_INLINE int vj_read_dc(vj_bits *b, const vj_huffman *table, int *dc) {
  uint32_t entry = table->dc[b->bits >> (64 - VJ_LOOK)];
  if (VJ_UNLIKELY(entry == 0)) {
    int size = vj_symbol(b, table);
    if (size < 0) return 0;
    *dc += vj_value(b, size);
    return 1;
  }
  vj_drop(b, entry);
  *dc += (int32_t)entry >> 16;
  return 1;
}

/* One AC symbol that is too long for the index: its advance, with its value; 0 for an invalid code. */
static __attribute__((noinline)) int vj_long_ac(vj_bits *b, const vj_huffman *table, int *value) {
  vj_refill(b);
  int symbol = vj_symbol(b, table);
  if (symbol < 0) return 0;
  *value = vj_value(b, symbol & 15);
  return symbol == 0 ? VJ_END_OF_BLOCK : (symbol >> 4) + 1;
}

#endif
