"""One file an op family: fake kernels, autograd.Functions and their functional wrappers."""
