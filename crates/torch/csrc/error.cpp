#include "error.hpp"

#include "duet_torch.h"

namespace {
thread_local std::string last_error;
}

namespace duet {

void remember_error(std::string text) noexcept { last_error = std::move(text); }

}  // namespace duet

extern "C" const char* duet_last_error() { return last_error.c_str(); }
