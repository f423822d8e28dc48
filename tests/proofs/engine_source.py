"""One translation unit with the engine and every mutant of it, each in a namespace and an op
library of its own.

Mutant 0 is the engine itself. Mutant i's ops are torch.ops.tpk_mutant_<i>.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from engine_mutants import MUTANTS
from mutation import Edit, markers

ROOT = Path(__file__).resolve().parents[2]

# Files that all ops need, from csrc/. A mutant of any other file is that file alone, beside mutant
# 0's copy of these.
SHARED = (
    "op.h",
    "gemm/packed_weights.cpp",
    "gemm/gemm.cpp",
    "gemm/products.cpp",
    "gemm/linear.cpp",
    "gemm/linear_gradients.cpp",
    "engine/collective_log.cpp",
    "engine/channel.cpp",
    "engine/cross_entropy.h",
)
OPS = (
    "engine/row_linear.cpp",
    "engine/column_linear.cpp",
    "engine/embedding.cpp",
    "engine/collectives.cpp",
    "engine/cross_entropy.cpp",
    "engine/linear_cross_entropy.cpp",
)

# Stands in for the CUDA kernels: the same result, by the group's own all-reduce.
STAND_IN = r"""
namespace test_peers {
std::string all_reduce(const std::string& group, const at::Tensor& buffer, const at::Tensor& bias,
                       const at::Tensor& residual, const at::Tensor& normed,
                       const at::Tensor& weight, double eps) {
  auto taken = std::to_string(buffer.size(0)) + "x" + std::to_string(buffer.size(1));
  const std::pair<const char*, at::Tensor> read[] = {
      {" bias", bias}, {" residual", residual}, {" normed", normed}, {" weight", weight}};
  for (const auto& [name, t] : read) {
    if (!t.defined()) continue;
    TORCH_CHECK(t.is_contiguous() && t.scalar_type() == buffer.scalar_type(),
                "a kernel reads contiguous memory:", name);
    taken += name;
  }
  c10d::AllreduceOptions options;
  options.asyncOp = true;
  std::vector<at::Tensor> tensors{buffer};
  c10d::resolve_process_group(group)->allreduce(tensors, options)->wait();
  auto sum = buffer.to(at::kDouble);
  if (bias.defined()) sum.add_(bias);
  if (residual.defined()) sum.add_(residual);
  buffer.copy_(sum);
  sum = buffer.to(at::kDouble);
  if (normed.defined())
    normed.copy_(sum.mul(sum.square().mean(-1, true).add(eps).rsqrt()).mul(weight));
  return taken;
}
}  // namespace test_peers
"""

TEST_PEERS = r"""
namespace tpkernels {
struct TestPeers : PeerAllReduce {
  TestPeers(std::string group, int64_t bytes) : group_(std::move(group)), bytes_(bytes) {}
  bool supports(const at::Tensor& buffer) const override {
    return buffer.scalar_type() == at::kFloat &&
           static_cast<int64_t>(buffer.nbytes()) <= std::abs(bytes_);
  }
  bool belongs_to(c10d::ProcessGroup&) const override { return bytes_ > 0; }
  bool fuses_norm() const override { return true; }
  void all_reduce(StagedTerm staged, const at::Tensor&, const Epilogue& e) override {
    taken.push_back(
        test_peers::all_reduce(group_, staged.term, e.bias, e.residual, e.normed, e.weight, e.eps));
  }
  std::vector<std::string> taken;

 private:
  const std::string group_;
  const int64_t bytes_;
};
void open_peers(const std::string& group, int64_t bytes) {
  log_start();
  set_peer_all_reduce(group, std::make_shared<TestPeers>(group, bytes));
}
// Returns the all-reduces that went through it since, and the log.
std::tuple<std::vector<std::string>, std::vector<std::string>> close_peers(
    const std::string& group) {
  std::vector<std::string> logged;
  for (const auto& entry : log_stop())
    logged.push_back(entry.tag + ":" + std::to_string(entry.bytes));
  auto taken = static_cast<TestPeers&>(*find_peer_all_reduce(group)).taken;
  set_peer_all_reduce(group, nullptr);
  return {taken, logged};
}
}  // namespace tpkernels
"""

LIBRARY = """
TORCH_LIBRARY_FRAGMENT(tpk_mutant_{i}, m) {{
  m.def("open_peers(str group, int bytes) -> ()", &mutant_{shared}::open_peers);
  m.def("close_peers(str group) -> (str[], str[])", &mutant_{shared}::close_peers);
{ops}}}
"""


def engine_text(name: str, seen: set[str], system: dict[str, None]) -> str:
    """A source with its own headers in their places.

    Other headers, but for those inside an #if, are collected in `system`.
    """
    seen.add(name)
    text, conditional, folder = "", False, Path(name).parent
    for line in (ROOT / "csrc" / name).read_text().splitlines(keepends=True):
        if own := re.match(r'#include "(.+)"', line):
            header = os.path.normpath(folder / own[1])
            text += "" if header in seen else engine_text(header, seen, system)
        elif line.startswith("#include") and not conditional:
            system[line] = None
        elif not line.startswith("#pragma once"):
            conditional = line.startswith("#if") or (conditional and not line.startswith("#endif"))
            text += line
    return text


def mutated(edits: Sequence[Edit], parts: dict[str, str]) -> dict[str, str]:
    """The engine's files with the edits in them; each edit finds its markers in one file."""
    parts = dict(parts)
    for edit in edits:
        name = next(name for name, text in parts.items() if edit.markers <= markers(text))
        parts[name] = edit.apply(parts[name])
    return parts


def engine_markers() -> set[str]:
    """Every marker of the engine's files."""
    files = (ROOT / "csrc/engine").iterdir()
    return set().union(*(markers(file.read_text()) for file in files))


def schemas() -> dict[str, str]:
    """Every op's schema, by its name."""
    text = (ROOT / "csrc/ops.cpp").read_text()
    literals = re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)+)', text)
    joined = ("".join(re.findall('"(.*?)"', literal)) for literal in literals)
    return {schema.partition("(")[0]: schema for schema in joined}


def mutants_source() -> str:
    """The whole translation unit."""
    system, seen = {"#include <torch/library.h>\n": None}, set()
    parts = {name: engine_text(name, seen, system) for name in (*SHARED, *OPS)}
    schema_of = schemas()
    text = "".join(system) + STAND_IN
    for i, edits in enumerate([[], *MUTANTS.values()]):
        copy = mutated(edits, parts)
        changed = [part for part in parts if copy[part] != parts[part]]
        alone = bool(changed) and set(changed) <= set(OPS)
        if alone:
            engine = "".join(copy[part] for part in changed)
            opening = f"namespace mutant_{i} {{ using namespace mutant_0;"
        else:
            engine = "".join(copy.values()) + TEST_PEERS
            opening = f"namespace mutant_{i} {{"
        engine = re.sub(r"^namespace tpkernels {", opening, engine, flags=re.M)
        text += engine.replace("LIBRARY_IMPL(tpkernels,", f"LIBRARY_IMPL(tpk_mutant_{i},")
        ops = re.findall(r'm\.impl\("(\w+)"', engine)
        assert ops, f"mutant {i} has no op"
        defs = "".join(f'  m.def("{schema_of[op]}");\n' for op in ops)
        text += LIBRARY.format(i=i, shared=0 if alone else i, ops=defs)
    return text
