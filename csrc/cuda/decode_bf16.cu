// The decode kernels for bf16 activations. Blocks of 32 are rare: even for one or two tokens they take the kernel for
// eight.
#include "decode.h"
#include "epilogue.h"
#include "launch.h"

namespace fastlora {
namespace gpu {

const Kernels kBf16Kernels = {{{decode_products<Bf16, 2, false>, decode_products<Bf16, 8, true>},
                               {decode_products<Bf16, 8, false>, decode_products<Bf16, 8, true>},
                               {decode_products<Bf16, 16, false>, decode_products<Bf16, 16, true>}},
                              {decode_epilogue<Bf16, 2>, decode_epilogue<Bf16, 8>, decode_epilogue<Bf16, 16>}};

}  // namespace gpu
}  // namespace fastlora
