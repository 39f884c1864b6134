#include "huffman.h"

#include <string.h>

enum { ZERO_RUN = 0xf0, MAX_DC_BITS = 11, MAX_AC_BITS = 10 }; /* T.81, tables F.1 and F.2 */

/* One symbol at the start of an index: its advance, all its bits, its value. The lowest bits of the value may lie
 * behind the index: `missing` is their number, and `value` is the value if they are zeros. */
typedef struct {
  int bits; /* 0: no symbol, or one that an entry cannot have */
  int missing;
  int advance;
  int value;
} token;

static const token NO_TOKEN = {0, 0, 0, 0};

/* The value of `size` bits (T.81, F.2.2.1, EXTEND). */
static int extend(int bits, int size) {
  if (size == 0) return 0;
  return bits < 1 << (size - 1) ? bits - (1 << size) + 1 : bits;
}

/* A symbol whose code begins an index of `look` bits. It may have `most` bits with its value. The first bit of the
 * value must be in the index: it decides whether the value is negative. */
static token token_at(int symbol, int code_bits, int index, int look, int most, int is_ac) {
  token t = NO_TOKEN;
  int size = is_ac ? symbol & 15 : symbol;
  int bits = code_bits + size;
  int missing = bits > look ? bits - look : 0;
  if (bits > most || (missing != 0 && missing >= size)) return NO_TOKEN;
  int value = index << missing >> (look + missing - bits) & ((1 << size) - 1);
  t.bits = bits;
  t.missing = missing;
  t.value = extend(value, size);
  t.advance = (symbol >> 4) + 1;
  if (symbol == 0) t.advance = VJ_END_OF_BLOCK;
  return t;
}

static int is_valid_symbol(int symbol, int is_ac) {
  if (!is_ac) return symbol <= MAX_DC_BITS;
  if ((symbol & 15) == 0) return symbol == 0 || symbol == ZERO_RUN;
  return (symbol & 15) <= MAX_AC_BITS;
}

/* Codes of each length follow each other (T.81, figure C.2). Fills what long codes need, and `lengths`: by the first
 * VJ_SKIP_LOOK bits of a string, length << 8 | symbol of the code, or 0. */
static int build_codes(vj_huffman *table, const uint8_t *definition, int is_ac, uint16_t *lengths) {
  int code = 0;
  int k = 0;
  for (int length = 1; length <= 16; length++) {
    table->offset[length] = k - code;
    for (int i = 0; i < definition[length - 1]; i++) {
      int symbol = definition[16 + k];
      if (code >= 1 << length || !is_valid_symbol(symbol, is_ac)) return 0;
      table->symbol[k] = (uint8_t)symbol;
      if (length <= VJ_SKIP_LOOK) {
        int width = 1 << (VJ_SKIP_LOOK - length);
        for (int index = code * width; index < (code + 1) * width; index++)
          lengths[index] = (uint16_t)(length << 8 | symbol);
      }
      k++;
      code++;
    }
    table->first_too_large[length] = code << (16 - length);
    code <<= 1;
  }
  table->first_too_large[17] = 1 << 30;
  return 1;
}

/* The symbol after the first `dropped` bits of an index of `look` bits. */
static token token_after(const uint16_t *lengths, int dropped, int index, int look, int most, int is_ac) {
  look -= dropped;
  index &= (1 << look) - 1;
  int code = lengths[index << (VJ_SKIP_LOOK - look)];
  if (code == 0 || code >> 8 > look) return NO_TOKEN;
  return token_at(code & 255, code >> 8, index, look, most - dropped, is_ac);
}

static void build_dc(vj_huffman *table, const uint16_t *lengths) {
  for (int index = 0; index < 1 << VJ_LOOK; index++) {
    token t = token_after(lengths, 0, index, VJ_LOOK, VJ_LOOK, 0);
    table->dc[index] = (uint32_t)t.bits | (uint32_t)(uint16_t)t.value << 16;
  }
}

/* An entry of `ac`. `second` may be NO_TOKEN. */
static vj_ac_entry pair(token first, token second) {
  token last = second.bits != 0 ? second : first;
  uint64_t entry = (uint64_t)(first.bits + second.bits) | (uint64_t)(first.bits & 15) << 6;
  entry |= (uint64_t)(63 - last.missing) << 10;
  entry |= (uint64_t)(first.advance + second.advance) << 16 | (uint64_t)first.advance << 24;
  return entry | (uint64_t)(uint16_t)first.value << 32 | (uint64_t)(uint16_t)last.value << 48;
}

static void build_ac(vj_huffman *table, const uint16_t *lengths) {
  for (int index = 0; index < 1 << VJ_LOOK; index++) {
    token first = token_after(lengths, 0, index, VJ_LOOK, VJ_ENTRY_BITS, 1);
    token second = NO_TOKEN;
    if (first.advance != VJ_END_OF_BLOCK && first.bits < VJ_LOOK)
      second = token_after(lengths, first.bits, index, VJ_LOOK, VJ_ENTRY_BITS, 1);
    table->ac[index] = first.bits != 0 ? pair(first, second) : 0;
  }
}

/* As many symbols as begin in the index, up to the end of a block. */
static void build_skip(vj_huffman *table, const uint16_t *lengths) {
  for (int index = 0; index < 1 << VJ_SKIP_LOOK; index++) {
    int bits = 0;
    int advance = 0;
    while (advance < VJ_END_OF_BLOCK && bits < VJ_SKIP_LOOK) {
      token t = token_after(lengths, bits, index, VJ_SKIP_LOOK, VJ_ENTRY_BITS, 1);
      int end = advance + t.advance;
      if (t.bits == 0) break;
      if (end >= 64 && end < VJ_END_OF_BLOCK) break; /* past the end of any block */
      bits += t.bits;
      advance = end;
    }
    table->skip[index] = (uint16_t)(bits | advance << 6);
  }
}

static int build(vj_huffman *table, const uint8_t *definition, int is_ac) {
  uint16_t lengths[1 << VJ_SKIP_LOOK];
  memset(lengths, 0, sizeof lengths);
  if (!build_codes(table, definition, is_ac, lengths)) return 0;
  for (int index = 0; index < 1 << VJ_LOOK; index++) {
    int code = lengths[index << (VJ_SKIP_LOOK - VJ_LOOK)];
    table->code[index] = (uint16_t)(code >> 8 <= VJ_LOOK ? code : 0);
  }
  if (!is_ac) {
    build_dc(table, lengths);
    return 1;
  }
  build_ac(table, lengths);
  build_skip(table, lengths);
  return 1;
}

const vj_huffman *vj_huffman_table(vj_huffman_cache *cache, vj_huffman_source source, int is_ac) {
  int oldest = 0;
  cache->uses++;
  for (int i = 0; i < VJ_KEPT_TABLES; i++) {
    if (cache->kept[i].length == source.length && cache->kept[i].is_ac == is_ac &&
        memcmp(cache->kept[i].definition, source.definition, (size_t)source.length) == 0) {
      cache->kept[i].last_use = cache->uses;
      return &cache->kept[i].table;
    }
    if (cache->kept[i].last_use < cache->kept[oldest].last_use) oldest = i;
  }
  cache->kept[oldest].length = 0;
  cache->kept[oldest].last_use = cache->uses;
  if (!build(&cache->kept[oldest].table, source.definition, is_ac)) return NULL;
  cache->kept[oldest].is_ac = is_ac;
  cache->kept[oldest].length = source.length;
  memcpy(cache->kept[oldest].definition, source.definition, (size_t)source.length);
  return &cache->kept[oldest].table;
}
