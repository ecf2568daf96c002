// The operators of ddpkit/inference/exchange.py for a process without Python: rows of ghosts travel by LAMMPS' communication.
#pragma once

#include <torch/library.h>

#include <stdexcept>

namespace ddpkit {

class Exchange {
 public:
  // [owned + padding, width] -> [all + padding, width]: the rows of ghosts are those of their owners
  virtual at::Tensor from_owners(const at::Tensor &rows, int64_t all) = 0;
  // [all + padding, width] -> [owned + padding, width]: the rows of ghosts are added to those of their owners
  virtual at::Tensor to_owners(const at::Tensor &rows, int64_t owned) = 0;
  virtual ~Exchange() noexcept(false) = default;  // as LAMMPS' classes

  // Of the pair style that computes.
  static Exchange *&current()
  {
    static Exchange *exchange = nullptr;
    return exchange;
  }

  static void register_operators()
  {
    static torch::Library library(torch::Library::FRAGMENT, "ddpkit", std::nullopt, __FILE__, __LINE__);
    static bool done = false;
    if (done) return;
    done = true;
    library.def("from_owners(Tensor rows, SymInt all) -> Tensor");
    library.def("to_owners(Tensor rows, SymInt owned) -> Tensor");
    library.impl("from_owners", torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd,
                                                [](const at::Tensor &rows, int64_t all) { return now().from_owners(rows, all); }));
    library.impl("to_owners", torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd,
                                              [](const at::Tensor &rows, int64_t owned) { return now().to_owners(rows, owned); }));
  }

 private:
  static Exchange &now()
  {
    if (!current()) throw std::runtime_error("rows were to be exchanged outside a step of LAMMPS");
    return *current();
  }
};

}    // namespace ddpkit
