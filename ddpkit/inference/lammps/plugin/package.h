// A model compiled into one file by `ddpkit export`.
#pragma once

#include "checksums.h"
#include "json.h"

#include <ATen/Version.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <malloc.h>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace ddpkit {

// Errors of torch go on with a stack; who runs LAMMPS needs their first line.
inline std::string first_line(const std::string &text)
{
  return text.substr(0, std::min(text.find('\n'), (size_t) 300));
}

inline int gpus()
{
  return c10::impl::hasDeviceGuardImpl(c10::kCUDA) ? c10::impl::getDeviceGuardImpl(c10::kCUDA)->deviceCount() : 0;
}

// Set to 0, this variable has what a GPU could replay launched kernel by kernel.
constexpr const char *REPLAY = "DDPKIT_LAMMPS_REPLAY";

// As ddpkit/inference/memory.py: code on CPUs allocates the same arrays at every step, and the kernel would clear each anew.
inline void keep_freed_memory()
{
#ifdef __GLIBC__
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
#endif
}

// Numbers of edges and atoms that a model is called with, and of entries of its tables.
struct Extent {
  int64_t edges, owned, all, outgoing, incoming;
};

class Package {
 public:
  std::vector<std::string> species;
  double r_max = 0;              // Å
  std::vector<double> cutoffs;   // Å, [species, species] of centre and neighbour
  bool passes_messages = false;  // takes the table `incoming`, and exchanges rows between ranks
  int exchange_width = 0;        // columns of the widest of these rows
  int exchange_bytes = 8;        // of each of their numbers
  c10::Device device = c10::kCPU;

  // Raises std::runtime_error with a sentence where the file cannot be used here; `local_rank` chooses the GPU.
  Package(const std::string &path, int local_rank)
  {
    const Json told = read(path);
    const std::string written_by = told["torch"].text, release = minor(written_by);
    if (told["format"].number != 2)
      throw std::runtime_error(path + " is a package of another format: export the model again with the ddpkit that built this plugin");
    if (release != minor(TORCH_VERSION))
      throw std::runtime_error(path + " was compiled by torch " + written_by + " and cannot run under torch " TORCH_VERSION
                               ": export the model again with this release");
    for (const Json &name : told["species"].list) species.push_back(name.text);
    r_max = told["r_max"].number;
    cutoffs.assign(species.size() * species.size(), r_max);
    if (told["cutoffs"].kind != Json::NOTHING)
      for (size_t i = 0; i < species.size(); i++)
        for (size_t j = 0; j < species.size(); j++)
          cutoffs[i * species.size() + j] = told["cutoffs"].list.at(i).list.at(j).number;
    passes_messages = told["message_passing"].number;
    exchange_width = (int) told["exchange_width"].number;
    exchange_bytes = told["dtype"].text == "float32" ? 4 : 8;
    for (const Json &tensor : told["elements"].list) {
      const auto count = [&](const char *name) { return tensor.object.count(name) ? (int64_t) tensor[name].number : 0; };
      elements.push_back({count("edges"), count("owned"), count("all"), count("outgoing"), count("incoming")});
    }
    if (told["device"].text == "cuda") {
      const int number = gpus();
      if (!number)
        throw std::runtime_error(path + " was compiled for an NVIDIA GPU, and torch has none here: export the model with --device cpu");
      device = c10::Device(c10::kCUDA, local_rank % number);
    } else {
      keep_freed_memory();
    }
    try {
      // otherwise it records and queries events around a run, which cannot be captured as a CUDA graph
      const bool one_thread = device.is_cuda();
      loader = std::make_unique<torch::inductor::AOTIModelPackageLoader>(path, "model", one_thread, 1, device.index());
    } catch (const std::exception &error) {
      throw std::runtime_error(path + " cannot be loaded here (" + first_line(error.what()) + "): export the model again on this machine");
    }
  }

  // How many times as many elements as compiled code can address the largest tensor has at such sizes; see
  // ddpkit/inference/addressing.py.
  double fullness(const Extent &n) const
  {
    double most = 0;
    for (const Extent &each : elements)
      most = std::max(most, (double) each.edges * n.edges + (double) each.owned * n.owned + (double) each.all * n.all +
                                (double) each.outgoing * n.outgoing + (double) each.incoming * n.incoming);
    return most / ADDRESSABLE;
  }

  double fullness(const std::vector<at::Tensor> &inputs) const
  {
    return fullness({inputs[0].size(0), inputs[4].size(0), inputs[1].size(0), inputs[4].numel(), passes_messages ? inputs[5].numel() : 0});
  }

  std::vector<at::Tensor> run(std::vector<at::Tensor> inputs) { return loader->boxed_run(std::move(inputs)); }

 private:
  static constexpr double ADDRESSABLE = 2147483647;  // elements of a tensor, by 32-bit indices
  std::vector<Extent> elements;                      // of tensors: for each edge, atom, ...; none where indices have 64 bits
  std::unique_ptr<torch::inductor::AOTIModelPackageLoader> loader;

  static Json read(const std::string &path)
  {
    if (std::error_code none; !std::filesystem::is_regular_file(path, none))
      throw std::runtime_error("there is no file " + path + ": give a package that `ddpkit export` wrote");
    std::string damaged;
    std::unordered_map<std::string, std::string> metadata;
    Json told;
    try {
      damaged = Archive(path).damaged();
      if (damaged.empty()) {
        metadata = torch::inductor::AOTIModelPackageLoader::load_metadata_from_package(path, "model");
        told = JsonReader(metadata.at("ddpkit")).read();
      }
    } catch (const std::exception &) {
      throw std::runtime_error(path + " is no package that `ddpkit export` wrote, or it is damaged: export the model again");
    }
    if (!damaged.empty())
      throw std::runtime_error(path + " is damaged (the checksum of " + damaged + " is wrong): copy or export it again");
    if (!metadata["AOTI_CPU_ISA"].compare(0, 6, "AVX512") && at::get_cpu_capability() != "AVX512")
      throw std::runtime_error(path + " was compiled for processors with instructions (AVX512) that this one lacks: export the model again here");
    return told;
  }

  static std::string minor(const std::string &version)
  {
    return version.substr(0, version.find('.', version.find('.') + 1));
  }
};

}    // namespace ddpkit
