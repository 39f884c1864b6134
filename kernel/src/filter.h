/* Weights of a resize, as PyTorch and Pillow compute them for uint8 pixels: bicubic with a = -0.5, antialiased, in
 * 16-bit fixed point. */
#ifndef VJ_FILTER_H
#define VJ_FILTER_H

#include "visible_jpeg.h"

/* The resize of one dimension. Output i is the sum of `weights[i * taps + k]` times input `first[i] + k`, k from 0 to
 * `length[i]` - 1, plus half, shifted right by `precision`. Weights from `length[i]` to `taps` - 1 are 0. */
typedef struct {
  int outputs;
  int taps; /* even */
  int precision;
  const int16_t *weights;
  const int16_t *first;
  const int16_t *length;
} vj_filter;

enum { VJ_FILTER_BYTES = 8 << 20 };

/* Filters by number of inputs. Crops have a few hundred sizes, so that most are here after some thousand images. */
typedef struct {
  int outputs; /* of all filters in the cache */
  size_t used;
  int32_t place[VJ_MAX_SIDE + 1]; /* by inputs: index into `filters` plus 1, or 0 */
  int count;
  vj_filter filters[VJ_MAX_SIDE];
  double scratch[2 * VJ_MAX_SIDE + 8];
  uint8_t memory[VJ_FILTER_BYTES] __attribute__((aligned(64)));
} vj_filter_cache;

/* Filters for both dimensions of a crop, valid until the next call. */
void vj_get_filters(vj_filter_cache *cache, int width, int height, int outputs, const vj_filter *filters[2]);

#endif
