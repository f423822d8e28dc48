"""`tpkernels demo`: SmolLM2-135M sharded over ranks, trained, and held against the unsharded model."""
