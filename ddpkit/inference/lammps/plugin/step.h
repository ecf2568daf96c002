// All of a step on a GPU, in tensors whose sizes stay from step to step: the atoms, the edges within the cutoff, their tables,
// the model, and the sums over edges that forces and virials are. So it can be replayed (replay.h), and the host waits once.
//
// Candidates, atoms, edges and tables have capacities. Owned atoms come first, then rows that pad, then ghosts. Edges that pad
// follow the others; they are longer than the cutoff, and both their ends are atoms that pad, from the last one on as many for
// each as its row of a table has room for. So what pads adds nothing, and every input is as ddpkit/inference/inputs.py says.
//
// A step whose edges do not fit is computed as if none were within the cutoff, says so, and is made again with more room.
#pragma once

#include "edges.h"
#include "exchange.h"
#include "package.h"
#include "replay.h"

#include <ATen/ops/max.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/tensor.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <vector>

namespace ddpkit {

// What there is of everything, or what there is room for.
struct Sizes {
  int64_t candidates = 0, owned = 0, ghosts = 0;
  int64_t edges = 0;                   // within the cutoff
  int64_t outgoing = 0, incoming = 0;  // edges of the atom that has most, as their centre and as their neighbour
  int64_t copies = 0;                  // ghosts of the atom that has most, where rows are exchanged
};

// There are more edges or atoms than compiled code can address.
struct TooMany {
  Extent extent;
  double fullness;
};

class Step : public Pairs, public Exchange {
 public:
  int64_t captures = 0;  // how often capacities were chosen

  // `roams`: atoms come from other ranks and go there.
  Step(Package &package, bool roams) : package(package), device(package.device), roams(roams), replay(package.device)
  {
    if (!device.is_cuda()) return;
    const c10::impl::VirtualGuardImpl gpu(device.type());
    stream = gpu.getStreamFromGlobalPool(device);  // the default one cannot be captured
    gpu.getDefaultStream(device).synchronize();    // where the package's constants were copied
  }

  ~Step() override { replay.forget(); }

  const std::string &why_not_replayed() const { return replay.why_not; }

  // Takes over which atom each ghost is a copy of; needed where rows are exchanged, whenever pairs were taken over.
  void take_owners(std::vector<int64_t> owners) { owner_of = std::move(owners); }

  void compute(const Atoms &atoms)
  {
    std::optional<c10::StreamGuard> guard;
    if (stream) guard.emplace(*stream);
    bool fits = lists_fit(atoms);
    for (int tries = 0; !computed(atoms, fits); fits = false)
      if (++tries == 3) throw std::runtime_error("the edges of a step do not fit where they were counted: report this");
  }

  // Of what was computed last, on the host: energies [owned], forces of a row [3], and the virial [6], xx yy zz xy xz yz.
  const double *energies() const { return result_here.data_ptr<double>(); }
  const double *forces(int64_t row) const { return energies() + rows() + 3 * row; }
  const double *virial() const { return forces(everyone()); }
  // The row of an atom of LAMMPS.
  int64_t row(int64_t atom) const { return atom < owned() ? atom : atom - owned() + rows(); }

  // [everyone, 6]: the virials of atoms, half of each edge's for each of its ends.
  at::Tensor virials()
  {
    std::optional<c10::StreamGuard> guard;
    if (stream) guard.emplace(*stream);
    at::Tensor of_atoms = sum_over(virials_of_edges, incoming);
    of_atoms.narrow(0, 0, rows()).add_(sum_over(virials_of_edges, outgoing));
    return of_atoms.mul_(0.5).to(c10::kCPU);
  }

  at::Tensor from_owners(const at::Tensor &values, int64_t) override { return at::cat({values, values.index_select(0, owner)}); }

  at::Tensor to_owners(const at::Tensor &values, int64_t) override
  {
    return sum_over(values, copies).add_(values.narrow(0, 0, rows()));
  }

 private:
  Package &package;
  c10::Device device;
  bool roams;
  std::optional<c10::Stream> stream;
  Replay replay;

  Sizes room;
  int64_t spare = 0;  // rows of atoms that pad, at least

  std::vector<int64_t> owner_of;  // [ghosts]
  std::vector<int64_t> species_there;

  // What a step reads, at addresses that stay.
  at::Tensor positions, species;            // [everyone, 3], [everyone]
  at::Tensor first_of_centre;               // [rows + 1]: where the candidates of a centre begin
  at::Tensor centres, neighbours;           // [candidates + edges]: the ends of candidates, then those of each place that pads
  at::Tensor cutoffs;                       // [candidates]: squared, Å^2
  at::Tensor by_neighbour;                  // [candidates]: these, by neighbour
  at::Tensor first_of_neighbour;            // [everyone + 1]: where among those the candidates of a neighbour begin
  at::Tensor owner, copies;                 // [ghosts], [rows, most]
  at::Tensor positions_here, result_here;   // on the host
  // The same in all steps until the capacities change.
  at::Tensor candidate_numbers, edge_numbers, atom_numbers, padding_numbers, columns, limits, beyond, first_axis, second_axis;
  at::Tensor no_edge, no_virial, zero;  // as numbers of the host they would be written at each step
  struct Padding {
    at::Tensor first, last;  // [rows]: which edges pad a row, where as many as that pad
  } padding_of_centres, padding_of_neighbours;
  // What a step leaves.
  at::Tensor result, outgoing, incoming, virials_of_edges;

  int64_t rows() const { return room.owned + spare; }
  int64_t everyone() const { return rows() + room.ghosts; }

  at::TensorOptions numbers() const { return integers(device); }
  at::TensorOptions reals() const { return at::TensorOptions().dtype(at::kDouble).device(device); }
  // A tensor of the host that a GPU reads and writes by itself.
  at::Tensor on_host(at::IntArrayRef sizes, at::ScalarType type) const
  {
    return at::zeros(sizes, at::TensorOptions().dtype(type).pinned_memory(device.is_cuda()));
  }

  // --- capacities --------------------------------------------------------------------------------------------------------------

  // What varies with the motion of n things.
  static int64_t margin(int64_t n) { return n / 50 + 2 * (int64_t) std::sqrt((double) n) + 2; }
  // A capacity that is kept as long as it fits.
  static int64_t fitted(int64_t capacity, int64_t number, int64_t margin)
  {
    return number <= capacity && capacity <= 2 * (number + margin) ? capacity : number + margin;
  }
  static int64_t fitted_width(int64_t capacity, int64_t most) { return fitted(capacity, std::max(most, PADDING), 2 + most / 16); }

  // The fewest edges for which there are atoms enough to hold those that pad.
  int64_t fewest() const { return room.edges - spare * room.outgoing; }

  bool lists_fit(const Atoms &atoms) const
  {
    if (!taken) return true;
    return captures && atoms.owned <= room.owned && atoms.all - atoms.owned <= room.ghosts && (int64_t) other.size() <= room.candidates &&
           most_copies(atoms) <= room.copies;
  }

  int64_t most_copies(const Atoms &atoms) const
  {
    std::vector<int64_t> counts(atoms.owned);
    for (const int64_t owner : owner_of) counts[owner]++;
    return counts.empty() ? 0 : *std::max_element(counts.begin(), counts.end());
  }

  Sizes measured(const Atoms &atoms) const
  {
    Sizes found{(int64_t) other.size(), atoms.owned, atoms.all - atoms.owned, 0, 0, 0, most_copies(atoms)};
    std::vector<int64_t> incoming(atoms.all);
    const double *const x = atoms.positions;
    for (int64_t i = 0; i < atoms.owned; i++) {
      int64_t outgoing = 0;
      for (int64_t k = first[i]; k < first[i + 1]; k++) {
        const int64_t j = other[k];
        double square = 0;
        for (int c = 0; c < 3; c++) square += (x[3 * j + c] - x[3 * i + c]) * (x[3 * j + c] - x[3 * i + c]);
        if (!(square < atoms.cutoffs[atoms.species[i] * atoms.kinds + atoms.species[j]])) continue;
        outgoing++;
        found.incoming = std::max(found.incoming, ++incoming[j]);
      }
      found.edges += outgoing;
      found.outgoing = std::max(found.outgoing, outgoing);
    }
    return found;
  }

  void choose_room(const Atoms &atoms)
  {
    const Sizes needed = measured(atoms);
    room.candidates = fitted(room.candidates, needed.candidates, margin(needed.candidates));
    room.owned = fitted(room.owned, needed.owned, roams ? margin(needed.owned) : 0);
    room.ghosts = fitted(room.ghosts, needed.ghosts, margin(needed.ghosts));
    room.outgoing = fitted_width(room.outgoing, needed.outgoing);
    // at least as wide, so that also where all edges pad, each atom has room for its own
    room.incoming = std::max(fitted_width(room.incoming, needed.incoming), room.outgoing);
    room.copies = fitted_width(room.copies, needed.copies);
    // room for as many edges more as fewer
    room.edges = needed.edges + margin(needed.edges);
    spare = PADDING + 2 * margin(needed.edges) / room.outgoing;
  }

  void require_reach() const
  {
    const Extent extent{room.edges, rows(), everyone(), rows() * room.outgoing, everyone() * room.incoming};
    if (const double fullness = package.fullness(extent); fullness > 1) throw TooMany{extent, fullness};
  }

  void make_room(const Atoms &atoms)
  {
    replay.forget();
    result = outgoing = incoming = virials_of_edges = at::Tensor();
    choose_room(atoms);
    require_reach();
    captures++;
    positions = at::zeros({everyone(), 3}, reals());
    species = at::zeros({everyone()}, numbers());
    first_of_centre = at::zeros({rows() + 1}, numbers());
    first_of_neighbour = at::zeros({everyone() + 1}, numbers());
    centres = at::zeros({room.candidates + room.edges}, numbers());
    neighbours = at::zeros({room.candidates + room.edges}, numbers());
    cutoffs = at::zeros({room.candidates}, reals());
    by_neighbour = at::zeros({room.candidates}, numbers());
    owner = at::zeros({room.ghosts}, numbers());
    copies = at::zeros({rows(), room.copies}, numbers());
    positions_here = on_host({everyone(), 3}, at::kDouble);
    result_here = on_host({rows() + 3 * everyone() + 6 + 1}, at::kDouble);
    candidate_numbers = at::arange(room.candidates, numbers());
    edge_numbers = at::arange(room.edges + 1, numbers());
    atom_numbers = at::arange(everyone() + 1, numbers());
    padding_numbers = edge_numbers.add(room.candidates);
    columns = at::arange(room.incoming, numbers());  // the wider table's
    limits = tensor({room.edges, -fewest(), room.outgoing, room.incoming});
    first_axis = tensor({0, 1, 2, 0, 0, 1});
    second_axis = tensor({0, 1, 2, 1, 2, 2});
    no_edge = at::full({}, room.edges, numbers());
    no_virial = at::zeros({}, reals());
    zero = at::zeros({1}, numbers());
    beyond = at::tensor({2 * package.r_max, 0.0, 0.0}, at::kDouble).to(device);
    padding_of_centres = pad(centres, room.outgoing, rows());
    padding_of_neighbours = pad(neighbours, room.incoming, everyone());
    taken = true;
  }

  at::Tensor tensor(const std::vector<int64_t> &values) const { return at::tensor(values, integers(c10::kCPU)).to(device); }

  // Edges that pad are, from the last one on, those of the last row, the last but one, and so on, `width` each.
  Padding pad(at::Tensor &ends, int64_t width, int64_t all) const
  {
    const at::Tensor from_the_end = edge_numbers.narrow(0, 0, room.edges).neg().add(room.edges - 1);
    ends.narrow(0, room.candidates, room.edges).copy_(from_the_end.div(width, "floor").neg().add(rows() - 1));
    const at::Tensor last = at::arange(1 - rows(), all - rows() + 1, numbers()).mul(width).add(room.edges);
    const at::Tensor is_ghost = at::arange(all, numbers()).ge(rows());
    return {last.sub(width).clamp_min(0).masked_fill(is_ghost, 0), last.clamp_min(0).masked_fill(is_ghost, 0)};
  }

  // --- what LAMMPS has, on the device ------------------------------------------------------------------------------------------

  // The step, and whether it fitted.
  bool computed(const Atoms &atoms, bool fits)
  {
    if (!fits) make_room(atoms);
    const bool lists_are_new = taken, species_are_new = lists_are_new || atoms.species != species_there;
    if (lists_are_new) upload_lists();
    if (lists_are_new && package.passes_messages) upload_owners();
    if (species_are_new) upload_species(atoms);
    upload_positions(atoms);
    taken = false;
    if (!fits) replay.prepare([this] { run(); }, [this] { return result; });
    replay();
    result_here.copy_(result);  // waits
    return result_here.data_ptr<double>()[result_here.size(0) - 1];
  }

  void upload_lists()
  {
    const at::Tensor starts = on_host({rows() + 1}, at::kLong), ends = on_host({room.candidates}, at::kLong);
    int64_t *const s = starts.data_ptr<int64_t>(), *const n = ends.data_ptr<int64_t>();
    std::copy(first.begin(), first.end(), s);
    std::fill(s + first.size(), s + rows() + 1, first.back());
    for (size_t k = 0; k < other.size(); k++) n[k] = row(other[k]);
    first_of_centre.copy_(starts, true);
    const at::Tensor neighbour = neighbours.narrow(0, 0, room.candidates);
    neighbour.copy_(ends, true);
    const at::Tensor of_candidates = at::searchsorted(first_of_centre.narrow(0, 1, rows()), candidate_numbers, false, true);
    centres.narrow(0, 0, room.candidates).copy_(of_candidates.clamp_max(rows() - 1));
    const auto [sorted, order] = at::sort(neighbour, true, 0, false);
    by_neighbour.copy_(order);
    first_of_neighbour.copy_(at::searchsorted(sorted, atom_numbers));
  }

  void upload_owners()
  {
    const at::Tensor owners = on_host({room.ghosts}, at::kLong), table = on_host({rows(), room.copies}, at::kLong);
    std::copy(owner_of.begin(), owner_of.end(), owners.data_ptr<int64_t>());
    table.fill_(everyone());
    std::vector<int64_t> counts(owned());
    for (size_t k = 0; k < owner_of.size(); k++)
      table.data_ptr<int64_t>()[owner_of[k] * room.copies + counts[owner_of[k]]++] = rows() + (int64_t) k;
    owner.copy_(owners, true);
    copies.copy_(table, true);
  }

  void upload_species(const Atoms &atoms)
  {
    const at::Tensor of_rows = on_host({everyone()}, at::kLong);
    int64_t *const s = of_rows.data_ptr<int64_t>();
    std::copy(atoms.species.begin(), atoms.species.begin() + atoms.owned, s);
    std::copy(atoms.species.begin() + atoms.owned, atoms.species.end(), s + rows());
    species.copy_(of_rows, true);
    const at::Tensor of_pairs = at::tensor(atoms.cutoffs, at::kDouble).to(device);
    const at::Tensor pair = at_ends(species, centres).mul(atoms.kinds).add(at_ends(species, neighbours));
    cutoffs.copy_(of_pairs.index_select(0, pair));
    cutoffs.narrow(0, first.back(), room.candidates - first.back()).fill_(-1);  // which no candidate is within
    species_there = atoms.species;
  }

  void upload_positions(const Atoms &atoms)
  {
    double *const x = positions_here.data_ptr<double>();
    std::copy(atoms.positions, atoms.positions + 3 * atoms.owned, x);
    std::copy(atoms.positions + 3 * atoms.owned, atoms.positions + 3 * atoms.all, x + 3 * rows());
    positions.copy_(positions_here, true);
  }

  // --- the step ----------------------------------------------------------------------------------------------------------------

  at::Tensor at_ends(const at::Tensor &of_atoms, const at::Tensor &ends) const
  {
    return of_atoms.index_select(0, ends.narrow(0, 0, room.candidates));
  }

  // Candidates that lie row by row, and which of them are near.
  struct Near {
    at::Tensor before;  // [candidates + 1]: how many are near among those before
    at::Tensor starts;  // [rows + 1]: the same at the beginning of each row
    at::Tensor most;    // [1]: of a row
  };

  Near counted(const at::Tensor &near, const at::Tensor &first) const
  {
    const at::Tensor before = at::cat({zero, near.cumsum(0, at::kLong)});
    const at::Tensor starts = before.index_select(0, first);
    const int64_t rows = starts.size(0) - 1;
    return {before, starts, starts.narrow(0, 1, rows).sub(starts.narrow(0, 0, rows)).max().view({1})};
  }

  // [candidates]: where each that is near stands among these, and the others behind the last edge.
  at::Tensor places(const at::Tensor &near, const Near &counted) const
  {
    return at::where(near, counted.before.narrow(0, 0, room.candidates), no_edge);
  }

  // [rows, width]: the places of each row's edges, padded with the number of edges.
  at::Tensor table(const at::Tensor &starts, const Padding &padding, const at::Tensor &number, int64_t width) const
  {
    const int64_t rows = starts.size(0) - 1;
    const at::Tensor pads = padding.last.gt(number);
    const at::Tensor from = at::where(pads, at::maximum(padding.first, number), starts.narrow(0, 0, rows));
    const at::Tensor to = at::where(pads, padding.last, starts.narrow(0, 1, rows));
    const at::Tensor place = from.unsqueeze(1).add(columns.narrow(0, 0, width));
    return at::where(place.lt(to.unsqueeze(1)), place, no_edge);
  }

  // For each row of a table the sum of the rows that it lists, in its order; an operator that adds would take any order.
  static at::Tensor sum_over(const at::Tensor &values, const at::Tensor &table)
  {
    const at::Tensor padded = at::cat({values, at::zeros({1, values.size(1)}, values.options())});
    return padded.index_select(0, table.view(-1)).view({table.size(0), table.size(1), values.size(1)}).sum(1);
  }

  // All that is replayed. Nothing here may wait for the device, or have a size that depends on what it computes.
  void run()
  {
    const at::Tensor between = at_ends(positions, neighbours).sub(at_ends(positions, centres));
    at::Tensor near = between.mul(between).sum(1).lt(cutoffs);
    at::Tensor near_by_neighbour = near.index_select(0, by_neighbour);
    const Near of_centres = counted(near, first_of_centre), of_neighbours = counted(near_by_neighbour, first_of_neighbour);
    const at::Tensor all_near = of_centres.before.narrow(0, room.candidates, 1);
    const at::Tensor fits = at::cat({all_near, all_near.neg(), of_centres.most, of_neighbours.most}).le(limits).all();
    near = near.logical_and(fits);
    near_by_neighbour = near_by_neighbour.logical_and(fits);
    const at::Tensor number = all_near.mul(fits);

    const at::Tensor place = places(near, of_centres);
    const at::Tensor chosen = padding_numbers.scatter(0, place, candidate_numbers).narrow(0, 0, room.edges);
    const at::Tensor centre = centres.index_select(0, chosen), neighbour = neighbours.index_select(0, chosen);
    const at::Tensor is_real = chosen.lt(room.candidates).unsqueeze(1);
    const at::Tensor apart = positions.index_select(0, neighbour).sub(positions.index_select(0, centre));
    const at::Tensor vectors = at::where(is_real, apart, beyond);
    outgoing = table(of_centres.starts.mul(fits), padding_of_centres, number, room.outgoing);
    const at::Tensor edge_at =
        edge_numbers.scatter(0, places(near_by_neighbour, of_neighbours), place.index_select(0, by_neighbour));
    incoming = table(of_neighbours.starts.mul(fits), padding_of_neighbours, number, room.incoming);
    incoming = edge_at.index_select(0, incoming.view(-1)).view(incoming.sizes());

    std::vector<at::Tensor> inputs{vectors, species, centre, neighbour, outgoing};
    if (package.passes_messages) inputs.push_back(incoming);
    const std::vector<at::Tensor> outputs = package.run(std::move(inputs));
    const at::Tensor slopes = outputs[1];

    at::Tensor forces = sum_over(slopes, incoming).neg_();
    forces.narrow(0, 0, rows()).add_(sum_over(slopes, outgoing));
    const at::Tensor products = vectors.index_select(1, first_axis).mul(slopes.index_select(1, second_axis)).neg();
    virials_of_edges = at::where(is_real, products, no_virial);
    result = at::cat({outputs[0], forces.view(-1), virials_of_edges.sum(0), fits.to(at::kDouble).view({1})});
  }
};

}    // namespace ddpkit
