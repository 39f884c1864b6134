#include "visible_jpeg.h"

#include <stdlib.h>
#include <string.h>

#include "arena.h"
#include "colour.h"
#include "filter.h"
#include "header.h"
#include "huffman.h"
#include "resize.h"
#include "scan.h"

const char *vj_version(void) { return VJ_VERSION; }

const char *vj_text(int reason) {
  static const char *const texts[] = {
#define VJ_TEXT(name, text) text,
      VJ_REASONS(VJ_TEXT)
#undef VJ_TEXT
  };
  if (reason < 0 || (size_t)reason >= sizeof texts / sizeof *texts) return "unknown";
  return texts[reason];
}

int vj_size(const uint8_t *data, size_t length, int32_t flags, int32_t side[2]) {
  vj_header header;
  vj_reason reason = vj_read_header(data, length, flags, &header);
  if (reason != VJ_OK) return reason;
  side[0] = header.width;
  side[1] = header.height;
  return VJ_OK;
}

#if VJ_X86

/* Memory for the largest image: planes with their margins, one segment, a strip of pixels. Planes: three times the
 * pixels, rounded up to MCUs, and a margin per column. A strip's rectangle that does not fit is refused. */
enum { MEMORY = 3 * (VJ_MAX_PIXELS + (VJ_MAX_SIDE + 16) * (2 * VJ_PLANE_MARGIN + 32)) + VJ_MAX_BYTES + (24 << 20) };

struct vj_decoder {
  vj_arena arena;
  vj_huffman_cache huffman;
  vj_filter_cache filters;
  int16_t place[VJ_MAX_ROW * VJ_MAX_ROW]; /* of each patch among the visible ones, or -1 */
};

/* One request while it is computed. */
typedef struct {
  const vj_request *request;
  const vj_filter *across; /* of columns */
  const vj_filter *down;   /* of rows */
  int row;                 /* patches in a row of the view */
  const int16_t *place;
  vj_header header;
  vj_picture picture;
} job;

typedef struct {
  int first, stop;
} range;

int vj_supported(void) {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}

vj_decoder *vj_new(void) {
  vj_decoder *decoder = calloc(1, sizeof *decoder);
  if (decoder == NULL) return NULL;
  void *memory = NULL;
  if (posix_memalign(&memory, 64, MEMORY) != 0) {
    free(decoder);
    return NULL;
  }
  vj_arena_init(&decoder->arena, memory, MEMORY);
  return decoder;
}

void vj_free(vj_decoder *decoder) {
  if (decoder == NULL) return;
#if VJ_ASAN
  ASAN_UNPOISON_MEMORY_REGION(decoder->arena.memory, decoder->arena.size);
#endif
  free(decoder->arena.memory);
  free(decoder);
}

/* Whether the numbers of a request are in range; `place` gets the places of its patches. */
static int read_request(const vj_request *request, int16_t *place) {
  if (request->size < 1 || request->size > VJ_MAX_SIZE) return 0;
  if (request->patch < 1 || request->patch > VJ_MAX_PATCH || request->size % request->patch != 0) return 0;
  int row = request->size / request->patch;
  if (row > VJ_MAX_ROW || request->count < 1 || request->count > row * row) return 0;
  memset(place, -1, (size_t)(row * row) * sizeof *place);
  for (int i = 0; i < request->count; i++) {
    int index = request->visible[i];
    if (index < 0 || index >= row * row || place[index] >= 0) return 0;
    place[index] = (int16_t)i;
  }
  return 1;
}

static int is_in_image(const int32_t box[4], const vj_header *header) {
  if (box[0] < 0 || box[0] >= box[2] || box[2] > header->width) return 0;
  return box[1] >= 0 && box[1] < box[3] && box[3] <= header->height;
}

/* Memory and tables of the planes. */
static vj_reason prepare(job *j, vj_decoder *decoder) {
  const vj_header *header = &j->header;
  vj_arena *arena = &decoder->arena;
  size_t mcus = (size_t)header->mcus_x * (size_t)header->mcus_y;
  vj_arena_reset(arena);
  j->picture.header = header;
  j->picture.is_needed = vj_take(arena, mcus);
  if (j->picture.is_needed == NULL) return VJ_TOO_LARGE;
  memset(j->picture.is_needed, 0, mcus);
  for (int i = 0; i < header->components; i++) {
    const vj_component *c = header->component + i;
    vj_plane *plane = j->picture.plane + i;
    size_t blocks = (size_t)c->blocks_x * (size_t)c->blocks_y;
    plane->stride = (size_t)c->blocks_y * 8 + VJ_PLANE_MARGIN;
    uint8_t *memory = vj_take(arena, VJ_PLANE_MARGIN + plane->stride * (size_t)c->blocks_x * 8);
    plane->is_needed = vj_take(arena, blocks);
    if (memory == NULL || plane->is_needed == NULL) return VJ_TOO_LARGE;
    plane->pixels = memory + VJ_PLANE_MARGIN;
    memset(plane->is_needed, 0, blocks);
    plane->blocks_x = c->blocks_x;
    plane->horizontal = c->horizontal;
    plane->vertical = c->vertical;
    plane->width = c->width;
    plane->height = c->height;
    for (int k = 0; k < 64; k++) plane->quantisation[vj_zigzag[k]] = c->quantisation[k];
    plane->dc = vj_huffman_table(&decoder->huffman, header->dc[c->dc_table], 0);
    plane->ac = vj_huffman_table(&decoder->huffman, header->ac[c->ac_table], 1);
    if (plane->dc == NULL || plane->ac == NULL) return VJ_HUFFMAN;
  }
  return VJ_OK;
}

/* Inputs that outputs `first` .. `first` + `count` - 1 of a filter use. */
static range inputs_of(const vj_filter *filter, int first, int count, int is_mirrored) {
  if (is_mirrored) first = filter->outputs - first - count;
  range r = {filter->first[first], 0};
  for (int i = first; i < first + count; i++) {
    int stop = filter->first[i] + filter->length[i];
    if (stop > r.stop) r.stop = stop;
  }
  return r;
}

/* Columns of the image that columns `first` .. `first` + `count` - 1 of the view use. */
static range columns_of(const job *j, int first, int count) {
  range r = inputs_of(j->across, first, count, j->request->flags & VJ_MIRRORED);
  return (range){r.first + j->request->box[0], r.stop + j->request->box[0]};
}

static range rows_of(const job *j, int first, int count) {
  range r = inputs_of(j->down, first, count, 0);
  return (range){r.first + j->request->box[1], r.stop + j->request->box[1]};
}

/* Blocks of a component with the samples that pixels `r` of the image use. Upsampling uses one sample more on each
 * side. */
static range blocks_of(range r, int is_halved, int samples) {
  int first = r.first;
  int last = r.stop - 1;
  if (is_halved) {
    first = (first >> 1) - 1;
    last = (last >> 1) + 1;
    if (first < 0) first = 0;
    if (last >= samples) last = samples - 1;
  }
  return (range){first >> 3, (last >> 3) + 1};
}

static void mark(job *j, range columns, range rows) {
  const vj_header *header = &j->header;
  for (int i = 0; i < header->components; i++) {
    vj_plane *plane = j->picture.plane + i;
    range x = blocks_of(columns, plane->horizontal < header->horizontal, plane->width);
    range y = blocks_of(rows, plane->vertical < header->vertical, plane->height);
    int mcu = x.first / plane->horizontal;
    int mcus = (x.stop - 1) / plane->horizontal + 1 - mcu;
    for (int row = y.first; row < y.stop; row++) {
      memset(plane->is_needed + (size_t)row * (size_t)plane->blocks_x + x.first, 1, (size_t)(x.stop - x.first));
      memset(j->picture.is_needed + (size_t)(row / plane->vertical) * (size_t)header->mcus_x + mcu, 1, (size_t)mcus);
    }
  }
}

static void mark_visible(job *j) {
  int patch = j->request->patch;
  range columns[VJ_MAX_ROW];
  range rows[VJ_MAX_ROW];
  for (int i = 0; i < j->row; i++) {
    columns[i] = columns_of(j, i * patch, patch);
    rows[i] = rows_of(j, i * patch, patch);
  }
  for (int i = 0; i < j->request->count; i++) {
    int index = j->request->visible[i];
    mark(j, columns[index % j->row], rows[index / j->row]);
  }
}

/* Buffers of a strip: columns of the view that are computed together, one patch or less wide. */
typedef struct {
  int channels;
  uint8_t *pixels; /* of the image, by channel, column and row */
  size_t channel_size;
  uint8_t *columns; /* of one channel, resized across: VJ_STRIP columns */
  uint8_t *rows;    /* the same as rows, by channel */
  size_t rows_size; /* bytes of a channel */
  uint8_t *patch;   /* of each channel, resized down: rows of VJ_STRIP pixels */
} strip;

static int round_up(int number, int step) { return (number + step - 1) / step * step; }

/* Room for the widest strip and the tallest run of patches. */
static vj_reason take_strip(strip *s, const job *j, vj_arena *arena) {
  int patch = j->request->patch;
  int widest = 0;
  for (int first = 0; first < j->request->size; first += patch)
    for (int part = 0; part < patch; part += VJ_STRIP) {
      int count = patch - part < VJ_STRIP ? patch - part : VJ_STRIP;
      range r = columns_of(j, first + part, count);
      if (r.stop - r.first > widest) widest = r.stop - r.first;
    }
  int tallest = round_up(j->request->box[3] - j->request->box[1] + 1, 16);
  s->channels = j->header.components;
  s->channel_size = vj_rectangle_bytes(widest, tallest);
  s->rows_size = (size_t)(tallest + 16) * VJ_STRIP;
  s->pixels = vj_take(arena, s->channel_size * (size_t)s->channels);
  s->columns = vj_take(arena, (size_t)tallest * VJ_STRIP);
  s->rows = vj_take(arena, s->rows_size * (size_t)s->channels);
  s->patch = vj_take(arena, (size_t)(3 * VJ_MAX_PATCH * VJ_STRIP));
  if (s->pixels == NULL || s->columns == NULL || s->rows == NULL || s->patch == NULL) return VJ_TOO_LARGE;
  return VJ_OK;
}

/* Patches `first` .. `stop` - 1 of a column of patches, of which columns `part` .. `part` + `count` - 1. */
VJ_AVX2 static void compute_run(const job *j, strip *s, int column, int first, int stop, int part, int count,
                                uint8_t *out) {
  int patch = j->request->patch;
  range across = columns_of(j, column * patch + part, count);
  range down = rows_of(j, first * patch, (stop - first) * patch);
  int top = down.first & ~1; /* even: chroma rows belong to two rows */
  int rows = round_up(down.stop - top, 16);
  vj_rectangle(&j->picture, across.first, across.stop, top, rows, s->pixels, s->channel_size);
  for (int c = 0; c < s->channels; c++) {
    vj_horizontal(s->pixels + (size_t)c * s->channel_size, rows, across.first - j->request->box[0], j->across,
                  column * patch + part, count, j->request->flags & VJ_MIRRORED, s->columns);
    for (int row = 0; row < rows; row += 16)
      vj_transpose16(s->columns + row, rows, s->rows + (size_t)c * s->rows_size + row * VJ_STRIP);
  }
  for (int i = first; i < stop; i++) {
    uint8_t *channel[3] = {s->patch, s->patch, s->patch}; /* grey: three times the same */
    for (int c = 0; c < s->channels; c++) {
      channel[c] = s->patch + c * VJ_MAX_PATCH * VJ_STRIP;
      vj_vertical(s->rows + (size_t)c * s->rows_size, top - j->request->box[1], j->down, i * patch, patch, channel[c]);
    }
    size_t place = (size_t)j->place[i * j->row + column];
    size_t row_bytes = (size_t)(3 * patch);
    uint8_t *to = out + place * row_bytes * (size_t)patch + 3 * part;
    vj_interleave_rgb(channel[0], channel[1], channel[2], patch, count, to, row_bytes);
  }
}

/* All visible patches. Those above each other are computed together. */
static void compute(const job *j, strip *s, uint8_t *out) {
  int patch = j->request->patch;
  for (int column = 0; column < j->row; column++)
    for (int first = 0; first < j->row; first++) {
      if (j->place[first * j->row + column] < 0) continue;
      int stop = first;
      while (stop < j->row && j->place[stop * j->row + column] >= 0) stop++;
      for (int part = 0; part < patch; part += VJ_STRIP) {
        int count = patch - part < VJ_STRIP ? patch - part : VJ_STRIP;
        compute_run(j, s, column, first, stop, part, count, out);
      }
      first = stop;
    }
}

int vj_patches(vj_decoder *decoder, const vj_request *request, uint8_t *out) {
  if (!vj_supported()) return VJ_NO_AVX2;
  if (!read_request(request, decoder->place)) return VJ_REQUEST;
  job j;
  strip s;
  memset(&j, 0, sizeof j);
  j.request = request;
  j.row = request->size / request->patch;
  j.place = decoder->place;
  vj_reason reason = vj_read_header(request->data, request->length, request->flags, &j.header);
  if (reason != VJ_OK) return reason;
  if (!is_in_image(request->box, &j.header)) return VJ_REQUEST;
  reason = prepare(&j, decoder);
  if (reason != VJ_OK) return reason;
  const vj_filter *filters[2];
  vj_get_filters(&decoder->filters, request->box[2] - request->box[0], request->box[3] - request->box[1], request->size,
                 filters);
  j.across = filters[0];
  j.down = filters[1];
  reason = take_strip(&s, &j, &decoder->arena);
  if (reason != VJ_OK) return reason;
  uint8_t *segment = vj_take(&decoder->arena, (size_t)(j.header.end - j.header.scan) + VJ_SEGMENT_MARGIN);
  if (segment == NULL) return VJ_TOO_LARGE;
  mark_visible(&j);
  reason = vj_read_scan(&j.picture, segment, request->flags & VJ_VERIFIED);
  if (reason != VJ_OK) return reason;
  vj_extend_chroma(&j.picture);
  compute(&j, &s, out);
  return VJ_OK;
}

#else

struct vj_decoder {
  int unused;
};

int vj_supported(void) { return 0; }
vj_decoder *vj_new(void) { return calloc(1, sizeof(vj_decoder)); }
void vj_free(vj_decoder *decoder) { free(decoder); }

int vj_patches(vj_decoder *decoder, const vj_request *request, uint8_t *out) {
  (void)decoder;
  (void)request;
  (void)out;
  return VJ_NO_AVX2;
}

#endif
