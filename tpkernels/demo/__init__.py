"""`tpkernels demo`: SmolLM2-135M sharded over ranks, trained, and compared with the full model."""
