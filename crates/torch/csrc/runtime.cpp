#include <dlfcn.h>

#include <algorithm>
#include <string>

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>

#include "duet_torch.h"
#include "error.hpp"

extern "C" {

int32_t duet_deterministic(bool on) {
  return duet::guarded(-1, [&] {
    at::globalContext().setDeterministicAlgorithms(on, /*warn_only=*/false);
    // Filling fresh memory with NaN finds bugs but costs a pass over every new tensor.
    at::globalContext().setDeterministicFillUninitializedMemory(false);
    at::globalContext().setBenchmarkCuDNN(false);
    return 0;
  });
}

int64_t duet_library_folder(char* out, size_t capacity) {
  return duet::guarded(int64_t{-1}, [&] {
    Dl_info info{};
    const auto* symbol = reinterpret_cast<const void*>(&at::globalContext);
    // `globalContext` may be inlined or resolved through this program; a data symbol that only
    // libtorch_cpu defines is asked for by name instead.
    if (void* own = dlsym(RTLD_DEFAULT, "_ZN2at13globalContextEv")) symbol = own;
    TORCH_CHECK(dladdr(symbol, &info) != 0 && info.dli_fname != nullptr,
                "cannot tell where libtorch_cpu was loaded from");
    const std::string file(info.dli_fname);
    const auto slash = file.rfind('/');
    const std::string folder = slash == std::string::npos ? "." : file.substr(0, slash);
    std::copy_n(folder.begin(), std::min(capacity, folder.size()), out);
    return static_cast<int64_t>(folder.size());
  });
}

uint8_t* duet_cpu_data(DuetTensor tensor, size_t* bytes) {
  return duet::guarded(static_cast<uint8_t*>(nullptr), [&] {
    auto& inner = *static_cast<at::Tensor*>(tensor);
    TORCH_CHECK(inner.device().is_cpu() && inner.is_contiguous(), "not a contiguous CPU tensor");
    *bytes = inner.nbytes();
    return static_cast<uint8_t*>(inner.data_ptr());
  });
}
}
