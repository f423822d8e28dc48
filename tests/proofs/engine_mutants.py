"""Faults planted in the engine for test_stream_semantics.py, as edits of the statements that
csrc/engine marks (mutation.py).

A wait that is left to Pending's destructor gives the right values wherever nothing follows it, but
loses the collective's error. The order of Pending's members alone is no mutant: the destructor has
waited before it frees either.
"""

from mutation import Edit, copy, delete, insert, move, replace

WAITED = r"^(.*)\.wait\(\);$"  # a collective that is waited for at once
NO_WAIT = r"\1;"
LEAKED = r"new Pending(\1);"
NAMED = r"auto flying = \1;"
WAIT = "flying.wait();"
LAUNCH = r"^(\w+)\.push_back\(.*\);$"  # a collective that joins those in flight
WAIT_FOR_ALL = r"for (auto& p : \1) p.wait();"
LEAK_ALL = r"new std::vector<Pending>(std::move(\1));"
WAIT_FOR_LAST = r"\1.back().wait();"
WAIT_FOR_PREVIOUS = r"if (i > 0) \1[i - 1].wait();"

ROW = [
    ("row_linear: wait left to the destructor", delete("row.wait")),
    (
        "row_linear: never waits",
        delete("row.wait"),
        copy("row.launch", LAUNCH, LEAK_ALL, before="row.issued"),
    ),
    (
        "row_linear: waits before the next GEMM",
        copy("row.launch", LAUNCH, WAIT_FOR_LAST, after="row.launch"),
    ),
    (
        "row_linear: waits one chunk behind",
        copy("row.launch", LAUNCH, WAIT_FOR_PREVIOUS, after="row.launch"),
    ),
    ("row_linear: launches before the GEMM", move("row.launch", before="row.gemm")),
    ("row_linear: epilogue before its wait", move("row.wait", after="row.epilogue")),
    (
        "row_linear: epilogue after the previous chunk's wait",
        replace("row.wait", r"^(\w+)\[i\]", r"if (i > 0) \1[i - 1]"),
    ),
    ("row_linear: waits for the first chunk only", replace("row.wait", r"\[i\]", "[0]")),
    (
        "row_linear: all waits before the epilogue",
        replace("row.wait", r"^(\w+)\[i\]\.wait\(\);", WAIT_FOR_ALL),
    ),
]

COLUMN = [
    ("column_linear_backward: wait left to the destructor", delete("column.wait")),
    (
        "column_linear_backward: never waits",
        replace("column.wait", r"^.* : (\w+)\) .*$", LEAK_ALL),
    ),
    (
        "column_linear_backward: waits before the next GEMM",
        copy("column.launch", LAUNCH, WAIT_FOR_LAST, after="column.launch"),
    ),
    (
        "column_linear_backward: waits before the weights' GEMMs",
        move("column.wait", before="column.weights"),
    ),
    (
        "column_linear_backward: launches before the GEMMs",
        move("column.launch", before="column.gemm"),
    ),
]

SMALL = [
    ("all_reduce_: wait left to the destructor", replace("all_reduce.reduce", WAITED, NO_WAIT)),
    ("all_reduce_: never waits", replace("all_reduce.reduce", WAITED, LEAKED)),
    (
        "all_reduce_: copies back before the wait",
        replace("all_reduce.reduce", WAITED, NAMED),
        insert(WAIT, after="all_reduce.copy_back"),
    ),
    ("all_gather: wait left to the destructor", replace("all_gather", WAITED, NO_WAIT)),
    ("all_gather: never waits", replace("all_gather", WAITED, LEAKED)),
    (
        "all_gather: its shard is freed before its wait",
        replace("channel.gather_holds", r"\{(\w+), \w+\}", r"{\1}"),
        replace("all_gather", WAITED, NAMED),
        insert(WAIT, after="all_gather"),
    ),
    ("vocab_embedding: wait left to the destructor", replace("embedding.sum", WAITED, NO_WAIT)),
    (
        "vocab_embedding: zeros others' rows in flight",
        replace("embedding.sum", WAITED, NAMED),
        move("embedding.mask", after="embedding.sum"),
        insert(WAIT, after="embedding.mask"),
    ),
    ("all_reduce: not asynchronous", replace("channel.sum_async", "= .*;", "= false;")),
    ("all_gather: not asynchronous", replace("channel.gather_async", "= .*;", "= false;")),
]

PENDING = [
    ("Pending: does not hold its tensors", replace("pending.hold", r"tensors_\(.*?\)\), ", "")),
    ("Pending: frees its tensors before its wait", move("pending.free", before="pending.take")),
    (
        "Pending: destructor frees its tensors before its wait",
        copy("pending.free", "$", "", before="pending.destroy"),
    ),
    ("Pending: destructor does not wait", delete("pending.destroy")),
    (
        "Pending: waits twice",
        replace("pending.wait", r"(\w+->wait\(\));", r"\1, \1;"),
    ),
    (
        "Pending: keeps its work after the wait",
        replace("pending.take", r"std::move\((\w+)\)", r"\1"),
    ),
    (
        "Pending: waits again after a wait that throws",
        replace("pending.take", r"^auto (\w+) = std::move\((\w+)\)", r"auto& \1 = \2"),
        copy("pending.wait", r"^.*?(\w+)->wait\(\);$", r"\1.reset();", after="pending.wait"),
    ),
    (
        "Pending: moving it copies its work",
        replace(
            "pending.move",
            r"\(Pending&&\) = default;",
            "(Pending&& other) : tensors_(other.tensors_), work_(other.work_) {}",
        ),
    ),
]

LOSS = [
    (
        "vocab_ce: the maximum's wait left to the destructor",
        replace("loss.max", WAITED, NO_WAIT),
    ),
    ("vocab_ce: never waits for the maximum", replace("loss.max", WAITED, LEAKED)),
    (
        "vocab_ce: launches the maximum before it is there",
        move("loss.max", before="loss.maxima"),
    ),
    (
        "vocab_ce: fills in the widths in flight",
        replace("loss.max", WAITED, NAMED),
        move("loss.width", after="loss.max"),
        insert(WAIT, after="loss.width"),
    ),
    (
        "vocab_ce: reads the maximum before its wait",
        replace("loss.max", WAITED, NAMED),
        insert(WAIT, before="loss.sums"),
    ),
    ("vocab_ce: sums the maxima", replace("loss.max", "MAX", "SUM")),
    (
        "vocab_ce: takes the maximum of the sums",
        replace("loss.sums", r"(all_reduce\(\w+)", r"\1, 0, c10d::ReduceOp::MAX"),
    ),
    ("vocab_ce: the sums' wait left to the destructor", replace("loss.sums", WAITED, NO_WAIT)),
    ("vocab_ce: never waits for the sums", replace("loss.sums", WAITED, LEAKED)),
    (
        "vocab_ce: launches the sums before the last of them is there",
        move("loss.smoothed", after="loss.sums"),
    ),
    (
        "vocab_ce: reads the sums before their wait",
        replace("loss.sums", WAITED, NAMED),
        insert(WAIT, before="loss.result"),
    ),
]

IF_LAUNCHED = "if (input_grad) "
LINEAR_LOSS = [
    ("vocab_linear_ce: wait left to the destructor", delete("linear_loss.wait")),
    (
        "vocab_linear_ce: never waits",
        replace("linear_loss.wait", r"^.* : (\w+)\) .*$", LEAK_ALL),
    ),
    (
        "vocab_linear_ce: waits for the first chunk only",
        replace("linear_loss.wait", r"^.* : (\w+)\) .*$", IF_LAUNCHED + r"\1[0].wait();"),
    ),
    (
        "vocab_linear_ce: waits before the weight's gradient",
        copy("linear_loss.launch", LAUNCH, WAIT_FOR_LAST, after="linear_loss.launch"),
    ),
    (
        "vocab_linear_ce: waits before the bias' gradient",
        copy("linear_loss.launch", LAUNCH, IF_LAUNCHED + WAIT_FOR_LAST, before="linear_loss.bias"),
    ),
    (
        "vocab_linear_ce: waits before the next chunk's logits",
        copy("linear_loss.launch", LAUNCH, IF_LAUNCHED + WAIT_FOR_LAST, after="linear_loss.bias"),
    ),
    (
        "vocab_linear_ce: waits one chunk behind",
        copy(
            "linear_loss.launch", LAUNCH, IF_LAUNCHED + WAIT_FOR_PREVIOUS, after="linear_loss.bias"
        ),
    ),
    (
        "vocab_linear_ce: launches before the GEMM",
        move("linear_loss.launch", before="linear_loss.gemm"),
    ),
    (
        "vocab_linear_ce: launches after the weight's gradient",
        insert(IF_LAUNCHED + "{", before="linear_loss.bias"),
        copy("linear_loss.slice", "$", "", before="linear_loss.bias"),
        move("linear_loss.launch", before="linear_loss.bias"),
        insert("}", before="linear_loss.bias"),
    ),
    (
        "vocab_linear_ce: launches after all chunks",
        insert("for (int64_t i = 0; input_grad && i < count; i++) {", before="linear_loss.wait"),
        copy("linear_loss.chunk", "$", "", before="linear_loss.wait"),
        copy("linear_loss.slice", "$", "", before="linear_loss.wait"),
        move("linear_loss.launch", before="linear_loss.wait"),
        insert("}", before="linear_loss.wait"),
    ),
    (
        "vocab_linear_ce: every chunk's input gradient in the first one's rows",
        replace("linear_loss.slice", r"(narrow\(0, )\w+", r"\g<1>0"),
    ),
    (
        "vocab_linear_ce: the weight's gradient from the logits",
        move("linear_loss.weight", before="linear_loss.gradient"),
    ),
    (
        "vocab_linear_ce: the next chunk's logits before the bias' gradient",
        insert(
            "if (const auto next = std::min(size, rows - begin - size)) {"
            " auto next_logits = logits.narrow(0, 0, next);"
            " at::mm_out(next_logits, input.narrow(0, begin + size, next), weight.t()); }",
            before="linear_loss.bias",
        ),
    ),
]

PEERS = [
    (
        "peers: the GEMM adds the bias too",
        replace("peers.linear", "std::nullopt", "channel.rank() == 0 ? layer.bias : std::nullopt"),
    ),
    ("peers: the bias is left out", delete("peers.bias")),
    (
        "peers: the bias is read as if contiguous",
        replace("peers.bias", r"(\S+)->contiguous\(\)", r"*\1"),
    ),
    ("peers: the residual is left out", delete("peers.residual")),
    (
        "peers: the residual is read as if contiguous",
        replace("peers.residual", r"\.contiguous\(\)", ""),
    ),
    (
        "peers: the epilogue is applied again",
        copy(
            "peers.reduce",
            r"^.*, (\w+), (\w+)\);$",
            r"if (\2.residual.defined()) \1.add_(\2.residual);",
            after="peers.reduce",
        ),
    ),
    (
        "peers: the sum is taken again",
        copy(
            "peers.reduce",
            r"^(\w+)\..*, (\w+), \w+\);$",
            r"\1.all_reduce(\2).wait();",
            after="peers.reduce",
        ),
    ),
    (
        "peers: the sum is taken before the GEMM",
        replace("peers.reduce", r"std::move\((\w+)\)", r"\1"),
        move("peers.reduce", before="peers.gemm"),
    ),
    ("peers: the flat sum is taken again", delete("channel.flat_end")),
    ("peers: the epilogue is lost", replace("channel.peers", r", \w+\);$", ", {});")),
    ("peers: not logged", delete("channel.log")),
    ("peers: taken for several chunks", replace("channel.supports", r"chunks == 1 && ", "")),
    ("peers: taken for nothing", replace("channel.supports", r"\w+\.numel\(\) && ", "")),
    ("peers: taken for what does not fit", replace("channel.supports", r" && \w+->\w+\(\w+\)", "")),
    (
        "peers: taken for a maximum",
        replace("channel.flat", r"\w+ == c10d::ReduceOp::SUM && ", ""),
    ),
    ("peers: never taken", replace("channel.supports", "return .*;", "return false;")),
    (
        "peers: the norm takes a pass of its own",
        replace("peers.norm", r" && [\w.]+->\w+\(\)", " && false"),
    ),
    ("peers: of a group that is gone", delete("channel.belongs")),
    (
        "peers: none where they serve",
        replace("channel.belongs", r"^if \(.*\) (\w+ = nullptr;)$", r"\1"),
    ),
    ("peers: the norm is taken again", delete("norm.fused")),
    (
        "peers: the norm's weight is read as if contiguous",
        replace("norm.weight", r"\.contiguous\(\)", ""),
    ),
    ("peers: the norm's eps is left out", delete("norm.eps")),
]

MUTANTS: dict[str, list[Edit]] = {
    name: list(edits)
    for name, *edits in (*ROW, *COLUMN, *SMALL, *PENDING, *LOSS, *LINEAR_LOSS, *PEERS)
}
