#include "huffman.h"

#include <string.h>

enum { ZERO_RUN = 0xf0, MAX_DC_BITS = 11, MAX_AC_BITS = 10 }; /* T.81, tables F.1 and F.2 */

/* One symbol at the start of a bit string: its advance, all its bits, its value. */
typedef struct {
  int bits; /* 0: not in the string */
  int advance;
  int value;
} token;

/* The value of `size` bits (T.81, F.2.2.1, EXTEND). */
static int extend(int bits, int size) {
  if (size == 0) return 0;
  return bits < 1 << (size - 1) ? bits - (1 << size) + 1 : bits;
}

/* A code in the index of a table with `look` bits: the bits after the code are the first ones of the value. */
static token token_at(int symbol, int code_bits, int index, int look, int is_ac) {
  int size = is_ac ? symbol & 15 : symbol;
  token t = {0, 0, 0};
  if (code_bits + size > look) return t;
  t.bits = code_bits + size;
  t.value = extend(index >> (look - t.bits) & ((1 << size) - 1), size);
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

static token first_token(const uint16_t *lengths, int index, int look, int is_ac) {
  int code = lengths[index << (VJ_SKIP_LOOK - look)];
  token none = {0, 0, 0};
  if (code == 0 || code >> 8 > look) return none;
  return token_at(code & 255, code >> 8, index, look, is_ac);
}

static void build_dc(vj_huffman *table, const uint16_t *lengths) {
  for (int index = 0; index < 1 << VJ_LOOK; index++) {
    token t = first_token(lengths, index, VJ_LOOK, 0);
    table->dc[index] = (uint32_t)t.bits | (uint32_t)(uint16_t)t.value << 16;
  }
}

static vj_ac_entry pair(token first, token second) {
  uint64_t entry = (uint64_t)first.advance | (uint64_t)(first.advance + second.advance) << 8;
  entry |= (uint64_t)first.bits << 16 | (uint64_t)(first.bits + second.bits) << 24;
  int last = second.bits != 0 ? second.value : first.value;
  return entry | (uint64_t)(uint16_t)first.value << 32 | (uint64_t)(uint16_t)last << 48;
}

static void build_ac(vj_huffman *table, const token *tokens) {
  const int mask = (1 << VJ_LOOK) - 1;
  for (int index = 0; index <= mask; index++) {
    token first = tokens[index];
    token second = {0, 0, 0};
    table->ac[index] = 0;
    if (first.bits == 0) continue;
    if (first.advance != VJ_END_OF_BLOCK) {
      second = tokens[index << first.bits & mask];
      if (first.bits + second.bits > VJ_LOOK) second = (token){0, 0, 0};
    }
    table->ac[index] = pair(first, second);
  }
}

/* As many symbols as fit into the index, up to the end of a block. */
static void build_skip(vj_huffman *table, const uint16_t *lengths) {
  const int mask = (1 << VJ_SKIP_LOOK) - 1;
  uint16_t ones[1 << VJ_SKIP_LOOK];
  for (int index = 0; index <= mask; index++) {
    token t = first_token(lengths, index, VJ_SKIP_LOOK, 1);
    ones[index] = (uint16_t)(t.bits | t.advance << 4);
  }
  for (int index = 0; index <= mask; index++) {
    int bits = 0;
    int advance = 0;
    while (advance < VJ_END_OF_BLOCK) {
      int one = ones[index << bits & mask];
      int end = advance + (one >> 4);
      if (one == 0 || bits + (one & 15) > VJ_SKIP_LOOK) break;
      if (end >= 64 && end < VJ_END_OF_BLOCK) break; /* past the end of any block */
      bits += one & 15;
      advance = end;
    }
    table->skip[index] = (uint16_t)(bits | advance << 4);
  }
}

static int build(vj_huffman *table, const uint8_t *definition, int is_ac) {
  uint16_t lengths[1 << VJ_SKIP_LOOK];
  token tokens[1 << VJ_LOOK];
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
  for (int index = 0; index < 1 << VJ_LOOK; index++) tokens[index] = first_token(lengths, index, VJ_LOOK, 1);
  build_ac(table, tokens);
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
