#include <algorithm>
#include <memory>

#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include "duet_torch.h"
#include "error.hpp"

namespace {

// Told of every allocation of the thread, and of the freeing of what was allocated under it.
struct Counter : c10::MemoryReportingInfoBase {
  int64_t now = 0;
  int64_t peak = 0;

  void reportMemoryUsage(void*, int64_t size, size_t, size_t, c10::Device) override {
    now += size;
    peak = std::max(peak, now);
  }
  bool memoryProfilingEnabled() const override { return true; }
};

}  // namespace

struct DuetMeter {
  std::shared_ptr<Counter> counter = std::make_shared<Counter>();
  c10::DebugInfoGuard guard{c10::DebugInfoKind::PROFILER_STATE, counter};
};

extern "C" DuetMeter* duet_meter_new() {
  return duet::guarded(static_cast<DuetMeter*>(nullptr), [] { return new DuetMeter(); });
}

extern "C" void duet_meter_read(const DuetMeter* meter, int64_t* now, int64_t* peak) {
  *now = meter->counter->now;
  *peak = meter->counter->peak;
}

extern "C" void duet_meter_free(DuetMeter* meter) { delete meter; }
