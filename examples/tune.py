"""Measure this machine's GEMMs and the group's link, and ask a layer for its schedule.

torchrun --nproc-per-node 2 examples/tune.py

On one host the ranks share memory, where one chunk is the fastest. With gloo, as between hosts,
the cost model has a choice to make: set TPKERNELS_TRANSPORT=gloo to see it.
"""

import os

import torch

import tpkernels as tpk


def main(rows=512, hidden=256):
    mesh = tpk.init_mesh(tp=int(os.environ["WORLD_SIZE"]))
    layer = tpk.nn.RowParallelLinear(4 * hidden, hidden, group=mesh["tp"])
    before = layer.explain(rows)
    # The first rank's figures count for all, and it saves them: the next init_mesh finds them.
    shape = (rows, 4 * hidden // mesh["tp"].size(), hidden)  # rows, a rank's share of K, N
    calibration = tpk.tune(mesh["tp"], [shape], dtypes=[torch.float32])
    if mesh.get_rank() == 0:
        print(f"before: {before}\n")
        print(f"measured: {calibration.timings[torch.float32].summary}\n")
        print(f"after: {layer.explain(rows)}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
