// pagemgr_abi.h for C++ and CUDA: with what it needs before it, and its functions visible outside a library that hides
// everything else.
#pragma once

#include <cstdint>

#pragma GCC visibility push(default)
extern "C" {
#include "pagemgr_abi.h"
}
#pragma GCC visibility pop
