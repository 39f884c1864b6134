/* Reads the bits of an entropy-coded segment without stuffed bytes, and decodes symbols and blocks (T.81, F.2.2).
 *
 * Reads are not checked one by one. A block has at most 64 symbols of at most 16 + 11 bits, so that it ends less than
 * VJ_BLOCK_BYTES after its start; the caller leaves so much room, and checks the position afterwards.
 *
 * Functions that are not inlined take the bits by value: the address of a vj_bits would keep it in memory. */
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

/* The value at the start of `bits`, of `size` bits, 0 to 11 (T.81, F.2.2.1, RECEIVE and EXTEND). */
VJ_INLINE int vj_value(uint64_t bits, int size) {
  int value = (int)(bits >> 1 >> (63 - size));
  if (size == 0) return 0;
  return value < 1 << (size - 1) ? value - (1 << size) + 1 : value;
}

/* The code at the start of `bits`: its length in bits 8-15, its symbol in bits 0-7; 0 for an invalid code. */
static int vj_code(uint64_t bits, const vj_huffman *table) {
  int code = table->code[bits >> (64 - VJ_LOOK)];
  if (code != 0) return code;
  int next = (int)(bits >> 48);
  int length = VJ_LOOK + 1;
  while (length <= 16 && next >= table->first_too_large[length]) length++;
  if (length > 16) return 0;
  return length << 8 | table->symbol[((next >> (16 - length)) + table->offset[length]) & 255];
}

/* Adds the difference of a DC coefficient to `*dc`. Returns 0 for an invalid code. */
VJ_INLINE int vj_read_dc(vj_bits *b, const vj_huffman *table, int *dc) {
  uint32_t entry = table->dc[b->bits >> (64 - VJ_LOOK)];
  if (VJ_UNLIKELY(entry == 0)) {
    int code = vj_code(b->bits, table);
    if (code == 0) return 0;
    vj_drop(b, (uint64_t)(code >> 8));
    *dc += vj_value(b->bits, code & 255);
    vj_drop(b, (uint64_t)(code & 255));
    return 1;
  }
  vj_drop(b, entry);
  *dc += (int32_t)entry >> 16;
  return 1;
}

/* The AC symbol at the start of `bits`, which is too long for the index, as an entry of `ac`; 0 for an invalid code. */
static __attribute__((noinline)) vj_ac_entry vj_long_ac(uint64_t bits, const vj_huffman *table) {
  int code = vj_code(bits, table);
  if (code == 0) return 0;
  int symbol = code & 255;
  int size = symbol & 15;
  int value = vj_value(bits << (code >> 8), size);
  uint64_t advance = symbol == 0 ? VJ_END_OF_BLOCK : (uint64_t)(symbol >> 4) + 1;
  return (uint64_t)((code >> 8) + size) | advance << 16 | (uint64_t)(uint16_t)value << 48;
}

#endif
