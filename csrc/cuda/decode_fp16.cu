// The decode kernels for fp16 activations. Blocks of 32 are rare: even for one or two tokens they take the kernel for
// eight.
#include "decode.h"
#include "epilogue.h"
#include "launch.h"

namespace fastlora {
namespace gpu {

const Kernels kHalfKernels = {{{decode_products<Half, 2, false>, decode_products<Half, 8, true>},
                               {decode_products<Half, 8, false>, decode_products<Half, 8, true>},
                               {decode_products<Half, 16, false>, decode_products<Half, 16, true>}},
                              {decode_epilogue<Half, 2>, decode_epilogue<Half, 8>, decode_epilogue<Half, 16>}};

}  // namespace gpu
}  // namespace fastlora
