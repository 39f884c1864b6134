#include "header.h"

#include <string.h>

/* Markers (T.81, table B.1). */
enum {
  SOF0 = 0xc0,
  DHT = 0xc4,
  JPG = 0xc8,
  DAC = 0xcc,
  SOF15 = 0xcf,
  SOI = 0xd8,
  SOS = 0xda,
  DQT = 0xdb,
  DRI = 0xdd,
  APP0 = 0xe0,
  APP1 = 0xe1,
  APP14 = 0xee,
  APP15 = 0xef,
  COM = 0xfe
};

/* What the segments before the scan say. */
typedef struct {
  vj_header *header;
  const uint8_t *quantisation[4];
  int quantisation_number[3]; /* of each component */
  int id[3];                  /* of each component */
  int has_jfif;
  int adobe_transform; /* -1: no Adobe segment */
  int flags;
} reading;

typedef struct {
  int marker;
  const uint8_t *data;
  int length;
} segment;

static int read16(const uint8_t *data) { return data[0] << 8 | data[1]; }

/* JFIF (version 1 only: libjpeg warns of others) makes the components YCbCr. */
static vj_reason read_app0(reading *state, segment s) {
  if (s.length < 5 || memcmp(s.data, "JFIF", 5) != 0) return VJ_OK;
  if (s.length < 14 || s.data[5] != 1) return VJ_SEGMENT;
  state->has_jfif = 1;
  return VJ_OK;
}

static vj_reason read_app14(reading *state, segment s) {
  if (s.length >= 12 && memcmp(s.data, "Adobe", 5) == 0) state->adobe_transform = s.data[11];
  return VJ_OK;
}

static vj_reason read_quantisation(reading *state, segment s) {
  while (s.length >= 65) {
    if (s.data[0] > 3) return VJ_SEGMENT; /* 16-bit values, or a number that does not exist */
    if (memchr(s.data + 1, 0, 64) != NULL) return VJ_QUANTISATION;
    state->quantisation[s.data[0]] = s.data + 1;
    s.data += 65;
    s.length -= 65;
  }
  return s.length == 0 ? VJ_OK : VJ_SEGMENT;
}

static vj_reason read_huffman(reading *state, segment s) {
  while (s.length >= 17) {
    int class = s.data[0] >> 4;
    int number = s.data[0] & 15;
    int count = 0;
    for (int i = 1; i <= 16; i++) count += s.data[i];
    if (class > 1 || number > 3 || count == 0 || count > 256 || s.length < 17 + count) return VJ_HUFFMAN;
    vj_huffman_source *table = class == 0 ? state->header->dc + number : state->header->ac + number;
    table->definition = s.data + 1;
    table->length = 16 + count;
    s.data += 17 + count;
    s.length -= 17 + count;
  }
  return s.length == 0 ? VJ_OK : VJ_SEGMENT;
}

static vj_reason read_restart_interval(reading *state, segment s) {
  if (s.length != 2) return VJ_SEGMENT;
  state->header->restart_interval = read16(s.data);
  return VJ_OK;
}

/* The sampling factors: 1 x 1 for all, or 2 x 1 or 2 x 2 for the first of three. The only component of a grey image is
 * not interleaved, so that its factors mean nothing (T.81, A.2.2). */
static vj_reason read_sampling(vj_header *header) {
  vj_component *c = header->component;
  if (header->components == 1) {
    c[0].horizontal = 1;
    c[0].vertical = 1;
  }
  header->horizontal = c[0].horizontal;
  header->vertical = c[0].vertical;
  for (int i = 1; i < header->components; i++)
    if (c[i].horizontal != 1 || c[i].vertical != 1) return VJ_SAMPLING;
  int is_plain = header->horizontal == 1 && header->vertical == 1;
  int is_halved = header->horizontal == 2 && (header->vertical == 1 || header->vertical == 2);
  return is_plain || is_halved ? VJ_OK : VJ_SAMPLING;
}

static vj_reason read_frame(reading *state, segment s) {
  vj_header *header = state->header;
  if (header->components != 0 || s.length < 6) return VJ_SEGMENT;
  int components = s.data[5];
  if (s.data[0] != 8) return VJ_PROCESS;
  if (components != 1 && components != 3) return VJ_COMPONENTS;
  if (s.length != 6 + 3 * components) return VJ_SEGMENT;
  header->height = read16(s.data + 1);
  header->width = read16(s.data + 3);
  header->components = components;
  if (header->width < VJ_MIN_SIDE || header->height < VJ_MIN_SIDE) return VJ_TOO_SMALL;
  if (header->width > VJ_MAX_SIDE || header->height > VJ_MAX_SIDE) return VJ_TOO_LARGE;
  if (header->width * header->height > VJ_MAX_PIXELS) return VJ_TOO_LARGE;
  for (int i = 0; i < components; i++) {
    const uint8_t *field = s.data + 6 + 3 * i;
    state->id[i] = field[0];
    header->component[i].horizontal = field[1] >> 4;
    header->component[i].vertical = field[1] & 15;
    if (header->component[i].horizontal > 4 || header->component[i].vertical > 4) return VJ_SAMPLING;
    if (header->component[i].horizontal == 0 || header->component[i].vertical == 0) return VJ_SAMPLING;
    state->quantisation_number[i] = field[2];
    if (field[2] > 3) return VJ_SEGMENT;
    for (int other = 0; other < i; other++)
      if (state->id[other] == state->id[i]) return VJ_COMPONENTS;
  }
  return read_sampling(header);
}

/* One scan with all components, all coefficients and full precision. */
static vj_reason read_scan(reading *state, segment s) {
  vj_header *header = state->header;
  int n = header->components;
  if (n == 0 || s.length != 4 + 2 * n) return VJ_SEGMENT;
  if (s.data[0] != n) return VJ_COMPONENTS;
  for (int i = 0; i < n; i++) {
    vj_component *c = header->component + i;
    const uint8_t *field = s.data + 1 + 2 * i;
    if (field[0] != state->id[i]) return VJ_COMPONENTS;
    c->dc_table = field[1] >> 4;
    c->ac_table = field[1] & 15;
    if (c->dc_table > 3 || c->ac_table > 3) return VJ_HUFFMAN;
    if (header->dc[c->dc_table].definition == NULL || header->ac[c->ac_table].definition == NULL) return VJ_HUFFMAN;
    c->quantisation = state->quantisation[state->quantisation_number[i]];
    if (c->quantisation == NULL) return VJ_QUANTISATION;
  }
  const uint8_t *spectral = s.data + 1 + 2 * n; /* first coefficient, last one, precision */
  if (spectral[0] != 0 || spectral[1] != 63 || spectral[2] != 0) return VJ_SEGMENT;
  return VJ_OK;
}

/* Whether three components are YCbCr, by libjpeg's rules (jdapimin.c): JFIF says so, else Adobe's segment, else the
 * ids 1, 2, 3. Other ids mean RGB, or a guess. */
static int is_ycc(const reading *state) {
  if (state->header->components == 1 || state->has_jfif) return 1;
  if (state->adobe_transform >= 0) return state->adobe_transform == 1;
  return state->id[0] == 1 && state->id[1] == 2 && state->id[2] == 3;
}

/* Whether a marker can be expected in the header of a file that is accepted. */
static vj_reason check_marker(int marker) {
  switch (marker) {
    case SOF0:
    case DHT:
    case SOS:
    case DQT:
    case DRI:
    case COM:
      return VJ_OK;
    case DAC:
      return VJ_PROCESS;
    case JPG:
      return VJ_MARKER;
  }
  if (marker >= APP0 && marker <= APP15) return VJ_OK;
  if (marker > SOF0 && marker <= SOF15) return VJ_PROCESS;
  return VJ_MARKER;
}

static vj_reason read_segment(reading *state, segment s) {
  switch (s.marker) {
    case APP0:
      return read_app0(state, s);
    case APP1:
      return state->flags & VJ_REFUSE_EXIF ? VJ_EXIF : VJ_OK;
    case APP14:
      return read_app14(state, s);
    case DQT:
      return read_quantisation(state, s);
    case DHT:
      return read_huffman(state, s);
    case DRI:
      return read_restart_interval(state, s);
    case SOF0:
      return read_frame(state, s);
    case SOS:
      return read_scan(state, s);
  }
  return VJ_OK; /* comments and other applications' data */
}

static int divide_up(int number, int divisor) { return (number + divisor - 1) / divisor; }

/* Sizes of components (T.81, A.1.1 and A.2.4). */
static void measure(vj_header *header) {
  header->mcus_x = divide_up(header->width, 8 * header->horizontal);
  header->mcus_y = divide_up(header->height, 8 * header->vertical);
  for (int i = 0; i < header->components; i++) {
    vj_component *c = header->component + i;
    c->blocks_x = header->mcus_x * c->horizontal;
    c->blocks_y = header->mcus_y * c->vertical;
    c->width = divide_up(header->width * c->horizontal, header->horizontal);
    c->height = divide_up(header->height * c->vertical, header->vertical);
  }
}

vj_reason vj_read_header(const uint8_t *data, size_t length, int flags, vj_header *header) {
  if (length < 4 || data[0] != 0xff || data[1] != SOI) return VJ_NOT_JPEG;
  if (length > VJ_MAX_BYTES) return VJ_TOO_LARGE;
  memset(header, 0, sizeof *header);
  reading state = {.header = header, .adobe_transform = -1, .flags = flags};
  size_t at = 2;
  segment s;
  do {
    if (length - at < 4) return VJ_TRUNCATED;
    if (data[at] != 0xff) return VJ_MARKER;
    s.marker = data[at + 1];
    vj_reason reason = check_marker(s.marker);
    if (reason != VJ_OK) return reason;
    int size = read16(data + at + 2); /* counts its own two bytes */
    if (size < 2) return VJ_SEGMENT;
    if (length - at - 2 < (size_t)size) return VJ_TRUNCATED;
    s.data = data + at + 4;
    s.length = size - 2;
    reason = read_segment(&state, s);
    if (reason != VJ_OK) return reason;
    at += 2 + size;
  } while (s.marker != SOS);
  if (!is_ycc(&state)) return VJ_COLOUR;
  measure(header);
  header->scan = data + at;
  header->end = data + length;
  return VJ_OK;
}
