"""SGLang's all-reduce over shared memory, which cannot be installed."""


def unavailable() -> str | None:
    return (
        "SGLang's all-reduce for CPUs (sgl-kernel/csrc/cpu/shm.cpp) is in no published package: "
        "the wheels of sgl-kernel hold CUDA kernels only, and the source archives of sglang leave "
        "sgl-kernel out"
    )
