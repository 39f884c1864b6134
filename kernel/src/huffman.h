/* Huffman tables for decoding (T.81, C.2 and F.2.2). */
#ifndef VJ_HUFFMAN_H
#define VJ_HUFFMAN_H

#include "header.h"

enum {
  VJ_LOOK = 10,      /* bits of the index of `dc`, `ac` and `code`; measured, as the next */
  VJ_SKIP_LOOK = 12, /* bits of the index of `skip` */
  VJ_ENTRY_BITS =
      18, /* an entry of `ac` or `skip` has at most as many bits: three follow each other without a refill */
  VJ_END_OF_BLOCK = 128 /* added to an advance by the symbol EOB: more than any index of a coefficient */
};

/* Entries of `ac`: one or two symbols. Of the last one, the lowest bits of the value may lie behind the index.
 *   bits  0- 5  bits of the entry
 *   bits  6- 9  bits of the first of two symbols
 *   bits 10-15  63 - n, where n bits of the last value lie behind the index
 *   bits 16-23  advance of the entry: coefficients from the last index to the one of the last value, or VJ_END_OF_BLOCK
 *   bits 24-31  advance of the first symbol
 *   bits 32-47  value of the first symbol (int16); undefined if it is the last one
 *   bits 48-63  value of the last symbol (int16), to which the n bits are added
 * 0: the first symbol has more than VJ_ENTRY_BITS bits, or its code and the first bit of its value have more than
 * VJ_LOOK, or the code is invalid. */
typedef uint64_t vj_ac_entry;

/* Entries of `dc`: bits with the difference, in bits 0-15, and the difference, in bits 16-31. 0: the code with its
 * difference has more than VJ_LOOK bits, or is invalid. */
typedef uint32_t vj_dc_entry;

/* Entries of `skip`: as many symbols as begin in the index. Bits in bits 0-5, their advance in bits 6-15. 0 as above,
 * with VJ_SKIP_LOOK. */
typedef uint16_t vj_skip_entry;

typedef struct {
  int32_t first_too_large[18]; /* by length: the first 16-bit value that is no code of at most this length */
  int32_t offset[17];          /* by length: index of a symbol minus its code */
  uint8_t symbol[256];
  uint16_t code[1 << VJ_LOOK]; /* bits of a code in bits 8-15, and its symbol; 0: more than VJ_LOOK bits */
  union {
    vj_ac_entry ac[1 << VJ_LOOK];
    vj_dc_entry dc[1 << VJ_LOOK];
  };
  vj_skip_entry skip[1 << VJ_SKIP_LOOK]; /* of AC tables */
} vj_huffman;

/* Tables by their definitions, of which most shards have one or two sets: T.81, annex K. */
enum { VJ_KEPT_TABLES = 16 }; /* more than the eight that an image can have */

typedef struct {
  struct {
    int is_ac;
    int length; /* 0: not used */
    uint64_t last_use;
    uint8_t definition[16 + 256];
    vj_huffman table;
  } kept[VJ_KEPT_TABLES];
  uint64_t uses;
} vj_huffman_cache;

/* The table of a definition, valid until eight others were asked for; NULL if it is invalid, or has symbols that a
 * baseline file of 8 bits cannot need. */
const vj_huffman *vj_huffman_table(vj_huffman_cache *cache, vj_huffman_source source, int is_ac);

#endif
