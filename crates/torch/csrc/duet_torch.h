// The C interface between Rust and libtorch for what `tch` does not offer.
//
// Rules: extern "C" only; no C++ type crosses; no exception crosses. A function that can fail
// returns a negative number or a null pointer, and `duet_last_error` then has the reason, for the
// calling thread, until its next failure. `DuetTensor` is an `at::Tensor*`, as `tch` holds it.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

typedef struct DuetStore DuetStore;
typedef struct DuetGroup DuetGroup;
typedef struct DuetWork DuetWork;
typedef struct DuetMeter DuetMeter;
typedef struct DuetDecoder DuetDecoder;
typedef void* DuetTensor;

// The reason of this thread's last failure; owned by the library.
const char* duet_last_error();

// ---- Key-value store through which ranks find each other (c10d::TCPStore) ----
// A server listens on `port` (0: any free port).
DuetStore* duet_store_new(const char* host, uint16_t port, bool server, int64_t timeout_ms);
int32_t duet_store_port(DuetStore* store);
int32_t duet_store_set(DuetStore* store, const char* key, const uint8_t* data, size_t len);
// 1: the key is there, 0: not (yet), negative: failed. Does not block.
int32_t duet_store_has(DuetStore* store, const char* key);
// Blocks until the key is there or the time is over (then it fails). Copies at most `capacity`
// bytes; returns the length of the value.
int64_t duet_store_get(DuetStore* store, const char* key, int64_t timeout_ms, uint8_t* out, size_t capacity);
void duet_store_free(DuetStore* store);

// ---- Process group (c10d::ProcessGroupGloo) ----
// `bind_host`: the address of this machine that other ranks reach.
DuetGroup* duet_group_new(DuetStore* store, const char* prefix, const char* bind_host, int32_t rank,
                          int32_t world, int32_t threads, int64_t timeout_ms);
// Frees at once if nothing is pending; otherwise a thread of its own waits for what is.
void duet_group_free(DuetGroup* group);

// All start an operation and return a handle; tensors are contiguous, on the CPU.
DuetWork* duet_all_reduce(DuetGroup* group, DuetTensor tensor);
DuetWork* duet_broadcast(DuetGroup* group, DuetTensor tensor, int32_t root);
// `output` is flat and `world` times as long as `input`.
DuetWork* duet_all_gather(DuetGroup* group, DuetTensor output, DuetTensor input);
DuetWork* duet_barrier(DuetGroup* group, int64_t timeout_ms);
// 1: done, 0: not within `timeout_ms`, negative: failed.
int32_t duet_work_wait(DuetWork* work, int64_t timeout_ms);
void duet_work_free(DuetWork* work);

// ---- Optimiser ----
// One AdamW step on one tensor, in place, with the operations and the order of
// torch.optim.adamw._single_tensor_adamw. `step` counts from one.
int32_t duet_adamw(DuetTensor param, DuetTensor grad, DuetTensor exp_avg, DuetTensor exp_avg_sq,
                   double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step);

// ---- Activation recomputation ----
// Computes outputs from inputs and gives them by `duet_list_push`; 0, or negative for failed.
typedef int32_t (*DuetBody)(void* context, const DuetTensor* inputs, size_t count, void* list);
typedef void (*DuetDrop)(void* context);
typedef void (*DuetTake)(void* take, DuetTensor output);
int32_t duet_list_push(void* list, DuetTensor tensor);
// Runs `call` without keeping what happens inside; the backward pass runs it again. `leaves` are
// what `call` holds and that shall get gradients. `context` is
// handed over, and freed with `drop` when neither this call nor a graph needs it. Outputs are
// given to `give`, valid for that call only.
int32_t duet_recompute(DuetBody call, DuetDrop drop, void* context, const DuetTensor* inputs,
                       size_t count, const DuetTensor* leaves, size_t leaf_count, void* take,
                       DuetTake give);

// ---- Backward pass ----
// Gets the gradient of leaf `index`, valid for that call only; 0, or negative to end the pass.
typedef int32_t (*DuetReady)(void* context, size_t index, DuetTensor grad);
// Back-propagates `loss`. Each leaf's gradient is given to `ready` once, when it is complete, and not
// kept. On the calling thread, or one of libtorch's for tensors of a GPU, one call at a time.
int32_t duet_backward(DuetTensor loss, const DuetTensor* leaves, size_t count, DuetReady ready,
                      void* context);

// ---- Activation ----
// GELU with the tanh formula: a new tensor, freed with `delete`; null: failed. With gradient where
// gradients are on.
DuetTensor duet_gelu(DuetTensor x);

// ---- Linear layers ----
// x [.., in] through panels [ceil(out / 24), in, 24] of a weight, and a bias [out] or null: a new tensor
// [.., out], freed with `delete`; null: failed. fp32 on the CPU, no gradient.
DuetTensor duet_panels_linear(DuetTensor x, DuetTensor panels, DuetTensor bias, int64_t out);

// ---- Decoding ----
// A decoder layer's weights, [out, in] as checkpoints have them; queries, keys and values as one.
typedef struct {
  DuetTensor input_norm, qkv, qkv_bias, out, post_norm, gate, up, down;
} DuetDecodeLayer;
// Copies the weights, fp32 on the CPU, into an order that a few rows are quickly multiplied with.
// `qkv_bias` may be null; the width of a head is a multiple of eight.
DuetDecoder* duet_decoder_new(const DuetDecodeLayer* layers, size_t count, DuetTensor table,
                              DuetTensor norm, DuetTensor head, int64_t heads, int64_t kv_heads,
                              double eps);
// Feeds one token to each of `n` sequences that are `position` tokens long. `keys` and `values` are
// `count` tensors [n, kv_heads, capacity, head]; `logits` [n, V] is written.
int32_t duet_decoder_step(DuetDecoder* decoder, const int64_t* tokens, size_t n, int64_t position,
                          const DuetTensor* keys, const DuetTensor* values, size_t count,
                          DuetTensor cos, DuetTensor sin, DuetTensor logits);
void duet_decoder_free(DuetDecoder* decoder);
// The token of each row of logits [n, V] on the CPU: the first whose cumulative probability exceeds
// the row's number. 1: a logit is not finite.
int32_t duet_choose(DuetTensor logits, const double* numbers, size_t n, double temperature,
                    int64_t* tokens);

// ---- Memory ----
// Counts the bytes of tensors that this thread allocates and frees until the meter is freed, which
// must happen on the same thread.
DuetMeter* duet_meter_new();
void duet_meter_read(const DuetMeter* meter, int64_t* now, int64_t* peak);
void duet_meter_free(DuetMeter* meter);

// ---- Runtime ----
int32_t duet_deterministic(bool on);
// The folder that libtorch_cpu was loaded from. Returns the length, or negative.
int64_t duet_library_folder(char* out, size_t capacity);
// The address of the elements of a contiguous CPU tensor, its bytes in `bytes`.
uint8_t* duet_cpu_data(DuetTensor tensor, size_t* bytes);
}
