"""Faults planted in the engine, and the source that builds it with each of them, for test_stream_semantics.py."""

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# (what is broken, text of the engine, text put in its place, ...); each text occurs once in the engine. A wait that is left to
# Pending's destructor gives the right values wherever nothing follows it, but loses the collective's error. The order of Pending's
# members alone is no mutant: the destructor has waited before it frees either.
ROW_LAUNCH = "    pending.push_back(channel.all_reduce(slice, i));\n  }\n  // Every GEMM"
ROW_GEMM = "      linear_out(slice, x_i, weight, gemm_adds_bias ? bias : std::nullopt, grad);\n"
ROW_WAIT = "    pending[i].wait();\n"
ROW_EPILOGUE = (
    "  for (size_t i = 0; i < count; i++) {\n    pending[i].wait();\n    if (!rest) continue;\n"
)
COLUMN_LAUNCH = (
    "        pending.push_back(channel.all_reduce(slice, i));\n      }\n    }\n    auto shape"
)
COLUMN_WAIT = "  for (auto& p : pending) p.wait();\n  return grads;"
COLUMN_GEMMS = "          gradients.input_out(slice, bounds[i]);\n"
LEAK = "new std::vector<Pending>(std::move(pending));"
REDUCE = "  Channel(group, tag).all_reduce(buffer, 0, op == "
REDUCE_WAIT = "c10d::ReduceOp::MAX).wait();\n  if (!self.is_contiguous()) self.copy_(buffer);"
DESTRUCTOR = "    try {\n      wait();\n    } catch (...) {"
HOLD = "tensors_(std::move(tensors)), work_(std::move(work)) {}"
WAIT = "    auto work = std::move(work_);\n    if (work) work->wait();\n    tensors_.clear();"
GATHER = "  channel.all_gather(out, self.contiguous()).wait();"
EMBEDDING = "Channel(group, tag).all_reduce(out).wait();"
MAXIMUM = "  channel.all_reduce(peaks, 0, c10d::ReduceOp::MAX).wait();\n"
SUMS = "  channel.all_reduce(sums).wait();\n"
SMOOTHED = "  if (smoothing != 0) sums[2].copy_(total - width * peak);\n"
LOSS_LAUNCH = "      pending.push_back(channel.all_reduce(slice, i));\n    }\n    if (weight_grad)"
LOSS_GEMM = "      LinearGrads({logits}, x, weight).input_out(slice, 0);\n"
LOSS_WAIT = "  for (auto& p : pending) p.wait();\n  std::vector<at::Tensor> results"
LOSS_WEIGHT = "    if (weight_grad) add_weight_grad_(d_weight, logits, x);\n"
LOSS_BIAS = (
    "    if (bias_grad) d_bias.add_(logits.sum(0, /*keepdim=*/false, d_bias.scalar_type()));\n"
)
LOSS_GRADIENT = "    to_gradient_(logits, t, log_norm, scale->narrow(0, begin, size), first, 1 - smoothing, smoothing / num_classes);\n"
NOW = "    channel.all_reduce_now(std::move(staged), slice, here);\n"
NOW_FLAT = "    all_reduce_now({flat, nullptr}, flat, {});\n    return {};\n"
PART = "linear_out(part, x.narrow(0, begin, part.size(0)), weight, std::nullopt, grad);"
FITS = "return peers && chunks == 1 && buffer.numel() && peers->takes(buffer);"

MUTANTS: list[tuple[str, ...]] = [
    ("row_linear: wait left to the destructor", ROW_WAIT, ""),
    (
        "row_linear: never waits",
        ROW_WAIT,
        "",
        "  return out.view(shape);\n}\n\n}  // namespace",
        f"  {LEAK}\n  return out.view(shape);\n}}\n\n}}  // namespace",
    ),
    (
        "row_linear: waits before the next GEMM",
        ROW_LAUNCH,
        ROW_LAUNCH.replace("\n  }", "\n    pending.back().wait();\n  }", 1),
    ),
    (
        "row_linear: waits one chunk behind",
        ROW_LAUNCH,
        ROW_LAUNCH.replace("\n  }", "\n    if (i > 0) pending[i - 1].wait();\n  }", 1),
    ),
    (
        "row_linear: launches before the GEMM",
        ROW_GEMM,
        "      pending.push_back(channel.all_reduce(slice, i));\n" + ROW_GEMM,
        ROW_LAUNCH,
        "  }\n  // Every GEMM",
    ),
    (
        "row_linear: epilogue before its wait",
        ROW_EPILOGUE,
        ROW_EPILOGUE.replace(ROW_WAIT, ""),
        "      slice.add_(rest_i);\n    }\n",
        "      slice.add_(rest_i);\n    }\n    pending[i].wait();\n",
    ),
    (
        "row_linear: epilogue after the previous chunk's wait",
        ROW_WAIT,
        "    if (i > 0) pending[i - 1].wait();\n",
    ),
    ("row_linear: waits for the first chunk only", ROW_WAIT, "    pending[0].wait();\n"),
    (
        "row_linear: all waits before the epilogue",
        ROW_WAIT,
        "    for (auto& p : pending) p.wait();\n",
    ),
    ("column_linear_backward: wait left to the destructor", COLUMN_WAIT, "  return grads;"),
    ("column_linear_backward: never waits", COLUMN_WAIT, f"  {LEAK}\n  return grads;"),
    (
        "column_linear_backward: waits before the next GEMM",
        COLUMN_LAUNCH,
        COLUMN_LAUNCH.replace("\n      }", "\n        pending.back().wait();\n      }", 1),
    ),
    (
        "column_linear_backward: waits before the weights' GEMMs",
        COLUMN_LAUNCH,
        COLUMN_LAUNCH.replace(
            "    }\n    auto", "    }\n    for (auto& p : pending) p.wait();\n    auto"
        ),
    ),
    (
        "column_linear_backward: launches before the GEMMs",
        COLUMN_GEMMS,
        "",
        COLUMN_LAUNCH,
        COLUMN_LAUNCH.replace("\n      }", f"\n{COLUMN_GEMMS}      }}", 1),
    ),
    ("all_reduce_: wait left to the destructor", REDUCE_WAIT, REDUCE_WAIT.replace(".wait()", "")),
    (
        "all_reduce_: never waits",
        REDUCE,
        REDUCE.replace("Channel(", "new Pending(Channel("),
        REDUCE_WAIT,
        REDUCE_WAIT.replace(".wait()", ")"),
    ),
    (
        "all_reduce_: copies back before the wait",
        REDUCE,
        REDUCE.replace("Channel(", "auto p = Channel("),
        REDUCE_WAIT,
        REDUCE_WAIT.replace(".wait()", "") + "\n  p.wait();",
    ),
    ("all_gather: wait left to the destructor", GATHER, GATHER.replace(".wait()", "")),
    (
        "all_gather: never waits",
        GATHER,
        "  new Pending(channel.all_gather(out, self.contiguous()));",
    ),
    (
        "all_gather: its shard is freed before its wait",
        "{flat_out, flat_shard}",
        "{flat_out}",
        GATHER,
        GATHER.replace("channel", "auto p = channel").replace(".wait()", "; p.wait()"),
    ),
    ("vocab_embedding: wait left to the destructor", EMBEDDING, EMBEDDING.replace(".wait()", "")),
    (
        "vocab_embedding: zeros others' rows in flight",
        "    out.masked_fill_(outside.unsqueeze(1), 0);\n",
        "",
        EMBEDDING,
        "auto p = Channel(group, tag).all_reduce(out);\n  out.masked_fill_(outside.unsqueeze(1), 0);\n  p.wait();",
    ),
    (
        "all_reduce: not asynchronous",
        "options.asyncOp = !(synchronous() && chunks == 1);",
        "options.asyncOp = false;",
    ),
    (
        "all_gather: not asynchronous",
        "  options.asyncOp = !synchronous();",
        "  options.asyncOp = false;",
    ),
    ("Pending: does not hold its tensors", HOLD, "work_(std::move(work)) {}"),
    ("Pending: frees its tensors before its wait", WAIT, "    tensors_.clear();\n" + WAIT),
    (
        "Pending: destructor frees its tensors before its wait",
        DESTRUCTOR,
        "    tensors_.clear();\n" + DESTRUCTOR,
    ),
    ("Pending: destructor does not wait", DESTRUCTOR, DESTRUCTOR.replace("wait();", "")),
    ("Pending: waits twice", WAIT, WAIT.replace("work->wait();", "work->wait(), work->wait();")),
    ("Pending: keeps its work after the wait", WAIT, WAIT.replace("std::move(work_)", "work_")),
    (
        "Pending: waits again after a wait that throws",
        WAIT,
        "    if (work_) work_->wait();\n    work_.reset();\n    tensors_.clear();",
    ),
    (
        "Pending: moving it copies its work",
        "Pending(Pending&&) = default;",
        "Pending(Pending&& other) : tensors_(other.tensors_), work_(other.work_) {}",
    ),
    (
        "vocab_ce: the maximum's wait left to the destructor",
        MAXIMUM,
        MAXIMUM.replace(".wait()", ""),
    ),
    (
        "vocab_ce: never waits for the maximum",
        MAXIMUM,
        MAXIMUM.replace("channel", "new Pending(channel").replace(".wait()", ")"),
    ),
    (
        "vocab_ce: launches the maximum before it is there",
        MAXIMUM,
        "",
        "  peaks.narrow(0, 0, rows).copy_(top);\n",
        f"{MAXIMUM}  peaks.narrow(0, 0, rows).copy_(top);\n",
    ),
    (
        "vocab_ce: fills in the widths in flight",
        "  peaks[rows + 1].fill_(-width);\n" + MAXIMUM,
        MAXIMUM.replace("channel", "auto p = channel").replace(".wait()", "")
        + "  peaks[rows + 1].fill_(-width);\n  p.wait();\n",
    ),
    (
        "vocab_ce: reads the maximum before its wait",
        MAXIMUM,
        MAXIMUM.replace("channel", "auto p = channel").replace(".wait()", ""),
        SUMS,
        f"  p.wait();\n{SUMS}",
    ),
    ("vocab_ce: sums the maxima", MAXIMUM, MAXIMUM.replace("MAX", "SUM")),
    (
        "vocab_ce: takes the maximum of the sums",
        SUMS,
        SUMS.replace("sums", "sums, 0, c10d::ReduceOp::MAX"),
    ),
    ("vocab_ce: the sums' wait left to the destructor", SUMS, SUMS.replace(".wait()", "")),
    (
        "vocab_ce: never waits for the sums",
        SUMS,
        SUMS.replace("channel", "new Pending(channel").replace(".wait()", ")"),
    ),
    (
        "vocab_ce: launches the sums before the last of them is there",
        SMOOTHED + SUMS,
        SUMS + SMOOTHED,
    ),
    (
        "vocab_ce: reads the sums before their wait",
        SUMS,
        SUMS.replace("channel", "auto p = channel").replace(".wait()", ""),
        "  auto loss = log_sum",
        "  p.wait();\n  auto loss = log_sum",
    ),
    (
        "vocab_linear_ce: wait left to the destructor",
        LOSS_WAIT,
        "  std::vector<at::Tensor> results",
    ),
    ("vocab_linear_ce: never waits", LOSS_WAIT, f"  {LEAK}\n  std::vector<at::Tensor> results"),
    (
        "vocab_linear_ce: waits for the first chunk only",
        LOSS_WAIT,
        "  if (input_grad) pending[0].wait();\n  std::vector<at::Tensor> results",
    ),
    (
        "vocab_linear_ce: waits before the weight's gradient",
        LOSS_LAUNCH,
        LOSS_LAUNCH.replace("\n    }", "\n      pending.back().wait();\n    }"),
    ),
    (
        "vocab_linear_ce: waits before the bias' gradient",
        LOSS_BIAS,
        "    if (input_grad) pending.back().wait();\n" + LOSS_BIAS,
    ),
    (
        "vocab_linear_ce: waits before the next chunk's logits",
        LOSS_BIAS,
        LOSS_BIAS + "    if (input_grad) pending.back().wait();\n",
    ),
    (
        "vocab_linear_ce: waits one chunk behind",
        LOSS_BIAS,
        LOSS_BIAS + "    if (input_grad && i > 0) pending[i - 1].wait();\n",
    ),
    (
        "vocab_linear_ce: launches before the GEMM",
        LOSS_GEMM + LOSS_LAUNCH,
        f"      pending.push_back(channel.all_reduce(slice, i));\n{LOSS_GEMM}    }}\n    if (weight_grad)",
    ),
    (
        "vocab_linear_ce: launches after the weight's gradient",
        LOSS_LAUNCH,
        "    }\n    if (weight_grad)",
        LOSS_BIAS,
        "    if (input_grad) pending.push_back(channel.all_reduce(d_input.narrow(0, begin, size), i));\n"
        + LOSS_BIAS,
    ),
    (
        "vocab_linear_ce: launches after all chunks",
        LOSS_LAUNCH,
        "    }\n    if (weight_grad)",
        LOSS_WAIT,
        "  for (int64_t i = 0; input_grad && i < count; i++)\n    pending.push_back(channel.all_reduce(d_input.narrow(0, i * chunk_rows, "
        f"std::min(chunk_rows, rows - i * chunk_rows)), i));\n{LOSS_WAIT}",
    ),
    (
        "vocab_linear_ce: every chunk's input gradient in the first one's rows",
        "auto slice = d_input.narrow(0, begin, size);",
        "auto slice = d_input.narrow(0, 0, size);",
    ),
    (
        "vocab_linear_ce: the weight's gradient from the logits",
        LOSS_WEIGHT,
        "",
        LOSS_GRADIENT,
        LOSS_WEIGHT + LOSS_GRADIENT,
    ),
    (
        "vocab_linear_ce: the next chunk's logits before the bias' gradient",
        LOSS_BIAS,
        "    const auto next = std::min(size, rows - begin - size);\n    auto next_logits = logits.narrow(0, 0, next);\n"
        "    if (next) at::mm_out(next_logits, input.narrow(0, begin + size, next), weight.t());\n"
        + LOSS_BIAS,
    ),
    (
        "peers: the GEMM adds the bias too",
        PART,
        PART.replace("std::nullopt", "channel.rank() == 0 ? bias : std::nullopt"),
    ),
    ("peers: the bias is left out", "    if (bias) epilogue.bias = bias->contiguous();\n", ""),
    (
        "peers: the bias is read as if contiguous",
        "epilogue.bias = bias->contiguous();",
        "epilogue.bias = *bias;",
    ),
    (
        "peers: the residual is left out",
        "    if (residual) epilogue.residual = residual->expand(shape).reshape(out.sizes()).contiguous();\n",
        "",
    ),
    (
        "peers: the residual is read as if contiguous",
        "reshape(out.sizes()).contiguous();",
        "reshape(out.sizes());",
    ),
    (
        "peers: the epilogue is applied again",
        NOW,
        NOW + "    if (here.residual.defined()) slice.add_(here.residual);\n",
    ),
    ("peers: the sum is taken again", NOW, NOW + "    channel.all_reduce(slice).wait();\n"),
    (
        "peers: the sum is taken before the GEMM",
        NOW,
        "",
        '    {\n      const auto range = channel.range("gemm");\n      gemm(',
        NOW + "    {\n      gemm(",
    ),
    ("peers: the flat sum is taken again", NOW_FLAT, NOW_FLAT.replace("    return {};\n", "")),
    (
        "peers: the epilogue is lost",
        "peers->all_reduce(std::move(staged), out, epilogue);",
        "peers->all_reduce(std::move(staged), out, {});",
    ),
    (
        "peers: not logged",
        'log_write({"all_reduce", tag, name, static_cast<int64_t>(out.nbytes()), 0, 1});',
        ";",
    ),
    ("peers: taken for several chunks", FITS, FITS.replace("chunks == 1 && ", "")),
    ("peers: taken for nothing", FITS, FITS.replace("buffer.numel() && ", "")),
    ("peers: taken for what does not fit", FITS, FITS.replace(" && peers->takes(buffer)", "")),
    ("peers: taken for a maximum", "op == c10d::ReduceOp::SUM && fits_peers", "fits_peers"),
    ("peers: never taken", FITS, "return false;"),
    (
        "peers: the norm takes a pass of its own",
        " && channel.peers->norms()) epilogue.normed",
        " && false) epilogue.normed",
    ),
    ("peers: of a group that is gone", "if (peers && !peers->serves(*group)) peers = nullptr;", ""),
    (
        "peers: none where they serve",
        "if (peers && !peers->serves(*group)) peers = nullptr;",
        "peers = nullptr;",
    ),
    (
        "peers: the norm is taken again",
        "  if (epilogue.normed.defined()) return {sum, epilogue.normed.view(sum.sizes())};\n",
        "",
    ),
    (
        "peers: the norm's weight is read as if contiguous",
        "norm_weight.to(weight.scalar_type()).contiguous();",
        "norm_weight.to(weight.scalar_type());",
    ),
    ("peers: the norm's eps is left out", "  epilogue.eps = eps;\n", ""),
]

# What all ops share, and their files: a mutant of one of these is that file alone, beside the shared part of the engine as it is.
SHARED, SOURCES = (
    ("../op.h", "../cpu/packed.cpp", "../cpu/gemm.cpp", "comm.cpp"),
    ("linear.cpp", "loss.cpp"),
)

# In place of csrc/cuda/peer.cu: the kernel's result, by the group's own all-reduce.
PEERS = """
namespace test_peers {
std::string all_reduce(const std::string& group, const at::Tensor& buffer, const at::Tensor& bias, const at::Tensor& residual,
                       const at::Tensor& normed, const at::Tensor& weight, double eps) {
  auto taken = std::to_string(buffer.size(0)) + "x" + std::to_string(buffer.size(1));
  const std::pair<const char*, at::Tensor> read[] = {{" bias", bias}, {" residual", residual}, {" normed", normed}, {" weight", weight}};
  for (const auto& [name, t] : read) {
    if (!t.defined()) continue;
    TORCH_CHECK(t.is_contiguous() && t.scalar_type() == buffer.scalar_type(), "a kernel reads contiguous memory:", name);
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
  if (normed.defined()) normed.copy_(sum.mul(sum.square().mean(-1, true).add(eps).rsqrt()).mul(weight));
  return taken;
}
}  // namespace test_peers
"""

TEST_PEERS = """
namespace tpkernels {
struct TestPeers : PeerMemory {
  TestPeers(std::string group, int64_t bytes) : group_(std::move(group)), bytes_(bytes) {}
  bool takes(const at::Tensor& buffer) const override {
    return buffer.scalar_type() == at::kFloat && static_cast<int64_t>(buffer.nbytes()) <= std::abs(bytes_);
  }
  bool serves(c10d::ProcessGroup&) const override { return bytes_ > 0; }
  bool norms() const override { return true; }
  void all_reduce(Staged staged, const at::Tensor&, const Epilogue& e) override {
    taken.push_back(test_peers::all_reduce(group_, staged.part, e.bias, e.residual, e.normed, e.weight, e.eps));
  }
  std::vector<std::string> taken;

 private:
  const std::string group_;
  const int64_t bytes_;
};
void open_peers(const std::string& group, int64_t bytes) {
  log_start();
  set_peer_memory(group, std::make_shared<TestPeers>(group, bytes));
}
// What went through it since, and the log.
std::tuple<std::vector<std::string>, std::vector<std::string>> close_peers(const std::string& group) {
  std::vector<std::string> logged;
  for (const auto& entry : log_stop()) logged.push_back(entry.tag + ":" + std::to_string(entry.bytes));
  auto taken = static_cast<TestPeers&>(*find_peer_memory(group)).taken;
  set_peer_memory(group, nullptr);
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
    """A source with its own headers in their places; other headers, but for those inside an #if, are collected in `system`."""
    seen.add(name)
    text, conditional, folder = "", False, Path(name).parent
    for line in (ROOT / "csrc/overlap" / name).read_text().splitlines(keepends=True):
        if own := re.match(r'#include "(.+)"', line):
            header = os.path.normpath(folder / own[1])
            text += "" if header in seen else engine_text(header, seen, system)
        elif line.startswith("#include") and not conditional:
            system[line] = None
        elif not line.startswith("#pragma once"):
            conditional = line.startswith("#if") or (conditional and not line.startswith("#endif"))
            text += line
    return text


def mutated(name: str, edits: tuple[str, ...], parts: dict[str, str]) -> dict[str, str]:
    """The engine's texts with the edits in them."""
    parts = dict(parts)
    for old, new in zip(edits[::2], edits[1::2], strict=True):
        places = [part for part, text in parts.items() if old in text]
        fits = len(places) == 1 and parts[places[0]].count(old) == 1
        assert fits, (
            f"mutant '{name}' does not fit the engine: {sum(text.count(old) for text in parts.values())} times {old!r}"
        )
        parts[places[0]] = parts[places[0]].replace(old, new)
    return parts


def mutants_source() -> str:
    """One translation unit: the engine in a namespace for each mutant, its ops in torch.ops.tpk_mutant_<i>. Mutant 0 is not mutated."""
    system, seen = {"#include <torch/library.h>\n": None}, set()
    parts = {name: engine_text(name, seen, system) for name in (*SHARED, *SOURCES)}
    registration = (ROOT / "csrc/registration.cpp").read_text()
    literals = re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)+)', registration)
    schemas = {
        schema.partition("(")[0]: schema
        for schema in ("".join(re.findall('"(.*?)"', literal)) for literal in literals)
    }
    ops = re.findall(r'm\.impl\("(\w+)", &tpkernels::(\w+)\)', registration)
    text = "".join(system) + PEERS
    for i, (name, *edits) in enumerate([("the engine",), *MUTANTS]):
        copy = mutated(name, edits, parts)
        changed = {part for part in parts if copy[part] != parts[part]}
        alone = bool(changed) and changed <= set(SOURCES)
        engine = (
            "".join(copy[part] for part in changed)
            if alone
            else "".join(copy.values()) + TEST_PEERS
        )
        opening = rf"\1 mutant_{i}" + (" { using namespace mutant_0;" if alone else " {")
        text += re.sub(r"^(namespace) tpkernels {", opening, engine, flags=re.M)
        here = [(op, f) for op, f in ops if re.search(rf"^\w.* {f}\(", engine, flags=re.M)]
        assert len(here) >= (2 if alone else 8), here
        impls = (
            f'  m.def("{schemas[op]}", torch::dispatch(c10::DispatchKey::CPU, &mutant_{i}::{f}));\n'
            for op, f in here
        )
        text += LIBRARY.format(i=i, shared=0 if alone else i, ops="".join(impls))
    return text
