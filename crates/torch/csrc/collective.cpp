#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "duet_torch.h"
#include "error.hpp"

using std::chrono::milliseconds;

struct DuetStore {
  c10::intrusive_ptr<c10d::TCPStore> inner;
};

struct DuetGroup {
  c10::intrusive_ptr<c10d::ProcessGroupGloo> inner;
};

// What a waiting thread sleeps on. Shared with the completion callback, which may come after the
// handle is gone.
struct Completion {
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
};

struct DuetWork {
  c10::intrusive_ptr<c10d::Work> inner;
  std::shared_ptr<Completion> completion;
};

namespace {

at::Tensor& tensor_of(DuetTensor tensor) {
  TORCH_CHECK(tensor != nullptr, "a null tensor");
  auto& inner = *static_cast<at::Tensor*>(tensor);
  TORCH_CHECK(inner.device().is_cpu() && inner.is_contiguous(),
              "collectives of Gloo take contiguous CPU tensors");
  return inner;
}

DuetWork* started(c10::intrusive_ptr<c10d::Work> work) {
  auto completion = std::make_shared<Completion>();
  work->getFuture()->addCallback([completion](c10::ivalue::Future&) {
    std::lock_guard<std::mutex> lock(completion->mutex);
    completion->done = true;
    completion->changed.notify_all();
  });
  return new DuetWork{std::move(work), std::move(completion)};
}

DuetWork* const no_work = nullptr;

}  // namespace

extern "C" {

DuetStore* duet_store_new(const char* host, uint16_t port, bool server, int64_t timeout_ms) {
  return duet::guarded(static_cast<DuetStore*>(nullptr), [&] {
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = server;
    options.waitWorkers = false;
    options.timeout = milliseconds(timeout_ms);
    return new DuetStore{c10::make_intrusive<c10d::TCPStore>(std::string(host), options)};
  });
}

int32_t duet_store_port(DuetStore* store) {
  return duet::guarded(-1, [&] { return static_cast<int32_t>(store->inner->getPort()); });
}

int32_t duet_store_set(DuetStore* store, const char* key, const uint8_t* data, size_t len) {
  return duet::guarded(-1, [&] {
    store->inner->set(std::string(key), std::vector<uint8_t>(data, data + len));
    return 0;
  });
}

int32_t duet_store_has(DuetStore* store, const char* key) {
  return duet::guarded(-1, [&] { return store->inner->check({std::string(key)}) ? 1 : 0; });
}

int64_t duet_store_get(DuetStore* store, const char* key, int64_t timeout_ms, uint8_t* out,
                       size_t capacity) {
  return duet::guarded(int64_t{-1}, [&] {
    store->inner->wait({std::string(key)}, milliseconds(timeout_ms));
    const auto value = store->inner->get(std::string(key));
    std::copy_n(value.begin(), std::min(capacity, value.size()), out);
    return static_cast<int64_t>(value.size());
  });
}

void duet_store_free(DuetStore* store) {
  duet::guarded(0, [&] {
    delete store;
    return 0;
  });
}

DuetGroup* duet_group_new(DuetStore* store, const char* prefix, const char* bind_host, int32_t rank,
                          int32_t world, int32_t threads, int64_t timeout_ms) {
  return duet::guarded(static_cast<DuetGroup*>(nullptr), [&] {
    auto options = c10d::ProcessGroupGloo::Options::create(milliseconds(timeout_ms));
    options->threads = threads;
    options->devices = {c10d::ProcessGroupGloo::createDeviceForHostname(std::string(bind_host))};
    auto prefixed = c10::make_intrusive<c10d::PrefixStore>(std::string(prefix), store->inner);
    return new DuetGroup{
        c10::make_intrusive<c10d::ProcessGroupGloo>(prefixed, rank, world, std::move(options))};
  });
}

void duet_group_free(DuetGroup* group) {
  // The destructor waits until the group's queue is empty, which after a failure is Gloo's own
  // time-out away. Nobody should have to wait for that.
  duet::guarded(0, [&] {
    std::thread([group] { delete group; }).detach();
    return 0;
  });
}

DuetWork* duet_all_reduce(DuetGroup* group, DuetTensor tensor) {
  return duet::guarded(no_work, [&] {
    std::vector<at::Tensor> tensors{tensor_of(tensor)};
    return started(group->inner->allreduce(tensors));
  });
}

DuetWork* duet_broadcast(DuetGroup* group, DuetTensor tensor, int32_t root) {
  return duet::guarded(no_work, [&] {
    std::vector<at::Tensor> tensors{tensor_of(tensor)};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    return started(group->inner->broadcast(tensors, options));
  });
}

DuetWork* duet_all_gather(DuetGroup* group, DuetTensor output, DuetTensor input) {
  return duet::guarded(no_work, [&] {
    std::vector<at::Tensor> inputs{tensor_of(input)};
    std::vector<std::vector<at::Tensor>> outputs{tensor_of(output).chunk(group->inner->getSize())};
    return started(group->inner->allgather(outputs, inputs));
  });
}

DuetWork* duet_barrier(DuetGroup* group, int64_t timeout_ms) {
  return duet::guarded(no_work, [&] {
    c10d::BarrierOptions options;
    options.timeout = milliseconds(timeout_ms);
    return started(group->inner->barrier(options));
  });
}

int32_t duet_work_wait(DuetWork* work, int64_t timeout_ms) {
  return duet::guarded(-1, [&] {
    {
      std::unique_lock<std::mutex> lock(work->completion->mutex);
      const auto done = [&] { return work->completion->done; };
      if (!work->completion->changed.wait_for(lock, milliseconds(timeout_ms), done)) return 0;
    }
    work->inner->wait();  // returns at once; throws what the operation threw
    return 1;
  });
}

void duet_work_free(DuetWork* work) {
  duet::guarded(0, [&] {
    delete work;
    return 0;
  });
}
}
