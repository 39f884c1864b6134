/* The memory of a decoder, from which each image takes what it needs. */
#ifndef VJ_ARENA_H
#define VJ_ARENA_H

#include <stddef.h>
#include <stdint.h>

#include "platform.h"
#if VJ_ASAN
#include <sanitizer/asan_interface.h>
#endif

typedef struct {
  uint8_t *memory;
  size_t size;
  size_t used;
} vj_arena;

/* With AddressSanitizer, bytes that are not taken cannot be touched. */
static inline void vj_arena_init(vj_arena *arena, uint8_t *memory, size_t size) {
  arena->memory = memory;
  arena->size = size;
  arena->used = 0;
#if VJ_ASAN
  ASAN_POISON_MEMORY_REGION(memory, size);
#endif
}

/* Free everything. */
static inline void vj_arena_reset(vj_arena *arena) {
#if VJ_ASAN
  ASAN_POISON_MEMORY_REGION(arena->memory, arena->used);
#endif
  arena->used = 0;
}

/* `size` bytes at a multiple of 64, of unknown content; NULL if there is no room. */
static inline void *vj_take(vj_arena *arena, size_t size) {
  size_t start = (arena->used + 63) & ~(size_t)63;
  if (start > arena->size || arena->size - start < size + 64) return NULL;
  arena->used = start + size;
#if VJ_ASAN
  arena->used += 64; /* a gap */
  ASAN_UNPOISON_MEMORY_REGION(arena->memory + start, size);
  for (size_t i = 0; i < size; i++) arena->memory[start + i] = (uint8_t)(i * 31 + arena->used); /* not what was there */
#endif
  return arena->memory + start;
}

#endif
