// What the model is called with, from the neighbour list of LAMMPS.
//
// The list holds pairs up to the cutoff and a skin. It is taken over when LAMMPS has rebuilt it; each step those within the
// cutoff are picked: on the host by a loop, on a GPU by operators of torch, where the list then lies. Here are tensors of the
// sizes that a step has. Those of step.h stay from step to step, and take the place of these on a GPU that can replay wherever a
// step is one call of the model that needs no other rank.
//
// The model holds for sizes from two on, and a rank may have no atoms. So two atoms of the first species follow the owned ones
// (before the ghosts), with an edge from each to the other that is longer than the cutoff: they add nothing.
#pragma once

#include <ATen/Tensor.h>
#include <ATen/core/IListRef_inl.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace ddpkit {

constexpr int64_t PADDING = 2;  // atoms, and edges

// The atoms of this rank as LAMMPS has them: owned ones, then ghosts.
struct Atoms {
  int64_t owned, all;
  const double *positions;               // [all, 3], Å
  const std::vector<int64_t> &species;   // [all]
  const std::vector<double> &cutoffs;    // squared, Å^2, [species, species] of centre and neighbour
  int64_t kinds;                         // number of species
  double r_max;                          // Å
};

// Edges of some centres; the last PADDING edges of the model are not counted.
struct Edges {
  int64_t first_centre;
  int64_t number;
  at::Tensor ends;                 // [number] int32: the neighbours among all atoms
  std::vector<at::Tensor> inputs;  // of the model: vectors, species, centre, neighbour, outgoing and perhaps incoming
};

inline at::TensorOptions integers(c10::Device device) { return at::TensorOptions().dtype(at::kLong).device(device); }

// The pairs of LAMMPS' list.
class Pairs {
 public:
  // Takes pairs over: of each owned atom, in their order, the neighbours.
  template <typename Neighbours>
  void take(int64_t owned, const Neighbours &neighbours_of)
  {
    first.assign(1, 0);
    other.clear();
    for (int64_t i = 0; i < owned; i++) {
      neighbours_of(i, other);
      first.push_back((int64_t) other.size());
    }
    taken = true;
  }

  int64_t owned() const { return (int64_t) first.size() - 1; }

 protected:
  std::vector<int64_t> first{0};  // [owned + 1]: where the candidates of an atom begin
  std::vector<int> other;         // [candidates]
  bool taken = false;             // since the last call
};

class Candidates : public Pairs {
 public:
  // The edges of centres [from, to). Tensors of the last call are overwritten.
  // `chunked`: ghosts are then the neighbours of the edges, one for each, so that sizes are those of the chunk.
  virtual Edges pick(const Atoms &atoms, int64_t from, int64_t to, bool chunked, bool incoming) = 0;
  virtual ~Candidates() = default;
};

class HostCandidates : public Candidates {
 public:
  Edges pick(const Atoms &atoms, int64_t from, int64_t to, bool chunked, bool incoming) override
  {
    const int64_t candidates = first[to] - first[from], centres = to - from, owned = centres + PADDING;
    const int64_t room = candidates + PADDING + 1;
    double *const v = doubles(vectors, 3 * room);
    int64_t *const c = longs(centre, room), *const n = longs(neighbour, room);
    ends.resize(room);
    counts.assign(owned, 0);
    const double *const x = atoms.positions;
    const int64_t *const species = atoms.species.data();
    int64_t e = 0;
    for (int64_t i = from; i < to; i++) {
      const double x0 = x[3 * i], x1 = x[3 * i + 1], x2 = x[3 * i + 2];
      const double *const cutoffs = atoms.cutoffs.data() + species[i] * atoms.kinds;
      const int64_t start = e;
      // every candidate is written, and the next one over it where it was too far: no branch that cannot be foreseen
      for (int64_t k = first[i]; k < first[i + 1]; k++) {
        const int j = other[k];
        const double d0 = x[3 * (int64_t) j] - x0, d1 = x[3 * (int64_t) j + 1] - x1, d2 = x[3 * (int64_t) j + 2] - x2;
        v[3 * e] = d0;
        v[3 * e + 1] = d1;
        v[3 * e + 2] = d2;
        c[e] = i - from;
        ends[e] = j;
        e += d0 * d0 + d1 * d1 + d2 * d2 < cutoffs[species[j]];
      }
      counts[i - from] = e - start;
    }
    const int64_t number = e, edges = number + PADDING;
    for (int64_t k = 0; k < number; k++)
      n[k] = chunked ? owned + k : (ends[k] < atoms.owned ? ends[k] : ends[k] + PADDING);
    for (int64_t k = 0; k < PADDING; k++) {
      v[3 * (number + k)] = (k ? -2 : 2) * atoms.r_max;
      v[3 * (number + k) + 1] = v[3 * (number + k) + 2] = 0;
      c[number + k] = centres + k;
      n[number + k] = centres + 1 - k;
      counts[centres + k] = 1;
    }
    const int64_t all = chunked ? owned + number : atoms.all + PADDING;
    int64_t *const s = longs(kinds, all);
    std::copy(species + from, species + to, s);
    std::fill(s + centres, s + owned, 0);
    if (chunked)
      for (int64_t k = 0; k < number; k++) s[owned + k] = species[ends[k]];
    else
      std::copy(species + atoms.owned, species + atoms.all, s + owned);

    Edges made{from, number, at::from_blob(ends.data(), {number}, at::kInt), {}};
    made.inputs = {vectors.narrow(0, 0, 3 * edges).view({edges, 3}), kinds.narrow(0, 0, all), centre.narrow(0, 0, edges),
                   neighbour.narrow(0, 0, edges), table(outgoing, c, edges, owned)};
    if (incoming) {
      counts.assign(all, 0);
      for (int64_t k = 0; k < edges; k++) counts[n[k]]++;
      made.inputs.push_back(table(this->incoming, n, edges, all));
    }
    return made;
  }

 private:
  // kept from step to step, and as large as has been needed
  at::Tensor vectors, kinds, centre, neighbour, outgoing, incoming;
  std::vector<int> ends;
  std::vector<int64_t> counts;

  static int64_t *longs(at::Tensor &kept, int64_t size)
  {
    if (!kept.defined() || kept.size(0) < size) kept = at::empty({size + size / 8}, integers(c10::kCPU));
    return kept.data_ptr<int64_t>();
  }
  static double *doubles(at::Tensor &kept, int64_t size)
  {
    if (!kept.defined() || kept.size(0) < size) kept = at::empty({size + size / 8}, at::kDouble);
    return kept.data_ptr<double>();
  }

  // [rows, most]: the edges of each row, whose numbers are in `counts`, padded with `edges`; `counts` is used up.
  at::Tensor table(at::Tensor &kept, const int64_t *row_of, int64_t edges, int64_t rows)
  {
    const int64_t most = std::max(*std::max_element(counts.begin(), counts.end()), PADDING);
    int64_t *const places = longs(kept, rows * most);
    for (int64_t i = 0; i < rows; i++) {
      std::fill(places + i * most + counts[i], places + (i + 1) * most, edges);
      counts[i] = 0;
    }
    for (int64_t k = 0; k < edges; k++) places[row_of[k] * most + counts[row_of[k]]++] = k;
    return kept.narrow(0, 0, rows * most).view({rows, most});
  }
};

class DeviceCandidates : public Candidates {
 public:
  explicit DeviceCandidates(c10::Device device) : device(device) {}

  Edges pick(const Atoms &atoms, int64_t from, int64_t to, bool chunked, bool incoming) override
  {
    if (taken) upload();
    taken = false;
    const at::Tensor x = here((void *) atoms.positions, {atoms.all, 3}, at::kDouble);
    const at::Tensor species = here((void *) atoms.species.data(), {atoms.all}, at::kLong);
    const at::Tensor cutoffs = here((void *) atoms.cutoffs.data(), {atoms.kinds * atoms.kinds}, at::kDouble);
    const int64_t centres = to - from, owned = centres + PADDING;
    const at::Tensor c = centre.narrow(0, first[from], first[to] - first[from]);
    const at::Tensor n = neighbour.narrow(0, first[from], first[to] - first[from]);
    const at::Tensor d = x.index_select(0, n).sub(x.index_select(0, c));
    const at::Tensor pair = species.index_select(0, c).mul(atoms.kinds).add(species.index_select(0, n));
    const at::Tensor near = d.mul(d).sum(1).lt(cutoffs.index_select(0, pair)).nonzero().squeeze(1);
    const at::Tensor ends = n.index_select(0, near);
    const int64_t number = ends.size(0), edges = number + PADDING, all = chunked ? owned + number : atoms.all + PADDING;

    const at::Tensor extra = at::arange(PADDING, integers(device));
    const at::Tensor beyond = at::zeros({PADDING, 3}, x.options());
    beyond.select(1, 0).copy_(extra.mul(-4 * atoms.r_max).add(2 * atoms.r_max));
    const at::Tensor renamed =
        chunked ? at::arange(owned, all, integers(device)) : at::where(ends.lt(atoms.owned), ends, ends.add(PADDING));
    const at::Tensor rows = joined({c.index_select(0, near).sub(from), extra.add(centres)});
    const at::Tensor columns = joined({renamed, extra.flip(0).add(centres)});
    const at::Tensor ghosts =
        chunked ? species.index_select(0, ends) : species.narrow(0, atoms.owned, atoms.all - atoms.owned);
    Edges made{from, number, ends.to(at::kInt), {}};
    made.inputs = {joined({d.index_select(0, near), beyond}),
                   joined({species.narrow(0, from, centres), at::zeros({PADDING}, integers(device)), ghosts}), rows, columns,
                   table(rows, at::arange(edges, integers(device)), owned)};
    if (incoming) {
      const at::Tensor order = at::argsort(columns, true, 0, false);
      made.inputs.push_back(table(columns.index_select(0, order), order, all));
    }
    return made;
  }

 private:
  c10::Device device;
  at::Tensor centre, neighbour;

  static at::Tensor joined(const std::vector<at::Tensor> &parts) { return at::cat(parts); }

  at::Tensor here(void *data, at::IntArrayRef sizes, at::ScalarType type)
  {
    return at::from_blob(data, sizes, type).to(device);
  }

  void upload()
  {
    std::vector<int64_t> counts(owned());
    for (int64_t i = 0; i < owned(); i++) counts[i] = first[i + 1] - first[i];
    const at::Tensor numbers = here(counts.data(), {owned()}, at::kLong);
    centre = at::repeat_interleave(numbers);
    neighbour = here(other.data(), {(int64_t) other.size()}, at::kInt).to(at::kLong);
  }

  // [rows, most] as above; `row_of` ascends.
  at::Tensor table(const at::Tensor &row_of, const at::Tensor &edge, int64_t rows)
  {
    const int64_t edges = edge.size(0);
    const at::Tensor counts = at::bincount(row_of, {}, rows);
    const int64_t most = std::max(counts.max().item().toLong(), PADDING);
    const at::Tensor before = at::cumsum(counts, 0).sub(counts);
    const at::Tensor column = at::arange(edges, integers(device)).sub(before.index_select(0, row_of));
    at::Tensor places = at::full({rows * most}, edges, integers(device));
    places.scatter_(0, row_of.mul(most).add(column), edge);
    return places.view({rows, most});
  }
};

}    // namespace ddpkit
