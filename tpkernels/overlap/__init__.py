"""How a GEMM and its all-reduce overlap: chunks, cost model and calibration."""
