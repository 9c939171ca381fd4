// The CPU runner's runtime, one translation unit so that the hot paths inline into each other.
#include "runtime.h"

#include "warp_ops.cpp"

#include "barriers.cpp"

#include "blocks.cpp"

#include "signals.cpp"

#include "workers.cpp"

#ifdef CUDA_HOST_WATCH
#include "watch.cpp"
#endif

namespace cuda_host {
__attribute__((tls_model("initial-exec"))) __thread Lane* current;
__attribute__((tls_model("initial-exec"))) __thread Block* current_block;
}  // namespace cuda_host
