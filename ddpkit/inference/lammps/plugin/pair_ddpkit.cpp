// Models of ddpkit in LAMMPS: energies and forces from a package that `ddpkit export` wrote. Neither Python nor the source of
// LAMMPS is needed; `ddpkit lammps build` compiles this file as a plugin.
//
//   pair_style ddpkit [chunk N]           N: compute so many atoms at a time, which bounds memory (CPU: 500, GPU: what fits)
//   pair_coeff * * model.pt2 H C N O      an element of the model for each atom type

#include "edges.h"
#include "exchange.h"
#include "fitting.h"
#include "package.h"
#include "step.h"

#include "atom.h"
#include "comm.h"
#include "error.h"
#include "force.h"
#include "lammps.h"
#include "memory.h"
#include "neigh_list.h"
#include "neighbor.h"
#include "pair.h"
#include "universe.h"
#include "update.h"
#include "utils.h"

#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <memory>
#include <string>
#include <unistd.h>
#include <vector>

namespace LAMMPS_NS {

using ddpkit::PADDING;

// Atoms that a CPU computes at a time: arrays of more lie beyond its caches, and come from the kernel at every step.
constexpr int64_t AT_ONCE = 500;

class PairDdpkit : public Pair, public ddpkit::Exchange {
 public:
  explicit PairDdpkit(LAMMPS *lmp) : Pair(lmp)
  {
    manybody_flag = one_coeff = 1;
    single_enable = restartinfo = 0;
    no_virial_fdotr_compute = 1;
    centroidstressflag = CENTROID_NOTAVAIL;
    nextra = 2;  // for `compute pair`
    pvector = told;
  }

  ~PairDdpkit() override
  {
    if (allocated) {
      memory->destroy(setflag);
      memory->destroy(cutsq);
    }
    pvector = nullptr;
  }

  void settings(int narg, char **arg) override
  {
    chunk = 0;
    is_set_up = false;
    if (narg == 2 && !std::strcmp(arg[0], "chunk")) chunk = utils::bnumeric(FLERR, arg[1], false, lmp);
    if ((narg != 0 && narg != 2) || (narg == 2 && chunk < 1))
      error->all(FLERR, "pair_style ddpkit takes nothing but `chunk N`, with N atoms at a time: the cutoff stands in the package that "
                        "pair_coeff names");
  }

  void coeff(int narg, char **arg) override
  {
    const int types = atom->ntypes;
    if (narg < 3 || std::strcmp(arg[0], "*") || std::strcmp(arg[1], "*"))
      error->all(FLERR, "pair_style ddpkit needs `pair_coeff * * model.pt2` and an element for each atom type");
    if (narg != types + 3)
      error->all(FLERR, "pair_coeff of pair_style ddpkit names {} elements for {} atom types: give one for each type", narg - 3, types);
    path = arg[2];
    is_set_up = false;
    together([&] {
      step.reset();
      package.reset();
      register_operators();
      int ranks = 1;
      package = std::make_unique<ddpkit::Package>(path, local_rank(&ranks));
      ranks_on_device = (ranks - 1) / std::max(1, ddpkit::gpus()) + 1;
      // The second serves tests: what a GPU's operators make is what the loop makes.
      by_operators = package->device.is_cuda() || std::getenv("DDPKIT_LAMMPS_OPERATORS");
      if (by_operators) candidates = std::make_unique<ddpkit::DeviceCandidates>(package->device);
      else candidates = std::make_unique<ddpkit::HostCandidates>();
    });
    species_of_type.assign(types + 1, 0);
    for (int type = 1; type <= types; type++) {
      const auto &names = package->species;
      if (!std::strcmp(arg[type + 2], "NULL"))
        error->all(FLERR, "pair_style ddpkit computes all atoms: give an element instead of NULL for atom type {}, also where it has no atoms",
                   type);
      const auto place = std::find(names.begin(), names.end(), arg[type + 2]);
      if (place == names.end()) {
        std::string known;
        for (const auto &name : names) known += (known.empty() ? "" : ", ") + name;
        error->all(FLERR, "the model in {} does not know {}, which pair_coeff gives for atom type {}: it knows {}", path, arg[type + 2],
                   type, known);
      }
      species_of_type[type] = place - names.begin();
    }
    squared = package->cutoffs;
    for (double &cutoff : squared) cutoff *= cutoff;
    if (!allocated) {
      allocated = 1;
      memory->create(setflag, types + 1, types + 1, "pair:setflag");
      memory->create(cutsq, types + 1, types + 1, "pair:cutsq");
    }
    for (int i = 1; i <= types; i++)
      for (int j = i; j <= types; j++) setflag[i][j] = 1;
    comm_forward = comm_reverse = (package->exchange_width * package->exchange_bytes + 7) / 8;
    if (package->passes_messages) comm_forward = std::max(comm_forward, 1);  // owners()
  }

  void init_style() override
  {
    if (std::strcmp(update->unit_style, "metal"))
      error->all(FLERR, "pair_style ddpkit computes eV and Angstrom, and the units are {}: use `units metal`", update->unit_style);
    if (!force->newton_pair) error->all(FLERR, "pair_style ddpkit needs the forces of ghost atoms: use `newton on`");
    if (utils::strmatch(force->pair_style, "^hybrid") && !utils::strmatch(force->pair_style, "^hybrid/overlay") &&
        !utils::strmatch(force->pair_style, "^hybrid/scaled"))
      error->all(FLERR, "pair_style ddpkit computes all atoms together: use it alone or in `hybrid/overlay`, not in {}", force->pair_style);
    if (chunk && package->passes_messages)
      error->all(FLERR, "the model in {} passes messages between atoms, so it cannot be computed in chunks: leave `chunk` away, or use "
                        "more ranks", path);
    if (neighbor->nex_type + neighbor->nex_group + neighbor->nex_mol)
      error->all(FLERR, "pair_style ddpkit needs all neighbours of an atom: remove `neigh_modify exclude`");
    if (neighbor->includegroup)
      error->all(FLERR, "pair_style ddpkit needs all neighbours of an atom: remove `neigh_modify include`");
    for (int k = 1; k <= 3; k++)
      if (atom->molecular != Atom::ATOMIC && atom->nbonds && is_left_out(k)) refuse_bonds();
    // a style inside hybrid is not asked for the width of its rows once it knows it
    force->pair->comm_forward = std::max(force->pair->comm_forward, comm_forward);
    force->pair->comm_reverse = std::max(force->pair->comm_reverse, comm_reverse);
    neighbor->add_request(this, NeighConst::REQ_FULL);
    if (!stays_in_size()) step.reset();
    else if (!step) step = std::make_unique<ddpkit::Step>(*package, comm->nprocs > 1);
    fits = 0;
    is_set_up = true;
    warn_of_slow_products();
    if (is_one_call() && !stays_in_size())
      warn_of_launches("the plugin was built without CUDA's headers; set CUDA_HOME to a toolkit and run `ddpkit lammps build` again");
  }

  double init_one(int, int) override { return package->r_max; }

  void compute(int eflag, int vflag) override
  {
    if (!is_set_up)
      error->all(FLERR, "pair_style or pair_coeff of ddpkit came after LAMMPS had been set up: leave `pre no` away from the next `run`");
    ev_init(eflag, vflag);
    try {
      const c10::InferenceMode guard;
      current() = !package->passes_messages ? nullptr : step ? (ddpkit::Exchange *) step.get() : this;
      if (neighbor->ago == 0) refuse_new_bonds();
      if (neighbor->ago == 0 || pairs().owned() != atom->nlocal) {
        fit_memory();
        take_neighbours(pairs());
      }
      compute_atoms();
    } catch (const LAMMPSException &) {
      throw;
    } catch (const std::exception &raised) {
      const std::string why = fmt::format("pair_style ddpkit failed on rank {}: {}", comm->me, ddpkit::first_line(raised.what()));
      if (comm->me) fprintf(stderr, "ERROR: %s\n", why.c_str());  // LAMMPS prints rank 0's alone
      error->one(FLERR, why);
    }
  }

  int pack_forward_comm(int n, int *list, double *buf, int, int *) override
  {
    for (int k = 0; k < n; k++) std::memcpy(buf + k * doubles, row(list[k]), bytes);
    return n * (int) doubles;
  }

  void unpack_forward_comm(int n, int first, double *buf) override
  {
    for (int k = 0; k < n; k++) std::memcpy(row(first + k), buf + k * doubles, bytes);
  }

  int pack_reverse_comm(int n, int first, double *buf) override
  {
    for (int k = 0; k < n; k++) std::memcpy(buf + k * doubles, row(first + k), bytes);
    return n * (int) doubles;
  }

  void unpack_reverse_comm(int n, int *list, double *buf) override
  {
    for (int k = 0; k < n; k++) {
      if (is_float) add((float *) row(list[k]), (const float *) (buf + k * doubles));
      else add((double *) row(list[k]), buf + k * doubles);
    }
  }

  at::Tensor from_owners(const at::Tensor &rows, int64_t all) override
  {
    at::Tensor made = at::empty({all, rows.size(1)}, rows.options().device(c10::kCPU));
    made.narrow(0, 0, rows.size(0)).copy_(rows);
    exchange(made);
    comm->forward_comm(this, (int) doubles);
    return made.to(rows.device());
  }

  at::Tensor to_owners(const at::Tensor &rows, int64_t owned) override
  {
    at::Tensor made = at::empty(rows.sizes(), rows.options().device(c10::kCPU));
    made.copy_(rows);
    exchange(made);
    comm->reverse_comm(this, (int) doubles);
    return made.narrow(0, 0, owned).to(rows.device());
  }

  double memory_usage() override { return (double) species.capacity() * sizeof(int64_t); }

 private:
  std::unique_ptr<ddpkit::Package> package;
  std::unique_ptr<ddpkit::Candidates> candidates;
  std::unique_ptr<ddpkit::Step> step;  // in place of these, where there is one
  bool by_operators = false;           // of torch, as on a GPU
  int ranks_on_device = 1;
  std::vector<int64_t> species_of_type, species;
  std::vector<double> squared;  // cutoffs
  std::string path;             // of the package
  bool is_set_up = false;       // since pair_style or pair_coeff: neighbours and buffers are as the model needs them
  bigint chunk = 0;             // atoms at a time, as the script says; 0 where it does not
  int64_t fits = 0;             // atoms at a time that memory has room for and compiled code can address; 0 where that is not known
  double told[2] = {0, 0};      // processor seconds inside the model, and how often capacities were chosen
  bool has_warned = false;      // that a GPU's steps are not replayed

  // what is exchanged: rows of owned atoms, two that pad, then ghosts
  char *rows_exchanged = nullptr;
  size_t bytes = 0, doubles = 0;  // of a row
  bool is_float = false;

  char *row(int k) { return rows_exchanged + (k < atom->nlocal ? k : k + PADDING) * bytes; }

  template <typename T> void add(T *to, const T *from)
  {
    for (size_t k = 0; k < bytes / sizeof(T); k++) to[k] += from[k];
  }

  void exchange(at::Tensor &rows)
  {
    rows_exchanged = (char *) rows.data_ptr();
    bytes = rows.size(1) * rows.element_size();
    doubles = (bytes + 7) / 8;
    is_float = rows.scalar_type() == at::kFloat;
    if ((int) doubles > comm_forward || !(is_float || rows.scalar_type() == at::kDouble))
      throw std::runtime_error("the model exchanges rows that are wider than its package says: export it again");
  }

  // The rank among those of its host, and how many these are.
  int local_rank(int *number = nullptr) const
  {
    MPI_Comm host;
    int rank;
    MPI_Comm_split_type(world, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &host);
    MPI_Comm_rank(host, &rank);
    if (number) MPI_Comm_size(host, number);
    MPI_Comm_free(&host);
    return rank + universe->root_proc[universe->iworld];  // a partition's ranks follow those of the one before
  }

  // What fails on one rank is an error of all: they say what the first of these says.
  template <typename Work> void together(const Work &work)
  {
    std::string why;
    try {
      work();
    } catch (const LAMMPSException &) {
      throw;
    } catch (const std::exception &raised) {
      why = ddpkit::first_line(raised.what());
    }
    int failed = why.empty() ? comm->nprocs : comm->me, first;
    MPI_Allreduce(&failed, &first, 1, MPI_INT, MPI_MIN, world);
    if (first == comm->nprocs) return;
    int length = (int) why.size();
    MPI_Bcast(&length, 1, MPI_INT, first, world);
    why.resize(length);
    MPI_Bcast(&why[0], length, MPI_CHAR, first, world);
    error->all(FLERR, why);
  }

  // LAMMPS may bring a `dgemm_` of its own, which then is torch's too: ten times slower.
  void warn_of_slow_products()
  {
    Dl_info where;
    void *const used = dlsym(RTLD_DEFAULT, "dgemm_");
    if (comm->me == 0 && used && dladdr(used, &where) && std::strstr(where.dli_fname, "/liblammps"))
      error->warning(FLERR, "products of matrices in float64 are slow, since torch's dgemm_ is that of {}: start LAMMPS by `ddpkit "
                            "lammps`, or with libtorch_cpu.so in LD_PRELOAD", where.dli_fname);
  }

  // Whether the neighbour list is without atoms that are one bond away, or so many.
  bool is_left_out(int bonds) const { return force->special_lj[bonds] == 0.0 && force->special_coul[bonds] == 0.0; }

  void refuse_bonds()
  {
    error->all(FLERR, "pair_style ddpkit needs bonded atoms in the neighbour list, and special_bonds takes them out: use "
                      "`special_bonds lj/coul 1 1 1`, or data without bonds");
  }

  // Bonds may come after the setup, as by fix bond/create.
  void refuse_new_bonds()
  {
    if (atom->molecular != Atom::MOLECULAR || !(is_left_out(1) || is_left_out(2) || is_left_out(3))) return;
    int here = 0, anywhere;
    for (int i = 0; i < atom->nlocal; i++)
      for (int k = 1, before = 0; k <= 3; before = atom->nspecial[i][k - 1], k++)
        if (is_left_out(k) && atom->nspecial[i][k - 1] > before) here = 1;
    MPI_Allreduce(&here, &anywhere, 1, MPI_INT, MPI_MAX, world);
    if (anywhere) refuse_bonds();
  }

  // Whether the model is called once a step: on several ranks, the host exchanges rows within it.
  bool is_one_call() const { return by_operators && !chunk && !(package->passes_messages && comm->nprocs > 1); }

  // Whether that is in tensors whose sizes stay.
  bool stays_in_size() const { return is_one_call() && (package->device.is_cpu() || ddpkit::CAN_REPLAY); }

  ddpkit::Pairs &pairs() { return step ? (ddpkit::Pairs &) *step : *candidates; }

  void take_neighbours(ddpkit::Pairs &pairs)
  {
    // a list that leaves atoms out has fewer, and is not in their order
    bool whole = list->inum == atom->nlocal;
    for (int k = 0; whole && k < list->inum; k++) whole = list->ilist[k] == k;
    if (!whole) throw std::runtime_error("LAMMPS' neighbour list leaves atoms out: remove `neigh_modify include`");
    pairs.take(list->inum, [&](int64_t i, std::vector<int> &other) {
      const int *const neighbours = list->firstneigh[i];
      for (int k = 0; k < list->numneigh[i]; k++) other.push_back(neighbours[k] & NEIGHMASK);
    });
    if (step && package->passes_messages) step->take_owners(owners());
  }

  // Has atoms be computed in parts where the GPU's memory would not suffice for all. Where the script says how many, or a model passes
  // messages, there is nothing to choose.
  void fit_memory()
  {
    if (chunk || package->passes_messages || !(package->device.is_cuda() || (by_operators && ddpkit::allowed_bytes()))) return;
    if (!fits && (atom->nlocal > ddpkit::SAMPLE || ddpkit::allowed_bytes())) {
      try {
        measure_memory();
      } catch (const c10::Error &raised) {
        fits = atom->natoms;
        error->warning(FLERR, "what memory atoms take could not be measured, so that all are computed at once: {}",
                       ddpkit::first_line(raised.what()));
      }
    }
    if (fits && atom->nlocal > fits) step.reset();
  }

  // Entries of the neighbour list for the first atoms.
  double neighbours_of(int64_t atoms) const
  {
    double sum = 0;
    for (int64_t i = 0; i < atoms; i++) sum += list->numneigh[i];
    return sum;
  }

  void measure_memory()
  {
    const int64_t owned = atom->nlocal, number = std::min(owned, ddpkit::SAMPLE);
    if (!owned) return;
    take_neighbours(*candidates);
    const ddpkit::Atoms atoms = read_atoms();
    const double measured = ddpkit::bytes_of(package->device, number, [&] {
      const std::vector<at::Tensor> outputs = package->run(candidates->pick(atoms, 0, number, true, false).inputs);
      outputs[0].to(c10::kCPU);
    });
    const double bytes = measured * std::max(1.0, neighbours_of(owned)) / std::max(1.0, neighbours_of(number));  // edges are what takes it
    const double usable = ddpkit::usable_bytes(package->device, ranks_on_device);
    fits = ddpkit::fitting(usable, bytes, owned);
    if (owned > fits)
      utils::logmesg(lmp, "pair_style ddpkit: rank {} computes {} of its {} atoms at a time, since all would take {:.1f} GiB and it may use {:.1f}\n",
                     comm->me, ddpkit::divided(owned, fits), owned, bytes / ddpkit::GIB, usable / ddpkit::GIB);
  }

  // Of ghosts, on one rank: their rows say it once those of their owners have travelled.
  std::vector<int64_t> owners()
  {
    const int64_t owned = atom->nlocal, all = owned + atom->nghost;
    const at::Tensor rows = at::arange(owned + PADDING, at::kDouble).view({-1, 1});
    const at::Tensor found = from_owners(rows, all + PADDING).narrow(0, owned + PADDING, all - owned).to(at::kLong);
    return {found.data_ptr<int64_t>(), found.data_ptr<int64_t>() + found.numel()};
  }

  ddpkit::Atoms read_atoms()
  {
    const int64_t owned = atom->nlocal, all = owned + atom->nghost;
    species.resize(all);
    for (int64_t i = 0; i < all; i++) species[i] = species_of_type[atom->type[i]];
    return {owned, all, all ? atom->x[0] : nullptr, species, squared, (int64_t) package->species.size(), package->r_max};
  }

  int64_t at_a_time(int64_t owned) const
  {
    if (chunk) return fits ? std::min<int64_t>(chunk, fits) : chunk;
    if (fits) return ddpkit::divided(owned, fits);
    return package->device.is_cpu() && !package->passes_messages ? AT_ONCE : std::max<int64_t>(owned, 1);
  }

  void compute_atoms()
  {
    const ddpkit::Atoms atoms = read_atoms();
    const int64_t owned = atoms.owned;
    // message passing needs this rank even where it has no atoms
    if (!owned && (!package->passes_messages || step)) return;
    if (step) {
      try {
        return compute_at_once(atoms);
      } catch (const ddpkit::TooMany &found) {
        step.reset();  // which made room for none
        divide(owned, found.fullness, found.extent.edges);
        take_neighbours(*candidates);
      }
    }
    int64_t from = 0;
    do {  // at least once
      const int64_t many = at_a_time(owned), to = std::min(from + many, owned);
      const ddpkit::Edges edges = candidates->pick(atoms, from, to, many < owned, package->passes_messages);
      if (const double fullness = package->fullness(edges.inputs); fullness > 1) {
        divide(to - from, fullness, edges.number);
        continue;
      }
      compute_chunk(edges);
      from = to;
    } while (from < owned);
  }

  // Has fewer atoms be computed at a time where so many are more than compiled code can address.
  void divide(int64_t number, double fullness, int64_t edges)
  {
    if (package->passes_messages || number < 2)
      throw std::runtime_error(fmt::format("{} atoms with {} edges are {:.1f} times what compiled code can address at once (2^31 elements of a "
                                           "tensor): use more ranks", number, edges, fullness));
    const double spread = 0.95;  // other atoms have more neighbours
    fits = std::clamp<int64_t>((int64_t) (spread * (double) number / fullness), 1, number - 1);
    utils::logmesg(lmp, "pair_style ddpkit: rank {} computes {} of its {} atoms at a time, since compiled code cannot address the tensors of "
                        "more\n", comm->me, at_a_time(atom->nlocal), atom->nlocal);
  }

  void compute_at_once(const ddpkit::Atoms &atoms)
  {
    const auto start = std::chrono::steady_clock::now();
    step->compute(atoms);
    count_time_since(start);
    told[1] = (double) step->captures;
    if (!step->why_not_replayed().empty()) warn_of_launches(step->why_not_replayed());
    add_energies(step->energies(), atoms.owned, 0);
    for (int64_t i = 0; i < atoms.all; i++)
      for (int c = 0; c < 3; c++) atom->f[i][c] += step->forces(step->row(i))[c];
    if (vflag_global)
      for (int c = 0; c < 6; c++) virial[c] += step->virial()[c];
    if (!vflag_atom) return;
    const at::Tensor virials = step->virials();
    for (int64_t i = 0; i < atoms.all; i++)
      for (int c = 0; c < 6; c++) vatom[i][c] += virials.data_ptr<double>()[6 * step->row(i) + c];
  }

  void warn_of_launches(const std::string &why)
  {
    if (comm->me == 0 && !has_warned)
      error->warning(FLERR, "steps on the GPU are launched kernel by kernel, which takes longer for small systems: {}", why);
    has_warned = true;
  }

  void count_time_since(std::chrono::steady_clock::time_point start)
  {
    told[0] += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  void add_energies(const double *energies, int64_t number, int64_t first)
  {
    for (int64_t i = 0; i < number; i++) {
      if (eflag_global) eng_vdwl += energies[i];
      if (eflag_atom) eatom[first + i] += energies[i];
    }
  }

  void compute_chunk(const ddpkit::Edges &edges)
  {
    const auto start = std::chrono::steady_clock::now();
    const std::vector<at::Tensor> outputs = package->run(edges.inputs);
    const int64_t number = edges.number, centres = edges.inputs[4].size(0) - PADDING;
    const at::Tensor energies = outputs[0].to(c10::kCPU).contiguous();  // waits for a GPU
    count_time_since(start);
    add_energies(energies.data_ptr<double>(), centres, edges.first_centre);
    const at::Tensor vectors = edges.inputs[0].narrow(0, 0, number), slopes = outputs[1].narrow(0, 0, number);
    const at::Tensor centre = edges.inputs[2].narrow(0, 0, number);
    add_forces(vectors.to(c10::kCPU), slopes.to(c10::kCPU).contiguous(), centre.to(c10::kCPU), edges.ends.to(c10::kCPU), edges.first_centre);
  }

  void add_forces(const at::Tensor &vectors, const at::Tensor &slopes, const at::Tensor &centre, const at::Tensor &ends, int64_t first)
  {
    const double *const v = vectors.data_ptr<double>(), *const s = slopes.data_ptr<double>();
    const int64_t *const centres = centre.data_ptr<int64_t>();
    const int *const others = ends.data_ptr<int>();
    double *const f = atom->nmax ? atom->f[0] : nullptr;
    double sum[6] = {0, 0, 0, 0, 0, 0};
    const int64_t edges = ends.size(0);
    for (int64_t k = 0; k < edges;) {
      const int64_t centre_here = centres[k];
      double total[3] = {0, 0, 0};  // edges of a centre follow one another
      for (; k < edges && centres[k] == centre_here; k++) {
        const double *const r = v + 3 * k, *const g = s + 3 * k;
        double *const at_other = f + 3 * (int64_t) others[k];
        for (int c = 0; c < 3; c++) {
          total[c] += g[c];
          at_other[c] -= g[c];
        }
        if (!vflag_either) continue;
        const double w[6] = {-r[0] * g[0], -r[1] * g[1], -r[2] * g[2], -r[0] * g[1], -r[0] * g[2], -r[1] * g[2]};
        for (int c = 0; c < 6; c++) {
          sum[c] += w[c];
          if (!vflag_atom) continue;
          vatom[first + centre_here][c] += 0.5 * w[c];
          vatom[others[k]][c] += 0.5 * w[c];
        }
      }
      for (int c = 0; c < 3; c++) f[3 * (first + centre_here) + c] += total[c];
    }
    if (vflag_global)
      for (int c = 0; c < 6; c++) virial[c] += sum[c];
  }
};

}    // namespace LAMMPS_NS

extern "C" {

typedef void *(lammpsplugin_factory) (void *);
struct lammpsplugin_t {
  const char *version, *style, *name, *info, *author;
  union {
    lammpsplugin_factory *v1;
    void *v2;
  } creator;
  void *handle;
};
typedef void (*lammpsplugin_register)(lammpsplugin_t *, void *);

// Processes that their launcher started as ranks, and LAMMPS' MPI as one each, would all compute the same.
static void require_ranks(int ranks)
{
  const char *const wanted = std::getenv("DDPKIT_RANKS"), *const rank = std::getenv("DDPKIT_RANK");
  if (!wanted || std::atoi(wanted) == ranks) return;
  if (!rank || !std::strcmp(rank, "0"))
    fprintf(stderr, "ddpkit: %s ranks were started, but the MPI of this LAMMPS knows %d: use `ddpkit lammps -n %s ...`, or the launcher of "
                    "the MPI that LAMMPS was built against.\n", wanted, ranks, wanted);
  else sleep(2);  // so that the first can say so before its launcher ends it
  fflush(stderr);
  _exit(2);
}

static void *create_ddpkit(void *lmp) { return new LAMMPS_NS::PairDdpkit((LAMMPS_NS::LAMMPS *) lmp); }

void lammpsplugin_init(void *lmp, void *handle, void *regfunc)
{
  require_ranks(((LAMMPS_NS::LAMMPS *) lmp)->universe->nprocs);
  lammpsplugin_t plugin;
  std::memset(&plugin, 0, sizeof(plugin));
  plugin.version = DDPKIT_LAMMPS_VERSION;
  plugin.style = "pair";
  plugin.name = "ddpkit";
  plugin.info = "models of ddpkit";
  plugin.author = "ddpkit";
  plugin.creator.v1 = &create_ddpkit;
  plugin.handle = handle;
  ((lammpsplugin_register) regfunc)(&plugin, lmp);
}
}
