// Work of a GPU whose sizes and addresses stay: captured once as a CUDA graph and replayed, so that its host launches it as one.
//
// On a CPU, and with DDPKIT_LAMMPS_REPLAY=0, which serves tests and timings, it is called every time instead. It then computes the same:
// the first replay is compared with a call.
#pragma once

#include "package.h"

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#ifdef DDPKIT_CUDA
#include <cuda.h>  // on its version depends what members the graph's class has
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#endif

#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <string>

namespace ddpkit {

#ifdef DDPKIT_CUDA
constexpr bool CAN_REPLAY = true;
#else
constexpr bool CAN_REPLAY = false;  // built without CUDA's headers, see ddpkit/inference/lammps/build.py
#endif

constexpr double SAME = 1e-5;  // of a number, or of one where that is less: how far a replay may lie from a call

class Replay {
 public:
  // Why a GPU's work is called every time although it should be replayed; empty otherwise.
  std::string why_not;

  explicit Replay(c10::Device device) : on_gpu(device.is_cuda()) {}

  // Takes work on, on the stream that is current and is not the default one. What it reads is there already; `outcome` gives what
  // it has left.
  void prepare(std::function<void()> work, const std::function<at::Tensor()> &outcome)
  {
    forget();
    this->work = std::move(work);
    if (is_wanted()) capture(outcome);
  }

  void operator()()
  {
#ifdef DDPKIT_CUDA
    if (graph) return graph->replay();
#endif
    work();
  }

  // Call it before the memory that the work uses is freed.
  void forget()
  {
#ifdef DDPKIT_CUDA
    graph.reset();
#endif
    work = nullptr;
  }

 private:
  bool on_gpu;
  std::function<void()> work;
#ifdef DDPKIT_CUDA
  std::unique_ptr<at::cuda::CUDAGraph> graph;
#endif

  bool is_wanted() const
  {
    const char *const said = std::getenv(REPLAY);
    return CAN_REPLAY && on_gpu && why_not.empty() && !(said && !std::strcmp(said, "0"));
  }

  void capture(const std::function<at::Tensor()> &outcome)
  {
#ifdef DDPKIT_CUDA
    // The first call loads kernels, folds constants and makes the libraries' workspaces, none of which can be captured.
    work();
    const at::Tensor called = outcome().clone();
    // A graph has a pool of its own: what the call has left in the common one would double the memory.
    c10::cuda::CUDACachingAllocator::emptyCache();
    graph = std::make_unique<at::cuda::CUDAGraph>();
    const auto pool = at::cuda::graph_pool_handle();
    graph->capture_begin(pool, cudaStreamCaptureModeThreadLocal);  // other threads of the process may do as they like
    try {
      work();
    } catch (const std::exception &error) {
      why_not = first_line(error.what());
    }
    try {
      graph->capture_end();
    } catch (const std::exception &error) {
      if (why_not.empty()) why_not = first_line(error.what());
    }
    if (!why_not.empty()) return abandon(pool);
    graph->replay();
    const at::Tensor apart = outcome().sub(called).abs();
    if (apart.le(called.abs().add(1).mul(SAME)).all().item().toBool()) return;
    why_not = "a replay computed something else than a call";
    graph.reset();
#endif
  }

#ifdef DDPKIT_CUDA
  // As ddpkit.torch_private.undo_capture, for the same reason.
  void abandon(at::cuda::MempoolId_t pool)
  {
    bool has_ended = true;
    try {
      graph->pool();
    } catch (const c10::Error &) {
      has_ended = false;
    }
    graph.reset();
    if (has_ended || TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 14) return;
    const auto device = c10::cuda::current_device();
    try {
      c10::cuda::CUDACachingAllocator::endAllocateToPool(device, pool);
    } catch (const c10::Error &) {  // it has been ended
    }
    c10::cuda::CUDACachingAllocator::releasePool(device, pool);
  }
#endif
};

}    // namespace ddpkit
