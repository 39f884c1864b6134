/* Patches of a masked view, straight from the bytes of a JPEG file.
 *
 * `vj_patches` decodes the entropy code of the whole file, but computes inverse DCT, upsampling, colour and resize only
 * where visible patches need them. Its patches have the bits of libjpeg-turbo's default decoding (integer IDCT "islow",
 * fancy upsampling) followed by PyTorch's antialiased bicubic resize of uint8 pixels.
 *
 * It refuses whatever it does not reproduce bit by bit, and all files that are not flawless: the caller then decodes
 * the file in another way. A refusal is not an error.
 *
 * A decoder holds all memory, which `vj_new` takes once. Use one decoder per thread.
 */
#ifndef VISIBLE_JPEG_H
#define VISIBLE_JPEG_H

#include <stddef.h>
#include <stdint.h>

#define VJ_VERSION "2.0.0"

/* Why a file or a request is refused: name, text. */
#define VJ_REASONS(X)                                                      \
  X(OK, "accepted")                                                        \
  X(NO_AVX2, "the processor has no AVX2")                                  \
  X(REQUEST, "the request is outside of the limits or of the image")       \
  X(NOT_JPEG, "not a JPEG file")                                           \
  X(TRUNCATED, "the file ends early")                                      \
  X(TOO_LARGE, "larger than the limits")                                   \
  X(TOO_SMALL, "smaller than 16 pixels")                                   \
  X(MARKER, "a marker that is not expected")                               \
  X(SEGMENT, "a segment with a wrong length or value")                     \
  X(PROCESS, "not baseline: progressive, arithmetic, lossless or 12 bits") \
  X(COMPONENTS, "neither grey nor three components of one scan")           \
  X(SAMPLING, "a sampling other than 4:4:4, 4:2:2 and 4:2:0")              \
  X(COLOUR, "components that are not YCbCr")                               \
  X(EXIF, "metadata that may turn the image")                              \
  X(QUANTISATION, "a missing quantisation table, or one with a zero")      \
  X(HUFFMAN, "a missing or invalid Huffman table")                         \
  X(CODE, "a wrong code or coefficient in the scan")                       \
  X(LENGTH, "a segment of the scan is too short or too long")              \
  X(RESTART, "a restart marker is missing or out of order")                \
  X(END, "the scan is not followed by the end of the image")               \
  X(RANGE, "coefficients outside of the range of 8-bit images")

typedef enum {
#define VJ_NAME(name, text) VJ_##name,
  VJ_REASONS(VJ_NAME)
#undef VJ_NAME
} vj_reason;

/* Limits. All memory of a decoder follows from them. */
enum {
  VJ_MIN_SIDE = 16,        /* of an image: below, libjpeg upsamples otherwise */
  VJ_MAX_SIDE = 4096,      /* of an image */
  VJ_MAX_PIXELS = 1 << 22, /* of an image */
  VJ_MAX_BYTES = 1 << 22,  /* of a file */
  VJ_MAX_SIZE = 1024,      /* side of a view */
  VJ_MAX_PATCH = 64,       /* side of a patch */
  VJ_MAX_ROW = 64          /* patches in a row of a view */
};

/* Flags of a request. */
enum {
  VJ_MIRRORED = 1,    /* mirror the view, left to right, after the resize */
  VJ_REFUSE_EXIF = 2, /* refuse a file with an APP1 segment, which may hold an orientation */
  VJ_VERIFIED = 4     /* the file is known to be flawless: intervals between restart markers that no visible patch
                         needs are not decoded */
};

typedef struct {
  const uint8_t *data; /* the file */
  size_t length;
  int32_t box[4];         /* left, top, right, bottom of the crop, in pixels */
  int32_t size;           /* side of the view, to which the crop is resized */
  int32_t patch;          /* side of a patch; divides size */
  const int16_t *visible; /* indices of patches, row by row; none twice */
  int32_t count;
  int32_t flags;
} vj_request;

typedef struct vj_decoder vj_decoder;

#define VJ_API __attribute__((visibility("default")))

VJ_API const char *vj_version(void);

/* Whether this processor can run `vj_patches`. */
VJ_API int vj_supported(void);

/* The text of a vj_reason. */
VJ_API const char *vj_text(int reason);

/* A decoder, or NULL if there is no memory. About 60 MB of address space; pages are used as images need them. */
VJ_API vj_decoder *vj_new(void);
VJ_API void vj_free(vj_decoder *decoder);

/* Width and height of a file whose header is accepted, in `side`. Returns a vj_reason. */
VJ_API int vj_size(const uint8_t *data, size_t length, int32_t flags, int32_t side[2]);

/* The visible patches, each patch * patch * 3 bytes by row, column and channel (RGB), in the order of `visible`.
 * `out` has room for exactly these; its content is undefined after a refusal. Returns a vj_reason. */
VJ_API int vj_patches(vj_decoder *decoder, const vj_request *request, uint8_t *out);

#endif
