/* Huffman tables for decoding (T.81, C.2 and F.2.2). */
#ifndef VJ_HUFFMAN_H
#define VJ_HUFFMAN_H

#include "header.h"

enum {
  VJ_LOOK = 10,         /* bits of the index of `dc`, `ac` and `code`; measured, as the next */
  VJ_SKIP_LOOK = 13,    /* bits of the index of `skip` */
  VJ_END_OF_BLOCK = 128 /* added to an advance by the symbol EOB: more than any index of a coefficient */
};

/* Entries of `ac`. Up to two symbols, of which "both" counts the first alone if there is only one.
 *   bits  0- 7  advance of the first: coefficients from the last index to the one of its value, or VJ_END_OF_BLOCK
 *   bits  8-15  advance of both
 *   bits 16-23  bits of the first, with its value
 *   bits 24-31  bits of both
 *   bits 32-47  value of the first (int16)
 *   bits 48-63  value of the last (int16)
 * 0: the first symbol with its value has more than VJ_LOOK bits, or the code is invalid. */
typedef uint64_t vj_ac_entry;

/* Entries of `dc`: bits with the difference, in bits 0-15, and the difference, in bits 16-31. 0 as above. */
typedef uint32_t vj_dc_entry;

/* Entries of `skip`: as many symbols as fit. Bits in bits 0-3, their advance in bits 4-15. 0 as above. */
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
