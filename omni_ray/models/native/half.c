/* Products and attention in bf16, where the processor multiplies pairs of it. */
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HALF
#include "products.c"
#include "attention.c"
#include "layers.c"
#endif
