/* The header of a JPEG file: everything up to the entropy-coded data of its only scan. */
#ifndef VJ_HEADER_H
#define VJ_HEADER_H

#include "visible_jpeg.h"

/* A Huffman table as the file defines it (T.81, B.2.4.2): 16 counts, then the symbols. */
typedef struct {
  const uint8_t *definition; /* NULL: not defined */
  int length;
} vj_huffman_source;

typedef struct {
  int horizontal, vertical;    /* sampling factors H and V */
  int dc_table, ac_table;      /* numbers of the Huffman tables */
  const uint8_t *quantisation; /* 64 values in zigzag order */
  int blocks_x, blocks_y;      /* blocks of 8 x 8 that the scan holds, with the padding of the last MCUs */
  int width, height;           /* samples that belong to the image */
} vj_component;

typedef struct {
  int width, height;
  int components;           /* 1 or 3 */
  int horizontal, vertical; /* largest sampling factors: 1 or 2 */
  int mcus_x, mcus_y;
  int restart_interval; /* MCUs between restart markers; 0: none */
  vj_component component[3];
  vj_huffman_source dc[4];
  vj_huffman_source ac[4];
  const uint8_t *scan; /* first byte of entropy-coded data */
  const uint8_t *end;  /* of the file */
} vj_header;

/* Reads the header, and refuses all that later steps do not expect. Also refuses what libjpeg would read with a
 * warning. `flags`: VJ_REFUSE_EXIF counts. */
vj_reason vj_read_header(const uint8_t *data, size_t length, int flags, vj_header *header);

#endif
