/* Fuzz target: a file and a request, of which the last TRAILER bytes are the request.
 *
 * Built by clang with -fsanitize=fuzzer,address,undefined it is a libFuzzer program. With -DREPLAY it reads files that
 * the command line names instead, so that any compiler with AddressSanitizer can run a corpus.
 *
 * Beside memory errors it reports results that contradict each other: an accepted file must also be accepted as
 * verified, and a patch must not depend on which others are visible. With AddressSanitizer memory that was taken holds
 * other bytes each time, so that a result which depends on them is found, too. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "visible_jpeg.h"

enum { TRAILER = 16, MOST_PATCHES = 64 * 64 };

static const int32_t sizes[] = {16, 32, 48, 64, 80, 96, 112, 224};
static const int32_t patches[] = {16, 8, 4, 2, 1, 7, 14, 32};

static int read16(const uint8_t *p) { return p[0] << 8 | p[1]; }

/* About `share` of 256 patches, in an order that is not ascending. */
static int choose(int all, int share, int16_t *visible) {
  int count = 0;
  for (int i = all - 1; i >= 0; i--)
    if ((i * 167 + share) % 256 <= share) visible[count++] = (int16_t)i;
  return count;
}

static void fail(const char *what) {
  fprintf(stderr, "contradiction: %s\n", what);
  abort();
}

/* A patch is the same whether all patches are computed or some. */
static void compare_subset(vj_decoder *decoder, vj_request request, const uint8_t *some) {
  int row = request.size / request.patch;
  size_t bytes = (size_t)(3 * request.patch * request.patch);
  int16_t all[MOST_PATCHES];
  for (int i = 0; i < row * row; i++) all[i] = (int16_t)i;
  const int16_t *visible = request.visible;
  int count = request.count;
  request.visible = all;
  request.count = row * row;
  uint8_t *out = malloc(bytes * (size_t)(row * row));
  int reason = vj_patches(decoder, &request, out);
  /* Numbers of hidden blocks are not computed, and may be out of range. */
  if (reason != VJ_OK && reason != VJ_RANGE) fail("a file is refused if all patches are visible");
  for (int i = 0; i < count && reason == VJ_OK; i++)
    if (memcmp(some + bytes * (size_t)i, out + bytes * (size_t)visible[i], bytes) != 0)
      fail("a patch depends on others");
  free(out);
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t length) {
  static vj_decoder *decoder = NULL;
  static int16_t visible[MOST_PATCHES];
  if (length < TRAILER) return 0;
  if (decoder == NULL) decoder = vj_new();
  const uint8_t *trailer = input + length - TRAILER;
  length -= TRAILER;
  uint8_t *data = malloc(length + 1); /* its own memory, so that each byte past its end is reported */
  uint8_t *exact = data + 1;
  memcpy(exact, input, length);

  vj_request request = {.data = exact, .length = length};
  request.size = sizes[trailer[8] % 8];
  request.patch = patches[trailer[9] % 8];
  request.flags = trailer[10] & 7;
  int32_t side[2] = {64, 64};
  vj_size(exact, length, request.flags, side);
  for (int i = 0; i < 4; i++) request.box[i] = read16(trailer + 2 * i) % (side[i & 1] + 1);
  int row = request.size / request.patch;
  request.count = row * row > MOST_PATCHES ? row * row : choose(row * row, trailer[11], visible);
  request.visible = visible;
  size_t bytes = (size_t)(3 * request.patch * request.patch) * (size_t)(request.count > 0 ? request.count : 1);
  uint8_t *out = malloc(bytes);
  uint8_t *other = malloc(bytes);
  if (row <= 64 && vj_patches(decoder, &request, out) == VJ_OK) {
    int was_verified = request.flags & VJ_VERIFIED;
    request.flags ^= VJ_VERIFIED;
    int reason = vj_patches(decoder, &request, other);
    if (reason == VJ_OK && memcmp(out, other, bytes) != 0) fail("patches of a verified file differ");
    if (!was_verified && reason != VJ_OK) fail("an accepted file is refused as verified");
    request.flags &= ~VJ_VERIFIED;
    if (reason == VJ_OK) compare_subset(decoder, request, out);
  }
  free(other);
  free(out);
  free(data);
  return 0;
}

#ifdef REPLAY
int main(int count, char **names) {
  for (int i = 1; i < count; i++) {
    FILE *file = fopen(names[i], "rb");
    if (file == NULL) return 2;
    uint8_t *input = malloc(1 << 23);
    size_t length = fread(input, 1, 1 << 23, file);
    LLVMFuzzerTestOneInput(input, length);
    free(input);
    fclose(file);
  }
  printf("%d files\n", count - 1);
  return 0;
}
#endif
