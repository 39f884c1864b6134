/* Entropy decoding of a scan, and the inverse DCT of the blocks that are needed. */
#ifndef VJ_SCAN_H
#define VJ_SCAN_H

#include "arena.h"
#include "header.h"
#include "huffman.h"

/* Decoded samples of a component, column by column: sample (x, y) is `pixels[x * stride + y]`. */
typedef struct {
  uint8_t *pixels;
  size_t stride;
  uint8_t *is_needed; /* blocks_x * blocks_y flags, row by row */
  int blocks_x;
  int horizontal, vertical; /* blocks in an MCU */
  int width, height;        /* samples that belong to the image */
  const vj_huffman *dc;
  const vj_huffman *ac;
  int16_t quantisation[64] __attribute__((aligned(32))); /* natural order */
} vj_plane;

typedef struct {
  const vj_header *header;
  vj_plane plane[3];
  uint8_t *is_needed; /* by MCU: whether a block of it is */
} vj_picture;

enum {
  VJ_BLOCK_BYTES = 64 * 27 / 8 + 16, /* the code of a block is shorter, see bits.h */
  VJ_PLANE_MARGIN = 64,              /* bytes before the first column, and after each: later steps read whole vectors */
  VJ_SEGMENT_MARGIN = 10 * VJ_BLOCK_BYTES /* bytes after a segment: an MCU has at most six blocks */
};

/* Index in the 8 x 8 block of each coefficient in zigzag order (T.81, figure A.6). Later indices, which an advance past
 * the end of the block reaches, lead to element 64, which nothing reads. */
extern const uint8_t vj_zigzag[64 + 256];

/* Decodes the scan. `segment` has room for all its bytes and VJ_SEGMENT_MARGIN, in which any bytes may lie: a segment
 * that ends early is refused, whatever they say. With `is_verified`, restart intervals without a needed MCU are passed
 * over; otherwise each code of the scan is checked. */
vj_reason vj_read_scan(const vj_picture *picture, uint8_t *segment, int is_verified);

#endif
