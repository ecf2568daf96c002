// How many atoms a device computes at a time, so that its memory suffices.
#pragma once

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Device.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <string>

namespace ddpkit {

// GiB that the model may take of a GPU, for each rank.
constexpr const char *MEMORY = "DDPKIT_LAMMPS_MEMORY";

constexpr int64_t SAMPLE = 256;  // atoms whose memory is measured
constexpr double GIB = 1 << 30;
// Of the memory that is there: allocators leave gaps, and other programs come and go.
constexpr double USABLE = 0.7;

// What the variable says, in bytes; 0 where it is not set.
inline double allowed_bytes()
{
  const char *const said = std::getenv(MEMORY);
  if (!said) return 0;
  char *end = nullptr;
  const double number = std::strtod(said, &end);
  if (*end || !(number > 0)) throw std::runtime_error(std::string(MEMORY) + "=" + said + " is no number of GiB above 0");
  return number * GIB;
}

// Bytes that `ranks`, each of which asks for itself, may share equally.
inline double usable_bytes(c10::Device device, int ranks)
{
  if (const double allowed = allowed_bytes()) return allowed;
  c10::DeviceAllocator *const memory = c10::getDeviceAllocator(device.type());
  const auto stats = memory->getDeviceStats(device.index());
  const auto all = (size_t) c10::CachingAllocator::StatType::AGGREGATE;
  const int64_t kept = stats.reserved_bytes[all].current - stats.allocated_bytes[all].current;  // and free
  return USABLE * ((double) memory->getMemoryInfo(device.index()).first + (double) kept) / ranks;
}

// Bytes that work takes while it lasts, beyond what there is before. A CPU, where this serves tests, is said to take a MiB an atom.
inline double bytes_of(c10::Device device, int64_t atoms, const std::function<void()> &work)
{
  if (!device.is_cuda()) return (double) (atoms << 20);
  c10::DeviceAllocator *const memory = c10::getDeviceAllocator(device.type());
  const auto all = (size_t) c10::CachingAllocator::StatType::AGGREGATE;
  work();  // the first call makes what stays, such as the libraries' workspaces
  memory->resetPeakStats(device.index());
  const int64_t before = memory->getDeviceStats(device.index()).allocated_bytes[all].current;
  work();
  const int64_t most = memory->getDeviceStats(device.index()).allocated_bytes[all].peak;
  memory->emptyCache();
  return (double) (most - before);
}

// Atoms at a time, at least one, when so many took so much.
inline int64_t fitting(double usable, double bytes, int64_t atoms)
{
  return std::max<int64_t>(1, (int64_t) (usable / std::max(bytes / (double) atoms, 1.0)));
}

// The same in equal parts.
inline int64_t divided(int64_t owned, int64_t at_most)
{
  const int64_t parts = (owned + at_most - 1) / at_most;
  return parts ? (owned + parts - 1) / parts : at_most;
}

}    // namespace ddpkit
