"""One file an op: fake kernel, autograd.Function and functional."""
