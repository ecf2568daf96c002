"""CUDA C++ for the convolution of NequIP, written out for one set of irreps.

One warp computes what one atom gets through up to 32 channels of one irrep of the features: a lane has a channel, and goes over
the atom's edges in their order. Where the atom with most edges would outlast the others, all warps of a block share one atom's
edges (`share`), every so many one, and their sums are added in the order of the warps. Every product with a Clebsch-Gordan
coefficient that is not zero is a line of its own with the coefficient in it, so that there are no tables to read and no zeros to
multiply with. Blocks add nothing up between them: a sum over neighbours is a later kernel's (`collect`), so results have the same
bits every time.

With C the coefficients, and for every path from an irrep a with harmonics Y of degree l to an irrep c,

    f(x, w, g, Y) = sum over edges, paths, channels, i, j, k of C[i, j, k] g[k] Y[j] x[i] w

is linear in each of the features x of the neighbour, weights w, the cotangent g of the output, and Y. The kernels:

    convolve          df/dg
    gradient          df/dx, df/dw, df/dY
    second            dS/dg, dS/dx, dS/dw, dS/dw', dS/dY of S = f(x', w, g, Y) + f(x, w', g, Y) + f(x, w, g, Y') for given
                      x', w' and Y', called xt, wt and yt below
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from ddpkit.models.geometry import wigner_3j
from ddpkit.models.irreps import Irrep, Paths

LANES = 32
EARLY = 3
"""Components of irreps whose features and weights are read an edge ahead; of wider ones the lines between take longer."""
SUMMED = 8
"""Sums that the warps of a block add at a time."""
BYTES = {"float": 4, "double": 8}
SHARED = 48 * 1024
"""Bytes of shared memory that a block has on every GPU."""

HEAD = """
#ifndef SIMULATED
#define LANE (threadIdx.x % 32)
#define WARP (threadIdx.x / 32)
// a row of numbers that a warp needs: fetched early, a number a lane, and laid out for all lanes
#define ROW(name) real name
#define FETCH(name, row, n) name = lane < (n) ? (row)[lane] : (real)0;
#define LAY(to, name, n) { __syncwarp(); if (lane < (n)) (to)[lane] = name; __syncwarp(); }
// of sums over the warps of a block: their places, when all have put theirs there, and the warp that adds them
#define SUMS(n) SUMMED
#define PLACE(o) ((o) % SUMMED)
#define BARRIER __syncthreads();
#define ADDS (warp == 0)

// sums v[j] of all lanes into to[j]: lane j ends with the sum of number j
__device__ __forceinline__ void total(real (&v)[32], int lane, real* to, int n) {
#define HALVE(half) \\
  { \\
    const bool upper = lane & half; \\
    _Pragma("unroll") for (int j = 0; j < half; ++j) { \\
      const real sent = upper ? v[j] : v[j + half]; \\
      const real kept = upper ? v[j + half] : v[j]; \\
      v[j] = kept + __shfl_xor_sync(0xffffffffu, sent, half); \\
    } \\
  }
  HALVE(16) HALVE(8) HALVE(4) HALVE(2) HALVE(1)
  if (lane < n) to[lane] = v[0];
}
#endif
"""

COLUMNS = 256
"""Columns that a block of `collect` sums."""


class Path(NamedTuple):
    """One path of the product from an irrep."""

    l: int  # of the harmonics
    width: int  # components of what it leads to
    weight: int  # its first column of the weights
    part: int  # number of what it leads to among the irreps of the output
    out: int  # its first column there, of component 0
    stride: int  # columns there from one component to the next
    coefficients: dict[int, dict[int, dict[int, float]]]  # by i, j and k, those that are not zero


class Term(NamedTuple):
    """The paths from one irrep of the features."""

    width: int  # components
    channels: int
    column: int  # its first column in the rows of edges, where all features stand side by side
    paths: tuple[Path, ...]

    @property
    def columns(self) -> int:
        """Columns of its features; component i begins at column i * channels."""
        return self.width * self.channels

    @property
    def components(self) -> int:
        """Components of all that its paths lead to."""
        return sum(path.width for path in self.paths)


class Product(NamedTuple):
    """Everything that the kernels' text depends on. Features, weights and output are rows of numbers.

    Features are an array for each irrep, as the layers around have them, so that none has to be copied: by component, then
    channel. So is the output: by component, then path, then channel. Weights: by irrep, then path, then channel.
    """

    terms: tuple[Term, ...]
    harmonics: int
    features: int  # columns of all irreps
    weights: int
    outputs: tuple[tuple[int, int], ...]  # components and channels of each irrep


def product_of(
    paths: dict[Irrep, Paths], irreps_in: dict[Irrep, int], irreps_out: dict[Irrep, int], l_max: int
) -> Product:
    """The product whose paths these are.

    Args:
        paths: of each irrep of the features that has some, as in `ddpkit.models.convolution.Convolution`.
        irreps_in: channels of the features.
        irreps_out: channels of the output: of all paths to an irrep.
        l_max: of the harmonics.
    """
    parts = list(irreps_out)
    first = dict.fromkeys(parts, 0)
    outputs = tuple((2 * irrep[0] + 1, channels) for irrep, channels in irreps_out.items())
    terms, features, weights = [], 0, 0
    for a, of_irrep in paths.items():
        lines = []
        for l, c in of_irrep:
            coefficients = _coefficients(a[0], l, c[0])
            lines.append(Path(l, 2 * c[0] + 1, weights, parts.index(c), first[c], irreps_out[c], coefficients))
            first[c] += irreps_in[a]
            weights += irreps_in[a]
        terms.append(Term(2 * a[0] + 1, irreps_in[a], features, tuple(lines)))
        features += terms[-1].columns
    return Product(tuple(terms), (l_max + 1) ** 2, features, weights, outputs)


@cache
def _coefficients(a: int, l: int, c: int) -> dict[int, dict[int, dict[int, float]]]:
    dense = (math.sqrt(2 * c + 1) * wigner_3j(a, l, c)).tolist()
    return {
        i: {
            j: {k: value for k, value in enumerate(row) if abs(value) > 1e-12}
            for j, row in enumerate(plane)
            if any(abs(value) > 1e-12 for value in row)
        }
        for i, plane in enumerate(dense)
    }


def warps(term: Term) -> int:
    """How many of an atom's warps have channels of a term."""
    return -(-term.channels // LANES)


def warps_of_block(product: Product, real: str) -> int:
    """How many warps are one block: up to four, as there is shared memory for them."""
    numbers = 2 * product.harmonics + LANES * (_most(product) + SUMMED)
    return max(1, min(4, SHARED // (BYTES[real] * numbers)))


def _most(product: Product) -> int:
    """Most components that the paths of one term lead to."""
    return max((term.components for term in product.terms), default=0)


def source(product: Product, name: str, real: str) -> str:
    """The text of one kernel.

    Args:
        product: what it computes with.
        name: `convolve`, `gradient` or `second`, the latter two with `_y` behind where df/dY is wanted too; or `collect`.
        real: "float" or "double".
    """
    if name == "collect":
        return f"typedef {real} real;\n{_collect(product)}"
    sizes = f"#define WARPS {warps_of_block(product, real)}\n#define SUMMED {SUMMED}\n"
    return f"typedef {real} real;\n{sizes}{HEAD}\n{_kernel(product, name)}"


def blocks_of_columns(product: Product) -> int:
    """Blocks of `collect` for an atom: none has columns of two irreps."""
    return sum(-(-term.columns // COLUMNS) for term in product.terms)


def _collect(product: Product) -> str:
    """Sums of the edges' rows of features over the edges of each neighbour."""
    cases, before = [], 0
    for n, term in enumerate(product.terms):
        first, before = before, before + -(-term.columns // COLUMNS)
        cases.append(
            f"  if (blockIdx.y < {before}) {{\n"
            f"    column = {COLUMNS} * (blockIdx.y - {first}) + threadIdx.x;\n"
            f"    if (column >= {term.columns}) return;\n"
            f"    out = dx_{n} + (long long)blockIdx.x * {term.columns} + column;\n"
            f"    column += {term.column};\n"
            "  } else"
        )
    return f"""
extern "C" __global__ void __launch_bounds__({COLUMNS}) collect(
    const real* of_edges, const long long* rows, int most, int edges, {_arrays("real* dx", len(product.terms))}) {{
  int column;
  real* out;
{chr(10).join(cases)} return;
  const long long* mine = rows + (long long)blockIdx.x * most;
  real sum = 0;
  for (int n = 0; n < most; ++n) {{
    const long long edge = mine[n];
    if (edge >= edges) break;  // so are all behind it
    sum += of_edges[edge * {product.features} + column];
  }}
  *out = sum;
}}
"""


def _arrays(name: str, number: int) -> str:
    """Parameters: an array for each irrep."""
    return ", ".join(f"{name}_{n}" for n in range(number))


def _arguments(product: Product, kind: str, *, by_y: bool) -> str:
    """What a kernel is given beside the factors and the edges."""
    features, outputs = len(product.terms), len(product.outputs)
    arguments = {
        "convolve": [_arrays("real* out", outputs)],
        "gradient": [_arrays("const real* g", outputs), "real* dx, real* dw"],
        "second": [
            _arrays("const real* g", outputs),
            _arrays("const real* xt", features),
            "const real* wt, const real* yt",
            _arrays("real* dg", outputs),
            "real* dx, real* dw, real* dwt",
        ],
    }[kind]
    return ", ".join([*arguments, *(["real* dy"] if by_y else [])])


def _kernel(product: Product, name: str) -> str:
    kind, _, by_y = name.partition("_")
    arguments = _arguments(product, kind, by_y=bool(by_y))
    cases, before = [], 0
    longest_first = sorted(product.terms, key=lambda term: -term.width * term.components)
    for term in longest_first:
        lines = "\n".join(_term(product, term, kind, bool(by_y)))
        here = f"const int channel = 32 * (blockIdx.y - {before}) + lane;"
        before += warps(term)
        cases.append(f"  if (blockIdx.y < {before}) {{\n    {here}\n{lines}\n    return;\n  }}")
    shared = "" if kind == "convolve" else f"  __shared__ real gs[WARPS][{_most(product)}][32];\n"
    shared += "" if kind == "gradient" else f"  __shared__ real sums[WARPS][SUMS({_most(product)})][32];\n"
    is_first = "" if kind == "gradient" else "  const bool is_first = from == begins;\n"
    return f"""
extern "C" __global__ void __launch_bounds__(32 * WARPS) {name}(
    {_arrays("const real* x", len(product.terms))}, const real* w, const real* y,
    const long long* neighbour, const long long* start,
    int atoms, int begin, int end, int edges, int share, {arguments}) {{
  __shared__ real ys[WARPS][{2 * product.harmonics}];
{shared}  const int lane = LANE, warp = WARP;
  const int atom = share ? blockIdx.x : blockIdx.x * WARPS + warp;
  if (atom >= atoms) return;
  const int own = start[atom];
  const int begins = own > begin ? own : begin;
  const int to = start[atom + 1] < end ? start[atom + 1] : end;
  if (begins >= to) return;  // all warps of the block, where they share the atom
  const int from = share ? begins + warp : begins, step = share ? WARPS : 1;
{is_first}  const int safe = from < to ? from : begins;  // an edge that there is
{chr(10).join(cases)}
}}"""


def _term(product: Product, term: Term, kind: str, by_y: bool) -> Iterator[str]:
    is_full = term.channels % LANES == 0
    live = "" if is_full else f"channel < {term.channels} ? "
    zero = "" if is_full else " : (real)0"
    guard = "" if is_full else f"if (channel < {term.channels}) "
    h = product.harmonics
    places = [  # of each component of the output, its place in the atom's rows for this lane's channel
        f"{path.part}[{path.out + k * path.stride} + channel]" for path in term.paths for k in range(path.width)
    ]
    parts = sorted({path.part for path in term.paths})

    if kind != "convolve":
        yield "    {"
        yield from (
            f"    const real* const g{n} = g_{n} + (long long)atom * {math.prod(product.outputs[n])};" for n in parts
        )
        yield from (f"    gs[warp][{o}][lane] = {live}g{place}{zero};" for o, place in enumerate(places))
        yield "    }"
    if kind != "gradient":
        # what earlier parts of the edges have given
        name = "out" if kind == "convolve" else "dg"
        rows_of_atom = [
            f"real* const row{n} = {name}_{n} + (long long)atom * {math.prod(product.outputs[n])};" for n in parts
        ]
        yield f"    const bool goes_on = is_first && begins > own{'' if is_full else f' && channel < {term.channels}'};"
        yield from (f"    real o{o} = 0;" for o in range(len(places)))
        yield "    if (goes_on) {"
        yield from (f"      {line}" for line in rows_of_atom)
        yield from (f"      o{o} = row{place};" for o, place in enumerate(places))
        yield "    }"
    # of the edge after this one: what is read is on its way while this one is computed
    own = [f"x{i}" for i in range(term.width)], [f"w{p}" for p in range(len(term.paths))]
    rows = [("x", "w", *own)]
    if kind == "second":
        rows.append(("xt", "wt", [f"a{i}" for i in range(term.width)], [f"b{p}" for p in range(len(term.paths))]))
    is_early = term.width <= EARLY
    columns = [i * term.channels for i in range(term.width)]
    number = product.terms.index(term)

    def read(assign: str, edge: str, neighbour: str) -> Iterator[str]:
        for x, w, of_x, of_w in rows:
            yield f"const real* const {x}_row = {x}_{number} + {neighbour} * {term.columns};"
            yield f"const real* const {w}_row = {w} + (long long)({edge} - begin) * {product.weights};"
            for name, column in zip(of_x, columns, strict=True):
                yield assign.format(name, f"{live}{x}_row[{column} + channel]{zero}")
            for name, path in zip(of_w, term.paths, strict=True):
                yield assign.format(name, f"{live}{w}_row[{path.weight} + channel]{zero}")

    names = [name for row in rows for part in row[2:] for name in part]
    staged = [("y", 0), ("yt", h)][: len(rows)]
    yield "    " + " ".join(f"ROW(next_{y});" for y, _ in staged)
    yield from (f"    FETCH(next_{y}, {y} + (long long)safe * {h}, {h})" for y, _ in staged)
    yield "    long long near = neighbour[safe];"
    if is_early:
        yield "    " + " ".join(f"real next_{name};" for name in names)
        yield "    {"
        yield from (f"    {line}" for line in read("next_{} = {};", "safe", "near"))
        yield "    }"
        yield "    near = neighbour[from + step < to ? from + step : safe];"
    yield "#pragma unroll 1"
    yield "    for (int e = from; e < to; e += step) {"
    if kind != "convolve":
        yield f"      const long long at = (long long)(e - begin) * {product.weights};"
    yield from (f"      LAY(ys[warp] + {place}, next_{y}, {h})" for y, place in staged)
    if is_early:
        yield from (f"      const real {name} = next_{name};" for name in names)
        yield "      if (e + step < to) {"
        yield from (f"        {line}" for line in read("next_{} = {};", "e + step", "near"))
    else:
        yield from (f"      {line}" for line in read("const real {} = {};", "e", "near"))
        yield "      if (e + step < to) {"
    yield from (f"        FETCH(next_{y}, {y} + (long long)(e + step) * {h}, {h})" for y, _ in staged)
    ahead = "2 * step" if is_early else "step"
    yield f"        near = neighbour[e + {ahead} < to ? e + {ahead} : e];"
    yield "      }"
    if kind != "convolve":
        yield "      " + " ".join(f"real d{i} = 0;" for i in range(term.width))
    if by_y:
        yield "      real s[32] = {0};"
    for l in sorted({path.l for path in term.paths}):
        yield "      {"
        for j in range(2 * l + 1):
            yield f"      const real y{j} = ys[warp][{l * l + j}];"
            if kind == "second":
                yield f"      const real t{j} = ys[warp][{h + l * l + j}];"
        done = 0
        for p, path in enumerate(term.paths):
            if path.l == l:
                yield from _path(p, path, kind, by_y, done, guard)
            done += path.width
        yield "      }"
    if kind != "convolve":
        row = f"dx + (long long)e * {product.features} + {term.column} + channel"
        yield f"      {guard}{{ real* const de = {row};"
        yield from (f"      de[{i * term.channels}] = d{i};" for i in range(term.width))
        yield "      }"
    if by_y:
        yield f"      total(s, lane, dy + ((long long)blockIdx.y * edges + e) * {h}, {h});"
    yield "    }"
    if kind != "gradient":
        yield "    if (share) {"
        for done in range(0, len(places), SUMMED):
            some = range(done, min(done + SUMMED, len(places)))
            yield "      BARRIER"
            yield from (f"      sums[warp][PLACE({o})][lane] = o{o};" for o in some)
            yield "      BARRIER"
            yield "      if (ADDS) {"
            yield from (f"        o{o} = 0;" for o in some)
            yield "        for (int other = 0; other < WARPS; ++other) {"
            yield from (f"          o{o} += sums[other][PLACE({o})][lane];" for o in some)
            yield "        }"
            yield "      }"
        yield "    }"
        condition = "!share || ADDS" if is_full else f"(!share || ADDS) && channel < {term.channels}"
        yield f"    if ({condition}) {{"
        yield from (f"      {line}" for line in rows_of_atom)
        yield from (f"      row{place} = o{o};" for o, place in enumerate(places))
        yield "    }"


def _path(p: int, path: Path, kind: str, by_y: bool, done: int, guard: str) -> Iterator[str]:
    """One path for one edge; `done` components of the output stand before its own."""
    yield f"      {{ // path {p}: l = {path.l}"
    if kind != "convolve":
        yield "      real by_w = 0;" + (" real by_b = 0;" if kind == "second" else "")
        yield from (f"      const real g{k} = gs[warp][{done + k}][lane];" for k in range(path.width))
    for i, by_j in path.coefficients.items():
        if not by_j:
            continue
        yield "      {"
        if kind == "convolve":
            yield f"      const real v = w{p} * x{i};"
            for j, by_k in by_j.items():
                yield f"      {{ const real r = v * y{j};"
                yield from (f"      o{done + k} += {_literal(c)} * r;" for k, c in by_k.items())
                yield "      }"
        else:
            for j, by_k in by_j.items():
                yield f"      const real q{j} = " + " + ".join(f"{_literal(c)} * g{k}" for k, c in by_k.items()) + ";"
            yield "      const real by_x = " + " + ".join(f"q{j} * y{j}" for j in by_j) + ";"
        if kind == "gradient":
            yield f"      by_w += by_x * x{i}; d{i} += w{p} * by_x;"
            if by_y:
                yield f"      const real v = w{p} * x{i};"
                yield from (f"      s[{path.l**2 + j}] += q{j} * v;" for j in by_j)
        if kind == "second":
            yield "      const real by_t = " + " + ".join(f"q{j} * t{j}" for j in by_j) + ";"
            yield f"      by_w += by_x * a{i} + by_t * x{i}; by_b += by_x * x{i};"
            yield f"      d{i} += b{p} * by_x + w{p} * by_t;"
            yield f"      const real u = w{p} * a{i} + b{p} * x{i}, v = w{p} * x{i};"
            for j, by_k in by_j.items():
                yield f"      {{ const real r = u * y{j} + v * t{j};"
                yield from (f"      o{done + k} += {_literal(c)} * r;" for k, c in by_k.items())
                yield "      }"
                if by_y:
                    yield f"      s[{path.l**2 + j}] += q{j} * u;"
        yield "      }"
    if kind != "convolve":
        yield f"      {guard}dw[at + {path.weight} + channel] = by_w;"
    if kind == "second":
        yield f"      {guard}dwt[at + {path.weight} + channel] = by_b;"
    yield "      }"


def _literal(value: float) -> str:
    return f"(real){value!r}"
