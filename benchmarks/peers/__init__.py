"""The systems measured beside tpkernels, one adapter each."""
